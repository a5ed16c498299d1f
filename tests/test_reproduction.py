"""The command behind the page of results, at toy size; and what the page makes of a stored run."""
import json
import re
from pathlib import Path

import pytest
from conftest import write_images

from scott.cli import InputError, parser_of
from scott.lab import reproduction
from scott.train.config import Config
from scott.train.run import Run

RESULTS = Path(__file__).parents[1] / 'nbs' / 'results'
TOY = ('--preset demo --epochs 2 --warmup-epochs 0 --embed-dim 32 --depth 3 --predictor-depth 1 --img-size 48 '
       '--batch-size 10 --log-every 2 --checkpoint-minutes 0')


def test_one_command_asks_for_every_probe(tmp_path, monkeypatch):
    "Pre-training once, or going on where a checkpoint is; then the tables, the curve and the copies."
    calls, run = [], tmp_path / 'runs' / 'flowers102-small'
    def pretrained(argv):
        calls.append(argv)
        run.mkdir(parents=True, exist_ok=True)
        (run / 'config.json').write_text(json.dumps(dict(data='flowers102', depth=7)))
        (run / 'checkpoint.pt').touch()
    monkeypatch.setattr(reproduction.pretrain, 'main', pretrained)
    monkeypatch.setattr(reproduction.table, 'main', calls.append)
    monkeypatch.setattr(reproduction, 'learning_curve', lambda run: [dict(step=0, knn=1.)])
    for _ in range(2): reproduction.reproduce('flowers102-small', tmp_path / 'runs', tmp_path / 'results')
    first, again = calls[:len(calls) // 2], calls[len(calls) // 2:]
    assert first[0][:4] == ['--preset', 'small', '--data', 'flowers102'] and again[0] == ['--out', str(run), '--resume']
    assert first[1:] == again[1:] and all(call[0] == str(run) for call in first[1:])
    assert [call[call.index('--block') + 1] for call in first if '--block' in call] == ['1', '3', '5']
    assert sum('--protocol' in call for call in first) == sum('--no-norm' in call for call in first) == 1
    assert {p.name for p in (tmp_path / 'results' / 'flowers102-small').iterdir()} == {'config.json', 'learning_curve.json'}


@pytest.mark.slow
def test_one_command_makes_a_stored_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / 'cache'))
    data = write_images(tmp_path / 'flowers', 60)
    monkeypatch.setattr(reproduction, 'RUNS', dict(toy=f'{TOY} --data folder:{data}'))
    monkeypatch.setattr(reproduction, 'PROBES', 'knn,linear')
    runs, results = tmp_path / 'runs', tmp_path / 'results'
    reproduction.reproduce('toy', runs, results)
    stored = {re.sub('-[0-9a-f]{6}', '-HASH', p.name) for p in (results / 'toy').iterdir()}
    assert stored == {'config.json', 'metrics.jsonl', 'learning_curve.json', 'probe_flowers-HASH.json',
                      'probe_flowers-HASH_paper.json', 'probe_flowers-HASH_block1.json', 'probe_flowers-HASH_raw.json'}
    path, = (results / 'toy').glob('probe_flowers-??????.json')
    table = json.loads(path.read_text())
    assert {r['probe'] for r in table['rows']} == {'knn', 'linear', 'supervised', 'finetune'} and not table['missing']
    curve = json.loads((results / 'toy' / 'learning_curve.json').read_text())
    steps = [c['step'] for c in curve]
    assert steps[0] == 0 and steps[-1] == table['step'] == 12 and len(steps) == len(set(steps)) > 3
    reproduction.reproduce('toy', runs, results)  # everything is there: it only probes again
    assert json.loads(path.read_text())['rows'][0] == table['rows'][0]


def test_an_unknown_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="'flowers' is unknown: choose one of flowers102-small"):
        reproduction.reproduce('flowers', tmp_path, tmp_path)


