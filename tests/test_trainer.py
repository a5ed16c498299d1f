"The engine: steps that are made or left out, sums, resume, the loop. Its models are small; none of this needs images."
import ast
import copy
import io
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tensors
from torch import nn

from scott.cli import InputError
from scott.encoder import Encoder
from scott.jepa import MIMJEPA
from scott.predictor import Predictor
from scott.schedule import Schedule, linear, warmup_flat_cosine
from scott.train import trainer as engine
from scott.train.feed import stream
from scott.train.machine import Place
from scott.train.signs import rows_of_parts
from scott.train.trainer import Trainer, fit, own_randomness

CPU = torch.device('cpu')
pytestmark = pytest.mark.usefixtures('one_thread')


class Toy(nn.Module):
    "A network with dropout, a target that follows it, and a weight that is not in the loss."
    def __init__(self):
        super().__init__()
        self.context = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(.2), nn.Linear(144, 4))
        self.target = copy.deepcopy(self.context).requires_grad_(False).eval()
        self.unused = nn.Linear(2, 2)

    def forward(self, images, answers):
        return (self.context(images) - answers).square().mean() + .1 * self.target(images).square().mean()

    @torch.no_grad()
    def update_target(self, momentum):
        for p, q in zip(self.target.parameters(), self.context.parameters()): p.lerp_(q, 1 - momentum)


class Batches:
    "A batch of 8 that is a function of the step, in some micro-batches; in the steps of `act`, something happens."
    def __init__(self, parts=1, act=None):
        self.parts, self.act = parts, act or {}

    def batches(self, step):
        self.act.get(step, lambda: None)()
        generator = torch.Generator().manual_seed(step)
        images, answers = torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 4, generator=generator)
        yield from zip(images.chunk(self.parts), answers.chunk(self.parts))


def toy(dtype=None, feed=None, seed=0, total=20, **settings):
    torch.manual_seed(3)
    model = Toy().train()
    schedule = Schedule(total, warmup=4, lr=1e-2, momentum=.9)
    return Trainer(model, feed or Batches(), schedule, Place(CPU, dtype), seed, **settings)


def steps(trainer, n):
    "The losses of the next n steps."
    losses = []
    for _ in range(n):
        trainer.tally.reset()
        trainer.train_step()
        losses.append(trainer.tally.read().loss)
    return losses


def distance(a, b):
    "max|Δ| over two states."
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 30
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def poison(trainer, value=math.nan):
    "Makes a gradient of the step that comes something else; a function that stops it."
    return trainer.model.context[0].weight.register_hook(lambda g: g * value).remove


# --- one engine

