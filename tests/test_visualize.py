"""Pictures of a single encoder: the numbers behind them, and what they refuse."""
import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from scott.augment import eval_view
from scott.cli import InputError
from scott.data.petals import petals
from scott.encoder import Encoder
from scott.look.tokens import (attention_figure, attention_maps, choose_images, flat_map, foreground, map_figure,
                               mask_image, pca_figure, principal_axes, same_class, token_pca)
from scott.probe.features import read_tokens
from scott.train.config import Config, build
from scott.train.run import Run

TOY = dict(img_size=64, embed_dim=32, depth=2, predictor_depth=1, num_heads=2, device='cpu')


def tokens(*shape, seed=0):
    "Correlated random tokens: a few directions with very different variance."
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1, -2, shape[-1])
    mix = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=g))[0]
    return (torch.randn(*shape, generator=g) * scale) @ mix + torch.randn(shape[-1], generator=g)


@pytest.fixture(scope='module')
def views():
    return eval_view(petals(n=3, size=64)[0])  # b 3 64 64


def encoder(**changes):
    torch.manual_seed(0)
    return Encoder(**{**dict(img_size=64, embed_dim=32, depth=2, num_heads=2), **changes})


# Principal components

def test_axes_are_those_of_scikit_learn():
    x = tokens(300, 24)
    variance, axes = principal_axes(x)
    judge = PCA(svd_solver='full').fit(x.double().numpy())
    assert torch.allclose(variance, torch.from_numpy(judge.explained_variance_), rtol=1e-8)
    assert torch.allclose((axes.T @ torch.from_numpy(judge.components_).T).abs(), torch.eye(24).double(), atol=1e-6)


def test_colors_are_scikit_learns_up_to_sign():
    t = tokens(4, 12, 24)
    ours = token_pca(t, (3, 4)).permute(0, 2, 3, 1).flatten(0, 2).double()  # (b n) 3
    theirs = torch.from_numpy(PCA(3, svd_solver='full').fit_transform(t.flatten(0, 1).double().numpy()))
    low, high = theirs.quantile(torch.tensor([.01, .99]).double(), dim=0)
    theirs = ((theirs - low) / (high - low)).clamp(0, 1)
    for k in range(3):
        assert min((ours[:, k] - theirs[:, k]).abs().max(), (ours[:, k] - 1 + theirs[:, k]).abs().max()) < 1e-5


def test_colors_lie_where_their_tokens_are():
    t = torch.zeros(2, 12, 8)
    t[1, 7, 0] = 1  # image 1, row 1, column 3 of 3 x 4
    t[0, 2, 3] = .1
    found = token_pca(t, (3, 4))
    assert found.shape == (2, 3, 3, 4) and found.dtype == torch.float32
    away = (found - found[0, :, 0, 0][None, :, None, None]).abs().amax(1) > .1  # b rows columns
    assert away.nonzero().tolist() == [[0, 0, 2], [1, 1, 3]]


def test_range_determinism_and_sign():
    t = tokens(3, 16, 12)
    found = token_pca(t, (4, 4))
    assert found.min() == 0 and found.max() == 1
    assert torch.equal(found, token_pca(t.clone(), (4, 4)))
    axes = principal_axes(t.flatten(0, 1)).axes
    turned = principal_axes(t.flatten(0, 1).flip(0)).axes  # the same tokens in another order
    assert torch.allclose(axes, turned, atol=1e-6)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_one_fit_for_all_images():
    t = tokens(2, 16, 12)
    together = token_pca(torch.stack([t[0], t[0], t[1]]), (4, 4))
    assert torch.equal(together[0], together[1])  # equal tokens, equal colors, in whichever image
    assert not torch.allclose(together[0], token_pca(t[:1], (4, 4))[0], atol=.01)  # a fit of its own has other colors


def test_colors_ignore_size_and_collapse_is_gray():
    t = tokens(2, 16, 12)
    assert torch.allclose(token_pca(t * .01, (4, 4)), token_pca(t, (4, 4)), atol=1e-4)
    assert torch.equal(token_pca(torch.full((2, 16, 12), .3), (4, 4)), torch.full((2, 3, 4, 4), .5))
    rounding = token_pca(.3 + 1e-8 * t.double(), (4, 4))  # collapsed up to rounding errors: no pattern is made of them
    assert (rounding - .5).abs().max() < .05


