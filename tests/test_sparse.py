"Masked convolution, max-blur-pool and the two tokenizers: nothing hidden may be seen, and nothing else may change."
import pytest
import torch
import torch.nn.functional as F
from conftest import gap
from torch import nn

from scott.masking import blockwise, uniform
from scott.tokenizer import MaxBlurPool2d, SparseConv2d, apply_mask
from scott.tokenizer import PatchEmbed, SparseTokenizer, patch_mask

GRIDS = [(3, 3), (4, 4), (3, 5), (6, 3)]
TOKENIZERS = {'sparse': lambda **kw: SparseTokenizer(**kw), 'patch': lambda **kw: PatchEmbed(**kw)}


def seeded(seed): return torch.Generator().manual_seed(seed)


def enlarge(keep, grid, patch=16):
    "(B, N) bool -> (B, 1, H, W) bool at pixel size, without any function under test."
    return keep.view(-1, 1, *grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def noisy(images, keep, grid):
    "The same images with noise x 100 in the hidden patches."
    noise = 100 * torch.randn(images.shape, generator=seeded(99))
    return torch.where(enlarge(keep, grid), images, noise.to(images.dtype))


def tokenizer(kind, **kw):
    torch.manual_seed(0)
    return TOKENIZERS[kind](embed_dim=24, **kw).requires_grad_(False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('kind', TOKENIZERS)
def test_no_hidden_pixel_reaches_a_token(kind, grid, dtype):
    model = tokenizer(kind).to(dtype)
    for seed, sampler, ratio in ((0, blockwise, 0.6), (1, uniform, 0.6), (2, uniform, 0.25), (3, uniform, 0.8)):
        keep = sampler(6, grid, ratio, generator=seeded(seed))
        images = torch.randn(6, 3, 16 * grid[0], 16 * grid[1], generator=seeded(seed)).to(dtype)
        a, b = model(images, keep), model(noisy(images, keep, grid), keep)
        assert (a - b).abs().max().item() == 0.0
        assert a[~keep].eq(0).all() and a[keep].ne(0).any()


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_every_single_hidden_patch_is_hidden(kind):
    grid, model = (4, 4), tokenizer(kind)
    keep = ~torch.eye(16, dtype=torch.bool)                              # image i hides patch i
    images = torch.randn(16, 3, 64, 64, generator=seeded(0))
    assert model(images, keep).equal(model(noisy(images, keep, grid), keep))


def test_the_leak_test_can_fail():
    keep, images = blockwise(4, (4, 4), generator=seeded(0)), torch.randn(4, 3, 64, 64, generator=seeded(0))
    other, model = noisy(images, keep, (4, 4)), tokenizer('sparse')
    assert not model(images)[keep].equal(model(other)[keep])             # no mask at all
    mask = keep.view(4, 1, 4, 4)
    def only_outputs(x): return model.pool1(F.relu(model.conv1(x, mask)), mask)      # the image is not masked
    assert not only_outputs(images).equal(only_outputs(other))


def test_every_layer_of_the_tokenizer_is_empty_where_hidden():
    model, grid, seen = tokenizer('sparse'), (4, 5), []
    keep = blockwise(3, grid, generator=seeded(0))
    for layer in model.children(): layer.register_forward_hook(lambda m, i, out: seen.append(out))
    model(torch.randn(3, 3, 64, 80, generator=seeded(0)), keep)
    assert [tuple(x.shape[2:]) for x in seen] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    for x in seen:
        hidden = ~enlarge(keep, grid, x.shape[2] // 4).expand_as(x)
        assert x[hidden].eq(0).all() and x[~hidden].ne(0).any()


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_gradient_of_a_hidden_pixel_is_zero(kind):
    grid = (4, 3)
    keep = uniform(4, grid, 0.5, generator=seeded(0))
    images = torch.randn(4, 3, 64, 48, generator=seeded(0)).requires_grad_()
    tokenizer(kind)(images, keep).square().sum().backward()
    visible = enlarge(keep, grid).expand_as(images)
    assert images.grad[~visible].eq(0).all() and images.grad[visible].ne(0).any()


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
def test_unmasked_convolution_is_an_ordinary_one(stride, bias):
    conv = SparseConv2d(3, 5, 7, stride=stride, padding=3, bias=bias).requires_grad_(False)
    plain = nn.Conv2d(3, 5, 7, stride=stride, padding=3, bias=bias)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 32, 48, generator=seeded(0))
    assert conv(x).equal(plain(x))
    assert conv(x, torch.ones(2, 1, 2, 3, dtype=torch.bool)).equal(plain(x))


@pytest.mark.parametrize('kind', TOKENIZERS)
@pytest.mark.parametrize('grid', GRIDS)
def test_all_true_is_no_mask(kind, grid):
    model, images = tokenizer(kind), torch.randn(2, 3, 16 * grid[0], 16 * grid[1], generator=seeded(0))
    tokens = model(images)
    assert tokens.shape == (2, grid[0] * grid[1], 24)
    assert model(images, torch.ones(2, tokens.shape[1], dtype=torch.bool)).equal(tokens)


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_all_hidden_is_all_zero(kind):
    assert tokenizer(kind)(torch.randn(2, 3, 48, 48), torch.zeros(2, 9, dtype=torch.bool)).eq(0).all()


def test_masked_convolution_is_the_sparse_sum():
    "Against the definition, in float64: m_out * sum over the window of w * m_in * x, by unfolding."
    x = torch.randn(2, 3, 32, 32, generator=seeded(0), dtype=torch.float64)
    keep = uniform(2, (2, 2), 0.5, generator=seeded(1))
    conv = SparseConv2d(3, 4, 7, stride=2, padding=3, bias=False).double().requires_grad_(False)
    windows = F.unfold(x * enlarge(keep, (2, 2)), 7, stride=2, padding=3)            # b (c 7 7) places
    expected = (conv.weight.flatten(1) @ windows).view(2, 4, 16, 16) * enlarge(keep, (2, 2), 8)
    mask = keep.view(2, 1, 2, 2)
    torch.testing.assert_close(conv(apply_mask(x, mask), mask), expected)


def test_each_image_has_its_own_mask():
    model, images = tokenizer('sparse'), torch.randn(3, 3, 64, 64, generator=seeded(0))
    keep = blockwise(3, (4, 4), generator=seeded(0))
    alone = torch.cat([model(images[i:i + 1], keep[i:i + 1]) for i in range(3)])
    assert gap(model(images, keep), alone) <= 1e-5


def test_max_blur_pool():
    pool, x = MaxBlurPool2d(3), torch.rand(2, 3, 9, 12, generator=seeded(0))
    kernel = torch.tensor([[1., 2., 1.], [2., 4., 2.], [1., 2., 1.]]) / 16
    biggest = torch.stack([x[..., i:i + 8, j:j + 11] for i in (0, 1) for j in (0, 1)]).amax(0)
    padded = F.pad(biggest, (1, 1, 1, 1))
    expected = sum(kernel[i, j] * padded[..., i:i + 8:2, j:j + 11:2] for i in range(3) for j in range(3))
    torch.testing.assert_close(pool(x), expected)
    assert pool(x).shape == (2, 3, 4, 6) and not pool.state_dict() and not list(pool.parameters())
    assert pool.kernel.sum((1, 2, 3)).eq(1).all()


def test_parameters_and_state_dict_keys():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(SparseTokenizer()) == 1_213_632 and count(PatchEmbed()) == 295_296
    assert list(SparseTokenizer().state_dict()) == ['conv1.weight', 'conv2.weight']
    assert list(PatchEmbed().state_dict()) == ['proj.weight', 'proj.bias']


def test_other_channels_and_patch_sizes():
    assert SparseTokenizer(in_chans=1, embed_dim=8, hidden_dim=4)(torch.randn(2, 1, 48, 64)).shape == (2, 12, 8)
    assert PatchEmbed(patch_size=8, in_chans=4, embed_dim=8)(torch.randn(2, 4, 48, 64)).shape == (2, 48, 8)


@pytest.mark.parametrize('kind', TOKENIZERS)
@pytest.mark.parametrize('shape, keep, named', [
    ((2, 3, 50, 48), None, '50x48'),
    ((2, 3, 48, 8), None, '48x8'),
    ((3, 48, 48), None, r'\(3, 48, 48\)'),
    ((2, 3, 48, 48), torch.ones(2, 8, dtype=torch.bool), r'\(2, 8\)'),
    ((2, 3, 48, 48), torch.ones(1, 9, dtype=torch.bool), r'\(1, 9\)'),
    ((2, 3, 48, 48), torch.ones(2, 3, 3, dtype=torch.bool), r'\(2, 3, 3\)'),
    ((2, 3, 48, 48), torch.ones(2, 9), 'float32'),
    ((2, 3, 48, 48), torch.ones(2, 9, dtype=torch.long), 'int64'),
])
def test_tokenizers_refuse(kind, shape, keep, named):
    with pytest.raises(ValueError, match=named): tokenizer(kind)(torch.zeros(shape), keep)


def test_layers_refuse():
    x, mask = torch.ones(2, 3, 8, 8), torch.ones(2, 1, 2, 2, dtype=torch.bool)
    for wrong in (mask[:1], mask.expand(2, 3, 2, 2), mask[:, 0], mask.float()):
        with pytest.raises(ValueError, match='mask must be bool of shape'): apply_mask(x, wrong)
    with pytest.raises(ValueError, match='9x8'): apply_mask(torch.ones(2, 3, 9, 8), mask)
    with pytest.raises(ValueError, match='channels=4'): MaxBlurPool2d(4)(x)


def test_patch_mask_is_row_by_row():
    keep = torch.tensor([[True, False, True, True, True, False]])
    assert patch_mask(keep, torch.zeros(1, 3, 32, 48), 16).tolist() == [[[[True, False, True], [True, True, False]]]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_no_leak_on_cuda():
    model, keep = tokenizer('sparse').cuda(), blockwise(8, (14, 14), generator=seeded(0))
    images = torch.randn(8, 3, 224, 224, generator=seeded(0))
    a, b = (model(z.cuda(), keep.cuda()) for z in (images, noisy(images, keep, (14, 14))))
    assert a.equal(b)