def test_the_engine_knows_neither_the_method_nor_run_folders():
    tree = ast.parse(Path(engine.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {f'{node.module}.{a.name}' for node in imports for a in node.names}
    assert 'schedule.Schedule' in used  # imports are found
    for room in ('jepa', 'encoder', 'masking', 'data', 'run', 'files', 'config', 'pretrain'):
        assert not [name for name in used if room in name.split('.')], room


def test_a_step_is_the_plain_step():
    "The loop of page 23, with the trainer's dropout."
    trainer, plain = toy(), toy().model
    trainer_losses, losses = steps(trainer, 6), []
    opt = torch.optim.AdamW([dict(params=[p for p in plain.parameters() if p.requires_grad and p.ndim > 1]),
                             dict(params=[p for p in plain.parameters() if p.requires_grad and p.ndim == 1])])
    for step in range(1, 7):
        v = trainer.schedule.at(step)
        for group, decay in zip(opt.param_groups, (v.wd, 0.)): group.update(lr=v.lr, weight_decay=decay)
        torch.manual_seed(stream(0, 'dropout', step, 0))
        (batch,) = Batches().batches(step)
        loss = plain(*batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        plain.update_target(v.momentum)
        losses.append(loss.item())
    assert trainer_losses == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(trainer.model.context.parameters(), plain.context.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_schedules_reach_the_optimizer_and_the_target():
    trainer, used, moved = toy(total=12), [], []
    real, ema = trainer.opt.step, trainer.model.update_target
    def spy(*args, **kwargs):
        used.append([(g['lr'], g['weight_decay']) for g in trainer.opt.param_groups])
        return real(*args, **kwargs)
    trainer.opt.step, trainer.model.update_target = spy, lambda m: (moved.append(m), ema(m))
    steps(trainer, 12)
    for k, groups in enumerate(used, 1):  # the k-th step uses the value at k, from 1
        lr, wd = warmup_flat_cosine(k, 12, 4, 1e-6, 1e-2, 1e-5), linear(k, 12, .04, .4)
        assert groups == [(lr, wd), (lr, 0.)]
    assert len(used) == 12 and moved == [linear(k, 12, .9, 1.) for k in range(1, 13)]
    with pytest.raises(ValueError, match='step must lie in'): trainer.train_step()


def test_the_target_changes_by_its_moving_average_and_by_nothing_else():
    trainer = toy()
    for _ in range(3):
        before = [p.clone() for p in trainer.model.target.parameters()]
        momentum = trainer.train_step().momentum
        for old, new, context in zip(before, trainer.model.target.parameters(), trainer.model.context.parameters()):
            assert torch.equal(new, old.lerp(context, 1 - momentum)) and not torch.equal(new, context)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize('parts', [2, 4])
def test_micro_batches_are_the_same_step(parts):
    whole, split = toy(), toy(feed=Batches(parts), accumulate=parts)
    for trainer in (whole, split): trainer.model.context[3].p = 0.  # each part would draw its own dropout
    assert steps(split, 3) == pytest.approx(steps(whole, 3), rel=1e-5)
    for a, b in zip(whole.params, split.params): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_bfloat16_keeps_weights_in_32_bits_and_stays_near():
    low, full = toy(torch.bfloat16), toy()
    assert steps(low, 2) == pytest.approx(steps(full, 2), rel=.02)
    assert steps(low, 1) != steps(full, 1)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in low.model.parameters())


# --- what a step leaves behind

def test_norms_of_parts_and_zero_for_what_is_not_in_the_loss():
    def rows(params): return torch.tensor([[float(p.shape[0] == size) for p in params] for size in (4, 2)])
    trainer, seen = toy(rows=rows), []
    real = trainer.opt.step
    def spy(*args, **kwargs):
        grads = [p.grad for p in trainer.model.context.parameters()]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return real(*args, **kwargs)
    trainer.opt.step = spy
    for _ in range(3): trainer.train_step()
    assert trainer.tally.read().norms == [pytest.approx(np.mean(seen), rel=1e-5), 0.]


def test_parts_of_a_jepa():
    torch.manual_seed(0)
    jepa = MIMJEPA(Encoder(img_size=32, embed_dim=16, depth=1, num_heads=2), Predictor(4, embed_dim=16, depth=1))
    trainer = Trainer(jepa.train(), None, Schedule(9, 1, 1e-3), Place(CPU, None), rows=lambda p: rows_of_parts(jepa, p))
    for p in trainer.params: p.grad = torch.ones_like(p)
    trainer.update(torch.tensor(.5), trainer.schedule.at(1))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (jepa.context.tokenizer, jepa.context, jepa.predictor)]
    by_hand = [sizes[0] ** .5, (sizes[1] - sizes[0]) ** .5, sizes[2] ** .5]  # every gradient was 1
    assert trainer.tally.read().norms == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize('fused', [True, False])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(fused):
    trainer = toy()
    if not fused: trainer.opt = engine.make_optimizer(trainer.model, fused=False)
    for step in (1, 2, 3, 4):
        before = copy.deepcopy([trainer.model.context.state_dict(), trainer.opt.state_dict()['state']])
        stop = poison(trainer, math.inf if step == 3 else 1.)
        trainer.train_step()
        stop()
        after = [trainer.model.context.state_dict(), trainer.opt.state_dict()['state']]
        same = all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after))) and bool(before[1])
        assert same == (step == 3)
    counts = trainer.tally.read()
    assert (counts.skipped, counts.bad, counts.first_bad) == (1, 1, 3) and math.isfinite(counts.loss)
    with pytest.raises(InputError, match='at step 3: that step was not made, and the last checkpoint in HERE'):
        trainer.check('HERE')
    with pytest.raises(InputError, match='at step 3: that step was not made; lower'): trainer.check(None)
    assert trainer.check('HERE', skip=True) == counts


def test_a_loss_that_is_no_number_is_a_bad_step_even_if_gradients_are_numbers():
    trainer = toy()
    trainer.train_step()
    before = copy.deepcopy(trainer.model.context.state_dict())
    trainer.step += 1
    for p in trainer.params: p.grad = torch.ones_like(p)
    trainer.update(torch.tensor(math.nan), trainer.schedule.at(2))
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.context.state_dict().items())
    assert trainer.tally.read().first_bad == 2


def test_a_real_overflow_is_noticed():
    trainer = toy()
    trainer.schedule = trainer.schedule._replace(lr=1e38, lr_start=1e38)
    def log(line): trainer.check('x')
    with pytest.raises(InputError, match='nan or infinite at step'): fit(trainer, log, 1, show=False)
    assert 1 < trainer.step < 20


