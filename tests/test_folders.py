"A folder of images: what is taken, what is left out, what is held out, and which line tells it."
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from scott.cli import InputError
from scott.data.folders import by_folders, held_out, read_folder, told, walk
from scott.data.sets import absolute, folder_files, load

COLORS = ('red', 'green', 'blue')


def picture(number):
    "A picture that no other number gives."
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 20, 3), np.uint8))


def put(root, *names):
    "A picture for each name, all different."
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(sum(map(ord, str(name)))).save(path)


def classes(root, n=12, kinds=COLORS, suffix='.png'):
    "n pictures in each class folder."
    put(root, *(f'{kind}/{i:02}{suffix}' for kind in kinds for i in range(n)))
    return root


def refused(*args, **kwargs):
    "The one line with which a folder is refused."
    with pytest.raises(InputError) as error:
        read_folder(*args, **kwargs)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    return said


# --- the walk

HIDDEN = ('.DS_Store', 'lost+found/x.png', '._00.png', '.ipynb_checkpoints/00-checkpoint.png', '__MACOSX/red/00.png',
          '@eaDir/00.png/thumb.jpg', 'Thumbs.db', 'desktop.ini', '.git/logo.png')


@pytest.mark.parametrize('name', HIDDEN)
@pytest.mark.parametrize('where', ['', 'red'])
def test_what_systems_leave_behind_is_no_data(tmp_path, name, where):
    classes(tmp_path)
    path = tmp_path / where / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(1).save(path, 'png')
    folder = read_folder(tmp_path)
    assert len(folder.kinds) == 36 and folder.classes == ['blue', 'green', 'red'] and '1 hidden' in told(folder)


def test_all_that_pil_opens_is_read_and_the_rest_is_counted_by_its_ending(tmp_path):
    kinds = dict(a='.jpg', b='.tif', c='.gif', d='.webp', e='.bmp', f='.jfif', g='.JPEG', h='.png')
    for kind, suffix in kinds.items(): put(tmp_path, *(f'{kind}/{i}{suffix}' for i in range(2)))
    for name in ('a/1.txt', 'b/2.txt', 'c/film.mpg', 'c/README'): (tmp_path / name).write_text('no picture')
    data = load(f'folder:{tmp_path}', size=16, cache=tmp_path / '.cache')
    assert data.labels.bincount().tolist() == [2] * 8 and '8 images' not in data.summary
    assert 'left out: 4 files (.mpg 1, .txt 2, no ending 1)' in data.summary


def test_phones_pictures_that_cannot_be_read_come_with_a_way_out(tmp_path, monkeypatch):
    classes(tmp_path)
    (tmp_path / 'red' / 'phone.HEIC').write_bytes(b'')
    monkeypatch.setattr('scott.data.folders.picture_suffixes', lambda: {'.png'})
    assert '1 file (.heic 1; pip install pillow-heif for .heic)' in told(read_folder(tmp_path))