@pytest.mark.parametrize('t, grid, says', [
    (torch.zeros(2, 16, 12), (4, 5), '4 x 5'), (torch.zeros(16, 12), (4, 4), r'\(16, 12\)'),
    (torch.zeros(2, 16, 2), (4, 4), '3 or more'), (torch.full((2, 16, 12), math.nan), (4, 4), 'finite'),
    (torch.zeros(1, 1, 12), (1, 1), '2 or more')])
def test_pca_refuses(t, grid, says):
    with pytest.raises(ValueError, match=says): token_pca(t, grid)


def test_tokens_are_normalized_and_without_dropout(views):
    e = encoder(drop_rate=.5).train()
    t = read_tokens(e, views)
    assert t.shape == (3, 16, 32) and torch.equal(t, read_tokens(e, views))
    assert t.mean(-1).abs().max() < 1e-5 and (t.var(-1, unbiased=False) - 1).abs().max() < .01


# Without the background

def scene(sign=1, place=(2, 6, 1, 5)):
    "Tokens whose front is known: a rectangle, told apart by one direction; within it a weaker second direction."
    g = torch.Generator().manual_seed(0)
    top, bottom, left, right = place
    front = torch.zeros(5, 8, 8, dtype=torch.bool)
    front[:, top:bottom, left:right] = True
    lit = torch.rand(5, 8, 8, generator=g) > .5
    t = .02 * torch.randn(5, 8, 8, 16, generator=g)
    t[..., 3] += 5 * front
    t[..., 7] += 1. * (front & lit)
    return sign * t.flatten(1, 2), front.flatten(1), (front & lit).flatten(1)


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('place', [(2, 6, 1, 5), (1, 7, 1, 7), (3, 4, 3, 5)])
def test_the_background_is_cut_off(sign, place):
    t, front, _ = scene(sign, place)
    assert torch.equal(foreground(t, (8, 8)), front)


