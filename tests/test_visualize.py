"""Pictures of a run: the numbers behind them, the command on a tiny run folder, and what it refuses."""
import json
import math
from dataclasses import asdict

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA

from scott.augment import eval_view
from scott.config import Config
from scott.encoder import Encoder
from scott.petals import petals
from scott.training import build
from scott.visualize import (attention_figure, attention_maps, choose_images, load_run, main, mask_figure, mask_image,
                             patch_tokens, pca_figure, principal_axes, token_pca, visibility)

TOY = dict(preset='demo', data='petals', img_size=64, embed_dim=32, depth=2, predictor_depth=1, num_heads=2,
           device='cpu')


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
    axes = principal_axes(t.flatten(0, 1))[1]
    turned = principal_axes(t.flatten(0, 1).flip(0))[1]  # the same tokens in another order
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
    t = patch_tokens(e, views)
    assert t.shape == (3, 16, 32) and torch.equal(t, patch_tokens(e, views))
    assert t.mean(-1).abs().max() < 1e-5 and (t.var(-1, unbiased=False) - 1).abs().max() < .01


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


def test_visibility_is_the_share_of_visible_patches():
    for mask in ('uniform', 'blockwise', 'multiblock'):
        heat = visibility(Config(**TOY, mask=mask), (4, 4), torch.Generator().manual_seed(0), 500)
        assert heat.shape == (4, 4) and heat.mean().item() == pytest.approx(7 / 16)  # ceil(.4 * 16) = 7


# Choice and figures

def test_choice_is_seeded_and_spread():
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
    rows = choose_images(labels, 6, 3)
    assert labels[rows].bincount().tolist() == [2, 2, 2] and len(set(labels[rows[:3]].tolist())) == 3
    assert torch.equal(rows, choose_images(labels, 6, 3)) and not torch.equal(rows, choose_images(labels, 6, 4))
    assert sorted(choose_images(labels, 100).tolist()) == list(range(100))
    assert len(choose_images(torch.full((9,), -1), 4).unique()) == 4  # without labels


def test_figures_have_a_row_per_image(views):
    images = petals(n=3, size=64)[0]
    pca = pca_figure(images, dict(a=torch.rand(3, 3, 4, 4), b=torch.rand(3, 3, 4, 4)))
    maps = attention_figure(images, dict(a=torch.rand(3, 2, 4, 4), b=torch.rand(3, 2, 4, 4)), query=(1, 2))
    masks = mask_figure(images, torch.rand(3, 16) > .5, torch.rand(4, 4))
    assert all(isinstance(f, Figure) for f in (pca, maps, masks))
    assert len(pca.axes) == 3 * 3 and len(maps.axes) == 3 * 5 + 1 and len(masks.axes) == 3 * 3 + 2  # + color bars
    scales = {i.get_clim() for ax in maps.axes[:-1] for i in ax.images if i.get_array().ndim == 2}
    assert len(scales) == 1 and min(scales)[0] == 0 and min(scales)[1] >= 2  # one scale, uniform attention no peak


# The command

def write_run(run, **changes):
    "A run folder as `pretrain` leaves it, without training: the target's weights are a little moved."
    cfg = Config(**{**TOY, 'data': f'folder:{run.parent}/images', 'out': str(run), **changes})
    run.mkdir()
    (run / 'config.json').write_text(json.dumps({**asdict(cfg), 'images': 20}))
    target = build(cfg).target
    with torch.no_grad():
        for p in target.parameters(): p.add_(.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    for name in ('context', 'target'): target.save_pretrained(run / name)
    return run


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('visualize')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SCOTT_CACHE', str(folder / 'cache'))
        for i, image in enumerate(petals(n=20, size=80)[0]):  # 2 classes of 10, 4 test images
            path = folder / 'images' / f'class{i % 2}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        write_run(folder / 'run')
        yield folder


def pictures(folder):
    return {p.name: Image.open(p).convert('RGB').tobytes() for p in folder.iterdir()}


def test_pictures_of_a_run(place, capsys):
    main([str(place / 'run'), '--images', '3'])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(place / 'run' / 'pictures' / f'{n}.png') for n in ('pca', 'attention', 'masks')]
    first = pictures(place / 'run' / 'pictures')
    assert set(first) == {'pca.png', 'attention.png', 'masks.png'}  # and no half-written file
    main([str(place / 'run'), '--images', '3', '--out', str(place / 'again' / 'there')])
    assert pictures(place / 'again' / 'there') == first
    main([str(place / 'run'), '--images', '3', '--seed', '1', '--block', '0', '--out', str(place / 'other')])
    assert not any(first[name] == picture for name, picture in pictures(place / 'other').items())


def test_encoders_of_a_run(place):
    cfg, found = load_run(place / 'run')
    assert list(found) == ['random', 'trained'] and cfg.embed_dim == 32
    initial = build(cfg).target.state_dict()
    assert all(torch.equal(w, initial[k]) for k, w in found['random'].state_dict().items())
    stored = Encoder.from_pretrained(place / 'run' / 'target').state_dict()
    assert all(torch.equal(w, stored[k]) for k, w in found['trained'].state_dict().items())
    assert not torch.equal(stored['mask_token'], initial['mask_token'])


def test_other_data_and_registers(place, capsys):
    write_run(place / 'registers', reg_tokens=2, mask='multiblock', tokenizer='patch')
    main([str(place / 'registers'), '--data', f'folder:{place}/images/class0', '--images', '1'])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize('words, says', [
    ('', 'required'), ('{run} --image 3', '--image'), ('{run} --images many', 'many'),
    ('{place}/images', 'no run folder'), ('{place}/nowhere', 'no run folder'),
    ('{run} --images 0', '--images 0'), ('{run} --images -2', '--images -2'), ('{run} --images 65', '--images 65'),
    ('{run} --images 5', '4 test images'), ('{run} --block 2', '2 blocks'), ('{run} --block -3', '2 blocks'),
    ('{run} --data folder:{place}/nowhere', 'nowhere'), ('{run} --data tulips', 'tulips'),
    ('{run} --images 1 --out {run}/config.json', 'config.json')])
def test_refusals(place, capsys, words, says):
    before = {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
    with pytest.raises(SystemExit) as end: main(words.format(place=place, run=place / 'run').split())
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and says in err[-1] and err[-1].startswith('scott_visualize: ')
    assert len([line for line in err if 'Loading weights' not in line]) == 1
    assert {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize('damage, says', [
    (lambda run: (run / 'target' / 'model.safetensors').unlink(), 'no model.safetensors'),
    (lambda run: (run / 'target' / 'model.safetensors').write_bytes(b'short'), 'is no Encoder'),
    (lambda run: (run / 'target' / 'config.json').unlink(), 'no config.json'),
    (lambda run: (run / 'config.json').write_text('{'), 'damaged')])
def test_damaged_runs(place, tmp_path, capsys, damage, says):
    run = write_run(tmp_path / 'run', data=f'folder:{place}/images')
    damage(run)
    with pytest.raises(SystemExit) as end: main([str(run), '--images', '1'])
    err = [line for line in capsys.readouterr().err.strip().splitlines() if 'Loading weights' not in line]
    assert end.value.code == 2 and len(err) == 1 and says in err[0] and str(run) in err[0]
    assert not (run / 'pictures').exists()
