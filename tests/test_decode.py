"Pictures of every kind: the rules for pixels, what is no picture, reasons, names, and what the cache keeps of a file."
import builtins
import json
import os
import random
import struct
import sys
import types
import warnings
import zlib
from hashlib import sha256
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from scott.data import decode as module
from scott.data.decode import (VERSION, add_heif, decode, files_key, in_order, picture_suffixes, read_cache, reason_of,
                               shown, to_rgb, write_cache)

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
LEVELS = np.arange(24 * 36, dtype=np.int64).reshape(24, 36)                         # dark to bright, 0 … 863


def by_rules(picture, kind, **how):
    "Save, open, convert: pixels (h w 3), int, and notes."
    file = BytesIO()
    picture.save(file, kind, **how)
    with Image.open(file) as found:
        made, notes = to_rgb(found)
    assert made.mode == 'RGB' and made.size == picture.size
    return np.asarray(made).astype(int), notes


# --- deep gray

@pytest.mark.parametrize('kind, dtype, low, step, note', [
    ('png', np.uint16, 0, 1, '16 bit'), ('png', np.uint16, 40_000, 7, '16 bit'), ('tiff', np.uint16, 300, 50, '16 bit'),
    ('ppm', np.uint16, 300, 50, '16 bit'), ('tiff', np.int32, -2_000_000_000, 4_000_000, '32 bit'),
    ('tiff', np.float32, -.5, 1 / 864, 'float gray'), ('tiff', np.float32, -3e38, 6e35, 'float gray')])
def test_deep_gray_is_stretched_along_a_line(kind, dtype, low, step, note):
    pixels, notes = by_rules(Image.fromarray((LEVELS * step + low).astype(dtype)), kind)
    assert notes == (note,) and (pixels.min(), pixels.max()) == (0, 255)
    assert (np.abs(pixels - 255 * LEVELS[..., None] / LEVELS.max()) <= .501).all()  # rounded, no more


@pytest.mark.parametrize('dtype, value', [(np.uint16, 0), (np.uint16, 65_535), (np.int32, -9), (np.float32, .3)])
def test_a_constant_picture_becomes_black(dtype, value):
    assert not by_rules(Image.fromarray(np.full((9, 9), value, dtype)), 'tiff')[0].any()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_a_reason(value, tmp_path):
    values = LEVELS.astype(np.float32)
    values[3, 5] = value
    Image.fromarray(values).save(tmp_path / 'a.tiff')
    cached = write_cache(tmp_path / 'c.npy', [tmp_path / 'a.tiff'], 8, 'squash', 'x')
    assert cached.broken == {str(tmp_path / 'a.tiff'): 'some of its pixels are nan or infinite'}


def test_a_transparent_level_of_deep_gray():
    pixels, notes = by_rules(Image.fromarray((LEVELS * 60).astype(np.uint16)), 'png', transparency=60 * 400)
    assert notes == ('16 bit', 'transparent')
    assert (pixels[LEVELS == 400] == 255).all() and (pixels == 255).all(2).sum() < 5


def png_16_bit_color(values):
    "A PNG file of 16-bit color, which PIL can read but not write; values (h w 3)."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    head = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def test_16_bit_color_keeps_the_upper_bits_and_is_noted(tmp_path):
    values = np.random.default_rng(1).integers(0, 65_536, (16, 16, 3))
    (tmp_path / 'a.png').write_bytes(png_16_bit_color(values))
    found = decode(tmp_path / 'a.png', 16, 'squash')
    assert found.notes == ('16 bit color',)
    assert np.array_equal(found.pixels.transpose(1, 2, 0), values >> 8)


# --- transparency

def cut_out(mode):
    "A picture whose left half is transparent, above a color that must never be seen."
    if mode in ('RGBA', 'LA'):
        picture = RGB.convert(mode)
        picture.putalpha(Image.fromarray(np.where(np.arange(36) < 18, 0, 255).astype(np.uint8)[None].repeat(24, 0)))
        return picture, {}
    if mode == '1':
        return Image.fromarray((np.arange(36) >= 18)[None].repeat(24, 0)), dict(transparency=0)
    hidden = dict(L=77, P=3, RGB=(9, 8, 7))[mode]
    picture = Image.new(mode, (36, 24), hidden)
    if mode == 'P':
        picture.putpalette([200, 0, 0] * 8)
    picture.paste(dict(L=50, P=1, RGB=(50, 50, 50))[mode], (18, 0, 36, 24))
    return picture, dict(transparency=hidden)


