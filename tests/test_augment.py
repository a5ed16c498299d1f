"Each operation against torchvision's on the same parameters, the distributions, the shared geometry, bad input."
import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from scott import augment
from scott.augment import (apply_views, cubic_matrix, draw_changes, draw_views, eval_view, random_boxes, recolor,
                           resample, two_views)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, size=64, seed=0):
    "Noise of several scales: has color, edges, gray and saturated pixels."
    g = seeded(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 6, generator=g), size, mode='bicubic')
    x = (1.6 * coarse - 0.3 + 0.2 * torch.rand(n, 3, size, size, generator=g)).clamp(0, 1)
    x[:, :, :4] = x[:, :1, :4]                                          # some exactly gray rows
    return (x * 255).round().to(torch.uint8)


# -- one operation at a time -----------------------------------------------------------------------------------------
ORACLES = [
    ('brightness', TF.adjust_brightness, [0.0, 0.6, 0.9, 1.0, 1.1, 1.4], 1e-5),
    ('contrast', TF.adjust_contrast, [0.0, 0.6, 0.9, 1.0, 1.1, 1.4], 1e-5),
    ('saturation', TF.adjust_saturation, [0.0, 0.8, 0.9, 1.0, 1.1, 1.2], 1e-5),
    ('hue', TF.adjust_hue, [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1], 1e-4),
    ('grayscale', lambda x, s: TF.rgb_to_grayscale(x, 3), [0.0] * 6, 1e-5),
    ('gaussian_blur', lambda x, s: TF.gaussian_blur(x, [9, 9], [s, s]), [0.1, 0.3, 0.7, 1.0, 1.5, 2.0], 1e-5),
]


@pytest.mark.parametrize('name, oracle, strengths, atol', ORACLES, ids=[o[0] for o in ORACLES])
def test_operation_equals_torchvision(name, oracle, strengths, atol):
    x = pictures(6) / 255
    before = x.clone()
    ours = getattr(augment, name)(x, torch.tensor(strengths))
    theirs = torch.stack([oracle(image, s) for image, s in zip(x, strengths)])
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    assert torch.equal(x, before)                                       # the input is left alone
    assert ours.min() >= 0 and ours.max() <= 1 + 1e-6