@pytest.mark.parametrize('overflow', [(), (2,), (2, 3)])
def test_steps_that_overflow_16_bits_are_skipped_and_counted_but_not_bad(overflow):
    trainer, seen = toy(), []
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    real = trainer.scaler.step
    def spy(opt):
        grads = [p.grad / trainer.scaler.get_scale() for p in trainer.model.context.parameters()]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return real(opt)
    trainer.scaler.step = spy
    for step in (1, 2, 3):
        stop, before = poison(trainer, math.inf if step in overflow else 1.), trainer.model.context[0].weight.clone()
        trainer.train_step()
        stop()
        assert torch.equal(before, trainer.model.context[0].weight) == (step in overflow)
    counts = trainer.check('x')  # nothing to complain about
    good = [norm for step, norm in enumerate(seen, 1) if step not in overflow]
    assert (counts.skipped, counts.bad) == (len(overflow), 0)
    assert counts.norms == [pytest.approx(np.mean(good), rel=1e-4)] and math.isfinite(counts.loss)
    assert trainer.scaler.get_scale() == 1024 / 2 ** len(overflow)


def test_overflow_again_and_again_and_a_nan_loss_are_told_with_a_scaler_too():
    trainer = toy()
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=1.)
    stop = poison(trainer, math.inf)
    trainer.train_step()
    stop()
    with pytest.raises(InputError, match='overflowed 16 bits again and again before step 1: start anew with --amp off'):
        trainer.check('x')
    trainer = toy()
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    trainer.feed = SimpleNamespace(batches=lambda step: [(torch.full((2, 3, 8, 8), math.nan), torch.zeros(2, 4))])
    trainer.train_step()
    with pytest.raises(InputError, match='nan or infinite at step 1'): trainer.check('x')


# --- going on

def test_resume_is_exact_and_every_part_of_the_state_is_needed(figure):
    "20 steps straight are 7, a stop, and 13 more: weights, target, moments, losses, sums."
    straight, first = toy(), toy()
    losses, before = steps(straight, 20), steps(first, 7)
    state, gaps = copy.deepcopy(first.state_dict()), {}
    fresh = toy(seed=9).state_dict()
    def again(**changes):
        second = toy()
        second.load_state_dict(copy.deepcopy({**state, **changes}))
        return before + steps(second, 13), second.state_dict()
    found, end = again()
    assert found == losses and distance(end, straight.state_dict()) == 0.
    for part in ('model', 'optimizer', 'step'):
        changes = {part: fresh[part]} if part != 'step' else dict(step=6)
        gaps[part] = max(abs(a - b) for a, b in zip(again(**changes)[0], losses))
    with pytest.MonkeyPatch.context() as m:  # a random stream that were another one
        m.setattr(engine, 'stream', lambda *place: stream(*place, 'other'))
        gaps['dropout'] = max(abs(a - b) for a, b in zip(again()[0], losses))
    assert all(gaps.values()), gaps
    figure('01 a trainer: 20 steps straight = 7 + resume (weights, target, Adam, losses, sums)', 'max|Δ| = 0.0')
    figure('01 the same with one part left out (negative control)',
           'loss Δ: ' + ', '.join(f'{part} {gap:.0e}' for part, gap in gaps.items()))


def test_sums_go_on_in_the_middle_of_a_line():
    straight, first, second = toy(), toy(), toy()
    for _ in range(5): straight.train_step()
    for _ in range(3): first.train_step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2): second.train_step()
    assert second.tally.read() == straight.tally.read()
    second.tally.reset()
    assert second.tally.read() != straight.tally.read()  # the test can fail


def test_moments_take_the_layout_of_the_weights():
    first, second = toy(), toy()
    second.model.to(memory_format=torch.channels_last)
    steps(first, 2)
    second.load_state_dict(first.state_dict())
    weight = second.model.context[0].weight
    moments = second.opt.state[weight]['exp_avg']
    assert moments.stride() == weight.stride() and torch.equal(moments, first.opt.state[first.params[0]]['exp_avg'])


# --- the loop

