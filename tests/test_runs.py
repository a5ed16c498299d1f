"""Checkpoints: whole or refused, the one before kept, full disks, kills while saving, and a run told to stop."""
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from scott.cli import InputError
from scott.encoder import Encoder
from scott.train.files import clear_parts, digest, load_checkpoint, only_writer, step_of, write_atomic, write_checkpoint
from scott.train.run import save_encoder
from scott.train.trainer import StopSignal

ROOT = Path(__file__).resolve().parent.parent


def state_of(step, n=500):
    "All that a training state holds: nested containers, several types, an empty tensor, one without axes."
    g = torch.Generator().manual_seed(step)
    return {'step': step, 'jepa': {'w': torch.randn(n, generator=g), 'half': torch.randn(7, 3, generator=g).bfloat16()},
            'optimizer': {'state': {0: {'step': torch.tensor(float(step)), 'avg': torch.randn(3, 5, generator=g)}},
                          'groups': [{'lr': 1e-3, 'betas': (.9, .999), 'fused': True, 'found': None}]},
            'rng': torch.randint(0, 256, (40,), generator=g, dtype=torch.uint8),
            'mask': torch.rand(9, generator=g) > .5,
            'empty': torch.zeros(0, 4), 'identity': {'data': 'petals', 'seed': 3}}


def same(a, b):
    "Bit for bit, types and order of keys included."
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
                and a.requires_grad == b.requires_grad
                and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
                if a.dtype != torch.bfloat16 else isinstance(b, torch.Tensor) and b.dtype == a.dtype
                and same(a.view(torch.int16), b.view(torch.int16)))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def names(run):
    return sorted(p.name for p in Path(run).iterdir())


def script(code, *args):
    "Run Python code in a process of its own; what it prints, as JSON."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- what is written comes back, and only what was written

def test_what_was_written_comes_back(tmp_path):
    state = state_of(7)
    write_checkpoint(tmp_path, state)
    assert same(load_checkpoint(tmp_path), state) and names(tmp_path) == ['checkpoint.pt']
    assert 'sha256' not in state
    write_checkpoint(tmp_path, load_checkpoint(tmp_path))  # what was loaded can be written again
    assert same(load_checkpoint(tmp_path), state)


def flips(run, places):
    "Flip a bit at that many places of a checkpoint, one at a time; how many were refused and how many had no effect."
    state, path, chance = state_of(1), run / 'checkpoint.pt', random.Random(0)
    write_checkpoint(run, state)
    whole, refused, harmless = path.read_bytes(), 0, 0
    for at in (i * len(whole) // places for i in range(places)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1:])
        try: loaded = load_checkpoint(run)
        except InputError as e:
            assert str(path) in str(e)
            refused += 1
        else:
            assert same(loaded, state), f'byte {at}'
            harmless += 1
    assert refused > places / 3 and refused + harmless == places
    return refused, harmless


def test_flipped_bits_are_refused_or_without_effect(tmp_path):
    flips(tmp_path, 40)


@pytest.mark.slow
def test_600_flipped_bits_are_refused_or_without_effect(tmp_path, figure):
    refused, harmless = flips(tmp_path, 600)
    figure('03 a flipped bit in a checkpoint',
           f'600 places: {refused} refused, {harmless} without effect (padding), 0 loaded otherwise')


def test_a_changed_flag_is_refused(tmp_path):
    "Whether a tensor requires gradients is no content: only the archive's checksum covers it."
    write_checkpoint(tmp_path, {'step': 1, 'w': torch.ones(3)})
    path = tmp_path / 'checkpoint.pt'
    whole = bytearray(path.read_bytes())
    at = whole.index(b'\x89', whole.index(b'data.pkl'))  # pickle's False, the tensor's requires_grad
    whole[at] = 0x88  # True
    path.write_bytes(whole)
    assert torch.load(path)['w'].requires_grad and digest(torch.load(path)['w']) == digest(torch.ones(3))
    with pytest.raises(InputError, match='a checksum differs'): load_checkpoint(tmp_path)


def test_truncated_files_are_refused(tmp_path, figure):
    path = tmp_path / 'checkpoint.pt'
    write_checkpoint(tmp_path, state_of(1))
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 22, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r'checkpoint\.pt is damaged'): load_checkpoint(tmp_path)
    figure('03 a checkpoint cut short', '7/7 lengths refused')