def test_the_second_fit_is_of_the_front_alone():
    t, front, lit = scene()
    colors = token_pca(t, (8, 8), front).flatten(2).transpose(1, 2)  # b n 3
    assert (colors[~front] == 0).all()
    red = colors[..., 0]
    assert (red[lit].mean() - red[front & ~lit].mean()).abs() > .8  # with the background: hardly to be seen
    red = token_pca(t, (8, 8)).flatten(2).transpose(1, 2)[..., 0]
    assert (red[lit].mean() - red[front & ~lit].mean()).abs() < .1
    other = t.clone()
    other[~front] = torch.randn(int((~front).sum()), 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(token_pca(other, (8, 8), front), token_pca(t, (8, 8), front))  # whatever the background is


def test_one_fit_and_one_cut_for_all_images():
    t, front, _ = scene()
    twice = torch.cat([t, t[:1]])
    cut = foreground(twice, (8, 8))
    colors = token_pca(twice, (8, 8), cut)
    assert torch.equal(cut[0], cut[-1]) and torch.equal(colors[0], colors[-1])


def test_nothing_in_front():
    t = torch.full((2, 16, 12), .3)
    front = foreground(t, (4, 4))  # collapsed tokens: no side at all, and no error
    assert front.shape == (2, 16) and token_pca(t, (4, 4), front).isfinite().all()
    assert (token_pca(t, (4, 4), torch.zeros(2, 16, dtype=torch.bool)) == 0).all()
    assert torch.equal(token_pca(t, (4, 4), torch.ones(2, 16, dtype=torch.bool)), token_pca(t, (4, 4)))


# Attention

@pytest.mark.parametrize('block', [-1, -2, 0, 1])
def test_maps_sum_to_one(views, block):
    maps = attention_maps(encoder(), views, block)
    assert maps.shape == (3, 2, 4, 4) and torch.allclose(maps.sum((2, 3)), torch.ones(3, 2), atol=1e-5)


def test_registers_take_their_share(views):
    e = encoder(reg_tokens=3).eval()
    weights = e.attention(views).detach()  # b heads t t with t = 3 + 16
    maps = attention_maps(e, views)
    assert (maps.sum((2, 3)) < 1).all()
    taken = weights[:, :, 3:, :3].sum(-1).mean(-1)  # b heads: what patches give to registers
    assert torch.allclose(maps.sum((2, 3)), 1 - taken, atol=1e-5)
    assert torch.allclose(attention_maps(e, views, query=(2, 1)).flatten(2), weights[:, :, 3 + 9, 3:], atol=1e-6)


def test_average_is_the_mean_of_the_query_maps(views):
    e = encoder()
    each = torch.stack([attention_maps(e, views, 0, (i, j)) for i in range(4) for j in range(4)])
    assert torch.allclose(each.mean(0), attention_maps(e, views, 0), atol=1e-6)
    assert not torch.allclose(each[0], each[5])


def test_larger_and_oblong_images():
    assert attention_maps(encoder(), torch.randn(1, 3, 96, 128)).shape == (1, 2, 6, 8)


@pytest.mark.parametrize('kwargs', [dict(block=2), dict(block=-3), dict(query=(4, 0)), dict(query=(0, -1))])
def test_attention_refuses(views, kwargs):
    with pytest.raises(ValueError, match='block|query'): attention_maps(encoder(), views, **kwargs)


# Masks

@pytest.mark.parametrize('dtype, gray', [(torch.uint8, 128), (torch.float32, .5)])
def test_hidden_is_gray_exactly_there(dtype, gray):
    images = torch.full((2, 3, 32, 48), 7).to(dtype)  # 2 x 3 patches of 16
    keep = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    seen = mask_image(images, keep)
    assert seen.dtype == dtype and seen.shape == images.shape
    for b in range(2):
        for n in range(6):
            y, x = 16 * (n // 3), 16 * (n % 3)
            assert (seen[b, :, y:y + 16, x:x + 16] == (7 if keep[b, n] else gray)).all()
    assert (images == 7).all()  # the input stays as it was


@pytest.mark.parametrize('keep', [torch.ones(2, 15, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool),
                                  torch.ones(2, 16), torch.ones(2, 10 ** 6, dtype=torch.bool)])
def test_mask_image_refuses(keep):
    with pytest.raises(ValueError, match='keep must be'): mask_image(torch.zeros(2, 3, 64, 64), keep)


# Choice and figures

def test_choice_is_seeded_and_spread():
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
    rows = choose_images(labels, 6, 3)
    assert labels[rows].bincount().tolist() == [2, 2, 2] and len(set(labels[rows[:3]].tolist())) == 3
    assert torch.equal(rows, choose_images(labels, 6, 3)) and not torch.equal(rows, choose_images(labels, 6, 4))
    assert sorted(choose_images(labels, 100).tolist()) == list(range(100))
    assert len(choose_images(torch.full((9,), -1), 4).unique()) == 4  # without labels


def test_figures_have_a_row_per_image():
    images = petals(n=3, size=64)[0]
    pca = pca_figure(images, dict(a=torch.rand(3, 3, 4, 4), b=torch.rand(3, 3, 4, 4)))
    maps = attention_figure(images, dict(a=torch.rand(3, 2, 4, 4), b=torch.rand(3, 2, 4, 4)), query=(1, 2))
    assert all(isinstance(f, Figure) for f in (pca, maps))
    assert len(pca.axes) == 3 * 3 and len(maps.axes) == 3 * 5 + 1  # + color bar
    marks = attention_figure(images, dict(a=torch.rand(3, 2, 4, 4)), [(0, 0), (1, 2), (3, 3)]).axes[::3][:3]
    assert [tuple(float(v[0]) for v in ax.lines[0].get_data()) for ax in marks] == [(7.5, 7.5), (39.5, 23.5), (55.5, 55.5)]
    outlined = pca_figure(images, dict(a=torch.rand(3, 3, 4, 4)), torch.ones(3, 64, 64).tril().bool())
    assert [len(ax.collections) for ax in outlined.axes] == [0, 1] * 3  # over the colors, not over the image
    scales = {i.get_clim() for ax in maps.axes[:-1] for i in ax.images if i.get_array().ndim == 2}
    assert len(scales) == 1 and min(scales)[0] == 0 and min(scales)[1] >= 2  # one scale, uniform attention no peak


# The map

def test_neighbors_of_the_same_class():
    x = torch.tensor([[1., 0], [2, .1], [0, 1], [.1, 3], [-1, 0]])
    assert same_class(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(4 / 5)  # the last one's class is alone
    assert same_class(x, torch.tensor([0, 1, 0, 1, 2])) == 0
    assert same_class(10 * x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(4 / 5)  # length does not count


def test_the_map_keeps_groups_and_is_seeded():
    groups = torch.arange(3).repeat(12)
    x = 9 * torch.eye(16)[groups] + torch.randn(36, 16, generator=torch.Generator().manual_seed(0))
    y = flat_map(x, 1)
    near = (torch.cdist(y, y) + 1e9 * torch.eye(36)).argmin(1)
    assert y.shape == (36, 2) and (groups[near] == groups).all() and torch.equal(y, flat_map(x, 1))
    assert not flat_map(torch.full((20, 16), .3)).any()  # collapsed: one point


@pytest.mark.parametrize('labels, count', [(torch.arange(40) % 4, 4), (torch.arange(40) % 13, 11),
                                           (torch.full((40,), -1), 1)])
def test_ten_classes_have_colors(labels, count):
    x = dict(random=torch.randn(40, 8), trained=torch.randn(40, 8))
    fig = map_figure(x, labels, [f'class {i}' for i in range(13)])
    known = bool(labels[0] >= 0)
    assert len(fig.axes) == 2 + known and len(fig.legends[0].get_texts()) == count  # with the gray others
    points = sum(len(c.get_offsets()) for c in fig.axes[0].collections)
    assert points == 40 and ('%' in fig.axes[0].get_title()) == known


def test_bars_beside_the_maps_are_counts_and_chance():
    labels = torch.arange(60) % 3
    x = dict(random=torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), trained=9. * F.one_hot(labels, 8))
    bars = map_figure(x, labels, ['a', 'b', 'c']).axes[2]
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([100 * same_class(v, labels) for v in x.values()])
    assert bars.patches[1].get_height() == pytest.approx(100)
    assert bars.lines[-1].get_ydata()[0] == pytest.approx(100 / 3)


# The encoders of a run

@pytest.fixture
def run(tmp_path):
    cfg = Config.of('demo', **TOY, out=str(tmp_path / 'run'))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(asdict(cfg)))
    moved = build(cfg).target
    with torch.no_grad(): moved.mask_token.add_(1)
    moved.save_pretrained(tmp_path / 'run' / 'target')
    return Run(tmp_path / 'run')


def test_encoders_of_a_run(run):
    assert run.config.embed_dim == 32
    initial, saved = build(run.config).target.state_dict(), Encoder.from_pretrained(run.folder / 'target').state_dict()
    assert all(torch.equal(w, initial[k]) for k, w in run.encoder('random').state_dict().items())
    assert all(torch.equal(w, saved[k]) for k, w in run.encoder('target').state_dict().items())
    assert not torch.equal(saved['mask_token'], initial['mask_token'])
    assert not run.encoder('random').training and not run.encoder('target').training


def test_reading_leaves_the_global_generator_and_its_result_has_a_short_name(run):
    before = torch.get_rng_state()
    for which in ('random', 'target'): run.encoder(which)
    assert torch.equal(before, torch.get_rng_state())
    assert len(repr(principal_axes(torch.rand(9, 64)))) < 100


@pytest.mark.parametrize('changes', [dict(img_size=96), dict(embed_dim=64), dict(depth=3), dict(tokenizer='patch')])
def test_an_encoder_of_another_run(run, changes):
    encoder(**changes).save_pretrained(run.folder / 'target')
    with pytest.raises(InputError, match='target is of another run than .*config.json'):
        run.encoder('target')
