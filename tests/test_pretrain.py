"""A run as a whole: stopped and resumed to the last bit, seeds, what is written and kept, and what is refused."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tensors, write_images
from matplotlib.figure import Figure

from scott.cli import InputError
from scott.data.petals import petals
from scott.data.sets import ImageSet
from scott.encoder import Encoder
from scott.train import pretrain as module
from scott.train.config import Config, build
from scott.train.feed import DRAWS, Feed
from scott.train.files import load_checkpoint, write_checkpoint
from scott.train.machine import describe_machine
from scott.train.pretrain import Pretraining, forecast, labeled, main, prepare, pretrain
from scott.train.processes import Group
from scott.train.run import Run, read_metrics
from scott.train.trainer import Line

ROOT = Path(__file__).resolve().parent.parent
TOY = dict(img_size=32, mask='uniform', embed_dim=16, num_heads=2, depth=1, predictor_depth=1, batch_size=8, epochs=5,
           warmup_epochs=1, log_every=2, drop_rate=.1, device='cpu', amp='off', knn_every=0)  # 20 steps of 32 pictures
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with 32 small pictures in two classes; decoded caches go beside it."
    place = tmp_path_factory.mktemp('pretrain')
    write_images(place / 'images', 32, size=40, classes=('a', 'b'))
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SCOTT_CACHE', str(place / 'cache'))
        yield place


@pytest.fixture(scope='module')
def data(place):
    return f'folder:{place / "images"}'


@pytest.fixture(scope='module')
def straight(place, data):
    "The run folder of 20 uninterrupted steps."
    return pretrain('demo', **TOY, data=data, out=place / 'straight').folder


@pytest.fixture(autouse=True)
def small_curves(straight, monkeypatch):
    "The picture of the curves takes longer than all steps here; `straight` has a real one."
    monkeypatch.setattr(module, 'panel', lambda metrics: Figure(figsize=(1, 1)))


@pytest.fixture
def again(straight, tmp_path):
    "A copy of that folder, to be changed."
    return Path(shutil.copytree(straight, tmp_path / 'run'))


def argv(data, out, **more):
    "The same settings for the command line."
    named = {'preset': 'demo', **TOY, 'data': data, 'out': out, **more}
    return [word for k, v in named.items() for word in ('--' + k.replace('_', '-'), str(v))]


def flowers(n=35):
    "4 batches of 8, and 3 images left over."
    return ImageSet(petals(n=n, size=36)[0], torch.full((n,), -1), torch.ones(n), [], 'toy', False, [])


def toy(out='unused', **changes):
    return Pretraining(Config.of('demo', **{**TOY, 'data': 'petals', 'out': str(out), **changes}), flowers())


def steps(training, n):
    "The losses of the next steps."
    losses = []
    for _ in range(n):
        training.trainer.tally.reset()
        training.trainer.train_step()
        losses.append(training.trainer.tally.read().loss)
    return losses


def distance(a, b):
    "max|Δ| over two run folders' checkpoints: weights, target, Adam's moments and step counts, sums."
    pairs = list(zip(*(tensors({**load_checkpoint(run), 'identity': None}) for run in (a, b)), strict=True))
    assert len(pairs) > 100
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def lines(run):
    "The metrics of a run without the two numbers that are timings."
    return [{k: v for k, v in m.items() if k not in ('images_per_s', 'data_wait')} for m in read_metrics(run)]


def same(a, b):
    "Whether two folders hold the same run: lines, checkpoints, encoders."
    encoders = [torch.equal(v, other[k]) for name in ('context', 'target')
                for other in [Run(b).encoder(name).state_dict()] for k, v in Run(a).encoder(name).state_dict().items()]
    return lines(a) == lines(b) and distance(a, b) == 0. and all(encoders)


def reached(run):
    "The step of a run's checkpoint, 0 without one."
    return load_checkpoint(run)['step'] if (run / 'checkpoint.pt').is_file() else 0


def at_step(monkeypatch, step, act):
    "`act` happens in the middle of a step."
    real = Feed.batches
    def batches(self, k):
        if k == step: act()
        return real(self, k)
    monkeypatch.setattr(Feed, 'batches', batches)


# --- stopped, and resumed

class PowerCut(BaseException): pass


def test_cut_off_after_step_7_and_resumed_is_the_same_run_bit_for_bit(data, straight, tmp_path, monkeypatch):
    run, expected = tmp_path / 'run', lines(straight)
    def cut(): raise PowerCut
    with monkeypatch.context() as m, pytest.raises(PowerCut):
        at_step(m, 8, cut)
        pretrain('demo', **TOY, data=data, out=run, checkpoint_minutes=0)
    assert reached(run) == 7 and [m['step'] for m in lines(run)] == [2, 4, 6]
    assert pretrain(out=run, resume=True, checkpoint_minutes=60).step == 20
    assert same(run, straight) and [m['step'] for m in expected] == list(range(2, 21, 2))


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run_bit_for_bit(place, data, straight, figure):
    run, python = place / 'killed', [sys.executable, '-m', 'scott.train']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(place / 'killed.log', 'w') as out:
        process = subprocess.Popen([*python, *argv(data, run, checkpoint_minutes=0)], env=env, stdout=out, stderr=out)
        limit = time.monotonic() + 600
        while reached(run) < 7 and process.poll() is None and time.monotonic() < limit: time.sleep(.02)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (place / 'killed.log').read_text()
    assert 7 <= reached(run) < 20
    subprocess.run([*python, '--out', str(run), '--resume'], env=env, check=True, capture_output=True, timeout=600)
    assert same(run, straight) and not list(run.rglob('*.part'))
    figure('01 20 steps straight = kill -9 + resume (weights, target, Adam, losses)', 'max|Δ| = 0.0')


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_goes_on(data, straight, tmp_path, monkeypatch, capsys, figure,
                                                                number, code):
    run = tmp_path / 'run'
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        at_step(m, 7, lambda: signal.raise_signal(number))
        main(argv(data, run, checkpoint_minutes=60))
    assert end.value.code == code and reached(run) == 7
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f'{number.name} after step 7: saved in {run}; add --resume to go on'
    main(['--out', str(run), '--resume'])
    assert same(run, straight) and capsys.readouterr().out.splitlines()[-1] == f'done: {run}'
    figure(f'02 {number.name} in the middle of a run, then --resume',
           f'exit code {code}, checkpoint of that step; max|Δ| = 0.0')


@pytest.mark.slow
def test_two_signals_from_outside(data, tmp_path):
    "The command, and a real SIGTERM; a second one would leave at once, which tests/test_runs.py looks at."
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    run, deadline = tmp_path / 'run', time.monotonic() + 120
    process = subprocess.Popen([sys.executable, '-m', 'scott.train', *argv(data, run, epochs=500)], env=env,
                               stderr=subprocess.PIPE, text=True)
    while not read_metrics(run): assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 143 and f'SIGTERM after step {reached(run)}: saved' in last


def test_resuming_a_finished_run_changes_nothing(again, straight):
    pretrain(out=again, resume=True)
    assert same(again, straight)


@pytest.mark.parametrize('half', ['', '{"step": 14, "epo'])  # the power failed while a line was written
def test_lines_after_the_checkpoint_are_dropped_at_resume(again, straight, monkeypatch, half):
    training = Pretraining(Run(again).config, module.load(Run(again).config.data, 'all', round(32 * module.SIDE)))
    for step in range(1, 6):  # the checkpoint of step 5
        if step % 2: training.trainer.tally.reset()
        training.trainer.train_step()
    write_checkpoint(again, dict(training.trainer.state_dict(), identity=training.identity), keep=1)
    with open(again / 'metrics.jsonl', 'a') as f: f.write(half)
    group, cfg = Group(), module.settings(dict(out=str(again), resume=True))
    assert prepare(cfg, group).trainer.step == 5 and lines(again) == lines(straight)[:2]  # steps 2 and 4
    pretrain(out=again, resume=True)
    assert same(again, straight)


def test_the_last_checkpoints_are_kept(data, tmp_path):
    for keep in (1, 3):
        pretrain('demo', **{**TOY, 'epochs': 2}, data=data, out=tmp_path / str(keep), checkpoint_minutes=0,
                 keep_checkpoints=keep)
    names = lambda keep: sorted(p.name for p in (tmp_path / keep).glob('checkpoint*'))
    assert names('1') == ['checkpoint.pt'] and names('3') == ['checkpoint-6.pt', 'checkpoint-7.pt', 'checkpoint.pt']


# --- what may go on, and what not

def test_a_run_of_other_draws_is_refused_in_one_line_and_stays_readable(again, capsys, monkeypatch):
    state = load_checkpoint(again)
    del state['identity']['draws']  # as in version 0.1
    write_checkpoint(again, {**state, 'step': 19}, keep=1)
    monkeypatch.setattr(module, 'load', lambda *_, **__: pytest.fail('the images were read before the run was refused'))
    with pytest.raises(InputError, match=rf'version 1 of the random draws, and this is version {DRAWS}'):
        pretrain(out=again, resume=True)
    with pytest.raises(SystemExit) as end: main(['--out', str(again), '--resume'])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'random draws' in said and 'start a new run' in said
    assert Run(again).jepa().context.grid == (2, 2) and len(Run(again).metrics) == 10


def test_settings_from_python_and_a_resume_that_contradicts(again, data):
    for changes, named in ((dict(lr=.1), 'lr is 0.001 there and 0.1 here'), (dict(seed=3), 'seed is 0 there')):
        with pytest.raises(InputError, match=named): pretrain(out=again, resume=True, **changes)
    with pytest.raises(InputError, match='preset is'): pretrain('small', out=again, resume=True)
    with pytest.raises(InputError, match='exists: add --resume'): pretrain('demo', **TOY, data=data, out=again)
    with pytest.raises(InputError, match='no run folder is named'): pretrain('demo')
    with pytest.raises(InputError, match='did you mean epochs'): pretrain('demo', epoch=3, out=again)
    run = pretrain('demo', out=again, resume=True, checkpoint_minutes=1.)  # what is free may differ
    assert isinstance(run, Run) and run.step == 20
    assert pretrain(Run(again).config, resume=True).step == 20  # a Config is as good as names


def as_before(run):
    "Take away what an earlier version did not write."
    (run / 'pictures.txt').unlink()
    stored = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({k: v for k, v in stored.items() if k not in ('pictures', 'how_split')}))


def test_a_lost_list_of_pictures_is_named(again):
    (again / 'pictures.txt').unlink()
    refused('pictures.txt is missing', 'restore it', out=again, resume=True)


def test_another_data_set_is_refused(again, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(module, 'load', lambda *_, **__: flowers())
        with pytest.raises(InputError, match='32 gone'): pretrain(out=again, resume=True)
        as_before(again)
        with pytest.raises(InputError, match='images is 32 there and 35 here'): pretrain(out=again, resume=True)
    write_checkpoint(again, dict(step=1))
    with pytest.raises(InputError, match='was not written by scott_pretrain'): pretrain(out=again, resume=True)


@pytest.mark.parametrize('changes, named', [
    (dict(batch_size=16), 'batch_size is 8 there and 16 here'),  # the value of the preset
    (dict(mask='blockwise'), "mask is 'uniform' there and 'blockwise' here")])
def test_a_whole_config_is_compared_as_a_whole(again, data, changes, named):
    cfg = Config.of('demo', **{**TOY, **changes}, data=data, out=str(again))
    with pytest.raises(InputError, match=named): pretrain(cfg, resume=True)
    assert pretrain(Config.of('demo', **TOY, data=data, out=str(again)), resume=True).step == 20


def test_a_new_run_from_a_config_and_changes(data, tmp_path):
    "What follows from a change still follows: the warm-up is half of the epochs."
    cfg = Config.of('demo', **{k: v for k, v in TOY.items() if k != 'warmup_epochs'}, data=data)
    run = pretrain(cfg, epochs=1, out=tmp_path / 'run')
    assert (run.config.epochs, run.config.warmup_epochs, run.step) == (1, 0, 4)


# --- the same pictures

def refused(*words, preset=None, **settings):
    "One line that names all of this; nothing is changed."
    def files(): return {p: p.read_bytes() for p in settings['out'].rglob('*') if p.is_file() and p.name != '.lock'}
    before = files()
    with pytest.raises(InputError) as e: pretrain(preset, **settings)
    assert '\n' not in str(e.value) and all(str(word) in str(e.value) for word in words), str(e.value)
    assert files() == before


@pytest.fixture
def halted(data, tmp_path, monkeypatch):
    "A run of 7 of 20 steps, and a folder of its own with its pictures."
    run, photos = tmp_path / 'run', Path(shutil.copytree(data[7:], tmp_path / 'photos'))
    def cut(): raise PowerCut
    with monkeypatch.context() as m, pytest.raises(PowerCut):
        at_step(m, 8, cut)
        pretrain('demo', **TOY, data=f'folder:{photos}', out=run, checkpoint_minutes=0)
    return run, photos


def test_moved_pictures_are_the_same_run_bit_for_bit(halted, straight, tmp_path):
    run, photos = halted
    moved = photos.rename(tmp_path / 'disk')
    refused(f'folder:{photos}: there is no such folder any more', '--data folder:NEW', out=run, resume=True)
    refused('there is no such folder', out=run, resume=True, data=f'folder:{tmp_path / "nowhere"}')
    assert pretrain(out=run, resume=True, data=f'folder:{moved}').step == 20
    assert same(run, straight) and Run(run).config.data == Run(run).stored['data'] == f'folder:{moved}'
    assert pretrain(out=run, resume=True).step == 20  # it knows where they are
    main(['--out', str(run), '--resume', '--data', f'folder:{moved}'])


def rename(a, b): a.rename(a.with_name(b))

CHANGED = {
    'one more': (lambda p: shutil.copy(p / 'a' / '000.png', p / 'a' / '999.png'), ['1 new.']),
    'one less': (lambda p: (p / 'b' / '001.png').unlink(), ['1 gone.']),
    'one replaced': (lambda p: (p / 'a' / '002.png').write_bytes((p / 'b' / '001.png').read_bytes()), ['1 new, 1 gone']),
    'renamed': (lambda p: rename(p / 'a' / '000.png', '999.png'), ['the same ones in another order'])}

@pytest.mark.parametrize('change', CHANGED)
def test_changed_pictures_are_refused_with_their_number(halted, change):
    run, photos = halted
    act, words = CHANGED[change]
    act(photos)
    for settings in ({}, dict(data=f'folder:{photos}')):
        refused('not the 32 pictures', *words, '--data folder:PATH', 'another --out', out=run, resume=True, **settings)


def test_new_names_in_the_same_order_are_the_same_pictures(halted, straight):
    run, photos = halted
    for path in sorted(photos.rglob('*.png')): rename(path, f'x{path.name}')
    rename(photos / 'a', 'c0')
    rename(photos / 'b', 'c1')
    pretrain(out=run, resume=True)
    assert same(run, straight)


def test_a_run_of_an_earlier_version_goes_on_where_it_was(halted, straight, tmp_path):
    run, photos = halted
    as_before(run)
    state = load_checkpoint(run)
    there = {k: v for k, v in state['identity'].items() if k != 'pictures'}
    elsewhere = {**there, 'data': 'folder:/elsewhere'}
    write_checkpoint(run, {**state, 'identity': elsewhere}, keep=1)
    refused("data is 'folder:/elsewhere' there", 'another run', out=run, resume=True)
    write_checkpoint(run, {**state, 'identity': {**there, 'data': f'folder:{photos}'}}, keep=1)  # with its path
    assert Run(run).checkpoint()['step'] == 7 and Run(run).jepa() is not None
    moved = Path(shutil.copytree(photos, tmp_path / 'disk'))
    refused('earlier version', f'put them back into {photos}', out=run, resume=True, data=f'folder:{moved}')
    assert pretrain(out=run, resume=True).step == 20
    assert same(run, straight) and Run(run).pictures is None
    shutil.rmtree(photos)
    refused('earlier version', f'put them back into {photos}', out=run, resume=True)


def test_a_training_split_of_an_earlier_version_is_not_gone_on_with(data, tmp_path):
    run = pretrain('demo', **{**TOY, 'epochs': 1, 'warmup_epochs': 0}, data=data, ssl_split='train', out=tmp_path / 'run')
    assert pretrain(out=run.folder, resume=True).step == 3
    as_before(run.folder)
    refused('earlier version', 'start a new run', out=run.folder, resume=True)


def test_the_checkpoint_of_a_run_with_other_pictures_is_refused(again, data, tmp_path):
    photos = Path(shutil.copytree(data[7:], tmp_path / 'photos'))
    shutil.copy(photos / 'b' / '001.png', photos / 'a' / '002.png')
    other = pretrain('demo', **TOY, data=f'folder:{photos}', out=tmp_path / 'other').folder
    shutil.copy(other / 'checkpoint.pt', again / 'checkpoint.pt')
    refused('another run', 'pictures is', out=again, resume=True)
    with pytest.raises(InputError, match='of another run'): Run(again).jepa()


# --- what was taken is told, and written down

def test_what_was_taken_is_told_once_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    seen = []
    at_step(monkeypatch, 2, lambda: seen.append(capsys.readouterr().out.splitlines()))
    run = pretrain('demo', **{**TOY, 'epochs': 1, 'warmup_epochs': 0}, data=data, out=tmp_path / 'run')
    loaded = module.load(data, 'all', round(32 * module.SIDE))
    assert loaded.summary and seen[0].count(loaded.summary) == 1 and loaded.summary not in capsys.readouterr().out
    assert run.stored['pictures'] == loaded.summary and run.stored['how_split'] == loaded.how_split
    assert run.pictures == loaded.hashes and len(run.pictures) == 32
    assert (run.folder / 'pictures.txt').read_text() == ''.join(h + '\n' for h in loaded.hashes)


# --- one writer, and folders that are there already

def test_a_second_process_is_refused_and_a_dead_one_is_no_obstacle(again, straight):
    hold = 'import sys, time, filelock as f; x = f.FileLock(sys.argv[1]); x.acquire(); print(flush=True); time.sleep(90)'
    other = subprocess.Popen([sys.executable, '-c', hold, again / '.lock'], stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        refused(again, 'another process trains there', 'another --out', out=again, resume=True)
        refused(again, 'another process trains there', preset='demo', out=again)
        assert Run(again).step == 20 and Run(again).encoder() is not None  # readers need no lock
    finally: other.kill()
    other.wait()
    assert (again / '.lock').exists() and pretrain(out=again, resume=True).step == 20 and same(again, straight)


@pytest.mark.slow
def test_a_second_command_on_a_live_run_is_refused(data, tmp_path):
    run, env = tmp_path / 'run', {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command, deadline = [sys.executable, '-m', 'scott.train'], time.monotonic() + 120
    first = subprocess.Popen([*command, *argv(data, run, epochs=500, checkpoint_minutes=0)], env=env,
                             stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not reached(run): assert first.poll() is None and time.monotonic() < deadline
    second = subprocess.run([*command, '--out', run, '--resume'], env=env, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and second.stderr.count('\n') == 1, second.stderr
    assert str(run) in second.stderr and 'another process trains there' in second.stderr and first.poll() is None
    first.kill()  # kill -9
    first.wait()
    before = reached(run)
    third = subprocess.Popen([*command, '--out', run, '--resume', '--checkpoint-minutes', '0'], env=env,
                             stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while reached(run) <= before: assert third.poll() is None and time.monotonic() < deadline
    third.kill()
    third.wait()


def test_a_refused_new_run_leaves_nothing(data, tmp_path):
    with pytest.raises(InputError, match='fewer than --batch-size'):
        pretrain('demo', **{**TOY, 'batch_size': 64}, data=data, out=tmp_path / 'some' / 'run')
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').touch()
    refused('is no run', 'another --out', preset='demo', **TOY, data=data, out=tmp_path / 'mine')
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['photo.jpg']
    for place in (tmp_path / 'mine' / 'photo.jpg', tmp_path / 'mine' / 'photo.jpg' / 'run'):
        with pytest.raises(InputError, match='name another --out'): pretrain('demo', **TOY, data=data, out=place)


def test_a_folder_that_holds_only_a_lock_is_free(data, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.lock').touch()
    assert pretrain('demo', **{**TOY, 'epochs': 1, 'warmup_epochs': 0}, data=data, out=tmp_path / 'run').step == 4


def test_home_folders(data, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copytree(data[7:], tmp_path / 'photos')
    short = {**TOY, 'epochs': 1, 'warmup_epochs': 0}
    assert pretrain('demo', **short, data='folder:~/photos', out='~/run').step == 4
    assert Run('~/run').step == 4 and pretrain(out=Path('~/run'), resume=True).step == 4
    monkeypatch.chdir(tmp_path)
    main(['--out=~/run', '--resume', '--data=folder:~/photos'])
    assert not (tmp_path / '~').exists() and read_metrics('~/run') == Run('~/run').metrics


# --- how long it takes

def test_a_forecast_is_printed_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    seen = []
    def fit(self):
        seen.append(capsys.readouterr().out)
        raise PowerCut
    monkeypatch.setattr(Pretraining, 'fit', fit)
    small = {k: TOY[k] for k in ('img_size', 'mask', 'embed_dim', 'num_heads', 'depth', 'predictor_depth', 'knn_every')}
    with pytest.raises(PowerCut):
        pretrain('colab', **small, data=data, batch_size=8, device='cpu', out=tmp_path / 'run')
    assert re.search(r'^160 steps of \S+ s: (less than 2|about \d+) minutes on this CPU$', seen[0], re.M)


def test_a_device_that_is_not_there_is_refused_before_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr('scott.train.pretrain.prepare', lambda *a: pytest.fail('images were read'))
    with pytest.raises(InputError, match='--device cuda:9'): pretrain('demo', device='cuda:9', out=tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_forecast_in_hours():
    training = toy()
    training.trainer.schedule = training.trainer.schedule._replace(total=10 ** 8)
    assert re.fullmatch(r'100,000,000 steps of \S+ s: about [\d.]+ hours on this CPU', forecast(training.trainer))
    training.trainer.forward = lambda *batch: None  # as if compiled
    assert forecast(training.trainer) == '100,000,000 steps'


def test_a_forecast_changes_no_bit(data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(module, 'forecast', lambda trainer: '')
        pretrain('demo', **TOY, data=data, out=tmp_path / 'run')
    assert same(tmp_path / 'run', straight)


def test_the_callers_random_numbers_go_on(data, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    pretrain('demo', **{**TOY, 'epochs': 2}, data=data, out=tmp_path / 'run')
    assert torch.equal(torch.rand(5), expected)


# --- seeds

def test_same_seed_same_bits_other_seed_other_weights(figure):
    one, two, other = toy(seed=3), toy(seed=3), toy(seed=4)
    losses, again, others = (steps(t, 3) for t in (one, two, other))
    assert losses == again != others
    a, b, c = (t.jepa.state_dict() for t in (one, two, other))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert not torch.equal(a['context.mask_token'], c['context.mask_token'])
    figure('04 same seed, same losses to the bit', 'max|Δ| = 0.0')


def test_initial_weights_depend_on_nothing_but_the_configuration():
    torch.rand(17)
    one = toy()
    expected = build(one.cfg).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in one.jepa.state_dict().items())


GOLDEN = Path(__file__).with_name('golden_losses.json')  # written by `python tests/test_pretrain.py`


def golden_losses():
    "50 steps of a toy run on drawn flowers."
    toy = dict(data='petals', img_size=64, embed_dim=32, depth=1, predictor_depth=1, batch_size=16, epochs=13)
    cfg = Config.of('demo', **toy, warmup_epochs=1, device='cpu', amp='off', out='unused')
    images = petals(n=70, size=64)[0]
    return steps(Pretraining(cfg, ImageSet(images, torch.full((70,), -1), torch.ones(70), [], 'toy', False, [])), 50)


def test_golden_losses(figure):
    "Other processors add in another order, so not to the bit; but a change of the mathematics shows at once."
    stored = json.loads(GOLDEN.read_text())
    assert stored.get('draws') == DRAWS, 'new draws: record the losses anew with python tests/test_pretrain.py'
    ours = golden_losses()
    assert ours == pytest.approx(stored['losses'], rel=1e-3)
    assert len(stored['losses']) == 50 and stored['losses'][-1] < .6 * stored['losses'][0]
    gap = max(abs(a / b - 1) for a, b in zip(ours, stored['losses']))
    figure('11 50 golden losses', f'largest relative difference {gap:.1e}')


# --- what is written

def test_run_folder(straight):
    names = {p.name for p in straight.iterdir()}
    assert names == {'config.json', 'pictures.txt', 'metrics.jsonl', 'curves.png', 'checkpoint.pt', 'context', 'target', '.lock'}
    for line in read_metrics(straight):
        assert set(line) == {'step', 'epoch', 'loss', 'feature_std', 'rankme', 'cosine', 'distance', 'grad_tokenizer',
                             'grad_encoder', 'grad_predictor', 'lr', 'wd', 'momentum', 'skipped', 'images_per_s',
                             'data_wait'}
        assert all(math.isfinite(v) for v in line.values()) and line['epoch'] == line['step'] / 4
    stored = Run(straight).jepa().state_dict()
    for name in ('context', 'target'):
        encoder = Run(straight).encoder(name)
        assert all(torch.equal(v, stored[f'{name}.{k}']) for k, v in encoder.state_dict().items())


def test_config_is_the_caption_of_every_number(straight, data):
    stored = json.loads((straight / 'config.json').read_text())
    assert stored['ssl_split'] == 'all' and stored['contains_test_images'] is True
    assert stored['images'] == 32 and stored['skipped_images'] == [] and stored['seed'] == 0
    assert stored['data'] == data and stored['autocast'] == 'None' and stored['draws'] == DRAWS
    assert stored['machine']['device'] == 'cpu' and stored['machine']['torch'] == torch.__version__
    assert stored['machine']['hardware'] and stored['machine']['threads'] == 1
    assert set(Config.__dataclass_fields__) <= set(stored)


def test_the_training_split_alone_has_no_test_images(data, tmp_path):
    run = pretrain('demo', **{**TOY, 'epochs': 2}, data=data, ssl_split='train', out=tmp_path / 'run')
    assert run.stored['ssl_split'] == 'train' and run.stored['contains_test_images'] is False
    assert 0 < run.stored['images'] < 32


def test_feature_std_tells_a_constant_target(tmp_path, figure):
    training = toy(tmp_path)
    training.open(None)
    values, found = training.trainer.train_step(), []
    for _ in range(2):
        training.log(Line(values, 1, 1., 1.))
        found.append(training.metrics[-1]['feature_std'])
        training.jepa.target.forward = lambda images: torch.arange(16.).expand(len(images), 4, 16)
    alive, constant = found
    assert constant < 1e-6 < .1 < alive <= 1
    figure('08 feature std: constant encoder, fresh encoder', f'{constant:.1e}, {alive:.2f}')


def test_a_line_of_metrics_is_json_without_nan(tmp_path):
    training = toy(tmp_path, batch_size=1)
    training.open(None)
    values = training.trainer.train_step()
    training.log(Line(values, 1, 1., 1.))
    assert 'cosine' not in training.metrics[-1] and 'rankme' in training.metrics[-1]  # there is no pair of images
    training.jepa.target.forward = lambda images: torch.full((len(images), 4, 16), math.nan)
    training.log(Line(values, 1, 1., 1.))
    assert not {'cosine', 'rankme', 'feature_std', 'loss'} & set(training.metrics[-1])  # nor was a step made since
    assert 'lr' in training.metrics[-1]
    refuse = lambda word: pytest.fail(word)
    for text in (tmp_path / 'metrics.jsonl').read_text().splitlines(): json.loads(text, parse_constant=refuse)


# --- is it learning?

def signs(run): return [{k: v for k, v in m.items() if not k.startswith('knn')} for m in lines(run)]


def test_a_quick_knn_changes_no_bit_of_the_run_and_is_resumed(data, straight, tmp_path, monkeypatch, capsys, figure):
    run = tmp_path / 'run'
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        at_step(m, 11, lambda: signal.raise_signal(signal.SIGTERM))
        pretrain('demo', **{**TOY, 'knn_every': 1}, data=data, out=run)
    pretrain(out=run, resume=True)
    assert signs(run) == lines(straight) and distance(run, straight) == 0.
    looks = [m for m in lines(run) if 'knn' in m]
    assert [m['step'] for m in looks] == [4, 8, 12, 16, 20] and len({m['knn_random'] for m in looks}) == 1
    assert all(0 <= m['knn'] <= 100 and m['knn_images'] == looks[0]['knn_images'] > 1 for m in looks)
    assert 'too few labels' not in capsys.readouterr().out
    figure('08 with a quick k-NN every epoch, and without', 'the same run, max|Δ| = 0.0')


def test_the_random_figure_is_that_of_the_initial_weights(data, tmp_path):
    training = prepare(Config.of('demo', **{**TOY, 'knn_every': 1}, data=data, out=str(tmp_path / 'run')), Group())
    state = torch.get_rng_state()
    assert training.journal.knn_random == training.journal.quick_knn()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_labels_the_run_says_so_once(place, tmp_path, capsys):
    write_images(tmp_path / 'flat', 8, classes=('',))
    pretrain('demo', **{**TOY, 'knn_every': 1, 'epochs': 2}, data=f'folder:{tmp_path / "flat"}', out=tmp_path / 'run')
    out = capsys.readouterr().out
    assert out.count('too few labels') == 1 and 'early: too few steps to tell (no k-NN figure)' in out
    assert not any('knn' in m for m in lines(tmp_path / 'run'))


def test_labels_of_a_pool_are_looked_at_and_may_be_moved(tmp_path):
    write_images(tmp_path / 'pool', 32, size=40, classes=('',))
    lines = [f'{i:03}.png,{"ab"[i % 2]}' for i in range(24)]  # 8 pictures have no label
    (tmp_path / 'pool.csv').write_text('\n'.join(['file,label', *lines]) + '\n')
    run = pretrain('demo', **{**TOY, 'knn_every': 1, 'epochs': 2}, data=f'folder:{tmp_path / "pool"}',
                   labels=tmp_path / 'pool.csv', out=tmp_path / 'run')
    assert run.stored['images'] == len(run.pictures) == 32 and run.stored['labels'] == str(tmp_path / 'pool.csv')
    assert run.metrics[-1]['knn_images'] in (2, 3, 4)  # a fifth of each class, without those that are held out
    moved = (tmp_path / 'pool.csv').rename(tmp_path / 'moved.csv')
    refused(f'{tmp_path / "pool.csv"}: there is no such file any more', '--labels NEW.csv', out=run.folder, resume=True)
    pretrain(out=run.folder, resume=True, labels=moved)
    assert Run(run.folder).config.labels == str(moved) and Run(run.folder).metrics == run.metrics


def test_the_quick_knn_takes_pictures_that_have_a_label(monkeypatch):
    n, given = 60, {}
    labels = torch.where(torch.arange(n) % 4 == 0, torch.arange(n) % 3, -1)
    pool = ImageSet(torch.arange(n).view(n, 1, 1, 1), labels, torch.ones(n), list('abc'), 'toy', False, [])
    monkeypatch.setattr(module, 'load', lambda *_, **settings: given.update(settings) or pool)
    looking = labeled(Config(knn_every=1, labels='/photos.csv'), pool)
    assert given['labels'] == '/photos.csv' and looking.images.flatten().tolist() == list(range(0, n, 4))
    assert torch.equal(looking.labels, looking.images.flatten() % 3)


def test_the_quick_knn_takes_every_so_many_of_many_images(monkeypatch):
    def shown(n):
        images = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 1, 1)
        return ImageSet(images, torch.arange(n) % 3, torch.ones(n), list('abc'), 'toy', False, [])
    for n, left in ((100, 100), (10_001, 10_001), (25_000, 12_500)):
        monkeypatch.setattr(module, 'load', lambda *_, **__: shown(n))
        looking = labeled(Config(knn_every=1), shown(n))
        assert len(looking.images) == len(looking.labels) == left
        assert torch.equal(looking.labels, looking.images.flatten() % 3)


def test_an_alarm_is_printed_once_and_the_run_goes_on(data, tmp_path, capsys):
    run = pretrain('demo', **TOY, data=data, momentum=0., momentum_final=0., out=tmp_path / 'run')
    out = capsys.readouterr().out.splitlines()
    alarms = [line for line in out if line.startswith('copied: ')]
    assert len(alarms) == 2 and all('nbs/15_jepa.ipynb' in line for line in alarms)  # when it came, and at the end
    assert len(run.metrics) == 10 and run.step == 20


def test_another_alarm_is_printed_too(tmp_path, monkeypatch, capsys):
    "Every word when it comes, none twice in a row, also when there is calm between."
    words = iter(['early', 'copied', 'copied', 'early', 'copied', 'runaway', 'runaway', 'copied'])
    said = lambda word: dict(word=word, alarm=word != 'early', text=f'said {word}')
    monkeypatch.setattr(module, 'verdict', lambda metrics: said(next(words)))
    training = toy(tmp_path, epochs=2, log_every=1)
    training.open(None)
    training.fit()
    out = [line.strip() for line in capsys.readouterr().out.splitlines() if 'said' in line]
    assert out == ['said copied', 'said runaway', 'said copied']


# --- a loss that is no number

def diverging(monkeypatch, steps):
    "In these steps a gradient is NaN, as after an overflow."
    real = module.Trainer.train_step
    def train_step(self):
        if self.step + 1 not in steps: return real(self)
        handle = self.model.context.mask_token.register_hook(lambda g: g * math.nan)
        try: return real(self)
        finally: handle.remove()
    monkeypatch.setattr(module.Trainer, 'train_step', train_step)


@pytest.mark.parametrize('log_every', [1, 100])
def test_a_nan_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch, capsys, log_every, figure):
    diverging(monkeypatch, steps=(4, 5))
    run = tmp_path / 'run'
    with pytest.raises(SystemExit) as end: main(argv(data, run, checkpoint_minutes=0, log_every=log_every))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'nan or infinite at step 4:' in last and '--lr' in last and '--on-nan skip' in last and str(run) in last
    assert reached(run) == 3 and all(t.isfinite().all() for t in tensors(load_checkpoint(run)['model']))
    assert all(math.isfinite(m['loss']) for m in read_metrics(run))
    monkeypatch.undo()
    assert pretrain(out=run, resume=True, on_nan='skip').step == 20  # the way out that was named
    figure(f'07 NaN in step 4, a line of metrics every {log_every} steps',
           'stopped, step 4 named, checkpoint of step 3 kept')


def test_a_nan_can_be_skipped_and_is_counted(data, tmp_path, monkeypatch):
    diverging(monkeypatch, steps=(4, 5, 9))
    run = pretrain('demo', **TOY, data=data, on_nan='skip', out=tmp_path / 'run')
    assert [m['skipped'] for m in run.metrics] == [0, 1, 2, 2, 3, 3, 3, 3, 3, 3]  # steps 2, 4, …, 20
    assert all(math.isfinite(m['loss']) for m in run.metrics)
    state = run.checkpoint()
    assert all(t.isfinite().all() for t in tensors(state))
    assert {v['step'].item() for v in state['optimizer']['state'].values()} == {17}  # Adam has seen 20 - 3 steps
    assert pretrain(out=run.folder, resume=True, on_nan='stop').step == 20  # skipped as asked for: no reason to stop


def test_a_nan_before_the_first_checkpoint_speaks_of_none(data, tmp_path, monkeypatch, capsys):
    diverging(monkeypatch, steps=(2,))
    run = tmp_path / 'run'
    with pytest.raises(SystemExit): main(argv(data, run))
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'nan or infinite at step 2:' in last and 'start anew' in last and '--lr' in last
    assert 'checkpoint' not in last and '--resume' not in last and '--amp' not in last  # it is off already
    monkeypatch.undo()
    refused('has no checkpoint to go on from', 'another --out', out=run, resume=True)
    refused('has no checkpoint to go on from', out=run, resume=True, lr=.1)
    refused('ended before its first checkpoint', 'another --out', preset='demo', **TOY, data=data, out=run)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    training = toy(tmp_path)
    training.open(None)
    training.save()
    steps(training, 1)
    with torch.no_grad(): training.jepa.context.mask_token.fill_(math.inf)
    with pytest.raises(InputError, match='weights are nan or infinite at step 1'): training.save()
    assert load_checkpoint(tmp_path)['step'] == 0


def test_encoders_that_are_cut_while_saved_leave_the_old_ones(tmp_path, monkeypatch):
    training = toy(tmp_path)
    training.open(None)
    training.save()
    steps(training, 1)
    def cut(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / 'model.safetensors').write_bytes(b'half')
        raise OSError('no space left on device')
    with monkeypatch.context() as m:
        m.setattr(Encoder, 'save_pretrained', cut)
        with pytest.raises(InputError, match='context could not be written'): training.save()
    for name in ('context', 'target'): Run(tmp_path).encoder(name)
    training.save()
    assert not list(tmp_path.rglob('*.part'))


if __name__ == '__main__':
    torch.set_num_threads(1)
    record = dict(command='python tests/test_pretrain.py', machine=describe_machine(torch.device('cpu')), draws=DRAWS)
    GOLDEN.write_text(json.dumps({**record, 'losses': golden_losses()}, indent=1) + '\n')