@pytest.mark.parametrize('size', [5, 24, 64, 112])
def test_resample_equals_torchvision(size):
    images = pictures(6)
    corners = torch.tensor([[0, 0, 64, 64], [10, 20, 50, 30], [0, 3, 7, 64], [63, 63, 64, 64], [1, 0, 64, 9],
                            [5, 5, 37, 37]])
    flip = torch.tensor([False, True, True, False, False, True])
    ours = resample(images, corners / 64, size, flip)
    for view, image, (left, top, right, bottom), mirrored in zip(ours, images, corners.tolist(), flip):
        theirs = TF.resized_crop(image / 255, top, left, bottom - top, right - left, [size, size],
                                 interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(view, theirs.flip(-1) if mirrored else theirs, atol=1e-5, rtol=0)


def test_the_whole_picture_at_its_own_size_is_unchanged():
    images = pictures(3)
    whole = torch.tensor([[0., 0., 1., 1.]]).repeat(3, 1)
    same = resample(images, whole, 64, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(same, images / 255, atol=1e-6, rtol=0)


def test_rows_of_the_resize_matrix():
    start = torch.rand(50, generator=seeded()) * 0.5
    stop = start + 0.001 + torch.rand(50, generator=seeded(1)) * 0.499  # some boxes are smaller than one pixel
    for size in (5, 40, 200):
        matrix = cubic_matrix(start, stop, 32, size)
        assert matrix.shape == (50, size, 32) and matrix.isfinite().all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(50, size), atol=1e-5, rtol=0)


# -- what is drawn ---------------------------------------------------------------------------------------------------
def boxes_of_torchvision(aspect, n):
    "n boxes of RandomResizedCrop in a picture 1000 pixels high, as fractions (n, 4)."
    torch.manual_seed(0)
    picture = torch.empty(1, 1000, round(1000 * aspect))
    drawn = torch.tensor([RandomResizedCrop.get_params(picture, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    top, left, height, width = drawn.unbind(1)
    return torch.stack([left, top, left + width, top + height], 1) / torch.tensor([1000 * aspect, 1000.] * 2)


@pytest.mark.parametrize('aspect', [1.0, 1.5, 0.5, 4.0])
def test_boxes_are_distributed_as_torchvisions(aspect):
    ours, theirs = random_boxes(torch.full((20_000,), aspect), generator=seeded()), boxes_of_torchvision(aspect, 3000)

    def features(b):
        w, h = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        return torch.stack([w * h, (w * aspect / h).log(), w, h, b[:, 0], b[:, 1], (w * h) ** 2, (w * h < 0.4).float()])

    a, b = features(ours), features(theirs)
    error = (a.var(1) / a.shape[1] + b.var(1) / b.shape[1]).sqrt()
    assert ((a.mean(1) - b.mean(1)).abs() < 4 * error + 5e-4).all()     # 5e-4: torchvision rounds to whole pixels


def test_boxes_lie_inside_and_keep_their_shape():
    aspect = torch.rand(5000, generator=seeded()) * 3 + 0.2
    boxes = random_boxes(aspect, generator=seeded(1))
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= -1e-6 and boxes.max() <= 1 + 1e-6
    shape = w * aspect / h                                              # in the original picture
    assert shape.min() > 3 / 4 - 1e-4 and shape.max() < 4 / 3 + 1e-4
    reached = (w * h)[(aspect > 0.75) & (aspect < 4 / 3)]
    assert reached.min() >= 0.2 - 1e-4                                  # no fallback needed there


@pytest.mark.parametrize('aspect', [10.0, 0.1])
def test_no_box_fits(aspect):
    box = random_boxes(torch.tensor([aspect]), generator=seeded())[0]
    side = 4 / 3 / 10                                                   # the largest allowed box, centered
    long, short = (box[0::2], box[1::2]) if aspect > 1 else (box[1::2], box[0::2])
    torch.testing.assert_close(long, torch.tensor([0.5 - side / 2, 0.5 + side / 2]))
    torch.testing.assert_close(short, torch.tensor([0., 1.]))


def test_probabilities_and_order():
    n = 50_000
    slot, strength = draw_changes(n, generator=seeded())
    on = slot >= 0

    def near(happened, p):
        assert abs(happened.float().mean() - p) < 4 * (p * (1 - p) / len(happened)) ** 0.5

    for change, p in enumerate([0.48, 0.48, 0.48, 0.48, 0.06, 0.18]):
        near(on[:, change], p)
    both = slot[on[:, 0] & on[:, 5]]
    near(both[:, 0] < both[:, 5], 0.5)
    jitter = slot[on[:, 0]][:, :4]
    for change in range(4):
        near(jitter.argmin(1) == change, 0.25)
    assert (jitter.amax(1) - jitter.amin(1) == 3).all()                 # the four stay together
    assert (slot.sort(1).values[:, -1] + 1 == on.sum(1)).all()          # slots are 0, 1, … without gaps
    for change, (low, high) in enumerate([(.6, 1.4), (.6, 1.4), (.8, 1.2), (-.1, .1)]):
        column = strength[:, change]
        assert column.min() >= low and column.max() <= high
        assert abs(column.mean() - (low + high) / 2) < 4 * (high - low) / 12 ** 0.5 / n ** 0.5


def one_by_one(x, slot, strength):
    "Each view's operations in its own order, one view after the other; view v shows image v modulo len(x)."
    views = []
    for v, (row, amount) in enumerate(zip(slot, strength)):
        image = x[v % len(x)][None]
        for change in row.argsort().tolist():
            if row[change] >= 0:
                image = augment.CHANGES[change](image, amount[change:change + 1])
        views.append(image)
    return torch.cat(views)


def every_order():
    "The slots of all views there can be: which groups are done, in which order, and the order within the jitter."
    rows = []
    for order in itertools.permutations((0, 1, 2)):
        for done in itertools.product((False, True), repeat=3):
            for jitter in itertools.permutations(range(4)):
                changes = [c for group in order if done[group] for c in (jitter, (4,), (5,))[group]]
                rows.append([changes.index(c) if c in changes else -1 for c in range(6)])
    return torch.tensor(rows).unique(dim=0)


def test_recolor_equals_the_single_operations_in_every_order():
    slot = every_order()
    assert len(slot) == 1 + 1 + 1 + 2 + 24 * (1 + 2 + 2 + 6)            # none, gray, blur, both; with jitter
    strength = draw_changes(len(slot), generator=seeded(1))[1]
    x = pictures(len(slot), 16) / 255
    before = x.clone()
    gap = (recolor(x, slot, strength) - one_by_one(x, slot, strength)).abs().max()
    assert gap < 2e-6                                                   # a few roundings, enlarged by contrast
    assert torch.equal(x, before)


@pytest.mark.parametrize('seed', range(4))
def test_recolor_equals_the_single_operations_on_two_views(seed):
    x = pictures(20, 24, seed) / 255
    slot, strength = draw_changes(40, generator=seeded(seed))
    torch.testing.assert_close(recolor(x, slot, strength), one_by_one(x, slot, strength), atol=2e-6, rtol=0)


def test_nothing_to_change():
    x = pictures(3, 16) / 255
    never = torch.full((6, 6), -1), torch.ones(6, 6)
    assert torch.equal(recolor(x, *never), torch.cat([x, x]))


def test_number_of_operations():
    """Independent of the batch and of the draws: every order fits the same sequence of operations."""
    views = {'view', '_unsafe_view', 'alias', 'select', 'slice', 'unsqueeze', 'expand', 'permute', 'transpose', 'split',
             'split_with_sizes', 'unbind', 'detach', 'lift_fresh'}      # they compute nothing

    class Counter(TorchDispatchMode):
        count, dtypes = 0, set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.count += func.overloadpacket.__name__ not in views
            self.dtypes |= {t.dtype for t in (result if isinstance(result, (tuple, list)) else [result])}
            return result

    slot = every_order()
    slot = slot[: len(slot) // 2 * 2].view(2, -1, 6)
    n = slot.shape[1]
    every = draw_views(torch.ones(n), seeded())._replace(slot=slot, strength=draw_changes(2 * n)[1].view(2, n, 6))
    for draws in (every, draw_views(torch.ones(64), seeded()), draw_views(torch.ones(64), seeded(1), color=1.)):
        images = pictures(len(draws.flip), 16)
        with Counter() as counter: apply_views(images, draws, 16)
        assert counter.count <= 104
        assert torch.float64 not in counter.dtypes                      # Apple's graphics chips have none


# -- two views -------------------------------------------------------------------------------------------------------
def test_views_share_geometry_and_differ_in_color():
    images = pictures(64)
    context, target = two_views(images, size=32, generator=seeded(), color=0.0)
    assert torch.equal(context, target)
    colored, _ = two_views(images, size=32, generator=seeded(), color=1.0)
    changed = (colored != context).flatten(1).any(1)
    assert 0 < changed.sum() < 64                                       # same crops; some views recolored
    assert torch.equal(colored[~changed], context[~changed])
    context, target = two_views(images, size=32, generator=seeded(), color=1.0)
    assert (context != target).flatten(1).any(1).float().mean() > 0.5


def test_every_image_has_its_own_parameters():
    images = pictures(1).repeat(16, 1, 1, 1)
    context, _ = two_views(images, size=16, generator=seeded(), color=0.0)
    assert len(torch.unique(context.flatten(1), dim=0)) == 16


def test_same_seed_same_views_and_input_untouched():
    images = pictures(9)
    before = images.clone()
    aspect = torch.linspace(0.5, 2, 9)
    one, two = [two_views(images, aspect, 24, seeded(3)) for _ in range(2)]
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and torch.equal(images, before)
    assert one[0].shape == one[1].shape == (9, 3, 24, 24) and one[0].dtype == torch.float32
    assert not torch.equal(one[0], two_views(images, aspect, 24, seeded(4))[0])
    other_shape = two_views(images, 1 / aspect, 24, seeded(3))
    assert not torch.equal(one[0], other_shape[0])                      # the aspect ratio is used


def test_circle_stays_a_circle():
    y, x = torch.meshgrid(torch.arange(200) - 99.5, torch.arange(600) - 299.5, indexing='ij')
    disk = (x ** 2 + y ** 2 > 40 ** 2).mul(255).to(torch.uint8).expand(3, -1, -1)
    squashed = TF.resize(disk, [160, 160], antialias=True)[None]        # three times as wide as high, made square
    boxes = random_boxes(torch.full((400,), 3.0), scale=(0.2, 0.3), ratio=(1., 1.), generator=seeded())
    views = resample(squashed.repeat(400, 1, 1, 1), boxes, 96, torch.zeros(400, dtype=torch.bool))[:, 0] < 0.5
    rim = torch.cat([views[:, 0], views[:, -1], views[:, :, 0], views[:, :, -1]], 1).any(1)
    views = views[~rim & views.flatten(1).any(1)]                       # those that show all of the disk
    assert len(views) > 20
    width, height = views.any(1).sum(1), views.any(2).sum(1)
    assert ((width - height).abs() <= 2).all()                          # pixels, of 25 or more
    assert width.min() >= 25


def test_normalization():
    images = pictures(2)
    expected = TF.normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(eval_view(images), expected)
    whole, _ = two_views(images, size=64, generator=seeded(), scale=(1., 1.), color=0.0)
    assert whole.shape == images.shape and -2.2 < whole.min() and whole.max() < 2.7


def test_autocast_does_not_reach_the_pixels():
    images = pictures(4)
    plain, _ = two_views(images, size=32, generator=seeded())
    with torch.autocast('cpu', torch.bfloat16):
        inside, _ = two_views(images, size=32, generator=seeded())
    assert torch.equal(plain, inside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_gives_the_same_views():
    images, aspect = pictures(32), torch.rand(32, generator=seeded()) + 0.5
    on_cpu, on_gpu = two_views(images, aspect, 48, seeded(1)), two_views(images.cuda(), aspect, 48, seeded(1))
    for a, b in zip(on_cpu, on_gpu):
        assert b.device.type == 'cuda'
        torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=0)


# -- bad input -------------------------------------------------------------------------------------------------------
GOOD = pictures(2, 16)


@pytest.mark.parametrize('wrong, message', [
    (dict(images=GOOD / 255), r'images must be uint8 of shape \(B, 3, S, S\), got torch.float32 \(2, 3, 16, 16\)'),
    (dict(images=GOOD.permute(0, 2, 3, 1)), r'\(2, 16, 16, 3\)'),
    (dict(images=GOOD[:, :, :8]), r'\(2, 3, 8, 16\)'),
    (dict(images=GOOD[0]), r'\(3, 16, 16\)'),
    (dict(images=GOOD, aspect=torch.ones(3)), 'aspect must hold 2 positive numbers'),
    (dict(images=GOOD, aspect=torch.tensor([1., 0.])), 'aspect must hold 2 positive numbers'),
    (dict(images=GOOD, aspect=torch.tensor([1., float('nan')])), 'aspect must hold 2 positive numbers'),
    (dict(images=GOOD, size=0), 'size must be at least 5 pixels .* got 0'),
    (dict(images=GOOD, size=4), 'size must be at least 5'),
    (dict(images=GOOD, scale=(0., 1.)), 'scale must be a range'),
    (dict(images=GOOD, scale=(0.5, 0.4)), 'scale must be a range'),
    (dict(images=GOOD, color=60), 'color is a probability'),
])
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        two_views(**wrong)


def test_eval_view_refuses_floats():
    with pytest.raises(ValueError, match='images must be uint8'):
        eval_view(GOOD / 255)