def test_empty_folders_are_named(tmp_path):
    classes(tmp_path)
    (tmp_path / 'gold' / 'inner').mkdir(parents=True)
    (tmp_path / 'red' / 'later').mkdir()
    assert '2 empty folders (gold, red/later)' in told(read_folder(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    classes(tmp_path / 'disk')
    root = tmp_path / 'data'
    root.mkdir()
    for kind in COLORS: (root / kind).symlink_to(tmp_path / 'disk' / kind)
    (root / 'red' / 'loop').symlink_to(root)                  # a loop
    (root / 'red' / 'itself').symlink_to(root / 'red' / 'itself')
    (root / 'lost.png').symlink_to(tmp_path / 'nowhere.png')
    found = walk(root)
    assert len(found.names) == 36 and found.left == {'links to folders that are read already': 1,
                                                     'links that lead nowhere': 2}


def test_a_real_folder_wins_over_a_link_to_it(tmp_path):
    classes(tmp_path)
    (tmp_path / 'another').symlink_to(tmp_path / 'red')
    assert read_folder(tmp_path).classes == ['blue', 'green', 'red']


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0 and not hasattr(os, 'seteuid'), reason='permissions')
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    classes(tmp_path)
    scandir = os.scandir
    def locked(path):
        if Path(path).name == 'green': raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', locked)
    said = refused(tmp_path)
    assert 'green' in said and 'Permission denied' in said and 'make it readable' in said


def test_a_folder_that_vanishes_while_it_is_read_is_named(tmp_path, monkeypatch):
    classes(tmp_path)
    scandir = os.scandir
    def late(path):
        if Path(path).name == 'red': (tmp_path / 'green').rename(tmp_path.parent / 'elsewhere')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', late)
    said = refused(tmp_path)
    assert 'green' in said and 'No such file' in said and 'run the command again' in said


def test_the_order_does_not_depend_on_the_spelling(tmp_path):
    put(tmp_path, 'd/cafe\u0301.png', 'd/caff.png', 'd/cafz.png')
    put(tmp_path, 'e/caf\u00e9.png', 'e/caff.png', 'e/cafz.png')
    order = [[normalize('NFC', name) for name in walk(tmp_path / part).names] for part in 'de']
    assert order[0] == order[1] == ['caff.png', 'cafz.png', 'caf\u00e9.png']


def test_a_run_among_the_pictures_is_no_class(tmp_path):
    classes(tmp_path)
    put(tmp_path, 'run/curves.png', 'run/gallery/pca.png')
    (tmp_path / 'run' / 'config.json').write_text('{"preset": "demo", "data": "folder:.", "ssl_split": "all"}')
    folder = read_folder(tmp_path)
    assert folder.classes == ['blue', 'green', 'red'] and '1 run folder' in told(folder)
    (tmp_path / 'run' / 'config.json').write_text('{"any": "thing"}')      # what is no run stays a class
    assert 'run' in read_folder(tmp_path).classes


def test_names_that_are_no_utf_8(tmp_path):
    classes(tmp_path)
    try: picture(7).save(os.fsdecode(os.fsencode(tmp_path) + b'/red/\xff\xfe.png'))
    except OSError: pytest.skip('this file system takes no such names')
    data = load(f'folder:{tmp_path}', size=16, cache=tmp_path / '.cache')
    assert len(data) == 37 and data.summary.encode()
    with open(os.fsdecode(os.fsencode(tmp_path) + b'/red/\xff\xfe.png'), 'wb') as file: file.write(b'spoiled')
    with pytest.raises(InputError, match=r'\\xff\\xfe.png') as error:
        load(f'folder:{tmp_path}', size=16, cache=tmp_path / '.c')
    assert str(error.value).encode()


def test_a_file_that_vanishes_while_the_folder_is_read(tmp_path, monkeypatch):
    from scott.data import sets
    classes(tmp_path / 'd')
    def late(*args):
        files = folder_files(*args)
        files.paths[3].unlink()
        return files
    monkeypatch.setattr(sets, 'folder_files', late)
    with pytest.raises(InputError, match='1 of 36 images are broken') as error:
        load(f'folder:{tmp_path / "d"}', size=16, cache=tmp_path / 'c')
    assert 'No such file' in str(error.value) and '--on-bad-image skip' in str(error.value)


def test_an_archive_is_no_folder(tmp_path):
    (tmp_path / 'photos.zip').write_bytes(b'PK')
    assert 'unpack it' in refused(tmp_path / 'photos.zip')
    assert 'no such folder' in refused(tmp_path / 'photo')


# --- held-out images

def test_adding_and_removing_images_moves_no_other(tmp_path):
    classes(tmp_path, 40)
    def parts():
        folder = read_folder(tmp_path)
        return dict(zip(folder.found.names, folder.parts))
    before = parts()
    put(tmp_path, 'red/000-new.png', 'green/zz.png', 'gold/1.png')
    (tmp_path / 'blue' / '03.png').unlink()
    after = parts()
    assert len(after) == len(before) + 2 and all(after[name] == before[name] for name in after.keys() & before)
    assert {'train', 'test'} == set(before.values())


def test_the_split_moves_with_the_folder_and_not_with_the_spelling(tmp_path):
    classes(tmp_path / 'a', 30)
    put(tmp_path / 'a', *(f'caf\u00e9/{i}.png' for i in range(30)))
    before = {p.name for p in folder_files(tmp_path / 'a', 'test').paths}
    (tmp_path / 'a').rename(tmp_path / 'b')
    assert {p.name for p in folder_files(tmp_path / 'b', 'test').paths} == before
    assert all(held_out(f'caf\u00e9/{i}.png') == held_out(f'cafe\u0301/{i}.png') for i in range(30))


def test_a_class_without_held_out_images_is_named(tmp_path):
    names = [f'{i}.png' for i in range(99)]
    put(tmp_path, *(f'red/{n}' for n in [n for n in names if not held_out(f'red/{n}')][:4]),
        *(f'blue/{n}' for n in [n for n in names if held_out(f'blue/{n}')][:3]))
    said = told(read_folder(tmp_path))
    assert 'nothing held out of red' in said and 'nothing for training of blue' in said


def test_an_empty_split_says_what_to_do(tmp_path):
    put(tmp_path, *[f'red/{i}.png' for i in range(99) if not held_out(f'red/{i}.png')][:4])
    with pytest.raises(InputError, match='test split is empty.*--labels'): load(f'folder:{tmp_path}', 'test', 16)


# --- a given split

@pytest.mark.parametrize('train, test', [('train', 'val'), ('train', 'test'), ('Training', 'Validation'),
                                         ('train', 'valid'), ('TRAIN', 'Testing')])
def test_a_given_split_is_used(tmp_path, train, test):
    classes(tmp_path / train, 6), classes(tmp_path / test, 2)
    sets = [load(f'folder:{tmp_path}', s, 16, cache=tmp_path / '.c') for s in ('train', 'test')]
    assert [len(s) for s in sets] == [18, 6] and sets[0].classes == sets[1].classes == ['blue', 'green', 'red']
    assert all(Path(n).parts[-3] == part for s, part in zip(sets, (train, test)) for n in s.names)
    assert sets[0].how_split == 'given' and f'{train} against {test}' in sets[0].summary


def test_val_is_for_training_beside_test(tmp_path):
    for part, n in dict(train=6, val=3, test=2).items(): classes(tmp_path / part, n)
    folder = read_folder(tmp_path)
    assert folder.parts.count('test') == 6 and 'train and val against test' in told(folder)


def test_a_given_split_without_labels(tmp_path):
    put(tmp_path, *(f'train/{i}.png' for i in range(6)), *(f'test/{i}.png' for i in range(2)))
    folder = read_folder(tmp_path)
    assert folder.classes == [] and folder.parts.count('test') == 2 and 'no labels' in told(folder)


def test_a_class_may_be_called_train(tmp_path):
    classes(tmp_path, 5, ('bus', 'train'))
    assert read_folder(tmp_path).classes == ['bus', 'train']


def test_a_split_that_lacks_a_part(tmp_path):
    classes(tmp_path / 'a' / 'train')
    assert 'no test or val' in refused(tmp_path / 'a') and f'{tmp_path}/a/train' in refused(tmp_path / 'a')
    classes(tmp_path / 'b' / 'val'), classes(tmp_path / 'b' / 'test')
    assert 'no train' in refused(tmp_path / 'b')
    for part in ('train', 'val', 'unlabeled'): classes(tmp_path / 'c' / part)
    assert 'unlabeled lies beside' in refused(tmp_path / 'c')
    classes(tmp_path / 'd' / 'train'), classes(tmp_path / 'd' / 'val', 2, ('red', 'gold'))
    assert 'class gold' in refused(tmp_path / 'd')


def test_a_split_whose_test_part_has_no_classes(tmp_path):
    classes(tmp_path / 'train', 4)
    put(tmp_path, 'test/1.png', 'test/2.png')
    said = refused(tmp_path)
    assert '2 images' in said and 'the first is test/1.png' in said and f'give folder:{tmp_path}/train' in said
    assert 'no labels' not in told(read_folder(tmp_path / 'train'))


def test_pictures_beside_classes_are_named(tmp_path):
    classes(tmp_path, 4)
    put(tmp_path, 'cover.png')
    assert '1 image beside the class folders, the first is cover.png' in refused(tmp_path)


def test_a_split_with_a_level_too_many(tmp_path):
    for part in ('train', 'val'): classes(tmp_path / part / 'images', 3)
    said = refused(tmp_path)
    assert 'all pictures lie in images' in said and 'move these up, into train and val' in said
    with pytest.raises(InputError, match='give folder:x/data'):
        by_folders(Path('x'), ['data/train/a/1.png', 'data/val/a/1.png'])


# --- levels

def test_one_level_too_many_names_the_folder_to_give(tmp_path):
    classes(tmp_path / 'd' / 'images')
    said = refused(tmp_path / 'd')
    assert f'give folder:{tmp_path}/d/images' in said and 'blue, green, red' in said
    classes(tmp_path / 'e' / 'x' / 'y')
    assert f'give folder:{tmp_path}/e/x/y' in refused(tmp_path / 'e')


def test_a_single_class_tells_which_folder_to_give(tmp_path):
    put(tmp_path, *(f'photos/{i}.png' for i in range(20)))
    said = told(read_folder(tmp_path))
    assert 'one class gives no table' in said and f'folder:{tmp_path}/photos' in said
    assert 'no labels' in told(read_folder(tmp_path / 'photos'))


def test_no_folder_and_the_folder_of_a_run_are_refused(tmp_path):
    put(tmp_path, 'curves.png')
    (tmp_path / 'config.json').write_text('{"preset": "demo", "data": "petals", "ssl_split": "all"}')
    assert 'folder of a run' in refused(tmp_path)
    with pytest.raises(InputError, match='names no folder'):
        load('folder:', size=16)                                 # an empty variable of the shell
    assert absolute('folder:') == 'folder:' and absolute('folder:~/x') == f'folder:{Path.home() / "x"}'


def test_folders_within_a_class_belong_to_it(tmp_path):
    classes(tmp_path)
    put(tmp_path, 'red/may/1.png', 'red/june/2.png')
    assert read_folder(tmp_path).kinds.count('red') == 14


def test_many_classes_are_told_in_short(tmp_path):
    for k in range(30): put(tmp_path, *(f'class{k:02}/{i}.png' for i in range(2 + k % 3)))
    said = told(read_folder(tmp_path))
    assert '30 classes (2 to 4 images each)' in said and len(said) < 400


def test_many_endings_are_told_in_short(tmp_path):
    classes(tmp_path)
    for i in range(2000): (tmp_path / 'red' / f'DSC.{i:04}').touch()
    for i in range(3): (tmp_path / 'red' / f'{i}.txt').touch()
    said = told(read_folder(tmp_path))
    assert '2,003 files (' in said and '.txt 3, …)' in said and len(said) < 300


def test_class_folders_one_level_deeper_in_several_folders_are_told(tmp_path):
    classes(tmp_path / 'batch1', 5), classes(tmp_path / 'batch2', 5)
    assert 'each with folders in it (blue, green, red): if these are the classes' in told(read_folder(tmp_path))
    put(tmp_path, 'batch1/beside.png')
    assert 'each with folders' not in told(read_folder(tmp_path))


def test_two_spellings_of_a_class_are_one(tmp_path):
    put(tmp_path, 'caf\u00e9/1.png', 'cafe\u0301/2.png', 'tea/3.png')
    if len(list(tmp_path.iterdir())) < 3: pytest.skip('this file system makes one spelling of two')
    assert read_folder(tmp_path).classes == ['caf\u00e9', 'tea']
    put(tmp_path / 'flat', '\u00e9.png', 'e\u0301.png')
    (tmp_path / 'list.csv').write_text('file,label\n\u00e9.png,a\n', encoding='utf-8')
    assert 'two spellings' in refused(tmp_path / 'flat', tmp_path / 'list.csv')


def test_a_run_that_is_about_to_begin_is_no_empty_folder(tmp_path):
    classes(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '.lock').touch()
    assert '1 run folder' in told(read_folder(tmp_path)) and 'empty' not in told(read_folder(tmp_path))


def test_shares_without_numbers_lose_no_folder(tmp_path, monkeypatch):
    classes(tmp_path)
    stat = Path.stat
    def unnumbered(self, **how): return os.stat_result([*stat(self, **how)][:1] + [0] + [*stat(self, **how)][2:])
    monkeypatch.setattr(Path, 'stat', unnumbered)
    assert len(walk(tmp_path).names) == 36


# --- lists of labels

def listed(tmp_path, text, encoding='utf-8'):
    put(tmp_path / 'pool', *(f'{i}.png' for i in range(20)), 'sub/x.png')
    (tmp_path / 'list.csv').write_text(text, encoding=encoding)
    return tmp_path / 'pool', tmp_path / 'list.csv'


def test_a_list_gives_labels_to_a_part_of_a_pool(tmp_path):
    lines = ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(10))
    pool, file = listed(tmp_path, f'file,label\n{lines}sub\\x.png,a\n')
    folder = read_folder(pool, file)
    assert folder.classes == ['a', 'b'] and folder.kinds.count('') == 10 and '10 without a label' in told(folder)
    assert folder.how == 'names'
    assert all(part == 'train' for kind, part in zip(folder.kinds, folder.parts) if not kind)
    data = load(f'folder:{pool}', size=16, cache=tmp_path / 'c', labels=str(file))
    assert data.labels.tolist().count(-1) == 10 and len(data) == 21


