"Several processes, several micro-batches, one lever off: the same run."
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scott.train.config import LEVERS, Config
from scott.data.sets import ImageSet, load, petals
from scott.cli import InputError
from scott.train.feed import Feed
from scott.train.processes import Student, labeled, shares
from scott.train.files import load_checkpoint
from scott.train.run import read_metrics
from scott.train.trainer import Trainer, get_state, set_state
from scott.train.pretrain import main

ROOT = Path(__file__).parents[1]
TOY = dict(preset='demo', data='petals', img_size=64, embed_dim=32, depth=2, predictor_depth=1, drop_rate=0.,
           attn_drop_rate=0., drop_path_rate=0., epochs=3, batch_size=16, warmup_epochs=1, device='cpu', amp='off',
           out='unused')


@pytest.fixture(scope='module')
def flowers():
    return ImageSet(petals(n=70, size=74)[0], torch.full((70,), -1), torch.ones(70), [], 'toy', False, [])


def toy(data, **changes):
    return Trainer(Config(**{**TOY, **changes}), data)


def losses(trainer, n=6):
    return torch.tensor([trainer.train_step()[0].item() for _ in range(n)])


def weights_gap(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.jepa.parameters(), b.jepa.parameters(), strict=True))


# --- dividing a batch

@pytest.mark.parametrize('world, accumulate', [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_image_is_computed_once(world, accumulate):
    parts = [share for rank in range(world) for share in shares(16, rank, world, accumulate)]
    assert sorted(i for share in parts for i in share.tolist()) == list(range(16))
    assert {len(share) for share in parts} == {16 // world // accumulate}


def test_a_batch_that_cannot_be_divided_is_refused(flowers):
    with pytest.raises(InputError, match='--batch-size 16 .* 1 x 3'): toy(flowers, accumulate=3)


@pytest.mark.parametrize('accumulate', [2, 4])
def test_accumulation_is_the_same_run(flowers, accumulate):
    whole, parts = toy(flowers), toy(flowers, accumulate=accumulate)
    assert (losses(whole) - losses(parts)).abs().max() < 1e-6
    assert 0 < weights_gap(whole, parts) < 1e-5  # not 0: sums are added in another order
    other = toy(flowers, seed=1)
    losses(other)
    assert weights_gap(whole, other) > 1e-3  # the test can fail


def test_pictures_are_the_same_whether_they_were_fetched_ahead_or_not(flowers):
    trainer, late = toy(flowers), toy(flowers)
    for step in (1, 2, 3): ahead = trainer.feed.pictures(step)
    assert torch.equal(ahead[0], late.feed.pictures(3)[0])
    assert torch.equal(ahead[0], flowers.images[trainer.feed.rows(3)])


# --- the processes of torchrun

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with 32 small pictures; decoded caches go beside it."
    place, rng = tmp_path_factory.mktemp('parallel'), np.random.default_rng(0)
    (place / 'images').mkdir()
    for i in range(32): Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(place / f'images/{i:02}.png')
    return place


def settings(place, name):
    "10 steps: 5 epochs of 2 batches."
    changes = dict(data=f'folder:{place / "images"}', epochs=5, log_every=1, out=str(place / name))
    return [f'--{k.replace("_", "-")}={v}' for k, v in {**TOY, **changes}.items()]


def torchrun(place, name, *more, restarts=0):
    argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
            f'--max-restarts={restarts}', '-m', 'scott.train.trainer', *settings(place, name), *more]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'SCOTT_CACHE': str(place / 'cache')}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope='module')
def pair(place):
    "A run of 10 steps on two processes."
    run = torchrun(place, 'pair')
    text = run.communicate(timeout=300)[0]
    assert run.returncode == 0, text
    return place / 'pair'


def compare(run, other):
    "Largest differences of losses and of weights."
    ours, theirs = ([m['loss'] for m in read_metrics(r)] for r in (run, other))
    assert len(ours) == len(theirs) == 10
    a, b = (load_checkpoint(r)['jepa'] for r in (run, other))
    return max(abs(x - y) for x, y in zip(ours, theirs)), max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.slow
def test_two_processes_are_one_process_with_the_same_batch(place, pair, monkeypatch, figure):
    monkeypatch.setenv('SCOTT_CACHE', str(place / 'cache'))
    main(settings(place, 'single'))
    loss_gap, weight_gap = compare(pair, place / 'single')
    assert loss_gap < 1e-6 and weight_gap < 1e-5
    assert json.loads((pair / 'config.json').read_text())['processes'] == 2
    figure('09 2 processes = 1 process with the same batch', f'losses {loss_gap:.1e}, weights {weight_gap:.1e}')