@pytest.mark.parametrize('mode, kind', [
    ('RGBA', 'png'), ('RGBA', 'tiff'), ('RGBA', 'webp'), ('LA', 'png'), ('LA', 'tiff'), ('P', 'png'), ('P', 'gif'),
    ('L', 'png'), ('RGB', 'png'), ('1', 'png')])
def test_what_is_transparent_lies_on_white(mode, kind):
    picture, how = cut_out(mode)
    pixels, notes = by_rules(picture, kind, **how, **(dict(lossless=True, exact=True) if kind == 'webp' else {}))
    assert notes == ('transparent',) and (pixels[:, :18] == 255).all()
    shown_half = np.asarray(picture.convert('RGBA'))[:, 18:, :3]
    assert np.array_equal(pixels[:, 18:], shown_half) and (mode == '1' or (pixels[:, 18:] != 255).any())


@pytest.mark.parametrize('mode', ['PA', 'La', 'RGBa'])
def test_the_rarer_modes_with_transparency(mode):
    if mode == 'PA':
        picture = Image.new('PA', (4, 4), (0, 51))
        picture.putpalette([0, 0, 0], 'RGB')
    elif mode == 'La': picture = Image.new('LA', (4, 4), (0, 51)).convert('La')
    else: picture = Image.new('RGBA', (4, 4), (0, 0, 0, 51)).convert('RGBa')
    picture.tile = []                                                               # as of a file that was read
    made, notes = to_rgb(picture)
    assert notes == ('transparent',) and made.getpixel((0, 0)) == (204,) * 3        # black at 20 % on white


def test_a_half_transparent_color_is_mixed_with_white_and_an_opaque_one_is_no_note():
    pixels, notes = by_rules(Image.new('RGBA', (4, 4), (0, 0, 0, 128)), 'png')
    assert np.unique(pixels) == [127] and notes == ('transparent',)
    pixels, notes = by_rules(RGB.convert('RGBA'), 'png')
    assert np.array_equal(pixels, np.asarray(RGB)) and notes == ()


# --- the other modes, frames, rotation

@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'LAB', 'RGB'])
def test_modes_without_a_rule_of_their_own_are_converted_by_pil(mode):
    picture = RGB.convert(mode)
    pixels, notes = by_rules(picture, 'tiff')
    assert np.array_equal(pixels, np.asarray(picture.convert('RGB'))) and notes == ()


@pytest.mark.parametrize('kind', ['gif', 'tiff', 'webp', 'png', 'mpo'])
def test_the_first_of_several_frames(kind, tmp_path):
    pages = [Image.new('RGB', (32, 32), color) for color in ((250, 0, 0), (0, 0, 250))]
    path = tmp_path / f'a.{kind}'
    pages[0].save(path, kind, save_all=True, append_images=pages[1:], **(dict(lossless=True) if kind == 'webp' else {}))
    found = decode(path, 16, 'squash')
    assert found.notes == ('several frames',)
    assert (np.abs(found.pixels.astype(int) - np.array([250, 0, 0])[:, None, None]) < 5).all()
    pages[0].save(path, 'jpeg' if kind == 'mpo' else kind)
    assert decode(path, 16, 'squash').notes == ()


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('kind', ['png', 'webp', 'tiff'])
def test_the_rotation_tag(kind, turn, tmp_path):
    tag = Image.Exif()
    tag[0x0112] = turn
    RGB.save(tmp_path / 'a', kind, exif=tag, **(dict(lossless=True) if kind == 'webp' else {}))
    with Image.open(tmp_path / 'a') as picture:
        upright = ImageOps.exif_transpose(picture).convert('RGB')
    found = decode(tmp_path / 'a', 16, 'squash')
    assert found.aspect == (1.5 if turn < 5 else 1 / 1.5)
    assert np.array_equal(found.pixels.transpose(1, 2, 0), np.asarray(upright.resize((16, 16), Image.BICUBIC)))


@pytest.mark.parametrize('kind', ['png', 'webp', 'jpeg'])
def test_a_spoiled_exif_block_does_not_spoil_the_picture(kind, tmp_path):
    RGB.save(tmp_path / 'a', kind, exif=b'Exif\0\0garbage')
    assert decode(tmp_path / 'a', 16, 'squash').aspect == 1.5


