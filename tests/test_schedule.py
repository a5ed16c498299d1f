"The schedules against the released code's numbers, and at their edges."
import json
import os
from pathlib import Path

import pytest

from scott.schedule import linear, warmup_flat_cosine

PARITY = os.environ.get('SCOTT_PARITY', '')
needs_parity = pytest.mark.skipif(not (Path(PARITY) / 'paper_schedule.json').is_file(),
                                  reason=f'SCOTT_PARITY={PARITY!r} holds no paper_schedule.json')


def read(name):
    return json.loads((Path(PARITY) / name).read_text())


@needs_parity
def test_paper_schedule():
    paper = read('paper_schedule.json')
    total, warmup = paper['total_steps'], paper['warmup_steps']
    assert len(paper['steps']) == len(paper['lr']) == len(paper['wd']) == len(paper['ema']) > 10
    for step, lr, wd, ema in zip(paper['steps'], paper['lr'], paper['wd'], paper['ema']):
        assert warmup_flat_cosine(step, total, warmup, 1e-6, 5e-4, 1e-5) == pytest.approx(lr, abs=0, rel=1e-9)
        assert linear(step, total, 0.04, 0.4) == pytest.approx(wd, abs=1e-9, rel=0)
        assert linear(step, total, 0.996, 1.0) == pytest.approx(ema, abs=1e-9, rel=0)


@needs_parity
@pytest.mark.parametrize('name', ['tiny_swiglu.json', 'tiny_mlp_registers.json'])
def test_tiny_schedules(name):
    recorded = read(name)
    o = recorded['optim']
    total = o['total_steps']
    for k, (lr, wd, ema) in enumerate(zip(recorded['lr'], recorded['wd'], recorded['ema']), start=1):
        mine = warmup_flat_cosine(k, total, o['lr_warmup_steps'], o['lr_start'], o['lr_peak'], o['lr_final'],
                                  flat=o['lr_flat_pctg'])
        assert mine == pytest.approx(lr, abs=1e-9, rel=0)
        assert linear(k, total, o['wd_start'], o['wd_final']) == pytest.approx(wd, abs=1e-9, rel=0)
        assert linear(k, total, o['ema_start'], o['ema_final']) == pytest.approx(ema, abs=1e-9, rel=0)


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