def children(pid):
    "Processes started by a process, from the process table."
    tasks = Path(f'/proc/{pid}/task').glob('*/children')
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc to find the processes')
def test_a_killed_process_is_restarted_and_the_losses_are_the_same(place, pair, figure):
    run = place / 'killed'
    done = torchrun(place, 'killed', '--checkpoint-minutes=0', restarts=1)
    deadline = time.monotonic() + 120
    while not ((run / 'metrics.jsonl').exists() and len(read_metrics(run)) >= 3):
        assert done.poll() is None and time.monotonic() < deadline, 'it ended before it could be killed'
        time.sleep(.02)
    workers = [pid for pid in children(done.pid) if b'scott.train.trainer' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    text = done.communicate(timeout=300)[0]
    assert done.returncode == 0 and 'exitcode: -9' in text, text
    assert compare(run, pair) == (0., 0.)  # bit for bit
    figure('09 one of 2 processes killed, --max-restarts=1', 'finished; losses and weights Δ = 0.0')


def test_students_have_no_parameter_without_gradient(flowers):
    "DDP would wait for such a parameter's gradient for ever."
    trainer = toy(flowers)
    (context, target, keep), = trainer.feed.micro_batches(1)
    Student(trainer.jepa)(context, keep).square().mean().backward()
    assert all(p.grad is not None for p in trainer.student.parameters())
    ids = {id(p) for p in trainer.student.parameters()}
    assert ids == {id(p) for group in trainer.opt.param_groups for p in group['params']}


# --- levers

TOLERANCE = dict(cache=0., queue=0., memory=0., compile=0., graphs=0., dropout=0., attention=1e-5, channels_last=1e-5,
                 optimizer=1e-6, ema=1e-6)  # of the loss; on a CPU; without dropout


@pytest.mark.parametrize('lever', TOLERANCE)
def test_a_lever_does_not_change_the_losses(flowers, lever):
    assert (losses(toy(flowers)) - losses(toy(flowers, without=lever))).abs().max() <= TOLERANCE[lever]


@pytest.mark.parametrize('first, then', [('', 'channels_last'), ('channels_last', ''), ('', 'optimizer'), ('optimizer', '')])
def test_a_run_goes_on_with_other_levers(flowers, first, then):
    straight, begun, goes_on = toy(flowers), toy(flowers, without=first), toy(flowers, without=then)
    losses(straight, 8)
    losses(begun, 4)
    set_state(goes_on, copy.deepcopy(get_state(begun)))
    losses(goes_on, 4)
    assert weights_gap(straight, goes_on) < 2e-5


def test_labeled_pictures_are_the_training_split_in_the_evaluation_view(capsys):
    shown = labeled(Config(**TOY, knn_every=1))
    assert len(shown) == 3200 and shown.images.shape[-1] == 64 and len(shown.labels.unique()) == 20
    assert labeled(Config(**TOY, knn_every=0)) is None and capsys.readouterr().out == ''


def test_one_bad_share_is_a_bad_step_for_all(flowers, monkeypatch):
    "The mean over processes is then neither 0 nor 1, and AdamW skips at exactly 1 only."
    trainer = toy(flowers, on_nan='skip')
    losses(trainer, 2)
    before = copy.deepcopy(trainer.jepa.context.state_dict())
    monkeypatch.setattr(type(trainer.group), 'mean', lambda self, x: x + torch.tensor([.5, 0.]) if x.ndim else x)
    losses(trainer, 1)
    assert all(torch.equal(v, before[k]) for k, v in trainer.jepa.context.state_dict().items())
    assert trainer.bad.tolist() == [1, 1, 3]


@pytest.mark.parametrize('lever', ['masks', 'augment'])
def test_levers_that_draw_otherwise_leave_the_loss_where_it_is(flowers, lever):
    "Other random numbers of the same distribution: the mean of the first losses agrees (their spread is about 3 %)."
    assert set(TOLERANCE) | {'masks', 'augment', 'amp'} == set(LEVERS)
    with_it, without = losses(toy(flowers)), losses(toy(flowers, without=lever))
    assert not torch.equal(with_it, without)
    assert without.mean() == pytest.approx(with_it.mean().item(), rel=.1)


def test_all_levers_off_trains_as_well(flowers):
    fast, plain = (losses(toy(flowers, lr_start=5e-4, without=w), 12) for w in ('', 'all'))
    assert plain[-1] < .9 * plain[0] and plain[-1] == pytest.approx(fast[-1].item(), rel=.2)


def test_bfloat16_stays_near(flowers):
    exact, low = losses(toy(flowers)), losses(toy(flowers, amp='bf16'))
    assert (exact - low).abs().max() < .02 * exact.max() and not torch.equal(exact, low)
    assert torch.equal(exact, losses(toy(flowers, amp='bf16', without='amp')))


def test_plain_views_do_not_depend_on_who_asks_or_when(flowers):
    one, two = toy(flowers, without='augment'), toy(flowers, without='augment')
    for step in (1, 2): first = one.feed.plain_views(step)
    assert all(torch.equal(a, b) for a, b in zip(first[0], two.feed.plain_views(2)[0]))


def test_waiting_is_counted(flowers, monkeypatch):
    trainer, real = toy(flowers), Feed.fetch
    def slow(self, step):
        time.sleep(.05)
        return real(self, step)
    monkeypatch.setattr(Feed, 'fetch', slow)
    trainer.feed.pictures(1)
    assert trainer.feed.waited >= .05


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_no_step_waits_for_the_gpu():
    data = load('petals', 'train', 74)
    trainer = Trainer(Config(**{**TOY, 'device': 'cuda', 'amp': 'bf16', 'batch_size': 64}), data)
    for _ in range(5): trainer.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(10): trainer.train_step()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('lever', ['cache', 'channels_last', 'attention', 'compile', 'graphs', 'optimizer', 'ema'])
def test_a_lever_does_not_change_the_losses_on_a_gpu(flowers, lever):
    found = []
    for without in ('', lever):
        torch.compiler.reset()
        found.append(losses(toy(flowers, device='cuda', without=without)))
    assert (found[0] - found[1]).abs().max() < 1e-4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_resume_is_exact_on_a_gpu(flowers):
    torch.use_deterministic_algorithms(True)
    try:
        settings = dict(device='cuda', without='compile,graphs', drop_rate=.2)
        straight, first, second = (toy(flowers, **settings) for _ in range(3))
        expected = losses(straight, 8)
        before = losses(first, 4)
        state = {k: v for k, v in get_state(first).items()}
        set_state(second, state)
        assert torch.equal(torch.cat([before, losses(second, 4)]), expected)
        assert weights_gap(straight, second) == 0. and math.isfinite(expected.sum())
    finally: torch.use_deterministic_algorithms(False)