def renamed(state):
    "The same tensors under another name."
    return {**state, 'jepa': {'v' if k == 'w' else k: v for k, v in state['jepa'].items()}}

FOREIGN = {
    'wrong-keyed': lambda s: renamed(s),
    'a weight changed': lambda s: {**s, 'jepa': {**s['jepa'], 'w': s['jepa']['w'] + 1}},
    'a part left out': lambda s: {k: v for k, v in s.items() if k != 'rng'}, 'step changed': lambda s: {**s, 'step': 9},
    'another shape': lambda s: {**s, 'rng': s['rng'].view(2, 20)}, 'one more key': lambda s: {**s, 'more': 1},
    'a list': lambda s: [1, 2], 'a tensor': lambda s: torch.ones(3), 'code': lambda s: {**s, 'code': os.getcwd}}

@pytest.mark.parametrize('change', FOREIGN)
def test_files_with_other_content_are_refused(tmp_path, change):
    "Each is a sound archive without a wrong checksum."
    state = state_of(1)
    state['sha256'] = digest(state)
    torch.save(FOREIGN[change](state), tmp_path / 'checkpoint.pt')
    with pytest.raises(InputError, match=r'checkpoint\.pt is damaged'): load_checkpoint(tmp_path)


def test_without_a_digest_is_refused_with_that_reason(tmp_path):
    torch.save(state_of(1), tmp_path / 'checkpoint.pt')
    with pytest.raises(InputError, match=r'checkpoint\.pt is damaged \(it has no digest'): load_checkpoint(tmp_path)


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    write_checkpoint(tmp_path, state_of(1))
    for bad in ({'step': 2, 'what': object()}, {'step': 2, 'what': {1, 2}}):
        with pytest.raises(TypeError, match="can't hold"): write_checkpoint(tmp_path, bad)
    for step, keep in ((2., 2), ('2', 2), (True, 2), (2, 0)):
        with pytest.raises(ValueError, match='step'): write_checkpoint(tmp_path, {'step': step}, keep)
    assert load_checkpoint(tmp_path)['step'] == 1 and names(tmp_path) == ['checkpoint.pt']


# --- the checkpoint before

@pytest.mark.parametrize('keep', [1, 2, 3])
def test_the_last_ones_are_kept(tmp_path, keep):
    for step in (5, 10, 15, 20): write_checkpoint(tmp_path, state_of(step), keep)
    older = [5, 10, 15][4 - keep:]
    assert names(tmp_path) == sorted([*(f'checkpoint-{s}.pt' for s in older), 'checkpoint.pt'])
    assert same(load_checkpoint(tmp_path), state_of(20))
    for s in older:
        os.replace(tmp_path / f'checkpoint-{s}.pt', tmp_path / 'checkpoint.pt')
        assert same(load_checkpoint(tmp_path), state_of(s))


def test_the_same_step_again_and_an_older_one(tmp_path):
    for step in (5, 10, 10): write_checkpoint(tmp_path, state_of(step))
    assert names(tmp_path) == ['checkpoint-5.pt', 'checkpoint.pt']
    for step in (15, 20): write_checkpoint(tmp_path, state_of(step), 4)
    os.replace(tmp_path / 'checkpoint-5.pt', tmp_path / 'checkpoint.pt')  # someone goes back …
    write_checkpoint(tmp_path, state_of(7))
    assert names(tmp_path) == ['checkpoint-5.pt', 'checkpoint.pt']  # … and what came after is not the one before
    (tmp_path / 'checkpoint-best.pt').write_bytes(b'of the user')
    write_checkpoint(tmp_path, state_of(8), 1)
    assert names(tmp_path) == ['checkpoint-best.pt', 'checkpoint.pt']