def test_lines_come_every_so_many_steps_and_after_the_last():
    trainer, lines, counted = toy(total=8), [], []
    def log(line):
        lines.append(line)
        counted.append(trainer.tally.read().loss)
        trainer.tally.reset()
    assert fit(trainer, log, 3, show=False).name is None
    losses = steps(toy(total=8), 8)
    assert [line.steps for line in lines] == [3, 3, 2] and lines[-1].values == trainer.schedule.at(8)
    for mean, part in zip(counted, (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert mean == pytest.approx(sum(part) / len(part), rel=1e-6)


def test_until_and_the_steps_that_another_process_made():
    trainer, lines = toy(), []
    fit(trainer, lines.append, 5, show=False, until=7)
    assert trainer.step == 7 and [line.steps for line in lines] == [5, 2]
    fit(trainer, lines.append, 5, show=False, until=12)
    assert [line.steps for line in lines[2:]] == [5, 2] and [line.made for line in lines[2:]] == [.6, 1.]


def test_the_time_of_a_line_counts_in_the_next_one(monkeypatch):
    clock, seconds = [0.], []
    monkeypatch.setattr(engine, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    def log(line):
        seconds.append(line.seconds)
        clock[0] += 7.  # a k-NN, say
    fit(toy(), log, 1, show=False, until=4)
    assert seconds == [0., 7., 7., 7.]


def test_checkpoints_come_after_some_minutes_and_at_the_end(monkeypatch):
    clock, saved = [0.], []
    monkeypatch.setattr(engine, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    def log(line): clock[0] += 60.
    trainer = toy()
    fit(trainer, log, 1, lambda: saved.append(trainer.step), minutes=2.5, show=False, until=7)
    assert saved == [3, 6, 7]


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_ends_the_loop_after_the_step_and_it_goes_on_exactly(number, code, capfd):
    straight, kept = toy(), []
    fit(straight, lambda line: None, 5, show=False)
    trainer = toy(feed=Batches(act={7: lambda: signal.raise_signal(number)}))
    stop = fit(trainer, lambda line: None, 5, lambda: kept.append(copy.deepcopy(trainer.state_dict())), show=False)
    assert (stop.name, stop.code, trainer.step, kept[-1]['step']) == (number.name, code, 7, 7)
    assert 'saving a checkpoint' in capfd.readouterr().err
    second = toy()
    second.load_state_dict(kept[-1])
    fit(second, lambda line: None, 5, show=False)
    assert distance(second.state_dict(), straight.state_dict()) == 0.


def test_where_nothing_is_kept_an_interrupt_is_an_exception():
    trainer = toy(feed=Batches(act={2: lambda: signal.raise_signal(signal.SIGINT)}))
    with pytest.raises(KeyboardInterrupt): fit(trainer, lambda line: None, 5, show=False)


def test_the_callers_random_numbers_stay():
    trainer = toy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    trainer.train_step()
    assert not torch.equal(torch.rand(3), expected)  # a single step seeds
    for inside in (lambda: torch.manual_seed(1), lambda: fit(trainer, lambda line: None, 5, show=False, until=3)):
        torch.manual_seed(5)
        with own_randomness(CPU): inside()
        assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    fit(trainer, lambda line: None, 5, show=False, until=5)
    assert torch.equal(torch.rand(3), expected)


# --- how far it is

class Screen(io.StringIO):
    def isatty(self): return True


def shown(monkeypatch, stream, **settings):
    "What a training writes to stderr; a minute passes at step 13."
    monkeypatch.setattr(sys, 'stderr', stream)
    later = {13: lambda: monkeypatch.setattr(time, 'monotonic', lambda: began + 61)}
    began = time.monotonic()
    fit(toy(feed=Batches(act=later)), lambda line: f'lr {line.values.lr:.3f}', 5, **settings)
    return stream.getvalue()


def test_a_log_file_gets_plain_lines(monkeypatch):
    told = shown(monkeypatch, io.StringIO())
    assert '\r' not in told
    lines = told.splitlines()
    assert [line.split(',')[0] for line in lines] == ['step 5 of 20 (25%)', 'step 13 of 20 (65%)', 'step 20 of 20 (100%)']
    assert all('lr 0.0' in line for line in lines) and [line.endswith(' left') for line in lines] == [True, True, False]
    assert shown(monkeypatch, io.StringIO(), show=False) == ''


def test_a_terminal_gets_a_bar(monkeypatch):
    told = shown(monkeypatch, Screen())
    assert '\r' in told and '20/20' in told and 'lr 0.0' in told and 'step 20 of' not in told


def test_the_time_left_is_that_of_the_steps_made_here(monkeypatch):
    stream, now = io.StringIO(), [100.]
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    progress = engine.Progress(900, 1000)  # it goes on after 900 steps
    now[0] += 600
    progress.at(910, None)  # 10 steps took 10 minutes
    assert stream.getvalue() == 'step 910 of 1,000 (91%), about 1.5 hours left\n'


# --- another device

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16])
def test_a_run_begun_on_a_cpu_goes_on_on_a_gpu(dtype):
    first = toy()
    steps(first, 2)
    place = Place(torch.device('cuda'), dtype)
    on_gpu = SimpleNamespace(batches=lambda step: [[x.cuda() for x in b] for b in Batches().batches(step)])
    second = Trainer(Toy().cuda().train(), on_gpu, first.schedule, place)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steps(second, 1) == pytest.approx(steps(first, 1), rel=.3) and second.step == 3  # dropout draws otherwise