def test_a_list_may_have_spaces_and_other_columns(tmp_path):
    pool, file = listed(tmp_path, 'id, file, label\n7, 1.png, a\n8, 2.png, "b, dark"\n')
    assert read_folder(pool, file).classes == ['a', 'b, dark']


def test_a_list_with_a_split(tmp_path):
    pool, file = listed(tmp_path, '\ufefffile,label,split\n' + ''.join(
        f'{i}.png,{"ab"[i % 2]},{"Test" if i < 4 else "train"}\n' for i in range(10)))
    sets = [load(f'folder:{pool}', s, 16, cache=tmp_path / 'c', labels=file) for s in ('train', 'test')]
    assert [Path(n).name for n in sets[1].names] == ['0.png', '1.png', '2.png', '3.png'] and len(sets[0]) == 17
    assert sets[0].how_split == 'labels' and 'list.csv' in sets[0].summary
    file.write_text('file,label,split\n1.png,a,train\n2.png,a,val\n3.png,a,test\n')
    assert 'its val for training' in told(read_folder(pool, file))


@pytest.mark.parametrize('text, word', [
    ('', 'it is empty'), ('file,label\n', 'names no picture'), ('file;label\n1.png;a\n', "'file;label'"),
    ('name,label\n1.png,a\n', 'first line'), ('file,label\n1.png,a\n99.png,a\n', 'line 3: there is no picture 99.png'),
    ('file,label\n1.png,a\n./1.png,b\n', 'line 3: ./1.png has a line above'), ('file,label\n1.png,\n', 'has no label'),
    ('file,label\n1.png\n', 'has no label'), ('file,label\n,a\n', 'names no file'),
    ('file,label\n1.png,cat, black\n', 'line 2: it has more fields'), ('file,label,label\n1.png,1,a\n', 'first line'),
    ('file,label\n"1\n.png",a\n', r'1\n.png'),
    ('file,label,split\n1.png,a,maybe\n', "split 'maybe'"), ('file,label,split\n1.png,a,train\n2.png,a,\n', "split ''"),
    ('file,label,split\n1.png,a,train\n', 'no test or val'), ('file,label,split\n1.png,a,test\n', 'no train'),
    ('file,label,split\n1.png,a,train\n2.png,b,test\n', 'class b')])
