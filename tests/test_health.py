"Healthy toy runs raise no alarm, sick ones do, each by its own sign."
import pytest
import torch

from scott.jepa import MIMJEPA
from scott.lab.sick import TOY, NoPredictor, NothingHidden, first_alarm, toy_run
from scott.train.config import Config, build

SIGNS = {'no EMA': ('copied', 'distance', 2), 'no predictor': ('untrained', 'grad_predictor', 2),
         'learning rate x 30': ('runaway', 'distance', 2), 'nothing hidden': ('trivial', 'loss', 8)}  # word, curve, epochs
pytestmark = pytest.mark.usefixtures('one_thread')


def test_an_alarm_is_of_the_first_line_that_is_alarming():
    """A distance of 0 in one line is no alarm yet, and it stays the first alarm when the run goes on."""
    well = dict(loss=.3, feature_std=.8, rankme=20., cosine=.1, distance=.1, grad_tokenizer=.1, grad_encoder=.1,
                grad_predictor=.1, lr=1e-3, skipped=0)
    metrics = [dict(well, step=step, epoch=step / 30, distance=0. if step > 20 else .1) for step in range(10, 80, 10)]
    assert first_alarm([]) is None and first_alarm(metrics[:2]) is None
    alarm = first_alarm(metrics)
    assert (alarm.step, alarm.word) == (40, 'copied') and 'distance' in alarm.curves and alarm.text.startswith('copied')
    assert first_alarm(metrics[:4]).step == 40 and first_alarm(metrics[:3]) is None


def test_defects_of_the_method():
    """Without its predictor it gets no gradient; with nothing hidden the loss depends on the hidden patches."""
    jepa = build(Config.of('demo', **TOY)).eval()
    views = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(16).repeat(2, 1) < 8  # the upper half
    other = views.clone()
    other[:, :, 32:] = 0.
    for method, trains, depends in ((MIMJEPA, True, False), (NoPredictor, False, False), (NothingHidden, True, True)):
        sick = method(jepa.context, jepa.predictor).eval()
        sick.zero_grad(set_to_none=True)
        loss = sick(views, views, keep)
        loss.backward()
        assert any(p.grad is not None for p in sick.predictor.parameters()) == trains
        assert (sick(other, views, keep) != loss).item() == depends


def test_a_defect_is_found_in_a_run(tmp_path):
    metrics = toy_run('no EMA', tmp_path / 'run', epochs=2)
    assert [m['step'] for m in metrics] == list(range(10, 61, 10))
    assert first_alarm(metrics).word == 'copied' and all(m['distance'] == 0 for m in metrics)
    assert (tmp_path / 'run' / 'checkpoint.pt').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_a_healthy_run_raises_no_alarm(tmp_path, seed):
    metrics = toy_run('healthy', tmp_path / 'run', seed, epochs=8)
    assert metrics[-1]['step'] == 240 and first_alarm(metrics) is None


@pytest.mark.slow
@pytest.mark.parametrize('defect, word', [('healthy, sparse', None), ('weak EMA, sparse', 'collapsed')])
def test_with_the_sparse_tokenizer_a_weak_average_collapses(tmp_path, defect, word):
    metrics = toy_run(defect, tmp_path / 'run', epochs=8)
    alarm = first_alarm(metrics)
    assert (alarm and alarm.word) == word
    if word: assert max(m['rankme'] for m in metrics[-5:]) < 3


@pytest.mark.slow
@pytest.mark.parametrize('defect', SIGNS)
@pytest.mark.parametrize('seed', range(5))
def test_a_sick_run_is_named_by_its_sign(tmp_path, defect, seed, figure):
    word, curve, epochs = SIGNS[defect]
    alarm = first_alarm(toy_run(defect, tmp_path / 'run', seed, epochs=epochs))
    assert alarm.word == word and curve in alarm.curves
    if not seed: figure(f'08 a sick run: {defect}', f'{word} at step {alarm.step}')
