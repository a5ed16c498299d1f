"""Finished encoders: they lie in an installation, load by name, are what their cards claim, and are made of whole runs."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scott.cli import InputError
from scott.data.petals import petals
from scott.encoder import FILES, PUBLISHED, Encoder
from scott.lab import publish as module
from scott.lab.publish import LICENSES, check_finished, command, main, publish, unpack, write_encoder
from scott.train.config import Config, build, identity
from scott.train.files import write_checkpoint
from scott.train.run import Run, save_encoder

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


@names
def test_its_table_beats_the_random_row(name):
    folder = Path(PUBLISHED[name])
    data = json.loads((folder / 'run.json').read_text())['data']
    rows = json.loads((folder / f'probe_{data}.json').read_text())['rows']
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
    write_encoder(run, tmp_path / 'mine')
    assert not (tmp_path / 'mine/rest.safetensors').exists() and Encoder.from_pretrained(tmp_path / 'mine').depth == 1
    with pytest.raises(InputError, match='no predictor'): unpack(str(tmp_path / 'mine'), tmp_path / 'back')
    monkeypatch.setattr(module, 'LIMIT', 1000)
    with pytest.raises(InputError, match='1,000 are the most'): write_encoder(run, tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_a_command_names_what_differs():
    assert command(Config.of('demo')) == 'scott_pretrain --preset demo'
    assert command(Config.of('demo', out='x', seed=3, epochs=9)) == 'scott_pretrain --preset demo --epochs 9 --seed 3'
