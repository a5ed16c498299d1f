"Several processes and several micro-batches make the run of a single process."
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

from scott.cli import InputError
from scott.data.petals import petals
from scott.data.sets import ImageSet, load
from scott.train.config import Config
from scott.train.files import load_checkpoint
from scott.train.pretrain import Pretraining, labeled, main, pretrain
from scott.train.processes import Group, check_launch, shares
from scott.train.run import read_metrics

ROOT = Path(__file__).parents[1]
TOY = dict(preset='demo', data='petals', img_size=64, embed_dim=32, depth=2, predictor_depth=1, drop_rate=0.,
           attn_drop_rate=0., drop_path_rate=0., epochs=3, batch_size=16, warmup_epochs=1, device='cpu', amp='off',
           out='unused')


@pytest.fixture(scope='module')
def flowers():
    return ImageSet(petals(n=70, size=74)[0], torch.full((70,), -1), torch.ones(70), [], 'toy', False, [])


def toy(data, **changes):
    return Pretraining(Config.of(**{**TOY, **changes}), data).trainer


def losses(trainer, n=6):
    found = []
    for _ in range(n):
        trainer.tally.reset()
        trainer.train_step()
        found.append(trainer.tally.read().loss)
    return torch.tensor(found)


def weights_gap(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


# --- dividing a batch

@pytest.mark.parametrize('world, accumulate', [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_image_is_computed_once(world, accumulate):
    parts = [share for rank in range(world) for share in shares(16, rank, world, accumulate)]
    assert sorted(i for share in parts for i in share.tolist()) == list(range(16))
    assert {len(share) for share in parts} == {16 // world // accumulate}


def test_accumulation_is_the_same_run(flowers):
    whole, parts, other = toy(flowers), toy(flowers, accumulate=4), toy(flowers, seed=1)
    assert (losses(whole) - losses(parts)).abs().max() < 1e-6
    assert 0 < weights_gap(whole, parts) < 1e-5  # not 0: sums are added in another order
    losses(other)
    assert weights_gap(whole, other) > 1e-3  # the test can fail


def test_no_trained_parameter_is_without_gradient(flowers):
    "DDP would wait for such a parameter's gradient for ever."
    trainer = toy(flowers)
    (batch,) = trainer.feed.batches(1)
    trainer.model(*batch).backward()
    assert all((p.grad is not None) == p.requires_grad for p in trainer.model.parameters())
    assert {id(p) for p in trainer.params} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in trainer.model.target.parameters())


def test_one_bad_share_is_a_bad_step_for_all(flowers, monkeypatch):
    "The mean over processes is then neither 0 nor 1, and AdamW skips at exactly 1 only."
    trainer = toy(flowers, on_nan='skip')
    losses(trainer, 2)
    before = copy.deepcopy(trainer.model.context.state_dict())
    monkeypatch.setattr(Group, 'mean', lambda self, x: x + torch.tensor([.5, 0., 0.]))
    losses(trainer, 1)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.context.state_dict().items())
    counts = trainer.tally.read()
    assert (counts.skipped, counts.bad, counts.first_bad) == (1, 1, 3)


# --- what torchrun may not do

TORCHRUN = dict(TORCHELASTIC_RUN_ID='a', LOCAL_WORLD_SIZE='2', WORLD_SIZE='2', RANK='0', LOCAL_RANK='0')


@pytest.mark.parametrize('device, gpus, told, line', [
    ('cuda:1', 2, {}, '--device cuda:1'), ('cuda', 1, {}, '--nproc-per-node 2'), ('auto', 1, {}, '--nproc-per-node 2'),
    ('mps', 0, {}, '--device mps'), ('cpu', 0, dict(WORLD_SIZE='4', TORCHELASTIC_MAX_RESTARTS='1'), '--max-restarts 1')])
def test_what_torchrun_may_not_do_is_refused_before_processes_meet(monkeypatch, device, gpus, told, line):
    for k, v in {**TORCHRUN, **told}.items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    with pytest.raises(InputError, match=line): Group.join(device)


def test_two_machines_without_restarts_are_allowed(monkeypatch):
    for k, v in {**TORCHRUN, 'WORLD_SIZE': '4', 'TORCHELASTIC_MAX_RESTARTS': '0'}.items(): monkeypatch.setenv(k, v)
    check_launch('cpu')


def test_only_the_torchrun_that_made_a_run_goes_on_with_it(tmp_path, monkeypatch):
    for launch in (None, 'a'):
        (tmp_path / 'config.json').write_text(json.dumps(dict(launch=launch)))
        monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
        assert not Group().made(tmp_path)
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'a')
        assert Group().made(tmp_path) == (launch == 'a')
    assert not Group().made(tmp_path / 'nowhere')


@pytest.mark.parametrize('rank, local, order', [(0, 0, 'make wait'), (1, 1, 'wait make'), (2, 0, 'make wait')])
def test_one_process_of_each_machine_makes_the_cache(monkeypatch, rank, local, order):
    events = []
    monkeypatch.setattr(Group, 'wait', lambda self: events.append('wait'))
    assert Group(rank, 4, local).in_turn(lambda: events.append('make') or 5) == 5
    assert events == order.split()


def test_processes_that_have_read_different_pictures_are_refused(tmp_path, monkeypatch):
    for i in range(16): Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(tmp_path / f'{i}.png')
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / '.cache'))
    given = {**TOY, 'data': f'folder:{tmp_path}', 'out': str(tmp_path / '.run')}
    monkeypatch.setattr(Group, 'max', lambda self, number: max(number, 5))     # another process has 5
    with pytest.raises(InputError, match='the processes have read different pictures'): pretrain(**given)
    assert not (tmp_path / '.run').exists()


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
            f'--max-restarts={restarts}', '-m', 'scott.train', *settings(place, name), *more]
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
    a, b = (load_checkpoint(r)['model'] for r in (run, other))
    return max(abs(x - y) for x, y in zip(ours, theirs)), max((a[k] - b[k]).abs().max().item() for k in a)


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
    workers = [pid for pid in children(done.pid) if b'scott.train' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    text = done.communicate(timeout=300)[0]
    assert done.returncode == 0 and 'exitcode: -9' in text, text
    assert compare(run, pair) == (0., 0.)  # bit for bit
    figure('09 one of 2 processes killed, --max-restarts=1', 'finished; losses and weights Δ = 0.0')


# --- what else a run needs

def test_labeled_pictures_are_the_training_split_in_the_evaluation_view(capsys):
    data = load('petals', 'all', 37)
    shown = labeled(Config.of(**TOY, knn_every=1), data)
    assert shown.n == 640 and labeled(Config.of(**TOY, knn_every=0), data) is None
    assert capsys.readouterr().out == ''


def test_bfloat16_stays_near(flowers):
    exact, low = losses(toy(flowers)), losses(toy(flowers, amp='bf16'))
    assert (exact - low).abs().max() < .02 * exact.max() and not torch.equal(exact, low)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_no_step_waits_for_the_gpu():
    trainer = toy(load('petals', 'train', 74), device='cuda', amp='bf16', batch_size=64)
    for _ in range(5): trainer.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(10): trainer.train_step()
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_resume_is_exact_on_a_gpu_with_deterministic_algorithms(flowers):
    torch.use_deterministic_algorithms(True)
    try:
        straight, first, second = (toy(flowers, device='cuda', compile=False, drop_rate=.2) for _ in range(3))
        expected, before = losses(straight, 8), losses(first, 4)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert torch.equal(torch.cat([before, losses(second, 4)]), expected)
        assert weights_gap(straight, second) == 0. and math.isfinite(expected.sum())
    finally: torch.use_deterministic_algorithms(False)