def test_a_jpeg_is_decoded_small_for_the_squashed_view_only(tmp_path, monkeypatch):
    asked = []
    RGB.resize((640, 640)).save(tmp_path / 'a.jpg')
    monkeypatch.setattr(module, 'to_rgb', lambda picture: asked.append(picture.size) or to_rgb(picture))
    for fit in ('squash', 'center'):
        decode(tmp_path / 'a.jpg', 32, fit)
    assert asked == [(80, 80), (640, 640)]                                          # an eighth, at least twice 32


def test_the_hash_is_that_of_the_files_bytes(tmp_path):
    RGB.save(tmp_path / 'a.png')
    (tmp_path / 'copy.png').write_bytes((tmp_path / 'a.png').read_bytes())
    RGB.save(tmp_path / 'other.png', compress_level=0)                              # the same pixels
    views = (16, 'squash'), (8, 'center')
    found = [decode(tmp_path / name, *view).hash for name in ('a.png', 'copy.png') for view in views]
    assert set(found) == {sha256((tmp_path / 'a.png').read_bytes()).hexdigest()[:16]}
    assert decode(tmp_path / 'other.png', 16, 'squash').hash not in found


# --- which files are pictures

def test_suffixes():
    found = picture_suffixes()
    assert isinstance(found, frozenset) and all(s[0] == '.' and s == s.lower() for s in found)
    assert {'.jpg', '.jpeg', '.jfif', '.png', '.apng', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.mpo'} <= found
    assert not {'.h5', '.hdf', '.grib', '.bufr', '.wmf', '.emf', '.mpg', '.mpeg', '.pdf', '.npy', '.txt', ''} & found


@pytest.mark.parametrize('programs', [True, False])
def test_eps_needs_ghostscript(programs, monkeypatch):
    monkeypatch.setattr(module.EpsImagePlugin, 'has_ghostscript', lambda: programs)
    assert ('.eps' in picture_suffixes()) == programs


def test_whatever_can_be_saved_and_has_a_suffix_is_read(tmp_path):
    read = set()
    for suffix, kind in Image.registered_extensions().items():
        if suffix not in picture_suffixes() or kind not in Image.SAVE.keys() - read - {'ICNS'}:    # slow to make
            continue
        for mode in ('RGB', 'P', 'L', '1'):                                         # the first one that the format has
            try: RGB.resize((32, 32)).convert(mode).save(tmp_path / f'a{suffix}')
            except (OSError, ValueError): continue                                  # not in this format
            break
        else: continue
        assert decode(tmp_path / f'a{suffix}', 16, 'squash').pixels.shape == (3, 16, 16), suffix
        read.add(kind)
    assert {'JPEG', 'PNG', 'TIFF', 'GIF', 'BMP', 'PPM', 'TGA', 'ICO', 'MPO', 'WEBP'} <= read


@pytest.fixture
def fresh():
    "Whether HEIC can be read is found out anew, before the test and after it."
    add_heif.cache_clear()
    yield
    add_heif.cache_clear()


def test_heic_is_read_if_pillow_heif_is_installed(monkeypatch, fresh):
    calls = []
    monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=lambda: calls.append(1)))
    assert add_heif() and add_heif() and calls == [1]


def test_heic_without_pillow_heif_is_no_picture_and_the_reason_names_it(monkeypatch, fresh, tmp_path):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)                           # the import fails
    assert not add_heif()
    (tmp_path / 'a.jpg').write_bytes(b'\0\0\0\x1cftypheic\0\0\0\0mif1heic')           # a phone's, renamed
    with pytest.raises(OSError, match='pip install pillow-heif'): decode(tmp_path / 'a.jpg', 16, 'squash')


# --- broken files

def png_of(width, height):
    "The head of a PNG file, as far as its size."
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    check = zlib.crc32(b'IHDR' + head)
    return b'\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR' + head + struct.pack('>II', check, 99) + b'IDAT'


def spoiled(folder):
    "Files that are no pictures, and what the reason says."
    whole = BytesIO()
    RGB.resize((300, 300)).save(whole, 'jpeg')
    (folder / 'folder.jpg').mkdir()
    files = {'empty.jpg': (b'', 'the file is empty'),
             'text.jpg': (b'<!DOCTYPE html>', "begins with b'<!DOCTYPE html>'"),
             'short.jpg': (whole.getvalue()[:900], 'truncated'), 'byte.png': (b'\x89', 'begins with'),
             'head.jpg': (whole.getvalue()[:3], 'no picture that PIL can read'),
             'bomb.png': (png_of(60_000, 60_000), 'decompression bomb')}
    for name, (data, _) in files.items(): (folder / name).write_bytes(data)
    reasons = {name: words for name, (_, words) in files.items()}
    return {**reasons, 'folder.jpg': 'directory', 'gone.jpg': 'No such file'}


