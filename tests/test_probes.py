"""scott_probe from end to end on a folder of drawn flowers: the table, its JSON, leaks, interruptions and bad input."""
import json
import os
import shlex
import shutil
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import write_images
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scott.cli import InputError
from scott.data.petals import petals
from scott.data.sets import ImageSet, load
from scott.encoder import Encoder
from scott.probe import classifiers as probes
from scott.probe import features, finetune
from scott.probe import table as report
from scott.probe.heads import Recipe, Watched, head_logits, stored, train_head
from scott.schedule import linear, warmup_flat_cosine
from scott.train.config import Config, build
from scott.train.files import digest, load_checkpoint, write_checkpoint
from scott.train.run import Run
from scott.train.signs import knn
from scott.train.trainer import Trainer

RESULTS = Path(__file__).parent.parent / 'nbs' / 'results' / 'flowers102-small'
NAMES = 'knn linear simple multihead cross'.split()


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / 'cache'))
    return write_images(tmp_path / 'flowers', 42)  # 36 for training, 6 held out


def save(folder, seed, **changes):
    "An encoder of the run's size, with weights of its own."
    torch.manual_seed(seed)
    Encoder(**{**dict(img_size=32, depth=2, embed_dim=16), **changes}).save_pretrained(folder)


@pytest.fixture
def run(tmp_path, data):
    folder = tmp_path / 'run'
    cfg = Config.of('demo', data=f'folder:{data}', img_size=32, depth=2, embed_dim=16, predictor_depth=1, amp='off',
                    mask='uniform', lr=5e-4, drop_rate=.2, attn_drop_rate=.1, drop_path_rate=.1, batch_size=12,
                    epochs=4, warmup_epochs=1)
    for name, seed in (('context', 1), ('target', 2)): save(folder / name, seed)
    (folder / 'config.json').write_text(json.dumps({**asdict(cfg), 'contains_test_images': True}))
    (folder / 'metrics.jsonl').write_text('{"step": 15, "epoch": 4.0}\n')
    return folder


def judge(run, **flags):
    "The report of a short call."
    return report.probe(report.Options(str(run), **{'head_epochs': 2, 'aug_epochs': 2, 'tune_epochs': 2, 'amp': 'off', **flags}))


def saw(run, hashes):
    "The run has learned from these pictures."
    stored = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({**stored, 'images': len(hashes)}))
    (run / 'pictures.txt').write_text('\n'.join(hashes) + '\n')


def table_of(run, kind=''):
    "The stored table of the flowers; kind: what else its name tells, e.g. '_paper'."
    path, = run.glob(f'probe_flowers-??????{kind}.json')
    return path


def fails(capsys, *argv):
    "The command must end with 2 and one line, which is returned."
    with pytest.raises(SystemExit) as stop: report.main([str(a) for a in argv])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and err.startswith('scott_probe: '), err
    return err


def synthetic(count=200, classes=4, shift=0, apart=3.):
    "Features of images whose class is written into them."
    g = torch.Generator().manual_seed(shift)
    labels = torch.arange(count) % classes
    tokens = torch.randn(count, 9, 32, generator=g)
    tokens[torch.arange(count), :, labels] += apart
    return features.Features(tokens.mean(1), tokens.half(), labels, [f'{shift} {i}' for i in range(count)])


# The table

def test_table_and_json(run, data, tmp_path, capsys):
    saw(run, load(f'folder:{data}').hashes)
    report.main([str(run), '--head-epochs', '2', '--json', str(tmp_path / 'out.json')])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result == json.loads(table_of(run).read_text()) == Run(run).table()
    assert [(r['probe'], r['encoder']) for r in sorted(result['rows'][1:], key=lambda r: NAMES.index(r['probe']))] == [
        (n, e) for n in NAMES for e in ('random initialization', 'context', 'target')]
    assert (result['rows'][0]['probe'], result['rows'][0]['encoder']) == ('knn', 'raw pixels')
    assert (result['train_images'], result['test_images'], result['classes'], result['img_size']) == (36, 6, 3, 32)
    assert {'command', 'flags', 'config', 'machine', 'seconds', 'step', 'epoch', 'duplicates'} <= result.keys()
    assert (result['how_split'], result['unlabeled'], result['labels']) == ('names', 0, None) and result['summary']
    for row in result['rows']:
        assert len(row['seeds']) == 3 and {s['seed'] for s in row['seeds']} == {0, 1, 2}
        assert row['top1'] == pytest.approx(np.mean([s['top1'] for s in row['seeds']]))
        assert row['top1_std'] == pytest.approx(np.std([s['top1'] for s in row['seeds']], ddof=1))
        low, high = row['top1_interval']
        assert low <= row['top1'] <= high
    assert sum(line.startswith(tuple(NAMES)) and '…' in line for line in out.splitlines()) == 16
    assert 'missing: supervised from scratch' in out and f'Taken: {result["summary"]}\n' in out
    head, seen = out.splitlines()[:2]
    assert 'test images (about a fifth held out, by the hash of the names), 3 classes' in head
    assert seen.startswith(f'transductive: pre-trained on {result["test_images"]} of the {result["test_images"]} test')


def test_the_same_seed_gives_the_same_table(run):
    assert judge(run)['rows'] == judge(run)['rows']


def test_rows_on_augmented_images_are_others(run):
    stored, new = ({r['encoder']: r for r in judge(run, probes=name, seeds=1)['rows'] if r['probe'] == name}
                   for name in ('cross', 'cross+aug'))
    assert stored.keys() == new.keys() and stored != new
    again = judge(run, probes='cross+aug', seeds=1)['rows']
    assert [r for r in again if r['probe'] == 'cross+aug'] == list(new.values())


