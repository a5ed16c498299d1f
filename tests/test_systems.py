"From one system to the next: Windows' rules for files, simulated on Linux, and devices that are not there."
import errno
import fcntl
import io
import mmap
import os
import sys

import numpy as np
import pytest
import torch
from conftest import write_images

import scott
from scott.data.decode import map_pixels, read_cache, write_cache
from scott.data.sets import load
from scott.encoder import Encoder
from scott.lab import bench
from scott.look import gallery
from scott.probe import table
from scott.probe.features import load_or_encode
from scott.train import pretrain
from scott.train.files import load_checkpoint, older_checkpoints, write_atomic, write_checkpoint
from scott.train.run import save_encoder

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='open and mapped files are looked up in /proc')
TINY = dict(img_size=48, depth=2, embed_dim=32, predictor_depth=1, epochs=2, batch_size=8)


def in_use(path):
    "Whether this process has the file open or mapped."
    path, used = os.path.realpath(path), set()
    for fd in os.listdir('/proc/self/fd'):
        try: used.add(os.readlink(f'/proc/self/fd/{fd}'))
        except FileNotFoundError: pass                        # the one that listed them
    with open('/proc/self/maps') as maps: used |= {line.rstrip('\n').split(maxsplit=5)[-1] for line in maps}
    return path in used


def windows_rules(patch):
    "No fsync of what is open for reading, no replacing of what is open or mapped, no MAP_, no hard links, cp1252."
    replace, unlink, fsync = os.replace, os.unlink, os.fsync
    def free(*paths):
        for path in paths:
            if in_use(path): raise PermissionError(errno.EACCES, 'The process cannot access the file', str(path))
    def new_replace(source, target):
        free(source, target)
        replace(source, target)
    def new_unlink(path, *, dir_fd=None):
        if dir_fd is None: free(path)
        unlink(path, dir_fd=dir_fd)
    def new_fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY: raise OSError(errno.EBADF, 'read only')
        fsync(fd)
    def no_link(*_): raise OSError(errno.EPERM, 'no hard links')
    for name, value in dict(replace=new_replace, unlink=new_unlink, fsync=new_fsync, link=no_link).items():
        patch.setattr(os, name, value)
    patch.delattr(os, 'posix_fallocate')
    for name in [n for n in dir(mmap) if n.startswith(('MAP_', 'PROT_'))]: patch.delattr(mmap, name)
    patch.setattr(io, 'text_encoding', lambda encoding, *_: encoding or 'cp1252')


@pytest.fixture
def windows(monkeypatch):
    windows_rules(monkeypatch)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A tiny run under Windows' rules, on images whose classes have names of any alphabet."
    home = tmp_path_factory.mktemp('systems')
    write_images(home / 'photos', 75, classes=('rose', 'Mädesüß', '日本'))
    with pytest.MonkeyPatch.context() as patch:
        windows_rules(patch)
        patch.setenv('SCOTT_CACHE', str(home / 'cache'))
        made = scott.pretrain('demo', data=f'folder:{home / "photos"}', out=str(home / 'run'), device='cpu', **TINY)
    return made


def test_the_rules_are_those_of_windows(windows, tmp_path):
    "The control: each of them refuses what it should."
    path, other = tmp_path / 'a.npy', tmp_path / 'b.npy'
    np.save(path, np.arange(99))
    np.save(other, np.arange(9))
    held = np.load(path, mmap_mode='r')
    for action in (lambda: os.replace(other, path), lambda: os.replace(path, other), path.unlink):
        with pytest.raises(PermissionError): action()
    del held
    with open(path, 'rb') as file:
        with pytest.raises(PermissionError): path.unlink()
        with pytest.raises(OSError): os.fsync(file.fileno())
    os.replace(other, path)
    path.unlink()
    with pytest.raises(UnicodeEncodeError): path.write_text('日本')


def test_a_run_its_probes_and_its_pictures(run, capsys):
    image = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    assert run.step > 0 and run.encoder('target').features(image).isfinite().all()
    for _ in range(2):                                        # the second time its features are there
        table.main([str(run.folder), '--probes', 'knn', '--device', 'cpu'])
    assert run.table()['classes'] == 3
    gallery.main([str(run.folder)])
    assert list(run.folder.rglob('*.html'))


def test_checkpoints(windows, tmp_path):
    for step in (1, 2, 3): write_checkpoint(tmp_path, dict(step=step, weights=torch.full((9,), step)))
    assert load_checkpoint(tmp_path)['step'] == 3 and list(older_checkpoints(tmp_path)) == [2]
    assert load_checkpoint(tmp_path, 2)['weights'].eq(2).all()


def test_an_encoder_is_saved_over_one_that_was_loaded(windows, tmp_path):
    encoder = Encoder(img_size=32, embed_dim=32, depth=1)
    save_encoder(encoder, tmp_path / 'target', 1)
    loaded = Encoder.from_pretrained(tmp_path / 'target')     # a copy of the file's numbers, not a map of them
    save_encoder(encoder, tmp_path / 'target', 2)
    assert torch.equal(loaded.mask_token, encoder.mask_token)