def test_a_list_that_is_wrong(tmp_path, text, word):
    pool, file = listed(tmp_path, text)
    said = refused(pool, file)
    assert word in said and (str(file) in said or 'class b' in said)


def test_a_list_that_cannot_be_read(tmp_path):
    pool, file = listed(tmp_path, 'file,label\nöl.png,a\n', 'latin-1')
    assert 'UTF-8' in refused(pool, file)
    assert 'No such file' in refused(pool, tmp_path / 'absent.csv')
    with pytest.raises(InputError, match='petals has labels of its own'): load('petals', labels=file)


# --- the line

def test_the_line_tells_what_was_converted(tmp_path):
    classes(tmp_path, 4)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(tmp_path / 'red' / 'deep.png')
    Image.new('RGBA', (9, 9), (0, 0, 0, 0)).save(tmp_path / 'red' / 'clear.png')
    picture(1).save(tmp_path / 'red' / 'film.gif', save_all=True, append_images=[picture(2)])
    data = load(f'folder:{tmp_path}', size=16, cache=tmp_path / '.c')
    for words in ('1 16 bit (each stretched', '1 transparent (laid on white)', '1 several frames (the first is taken)'):
        assert words in data.summary
    assert data.images[data.names.index(str(tmp_path / 'red' / 'clear.png'))].min() == 255
    (tmp_path / 'red' / 'torn.png').write_bytes(b'')
    data = load(f'folder:{tmp_path}', size=16, cache=tmp_path / '.c', on_bad_image='skip')
    assert '1 broken image left out' in data.summary


