"""Patches across images: a planted patch is found, an oracle's heat map is 1, a collage has patches of others only."""
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from scott.augment import eval_view
from scott.cli import InputError
from scott.data.petals import petals
from scott.look.predictions import (agreement, fill_hidden, find_figure, find_patch, mask_figure, mutual_pairs,
                                    own_part, pairs_figure, predict, prediction_figure, visibility)
from scott.probe.features import read_tokens
from scott.train.config import Config, build, identity, masks_of
from scott.train.files import write_checkpoint
from scott.train.run import Run

TOY = Config.of('demo', img_size=64, embed_dim=32, depth=2, predictor_depth=1, num_heads=2, device='cpu')
GRID = (4, 4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_keep(b=3, seed=0):
    return masks_of(TOY, GRID)(b, generator=torch.Generator().manual_seed(seed))


# The own part

def test_own_part_is_the_direction_without_the_mean():
    t = randn(6, 16, 8) + 5 * randn(16, 8, seed=1)  # a large common part at each place
    r = own_part(t, t.mean(0))
    assert torch.allclose(r, F.normalize(t - t.mean(0), dim=-1), atol=1e-6)
    assert F.cosine_similarity(t[0], t[1], dim=-1).mean() > .5 > F.cosine_similarity(r[0], r[1], dim=-1).mean().abs()


def test_rounding_is_no_direction():
    common = 10 * randn(16, 8)
    r = own_part(common + 1e-7 * randn(16, 8, seed=1), common)
    assert r.norm(dim=-1).max() < .02 and not own_part(common, common).any()


# Correspondence

def test_a_planted_patch_is_found():
    own = F.normalize(randn(4, 20, 16), dim=-1)  # 4 x 5 patches
    planted = {1: 3, 2: 19, 3: 0}
    for image, place in planted.items(): own[image, place] = own[0, 7]  # row 1, column 2
    maps = find_patch(own, (4, 5), (1, 2))
    assert maps.shape == (4, 4, 5)
    assert maps.flatten(1).argmax(1).tolist() == [7, 3, 19, 0] and torch.allclose(maps.amax((1, 2)), torch.ones(4))


def test_a_shifted_copy_of_pixels_is_found():
    "With an encoder that sees each patch alone: the patch embedding itself."
    large = petals(n=1, size=112)[0]
    pair = torch.cat([large[..., :96, :96], large[..., 16:, 16:]])  # 2 3 96 96: shifted by one patch
    torch.manual_seed(0)
    tokenizer = build(replace(TOY, tokenizer='patch', img_size=96)).target.tokenizer
    with torch.no_grad(): t = tokenizer(eval_view(pair))
    own = own_part(t, t.mean((0, 1)).expand(36, -1))
    for row in range(1, 6):
        for column in range(1, 6):
            assert divmod(find_patch(own, (6, 6), (row, column))[1].argmax().item(), 6) == (row - 1, column - 1)
    pairs = mutual_pairs(*own)
    exact = {(6 * i + j, 6 * (i - 1) + j - 1) for i in range(1, 6) for j in range(1, 6)}
    assert exact <= set(map(tuple, pairs.tolist()))


@pytest.mark.parametrize('query', [(4, 0), (0, 5), (-1, 0)])
def test_a_query_off_the_grid(query):
    with pytest.raises(ValueError, match='query'): find_patch(randn(2, 20, 8), (4, 5), query)


def test_mutual_pairs_are_one_to_one_and_sorted():
    a, b = F.normalize(randn(30, 8), dim=-1), F.normalize(randn(25, 8, seed=1), dim=-1)
    pairs, cosines = mutual_pairs(a, b), a @ b.T
    assert len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) == len(pairs) > 3
    for i, j in pairs.tolist(): assert cosines[i].argmax() == j and cosines[:, j].argmax() == i
    said = cosines[pairs[:, 0], pairs[:, 1]]
    assert torch.equal(said, said.sort(descending=True).values)
    brute = {(i, j) for i in range(30) for j in range(25) if cosines[i].argmax() == j and cosines[:, j].argmax() == i}
    assert set(map(tuple, pairs.tolist())) == brute


