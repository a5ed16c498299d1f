"What a step gets is a function of the seed and the step: for any process, at any time, and beside a running step."
import time
from functools import partial
from itertools import islice

import pytest
import torch

from scott.cli import InputError
from scott.data.sets import ImageSet
from scott.masking import blockwise
from scott.train.feed import AHEAD, Feed, TwoViews
from scott.train.processes import Group

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def toy():
    images = torch.randint(0, 256, (70, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.full((70,), -1), torch.linspace(.5, 2, 70), [], 'toy', False, [])


def views_of(data, seed=0, masks=partial(blockwise, grid=(4, 4), ratio=.6)):
    return TwoViews(data.aspect, 32, masks, seed)


def feed(data, rank=0, world=1, accumulate=1, views=None, batch=16):
    return Feed(data, views or views_of(data), batch, 0, CPU, Group(rank, world), accumulate)


def equal(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize('rank, world, accumulate', [(0, 1, 1), (0, 1, 4), (1, 2, 1), (1, 2, 2)])
def test_a_resumed_run_gets_the_same_batches(toy, rank, world, accumulate):
    "Step 23 is in the sixth epoch of 4 steps and in the second draw of masks."
    straight = feed(toy, rank, world, accumulate)
    made = [list(straight.batches(step)) for step in range(1, 41)]
    for step in (23, AHEAD, AHEAD + 1):
        assert equal(list(feed(toy, rank, world, accumulate).batches(step)), made[step - 1])
    assert not equal(made[22], made[21])


def test_the_processes_and_micro_batches_make_up_the_batch(toy):
    (whole,) = feed(toy).batches(18)
    found = {}
    for rank in range(2):
        part = feed(toy, rank, 2, 2)
        for share, made in zip(part.shares, part.batches(18), strict=True):
            found.update({i: tuple(t[k] for t in made) for k, i in enumerate(share.tolist())})
    assert sorted(found) == list(range(16))
    for i, made in found.items():
        for ours, theirs in zip(made, whole): assert (ours.float() - theirs[i].float()).abs().max() < 1e-6


def test_the_global_generator_is_left_alone(toy):
    before, made = torch.get_rng_state(), feed(toy)
    for step in range(1, 20): list(made.batches(step))
    made.future.result()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert equal(list(feed(toy).batches(3)), list(feed(toy).batches(3)))


def test_an_epoch_visits_each_image_once_and_is_ordered_once(toy, monkeypatch):
    import scott.train.feed as module
    asked, real = [], module.epoch_order
    monkeypatch.setattr(module, 'epoch_order', lambda *a: asked.append(a) or real(*a))
    made = feed(toy)
    rows = torch.cat([made.rows(step) for step in range(1, 9)])
    assert made.per_epoch == 4 and len(asked) == 2
    assert len(rows[:64].unique()) == len(rows[64:].unique()) == 64 and not torch.equal(rows[:64], rows[64:])


def test_masks_of_many_steps_are_drawn_in_one_call(toy):
    calls = []
    def masks(n, generator): return calls.append(n) or blockwise(n, (4, 4), .6, generator=generator)
    made = feed(toy, views=views_of(toy, masks=masks))
    keep = [next(made.batches(step)).keep for step in range(1, AHEAD + 1)]
    made.future.result()
    assert calls == [16 * AHEAD] * 2  # the second for the step after the last
    assert len({k.numpy().tobytes() for k in keep}) == AHEAD


def test_the_next_step_is_prepared_while_this_one_runs(toy):
    class Slow(TwoViews):
        def draw(self, rows, step):
            time.sleep(.2)
            return super().draw(rows, step)
    made = feed(toy, views=Slow(toy.aspect, 32, views_of(toy).masks, 0))
    next(made.batches(1))
    assert made.waited >= .2
    made.future.result()
    made.waited = 0.
    next(made.batches(2))
    assert made.waited < .2 and made.step == 3


def test_an_exception_of_the_thread_arrives_at_its_step(toy):
    class Broken(TwoViews):
        def draw(self, rows, step):
            if step == 2: raise OSError('the disk is gone')
            return super().draw(rows, step)
    made = feed(toy, views=Broken(toy.aspect, 32, views_of(toy).masks, 0))
    next(made.batches(1))
    with pytest.raises(OSError, match='the disk is gone'): next(made.batches(2))


def test_the_thread_starts_no_team_of_its_own(toy):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = feed(toy)
        next(made.batches(1))
        assert made.pool.submit(torch.get_num_threads).result() == 1 and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_views_are_in_the_layout_of_convolutions(toy):
    made = next(feed(toy).batches(1))
    assert made.context.shape == made.target.shape == (16, 3, 32, 32) and made.keep.shape == (16, 16)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in made[:2])


def test_a_batch_that_cannot_be_made_is_refused(toy):
    with pytest.raises(InputError, match='--batch-size 16 .* 1 x 3'): feed(toy, accumulate=3)
    with pytest.raises(InputError, match='70 images, fewer than --batch-size 71'): feed(toy, batch=71)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('resident', [True, False])
def test_batches_on_a_gpu_are_those_of_the_cpu(toy, monkeypatch, resident):
    "Also while the stream that computes is busy with the batch before."
    if not resident: monkeypatch.setattr(Feed, 'place', lambda self: None)
    there, here = Feed(toy, views_of(toy), 16, 0, torch.device('cuda')), feed(toy)
    assert (there.resident is not None) == resident
    big = torch.randn(4096, 4096, device='cuda')
    for step in range(1, 20):
        for _ in range(5): big = torch.tanh(big @ big)
        (ours,), (theirs,) = there.batches(step), islice(here.batches(step), 1)
        sums = [t.double().sum() for t in ours]
        for a, b in zip(ours, theirs): assert (a.cpu().float() - b.float()).abs().max() < 1e-4
        assert all(torch.equal(s, t.double().sum()) for s, t in zip(sums, ours))
