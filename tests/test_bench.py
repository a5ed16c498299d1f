"""The benchmark: what its pieces compute, what it counts, what it writes; never how long anything takes."""
import json
from pathlib import Path

import pytest
import torch

from scott.lab import bench
from scott.lab.bench import RUNGS, Bench, Engine, Operations, config_of, drawn
from scott.lab.plain import PlainLoop
from scott.train.config import Config

RESULTS = Path(__file__).parents[1] / 'nbs' / 'results'
TOY = '--preset demo --embed-dim 16 --depth 1 --batch-size 4 --images 8 --steps 1 --device cpu'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def cfg():
    return config_of(Bench(preset='demo', embed_dim=24, depth=1, batch_size=4, device='cpu', amp='off'), predictor_depth=1)


def moves(loop, jepa):
    "What one step changes in all weights."
    before = torch.cat([p.detach().flatten() for p in jepa.parameters()]).clone()
    loop.train_step()
    return torch.cat([p.detach().flatten() for p in jepa.parameters()]) - before


@pytest.mark.parametrize('names', [['views', 'masks'], list(RUNGS)], ids=['data', 'all'])
def test_the_plain_loop_with_the_engines_pieces_makes_its_step(cfg, names):
    data = drawn(cfg, 8)
    loop, engine = PlainLoop(cfg, data), Engine(cfg, data)
    for name in names: RUNGS[name](loop, data)
    ours, theirs = moves(loop, loop.jepa), moves(engine, engine.trainer.model)
    assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize('name', ['types', 'blocks', 'layout', 'optimizer', 'average', 'reading'])
def test_a_piece_may_be_exchanged_alone(cfg, name):
    """Same data for both: a piece that computes changes nothing that is computed (16 bits apart, which are off here)."""
    data, found = drawn(cfg, 8), []
    for names in (['views', 'masks'], ['views', 'masks', name]):
        loop = PlainLoop(cfg, data)
        for each in names: RUNGS[each](loop, data)
        found.append(moves(loop, loop.jepa))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


def test_operations_are_counted_without_views():
    x = torch.ones(2, 3)
    with Operations() as operations: x.T.reshape(6)[1:].add(1).mul_(2)
    assert operations.count == 3  # the copy inside of reshape, add, mul_
    torch.add(x, x)
    assert operations.count == 3  # not after the block


def test_the_clock_takes_the_fastest_round_of_each():
    class Loop:
        device, waited, closed = torch.device('cpu'), 0., 0
        def __init__(self, seconds): self.seconds, self.steps = iter(seconds), 0
        def train_step(self): self.steps += 1
        def close(self): self.closed += 1
    loops = dict(a=Loop([]), b=Loop([]))
    times = bench.take_turns(loops, steps=3, rounds=2)
    assert times.keys() == loops.keys() and all(t['step_s'] >= 0 and t['data_wait'] == 0 for t in times.values())
    assert all(loop.steps == 2 * (2 + 3) and loop.closed == 2 for loop in loops.values())


def test_the_ladder_climbs_one_piece_at_a_time(monkeypatch):
    monkeypatch.setattr(bench, 'alone', lambda what, b, names: dict(step_s=1., names=list(names)))
    climbed = bench.climb(Bench(device='cpu'))
    assert [r['lever'] for r in climbed] == ['none', *(name for name in RUNGS if name != 'compile')]
    for before, here in zip(climbed, climbed[1:]): assert here['names'] == [*before['names'], here['lever']]


def test_the_sweep_changes_one_size_at_a_time(monkeypatch):
    monkeypatch.setattr(bench, 'alone', lambda what, b, **changes: dict(step_s=1., changes=changes))
    points = bench.grow(Bench(device='cpu'))
    assert all(p['changes'] == {p['varied']: p['value']} for p in points)
    assert {p['varied'] for p in points} == {'batch_size', 'img_size', 'depth'}


def test_figures_follow_from_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'product_rate', lambda device, dtype: 1e9)
    bench.main([*TOY.split(), '--json', str(tmp_path / 'bench.json')])
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert report.keys() == {'machine', 'config', 'gflop_per_image', 'product', 'baseline', 'engine', 'ratio'}
    for name in ('engine', 'baseline'):
        r = report[name]
        assert r['images_per_s'] == pytest.approx(4 / r['step_s']) and 0 <= r['data_wait'] < 1
        assert r['gflop_per_s'] == pytest.approx(report['gflop_per_image'] * r['images_per_s'])
        assert r['share_of_product'] == pytest.approx(r['gflop_per_s'] / report['product']['gflop_per_s'])
    assert report['ratio'] == pytest.approx(report['engine']['images_per_s'] / report['baseline']['images_per_s'])
    assert report['config']['embed_dim'] == 16 and report['machine']['hardware']
    assert f'{report["ratio"]:.2f}' in capsys.readouterr().out


@pytest.mark.slow
def test_a_ladder_of_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'RUNGS', dict(list(RUNGS.items())[:1]))
    monkeypatch.setattr(bench, 'product_rate', lambda device, dtype: 1e9)
    bench.main([*TOY.split(), '--ladder', '--json', str(tmp_path / 'bench.json')])
    report = json.loads((tmp_path / 'bench.json').read_text())
    assert [r['lever'] for r in report['ladder']] == ['none', 'views']
    assert all(r['step_s'] > 0 for r in report['ladder']) and '+ views' in capsys.readouterr().out


def test_the_host_is_measured_at_the_size_of_the_paper(tmp_path, capsys, monkeypatch):
    """Without flags; here with fewer calls. The order is that of an epoch, so a step's share of it is small."""
    assert config_of(Bench(host=True)).batch_size == Config.of('paper').batch_size == 64
    threads = torch.get_num_threads()
    bench.main([*TOY.split(), '--host', '--json', str(tmp_path / 'host.json')])
    report = json.loads((tmp_path / 'host.json').read_text())
    assert report.keys() == {'machine', 'config', 'host'} and report['host'].keys() == {
        'batch_size', 'img_size', 'ms', 'views_operations'}
    assert report['host']['ms'].keys() == {'masks', 'draws', 'order'} and min(report['host']['ms'].values()) > 0
    assert torch.get_num_threads() == threads and 'operations a batch' in capsys.readouterr().out


def test_views_of_a_batch_take_few_operations():
    """As many for 2 images as for 64: whole batches are changed at once."""
    few, many = (bench.host(Bench(preset='demo', batch_size=n, device='cpu'))['views_operations'] for n in (2, 64))
    assert few <= many <= 120


@pytest.mark.parametrize('file', sorted(p.name for p in RESULTS.glob('bench*.json')))
def test_stored_figures_are_shown(file):
    report = json.loads((RESULTS / file).read_text())
    text = bench.table(report)
    assert report['machine']['hardware'] in text
    if 'host' not in report: assert f'= {report["ratio"]:.2f};' in text
    for r in report.get('ladder', []): assert f'+ {r["lever"]} ' in text


@pytest.mark.parametrize('wrong, words', [
    ('--preset huge', ['huge', 'paper']), ('--images 0', ['--images']), ('--steps 0', ['--steps']),
    ('--json nowhere/bench.json', ['nowhere', '--json']), ('--img-size 100', ['100', '96']),
    ('--device cuda:99', ['cuda:99']), ('--sed 1', ['--sed'])])
def test_a_benchmark_that_cannot_be(capsys, wrong, words):
    with pytest.raises(SystemExit) as end: bench.main(wrong.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.splitlines()) == 1 and all(word in said for word in words)
