"The schedules against the released code's numbers, and at their edges."
import json
import os
from pathlib import Path

import pytest
import torch

from scott.schedule import Schedule, Values, linear, make_optimizer, set_values, warmup_flat_cosine

PARITY = os.environ.get('SCOTT_PARITY', '')
needs_parity = pytest.mark.skipif(not (Path(PARITY) / 'paper_schedule.json').is_file(),
                                  reason=f'SCOTT_PARITY={PARITY!r} holds no paper_schedule.json')


def read(name):
    return json.loads((Path(PARITY) / name).read_text())


def gaps(schedule, recorded, steps):
    "Largest differences to the recorded values: of the learning rate (relative), decay and momentum (absolute)."
    mine = [schedule.at(step) for step in steps]
    assert len(mine) == len(recorded['lr']) == len(recorded['wd']) == len(recorded['ema'])
    return (max(abs(v.lr / lr - 1) for v, lr in zip(mine, recorded['lr'])),
            max(abs(v.wd - wd) for v, wd in zip(mine, recorded['wd'])),
            max(abs(v.momentum - m) for v, m in zip(mine, recorded['ema'])))


@needs_parity
def test_the_defaults_are_the_papers_run():
    paper = read('paper_schedule.json')
    assert len(paper['steps']) > 10 and paper['steps'][-1] == paper['total_steps']
    schedule = Schedule(paper['total_steps'], paper['warmup_steps'], lr=5e-4)
    assert max(gaps(schedule, paper, paper['steps'])) < 1e-9
    for wrong in (schedule._replace(flat=.73), schedule._replace(wd=.041), schedule._replace(momentum=.9961),
                  schedule._replace(lr_start=2e-6), schedule._replace(total=38_101), schedule._replace(warmup=5_081)):
        assert max(gaps(wrong, paper, paper['steps'])) > 1e-9  # each setting is compared


@needs_parity
@pytest.mark.parametrize('name', ['tiny_swiglu.json', 'tiny_mlp_registers.json'])
def test_tiny_schedules(name):
    recorded = read(name)
    o = recorded['optim']
    schedule = Schedule(o['total_steps'], o['lr_warmup_steps'], o['lr_peak'], o['lr_start'], o['lr_final'],
                        o['lr_flat_pctg'], o['wd_start'], o['wd_final'], o['ema_start'], o['ema_final'])
    assert max(gaps(schedule, recorded, range(1, len(recorded['lr']) + 1))) < 1e-9


def test_decay_is_for_matrices_and_kernels_that_are_trained():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    opt = make_optimizer(model)
    decayed, plain = (group['params'] for group in opt.param_groups)
    assert decayed == [model[0].weight] and plain == [model[0].bias, *model[1].parameters()]
    for p in decayed + plain: p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    set_values(opt, Values(lr=.5, wd=.1, momentum=0.))
    opt.step()
    factors = [.95] + [1.] * (len(before) - 1)  # without a gradient, a step is 1 - lr wd
    for p, old, factor in zip(model.parameters(), before, factors): torch.testing.assert_close(p.detach(), factor * old)


@pytest.mark.parametrize('total, warmup, flat', [(1, 0, 0.72), (2, 1, 0.72), (10, 0, 0.0), (10, 9, 1.0), (37, 5, 0.5)])
def test_shape_of_any_run(total, warmup, flat):
    values = [warmup_flat_cosine(k, total, warmup, 0.0, 1.0, 0.1, flat) for k in range(1, total + 1)]
    assert all(type(v) is float for v in values)
    assert all(a < b for a, b in zip(values[:warmup], values[1:warmup]))           # rises
    assert all(a >= b for a, b in zip(values[max(warmup - 1, 0):], values[max(warmup, 1):]))     # never again
    if warmup:
        assert values[warmup - 1] == 1.0
    plateau = int(flat * (total - warmup))
    assert values[warmup:warmup + plateau] == [1.0] * plateau
    if warmup + plateau < total:
        assert values[-1] == pytest.approx(0.1, abs=1e-15)


def test_a_schedule_is_a_function_of_the_step_alone():
    schedule = Schedule(20, 5, lr=1e-3)
    forward = [schedule.at(k) for k in range(1, 21)]
    assert [schedule.at(k) for k in range(20, 0, -1)] == forward[::-1]
    assert forward[-1] == Values(1e-5, .4, 1.)
    for step in (0, 21):
        with pytest.raises(ValueError, match='step must lie in'): schedule.at(step)


def test_ends_of_a_line():
    assert linear(1, 1, 3.0, 5.0) == 5.0
    assert linear(38100, 38100, 0.996, 1.0) == 1.0                                 # the target stands still
    assert linear(1, 10, 7.0, 7.0) == 7.0


@pytest.mark.parametrize('step', [0, -1, 11])
def test_step_outside_the_run(step):
    with pytest.raises(ValueError, match=rf'step must lie in \[1, total\] = \[1, 10\], got {step}'):
        linear(step, 10, 0.0, 1.0)
    with pytest.raises(ValueError, match=rf'\[1, 10\], got {step}'):
        warmup_flat_cosine(step, 10, 2, 0.0, 1.0, 0.0)


@pytest.mark.parametrize('warmup', [10, 11, -1])
def test_warmup_too_long(warmup):
    with pytest.raises(ValueError, match=f'warmup must lie in .* got {warmup}'):
        warmup_flat_cosine(1, 10, warmup, 0.0, 1.0, 0.0)


@pytest.mark.parametrize('flat', [-0.1, 1.1, 72])
def test_flat_is_a_share(flat):
    with pytest.raises(ValueError, match='flat is a share'):
        warmup_flat_cosine(1, 10, 2, 0.0, 1.0, 0.0, flat)