def spoil(path):
    "One wrong byte near the end, and a later time."
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10 ** 9))


def test_a_damaged_cache_is_written_anew(windows, tmp_path, capsys):
    paths = sorted(write_images(tmp_path / 'd', 6).rglob('*.png'))
    path = tmp_path / 'c.npy'
    good = write_cache(path, paths, 16, 'squash', 'x').images.clone()
    spoil(path)
    assert read_cache(path) is None and 'damaged' in capsys.readouterr().out
    assert torch.equal(write_cache(path, paths, 16, 'squash', 'x').images, good)
    assert not list(tmp_path.glob('*.part'))


def test_a_cache_that_another_process_made_meanwhile_is_used(windows, tmp_path, monkeypatch):
    paths = sorted(write_images(tmp_path / 'd', 6).rglob('*.png'))
    path = tmp_path / 'c.npy'
    theirs = write_cache(path, paths, 16, 'squash', 'x')      # held: it can't be replaced
    ours = write_cache(path, paths, 16, 'squash', 'x')
    assert torch.equal(ours.images, theirs.images) and not list(tmp_path.glob('*.part'))
    path.with_suffix('.json').unlink()                        # theirs is not finished: an error, and no half cache
    with pytest.raises(PermissionError): write_cache(path, paths, 16, 'squash', 'x')
    assert not list(tmp_path.glob('*.part'))


def test_an_interrupted_cache_leaves_no_file(windows, tmp_path, monkeypatch):
    paths = sorted(write_images(tmp_path / 'd', 6).rglob('*.png'))
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr('scott.data.decode.decode', interrupt)
    with pytest.raises(KeyboardInterrupt): write_cache(tmp_path / 'c.npy', paths, 16, 'squash', 'x')
    assert not list(tmp_path.glob('c*'))


def test_a_map_is_a_copy_on_write(windows, tmp_path):
    np.save(tmp_path / 'a.npy', np.zeros((4, 3, 8, 8), np.uint8))
    mapped = map_pixels(tmp_path / 'a.npy')
    mapped[:] = 7
    assert mapped.all() and not map_pixels(tmp_path / 'a.npy').any()


def test_damaged_features_are_made_again(windows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / 'cache'))
    data = load(f'folder:{write_images(tmp_path / "d", 6)}', size=32, fit='center')
    encoder = Encoder(img_size=32, embed_dim=32, depth=1).eval()
    path = load_or_encode(tmp_path, encoder, data).path
    good = load_or_encode(tmp_path, encoder, data).features.means.clone()
    spoil(path)
    assert torch.equal(load_or_encode(tmp_path, encoder, data).features.means, good)
    assert 'is damaged' in capsys.readouterr().out


def test_a_file_is_replaced_while_a_note_of_it_is_not_open(windows, tmp_path):
    for text in ('one', 'two'): write_atomic(tmp_path / 'a.json', lambda part: part.write_text(text))
    assert (tmp_path / 'a.json').read_text() == 'two' and len(list(tmp_path.iterdir())) == 1


# --- devices

@pytest.mark.parametrize('device', ['mps', 'xpu', 'cuda:9', 'cuda:256', 'tpu', 'meta', 'gpu'])
@pytest.mark.parametrize('command', ['scott_pretrain', 'scott_probe', 'scott_bench'])
def test_a_device_that_is_not_there_is_one_line(command, device, run, tmp_path, capsys):
    if device == 'mps' and torch.backends.mps.is_available(): pytest.skip('it is there')
    out = str(tmp_path / 'r')
    words = {'scott_pretrain': (pretrain.main, ['--preset', 'demo', '--data', run.config.data, '--out', out]),
             'scott_probe': (table.main, [str(run.folder)]), 'scott_bench': (bench.main, [])}
    main, argv = words[command]
    with pytest.raises(SystemExit) as left: main([*argv, '--device', device])
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith(f'{command}: --device {device}')
    assert 'use ' in said[0] and not (tmp_path / 'r').exists()


@pytest.mark.parametrize('device', ['mps', 'xpu', 'cuda:9', 'tpu'])
def test_in_python_as_well(device, run, tmp_path):
    if device == 'mps' and torch.backends.mps.is_available(): pytest.skip('it is there')
    with pytest.raises(ValueError, match=f'--device {device}'):
        scott.pretrain('demo', data=run.config.data, out=str(tmp_path / 'r'), device=device, **TINY)
    with pytest.raises(ValueError, match=f"map_location='{device}'.*cpu is always there") as error:
        Encoder.from_pretrained(run.folder / 'target', map_location=device)
    assert '\n' not in str(error.value) and not (tmp_path / 'r').exists()