def test_every_broken_file_is_one_full_reason(tmp_path):
    words = spoiled(tmp_path)
    RGB.save(tmp_path / 'good.png')
    paths = [tmp_path / name for name in sorted([*words, 'good.png'])]
    cached = write_cache(tmp_path / 'c.npy', paths, 16, 'squash', 'x')
    assert len(cached.images) == 1 and cached.broken.keys() == {str(tmp_path / name) for name in words}
    for name, expected in words.items():
        reason = cached.broken[str(tmp_path / name)]
        assert expected in reason and '\n' not in reason and str(tmp_path) not in reason and 'Errno' not in reason


ODD = [struct.error('unpack requires 4 bytes'), EOFError(), zlib.error('Error -3'), MemoryError(),
       SyntaxError('no\nPNG'), OverflowError('too large'), KeyError(274), ValueError('buffer'), IndexError('range'),
       TypeError('None'),
       AttributeError('no tile'), RuntimeError('Failed'), RecursionError('deep'), AssertionError(),
       ZeroDivisionError('0'),
       NotImplementedError('kind 7'), UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid'),
       Image.DecompressionBombError('a bomb'), PermissionError(13, 'Permission denied', '/x/a.jpg')]


@pytest.mark.parametrize('error', ODD, ids=lambda e: type(e).__name__)
def test_any_exception_of_a_decoder_is_a_reason(error, tmp_path, monkeypatch):
    def fail(path, *how):
        if path.name == 'b.png': raise error
        return decode(path, *how)
    for name in 'abc': RGB.save(tmp_path / f'{name}.png')
    monkeypatch.setattr(module, 'decode', fail)
    cached = write_cache(tmp_path / 'c.npy', sorted(tmp_path.glob('*.png')), 16, 'squash', 'x')
    (path, reason), = cached.broken.items()
    assert Path(path).name == 'b.png' and reason == reason_of(error) and '\n' not in reason and '/x/' not in reason
    text = 'Permission denied' if type(error) is PermissionError else ' '.join(str(error).split())
    assert text in reason and (type(error).__name__ in reason or isinstance(error, (OSError, ValueError)))
    assert len(cached.images) == len(cached.hashes) == 2


@pytest.mark.parametrize('error, again', [(MemoryError(), True), (PermissionError(13, 'Permission denied'), True),
                                          (OSError(24, 'Too many open files'), True), (OSError('truncated'), False),
                                          (IndexError('out of range'), False)])
def test_what_the_system_refused_is_tried_again(error, again, tmp_path, monkeypatch):
    def fail(*_): raise error
    RGB.save(tmp_path / 'a.png')
    monkeypatch.setattr(module, 'decode', fail)
    cached = write_cache(tmp_path / 'c.npy', [tmp_path / 'a.png'], 16, 'squash', 'x')
    assert len(cached.broken) == 1 and (read_cache(tmp_path / 'c.npy') is None) == again
    monkeypatch.setattr(module, 'readable', lambda _: False)                        # still no permission: no use
    assert read_cache(tmp_path / 'c.npy').broken == cached.broken


