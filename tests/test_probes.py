"""scott_probe from end to end on a folder of drawn flowers: the table, its JSON, and bad input."""
import json

import pytest
import torch
from PIL import Image

from scott import probes
from scott.encoder import Encoder
from scott.petals import petals


def write_images(folder, count, classes=('a', 'b', 'c')):
    "Small PNG flowers, one sub-folder a class."
    images, _ = petals(count, size=32)
    for i, image in enumerate(images):
        path = folder / classes[i % len(classes)] / f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / 'cache'))
    return write_images(tmp_path / 'flowers', 45)


@pytest.fixture
def run(tmp_path, data):
    folder = tmp_path / 'run'
    for name, seed in (('context', 1), ('target', 2)):
        torch.manual_seed(seed)
        Encoder(img_size=32, depth=1, embed_dim=16).save_pretrained(folder / name)
    (folder / 'config.json').write_text(json.dumps(dict(data=f'folder:{data}', img_size=32, seed=0, amp='off')))
    return folder


def fails(capsys, *argv):
    "The command must end with 2 and one line, which is returned."
    with pytest.raises(SystemExit) as stop: probes.main([str(a) for a in argv])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and err.startswith('scott_probe: '), err
    return err


def test_table_and_json(run, tmp_path, capsys):
    probes.main([str(run), '--head-epochs', '2', '--json', str(tmp_path / 'out.json')])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / 'out.json').read_text())
    assert report == json.loads((run / 'probe_flowers.json').read_text())
    names = 'knn linear simple multihead cross'.split()
    assert [(r['probe'], r['encoder']) for r in sorted(report['rows'], key=lambda r: names.index(r['probe']))] == [
        (n, e) for n in names for e in ('random initialization', 'context', 'target')]
    assert (report['train_images'], report['test_images'], report['classes'], report['img_size']) == (36, 9, 3, 32)
    assert {'command', 'flags', 'config', 'machine', 'seconds', 'step', 'epoch', 'notes'} <= report.keys()
    assert sum(line.startswith(tuple(names)) and ' and ' not in line for line in out.splitlines()) >= 15
    assert 'without training augmentation' in out


def test_the_same_seed_gives_the_same_table(run):
    rows = [probes.probe(probes.Config(str(run), head_epochs=2))['rows'] for _ in range(2)]
    assert rows[0] == rows[1]


def test_the_random_row_is_the_start_of_the_run(run):
    torch.manual_seed(0)
    start = Encoder(img_size=32, depth=1, embed_dim=16).state_dict()
    blank = probes.load_encoders(run, 0)['random initialization'].state_dict()
    assert all(torch.equal(start[k], blank[k]) for k in start)


def test_choices_do_not_see_the_test_split(run, monkeypatch):
    "Other test images and labels: the same choices."
    def chosen():
        return [{k: v for k, v in r.items() if k in ('k', 'C', 'epoch', 'held_out_top1')}
                for r in probes.probe(probes.Config(str(run), head_epochs=2))['rows']]
    before, load = chosen(), probes.load
    def other(name, split, *args, **kwargs):
        part = load(name, split, *args, **kwargs)
        if split == 'test':
            part.images, part.labels = torch.randint(256, part.images.shape, dtype=torch.uint8), part.labels.flip(0)
        return part
    monkeypatch.setattr(probes, 'load', other)
    assert chosen() == before


def test_bad_flags(run, capsys):
    assert 'mlp' in fails(capsys, run, '--probes', 'knn,mlp')
    assert '--head-epochs 0' in fails(capsys, run, '--head-epochs', 0)
    assert '--cache-gb' in fails(capsys, run, '--cache-gb', 0)
    assert '--nonsense' in fails(capsys, run, '--nonsense', 1)
    assert 'nowhere' in fails(capsys, run, '--data', 'nowhere')
    assert 'no/such' in fails(capsys, run, '--data', 'folder:no/such')
    assert 'out.json' in fails(capsys, run, '--probes', 'knn', '--json', run / 'no' / 'out.json')


def test_bad_run_folders(run, tmp_path, capsys):
    assert 'no run folder' in fails(capsys, tmp_path / 'missing')
    weights = run / 'target' / 'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert 'damaged' in fails(capsys, run)
    weights.unlink()
    assert 'model.safetensors' in fails(capsys, run)


def test_spoiled_weights_are_named(run, capsys):
    encoder = Encoder.from_pretrained(run / 'context')
    torch.nn.init.constant_(encoder.transformer.blocks[0].attn.qkv.weight, float('nan'))
    encoder.save_pretrained(run / 'context')
    assert 'NaN' in fails(capsys, run, '--probes', 'knn').replace('Loading weights from local directory', '')


def test_labels_that_no_probe_can_use(run, data, tmp_path, capsys):
    assert 'no labels' in fails(capsys, run, '--data', f'folder:{data / "a"}')
    one = write_images(tmp_path / 'one', 20)
    write_images(one, 1, ('rare',))
    assert "class 'rare': 1;" in fails(capsys, run, '--data', f'folder:{one}')
    assert 'two classes' in fails(capsys, run, '--data', f'folder:{write_images(tmp_path / "same", 10, ("a",))}')


def test_a_class_that_is_only_in_the_test_split(run, data, capsys, monkeypatch):
    load = probes.load
    def without_c(name, split, *args, **kwargs):
        part = load(name, split, *args, **kwargs)
        if split == 'train': part.images, part.labels = (x[part.labels != 2] for x in (part.images, part.labels))
        return part
    monkeypatch.setattr(probes, 'load', without_c)
    assert "class 'c': 0;" in fails(capsys, run)


def test_nan_features_are_not_scored():
    with pytest.raises(ValueError, match='NaN'): probes.scores(torch.full((2, 3), float('nan')), torch.tensor([0, 1]))