def test_the_random_row_is_the_start_of_the_run(run):
    torch.manual_seed(0)
    start = Encoder(img_size=32, depth=2, embed_dim=16).state_dict()
    before = torch.get_rng_state()
    found = report.load_encoders(Run(run))
    blank = found['random initialization'].state_dict()
    assert all(torch.equal(start[k], blank[k]) for k in start)
    assert not torch.equal(start['mask_token'], found['target'].state_dict()['mask_token'])
    assert torch.equal(before, torch.get_rng_state())


def test_depth_and_norm_are_read_and_named(run, capsys):
    rows = {}
    for flags, name in (([], ''), (['--block', '0'], '_block0'), (['--no-norm'], '_raw')):
        report.main([str(run), '--probes', 'linear', *flags])
        rows[name] = json.loads(table_of(run, name).read_text())['rows'][1:]
        assert ('block 0' in (said := capsys.readouterr().out)) == ('--block' in flags)
        assert ('not normalized' in said) == ('--no-norm' in flags)
    encoder = Encoder.from_pretrained(run / 'target')
    images = ImageSet(petals(9, 32)[0], torch.zeros(9), torch.ones(9), [], '', False, [], [])
    means = [features.encode(encoder, images, norm=n, block=b).means for b, n in ((-1, True), (0, True), (-1, False))]
    assert not torch.allclose(means[0], means[1]) and not torch.allclose(means[0], means[2])


# What the pre-training saw

def splits(train, test):
    "Two splits whose files have these hashes."
    def part(hashes):
        return ImageSet(torch.empty(len(hashes)), None, None, [], 'folder:x', False, [], hashes=list(hashes))
    return features.Splits(part(train), part(test), 0)


@pytest.mark.parametrize('pictures, says', [
    ('abcd', 'inductive: pre-trained on 4 of the 4 training images, and on none of the 2 test images'),
    ('abyz', 'inductive: pre-trained on 2 of the 4 training images, and on none of the 2 test images'),
    ('efabcd', 'transductive: pre-trained on 2 of the 2 test images, without labels, and on 4 of the 4 training'),
    ('fz', 'transductive: pre-trained on 1 of the 2 test images, without labels, and on 0 of the 4 training images'),
    ('xyz', 'transfer: pre-trained on 3 other images (folder:/run), on none of the 4 training and 2 test images'),
    (None, 'unknown: this run kept no list of its images')])
def test_what_the_pretraining_saw_is_decided_by_pictures(pictures, says):
    "And by nothing else: settings that say the contrary change nothing."
    for told in (dict(), dict(contains_test_images=True, images=4, ssl_split='all')):
        stored = dict(data='folder:/run', **told)
        run = SimpleNamespace(pictures=pictures and list(pictures), stored=stored)
        assert features.learned_from(run, 'folder:/other', splits('abcd', 'ef')).startswith(says)


def test_copies_of_training_images_are_counted():
    run = SimpleNamespace(pictures=list('abcd'), stored=dict(data='folder:/run'))
    said = features.learned_from(run, 'folder:/run', splits('abcd', 'def'))
    assert said == ('inductive: pre-trained on 4 of the 4 training images, and on none of the 3 test images, '
                    'but for 1 that are copies of training images')
    run = SimpleNamespace(pictures=list('abcde'), stored=dict(data='folder:/run'))
    said = features.learned_from(run, 'folder:/run', splits('abcd', 'def'))
    assert said.startswith('transductive: pre-trained on 2 of the 3 test images')
    assert said.endswith('; 1 of these test images are copies of training images')


def seen(run, **flags):
    "The second line of a short table."
    return judge(run, probes='knn', seeds=1, **flags)['learned_from']


def test_moved_folders_added_files_and_parts_of_a_pool(run, data, tmp_path):
    "The same pictures under whatever name; others under the same name."
    train, test = (load(f'folder:{data}', split, 32) for split in ('train', 'test'))
    n, m = len(train), len(test)
    saw(run, train.hashes)
    inductive = f'inductive: pre-trained on {n} of the {n} training images, and on none of the {m} test images'
    assert seen(run) == inductive
    assert seen(run, data=f'folder:{shutil.copytree(data, tmp_path / "moved")}') == inductive
    write_images(data, 60)  # 42 of them as they were
    assert seen(run).startswith(f'inductive: pre-trained on {n} of the ')
    other = write_images(tmp_path / 'other', 24, size=40)
    assert seen(run, data=f'folder:{other}').startswith(f'transfer: pre-trained on {n} other images')
    saw(run, load(f'folder:{data}').hashes)
    pool = tmp_path / 'pool'  # the labeled part of what was trained on, without class folders
    pool.mkdir()
    lines = ['file,label', *(f'{path.name},{path.parent.name}' for path in sorted(data.rglob('*.png'))[::2])]
    for path in data.rglob('*.png'): shutil.copy(path, pool)
    (tmp_path / 'labels.csv').write_text('\n'.join(lines))
    found = judge(run, probes='knn', seeds=1, data=f'folder:{pool}', labels=str(tmp_path / 'labels.csv'))
    assert found['unlabeled'] == 30 and found['train_images'] + found['test_images'] == 30
    k = found['test_images']
    assert found['learned_from'].startswith(f'transductive: pre-trained on {k} of the {k} test images, without labels')
    assert '; 30 images without label left out;' in report.table(found).splitlines()[0]


@pytest.mark.parametrize('stored, data, says', [
    (dict(data='flowers102', contains_test_images=True), 'flowers102', 'transductive: pre-trained on all images'),
    (dict(data='flowers102', contains_test_images=False, images=5), 'flowers102', 'inductive'),
    (dict(data='petals', ssl_split='all'), 'petals', 'transductive'),
    (dict(data='petals'), 'pets37', 'transfer: pre-trained on petals'), (dict(data='petals'), 'folder:a', 'unknown'),
    (dict(data='folder:a', contains_test_images=False), 'folder:a', 'unknown'),
    (dict(data='folder:a', contains_test_images=True), 'petals', 'unknown')])
