"""The mask samplers: exact counts, the released code's statistics, properties over many grids and ratios, refusals."""
import inspect
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from scott import masking
from scott.masking import blockwise, multiblock, uniform, visible_count

PARITY = os.environ.get('SCOTT_PARITY', '')
STATISTICS = Path(PARITY) / 'mask_statistics.json'
SAMPLERS = [uniform, blockwise, multiblock]
BLOCKS = [blockwise, multiblock]
GRIDS = [(3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (14, 14), (16, 16), (24, 24), (3, 40), (40, 3), (7, 14), (13, 5)]
RATIOS = [0.01, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 0.95, 0.999]

every = pytest.mark.parametrize('sampler', SAMPLERS, ids=lambda s: s.__name__)
pytestmark = pytest.mark.usefixtures('one_thread')


def seeded(seed=0, device='cpu'):
    return torch.Generator(device).manual_seed(seed)


def exact_count(grid, ratio):
    """ceil((1 - ratio) N) in exact arithmetic, for the simplest fraction that this float stands for."""
    return math.ceil((1 - Fraction(ratio).limit_denominator(10_000)) * grid[0] * grid[1])


def adjacent_pairs(maps):
    return (maps[:, 1:] & maps[:, :-1]).sum((1, 2)) + (maps[:, :, 1:] & maps[:, :, :-1]).sum((1, 2))


# Counts

@every
@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_exactly_v_visible(sampler, grid):
    patches, tried = grid[0] * grid[1], 0
    for ratio in RATIOS:
        count = exact_count(grid, ratio)
        if not 0 < count < patches:
            with pytest.raises(ValueError, match='at least 1'): sampler(4, grid, ratio)
            continue
        keep = sampler(16, grid, ratio, generator=seeded())
        assert keep.shape == (16, patches) and keep.dtype == torch.bool and keep.device.type == 'cpu'
        assert visible_count(grid, ratio) == count
        assert keep.sum(1).tolist() == [count] * 16, (grid, ratio)
        tried += 1
    assert tried >= 12


@every
def test_every_whole_number_of_hidden_patches(sampler):
    """The released uniform sampler fails when ratio * N is a whole number."""
    for grid in ((14, 14), (4, 4), (3, 7)):
        patches = grid[0] * grid[1]
        for hidden in range(1, patches):
            assert (sampler(2, grid, hidden / patches, generator=seeded()).sum(1) == patches - hidden).all()


@pytest.mark.parametrize('n', [10, 49, 100, 196, 1000, 4096])
def test_visible_count_is_safe_from_rounding(n):
    assert all(visible_count((1, n), hidden / n) == n - hidden for hidden in range(1, n))
    assert all(visible_count((1, n), 1 - kept / n) == kept for kept in range(1, n))


def test_blockwise_count_over_a_hundred_thousand_masks(figure):
    g = seeded()
    counts = torch.cat([blockwise(5000, generator=g).sum(1) for _ in range(20)])
    assert len(counts) == 100_000 and counts.unique().tolist() == [79]
    figure('06 visible patches of 100,000 masks', 'always 79')


@pytest.mark.parametrize('batch', [1, 64, 5000])
def test_blocks_alone_fill_the_mask(monkeypatch, batch):
    """At the paper's setting nothing is left for the random filling at the end: the rounds suffice."""
    monkeypatch.setattr(masking, '_top', None)
    assert (blockwise(batch, generator=seeded()).sum(1) == 79).all()


@pytest.mark.parametrize('grid, ratio', [((14, 14), 0.6), ((3, 3), 0.12), ((3, 40), 0.1), ((40, 40), 0.999)])
def test_cut_short_is_still_exact(monkeypatch, grid, ratio):
    """Blocks are placed in the first two rounds only; random patches fill the rest."""
    rounds, propose = [], masking._propose
    monkeypatch.setattr(masking, '_propose', lambda *args: propose(*args) * (rounds.append(0) or len(rounds) < 3))
    keep = blockwise(64, grid, ratio, generator=seeded())
    assert len(rounds) <= 32 and (keep.sum(1) == visible_count(grid, ratio)).all()


# Distribution

@pytest.mark.skipif(not STATISTICS.is_file(), reason=f'SCOTT_PARITY={PARITY!r} holds no mask_statistics.json')
@pytest.mark.parametrize('key', ['blockwise_224', 'blockwise_112', 'uniform_224', 'uniform_112'])
def test_statistics_of_the_released_code(key):
    theirs, n = json.loads(STATISTICS.read_text())[key], 20_000
    side = {'224': 14, '112': 7}[key[-3:]]
    keep = {'b': blockwise, 'u': uniform}[key[0]](n, (side, side), 0.6, generator=seeded(1))
    assert theirs['kept_constant'] and (keep.sum(1) == theirs['kept']).all()
    maps = keep.view(n, side, side)
    for name, values in (('adjacent_kept_pairs_mean', adjacent_pairs(maps)), ('keep_prob_corner', maps[:, 0, 0]),
                         ('keep_prob_center', maps[:, side // 2, side // 2])):
        error = values.double().std().item() * math.sqrt(1 / theirs['samples'] + 1 / n)
        assert abs(values.double().mean().item() - theirs[name]) < 4 * error, name


def test_uniform_prefers_no_patch():
    n = 20_000
    chance = uniform(n, generator=seeded()).double().mean(0)
    p = 79 / 196
    assert (chance - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize('grid', [(14, 14), (7, 14)], ids=str)
def test_heat_maps(grid):
    """Kept blocks: center-heavy. Hidden blocks: border-heavy. Both symmetric within sampling error."""
    n = 8000
    for sampler, sign in ((blockwise, 1), (multiblock, -1)):
        p = sampler(n, grid, generator=seeded()).double().mean(0).view(grid)
        middle, border = p[grid[0] // 2, grid[1] // 2], p[0, 0]
        assert sign * (middle - border) > 0.2
        for axis in (0, 1):
            assert (p - p.flip(axis)).abs().max() < 5 * math.sqrt(2 * 0.25 / n)


def test_blockier_than_uniform():
    pairs = {s.__name__: adjacent_pairs(s(500, generator=seeded()).view(-1, 14, 14)).double().mean() for s in SAMPLERS}
    assert pairs['uniform'] < pairs['multiblock'] < pairs['blockwise']


def test_multiblock_single_target_is_a_rectangle():
    keep = multiblock(200, (10, 10), 0.25, generator=seeded(), targets=1, target_scale=(.25, .25),
                      target_aspect=(1, 1), context_scale=(1, 1))
    hidden = (~keep).view(-1, 10, 10)
    assert (hidden.any(1).sum(1) == 5).all() and (hidden.any(2).sum(1) == 5).all()     # 25 patches in a 5 x 5 box


# Randomness

@every
def test_generator_decides(sampler):
    g = seeded(3)
    first, second = sampler(32, generator=g), sampler(32, generator=g)
    assert torch.equal(first, sampler(32, generator=seeded(3)))
    assert not torch.equal(first, second) and not torch.equal(first, sampler(32, generator=seeded(4)))


@every
def test_without_generator_the_default_one_is_used(sampler):
    torch.manual_seed(5)
    first = sampler(8)
    torch.manual_seed(5)
    assert torch.equal(first, sampler(8))
    state = torch.get_rng_state()
    sampler(8, generator=seeded())
    assert torch.equal(state, torch.get_rng_state())          # an explicit generator leaves the default one alone


@every
def test_images_are_independent(sampler):
    """Two images of one batch overlap as two independent masks do: by sum of p_i^2, p_i = P(patch i visible)."""
    n = 8000
    keep = sampler(n, generator=seeded()).double()
    p, half = keep.mean(0), n // 2
    overlap = (keep[:half] * keep[half:]).sum(1)
    neighbors = (keep[0::2] * keep[1::2]).sum(1)
    for values in (overlap, neighbors):
        assert abs(values.mean() - p.square().sum()) < 4 * values.std() / math.sqrt(half)
    assert len(keep[:1000].unique(dim=0)) > 990


@pytest.mark.parametrize('sampler', BLOCKS, ids=lambda s: s.__name__)
def test_many_steps_at_once(sampler):
    """The masks of 32 steps drawn in one call are as good as others: exact, different, the same again."""
    keep = sampler(32 * 64, generator=seeded())
    assert (keep.sum(1) == 79).all() and len(keep.unique(dim=0)) > 2000
    assert torch.equal(keep, sampler(32 * 64, generator=seeded()))


@every
def test_signature(sampler):
    parameters = inspect.signature(sampler).parameters
    assert list(parameters)[:4] == ['batch', 'grid', 'ratio', 'generator']
    assert parameters['grid'].default == (14, 14) and parameters['ratio'].default == 0.6
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    assert sampler is multiblock or len(parameters) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@every
def test_on_cuda(sampler):
    keep = sampler(64, generator=seeded(0, 'cuda'))
    assert keep.device.type == 'cuda' and (keep.sum(1) == 79).all()
    assert torch.equal(keep, sampler(64, generator=seeded(0, 'cuda')))


# Refusals

@every
@pytest.mark.parametrize('kwargs, named', [
    (dict(batch=0), 'batch'), (dict(batch=-3), 'batch'), (dict(batch=2.0), 'batch'),
    (dict(grid=14), 'grid'), (dict(grid=(14,)), 'grid'), (dict(grid=(14, 0)), 'grid'), (dict(grid=(-1, 14)), 'grid'),
    (dict(grid=(14.0, 14)), 'grid'), (dict(grid=(2, 2, 2)), 'grid'), (dict(grid=(1, 1)), 'a larger image or a smaller patch'),
    (dict(ratio=0), 'ratio'), (dict(ratio=1), 'ratio'), (dict(ratio=-.1), 'ratio'), (dict(ratio=60), 'ratio'),
    (dict(ratio=float('nan')), 'ratio'), (dict(ratio=0.005), '1/196'), (dict(ratio=1 - 1e-12), 'ratio'),
], ids=str)
def test_refused(sampler, kwargs, named):
    with pytest.raises(ValueError) as error: sampler(**{'batch': 4, **kwargs})
    assert named in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('sampler', BLOCKS, ids=lambda s: s.__name__)
@pytest.mark.parametrize('grid', [(2, 2), (2, 14), (14, 1)], ids=str)
def test_grid_too_small_for_blocks(sampler, grid):
    with pytest.raises(ValueError, match='too small.*at least 3'): sampler(4, grid, 0.5)
    assert uniform(4, grid, 0.5).shape == (4, grid[0] * grid[1])


@pytest.mark.parametrize('kwargs', [dict(targets=0), dict(target_scale=(.2, .1)), dict(target_scale=(.5, 1.5)),
                                    dict(target_aspect=(0, 1)), dict(context_scale=(-1, 1))], ids=str)
def test_multiblock_options(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))): multiblock(4, **kwargs)