def test_older_ones_are_read_by_their_step(tmp_path):
    for step in (5, 10, 15): write_checkpoint(tmp_path, state_of(step), 3)
    for step in (5, 10, 15): assert same(load_checkpoint(tmp_path, step), state_of(step))
    assert same(load_checkpoint(tmp_path), state_of(15))
    with pytest.raises(InputError, match=r'checkpoint-7\.pt is not there'): load_checkpoint(tmp_path, 7)
    (tmp_path / 'checkpoint.pt').unlink()
    assert same(load_checkpoint(tmp_path, 10), state_of(10))
    with pytest.raises(InputError, match=r'mv \S*/checkpoint-10\.pt \S*/checkpoint\.pt'): load_checkpoint(tmp_path)


def test_without_links_the_file_is_copied(tmp_path, monkeypatch):
    def refused(*args): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', refused)
    for step in (5, 10): write_checkpoint(tmp_path, state_of(step))
    assert names(tmp_path) == ['checkpoint-5.pt', 'checkpoint.pt']
    os.replace(tmp_path / 'checkpoint-5.pt', tmp_path / 'checkpoint.pt')
    assert same(load_checkpoint(tmp_path), state_of(5))


def test_an_unreadable_checkpoint_is_not_kept(tmp_path):
    for present in (b'half', None):
        if present: (tmp_path / 'checkpoint.pt').write_bytes(present)
        else: torch.save({'step': '../elsewhere'}, tmp_path / 'checkpoint.pt')
        write_checkpoint(tmp_path, state_of(5))
        assert names(tmp_path) == ['checkpoint.pt'] and load_checkpoint(tmp_path)['step'] == 5


def test_the_way_back_is_named_and_works(tmp_path):
    run = tmp_path / 'my run'
    run.mkdir()
    for step in (9, 10, 100): write_checkpoint(run, state_of(step), 3)
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: torch.save(state_of(1), p), Path.unlink):
        damage(run / 'checkpoint.pt')
        with pytest.raises(InputError) as refused: load_checkpoint(run)
        said = str(refused.value)
        assert str(run / 'checkpoint.pt') in said and 'checkpoint-9.pt, checkpoint-10.pt' in said
    subprocess.run(said[said.index('mv '):].split(';')[0], shell=True, check=True)
    assert same(load_checkpoint(run), state_of(10)) and names(run) == ['checkpoint-9.pt', 'checkpoint.pt']
    (run / 'checkpoint-9.pt').unlink()
    os.link(run / 'checkpoint.pt', run / 'checkpoint-10.pt')  # as a kill between link and replacement leaves it
    (run / 'checkpoint.pt').write_bytes(b'')  # the same bytes under both names: no way back
    with pytest.raises(InputError, match='no older one'): load_checkpoint(run)


def test_advice_names_only_what_can_be_read(tmp_path):
    for step in (5, 10, 15): write_checkpoint(tmp_path, state_of(step), 3)
    damaged = tmp_path / 'checkpoint-10.pt'
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match=r'10\.pt is damaged .*; the steps that can be read: 5, 15$'):
        load_checkpoint(tmp_path, 10)
    with pytest.raises(InputError, match=r'7\.pt is not there: the steps that can be read: 5, 15$'):
        load_checkpoint(tmp_path, 7)
    (tmp_path / 'checkpoint.pt').write_bytes(b'')
    with pytest.raises(InputError, match=r'one \(checkpoint-5\.pt\): mv \S*checkpoint-5\.pt '): load_checkpoint(tmp_path)
    (tmp_path / 'checkpoint-5.pt').write_bytes(b'')
    with pytest.raises(InputError, match='no older one that is whole') as e: load_checkpoint(tmp_path)
    assert 'mv ' not in str(e.value)


# --- one writer

HOLD = '''
import sys, time
from pathlib import Path
from scott.train.files import only_writer
with only_writer(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(90)
'''

