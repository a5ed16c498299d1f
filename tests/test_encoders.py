"""Finished encoders: in an installation, by name, as good as their cards claim, and made of whole runs."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scott
from scott.cli import InputError
from scott.data.petals import petals
from scott.encoder import FILES, PUBLISHED, Encoder
from scott.lab import publish as module
from scott.lab.publish import LICENSES, check_finished, command, main, publish, unpack, write_encoder
from scott.lab.reproduction import cell
from scott.probe.classifiers import logistic, scores
from scott.probe.features import pictures_key
from scott.train.config import Config, build, identity
from scott.train.files import write_checkpoint
from scott.train.run import Run, save_encoder
from scott.train.signs import knn

ROOT = Path(__file__).resolve().parent.parent
TOY = dict(embed_dim=32, depth=1, predictor_depth=1, epochs=6, device='cpu')
names = pytest.mark.parametrize('name', sorted(PUBLISHED))


def finished(folder, step=60, made=60, data='petals', encoders=('random initialization', 'context', 'target'), **changes):
    """A run folder with every file that publishing reads; 6 epochs of 10 steps are planned."""
    folder.mkdir()
    cfg = Config.of('demo', **{**TOY, 'data': data, **changes})
    facts = dict(images=160, contains_test_images=True, machine=dict(hardware='a machine', device='cpu'),
                 pictures='0' * 16, out=str(folder))
    (folder / 'config.json').write_text(json.dumps({**vars(cfg), **facts}))
    (folder / 'pictures.txt').write_text(160 * ('0' * 16 + '\n'))
    (folder / 'metrics.jsonl').write_text(json.dumps(dict(step=step, epoch=step / 10, images_per_s=.05)) + '\n')
    rows = [dict(probe='knn', encoder=e, top1=12.5, top1_std=.5, top1_interval=[10., 15.]) for e in encoders]
    table = dict(data=data, rows=rows, test_images=800, classes=20, step=made, how_split='official', config={},
                 flags=dict(seeds=3, run=str(folder)))
    (folder / f'probe_{data.partition(":")[0]}.json').write_text(json.dumps(table))
    jepa = build(cfg)
    with torch.no_grad():
        for part in (jepa.context, jepa.target): part.mask_token.add_(torch.rand(1))
    write_checkpoint(folder, dict(step=step, identity=identity(cfg), model=jepa.state_dict()))
    for which in ('context', 'target'): save_encoder(getattr(jepa, which), folder / which, step)
    return Run(folder)


# Those of the package

def test_there_is_one():
    assert 'petals-demo' in PUBLISHED


@names
def test_a_folder_is_whole_and_small(name):
    folder = Path(PUBLISHED[name])
    assert {*FILES, 'README.md', 'run.json'} <= {p.name for p in folder.iterdir()}
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 8_000_000
    assert {w.dtype for file in folder.glob('*.safetensors') for w in load_file(file).values()} == {torch.float16}


@names
def test_it_loads_by_its_name(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()  # a folder of the same name does not hide it
    monkeypatch.chdir(tmp_path)
    encoder = Encoder.from_pretrained(name)
    assert not encoder.training and {p.dtype for p in encoder.parameters()} == {torch.float32}
    side = encoder.grid.rows * encoder.patch_size
    found = encoder.features(petals(n=2, size=side)[0])
    assert found.isfinite().all() and not torch.equal(found[0], found[1])


@names
def test_its_card_says_all(name):
    folder = Path(PUBLISHED[name])
    text, stored = (folder / 'README.md').read_text(), json.loads((folder / 'run.json').read_text())
    for word in (f"from_pretrained('{name}')", f'scott_pretrain --preset {stored["preset"]}', ' hours on ', 'epoch ',
                 stored['data'], LICENSES[stored['data']], f'{stored["images"]:,} images', '| random initialization |'):
        assert word in text, word
    assert not [word for file in folder.glob('*.json') for word in ('/root/', '/home/', '/tmp/') if word in file.read_text()]


def table_of(name):
    """The data set of a finished encoder, and its table."""
    folder = Path(PUBLISHED[name])
    data = json.loads((folder / 'run.json').read_text())['data']
    return data, json.loads((folder / f'probe_{data}.json').read_text())


@names
def test_its_card_has_the_rows_of_its_table(name):
    shown = [line for line in Path(PUBLISHED[name], 'README.md').read_text().splitlines() if line[:2] == '| '][1:]
    rows = table_of(name)[1]['rows']
    assert sorted(shown) == sorted(f"| {r['probe']} | {r['encoder']} | {cell(r)} |" for r in rows) and rows


def test_the_table_that_is_stored_twice_is_the_same():
    ours = json.loads((ROOT / 'nbs/results/petals-demo-100/probe_petals.json').read_text())
    data, table = table_of('petals-demo')
    assert data == ours['data'] and all(table[k] == ours[k] for k in ('rows', 'step', 'pictures', 'test_images'))


def test_the_readme_has_the_rows_of_its_run():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    shown = {tuple(words.strip() for words in line.split('|')[2:5]) for line in text.splitlines() if ' ± ' in line}
    table = json.loads((ROOT / 'nbs/results/flowers102-small/probe_flowers102.json').read_text())
    rows = {(r['probe'], r['encoder']): f"{r['top1']:.1f} ± {r['top1_std'] or 0:.1f}" for r in table['rows']}
    for probe in ('knn', 'linear', 'simple', 'multihead', 'cross'):
        assert tuple(rows[probe, which] for which in ('random initialization', 'context', 'target')) in shown, probe


@pytest.mark.slow
@names
def test_its_weights_give_the_numbers_of_its_card(name):
    data, table = table_of(name)
    train, test = (scott.load(data, part, size=table['img_size'], fit='center') for part in ('train', 'test'))
    assert pictures_key(train, test) == table['pictures'], f'{data} has other pictures than the table was made with'
    encoder = Encoder.from_pretrained(name)
    x, queries, classes = encoder.features(train.images), encoder.features(test.images), table['classes']
    found = {r['probe']: r['seeds'][0] for r in table['rows'] if r['encoder'] == 'context'}
    near, line = found['knn'], found['linear']
    votes = knn(x, train.labels, near['k'], classes, near['temperature'])(queries)
    logits = logistic(x, train.labels, line['c'], classes)(queries)
    for claimed, made in ((near, votes), (line, logits)):
        assert abs(scores(made, test.labels)['top1'] - claimed['top1']) < 1.5  # of 100; a dozen of 800 images


@names
def test_its_table_beats_the_random_row(name):
    rows = table_of(name)[1]['rows']
    best = {r['encoder']: r for r in rows if r['probe'] == 'linear'}
    assert best['context']['top1_interval'][0] > best['random initialization']['top1_interval'][1]


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match='petals-demo'): Encoder.from_pretrained('no-such-encoder')


def test_an_installation_has_them(tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, 'build_py', '--build-lib',
                    tmp_path], cwd=ROOT, check=True, capture_output=True)
    here, there = ({p.relative_to(top) for p in top.glob('encoders/*/*')} for top in (ROOT/'scott', tmp_path/'scott'))
    assert here == there and len(here) >= 4
    load = f'import scott, scott.encoder as e; assert e.__file__.startswith({str(tmp_path)!r}); '
    load += 'print(scott.Encoder.from_pretrained("petals-demo").depth)'
    subprocess.run([sys.executable, '-c', load], cwd=tmp_path, check=True, capture_output=True)


# Those to come

def test_what_is_written_comes_back(tmp_path):
    run = finished(tmp_path / 'run')
    there = publish(run, 'mine', tmp_path / 'encoders')
    encoder, own = Encoder.from_pretrained(there), run.encoder('context')
    assert all(torch.equal(w, own.state_dict()[k].half().float()) for k, w in encoder.state_dict().items())
    images = petals(n=4, size=64)[0]
    assert (encoder.features(images) - own.features(images)).abs().max() < .01
    text = (there / 'README.md').read_text()
    assert 'epoch 6 of 6, step 60' in text and '5.3 hours on a machine' in text  # 60 steps of 16 images at 0.05 a second
    assert '| knn | random initialization | 12.5 ± 0.5 (10.0–15.0) |' in text
    assert str(tmp_path) not in ''.join(p.read_text() for p in there.iterdir() if p.suffix != '.safetensors')


def test_a_run_folder_again(tmp_path):
    run = finished(tmp_path / 'run')
    publish(run, 'mine', tmp_path / 'encoders')
    back = unpack(str(tmp_path / 'encoders/mine'), tmp_path / 'back')
    assert back.step == 60 and back.table()['rows'] == run.table()['rows']
    own = run.jepa().state_dict()
    assert all(torch.equal(w, own[k].half().float()) for k, w in back.jepa().state_dict().items())
    for which in ('context', 'target'):
        a, b = back.encoder(which).state_dict(), getattr(back.jepa(), which).state_dict()
        assert all(torch.equal(w, b[k]) for k, w in a.items())
    a, b = back.encoder('random').state_dict(), run.encoder('random').state_dict()
    assert all(torch.equal(w, b[k]) for k, w in a.items())


@pytest.mark.parametrize('how, says', [
    (dict(step=50), 'step 50 of 60'), (dict(made=40), 'k-NN rows of step 60'),
    (dict(encoders=('context', 'target')), 'k-NN rows'), (dict(data='imagenet100'), 'learned from imagenet100')])
def test_what_is_refused(tmp_path, how, says):
    run = finished(tmp_path / 'run', **how)
    with pytest.raises(InputError, match=says): publish(run, 'mine', tmp_path / 'encoders')
    assert not (tmp_path / 'encoders').exists()


@pytest.mark.parametrize('name', ['', '.', '..', '../mine', 'a/b', '-rf', '.hidden', 'Mine', 'mine\n', 'ABSOLUTE'])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    encoders = tmp_path / 'package/encoders'
    (encoders / 'other').mkdir(parents=True)
    for folder in (encoders, encoders / 'other', tmp_path / 'package'): (folder / 'note.txt').write_text('mine')
    before = sorted(tmp_path.rglob('*'))
    run = finished(tmp_path / 'run')
    name = str(tmp_path / 'package') if name == 'ABSOLUTE' else name
    with pytest.raises(InputError, match='no name for an encoder'): publish(run, name, encoders)
    assert set(before) == {p for p in tmp_path.rglob('*') if tmp_path / 'run' not in (p, *p.parents)}


def test_a_folder_that_holds_no_encoder_is_left_alone(tmp_path):
    run, other = finished(tmp_path / 'run'), tmp_path / 'photos'
    other.mkdir()
    (other / 'a.jpg').write_bytes(b'a picture')
    with pytest.raises(InputError, match='is no finished encoder'): publish(run, 'photos', tmp_path)
    assert [p.name for p in other.iterdir()] == ['a.jpg']


@pytest.mark.parametrize('error', [ValueError('no such row'), OSError('the disk is full'), KeyboardInterrupt()],
                         ids=['bug', 'disk', 'ctrl-c'])
def test_a_failure_leaves_the_encoder_that_was_there(tmp_path, monkeypatch, error):
    run, encoders = finished(tmp_path / 'run'), tmp_path / 'encoders'
    there = publish(run, 'mine', encoders)
    before = {p.name: p.read_bytes() for p in there.iterdir()}

    def fails(*_): raise error
    monkeypatch.setattr(module, 'card', fails)
    for name in ('mine', 'new'):
        with pytest.raises((type(error), InputError)): publish(run, name, encoders)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before
    assert [p.name for p in encoders.iterdir()] == ['mine']


def test_what_a_killed_process_left_is_not_published(tmp_path):
    run, encoders = finished(tmp_path / 'run'), tmp_path / 'encoders'
    (encoders / '.mine.part').mkdir(parents=True)
    (encoders / '.mine.part/old.safetensors').write_bytes(b'half')
    there = publish(run, 'mine', encoders)
    assert not (there / 'old.safetensors').exists() and [p.name for p in encoders.iterdir()] == ['mine']


def test_a_run_folder_is_not_overwritten(tmp_path):
    there = publish(finished(tmp_path / 'run'), 'mine', tmp_path / 'encoders')
    other = finished(tmp_path / 'other', seed=3)
    before = {p: p.read_bytes() for p in other.folder.rglob('*') if p.is_file()}
    with pytest.raises(InputError, match='exists'): unpack(str(there), other.folder)
    assert before == {p: p.read_bytes() for p in other.folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('name', ['nope', 'no/such', 'OWNER/name', 'RUN'])
def test_what_is_no_finished_encoder_is_not_unpacked(tmp_path, name):
    if name == 'RUN': name = str(finished(tmp_path / 'run').folder)
    with pytest.raises(InputError, match='no finished encoder|run folder|no such folder') as refused:
        unpack(name, tmp_path / 'back')
    assert '\n' not in str(refused.value) and not (tmp_path / 'back').exists()


def test_a_run_without_a_table(tmp_path, capsys, monkeypatch):
    run = finished(tmp_path / 'run')
    check_finished(run)
    (run.folder / 'probe_petals.json').unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end: main([str(run.folder), 'mine'])
    err = capsys.readouterr().err.strip()
    assert end.value.code == 2 and 'has no table' in err and '\n' not in err and not (tmp_path / 'scott').exists()


def test_what_is_too_large(tmp_path, monkeypatch):
    run = finished(tmp_path / 'run')
    whole = sum(2 * w.numel() for w in run.jepa().state_dict().values())
    monkeypatch.setattr(module, 'LIMIT', whole - 1)
    write_encoder(run, tmp_path / 'mine', 'mine')
    assert not (tmp_path / 'mine/rest.safetensors').exists() and Encoder.from_pretrained(tmp_path / 'mine').depth == 1
    with pytest.raises(InputError, match='no predictor'): unpack(str(tmp_path / 'mine'), tmp_path / 'back')
    monkeypatch.setattr(module, 'LIMIT', 1000)
    with pytest.raises(InputError, match='1,000 are the most'):
        write_encoder(run, tmp_path / 'other', 'other')
    assert not (tmp_path / 'other').exists()


def test_a_command_names_what_differs():
    assert command(Config.of('demo')) == 'scott_pretrain --preset demo'
    assert command(Config.of('demo', out='x', seed=3, epochs=9)) == 'scott_pretrain --preset demo --epochs 9 --seed 3'