# --- the README's commands

def oddities(root):
    "A folder of three classes with everything in it that people's folders have."
    classes(root, 16, suffix='.jpg')
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(root / 'red' / 'deep.png')
    Image.new('RGBA', (20, 20), (0, 200, 0, 90)).save(root / 'green' / 'clear.png')
    picture(1).save(root / 'blue' / 'film.gif', save_all=True, append_images=[picture(2)])
    picture(3).save(root / 'blue' / 'scan.tif')
    picture(4).convert('CMYK').save(root / 'blue' / 'print.jpg')
    put(root, '.ipynb_checkpoints/00-checkpoint.jpg', '__MACOSX/red/00.jpg')
    for name in ('red/._00.jpg', 'red/Thumbs.db', 'green/notes.txt', 'film.mp4', 'labels.csv'):
        (root / name).write_bytes(b'no picture')
    (root / 'gold').mkdir()
    if os.name == 'nt': return root
    (root / 'red' / 'again').symlink_to(root)
    picture(5).save(os.fsdecode(os.fsencode(root) + b'/red/caf\xe9.png'))
    return root


def readme_section():
    text = (Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')
    return re.search(r'## Your own images\n(.*?)\n## ', text, re.S)[1]


def test_the_line_of_the_readme_is_what_a_folder_of_every_kind_gives(tmp_path):
    data = load(f'folder:{oddities(tmp_path)}', size=16, cache=tmp_path / '.c')
    assert data.summary in readme_section().splitlines()


@pytest.mark.slow
def test_the_commands_of_the_readme_work_on_a_folder_of_every_kind(tmp_path):
    "Word for word, but for the path; the package is installed already."
    commands = re.search(r'```sh\n(.*?)```', readme_section(), re.S)[1].splitlines()
    env = dict(os.environ, HOME=str(tmp_path), SCOTT_CACHE=str(tmp_path / 'cache'), OMP_NUM_THREADS='1',
               PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    said = []
    for command in commands:
        if command.startswith('pip install'): continue
        command = command.replace('PATH/TO/IMAGES', str(oddities(tmp_path / 'photos')) if not said else '')
        done = subprocess.run(['bash', '-c', command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(said) == 3 and said[0].splitlines()[0] in readme_section().splitlines()
    assert '3 classes' in said[1] and 'random initialization' in said[1]
    assert (tmp_path / 'runs' / 'mine' / 'gallery' / 'gallery.html').is_file()
    assert json.loads((tmp_path / 'runs' / 'mine' / 'config.json').read_text())['pictures'] in readme_section()