def entered(run, wait=0.):
    "What comes of the attempt to write."
    try:
        with only_writer(run, wait): return 'free'
    except InputError as e: return str(e)


def test_a_second_writer_is_refused_and_a_killed_one_is_forgotten(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    other = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    try: said = entered(tmp_path)
    finally: other.kill()
    assert said.startswith(f'{tmp_path} is in use') and 'another --out' in said and '\n' not in said
    assert other.wait() == -signal.SIGKILL and (tmp_path / '.lock').exists() and entered(tmp_path) == 'free'


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path):
    lock = FileLock(tmp_path / '.lock', thread_local=False)
    lock.acquire()
    assert 'in use' in entered(tmp_path)
    threading.Timer(.3, lock.release).start()
    assert entered(tmp_path, wait=30.) == 'free'


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with only_writer(tmp_path / 'a' / 'b'): assert names(tmp_path / 'a' / 'b') == ['.lock']
    assert names(tmp_path) == []
    with only_writer(tmp_path / 'a' / 'b'): (tmp_path / 'a' / 'b' / 'config.json').write_text('{}')
    assert 'config.json' in names(tmp_path / 'a' / 'b')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').touch()
    with pytest.raises(KeyError):
        with only_writer(tmp_path / 'mine'): raise KeyError
    assert names(tmp_path / 'mine') == ['photo.jpg']


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_line(tmp_path, monkeypatch, capsys, number):
    def refused(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', refused)
    for _ in range(2): assert entered(tmp_path) == 'free'
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(str(tmp_path) in line and 'no locks' in line for line in said)
    assert set(names(tmp_path)) <= {'.lock'}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        said = entered(place)
        assert str(place) in said and 'name another --out' in said
    def refused(*args, **kwargs): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(os, 'open', refused)
    assert entered(tmp_path) == f'{tmp_path}: Permission denied: name another --out'


# --- a full disk

FULL = '''
import json, resource, signal, sys, torch
from pathlib import Path
from scott.cli import InputError
from scott.train.files import load_checkpoint, write_atomic, write_checkpoint
run = Path(sys.argv[1])
state = lambda step: {'step': step, 'a': torch.full((50_000,), float(step)), 'b': torch.arange(100)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for step in (1, 2): write_checkpoint(run, state(step))
size, said = (run / 'checkpoint.pt').stat().st_size, []
ways = [lambda: write_checkpoint(run, state(3)),
        lambda: write_atomic(run / 'checkpoint.pt', lambda part: torch.save({**state(3), 'sha256': '0' * 64}, part)),
        lambda: write_atomic(run / 'checkpoint.pt', lambda part: part.write_bytes(bytes(size)))]
for limit in (10, 1000, size // 2, size - 1000, size - 10):
    for way in ways:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try: way()
        except InputError as e: said.append(str(e))
        else: said.append('nothing')
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert sorted(p.name for p in run.iterdir()) == ['checkpoint-1.pt', 'checkpoint.pt']
        assert load_checkpoint(run)['step'] == 2
write_checkpoint(run, state(3))
assert load_checkpoint(run)['step'] == 3
print(json.dumps(said))
'''

def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, figure):
    said = script(FULL, tmp_path)
    assert len(said) == 15
    for line in said:
        assert line.startswith(f'{tmp_path / "checkpoint.pt"} could not be written') and '\n' not in line
        assert 'there is no room' in line and 'the previous file is intact' in line
    figure('02 a full disk: 15 writes cut by the system', '15/15 one line of error, the checkpoint before it loads')


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize('where', ['torch.save', 'os.fsync', 'os.replace'])
def test_refusals_of_the_system(tmp_path, monkeypatch, number, where):
    write_checkpoint(tmp_path, state_of(1))
    def refused(*args): raise OSError(number, os.strerror(number))
    with monkeypatch.context() as m:
        m.setattr(where, refused)
        with pytest.raises(InputError) as e: write_checkpoint(tmp_path, state_of(2))
    why = os.strerror(number) if number == errno.EIO else 'there is no room'
    assert all(words in str(e.value) for words in (str(tmp_path / 'checkpoint.pt'), why, 'previous file is intact'))
    assert same(load_checkpoint(tmp_path), state_of(1)) and not list(tmp_path.glob('.*'))
    write_checkpoint(tmp_path, state_of(2))
    assert names(tmp_path) == ['checkpoint-1.pt', 'checkpoint.pt']