def test_mutilated_files_are_read_or_given_a_reason(tmp_path):
    "Cuts and wrong bytes in files of many formats; no exception gets through."
    whole, chance = [], random.Random(0)
    for kind in ('png', 'gif', 'tiff', 'bmp', 'ppm', 'pcx', 'tga', 'jpeg', 'webp', 'avif', 'blp', 'dds', 'ico', 'sgi'):
        if f'.{kind}' not in picture_suffixes(): continue
        file = BytesIO()
        RGB.convert('P' if kind == 'blp' else 'RGB').save(file, kind)
        whole.append(file.getvalue())
    for i in range(600):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((0, 1, 5, 20))): data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / f'{i:03}.jpg').write_bytes(data[:chance.randrange(2 * len(data))])
    paths = sorted(tmp_path.glob('*.jpg'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cached = write_cache(tmp_path / 'c.npy', paths, 16, 'squash', 'x')
    assert len(cached.images) + len(cached.broken) == 600 and len(cached.images) > 50 and len(cached.broken) > 50
    assert all(reason and '\n' not in reason for reason in cached.broken.values())


# --- names

@pytest.mark.parametrize('name, expected', [
    (b'caf\xe9.jpg', r'caf\xe9.jpg'), ('café 日本.jpg'.encode(), 'café 日本.jpg'),
    (b'a\nb\x1b[2J.jpg', r'a\nb\x1b[2J.jpg'),
    (b'\xff\xfe', r'\xff\xfe'), (b"it's.jpg", "it's.jpg")])
def test_names_can_be_printed(name, expected, monkeypatch):
    path = Path(os.fsdecode(b'/data/' + name))
    assert shown(path) == shown(str(path)) == '/data/' + expected
    for encoding in ('ascii', 'cp1252', 'utf-8'):
        monkeypatch.setattr(sys, 'stdout', TextIOWrapper(BytesIO(), encoding))
        said = shown(path)
        print(said, flush=True)                                                     # no UnicodeEncodeError
        assert '\n' not in said and said.encode(encoding)


# --- the cache

def test_notes_and_hashes_are_kept(tmp_path):
    RGB.save(tmp_path / 'a.png')
    for i in range(2): Image.fromarray((LEVELS * (i + 1)).astype(np.uint16)).save(tmp_path / f'deep{i}.png')
    Image.new('RGBA', (9, 9)).save(tmp_path / 'empty.png')
    (tmp_path / 'broken.png').write_bytes(b'x')
    paths = sorted(tmp_path.glob('*.png'))
    for fit in ('squash', 'center'):
        made = write_cache(tmp_path / f'{fit}.npy', paths, 16, fit, 'x')
        assert made.notes == {'16 bit': 2, 'transparent': 1}
        assert made.hashes == [sha256(p.read_bytes()).hexdigest()[:16] for p in paths if p.name != 'broken.png']
        again = read_cache(tmp_path / f'{fit}.npy')
        assert again[1:] == made[1:] and (again.images == made.images).all()


def test_a_note_of_an_earlier_version_is_not_read_as_new(tmp_path, capsys):
    RGB.save(tmp_path / 'a.png')
    path = tmp_path / 'c.npy'
    write_cache(path, [tmp_path / 'a.png'], 16, 'squash', 'x')
    note = json.loads(path.with_suffix('.json').read_text())
    for gone in ('hashes', 'notes'):
        path.with_suffix('.json').write_text(json.dumps({k: v for k, v in note.items() if k != gone}))
        assert read_cache(path) is None and gone in capsys.readouterr().out
    assert path.exists() and path.with_suffix('.json').exists()


def test_another_version_has_caches_of_its_own(tmp_path, monkeypatch):
    RGB.save(tmp_path / 'a.png')
    now = files_key([tmp_path / 'a.png'], 16, 'squash')
    monkeypatch.setattr(module, 'VERSION', 1)
    assert VERSION == 2 and files_key([tmp_path / 'a.png'], 16, 'squash') != now


def test_a_file_that_vanishes_has_a_key(tmp_path):
    RGB.save(tmp_path / 'a.png')
    before = files_key([tmp_path / 'a.png'], 16, 'squash')
    (tmp_path / 'a.png').unlink()
    assert files_key([tmp_path / 'a.png'], 16, 'squash') not in ('', before)


def test_results_come_in_order_and_few_wait(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 3)
    started, most = [], 0
    def work(i):
        started.append(i)
        return i
    for n, found in enumerate(in_order(work, range(200), ahead=8), 1):
        assert found == n - 1
        most = max(most, len(started) - n)
    assert n == 200 and most <= 8


def test_the_bytes_of_a_large_file_are_not_held(tmp_path, monkeypatch):
    "A hash needs one block at a time, however large the file."
    sizes = []
    class Spy:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def __getattr__(self, name): return getattr(self.file, name)
        def read(self, n=-1):
            data = self.file.read(n)
            sizes.append(len(data))
            return data
    (tmp_path / 'a.jpg').write_bytes(b'no picture' * 1_000_000)
    monkeypatch.setattr(module, 'open', lambda *how: Spy(builtins.open(*how)), raising=False)
    with pytest.raises(OSError, match='no picture'): decode(tmp_path / 'a.jpg', 16, 'squash')
    assert max(sizes) <= 1 << 20 and sum(sizes) >= 10_000_000
