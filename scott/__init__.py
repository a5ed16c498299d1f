"""SCOTT + MIM-JEPA: self-supervised vision from a few thousand images. Names are imported at their first use."""
from importlib import import_module

__version__ = "0.1.0"

_HOMES = dict(Encoder='encoder', Predictor='predictor', MIMJEPA='jepa', blockwise='masking', uniform='masking',
              multiblock='masking', two_views='augment', load='data.sets', Config='train.config',
              pretrain='train.pretrain', Run='train.run')
_MODULES = ('masking', 'tokenizer', 'encoder', 'predictor', 'jepa', 'augment', 'schedule', 'interop', 'data', 'train',
            'probe', 'look', 'lab', 'course')
__all__ = ['__version__', *_HOMES, *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return import_module(f'{__name__}.{name}')
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__():
    return __all__