def test_a_system_that_flushes_only_what_is_open_for_writing(tmp_path, monkeypatch):
    "As Windows does, where a folder can't be opened at all."
    flush, opened, flushed = os.fsync, os.open, []
    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, 'Bad file')
        flushed.append(flush(number))
    def only_files(path, *args, **kwargs):
        if os.path.isdir(path) and not kwargs: raise PermissionError(errno.EACCES, 'Permission denied')
        return opened(path, *args, **kwargs)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'open', only_files)
    for step in (1, 2): write_checkpoint(tmp_path, state_of(step))
    save_encoder(Encoder(img_size=32, embed_dim=8, depth=1, num_heads=1), tmp_path / 'target', 2)
    assert len(flushed) == 4 and same(load_checkpoint(tmp_path), state_of(2))  # two checkpoints, two files
    assert names(tmp_path) == ['checkpoint-1.pt', 'checkpoint.pt', 'target']


def test_a_file_that_another_program_has_open(tmp_path, monkeypatch):
    "Windows refuses to replace it."
    write_checkpoint(tmp_path, state_of(1))
    def refused(*args): raise PermissionError(errno.EACCES, 'Access is denied')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', refused)
        with pytest.raises(InputError, match='Access is denied.*; the previous file is intact'):
            write_checkpoint(tmp_path, state_of(2))
    assert same(load_checkpoint(tmp_path), state_of(1)) and not list(tmp_path.glob('.*'))


def test_no_file_stays_open(tmp_path):
    def opened(): return [os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')]
    def mapped(): return Path('/proc/self/maps').read_text()
    for step in (1, 2): write_checkpoint(tmp_path, state_of(step))
    assert step_of(tmp_path / 'checkpoint.pt') == 2 and load_checkpoint(tmp_path, 1)['step'] == 1
    assert not [name for name in opened() if str(tmp_path) in name] and str(tmp_path) not in mapped()


def test_no_file_before_is_not_called_intact(tmp_path):
    (tmp_path / 'file').touch()
    for place in (tmp_path / 'nowhere', tmp_path / 'file'):
        with pytest.raises(InputError, match='could not be written') as e:
            write_atomic(place / 'report.json', lambda part: part.write_text('{}'))
        assert 'intact' not in str(e.value) and str(place) in str(e.value)


@pytest.mark.parametrize('error', [RuntimeError('shapes differ'), torch.OutOfMemoryError('CUDA'), KeyError('w'),
                                   KeyboardInterrupt()])
def test_errors_that_are_not_about_writing_stay_what_they_are(tmp_path, error):
    def write(part):
        part.write_text('half')
        raise error
    with pytest.raises(type(error)) as e: write_atomic(tmp_path / 'file', write)
    assert e.value is error and names(tmp_path) == []


def test_a_full_disk_while_encoders_are_saved(tmp_path, monkeypatch):
    encoder = Encoder(img_size=32, embed_dim=8, depth=1, num_heads=1)
    save_encoder(encoder, tmp_path / 'target', 1)
    before = (tmp_path / 'target' / 'model.safetensors').read_bytes()
    def full(self, folder):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Encoder, 'save_pretrained', full)
        with pytest.raises(InputError, match='target could not be written .there is no room'):
            save_encoder(encoder, tmp_path / 'target', 1)
    assert (tmp_path / 'target' / 'model.safetensors').read_bytes() == before and names(tmp_path) == ['target']


# --- killed while saving

