"""MIM-JEPA as a whole: what gets a gradient, what the loss reads, what cannot leak, how the target moves."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

from scott.encoder import Encoder
from scott.jepa import MIMJEPA, hidden_smooth_l1
from scott.masking import blockwise
from scott.predictor import Predictor

NO_DROPOUT = dict(drop_rate=0., attn_drop_rate=0., drop_path_rate=0.)


def make(seed=0, reg_tokens=0, tokenizer='sparse', **drop):
    "A small JEPA on a 4 x 4 grid, two views of two images, and a mask."
    torch.manual_seed(seed)
    kw = dict(embed_dim=48, reg_tokens=reg_tokens, **drop)
    encoder = Encoder(tokenizer, img_size=64, depth=2, **kw)
    jepa = MIMJEPA(encoder, Predictor(encoder.grid, depth=1, encoder_depth=2, **kw))
    context, target = torch.randn(2, 2, 3, 64, 64)
    return jepa, context, target, blockwise(2, (4, 4), generator=torch.Generator().manual_seed(seed))


def in_pixels(keep):  # (B, 16) -> (B, 1, 64, 64)
    return keep.view(-1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)


# --- gradients

@pytest.mark.parametrize('reg_tokens', [0, 3])
@pytest.mark.parametrize('tokenizer', ['sparse', 'patch'])
def test_every_trained_parameter_gets_a_gradient_and_the_target_none(tokenizer, reg_tokens):
    jepa, context, target, keep = make(tokenizer=tokenizer, reg_tokens=reg_tokens, **NO_DROPOUT)
    jepa.train()(context, target, keep).backward()
    trained = [(name, p) for name, p in jepa.named_parameters() if not name.startswith('target.')]
    assert 'context.mask_token' in dict(trained)
    assert [name for name, p in trained if p.grad is None or not p.grad.any()] == []
    assert [name for name, p in jepa.target.named_parameters() if p.grad is not None or p.requires_grad] == []


def test_no_gradient_reaches_the_target_even_if_its_parameters_ask_for_one():
    jepa, context, target, keep = make(**NO_DROPOUT)
    jepa.target.requires_grad_(True)
    jepa(context, target, keep).backward()
    assert all(p.grad is None for p in jepa.target.parameters())


def test_no_gradient_reaches_the_target_view_nor_hidden_pixels():
    jepa, context, target, keep = make(**NO_DROPOUT)
    context.requires_grad_(), target.requires_grad_()
    jepa(context, target, keep).backward()
    assert target.grad is None
    hidden = ~in_pixels(keep).expand_as(context)
    assert (context.grad[hidden] == 0).all() and context.grad[~hidden].any()


# --- loss

def test_loss_equals_an_explicit_loop():
    g = torch.Generator().manual_seed(1)
    predictions, targets = 2 * torch.randn(2, 3, 6, 5, generator=g, dtype=torch.float64).float()
    keep = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]]).bool()  # 1, 6 and 3 hidden
    by_image, large = [], 0
    for b in range(3):
        by_token = []
        for n in range(6):
            if keep[b, n]: continue
            total = 0.
            for d in range(5):
                e = abs(predictions[b, n, d].item() - targets[b, n, d].item())
                large += e > 1
                total += e * e / 2 if e < 1 else e - .5
            by_token.append(total / 5)
        by_image.append(sum(by_token) / len(by_token))
    assert 0 < large  # both branches are in use
    assert hidden_smooth_l1(predictions, targets, keep).item() == pytest.approx(sum(by_image) / 3, abs=1e-6)


def test_loss_reads_hidden_positions_only():
    g = torch.Generator().manual_seed(2)
    predictions, targets = torch.randn(2, 2, 16, 8, generator=g)
    keep = blockwise(2, (4, 4), generator=g)
    predictions.requires_grad_()
    loss = hidden_smooth_l1(predictions, targets, keep)
    loss.backward()
    assert (predictions.grad[keep] == 0).all() and (predictions.grad[~keep] != 0).all()
    moved = torch.where(keep[..., None], predictions + 100, predictions)
    assert torch.equal(hidden_smooth_l1(moved, targets, keep), loss)


def test_loss_is_computed_in_32_bits():
    predictions, targets = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    keep = torch.arange(16).expand(2, -1) < 6
    loss = hidden_smooth_l1(predictions, targets, keep)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, hidden_smooth_l1(predictions.float(), targets.float(), keep))


def test_forward_is_the_loss_of_its_pieces():
    jepa, context, target, keep = make(**NO_DROPOUT)
    expected = F.layer_norm(copy.deepcopy(jepa.target)(target), (48,))
    assert torch.equal(jepa.targets(target), expected)
    predictions = jepa.predictor(jepa.context(context, keep))
    assert torch.equal(jepa(context, target, keep), hidden_smooth_l1(predictions, expected, keep))


def test_targets_are_normalized_and_do_not_see_the_scale():
    jepa, _, target, _ = make()
    answers = jepa.targets(target)
    assert answers.shape == (2, 16, 48) and not answers.requires_grad
    torch.testing.assert_close(answers.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


# --- leak

def test_hidden_pixels_of_the_context_view_change_nothing(figure):
    jepa, context, target, keep = make(**NO_DROPOUT)
    noisy = torch.where(in_pixels(keep), context, 100 * torch.randn_like(context))
    with torch.no_grad():
        loss = jepa(context, target, keep)
        assert (jepa(noisy, target, keep) - loss).item() == 0
        visible = torch.where(in_pixels(keep), context + 1, context)
        assert jepa(visible, target, keep) != loss  # the test can see a change
        assert jepa(context, torch.where(in_pixels(keep), target, target + 1), keep) != loss  # targets see everything
    figure('05 hidden pixels replaced by noise x 100', 'change of the loss 0.0')


# --- the target's moving average

def test_update_equals_a_loop_to_one_ulp(figure):
    jepa, *_ = make()
    with torch.no_grad():
        for p in jepa.context.parameters(): p.add_(.01 * torch.randn_like(p))
    before = [p.clone() for p in jepa.target.parameters()]
    jepa.update_target(.996)
    for old, new, context in zip(before, jepa.target.parameters(), jepa.context.parameters()):
        loop = old.lerp(context.detach(), 1 - .996)
        ulp = torch.nextafter(loop.abs(), torch.tensor(torch.inf)) - loop.abs()
        assert ((new - loop).abs() <= ulp).all()
        formula = .996 * old.double() + .004 * context.detach().double()
        torch.testing.assert_close(new.double(), formula, atol=1e-6, rtol=0)
        assert not torch.equal(new, old)
    figure('12 moving average: all tensors in one call = loop', 'within 1 ulp')


def test_at_momentum_1_the_target_stays_and_at_0_it_is_the_context():
    jepa, *_ = make()
    with torch.no_grad():
        for p in jepa.context.parameters(): p.add_(.01 * torch.randn_like(p))
    before = copy.deepcopy(jepa.target.state_dict())
    context = copy.deepcopy(jepa.context.state_dict())
    jepa.update_target(1.)
    assert all(torch.equal(before[k], v) for k, v in jepa.target.state_dict().items())
    jepa.update_target(0.)
    assert all(torch.equal(context[k], v) for k, v in jepa.target.state_dict().items())
    assert all(torch.equal(context[k], v) for k, v in jepa.context.state_dict().items())


def test_target_is_a_copy_not_an_alias():
    jepa, *_ = make()
    with torch.no_grad(): jepa.context.mask_token.add_(1)
    assert (jepa.context.mask_token - jepa.target.mask_token).abs().min() > .5


# --- modes, state

def test_target_stays_in_evaluation_mode():
    jepa, _, target, _ = make(drop_rate=.5)
    for mode in (True, False, True):
        jepa.train(mode)
        assert jepa.training == jepa.context.training == jepa.predictor.training == mode
        assert not any(m.training for m in jepa.target.modules())
    assert torch.equal(jepa.targets(target), jepa.targets(target))  # no dropout
    assert jepa.train() is jepa


def test_state_dict_has_three_parts_and_round_trips():
    jepa, context, target, keep = make(**NO_DROPOUT)
    other, *_ = make(seed=1, **NO_DROPOUT)
    state = jepa.state_dict()
    assert {k.split('.')[0] for k in state} == {'context', 'predictor', 'target'}
    assert [k[8:] for k in state if k.startswith('context.')] == [k[7:] for k in state if k.startswith('target.')]
    other.load_state_dict(state)
    with torch.no_grad(): assert torch.equal(other(context, target, keep), jepa(context, target, keep))


def test_a_step_under_bfloat16_autocast_is_finite_and_near_the_32_bit_one():
    jepa, context, target, keep = make(**NO_DROPOUT)
    exact = jepa(context, target, keep).item()
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-3)
    with torch.autocast('cpu', torch.bfloat16):
        loss = jepa(context, target, keep)
    loss.backward()
    optimizer.step()
    jepa.update_target(.9)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact) < .02 * exact  # bfloat16 has 8 bits: 0.4 % a rounding, and there are several
    assert all(torch.isfinite(p).all() for p in jepa.parameters())
    assert all(p.dtype == torch.float32 for p in jepa.parameters())


# --- the step as a whole: traced, and on another device

NOISY = dict(drop_rate=.3, attn_drop_rate=.2, drop_path_rate=.4)


@pytest.mark.parametrize('reg_tokens', [0, 3])
@pytest.mark.parametrize('tokenizer', ['sparse', 'patch'])
def test_forward_and_loss_are_one_graph_and_equal_to_eager(tokenizer, reg_tokens):
    jepa, *batch = make(tokenizer=tokenizer, reg_tokens=reg_tokens, **NOISY)
    torch._dynamo.reset()
    found = []
    for step in (jepa.train(), torch.compile(jepa, fullgraph=True, backend='eager')):
        torch.manual_seed(1)
        jepa.zero_grad()
        loss = step(*batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in jepa.parameters() if p.requires_grad)])
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.manual_seed(2)
    assert jepa(*batch) != found[0][0]  # dropout is on


def test_one_graph_under_autocast_too():
    jepa, *batch = make(**NOISY)
    torch._dynamo.reset()
    losses = []
    for step in (jepa.train(), torch.compile(jepa, fullgraph=True, backend='eager')):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16): losses.append(step(*batch))
    assert torch.equal(*losses)


class Watch(TorchDispatchMode):
    "Notes the operations whose results lie on another device, or have 64-bit floating-point numbers."
    def __init__(self, device):
        super().__init__()
        self.device, self.strange = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and (x.device.type != self.device or x.dtype == torch.float64):
                self.strange.add(f'{func}: {x.dtype} on {x.device}')
        return made


def whole_step(jepa, context, target, keep):
    loss = jepa(context, target, keep)
    loss.backward()
    jepa.update_target(.9)
    return loss.detach()


@pytest.mark.parametrize('reg_tokens', [0, 3])
@pytest.mark.parametrize('tokenizer', ['sparse', 'patch'])
def test_a_step_stays_on_the_device_of_its_inputs_in_32_bits(tokenizer, reg_tokens):
    jepa, *batch = make(tokenizer=tokenizer, reg_tokens=reg_tokens, **NOISY)
    jepa, batch = jepa.to('meta').train(), [x.to('meta') for x in batch]  # takes the way of a GPU, computes nothing
    with Watch('meta') as watch: assert whole_step(jepa, *batch).device.type == 'meta'
    assert not watch.strange
    images = torch.empty(2, 3, 96, 96, device='meta')  # positions are interpolated
    with Watch('meta') as watch: jepa.context(images), jepa.context.attention(images)
    assert not watch.strange
    with Watch('meta') as watch: torch.zeros(1), torch.ones(1, dtype=torch.float64, device='meta')
    assert len(watch.strange) == 2  # the test can fail


@pytest.mark.parametrize('tokenizer', ['sparse', 'patch'])
def test_a_step_on_a_cpu_asks_for_no_default_device(tokenizer):
    jepa, *batch = make(tokenizer=tokenizer, reg_tokens=3, **NOISY)
    jepa.train()
    other, losses = copy.deepcopy(jepa), []
    for net, device in ((jepa, 'cpu'), (other, 'meta')):  # as after torch.set_default_device
        torch.manual_seed(1)
        with torch.device(device), Watch('cpu') as watch: losses.append(whole_step(net, *batch))
        assert not watch.strange
    assert torch.equal(*losses)


# --- errors

@pytest.mark.parametrize('momentum', [-.1, 1.0001, float('nan')])
def test_momentum_outside_0_to_1_is_refused_and_nothing_moves(momentum):
    jepa, *_ = make()
    before = copy.deepcopy(jepa.target.state_dict())
    with pytest.raises(ValueError, match='momentum'): jepa.update_target(momentum)
    assert all(torch.equal(before[k], v) for k, v in jepa.target.state_dict().items())


def test_views_of_different_shapes_are_refused():
    jepa, context, target, keep = make()
    with pytest.raises(ValueError, match=r'context and target.*\(2, 3, 64, 64\).*\(1, 3, 64, 64\)'):
        jepa(context, target[:1], keep)


@pytest.mark.parametrize('change', [lambda k: k.float(), lambda k: k[:, :15], lambda k: k[:1]])
def test_wrong_masks_are_refused(change):
    jepa, context, target, keep = make()
    with pytest.raises(ValueError, match='keep'): jepa(context, target, change(keep))
    zeros = torch.zeros(2, 16, 4)
    with pytest.raises(ValueError, match='keep'): hidden_smooth_l1(zeros, zeros, change(keep))


def test_a_mask_that_hides_nothing_is_refused():
    jepa, context, target, keep = make()
    keep[1] = True
    with pytest.raises(ValueError, match='hides no token'): jepa(context, target, keep)


def test_predictions_and_targets_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match='predictions and targets'):
        hidden_smooth_l1(torch.zeros(2, 16, 4), torch.zeros(2, 1, 4), torch.zeros(2, 16, dtype=torch.bool))


def test_encoder_and_predictor_of_different_grids_are_refused():
    encoder = Encoder(img_size=(64, 144), embed_dim=48, depth=1)  # 4 x 9 patches, as many as 6 x 6
    with pytest.raises(ValueError, match=r'\(4, 9\).*\(6, 6\)'): MIMJEPA(encoder, Predictor(36, 48, depth=1))
    MIMJEPA(encoder, Predictor(encoder.grid, 48, depth=1))


@pytest.mark.parametrize('num_patches', [12, 0, -4, (4,), (0, 4)])
def test_predictor_refuses_a_grid_it_cannot_know(num_patches):
    with pytest.raises(ValueError, match='num_patches'): Predictor(num_patches, 48, depth=1)


@pytest.mark.parametrize('shape', [(2, 1, 48), (2, 15, 48), (2, 16, 32), (16, 48)])
def test_predictor_refuses_tokens_of_another_shape(shape):
    with pytest.raises(ValueError, match=r'\(B, 16, 48\)'): Predictor(16, 48, depth=1)(torch.zeros(shape))


# --- the predictor's facts

def test_predictor_has_the_released_parameters_without_the_unused_mask_token():
    count = sum(p.numel() for p in Predictor().parameters())
    assert count == 5_457_024 and count + 384 == 5_457_408


def test_initial_weights_count_on_from_the_encoders_depth():
    torch.manual_seed(0)
    for depth in (0, 7, 12):
        for l, block in enumerate(Predictor(16, 384, encoder_depth=depth).transformer.blocks, depth + 1):
            for weight in (block.attn.proj.weight, block.ffn.fc2.weight):
                assert weight.std().item() == pytest.approx(.02 / (2 * l) ** .5, rel=.01)  # 5 standard errors