def test_a_favorite_of_all_pairs_once():
    crowd = F.normalize(torch.tensor([[1., 0], [.9, .1], [.8, .3]]), dim=-1)
    assert mutual_pairs(crowd, torch.eye(2)).tolist() == [[0, 0]]


# The predictor

def write_run(folder, state):
    "A run folder with a checkpoint."
    (folder / 'config.json').write_text(json.dumps(asdict(TOY)))
    write_checkpoint(folder, dict(step=1, **state))
    return Run(folder)


def test_an_oracle_is_right_everywhere_hidden():
    t, keep = randn(3, 16, 8), some_keep()
    heat = agreement(t, t, keep, t.mean(0))
    assert torch.equal(heat.isnan(), keep) and torch.allclose(heat[~keep], torch.ones(()))
    assert torch.allclose(agreement(2 * t.mean(0) - t, t, keep, t.mean(0))[~keep], -torch.ones(()))
    assert not agreement(t.mean(0).expand_as(t), t, keep, t.mean(0))[~keep].any()  # the mean token: nothing is known


def test_an_oracle_in_the_place_of_the_predictor():
    images, keep = eval_view(petals(n=3, size=64)[0]), some_keep()
    jepa = build(TOY)
    targets = read_tokens(jepa.target, images)
    assert agreement(predict(jepa, images, keep), targets, keep, targets.mean(0))[~keep].abs().mean() < .5
    class Oracle(torch.nn.Module):
        def forward(self, tokens): return targets
    jepa.predictor = Oracle()
    assert torch.allclose(agreement(predict(jepa, images, keep), targets, keep, targets.mean(0))[~keep], torch.ones(()))


def test_predictions_see_visible_pixels_only_and_no_dropout():
    images, keep, jepa = eval_view(petals(n=3, size=64)[0]), some_keep(), build(TOY).train()
    found = predict(jepa, images, keep)
    assert found.shape == (3, 16, 32) and torch.equal(found, predict(jepa.train(), images, keep))
    pixels = F.interpolate(keep.reshape(3, 1, *GRID).float(), scale_factor=16).bool()
    assert torch.equal(predict(jepa, torch.where(pixels, images, 100.), keep), found)
    assert not torch.equal(predict(jepa, torch.where(pixels, 0., images), keep), found)


@pytest.mark.parametrize('name', ['model', 'jepa'])  # the second one until version 0.1
def test_networks_of_a_run(tmp_path, name):
    trained = build(TOY)
    with torch.no_grad(): trained.predictor.head[-1].bias.add_(1)
    found = write_run(tmp_path, {name: trained.state_dict(), 'identity': identity(TOY, of_a_later_version=1)}).jepa()
    assert torch.equal(found.predictor.head[-1].bias, torch.ones(32))
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in found.state_dict().items())


@pytest.mark.parametrize('state, says', [
    (dict(identity=identity(replace(TOY, img_size=112))), 'img_size is 112 there and 64 here'),
    (dict(identity=identity(replace(TOY, embed_dim=64))), 'embed_dim is 64 there and 32 here'),
    (dict(), 'not written by scott_pretrain')])
def test_a_checkpoint_of_another_run(tmp_path, state, says):
    run = write_run(tmp_path, state)
    with pytest.raises(InputError, match=says) as said: run.jepa()
    assert str(tmp_path / 'checkpoint.pt') in str(said.value)


# The collage

def numbered(count):
    "Images whose every pixel is the number of the image, so that a patch tells where it is from."
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 64, 64).clone()