KILLED = '''
import json, os, random, signal, sys, time, torch
from pathlib import Path
from scott.train.files import clear_parts, load_checkpoint, older_checkpoints, write_checkpoint
torch.set_num_threads(1)
run, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
state = lambda step: {'step': step, 'weights': torch.full((500_000,), float(step))}

def saving(pipe):
    clear_parts(run)
    assert not list(run.glob('.*.part'))
    step = load_checkpoint(run)['step']
    os.write(pipe, f'{step} '.encode())
    while True:
        step += 1
        write_checkpoint(run, state(step))
        os.write(pipe, f'{step} '.encode())

begun = time.perf_counter()
for step in range(1, 11): write_checkpoint(run, state(step))
save, good, cut, last = (time.perf_counter() - begun) / 10, 0, 0, step
for _ in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try: saving(writing)
        finally: os._exit(1)
    os.close(writing)
    said = os.read(reading, 1000)  # it has loaded, and begins to save
    time.sleep(chance.uniform(0, 2.5 * save))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    while more := os.read(reading, 1000): said += more
    os.close(reading)
    done = int(said.split()[-1])  # the last step that was said to be saved
    there = load_checkpoint(run)
    good += max(last, done) <= there['step'] <= done + 1 and bool((there['weights'] == there['step']).all())
    cut += (run / '.checkpoint.pt.part').exists()
    last = there['step']
    assert all(torch.load(p)['step'] == s <= last for s, p in older_checkpoints(run).items())
clear_parts(run)
print(json.dumps(dict(good=good, cut=cut, saved=last, left=sorted(p.name for p in run.iterdir()))))
'''

def killed(run, kills):
    "Kill a process that saves, again and again; how many checkpoints were good, and how many writes were cut."
    said = script(KILLED, run, kills)
    assert said['good'] == kills and said['saved'] > 10
    assert 'checkpoint.pt' in said['left'] and not [name for name in said['left'] if 'part' in name]
    return said


def test_kills_while_saving(tmp_path):
    killed(tmp_path, 5)


@pytest.mark.slow
def test_100_kills_while_saving(tmp_path, figure):
    said = killed(tmp_path, 100)
    assert said['cut'] > 0
    figure('02 100 SIGKILLs during saving', '{good}/100 loadable, {cut} of them hit a half-written file'.format(**said))


def test_clear_parts_removes_only_temporary_files(tmp_path):
    for name in ('checkpoint.pt', 'a.part', '.hidden', '.curves.png.part'): (tmp_path / name).write_text('x')
    for name in ('.target.part', 'target'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text('{}')
    clear_parts(tmp_path)
    assert names(tmp_path) == ['.hidden', 'a.part', 'checkpoint.pt', 'target']
    assert names(tmp_path / 'target') == ['config.json']
    clear_parts(tmp_path / 'nowhere')


# --- told to stop

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_written_down(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.name is None and stop.code is None
        signal.raise_signal(number)
        assert stop.name == number.name and stop.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    said = capfd.readouterr().err.strip()
    assert said.startswith(f'{number.name}: saving a checkpoint') and '\n' not in said
    with StopSignal() as stop: assert stop.name is None  # the next one knows nothing of it


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError):
        with StopSignal():
            assert signal.getsignal(signal.SIGINT) is not before
            raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_elsewhere_than_in_the_main_thread_nothing_happens():
    seen, before = [], signal.getsignal(signal.SIGTERM)
    def work():
        with StopSignal() as stop: seen.append((stop.name, signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


STOPPED = '''
import json, os, signal, sys, time
from scott.train.trainer import StopSignal
codes = []
for numbers in ((15, 15), (2, 2), (15, 2), (2,)):
    child = os.fork()
    if not child:
        try:
            with StopSignal() as stop:
                for number in numbers:
                    signal.raise_signal(number)
                    time.sleep(.3)
            os._exit(stop.code - 100)
        finally: os._exit(99)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
'''

def test_the_second_signal_ends_the_process_at_once():
    assert script(STOPPED) == [128 + 15, 128 + 2, 128 + 2, 30]  # the last one had a single signal, and went on
