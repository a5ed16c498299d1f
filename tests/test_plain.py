"""The plain versions against the fast ones: number by number where nothing is random, else by statistics."""
import io
import math
import multiprocessing
import random

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from scott.augment import MEAN, STD, resample, two_views
from scott.data.petals import petals
from scott.data.sets import ImageSet
from scott.jepa import MIMJEPA
from scott.kernels import attend
from scott.lab.plain import (PlainLoop, PlainViews, plain_attention, plain_batches, plain_ema, plain_masks, to_jpeg,
                             use_plain_blocks)
from scott.masking import blockwise, visible_count
from scott.train.config import Config, build
from scott.train.pretrain import Pretraining


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(jpeg):
    return transforms.functional.pil_to_tensor(Image.open(io.BytesIO(jpeg)))


def view(views, row, seed):
    "Both views of a picture, drawn from this seed."
    torch.manual_seed(seed)
    random.seed(seed)
    return views[row]


@pytest.fixture(scope='module')
def jpegs():
    """Smooth noise with color; no black and no white, because PIL clips overshoot between its two passes."""
    coarse = torch.rand(24, 3, 8, 8, generator=seeded())
    x = nn.functional.interpolate(coarse, 64, mode='bicubic').clamp(.1, .9)
    return to_jpeg((255 * x).round().to(torch.uint8))


# Attention

@pytest.mark.parametrize('shape', [(2, 4, 49, 48), (1, 1, 1, 8), (3, 2, 200, 16)], ids=str)
def test_attention_equals_the_fast_one(shape):
    g = seeded()
    q, k, v = (torch.randn(shape, generator=g, requires_grad=True) for _ in range(3))
    plain, fast = plain_attention(q, k, v), attend(q, k, v)
    torch.testing.assert_close(plain, fast, atol=1e-6, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (plain, fast))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_attention_drops_weights_not_outputs():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 1, 4)                                     # a single weight, equal to 1
    v = torch.ones(1, 1, 1, 4)
    out = torch.stack([plain_attention(q, k, v, .25)[0, 0, 0] for _ in range(2000)])
    assert set(out.unique().tolist()) == {0., torch.tensor(1 / .75).item()}
    assert (out == out[:, :1]).all()                                    # one weight: all channels or none
    assert abs((out[:, 0] > 0).float().mean() - .75) < 4 * math.sqrt(.75 * .25 / 2000)


# Masks

def neighbors(m):
    return ((m[:, 1:] & m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] & m[:, :, :-1]).sum((1, 2))).float()


@pytest.mark.parametrize('grid, ratio', [((14, 14), .6), ((7, 7), .6), ((7, 14), .75), ((4, 4), .5)], ids=str)
def test_masks_have_the_distribution_of_the_fast_ones(grid, ratio):
    n = 3000
    plain, fast = (f(n, grid, ratio, generator=seeded(1)).unflatten(1, grid) for f in (plain_masks, blockwise))
    assert plain.dtype == torch.bool and (plain.sum((1, 2)) == visible_count(grid, ratio)).all()
    share = [m.float().mean(0) for m in (plain, fast)]
    error = sum(s * (1 - s) / n for s in share).sqrt().clamp(min=1 / n)
    assert ((share[0] - share[1]) / error).abs().max() < 4.5            # up to 196 comparisons
    a, b = neighbors(plain), neighbors(fast)
    assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / n)
    assert .85 < a.std() / b.std() < 1.15


def test_masks_of_the_paper():
    share = plain_masks(3000, generator=seeded()).float().mean(0).unflatten(0, (14, 14))
    assert plain_masks(2).shape == (2, 196)
    assert .70 < share[6:8, 6:8].mean() < .80 and .03 < share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < .08


def test_masks_follow_the_generator():
    a, b, c = (plain_masks(4, generator=seeded(s)) for s in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and not a[0].equal(a[1])


@pytest.mark.parametrize('grid', [(3, 3), (3, 40), (5, 5)], ids=str)
@pytest.mark.parametrize('ratio', [.3, .6, .9])
def test_masks_are_exact_on_odd_grids(grid, ratio):
    assert (plain_masks(20, grid, ratio, seeded()).sum(1) == visible_count(grid, ratio)).all()


# Moving average

def pair():
    torch.manual_seed(0)
    jepa = MIMJEPA(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 7)), nn.Identity())
    with torch.no_grad():
        for p in jepa.context.parameters(): p.add_(torch.randn_like(p))
    return jepa


@pytest.mark.parametrize('m', [0., .5, .9, .996, .99999])
def test_ema_equals_the_fast_one(m):
    """Within 2 ulp of the larger number: 2 * 2^-23 of it."""
    plain, fast, start = pair(), pair(), pair()
    plain_ema(plain.target, plain.context, m)
    fast.update_target(m)
    nets = plain.target, fast.target, start.target, start.context
    for p, q, old, goal in zip(*(list(x.parameters()) for x in nets)):
        assert ((p - q).abs() <= 2 * 2 ** -23 * torch.maximum(old.abs(), goal.abs())).all()
        torch.testing.assert_close(p, m * old + (1 - m) * goal)
    assert all(torch.equal(p, q) for p, q in zip(plain.context.parameters(), start.context.parameters()))


def test_ema_with_momentum_1_stays():
    jepa, start = pair(), pair()
    plain_ema(jepa.target, jepa.context, 1.)
    assert all(torch.equal(p, q) for p, q in zip(jepa.target.parameters(), start.target.parameters()))


# Views