def test_runs_of_earlier_versions_are_told_by_names(stored, data, says):
    "Where a name stands for the same pictures for ever; a folder's doesn't."
    run = SimpleNamespace(pictures=None, stored=stored)
    assert features.learned_from(run, data, splits('a', 'b')).startswith(says)


STORED = [p for p in sorted(RESULTS.parent.glob('*/probe_*.json')) if 'learned_from' in p.read_text()]


@pytest.mark.parametrize('path', STORED, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_stored_tables_read_as_they_did(path):
    "Tables on the pages, of earlier versions: their second line, their pairs of images, and the verdict."
    stored = json.loads(path.read_text())
    run = SimpleNamespace(pictures=None, stored=stored['config'])
    assert features.learned_from(run, stored['data'], splits('a', 'b')) == stored['learned_from']
    lines = report.table(stored).splitlines()
    assert lines[0].startswith(stored['data']) and lines[1] == stored['learned_from'] and not report.is_outdated(stored)
    if stored['duplicates']:
        assert lines[-2].startswith(f'{len(stored["duplicates"])} pairs of images have the same pixels: image_')
    assert lines[-1].startswith(f'The context encoder {report.verdict(stored)}.') and report.beats(stored)


# Agreement with well-kept libraries

def test_neighbors_are_scikit_learns():
    train, test = synthetic(apart=.5), synthetic(shift=1, apart=.5)
    for k, t in ((1, .07), (5, .02), (20, .2)):
        ours = knn(train.means, train.labels, k=k, classes=4, temperature=t)(test.means)
        theirs = KNeighborsClassifier(k, metric='cosine', weights=lambda d: np.exp((1 - d) / t))
        theirs.fit(train.means.double().numpy(), train.labels.numpy())
        votes = torch.from_numpy(theirs.predict_proba(test.means.double().numpy()))
        assert torch.allclose((ours / ours.sum(1, keepdim=True)).double(), votes, atol=1e-3)


def test_linear_is_scikit_learns():
    train, test = synthetic(apart=.5), synthetic(shift=1, apart=.5)
    scaler = StandardScaler().fit(train.means.numpy())
    theirs = LogisticRegression(C=.1, max_iter=1000).fit(scaler.transform(train.means.numpy()), train.labels.numpy())
    ours = probes.logistic(train.means, train.labels, c=.1, classes=4)(test.means)
    assert np.allclose(ours.numpy(), theirs.decision_function(scaler.transform(test.means.numpy())), atol=1e-6)


def test_interval_is_the_percentiles_of_new_draws():
    g = torch.Generator().manual_seed(0)
    right = torch.rand(3, 500, generator=g) < .3
    each = right.double().mean(0)
    means = each[torch.randint(500, (4000, 500), generator=g)].mean(1)
    low, high = (100 * means.quantile(q).item() for q in (.025, .975))
    found = probes.interval(right)
    assert (found.low, found.high) == pytest.approx((low, high), abs=.3)
    assert found == probes.interval(right)
    assert probes.interval(right[:1]) == pytest.approx(probes.interval(right[:1].expand(3, -1)))
    assert probes.interval(torch.ones(2, 9, dtype=torch.bool)) == (100, 100)
    for one in (True, False): assert probes.interval(torch.tensor([[one]])) == (100 * one, 100 * one)


def test_the_grid_of_neighbors_is_that_of_single_calls():
    "To the bit, for few and for many images, and with a bank smaller than k."
    for count, apart in ((30, 1.), (700, .5)):
        train, test = synthetic(count, apart=apart), synthetic(1100, shift=1, apart=apart)
        tried = list(probes.knn_grid(train.means, train.labels, test.means, 4))
        assert len({tuple(setting.values()) for setting, _ in tried}) == 18
        for setting, votes in tried:
            assert torch.equal(votes, knn(train.means, train.labels, classes=4, **setting)(test.means))


def test_the_neighbors_are_found_once_for_a_grid(monkeypatch):
    calls, nearest = [], probes.nearest
    monkeypatch.setattr(probes, 'nearest', lambda *a: calls.append(1) or nearest(*a))
    probes.fit_probe('knn', synthetic(), 4)
    assert len(calls) == 1


@pytest.mark.parametrize('name', NAMES)
def test_the_callers_random_numbers_go_on(name):
    train, test = synthetic(), synthetic(shift=1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = probes.evaluate(name, train, test, 4, epochs=1, seeds=(0,))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)                                      # nor does the answer depend on them
    assert probes.evaluate(name, train, test, 4, epochs=1, seeds=(0,)) == first


# Heads: the engine gives what a plain loop gives

def plain_loop(head, tokens, labels, rows, epochs, total, seed, watch):
    "How heads were trained before they had the trainer: AdamW in two groups, batches of 64, schedules by hand."
    params = list(head.parameters())
    opt = torch.optim.AdamW([{'params': [p for p in params if p.ndim > 1]},
                             {'params': [p for p in params if p.ndim <= 1]}], betas=(.9, .999), fused=True)
    g, per_epoch, found = torch.Generator().manual_seed(seed), -(-len(rows) // 64), []
    for step in range(1, epochs * per_epoch + 1):
        if step % per_epoch == 1: batches = iter(rows[torch.randperm(len(rows), generator=g)].split(64))
        batch = next(batches)
        lr = warmup_flat_cosine(step, total * per_epoch, total / 5 * per_epoch, 1e-6, 2e-3, 1e-5, .72)
        opt.param_groups[0].update(lr=lr, weight_decay=linear(step, total * per_epoch, .04, .4))
        opt.param_groups[1].update(lr=lr, weight_decay=0.)
        F.cross_entropy(head(tokens[batch].float()), labels[batch]).backward()
        opt.step()
        opt.zero_grad()
        if step % per_epoch == 0:
            found.append(100 * (head_logits(head, watch.tokens).argmax(1) == watch.labels).double().mean().item())
    return found


@pytest.mark.parametrize('name', list(probes.HEADS))
def test_a_head_learns_as_in_the_plain_loop(name):
    "The same weights and the same curve: no number of a table has changed with the engine."
    data, other = synthetic(200, apart=1.), synthetic(80, shift=1, apart=1.)
    rows, watch, heads = torch.arange(150), Watched(other.tokens, other.labels), []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(probes.HEADS[name](32, 4))
    curve = train_head(heads[0], stored(data.tokens), data.labels, rows, 2, Recipe(5, 1., seed=7), watch)
    expected = plain_loop(heads[1], data.tokens, data.labels, rows, 2, 5, 7, watch)
    assert curve == expected and len(curve) == 2
    for ours, theirs in zip(heads[0].parameters(), heads[1].parameters()):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp(min=1)


def test_a_head_that_diverges_is_refused():
    data = synthetic()
    data.tokens[7] = float('nan')
    with pytest.raises(InputError, match='loss of a head was nan or infinite at step [1-4]: leave it out'):
        train_head(probes.HEADS['simple'](32, 4), stored(data.tokens), data.labels, torch.arange(200), 1, Recipe(1, .2))


# Leaks

def test_choices_do_not_see_the_test_split(run, monkeypatch):
    "Other test images and labels: the same choices. By the paper's protocol the choices move."
    def chosen(**flags):
        return [{k: v for k, v in s.items() if k in ('k', 'temperature', 'c', 'epoch', 'chosen_at')}
                for r in judge(run, **flags)['rows'] for s in r['seeds']]
    before, paper, load = chosen(), chosen(protocol='paper'), features.load
    def other(name, split, *args, **kwargs):
        part = load(name, split, *args, **kwargs)
        if split == 'test':
            part.images, part.labels = torch.randint(256, part.images.shape, dtype=torch.uint8), part.labels.flip(0)
            part.identity, part.prints = '', []               # they are not the files' any more
        return part
    monkeypatch.setattr(features, 'load', other)
    assert chosen() == before
    assert chosen(protocol='paper') != paper


@pytest.mark.parametrize('name', NAMES)
def test_permuted_labels_give_chance(name):
    "On features that hold the class, every probe finds it; with permuted training labels it finds nothing."
    train, test = synthetic(400, 20), synthetic(400, 20, shift=1)
    how = dict(epochs=20, seeds=(0,))
    assert probes.evaluate(name, train, test, 20, **how)['top1'] > 50
    train.labels = train.labels[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    error = 100 * (.05 * .95 / 20) ** .5  # a class is answered as one: right or wrong 20 times, not 400 times
    assert abs(probes.evaluate(name, train, test, 20, **how)['top1'] - 5) < 4 * error


def test_a_test_image_among_the_training_images_is_refused():
    train, test = synthetic(), synthetic(shift=1)
    with pytest.raises(InputError, match='200 of 200 test images are training images'):
        probes.evaluate('knn', test, test, 4)
    test.names[7] = train.names[3]
    with pytest.raises(InputError, match='1 of 200 test images .* the first is 0 3'):
        probes.evaluate('knn', train, test, 4)


def test_the_released_protocol_flatters(run, capsys):
    "It takes the best test score of the grid; its table says so and has another file."
    honest, paper = (judge(run, probes='knn,linear', protocol=p)['rows'] for p in ('honest', 'paper'))
    assert all(p['top1'] >= h['top1'] for h, p in zip(honest, paper))
    assert all(s['chosen_at'] == s['top1'] for r in paper for s in r['seeds'])
    report.main([str(run), '--probes', 'knn', '--protocol', 'paper'])
    assert 'which flatters' in capsys.readouterr().out
    assert table_of(run, '_paper').is_file() and len(list(run.glob('probe_*'))) == 1


def test_the_released_choice_on_flowers_is_the_val_half():
    train, test = synthetic(), synthetic(shift=1)
    assert report.released_choice('flowers102', train, test).names == train.names[100:]
    assert report.released_choice('pets37', train, test) is test


def twins(run, capsys):
    "The stored pairs, and the line of the table."
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    line, = (line for line in capsys.readouterr().out.splitlines() if 'same pixels' in line)
    return json.loads(table_of(run).read_text())['duplicates'], line


def test_duplicates_are_named_by_class_and_told_apart(run, data, capsys):
    "Within a split and class, across two classes, and across the splits: these come first."
    parts = [load(f'folder:{data}', split, 32, 'center') for split in ('train', 'test')]
    (a, *more), test = ([Path(n) for n in part.names] for part in parts)
    b = next(path for path in more if path.parent == a.parent)
    c = next(path for path in more if path.parent != a.parent)
    leak, source_ = test[0], next(path for path in more if path.parent == test[0].parent and path not in (b, c))
    for path in (b, c): path.write_bytes(a.read_bytes())
    leak.write_bytes(source_.read_bytes())
    def short(path): return f'{path.parent.name}/{path.name}'
    pairs, line = twins(run, capsys)
    assert pairs[0] == [short(source_), short(leak), True, False]
    assert sorted(pairs[1:]) == sorted([[short(a), short(b), False, False], [short(a), short(c), False, True]])
    assert line.startswith('3 pairs of images have the same pixels, 1 of them across the splits: '
                           f'{short(source_)} = {short(leak)} (training and test), ')
    assert f'{short(a)} = {short(c)} (two classes)' in line and f'{short(a)} = {short(b)},' in line + ','


def test_twins_of_a_flat_folder_are_named_by_their_paths(tmp_path):
    "The folder has no class folders: class/name would be a path that isn't there."
    for name in ('1.png', '2.png', '3.png'): Image.new('RGB', (40, 40), 'gray' if name < '3' else 'red').save(tmp_path / name)
    (tmp_path / 'list.csv').write_text('file,label,split\n1.png,cat,train\n2.png,cat,test\n3.png,dog,train\n')
    parts = [load(f'folder:{tmp_path}', part, 32, 'center', labels=tmp_path / 'list.csv', cache=tmp_path / 'cache')
             for part in ('train', 'test')]
    assert features.duplicates(*parts) == [('1.png', '2.png', True, False)]


# Stored features and interruptions

def test_an_interrupted_probe_goes_on_from_its_features(run, monkeypatch):
    calls, encode = [], features.encode
    def counted(encoder, *args, **kwargs):
        calls.append(encoder)
        if len(calls) == 4: raise KeyboardInterrupt
        return encode(encoder, *args, **kwargs)
    monkeypatch.setattr(features, 'encode', counted)
    with pytest.raises(KeyboardInterrupt): judge(run)
    rows = judge(run)['rows']
    assert len(calls) == 4 + 3  # two of the random encoder, one of the context encoder were there
    assert judge(run)['rows'] == rows and len(calls) == 7  # nothing is encoded again
    monkeypatch.undo()
    for file in (run / 'features').iterdir(): file.unlink()
    assert judge(run)['rows'] == rows


def test_the_key_and_the_duplicates_read_no_pixels(run, monkeypatch):
    "What it needs to know of the pixels is kept: the key of the features, and which images are the same."
    first = judge(run, probes='linear')
    seen, digest = [], features.digest
    monkeypatch.setattr(features, 'digest', lambda state: seen.append(state) or digest(state))
    monkeypatch.setattr(features, 'encode', None)
    monkeypatch.setattr(features, 'fingerprint', None)
    assert judge(run, probes='linear')['rows'] == first['rows']
    keys = [s['images'] for s in seen if 'images' in s]
    assert len(keys) == 6 and {type(k) for k in keys} == {str} and len(set(keys)) == 2   # a training and a test split


def test_the_key_of_features(monkeypatch):
    def data(**other):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        return ImageSet(**{**dict(images=images, labels=torch.zeros(2), aspect=torch.ones(2), classes=[], name='',
                                  has_test=False, skipped=[]), **other})
    def encoder(**other):
        torch.manual_seed(0)
        return Encoder(img_size=32, **{**dict(depth=2, embed_dim=16, num_heads=2), **other})
    key, plain = features.content_key, encoder()
    found = [key(plain, data()), key(plain, data(images=torch.ones(2, 3, 32, 32, dtype=torch.uint8))),
             key(plain, data(identity='a')), key(plain, data(identity='b')), key(plain, data(), norm=True),
             key(encoder(num_heads=4), data()), key(plain, data(), block=0)]
    assert key(encoder(), data(name='other', labels=torch.ones(2))) == found[0]
    assert key(plain, data(identity='a', images=None)) == found[2]
    monkeypatch.setattr(features, 'FEATURES_VERSION', 2)
    assert len({*found, key(plain, data()), key(plain, data(identity='a'))}) == 9


def test_a_repr_holds_no_tensors():
    assert repr(synthetic()) == 'features of 200 images: 32 numbers each, 9 tokens each'
    assert len(repr(features.Stored(synthetic(), 'here'))) < 150


def test_features_of_other_weights_are_not_used(run):
    before, files = judge(run, probes='linear')['rows'], set((run / 'features').iterdir())
    save(run / 'target', 5)
    after, now = judge(run, probes='linear')['rows'], set((run / 'features').iterdir())
    assert [a == b for a, b in zip(before, after)] == [True, True, True, False]  # pixels, random, context, target
    assert len(now) == 6 and len(now & files) == 4


def test_damaged_features_are_made_again(run, capsys):
    before = judge(run, probes='knn')['rows']
    def cut(content): return content[:50]
    def flip(content): return content[:-9] + bytes([content[-9] ^ 64]) + content[-8:]  # safetensors would not notice
    for damage in (cut, flip):
        for file in (run / 'features').iterdir(): file.write_bytes(damage(file.read_bytes()))
        assert judge(run, probes='knn')['rows'] == before
        assert capsys.readouterr().out.count('encoding again') == 6


# Whole networks

def test_supervised_and_finetune(run, capsys):
    result = judge(run, probes='knn,supervised,finetune')
    rows = {(r['probe'], r['encoder']): r for r in result['rows'] if r['probe'] != 'knn'}
    assert rows.keys() == {('supervised', 'random initialization'), ('finetune', 'context'), ('finetune', 'target')}
    row = rows['supervised', 'random initialization']
    assert row['seeds'][0]['epochs'] == 5 and len(row['curve']) == 5  # 15 steps of 12 = 5 times 36 images
    assert not result['missing'] and row['top1_std'] is None and row['top1_interval'][0] <= row['top1']
    later = judge(run, probes='knn')
    assert not later['missing'] and row['top1'] in [r['top1'] for r in later['rows'] if r['probe'] == 'supervised']
    assert judge(run, probes='supervised')['rows'][1]['curve'] == row['curve']
    assert len(list(run.glob('supervised-*'))) == 1


def test_rows_of_whole_networks_belong_to_their_weights_and_budget(run):
    "Other weights: fine-tuned anew. A longer pre-training: the supervised row is missing until it is made again."
    before = judge(run, probes='supervised,finetune')['rows'][1:]
    save(run / 'target', 9)
    after = judge(run, probes='supervised,finetune')['rows'][1:]
    assert [a['identity']['start'] == b['identity']['start'] for a, b in zip(before, after)] == [True, True, False]
    assert [a['curve'] == b['curve'] for a, b in zip(before, after)] == [True, True, False]
    with open(run / 'metrics.jsonl', 'a') as f: f.write('{"step": 30, "epoch": 8.0}\n')
    longer = judge(run, probes='knn')
    assert longer['missing'] and not [r for r in longer['rows'] if r['probe'] == 'supervised']
    assert judge(run, probes='supervised')['rows'][1]['identity']['epochs'] == 10


def test_fine_tuning_for_another_time_is_another_row(run, capsys):
    def tuned(): return [(r['encoder'], r['identity']['epochs']) for r in Run(run).table()['rows'] if r['probe'] == 'finetune']
    for epochs in ('1', '2', '2'): report.main([str(run), '--probes', 'finetune', '--tune-epochs', epochs])
    assert sorted(tuned()) == [('context', 1), ('context', 2), ('target', 1), ('target', 2)]
    assert capsys.readouterr().out.count('epochs 1') == 2 + 2 + 2  # in each of the three tables
    table_of(run).unlink()
    report.main([str(run), '--probes', 'knn', '--tune-epochs', '2'])  # only shows what was trained before
    assert tuned() == [('context', 2), ('target', 2)]


def test_rows_of_whole_networks_belong_to_their_images(run, data):
    "Other training images under the old names: trained anew. Other test images: only tested anew. Moved: neither."
    def row(where=data): return judge(run, data=f'folder:{where}', probes='supervised')['rows'][1]
    train, test = (load(f'folder:{data}', split, 32).names for split in ('train', 'test'))
    first = row()
    Path(test[0]).write_bytes(Path(test[-1]).read_bytes())
    tested = row()
    assert tested['tested_on'] != first['tested_on'] and tested['curve'] == first['curve'] and tested['steps_here'] == 0
    Path(train[0]).write_bytes(Path(train[-1]).read_bytes())
    trained = row()
    assert trained['identity']['data'] != first['identity']['data'] and trained['steps_here'] == 15
    assert row(shutil.copytree(data, data.parent / 'moved')) == json.loads(json.dumps(trained))


def test_rows_of_other_images_are_not_in_one_table(run, data, capsys):
    "The same folder, as many images of the same names; but one of them is another picture."
    report.main([str(run), '--probes', 'linear', '--seeds', '1'])
    one, other, *_ = sorted((data / 'a').iterdir())
    one.write_bytes(other.read_bytes())
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    assert {r['probe'] for r in Run(run).table()['rows']} == {'knn'}


def test_tables_of_the_earlier_split_are_named_and_not_used(run, data, capsys):
    "Neither its own, whatever its name is; another folder's and a data set's with a name are left alone."
    report.main([str(run), '--probes', 'linear', '--seeds', '1'])
    old = json.loads(table_of(run).read_text())
    del old['how_split'], old['pictures']
    for path in (table_of(run), run / 'probe_flowers.json'): path.write_text(json.dumps(old))
    (run / 'probe_other.json').write_text(json.dumps({**old, 'data': 'folder:/other'}))
    (run / 'probe_flowers102.json').write_text(json.dumps({**old, 'data': 'flowers102'}))
    (run / 'probe_half.json').write_text('{"data"')
    capsys.readouterr()
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    said = [line for line in capsys.readouterr().out.splitlines() if 'earlier split' in line]
    assert len(said) == 2 and 'run scott_probe again' in said[0] and said[1].startswith('probe_flowers.json was made')
    assert {r['probe'] for r in json.loads(table_of(run).read_text())['rows']} == {'knn'}
    assert json.loads((run / 'probe_flowers.json').read_text()) == old


def test_two_folders_of_one_name_keep_both_tables(run, tmp_path, capsys):
    for site in ('site1', 'site2'):
        data = write_images(tmp_path / site / 'images', 30 if site == 'site1' else 45)
        report.main([str(run), '--data', f'folder:{data}', '--probes', 'knn', '--seeds', '1'])
    found = [json.loads(p.read_text())['data'] for p in run.glob('probe_images-??????.json')]
    assert sorted(found) == [f'folder:{tmp_path}/{site}/images' for site in ('site1', 'site2')]


def test_the_command_for_a_missing_row_can_be_followed(run, data, capsys):
    "It has the flags that choose the images; here without them it would fail."
    (data / 'a' / 'broken.png').write_bytes(b'no picture')
    other = shutil.copytree(data, data.parent / 'my photos')
    report.main([str(run), '--data', f'folder:{other}', '--on-bad-image', 'skip', '--amp', 'off', '--probes', 'knn'])
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('missing: supervised'))
    report.main(shlex.split(line.partition('scott_probe ')[2]))
    assert 'missing: supervised' not in capsys.readouterr().out


def test_a_second_call_adds_rows_and_another_step_replaces_them(run, capsys):
    def rows(): return {(r['probe'], r['encoder']) for r in Run(run).table()['rows']}
    report.main([str(run), '--probes', 'linear'])
    report.main([str(run), '--probes', 'knn'])
    both = rows()
    assert {('linear', 'target'), ('knn', 'target'), ('knn', 'raw pixels')} <= both and len(both) == 7
    report.main([str(run), '--probes', 'knn', '--seeds', '2'])
    assert {p for p, _ in rows()} == {'knn'}
    report.main([str(run), '--probes', 'linear', '--seeds', '2'])
    with open(run / 'metrics.jsonl', 'a') as f: f.write('{"step": 30, "epoch": 8.0}\n')
    report.main([str(run), '--probes', 'knn', '--seeds', '2'])
    assert {p for p, _ in rows()} == {'knn'}


def test_the_step_is_that_of_the_weights(run):
    torch.save(dict(step=10), run / 'checkpoint.pt')  # the log has gone on to 15
    (run / 'metrics.jsonl').write_text(''.join(f'{{"step": {n}, "epoch": {n / 4}}}\n' for n in (5, 10, 15)))
    assert judge(run, probes='knn')['step'] == 10


def test_a_stopped_training_goes_on_bit_for_bit(run, monkeypatch):
    "SIGTERM in the middle of an epoch; then the same command again, against a training that nobody stopped."
    whole = judge(run, probes='supervised')['rows'][1]
    folder, = run.glob('supervised-random-*')
    weights = torch.load(folder / 'checkpoint.pt', weights_only=True)['model']
    for file in folder.iterdir(): file.unlink()
    step = Trainer.train_step
    def stopped(trainer):
        values = step(trainer)
        if trainer.step == 7: os.kill(os.getpid(), signal.SIGTERM)
        return values
    monkeypatch.setattr(Trainer, 'train_step', stopped)
    with pytest.raises(SystemExit) as stop: judge(run, probes='supervised')
    assert stop.value.code == 143 and torch.load(folder / 'checkpoint.pt', weights_only=True)['step'] == 7
    monkeypatch.undo()
    os.environ['SCOTT_CACHE'] = str(run.parent / 'cache')
    row = judge(run, probes='supervised')['rows'][1]
    now = torch.load(folder / 'checkpoint.pt', weights_only=True)['model']
    assert all(torch.equal(weights[k], now[k]) for k in weights)
    assert row['curve'] == whole['curve'] and row['seeds'] == whole['seeds'] and row['steps_here'] == 8


def test_rows_that_were_stored_before_are_found_again(tmp_path, monkeypatch):
    "Rows of whole networks, made by an earlier version: today's identity has the same keys, order, values and hash."
    results = Run(RESULTS)
    trained, kept = results.config, [r for r in results.table('flowers102')['rows'] if r['probe'] in report.WHOLE]
    encoder = build(trained).target
    images = ImageSet(torch.empty(2040), None, None, range(102), 'flowers102', True, [], [])
    folders = []
    for row in kept:
        who = row['identity']
        test = SimpleNamespace(names=[], hashes=[], labels=None)
        judge = SimpleNamespace(trained=trained, squashed=None, train=images, test=test,
                                encoders={row['encoder']: encoder}, run=SimpleNamespace(folder=tmp_path),
                                place=finetune.Place(torch.device('cpu'), torch.bfloat16),
                                options=SimpleNamespace(seed=who['seed']))
        def named(state): return who['start'] if 'classify.bias' in state else digest(state)  # weights, or an identity
        monkeypatch.setattr(finetune, 'digest', named)
        name = f'{row["probe"]}-{row["encoder"].split()[0]}-{digest(who)[:8]}'
        (tmp_path / name).mkdir()
        (tmp_path / name / 'row.json').write_text(json.dumps(dict(top1=row['top1'])))
        assert report.whole(judge, row['probe'], row['encoder'], who['epochs'], train=False) == [
            dict(probe=row['probe'], encoder=row['encoder'], top1=row['top1'])]
        assert not report.whole(judge, row['probe'], row['encoder'], who['epochs'] + 1, train=False)
        folders.append(name)
    assert sorted(folders) == ['finetune-context-85099f18', 'finetune-context-b69d1faa', 'finetune-target-6591fca4',
                              'supervised-random-41e0e687']  # the folders that the earlier version made


def test_a_checkpoint_of_an_earlier_version_is_refused_in_a_line(run, capsys):
    judge(run, probes='supervised')
    folder, = run.glob('supervised-random-*')
    (folder / 'row.json').unlink()
    state = load_checkpoint(folder)
    write_checkpoint(folder, dict(step=3, net=state['model']), keep=1)  # its former layout
    capsys.readouterr()
    assert 'earlier version of scott: remove it' in fails(capsys, run, '--probes', 'supervised')


def test_a_training_that_diverges_is_refused_in_its_own_words(run, monkeypatch):
    "Not with flags of another command, and nothing is saved."
    views = finetune.augmented
    monkeypatch.setattr(finetune, 'augmented', lambda *a: views(*a) * float('nan'))
    with pytest.raises(InputError, match='nan or infinite at step 1, not saved: the recipe'):
        judge(run, probes='supervised')
    assert not list(run.glob('supervised-*/checkpoint.pt'))


def test_a_training_for_other_labels_is_another(run, data):
    first = judge(run, probes='supervised')['rows'][1]
    for i in range(10):
        (data / 'd').mkdir(exist_ok=True)
        (data / 'd' / f'{i}.png').write_bytes((data / 'a' / '000.png').read_bytes())
    other = judge(run, probes='supervised')['rows'][1]
    assert (first['identity']['classes'], other['identity']['classes']) == (3, 4) and other['curve'] != first['curve']


def test_a_log_file_shows_life(run, monkeypatch, capsys):
    "Where stderr is no terminal: plain lines, now and then, and no carriage return."
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    assert capsys.readouterr().err == ''  # it was fast
    monkeypatch.setattr(report, 'lively', partial(report.lively, seconds=0))
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    err = capsys.readouterr().err
    assert '\r' not in err and [line.split(': ')[1] for line in err.splitlines()] == [
        'knn, raw pixels', 'knn, random initialization', 'knn, context', 'knn, target']


# Bad input

def test_bad_flags(run, capsys):
    assert 'mlp' in fails(capsys, run, '--probes', 'knn,mlp')
    assert '--head-epochs 0' in fails(capsys, run, '--head-epochs', 0)
    assert '--seeds 0' in fails(capsys, run, '--seeds', 0)
    assert '--block 2: the encoder has 2 blocks' in fails(capsys, run, '--block', 2)
    assert '--cache-gb' in fails(capsys, run, '--cache-gb', 0)
    assert '--block 0 is for frozen features' in fails(capsys, run, '--block', 0, '--probes', 'supervised')
    assert '--seed 99999999999999999999' in fails(capsys, run, '--seed', 99999999999999999999)
    assert '--nonsense' in fails(capsys, run, '--nonsense', 1)
    assert 'nowhere' in fails(capsys, run, '--data', 'nowhere')
    assert 'no/such' in fails(capsys, run, '--data', 'folder:no/such')
    assert 'out.json' in fails(capsys, run, '--probes', 'knn', '--json', run / 'no' / 'out.json')


def test_the_home_folder_in_every_path(run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report.main(['~/run', '--json=~/copy.json', '--data', 'folder:~/flowers', '--probes', 'knn', '--seeds', '1'])
    assert json.loads((tmp_path / 'copy.json').read_text()) == json.loads(table_of(run).read_text())
    assert not list(tmp_path.glob('~*'))


def test_a_broken_image_and_the_flag_that_the_message_names(run, data, capsys):
    "The run stopped at broken images; now one has come."
    (data / 'a' / 'broken.png').write_bytes(b'no picture')
    assert '--on-bad-image skip' in fails(capsys, run, '--probes', 'knn')
    report.main([str(run), '--probes', 'knn', '--seeds', '1', '--on-bad-image', 'skip'])
    assert 'left out' in capsys.readouterr().out
    report.main([str(run), '--probes', 'linear', '--seeds', '1', '--on-bad-image', 'skip'])
    assert {r['probe'] for r in json.loads(table_of(run).read_text())['rows']} == {'knn', 'linear'}


def test_bad_run_folders(run, tmp_path, capsys):
    assert 'no run folder' in fails(capsys, tmp_path / 'missing')
    weights = run / 'target' / 'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert 'damaged' in fails(capsys, run)
    weights.unlink()
    assert 'model.safetensors' in fails(capsys, run)


def test_an_encoder_of_another_image_size(run, capsys):
    save(run / 'target', 2, img_size=64)
    assert 'target is of another run' in fails(capsys, run)


def test_spoiled_weights_are_named(run, capsys):
    encoder = Encoder.from_pretrained(run / 'context')
    torch.nn.init.constant_(encoder.transformer.blocks[0].attn.qkv.weight, float('nan'))
    encoder.save_pretrained(run / 'context')
    assert 'NaN' in fails(capsys, run, '--probes', 'knn')


def test_labels_that_no_probe_can_use(run, data, tmp_path, capsys):
    said = fails(capsys, run, '--data', f'folder:{data / "a"}')
    assert 'no image has a label' in said and 'sub-folder per class' in said and '--labels' in said
    one = write_images(tmp_path / 'one', 40, classes=('a', 'b'))
    for name in ('rare', 'odd'): write_images(one, 1, classes=(name,))
    said = fails(capsys, run, '--data', f'folder:{one}')
    assert 'rare (' in said and 'odd (' in said and ' a (' not in said and 'take these classes out' in said


def test_a_class_that_is_only_in_the_test_split(run, data, capsys, monkeypatch):
    load = features.load
    def without_c(name, split, *args, **kwargs):
        part = load(name, split, *args, **kwargs)
        if split == 'train': part.images, part.labels = (x[part.labels != 2] for x in (part.images, part.labels))
        return part
    monkeypatch.setattr(features, 'load', without_c)
    assert 'class c (0): two or more are needed' in fails(capsys, run)


def test_scores_of_what_cannot_be_scored():
    with pytest.raises(ValueError, match='NaN'): probes.scores(torch.full((2, 3), float('nan')), torch.tensor([0, 1]))
    with pytest.raises(InputError, match='knows 3 classes'): probes.scores(torch.zeros(2, 3), torch.tensor([0, 3]))


# --- earlier tables

def test_a_damaged_table_is_set_aside_and_loses_nothing(run, capsys):
    for i, text in enumerate(('{', '[]')): (run / f'probe_other{i}.json').write_text(text)
    report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    assert 'probe_other0.json is damaged' in capsys.readouterr().err
    assert table_of(run).is_file() and not list(run.glob('probe_other?.json'))
    for i, text in enumerate(('{', '[]')):
        kept = run / f'probe_other{i}.json.damaged'
        assert kept.read_text() == text
        kept.unlink()


def test_a_table_is_stored_before_it_is_printed(run, monkeypatch):
    def broken(_): raise UnicodeEncodeError('ascii', '…', 0, 1, 'no such sign')
    monkeypatch.setattr(report, 'table', broken)
    for old in run.glob('probe_flowers-??????.json'): old.unlink()
    with pytest.raises(UnicodeEncodeError): report.main([str(run), '--probes', 'knn', '--seeds', '1'])
    assert table_of(run).is_file()


def test_classes_that_change_while_a_folder_is_read(tmp_path, monkeypatch):
    write_images(tmp_path / 'd', 60)
    def late(name, split, *args, **kwargs):
        data = load(name, split, *args, **kwargs)
        if split == 'train': write_images(tmp_path / 'd', 5, classes=('0',))
        return data
    monkeypatch.setattr(features, 'load', late)
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path / 'c'))
    with pytest.raises(InputError, match='changed while it was read'):
        features.load_labeled(f'folder:{tmp_path / "d"}', 16)
