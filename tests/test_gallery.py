"""The gallery of a tiny run: one file that needs no other, the same for a seed, and what the command refuses."""
import base64
import io
import json
import os
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from PIL import Image

from scott.look import gallery as gallery_module
from scott.look.gallery import (CAPTIONS, SAMPLE, Options, check_options, draw, draw_sample, enlarge, larger_pictures, main,
                                map_picture, page, png)
from scott.probe.features import source
from scott.train.config import Config, build, identity
from scott.train.files import write_checkpoint
from scott.train.run import Run

TOY = dict(img_size=64, embed_dim=32, depth=2, predictor_depth=1, num_heads=2, device='cpu')
ALL = ['pca', 'pca_large', 'attention', 'attention_large', 'search', 'search_large', 'pairs', 'prediction', 'map', 'masks']


def write_run(run, checkpoint=True, **changes):
    "A run folder as `pretrain` leaves it, without training: the weights are a little moved."
    cfg = Config.of('demo', **{**TOY, 'data': f'folder:{run.parent}/images', 'out': str(run), **changes})
    run.mkdir()
    (run / 'config.json').write_text(json.dumps({**asdict(cfg), 'images': 60}))
    (run / 'metrics.jsonl').write_text('{"step": 1300}\n')  # younger than the last save
    jepa, g = build(cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in jepa.parameters(): p.add_(.02 * torch.randn(p.shape, generator=g))
    for name in ('context', 'target'): getattr(jepa, name).save_pretrained(run / name)
    if checkpoint: write_checkpoint(run, dict(step=1234, model=jepa.state_dict(), identity=identity(cfg, images=60)))
    return run


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gallery')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SCOTT_CACHE', str(folder / 'cache'))
        write_images(folder / 'images', 77, 80)  # 3 classes, 12 test images
        write_run(folder / 'run')
        yield folder


@pytest.fixture(scope='module')
def gallery(place):
    main([str(place / 'run'), '--images', '3', '--out', str(place / 'first')])
    return place / 'first'


class Reader(HTMLParser):
    "What a document refers to, its pictures and its text."
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.said, self.pictures, self.links = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == 'img': self.pictures.append((attrs['src'], attrs['alt']))
        self.links += [v for k, v in attrs.items() if k in ('href', 'src', 'srcset', 'data', 'action', 'background')]

    def handle_data(self, data): self.said.append(data)


