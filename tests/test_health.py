"Healthy toy runs raise no alarm, sick ones do, each by its own sign."
import pytest
import torch

from scott.lab.sick import first_alarm, toy_run

SIGNS = {'no EMA': ('copied', 'distance', 2), 'no predictor': ('untrained', 'grad_predictor', 2),
         'learning rate x 30': ('runaway', 'distance', 2), 'nothing hidden': ('trivial', 'loss', 8)}  # word, curve, epochs
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_a_healthy_run_raises_no_alarm(tmp_path, seed):
    metrics = toy_run('healthy', tmp_path/'run', seed)
    assert metrics[-1]['step'] == 240 and first_alarm(metrics) is None


@pytest.mark.slow
@pytest.mark.parametrize('defect, word', [('healthy, sparse', None), ('weak EMA, sparse', 'collapsed')])
def test_with_the_sparse_tokenizer_a_weak_average_collapses(tmp_path, defect, word):
    metrics = toy_run(defect, tmp_path/'run', epochs=8)
    alarm = first_alarm(metrics)
    assert (alarm and alarm['word']) == word
    if word: assert max(m['rankme'] for m in metrics[-5:]) < 3


@pytest.mark.slow
@pytest.mark.parametrize('defect', SIGNS)
@pytest.mark.parametrize('seed', range(5))
def test_a_sick_run_is_named_by_its_sign(tmp_path, defect, seed, figure):
    word, curve, epochs = SIGNS[defect]
    alarm = first_alarm(toy_run(defect, tmp_path/'run', seed, epochs=epochs))
    assert alarm['word'] == word and curve in alarm['curves']
    if not seed: figure(f'08 a sick run: {defect}', f'{word} at step {alarm["step"]}')
