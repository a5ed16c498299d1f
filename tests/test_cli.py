"""Wrong use of the commands: exit code 2, one line that names the thing and the way out, and nothing written over."""
import ast
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = dict(scott_pretrain='scott.train.pretrain', scott_probe='scott.probe.table',
                scott_visualize='scott.look.gallery', scott_bench='scott.lab.bench')
TINY = ('--preset demo --img-size 32 --embed-dim 16 --depth 1 --predictor-depth 1 --batch-size 8 --epochs 1 '
        '--warmup-epochs 0 --device cpu --amp off --mask uniform').split()




def run(command, *argv):
    "The command, in this process."
    importlib.import_module(COMMANDS[command]).main([str(word) for word in argv])


def pictures(folder, n=8):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else 'folder'
            for p in Path(folder).rglob('*')}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder of pictures and a finished run of one step; decoded caches go elsewhere."
    place = tmp_path_factory.mktemp('cli')
    pictures(place / 'images')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SCOTT_CACHE', str(tmp_path_factory.mktemp('cache')))
        run('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', place / 'run')
        yield place


@pytest.fixture
def refused(place, tmp_path, capsys):
    "Check that a command refuses: the line it says is returned."
    def check(command, *argv):
        before = contents(place), contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end: run(command, *argv)
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert err.endswith('\n') and len(err.splitlines()) == 1 and 'Traceback' not in err, err
        assert err.startswith(f'{command}: ') and len(err) > len(command) + 20
        assert 'done' not in out
        assert (contents(place), contents(tmp_path)) == before
        return err
    return check


def copy_of(run, to):
    "A run folder, to be damaged."
    for file in run.rglob('*'):
        if file.is_file():
            target = to / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


# --- images

def test_a_path_that_is_not_there(refused, tmp_path):
    said = refused('scott_pretrain', *TINY, '--data', 'folder:/no/such/place', '--out', tmp_path / 'new')
    assert '/no/such/place' in said and 'no such folder' in said and 'give the path' in said


def test_a_path_that_is_a_file(refused, place, tmp_path):
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images" / "0.png"}', '--out', tmp_path / 'new')
    assert '0.png' in said


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / 'empty').mkdir()
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{tmp_path / "empty"}', '--out', tmp_path / 'new')
    assert f'folder:{tmp_path / "empty"}: no images in it' in said and 'give a folder' in said


def test_an_unknown_data_set(refused, tmp_path):
    said = refused('scott_pretrain', *TINY, '--data', 'roses', '--out', tmp_path / 'new')
    assert 'roses' in said and 'petals' in said and 'folder:PATH' in said


@pytest.mark.parametrize('command', ['scott_pretrain', 'scott_probe'])
def test_a_name_that_is_nearly_right(refused, place, tmp_path, command):
    "A folder without `folder:` and a misspelled data set are answered with what to type."
    first = [*TINY, '--out', tmp_path / 'new'] if command == 'scott_pretrain' else [place / 'run']
    folder = place / 'images'
    for more in ([], ['--labels', tmp_path / 'list.csv']):
        said = refused(command, *first, '--data', folder, *more)
        assert f"data '{folder}': did you mean folder:{folder}?" in said and 'no such data set' not in said
    assert "data 'Flower102': no such data set: did you mean flowers102?" in refused(command, *first, '--data', 'Flower102')