def test_one_file_that_needs_no_other(gallery):
    text = (gallery / 'gallery.html').read_text()
    document = Reader(text)
    assert len(document.pictures) == len(ALL) == document.tags.count('figcaption')
    assert all(link.startswith('data:image/png;base64,') for link in document.links)
    assert not {'script', 'link', 'iframe', 'object', 'base'} & set(document.tags)
    assert not re.search(r'@import|url\(|https?:', text)
    for name, (source, alt) in zip(ALL, document.pictures):
        data = base64.b64decode(source.partition(',')[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.format == 'PNG' and min(image.size) > 100
        assert data == (gallery / f'{name}.png').read_bytes() and len(alt) > 20
    assert {p.name for p in gallery.iterdir()} == {'gallery.html', *(f'{name}.png' for name in ALL)}  # no half file


def test_the_head_says_what_it_is(gallery, place):
    text = (gallery / 'gallery.html').read_text()
    facts = dict(re.findall('<dt>(.*)</dt><dd>(.*)</dd>', text))
    assert facts['run'] == 'run' and facts['data'] == f'folder:{place}/images, test split' and facts['step'] == '1,234'
    assert facts['image size'] == '64 px, enlarged 2 times' and facts['seed'] == '0' and 'left out' not in facts
    assert facts['images'].startswith('3 shown, 12 read')
    said = ' '.join(Reader(text).said)
    assert all(caption in said for caption, _ in CAPTIONS.values())


def test_the_same_for_a_seed(gallery, place):
    main([str(place / 'run'), '--images', '3', '--out', str(place / 'again' / 'there')])
    for path in gallery.iterdir(): assert (place / 'again' / 'there' / path.name).read_bytes() == path.read_bytes()
    other = f'--images 3 --out {place}/other --seed 1 --block 0 --query 0,3'
    main([str(place / 'run'), *other.split()])
    assert not [p.name for p in gallery.iterdir() if (place / 'other' / p.name).read_bytes() == p.read_bytes()]


def test_names_are_escaped():
    document = page({'run': '<b>&"', 'step': 1}, {'map': ('<i>', b'png')})
    assert '<b>' not in document and '<i>' not in document and '&lt;b&gt;&amp;&quot;' in document


def test_the_default_place(place, capsys):
    run = shutil.copytree(place / 'run', place / 'copy')
    main([str(run), '--images', '2'])
    assert capsys.readouterr().out.splitlines() == [str(run / 'gallery' / 'gallery.html')]


@pytest.mark.parametrize('damage, says', [
    (lambda run: (run / 'checkpoint.pt').unlink(), 'is not there'),
    (lambda run: (run / 'checkpoint.pt').write_bytes(b'short'), 'damaged')])
def test_without_a_checkpoint_the_rest_is_drawn(place, tmp_path, capsys, damage, says):
    run = shutil.copytree(place / 'run', tmp_path / 'run')
    damage(run)
    main([str(run), '--images', '2', '--out', str(tmp_path / 'out')])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith('left out: the predictor: ') and says in lines[0]
    assert {p.stem for p in (tmp_path / 'out').glob('*.png')} == set(ALL) - {'prediction'}
    text = (tmp_path / 'out' / 'gallery.html').read_text().replace('</dt><dd>', ': ')
    assert lines[0].split(';')[0] in text and 'step: at most 1,300' in text


def test_other_data_registers_and_few_images(place, tmp_path, capsys):
    run = write_run(tmp_path / 'run', reg_tokens=2, mask='multiblock', tokenizer='patch')
    main([str(run), '--data', f'folder:{place}/images/a', '--images', '1'])  # 4 test images, without labels
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith('left out: the map: no image has a label: use a sub-folder per ')
    assert '--labels' in lines[0]
    text = (run / 'gallery' / 'gallery.html').read_text()
    assert f'the run was trained on folder:{tmp_path}/images' in text
    assert not (run / 'gallery' / 'pairs.png').exists() and (run / 'gallery' / 'prediction.png').exists()


def test_a_part_of_the_images_has_labels(place, monkeypatch):
    "Images without one are left out of the map, and counted there; the other pictures don't need any."
    load = gallery_module.load
    def some(**how):
        data = load(**how)
        data.labels[::6] = -1
        return data
    monkeypatch.setattr(gallery_module, 'load', some)
    pictures = draw(Options(str(place / 'run'), images=2)).pictures
    n = len(load(**source(Options('x'), Run(place / 'run').config), split='test', size=64, fit='center'))
    assert list(pictures) == ALL
    assert pictures['map'].title == f'A map of the test images, {-(-n // 6)} without label left out'
    points = sum(len(c.get_offsets()) for c in pictures['map'].figure.axes[0].collections)
    assert points == n + -n // 6


def test_classes_of_any_name_are_drawn():
    "Dollars are mathematics for matplotlib, an underscore hides a label, bytes that are no UTF-8 end it."
    points = dict(trained=torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    names = ['a $x_$ b', '_x', os.fsdecode(b'\xff')]
    figure = map_picture(points, torch.arange(12) % 3, names, 0).figure
    assert png(figure)[:4] == b'\x89PNG'
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [r'a \$x_\$ b', ' _x', r'\xff']


def test_a_broken_image_and_the_flag_that_the_message_names(place, tmp_path, capsys):
    images = shutil.copytree(place / 'images', tmp_path / 'images')
    for i in range(20): (images / 'a' / f'broken{i:02}.png').write_bytes(b'no picture')  # some are test images
    words = [str(place / 'run'), '--data', f'folder:{images}', '--images', '2', '--out', str(tmp_path / 'out')]
    with pytest.raises(SystemExit) as end: main(words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and '--on-bad-image skip' in said and not (tmp_path / 'out').exists()
    main([*words, '--on-bad-image', 'skip'])
    assert 'left out' in capsys.readouterr().out and (tmp_path / 'out' / 'gallery.html').is_file()


def test_the_home_folder_in_every_path(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / 'run', tmp_path / 'run')
    shutil.copytree(place / 'images', tmp_path / 'images')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(['~/run', '--images', '2', '--data', 'folder:~/images', '--out=~/drawn'])
    assert capsys.readouterr().out.strip() == str(tmp_path / 'drawn' / 'gallery.html')
    main(['~/run', '--images', '2', '--data', 'folder:~/images'])
    assert (tmp_path / 'run' / 'gallery' / 'gallery.html').is_file() and not list(tmp_path.glob('~*'))


def test_a_collapsed_run(place, tmp_path):
    "It is what one wants to see then: no error, the trained encoder has position alone, all images are one point."
    run = write_run(tmp_path / 'run', checkpoint=False, data=f'folder:{place}/images')
    target = build(Config.of('demo', **TOY)).target
    with torch.no_grad():
        for p in target.parameters(): p.zero_()
    target.save_pretrained(run / 'target')
    pictures = draw(Options(str(run), images=2)).pictures
    assert list(pictures) == [name for name in ALL if name != 'prediction']
    axes = pictures['pca'].figure.axes  # of two images: the image, random, its front, trained, its front
    def squares(column): return [torch.tensor(ax.images[0].get_array()) for ax in axes[column::5]]
    assert torch.equal(*squares(3)) and not torch.equal(*squares(1))  # trained, random
    trained = pictures['map'].figure.axes[1]
    assert all((points.get_offsets() == 0).all() for points in trained.collections)


def test_larger_pictures(place):
    images = torch.randint(256, (40, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    big = enlarge(images, 3)
    assert big.shape == (40, 3, 192, 192) and big.dtype == torch.uint8
    assert (F.avg_pool2d(enlarge(images // 8 + 100, 2).float(), 2) - (images // 8 + 100)).abs().max() < 16  # in place
    encoders = {name: Run(place / 'run').encoder(which) for name, which in (('random', 'random'), ('trained', 'target'))}
    for scale in (2, 3):
        found = larger_pictures(encoders, images, 2, -1, (3, 0), scale)
        assert list(found) == ['pca_large', 'attention_large', 'search_large']
        shapes = {ax.images[0].get_array().shape[:2] for ax in found['pca_large'].figure.axes}
        assert shapes == {(64 * scale, 64 * scale), (4 * scale, 4 * scale)}
        row, column = 3 * scale + scale // 2, scale // 2  # within the same patch of the training size
        assert f'row {row}, column {column}' in found['search_large'].title and f'{scale} times' in found['search_large'].title


def test_no_larger_pictures(place):
    drawn = draw(Options(str(place / 'run'), images=2, scale=1))
    assert list(drawn.pictures) == [name for name in ALL if not name.endswith('large')]
    assert drawn.facts['image size'] == '64 px'


def test_every_picture_has_its_own_description(gallery):
    document = Reader((gallery / 'gallery.html').read_text())
    alts = [alt for _, alt in document.pictures]
    assert len(set(alts)) == len(alts) and all(alt.count('. ') and 40 < len(alt) < 300 for alt in alts)
    assert document.tags.count('div') == len(alts)  # a box that scrolls, so that the page doesn't


def test_the_sample():
    labels = torch.arange(3000) % 30
    rows = draw_sample(labels, 8, 3)
    assert len(rows.unique()) == len(rows) == SAMPLE and torch.equal(rows, draw_sample(labels, 8, 3))
    other = draw_sample(labels, 8, 4)
    assert not set(rows[8:50].tolist()) == set(other[8:50].tolist()) and not torch.equal(rows[:8], other[:8])
    assert labels[rows[0]] == labels[rows[1]] and len(labels[rows[1:8]].unique()) == 7
    assert sorted(draw_sample(torch.arange(5), 2, 0).tolist()) == list(range(5))  # no second image of any class
    assert len(draw_sample(torch.zeros(20), 1, 0)) == 20
    for seed in range(20): assert sorted(draw_sample(torch.arange(6) % 2, 6, seed).tolist()) == list(range(6))


def test_the_query(place):
    encoder = build(Config.of('demo', **TOY)).target  # 4 x 4
    assert check_options(Options('x'), encoder) == (2, 2)
    assert check_options(Options('x', query='0,3'), encoder) == (0, 3)


@pytest.mark.parametrize('words, says', [
    ('', 'required'), ('{run} --image 3', '--image'), ('{run} --scale 0', '--scale 0'), ('{run} --images many', 'many'),
    ('{place}/images', 'no run folder'), ('{place}/nowhere', 'no run folder'),
    ('{run} --images 0', '--images 0'), ('{run} --images -2', '--images -2'), ('{run} --images 65', '--images 65'),
    ('{run} --images 13', '12 test images'), ('{run} --block 2', '2 blocks'), ('{run} --block -3', '2 blocks'),
    ('{run} --query 4,0', '--query 4,0'), ('{run} --query 1', '--query 1'), ('{run} --query a,b', '--query a,b'),
    ('{run} --query 1,2,3', '--query 1,2,3'), ('{run} --query=-1,2', '--query -1,2'), ('{run} --seed -1', '--seed -1'),
    ('{run} --data folder:{place}/nowhere', 'nowhere'), ('{run} --data tulips', 'tulips'),
    ('{run} --images 1 --out {run}/config.json', 'config.json')])
def test_refusals(place, capsys, words, says):
    before = {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()}
    with pytest.raises(SystemExit) as end: main(words.format(place=place, run=place / 'run').split())
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and says in err[-1] and err[-1].startswith('scott_visualize: ')
    assert len(err) == 1
    assert {p: p.stat().st_mtime_ns for p in place.rglob('*') if p.is_file()} == before


def other_encoder(run, **changes):
    build(Config.of('demo', **{**TOY, **changes})).target.save_pretrained(run / 'target')


def nan_weights(run):
    encoder = build(Config.of('demo', **TOY)).target
    with torch.no_grad(): encoder.transformer.blocks[0].attn.proj.weight.fill_(float('nan'))
    encoder.save_pretrained(run / 'target')


@pytest.mark.parametrize('damage, says', [
    (lambda run: (run / 'target' / 'model.safetensors').unlink(), 'no model.safetensors'),
    (lambda run: (run / 'target' / 'model.safetensors').write_bytes(b'short'), 'damaged'),
    (lambda run: (run / 'target' / 'config.json').unlink(), 'no config.json'),
    (lambda run: (run / 'config.json').write_text('{'), 'damaged'),
    (lambda run: other_encoder(run, img_size=96), 'of another run'),
    (lambda run: write_checkpoint(run, dict(step=1, model={}, identity=dict(img_size=112))), 'img_size is 112'),
    (nan_weights, 'spoiled')])
def test_damaged_runs(place, tmp_path, capsys, damage, says):
    run = shutil.copytree(place / 'run', tmp_path / 'run')
    damage(run)
    with pytest.raises(SystemExit) as end: main([str(run), '--images', '1'])
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(err) == 1 and says in err[0] and (str(run) in err[0])
    assert not (run / 'gallery').exists()


def test_drawing_leaves_the_global_generator(place):
    before = torch.get_rng_state()
    facts, pictures = draw(Options(str(place / 'run'), images=2))
    assert torch.equal(before, torch.get_rng_state())
    assert facts['step'] == '1,234' and list(pictures) == ALL and all(p.title and p.figure for p in pictures.values())