@pytest.mark.parametrize('name', [name for name in reproduction.RUNS if (RESULTS / name).is_dir()])
def test_a_stored_run_is_what_its_name_says(name):
    "The stored configuration is that of the command, and the last table is of the last step."
    config = Run(RESULTS / name).config
    asked = Config.of(**vars(parser_of(Config, 'scott_pretrain').parse_args(reproduction.RUNS[name].split())))
    for key in ('ssl_split', 'img_size', 'embed_dim', 'depth', 'epochs', 'batch_size', 'lr', 'warmup_epochs', 'seed',
                'tokenizer', 'mask', 'mask_ratio', 'predictor_depth', 'momentum', 'momentum_final'):
        assert getattr(config, key) == getattr(asked, key), key
    assert config.data.partition(':')[0] == asked.data.partition(':')[0]  # a folder may lie elsewhere
    table = reproduction.reports(name)[-1]
    assert table['step'] == Run(RESULTS / name).metrics[-1]['step'] and table['epoch'] == asked.epochs
    assert {r['encoder'] for r in table['rows']} >= {'raw pixels', 'random initialization', 'context', 'target'}


def test_reports_are_the_usual_tables_of_a_run_by_step(tmp_path, monkeypatch):
    "By our protocol, of the last block, on the run's own data; older files lack some flags."
    monkeypatch.setattr(reproduction, 'results', lambda name: tmp_path)
    def put(file, step, data='flowers102', **flags):
        report = dict(step=step, data=data, config=dict(data='flowers102'), flags=flags, rows=[])
        (tmp_path / file).write_text(json.dumps(report))
    put('table.json', 30, protocol='honest', block=-1, norm=True)
    put('probe_flowers102.json', 30, protocol='honest', block=-1, norm=True)
    put('probe_step20.json', 20)
    put('probe_flowers102_paper.json', 30, protocol='paper', block=-1, norm=True)
    put('probe_flowers102_block1.json', 31, protocol='honest', block=1, norm=True)
    put('probe_flowers102_raw.json', 32, protocol='honest', block=-1, norm=False)
    put('probe_pets37.json', 33, data='pets37', protocol='honest', block=-1, norm=True)
    put('config.json', 34)
    assert [r['step'] for r in reproduction.reports('any')] == [20, 30]


@pytest.mark.parametrize('words, says', [([], 'NAME'), (['flowers', '--fast'], '--fast'), (['flowers'], 'choose one of')])
def test_the_command_says_what_is_wrong(words, says, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['reproduction', *words])
    with pytest.raises(SystemExit) as end: reproduction.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and len(err.splitlines()) == 1


def test_stored_results_name_no_folder_of_a_machine():
    files = [p for p in RESULTS.rglob('*') if p.suffix in ('.json', '.jsonl')]
    assert len(files) > 10
    for path in files: assert not re.search(r'["= ](/|~/|[A-Z]:)[A-Za-z]', path.read_text()), path


def test_nothing_stored_is_no_report():
    assert reproduction.reports('nobody-ran-this') == []


def test_hours_are_steps_times_images_over_throughput():
    metrics = [dict(step=10, images_per_s=32.), dict(step=30, images_per_s=64.)]
    assert reproduction.hours(metrics, 32) == pytest.approx((10 + 10) / 3600)


def test_a_stored_result_is_found_in_a_checkout_and_in_an_installation(tmp_path, monkeypatch):
    assert reproduction.results('published.json') == RESULTS / 'published.json'
    assert Run(reproduction.results('flowers102-small')).config.depth == 7
    with pytest.raises(FileNotFoundError, match="no stored result 'nothing.json': there are bench_cpu.json, .*published.json"):
        reproduction.results('nothing.json')
    monkeypatch.setattr(reproduction, 'files', lambda name: tmp_path / 'site-packages' / name)
    kept = tmp_path / 'site-packages' / 'scott' / 'results'
    kept.mkdir(parents=True)
    (kept / 'published.json').touch()
    assert reproduction.results('published.json') == kept / 'published.json'
    (kept / 'published.json').unlink()
    with pytest.raises(FileNotFoundError, match='there are none'): reproduction.results('published.json')
