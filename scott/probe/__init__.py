from .heads import CrossAttentive, MultiHeadAttentive, SimpleAttentive

__all__ = ['SimpleAttentive', 'MultiHeadAttentive', 'CrossAttentive']