def test_patches_are_those_of_other_images():
    bank, keep = numbered(9), some_keep(4)
    own = F.normalize(randn(9, 16, 8), dim=-1)
    rows = torch.tensor([0, 3, 5, 8])
    made = fill_hidden(bank[rows], keep, own[rows], bank, own, rows)  # its own patches would be the best
    where = F.interpolate(keep.reshape(4, 1, *GRID).float(), scale_factor=16).bool().expand(-1, 3, -1, -1)
    for image, seen, row in zip(made, where, rows):
        assert (image[seen] == row).all() and (image[~seen] != row).all()
    free = fill_hidden(bank[rows], keep, own[rows], bank, own, torch.full((4,), -1))
    assert torch.equal(free, bank[rows])  # without the ban each would be filled from itself


def test_the_nearest_patch_comes_with_its_pixels():
    bank = torch.randint(256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    own, keep = F.normalize(randn(5, 16, 8), dim=-1), torch.ones(1, 16, dtype=torch.bool)
    keep[0, 6] = False  # row 1, column 2
    wanted = torch.zeros(1, 16, 8)
    wanted[0, 6] = .1 * own[3, 13]  # of image 3, row 3, column 1; length does not count
    made = fill_hidden(bank[:1], keep, wanted, bank, own, torch.tensor([0]))
    assert torch.equal(made[0, :, 16:32, 32:48], bank[3, :, 48:64, 16:32])
    made[0, :, 16:32, 32:48] = bank[0, :, 16:32, 32:48]
    assert torch.equal(made, bank[:1])  # the rest is as it was


def test_a_bank_of_one_image():
    with pytest.raises(ValueError, match='2 or more'):
        fill_hidden(numbered(1), some_keep(1), randn(1, 16, 8), numbered(1), randn(1, 16, 8), torch.tensor([0]))


# Masks and figures

def test_visibility_is_the_share_of_visible_patches():
    for mask in ('uniform', 'blockwise', 'multiblock'):
        masks = masks_of(replace(TOY, mask=mask), GRID)
        heat = visibility(masks, GRID, torch.Generator().manual_seed(0), 500)
        assert heat.shape == GRID and heat.mean().item() == pytest.approx(7 / 16)  # ceil(.4 * 16) = 7


def test_figures():
    images, keep = petals(n=3, size=64)[0], some_keep()
    maps = dict(random=torch.rand(3, 4, 4), trained=torch.rand(3, 4, 4))
    heat = {name: m.flatten(1).masked_fill(keep, float('nan')) for name, m in maps.items()}
    found = find_figure(images, maps, (1, 2))
    lines = pairs_figure(images[:2], dict(random=torch.tensor([[0, 15]]), trained=torch.zeros(0, 2).long()), GRID)
    guess = prediction_figure(images, keep, heat, {name: [images, images] for name in maps})
    masks = mask_figure(images, keep, torch.rand(4, 4))
    assert all(isinstance(f, Figure) for f in (found, lines, guess, masks))
    assert [len(f.axes) for f in (found, lines, guess, masks)] == [3 * 3 + 1, 2, 3 * 8 + 1, 3 * 3 + 2]  # + color bars
    scales = {i.get_clim() for f in (found, guess) for ax in f.axes[:-1] for i in ax.images if i.get_array().ndim == 2}
    assert scales == {(-1, 1)}
    (x0, x1), (y0, y1) = (lines.axes[0].lines[0].get_data(orig=True))
    assert (x0, y0) == (8, 8) and x1 > 64 + 48 and y1 == 56  # patch 0 to patch 15 of the image at the right
    assert not lines.axes[1].lines and '0 mutual' in lines.axes[1].get_title()


@pytest.mark.parametrize('count', [1, 2, 5, 40])
def test_the_order_of_pairs_is_seen_in_few_and_many(count):
    pairs = torch.arange(count)[:, None].expand(-1, 2) % 16
    lines = pairs_figure(petals(n=2, size=64)[0], dict(trained=pairs), GRID).axes[0].lines
    assert len(lines) == min(count, 12)
    colors = [line.get_color()[:3] for line in lines]
    assert colors[0] == (0, 1, 1) and len(set(colors)) == len(colors)  # cyan, and no color twice
    if count > 1: assert colors[-1] == (1, 0, 1)  # to magenta, however few