@pytest.mark.parametrize('content', [b'', b'this is text', 'half'], ids=['empty', 'text', 'half'])
def test_an_image_that_is_no_image_is_named(refused, place, tmp_path, content):
    folder = pictures(tmp_path / 'some')
    whole = (folder / '3.png').read_bytes()
    (folder / '3.png').write_bytes(whole[:len(whole) // 2] if content == 'half' else content)
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{folder}', '--out', tmp_path / 'new')
    assert str(folder / '3.png') in said and '1 of 8' in said and '--on-bad-image skip' in said


def test_an_image_that_is_no_image_is_skipped_and_counted(place, tmp_path, capsys):
    folder = pictures(tmp_path / 'some', 10)
    for i in (3, 7): (folder / f'{i}.png').write_bytes(b'this is text')
    run('scott_pretrain', *TINY, '--data', f'folder:{folder}', '--on-bad-image', 'skip', '--out', tmp_path / 'new')
    out = capsys.readouterr().out
    assert '2 of 10' in out and str(folder / '3.png') in out and str(folder / '7.png') in out and 'left out' in out
    stored = json.loads((tmp_path / 'new' / 'config.json').read_text())
    assert stored['images'] == 8 and stored['on_bad_image'] == 'skip'
    assert stored['skipped_images'] == [str(folder / f'{i}.png') for i in (3, 7)]


def test_nothing_but_broken_images_is_refused_even_with_skip(refused, tmp_path):
    folder = pictures(tmp_path / 'some', 2)
    for file in folder.iterdir(): file.write_bytes(b'this is text')
    assert '2 of 2' in refused('scott_pretrain', *TINY, '--data', f'folder:{folder}', '--on-bad-image', 'skip', '--out',
                               tmp_path / 'new')


def test_a_batch_larger_than_the_data_set(refused, place, tmp_path):
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--batch-size', '9', '--out',
                   tmp_path / 'new')
    assert '8 images' in said and '--batch-size 9' in said


# --- settings

@pytest.mark.parametrize('flags, words', [
    ('--img-size 60', ['60', 'multiple', '16', '48']),
    ('--img-size 16', ['one patch', 'a larger image']),
    ('--preset huge', ['huge', 'demo', 'paper']),
    ('--epoch 3', ['--epoch is no flag', 'did you mean --epochs', '--help']),  # not even the beginning of a name
    ('--learning-rate 1', ['--learning-rate', '--help']),
    ('stray', ['stray', '--help']),
    ('--batch-size many', ['--batch-size', 'many', 'int']),
    ('--mask checkers', ['--mask', 'checkers', 'blockwise']),
    ('--mask-ratio 1.5', ['1.5', 'between 0 and 1']),
    ('--embed-dim 30', ['30', 'multiple']),
    ('--device cuda', ['cuda', '0 GPUs', 'use --device']) if not torch.cuda.is_available() else ('--mask-ratio 0', ['ratio']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_wrong_setting(refused, place, tmp_path, flags, words):
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', tmp_path / 'new',
                   *flags.split())
    assert all(word in said for word in words), said
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('flags, words', [
    ('--batch-size 0', ['batch']), ('--log-every 0', ['log']), ('--epochs 0', ['epochs']),
    ('--warmup-epochs 1', ['warmup']),  # as long as the run
    ('--flat 2', ['flat']), ('--momentum 2', ['momentum']), ('--depth -1', ['depth']),
    ('--device banana', ['banana', 'cpu']), ('--lr -1', ['lr']), ('--knn-every -1', ['knn-every']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_number_out_of_its_range(refused, place, tmp_path, flags, words):
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', tmp_path / 'new',
                   *flags.split())
    assert all(word in said for word in words), said
    assert not (tmp_path / 'new').exists()


# --- run folders

def test_no_run_folder_is_named(refused, place):
    assert '--out' in refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}')


def test_a_run_folder_that_exists(refused, place):
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', place / 'run')
    assert str(place / 'run') in said and '--resume' in said and '--out' in said


def test_a_folder_of_something_else_is_not_written_into(refused, place, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'diary.txt').write_text('dear diary')
    for where in (tmp_path / 'notes', tmp_path / 'notes' / 'diary.txt'):
        assert str(where) in refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', where)


def test_a_run_folder_that_cannot_be_made(refused, place, tmp_path):
    (tmp_path / 'file').write_text('no folder')
    said = refused('scott_pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', tmp_path / 'file' / 'run')
    assert str(tmp_path / 'file') in said


def test_flags_that_contradict_the_stored_run(refused, place):
    said = refused('scott_pretrain', '--out', place / 'run', '--resume', '--depth', '2', '--lr', '0.1', '--seed', '0')
    assert 'depth is 1 there and 2 here' in said and 'lr is 0.001 there and 0.1 here' in said
    assert 'seed' not in said and str(place / 'run') in said and '--out' in said


def test_lines_of_metrics_keep_their_distance(refused, place):
    "The sum of the losses since the last line is part of the checkpoint."
    said = refused('scott_pretrain', '--out', place / 'run', '--resume', '--log-every', '3')
    assert 'log_every is 20 there and 3 here' in said


def test_resume_without_a_run(refused, place, tmp_path):
    for where in (tmp_path / 'nowhere', place / 'images'):
        said = refused('scott_pretrain', '--out', where, '--resume')
        assert str(where) in said and 'no run folder' in said and not (where / 'config.json').exists()


def test_resume_of_a_run_without_checkpoint(refused, place, tmp_path):
    broken = copy_of(place / 'run', tmp_path / 'run')
    (broken / 'checkpoint.pt').unlink()
    said = refused('scott_pretrain', '--out', broken, '--resume')
    assert f'{broken} has no checkpoint' in said and 'leave out --resume' in said


@pytest.mark.parametrize('name', ['checkpoint.pt', 'config.json'])
def test_resume_of_a_truncated_run(refused, place, tmp_path, name):
    broken = copy_of(place / 'run', tmp_path / 'run')
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(whole[:len(whole) // 2])
    said = refused('scott_pretrain', '--out', broken, '--resume')
    assert str(broken / name) in said and 'damaged' in said and 'restore' in said


def test_a_checkpoint_of_something_else(refused, place, tmp_path):
    broken = copy_of(place / 'run', tmp_path / 'run')
    torch.save({'state_dict': {}}, broken / 'checkpoint.pt')
    assert str(broken / 'checkpoint.pt') in refused('scott_pretrain', '--out', broken, '--resume')


def test_a_checkpoint_of_another_network(refused, place, tmp_path):
    broken = copy_of(place / 'run', tmp_path / 'run')
    stored = json.loads((broken / 'config.json').read_text())
    (broken / 'config.json').write_text(json.dumps({**stored, 'depth': 2}))
    assert str(broken / 'checkpoint.pt') in refused('scott_pretrain', '--out', broken, '--resume')


def test_resume_with_other_images(refused, place, tmp_path):
    "One picture more or less is another run: another order, another number of steps."
    folder = pictures(tmp_path / 'some', 16)
    run('scott_pretrain', *TINY, '--data', f'folder:{folder}', '--out', tmp_path / 'run')
    (folder / '3.png').unlink()
    said = refused('scott_pretrain', '--out', tmp_path / 'run', '--resume')
    assert f'folder:{folder}: not the 16 pictures that' in said and '1 gone' in said


def test_a_run_on_a_relative_folder_goes_on_from_another_place(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    run('scott_pretrain', *TINY, '--data', 'folder:images', '--out', tmp_path / 'run')
    monkeypatch.chdir(tmp_path)
    run('scott_pretrain', '--out', 'run', '--resume')
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['data'] == f'folder:{(place / "images").resolve()}'


def test_an_interrupt_before_the_first_step_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('scott.train.pretrain.prepare', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end: run('scott_pretrain', *TINY, '--out', tmp_path / 'run')
    assert end.value.code == 130 and capsys.readouterr().err == 'scott_pretrain: interrupted\n'


def test_others_may_read_an_encoder(place):
    files = sorted((place / 'run' / 'target').iterdir())
    assert [f.name for f in files] == ['config.json', 'model.safetensors']
    assert all(f.stat().st_mode & 0o777 == 0o644 for f in files)


# --- the other commands

@pytest.mark.parametrize('command', ['scott_probe', 'scott_visualize'])
def test_a_folder_that_is_no_run(refused, place, tmp_path, command):
    pytest.importorskip(COMMANDS[command])
    for where in (tmp_path / 'nowhere', place / 'images', place / 'run' / 'target'):
        said = refused(command, where)
        assert str(where) in said and 'no run folder' in said and '--out' in said


@pytest.mark.parametrize('command', ['scott_probe', 'scott_visualize'])
def test_a_run_without_its_encoders(refused, place, tmp_path, command):
    pytest.importorskip(COMMANDS[command])
    broken = copy_of(place / 'run', tmp_path / 'run')
    for file in (broken / 'target').iterdir(): file.unlink()
    assert str(broken / 'target') in refused(command, broken)


@pytest.mark.parametrize('command', ['scott_probe', 'scott_visualize'])
def test_an_unknown_flag_or_no_folder(refused, place, command):
    pytest.importorskip(COMMANDS[command])
    assert '--sed' in refused(command, place / 'run', '--sed', '1')
    if command != 'scott_bench': refused(command)  # scott_bench needs no folder


def test_probes_need_labels(refused, place):
    pytest.importorskip(COMMANDS['scott_probe'])
    assert 'no image has a label' in refused('scott_probe', place / 'run', '--probes', 'knn')


@pytest.mark.parametrize('wrong, words', [
    ('--without all', ['--without']),  # a flag of earlier versions
    ('--accumulate 3', ['--batch-size 8', '--accumulate']),
    ('--accumulate 0', ['--accumulate 0']), ('--keep-checkpoints 0', ['--keep-checkpoints 0'])])
def test_pieces_that_cannot_be(refused, place, tmp_path, wrong, words):
    images = f'folder:{place / "images"}'
    said = refused('scott_pretrain', *TINY, '--data', images, '--out', tmp_path / 'new', *wrong.split())
    assert all(word in said for word in words)


# --- help

def options_of(module):
    "The dataclass that a command's flags are made from."
    own = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]
    cls, = {c for c in own if all('help' in f.metadata for f in dataclasses.fields(c))
            and (c.__module__ == module.__name__ or module.__name__ == 'scott.train.pretrain')}
    return cls


@pytest.mark.parametrize('command', COMMANDS)
def test_help_explains_every_flag(command, capsys, monkeypatch):
    module = pytest.importorskip(COMMANDS[command])
    monkeypatch.setenv('COLUMNS', '100')
    with pytest.raises(SystemExit) as end: module.main(['--help'])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == '' and command in out
    said = ''.join(out.split())  # lines are broken at hyphens too
    for f in dataclasses.fields(options_of(module)):
        flag = f.name.upper() if f.metadata['positional'] else '--' + f.name.replace('_', '-')
        assert flag in said
        assert len(f.metadata['help']) > 3 and ''.join(f.metadata['help'].split()) in said, flag


# --- really as a process

def process(module, *argv):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', f'from {module} import main; main()', *map(str, argv)], env=env,
                          capture_output=True, text=True, timeout=600)


def test_the_real_command_refuses_an_existing_run(place):
    before = contents(place)
    done = process('scott.train.pretrain', *TINY, '--data', f'folder:{place / "images"}', '--out', place / 'run')
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1, done.stderr
    assert str(place / 'run') in done.stderr and '--resume' in done.stderr
    assert contents(place) == before


@pytest.mark.parametrize('module', ['scott.train.pretrain', 'scott.probe.table'])
def test_the_real_command_refuses_a_path_that_is_not_there(place, tmp_path, module):
    pytest.importorskip(module)
    argv = ([*TINY, '--data', 'folder:/no/such/place', '--out', tmp_path / 'new'] if module == 'scott.train.pretrain' else
            ['/no/such/place'])
    done = process(module, *argv)
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1, done.stderr
    assert '/no/such/place' in done.stderr and not (tmp_path / 'new').exists()


# --- advice that can be followed

def flags_in(module):
    "Every flag that a string of a module names; f-strings piece by piece, no comments."
    tree = ast.parse((ROOT / 'scott' / module).read_text())
    words = ' '.join(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return set(re.findall(r'(?<![\w-])--[a-z][a-z-]*[a-z]', words))


@pytest.mark.parametrize('modules, commands', [
    ('probe/*.py', ['scott_probe']), ('look/*.py', ['scott_visualize']), ('lab/bench.py', ['scott_bench']),
    ('data/*.py', ['scott_pretrain', 'scott_probe', 'scott_visualize'])])
def test_a_message_names_flags_that_its_command_has(modules, commands):
    "Data sets are read by three commands: what their messages name, all three have."
    found = {flag: path.name for path in (ROOT / 'scott').glob(modules) for flag in flags_in(path)}
    assert found
    for command in commands:
        settings = dataclasses.fields(options_of(importlib.import_module(COMMANDS[command])))
        known = {'--' + f.name.replace('_', '-') for f in settings}
        assert not {flag: where for flag, where in found.items() if flag not in known}, command


@pytest.mark.parametrize('command, words', [('scott_pretrain', '--out ~/new --data folder:~/none'),
                                            ('scott_probe', '~/run --data folder:~/none'),
                                            ('scott_visualize', '~/run --data folder:~/none')])
def test_the_home_folder_in_a_message(refused, place, command, words, monkeypatch):
    monkeypatch.setenv('HOME', str(place))
    said = refused(command, *words.split())
    assert f'folder:{place}/none' in said and '~' not in said


def test_the_home_folder_of_a_bench(refused, place, monkeypatch):
    monkeypatch.setenv('HOME', str(place))
    assert f'no folder {place}/none' in refused('scott_bench', '--json=~/none/figures.json')