def test_jpegs_are_files_of_the_pictures():
    x = (torch.arange(64)[:, None] + torch.arange(64)).repeat(2, 3, 1, 1).to(torch.uint8)
    x[1, 0] = 200                                                       # red: the order of channels matters
    coarse, fine = to_jpeg(x, 30), to_jpeg(x)
    assert all(Image.open(io.BytesIO(f)).format == 'JPEG' for f in fine)
    assert (torch.stack([pixels(f) for f in fine]).int() - x.int()).abs().float().mean() < 3
    assert sum(map(len, coarse)) < sum(map(len, fine))


def test_views_share_the_crop_which_is_the_fast_one(jpegs):
    views = PlainViews(jpegs, 40, color=0.)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    flips = set()
    for i in range(len(jpegs)):
        context, target = view(views, i, i)
        assert context.shape == (3, 40, 40) and context.dtype == torch.float32 and context.equal(target)
        torch.manual_seed(i)
        y, x, h, w = transforms.RandomResizedCrop.get_params(torch.empty(3, 64, 64), (.2, 1.), (3 / 4, 4 / 3))
        flip = torch.rand(1) < .5
        flips.add(flip.item())
        fast = resample(pixels(jpegs[i])[None], torch.tensor([[x, y, x + w, y + h]]) / 64, 40, flip)[0]
        assert (context * std + mean - fast).abs().max() * 255 < 1.5    # PIL rounds twice to whole gray levels
    assert flips == {True, False}


def statistics(context, target):
    both = torch.stack([context, target]).flatten(2)                    # 2 b (c h w)
    spread = torch.stack([context, target]).std(2).flatten(2).mean(-1).mean(0)         # how colorful
    return torch.stack([both.mean(-1).mean(0), both.std(-1).mean(0), (both[0] - both[1]).abs().mean(-1), spread], 1)


def test_views_have_the_statistics_of_the_fast_ones(jpegs):
    """Mean, std, distance of the views, colorfulness: within 4 standard errors and .01 (8-bit rounding)."""
    rounds, views, decoded, g = 40, PlainViews(jpegs, 32), torch.stack([pixels(j) for j in jpegs]), seeded()
    plain = torch.stack([statistics(*map(torch.stack, zip(*(view(views, i, 24 * r + i) for i in range(24)))))
                         for r in range(rounds)])
    fast = torch.stack([statistics(*two_views(decoded, size=32, generator=g)) for _ in range(rounds)])
    error = sum((x.var(0) / rounds).mean(0) / 24 for x in (plain, fast)).sqrt()
    gap = (plain.mean((0, 1)) - fast.mean((0, 1))).abs()
    assert (gap < 4 * error + .01).all(), (gap, error)


def test_how_often_views_are_changed(jpegs):
    n, views = 600, PlainViews(jpegs, 16)
    same = sum(a.equal(b) for a, b in (view(views, i % 24, i) for i in range(n))) / n
    untouched = .4 + .6 * .2 * .9 * .7                                  # a view as it was cropped
    assert abs(same - untouched ** 2) < 4 * math.sqrt(untouched ** 2 * (1 - untouched ** 2) / n) + .01
    assert len(views) == 24


def test_batches_go_on_without_end_and_their_workers_stop(jpegs):
    before = set(multiprocessing.active_children())
    batches = plain_batches(PlainViews(jpegs, 16), 10)
    for _ in range(5):  # two batches an epoch, a rest of 4
        views = next(batches)
        assert len(views) == 2 and all(v.shape == (10, 3, 16, 16) for v in views)
    assert set(multiprocessing.active_children()) > before
    batches.close()
    assert set(multiprocessing.active_children()) == before


# The loop

TOY = dict(embed_dim=48, depth=2, predictor_depth=1, batch_size=8, device='cpu', amp='off', out='none')


def flowers(n=32):
    images, labels = petals(n=n, size=73)
    return ImageSet(images, labels, torch.ones(n), [], 'petals', False, [])


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_plain_blocks_compute_the_same():
    jepa = build(Config.of('demo', **TOY)).eval()
    views, keep = torch.rand(2, 2, 3, 64, 64, generator=seeded()), torch.arange(16).repeat(2, 1) < 7
    fast = jepa(*views, keep)
    use_plain_blocks(jepa)
    torch.testing.assert_close(jepa(*views, keep), fast, rtol=1e-5, atol=0)


@pytest.mark.parametrize('steps', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_steps_of_plain_loop_and_trainer_are_the_same(steps):
    """Given the same batches, without dropout: losses, context, predictor and target."""
    cfg, data = Config.of('demo', **TOY), flowers()
    loop, trainer = PlainLoop(cfg, data), Pretraining(cfg, data).trainer
    begun, losses = weights(loop.jepa), []
    assert begun.equal(weights(trainer.model))
    for step in range(1, steps + 1):
        batch = next(iter(trainer.feed.batches(step)))
        loop.views, loop.masks = lambda: (batch.context, batch.target), lambda: batch.keep
        losses.append(loop.train_step())
        trainer.train_step()
    torch.testing.assert_close(sum(losses) / steps, trainer.tally.read().loss, rtol=1e-5, atol=0)
    ours, engine = weights(loop.jepa) - begun, weights(trainer.model) - begun
    assert engine.norm() > 0 and (ours - engine).norm() < 1e-3 * engine.norm()


def test_the_loop_trains_on_its_own_batches():
    loop = PlainLoop(Config.of('demo', **TOY), flowers())
    begun = [weights(net) for net in (loop.jepa.context, loop.jepa.predictor, loop.jepa.target)]
    losses = [loop.train_step() for _ in range(6)]  # more than an epoch
    loop.close()
    assert loop.step == 6 and len(set(losses)) == 6 and all(0 < loss < 1 for loss in losses) and loop.waited > 0
    for before, net in zip(begun, (loop.jepa.context, loop.jepa.predictor, loop.jepa.target)):
        assert weights(net).isfinite().all() and not weights(net).equal(before)
