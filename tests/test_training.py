"""A run as a whole: killed and resumed to the last bit, seeds, schedules, the target, what is written and kept."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from scott.train import processes as parallel
from scott.train import trainer as training
from scott.train.config import Config, make_config
from scott.data.sets import ImageSet, petals
from scott.cli import InputError
from scott.encoder import Encoder
from scott.train.feed import epoch_order, stream
from scott.train.files import load_checkpoint, write_checkpoint
from scott.train.run import read_metrics
from scott.schedule import linear, make_optimizer, warmup_flat_cosine
from scott.train.trainer import Trainer, get_state, save, set_state
from scott.train.pretrain import main, pretrain

ROOT = Path(__file__).resolve().parent.parent
TOY = dict(preset='demo', data='petals', img_size=64, embed_dim=32, depth=1, predictor_depth=1, batch_size=16, epochs=3,
           warmup_epochs=1, device='cpu', amp='off', out='unused')
pytestmark = pytest.mark.usefixtures('one_thread')


def images_of(tensor):
    n = len(tensor)
    return ImageSet(tensor, torch.full((n,), -1), torch.ones(n), [], 'toy', False, [])


@pytest.fixture(scope='module')
def flowers():
    return images_of(petals(n=70, size=64)[0])  # 4 batches of 16, and 6 images left over


def toy(data, **changes):
    return Trainer(Config(**{**TOY, **changes}), data)


def steps(trainer, n):
    return [trainer.train_step()[0].item() for _ in range(n)]


def tensors(tree):
    "Every tensor and number of a nested state, in order."
    if isinstance(tree, dict): tree = [tree[k] for k in sorted(tree, key=str)]
    if isinstance(tree, (list, tuple)): return [t for branch in tree for t in tensors(branch)]
    return [torch.as_tensor(tree)] if isinstance(tree, (torch.Tensor, int, float)) else []


def distance(a, b):
    "max|Δ| over two states: weights, target, Adam's moments and step counts, loss sum."
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 100
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def lines(run):
    "The metrics of a run without the two numbers that are timings."
    return [{k: v for k, v in m.items() if k not in ('images_per_s', 'data_wait')} for m in read_metrics(run)]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


# --- one run of the real command, as a reference

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with 64 small pictures; decoded caches go beside it."
    place, rng = tmp_path_factory.mktemp('training'), np.random.default_rng(0)
    (place / 'images').mkdir()
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (36, 44, 3), dtype=np.uint8)).save(place / 'images' / f'{i:02}.png')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SCOTT_CACHE', str(place / 'cache'))
        yield place


def command(place, name, *more):
    "12 steps: 3 epochs of 4 batches."
    settings = ('--preset demo --embed-dim 32 --depth 1 --predictor-depth 1 --batch-size 16 --epochs 3 '
                '--warmup-epochs 1 --device cpu --amp off --log-every 2').split()
    return [*settings, '--data', f'folder:{place / "images"}', '--out', str(place / name), *more]


@pytest.fixture(scope='module')
def straight(place):
    "The run folder of 12 uninterrupted steps."
    main(command(place, 'straight'))
    return place / 'straight'


@pytest.fixture
def again(straight, tmp_path):
    "A copy of that folder, to be changed."
    return Path(shutil.copytree(straight, tmp_path / 'run'))


def stored_settings(run):
    stored = json.loads((run / 'config.json').read_text())
    return {k: v for k, v in stored.items() if k in Config.__dataclass_fields__}


# --- kill and resume

def reached(run):
    "The step of a run's checkpoint, 0 without one."
    return load_checkpoint(run)['step'] if (run / 'checkpoint.pt').is_file() else 0


def test_killed_and_resumed_is_the_same_run_bit_for_bit(place, straight, figure):
    run, python = place / 'killed', [sys.executable, '-m', 'scott.train.trainer']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(place / 'killed.log', 'w') as out:
        process = subprocess.Popen([*python, *command(place, 'killed', '--checkpoint-minutes', '0')], env=env,
                                   stdout=out, stderr=out)
        limit = time.monotonic() + 600
        while reached(run) < 3 and process.poll() is None and time.monotonic() < limit: time.sleep(.02)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (place / 'killed.log').read_text()
    assert 3 <= reached(run) < 12
    subprocess.run([*python, '--out', str(run), '--resume'], env=env, check=True, capture_output=True, timeout=600)
    assert distance(load_checkpoint(straight), load_checkpoint(run)) == 0.
    assert lines(run) == lines(straight) and [m['step'] for m in lines(run)] == [2, 4, 6, 8, 10, 12]
    for name in ('context', 'target'):
        ours, theirs = (Encoder.from_pretrained(r / name).state_dict() for r in (run, straight))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list(run.rglob('*.part'))
    figure('01 12 steps straight = kill -9 + resume (weights, target, Adam, losses)', 'max|Δ| = 0.0')


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_goes_on_bit_for_bit(place, straight, tmp_path, figure, number, code):
    argv = command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--checkpoint-minutes', '60')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen([sys.executable, '-m', 'scott.train.trainer', *argv], env=env, stderr=subprocess.PIPE, text=True)
    run, deadline = tmp_path / 'run', time.monotonic() + 120
    while not read_metrics(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.005)
    process.send_signal(number)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    step = reached(run)
    assert process.returncode == code and 2 <= step < 12
    assert last == f'{number.name} after step {step}: saved in {run}; add --resume to go on'
    main(['--out', str(run), '--resume'])
    ours, theirs = load_checkpoint(run), load_checkpoint(straight)
    assert ours.pop('identity') == theirs.pop('identity')
    assert distance(ours, theirs) == 0. and lines(run) == lines(straight)
    figure(f'02 {number.name} in the middle of a run, then --resume', f'exit code {code}, checkpoint of that step; max|Δ| = 0.0')


def test_the_last_checkpoints_are_kept(place, tmp_path):
    for keep in (1, 3):
        main(command(tmp_path, str(keep), '--data', f'folder:{place / "images"}', '--checkpoint-minutes', '0',
                     '--keep-checkpoints', str(keep)))
    names = lambda keep: sorted(p.name for p in (tmp_path / keep).glob('checkpoint*'))
    assert names('1') == ['checkpoint.pt']
    assert names('3') == ['checkpoint-10.pt', 'checkpoint-11.pt', 'checkpoint.pt']


def test_what_is_left_out_of_a_checkpoint_is_missed(flowers, figure):
    "The negative control: every part of the state is needed."
    first, other = toy(flowers), toy(flowers)
    steps(first, 5)
    state = copy.deepcopy(get_state(first))
    expected, gaps = steps(first, 3), {}
    fresh = get_state(toy(flowers, seed=9))
    set_state(other, copy.deepcopy(state))
    assert steps(other, 3) == expected
    for part in ('jepa', 'optimizer', 'step'):
        set_state(other, copy.deepcopy({**state, part: fresh[part]}))
        gaps[part] = max(abs(a - b) for a, b in zip(steps(other, 3), expected))
    for part in ('views', 'dropout'):  # a random stream that were another one
        with pytest.MonkeyPatch.context() as m:
            changed = lambda *place: stream(*place, 'other') if part in place else stream(*place)
            m.setattr(parallel if part == 'views' else training, 'stream', changed)
            set_state(other, copy.deepcopy(state))
            gaps[part] = max(abs(a - b) for a, b in zip(steps(other, 3), expected))
    assert all(gaps.values()), gaps
    figure('01 the same with one part left out (negative control)',
           'loss Δ: ' + ', '.join(f'{part} {gap:.0e}' for part, gap in gaps.items()))


def test_resuming_a_finished_run_changes_nothing(again):
    before, state = contents(again), load_checkpoint(again)
    main(['--out', str(again), '--resume'])
    after = contents(again)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] in ([], [Path('checkpoint.pt')])
    assert distance(load_checkpoint(again), state) == 0.  # it may be stored in another order, but says the same


def test_lines_after_the_checkpoint_are_dropped_at_resume(again, straight, monkeypatch):
    complete = lines(straight)
    write_state_of_step(again, 5)
    with monkeypatch.context() as m:
        m.setattr(training, 'fit', lambda trainer: SimpleNamespace(name=None))  # only what comes before the first step
        pretrain(make_config(['--out', str(again), '--resume']))
    assert lines(again) == complete[:2]  # steps 2 and 4
    pretrain(make_config(['--out', str(again), '--resume']))
    assert lines(again) == complete
    assert distance(load_checkpoint(again), load_checkpoint(straight)) == 0.


def write_state_of_step(run, step):
    "Give a run folder the checkpoint of an earlier step."
    cfg = Config(**{**stored_settings(run), 'out': str(run)})
    data = training.load(cfg.data, cfg.ssl_split, round(cfg.img_size * 256 / 224))
    trainer = Trainer(cfg, data)
    for _ in range(step):
        if trainer.step % cfg.log_every == 0:
            for total in (trainer.loss_sum, trainer.norm_sum): total.zero_()
        trainer.train_step()
    write_checkpoint(run, get_state(trainer), keep=1)


def test_half_a_line_of_metrics_does_not_prevent_going_on(again, straight):
    write_state_of_step(again, 5)
    with open(again / 'metrics.jsonl', 'a') as f: f.write('{"step": 14, "epo')  # the power failed here
    pretrain(make_config(['--out', str(again), '--resume']))
    assert lines(again) == lines(straight)


# --- seeds

def test_same_seed_same_bits_other_seed_other_weights(flowers, figure):
    def run(seed):
        trainer = toy(flowers, seed=seed)
        return steps(trainer, 3), copy.deepcopy(get_state(trainer))
    (losses, one), (same, two), (others, _) = map(run, (3, 3, 4))
    assert losses == same != others
    assert distance(one, two) == 0.
    fresh = [training.build(Config(**TOY, seed=seed)).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].values(), fresh[1].values()))
    assert not torch.equal(fresh[0]['context.mask_token'], fresh[2]['context.mask_token'])
    figure('04 same seed, same losses to the bit', 'max|Δ| = 0.0')


def test_initial_weights_depend_on_nothing_but_the_configuration(flowers):
    torch.rand(17)
    one = training.build(Config(**TOY)).state_dict()
    trainer = toy(flowers)
    assert all(torch.equal(v, one[k]) for k, v in trainer.jepa.state_dict().items())


GOLDEN = Path(__file__).with_name('golden_losses.json')  # written by `python tests/test_training.py`


def golden_losses():
    "50 steps of a toy run on drawn flowers."
    return steps(toy(images_of(petals(n=70, size=64)[0]), epochs=13), 50)


def test_golden_losses(figure):
    "Other processors add in another order, so not to the bit; but a change of the mathematics shows at once."
    stored = json.loads(GOLDEN.read_text())
    ours = golden_losses()
    assert ours == pytest.approx(stored['losses'], rel=1e-3)
    assert len(stored['losses']) == 50 and stored['losses'][-1] < .6 * stored['losses'][0]
    gap = max(abs(a / b - 1) for a, b in zip(ours, stored['losses']))
    figure('11 50 golden losses', f'largest relative difference {gap:.1e}')


# --- order

def test_each_image_once_per_epoch_and_the_rest_is_dropped(monkeypatch):
    data = images_of(torch.arange(70, dtype=torch.uint8).view(70, 1, 1, 1).expand(70, 3, 64, 64).contiguous())
    trainer = toy(data)
    assert trainer.per_epoch == 4
    seen = [i for step in range(1, 9) for (batch,) in [trainer.feed.pictures(step)] for i in batch[:, 0, 0, 0].tolist()]
    first, second = seen[:64], seen[64:]
    assert len(set(first)) == len(set(second)) == 64  # 6 of 70 wait …
    assert set(first) != set(second) and first != second  # … for another epoch, which has another order
    assert first == epoch_order(70, 0, 0)[:64].tolist() and second == epoch_order(70, 0, 1)[:64].tolist()


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(o) == list(range(50)) for o in orders)


def test_batches_are_what_the_configuration_says(flowers):
    (context, target, keep), = toy(flowers, mask_ratio=.5).feed.micro_batches(step=1)
    assert context.shape == target.shape == (16, 3, 64, 64) and context.dtype == torch.float32
    assert keep.shape == (16, 16) and keep.dtype == torch.bool and (keep.sum(1) == 8).all()
    assert not torch.equal(context, target)


# --- optimizer and schedules

def test_decay_is_for_matrices_only_and_the_target_is_not_optimized(flowers):
    trainer = toy(flowers)
    decayed, plain = (group['params'] for group in make_optimizer(trainer.jepa).param_groups)
    assert all(p.ndim > 1 for p in decayed) and all(p.ndim <= 1 for p in plain) and plain
    names = {id(p): name for name, p in trainer.jepa.named_parameters()}
    assert {names[id(p)].split('.')[0] for p in decayed + plain} == {'context', 'predictor'}
    assert len(decayed + plain) == sum(not n.startswith('target.') for n in names.values())


def test_schedules_reach_the_optimizer(flowers):
    trainer, used = toy(flowers), []
    real = trainer.opt.step
    def spy(*args, **kwargs):
        used.append([(g['lr'], g['weight_decay']) for g in trainer.opt.param_groups])
        return real(*args, **kwargs)
    trainer.opt.step = spy
    told = [trainer.train_step()[1] for _ in range(12)]
    for k, (groups, now) in enumerate(zip(used, told, strict=True), 1):  # the k-th step uses the value at k, from 1
        lr, wd = warmup_flat_cosine(k, 12, 4, 1e-6, 5e-4, 1e-5, .72), linear(k, 12, .04, .4)
        assert groups == [(lr, wd), (lr, 0.)]
        assert now == dict(lr=lr, wd=wd, momentum=linear(k, 12, .996, 1.))
    assert used[-1][0] == (pytest.approx(1e-5), pytest.approx(.4))


def test_without_learning_rate_nothing_moves(flowers):
    trainer = toy(flowers, lr=0., lr_start=0., lr_final=0.)
    before = copy.deepcopy(trainer.jepa.context.state_dict())
    steps(trainer, 2)
    assert all(torch.equal(before[k], v) for k, v in trainer.jepa.context.state_dict().items())


# --- the target

def test_target_changes_by_the_moving_average_and_by_nothing_else(flowers):
    trainer = toy(flowers, lr_start=1e-3, lr=1e-3, warmup_epochs=0)
    for _ in range(3):
        before = [p.clone() for p in trainer.jepa.target.parameters()]
        now = trainer.train_step()[1]
        for old, new, context in zip(before, trainer.jepa.target.parameters(), trainer.jepa.context.parameters()):
            assert torch.equal(new, torch.lerp(old, context.detach(), 1 - now['momentum']))
            assert not torch.equal(new, context)
    assert all(p.grad is None for p in trainer.jepa.target.parameters())


def test_momentum_1_leaves_the_target(flowers):
    trainer = toy(flowers, momentum=1., momentum_final=1.)
    before = copy.deepcopy(trainer.jepa.state_dict())
    steps(trainer, 3)
    after = trainer.jepa.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith('target.'))
    assert not torch.equal(before['context.mask_token'], after['context.mask_token'])


# --- what is written

def test_run_folder(straight):
    names = {p.name for p in straight.iterdir()}
    assert names == {'config.json', 'metrics.jsonl', 'curves.png', 'checkpoint.pt', 'context', 'target'}
    for line in read_metrics(straight):
        assert set(line) == {'step', 'epoch', 'loss', 'feature_std', 'rankme', 'cosine', 'distance', 'grad_tokenizer',
                             'grad_encoder', 'grad_predictor', 'lr', 'wd', 'momentum', 'skipped', 'images_per_s',
                             'data_wait'}
        assert all(math.isfinite(v) for v in line.values()) and line['epoch'] == line['step'] / 4
    stored = load_checkpoint(straight)['jepa']
    for name in ('context', 'target'):
        encoder = Encoder.from_pretrained(straight / name)
        assert all(torch.equal(v, stored[f'{name}.{k}']) for k, v in encoder.state_dict().items())


def test_config_is_the_caption_of_every_number(straight, place):
    stored = json.loads((straight / 'config.json').read_text())
    assert stored['ssl_split'] == 'all' and stored['contains_test_images'] is True
    assert stored['images'] == 64 and stored['skipped_images'] == [] and stored['seed'] == 0
    assert stored['data'] == f'folder:{place / "images"}' and stored['autocast'] == 'None'
    assert stored['machine']['device'] == 'cpu' and stored['machine']['torch'] == torch.__version__
    assert stored['machine']['hardware'] and stored['machine']['threads'] == 1
    assert set(Config.__dataclass_fields__) <= set(stored)


def test_the_training_split_alone_has_no_test_images(place):
    main(command(place, 'train-only', '--ssl-split', 'train', '--epochs', '1', '--warmup-epochs', '0'))
    stored = json.loads((place / 'train-only' / 'config.json').read_text())
    assert stored['ssl_split'] == 'train' and stored['contains_test_images'] is False
    assert stored['images'] == 51  # four fifths of 64


def test_logged_loss_is_the_mean_since_the_last_line(flowers, tmp_path):
    trainer = toy(flowers, epochs=2, log_every=3, out=str(tmp_path))
    losses, real = [], trainer.train_step
    def spy():
        result = real()
        losses.append(result[0].item())
        return result
    trainer.train_step = spy
    training.fit(trainer)
    metrics = read_metrics(tmp_path)
    assert [m['step'] for m in metrics] == [3, 6, 8]  # every third, and the last
    for m, part in zip(metrics, (losses[:3], losses[3:6], losses[6:])):
        assert m['loss'] == pytest.approx(sum(part) / len(part), rel=1e-6)


def test_feature_std_tells_a_constant_target(flowers, tmp_path, figure):
    trainer = toy(flowers, out=str(tmp_path))
    _, now, target = trainer.train_step()
    alive = training.log(trainer, now, target, 1, 1.)['feature_std']
    trainer.jepa.target.forward = lambda images: torch.arange(32.).expand(len(images), 16, 32)
    constant = training.log(trainer, now, target, 1, 1.)['feature_std']
    assert constant < 1e-6 < .1 < alive <= 1
    figure('08 feature std: constant encoder, fresh encoder', f'{constant:.1e}, {alive:.2f}')


def test_logged_gradient_norms_are_the_means_of_each_part(flowers, tmp_path):
    trainer, seen = toy(flowers, out=str(tmp_path), warmup_epochs=0), []
    real = trainer.opt.step
    def spy(*args, **kwargs):
        total = lambda parameters: torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
        seen.append([total(trainer.jepa.context.tokenizer.parameters()), total(trainer.jepa.predictor.parameters())])
        return real(*args, **kwargs)
    trainer.opt.step = spy
    for _ in range(3): _, now, target = trainer.train_step()
    line = training.log(trainer, now, target, 3, 1.)
    mean = np.mean(seen, 0)
    assert [line['grad_tokenizer'], line['grad_predictor']] == pytest.approx(mean.tolist(), rel=1e-4)
    assert trainer.norm_sum.tolist() == [0., 0., 0., 0.] and line['grad_encoder'] > 0


# --- is it learning?

@pytest.fixture(scope='module')
def labeled(place):
    "The same pictures in two classes."
    for i, path in enumerate(sorted((place / 'images').iterdir())):
        (place / 'two' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / 'two' / 'ab'[i % 2])
    return f'folder:{place / "two"}'


def signs(run): return [{k: v for k, v in m.items() if not k.startswith('knn')} for m in lines(run)]


def test_a_quick_knn_changes_no_bit_of_the_run_and_is_resumed(place, labeled, tmp_path, capsys, figure):
    for every in ('0', '1'):
        main(command(tmp_path, every, '--data', labeled, '--knn-every', every))
    without, with_it = tmp_path / '0', tmp_path / '1'
    assert signs(without) == signs(with_it) == lines(without)
    assert distance(load_checkpoint(without), load_checkpoint(with_it)) == 0.
    looks = [m for m in lines(with_it) if 'knn' in m]
    assert [m['step'] for m in looks] == [4, 8, 12] and len({m['knn_random'] for m in looks}) == 1
    assert all(0 <= m['knn'] <= 100 and m['knn_images'] == 10 for m in looks)  # 51 are for training
    complete = lines(with_it)
    write_state_of_step(with_it, 5)
    main(['--out', str(with_it), '--resume'])
    assert lines(with_it) == complete
    assert 'too few labels' not in capsys.readouterr().out
    figure('08 with a quick k-NN every epoch, and without', 'the same run, max|Δ| = 0.0')


def test_the_random_figure_is_that_of_the_initial_weights(labeled, tmp_path):
    cfg = make_config(command(tmp_path, 'run', '--data', labeled, '--knn-every', '1'))
    trainer, _ = training.prepare(cfg, parallel.Group())
    before = training.quick_knn(trainer, trainer.jepa)
    training.open_run(trainer, None)
    assert trainer.knn_random == before
    again = training.quick_knn(trainer, training.build(Config(**{**vars(cfg), 'seed': 5})))
    state = torch.get_rng_state()
    training.quick_knn(trainer, trainer.jepa)
    assert torch.equal(torch.get_rng_state(), state) and 0 <= again <= 100


def test_without_labels_the_run_says_so_once(place, tmp_path, capsys):
    main(command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--knn-every', '1'))
    out = capsys.readouterr().out
    assert out.count('too few labels') == 1 and 'early: too early to tell (no k-NN figure)' in out
    assert not any('knn' in m for m in lines(tmp_path / 'run'))


def test_an_alarm_is_printed_once_and_the_run_goes_on(place, tmp_path, capsys):
    main(command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--momentum', '0', '--momentum-final', '0'))
    out = capsys.readouterr().out.splitlines()
    alarms = [line for line in out if line.startswith('copied: ')]
    assert len(alarms) == 2 and all('nbs/15_jepa.ipynb' in line for line in alarms)  # when it came, and at the end
    assert len(lines(tmp_path / 'run')) == 6 and out[-1].startswith('done')


def test_another_alarm_is_printed_too(flowers, tmp_path, monkeypatch, capsys):
    "Every word when it comes, none twice in a row, also when there is calm between."
    words = iter(['early', 'copied', 'copied', 'early', 'copied', 'runaway', 'runaway', 'copied'])
    said = lambda word: dict(word=word, alarm=word != 'early', text=f'said {word}')
    monkeypatch.setattr(training, 'verdict', lambda metrics: said(next(words)))
    training.fit(toy(flowers, epochs=2, log_every=1, out=str(tmp_path)))
    out = [line.strip() for line in capsys.readouterr().out.splitlines() if 'said' in line]
    assert out == ['said copied', 'said runaway', 'said copied']


def test_the_time_of_a_log_line_counts_in_the_next_one(flowers, tmp_path, monkeypatch):
    clock, seconds = [0.], []
    monkeypatch.setattr(training, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = toy(flowers, epochs=1, warmup_epochs=0, log_every=1, out=str(tmp_path))
    def log(trainer, now, target, steps, s, made):
        seconds.append(s)
        clock[0] += 7.  # a k-NN, say
        return dict(step=trainer.step, lr=0., loss=1.)
    monkeypatch.setattr(training, 'log', log)
    training.fit(trainer)
    assert seconds == [0., 7., 7., 7.]


def test_a_line_of_metrics_is_json_without_nan(flowers, tmp_path):
    trainer = toy(flowers, batch_size=1, out=str(tmp_path))
    _, now, target = trainer.train_step()
    line = training.log(trainer, now, target, 1, 1.)
    assert 'cosine' not in line and 'rankme' in line  # there is no pair of images
    trainer.jepa.target.forward = lambda images: torch.full((len(images), 16, 32), math.nan)
    line = training.log(trainer, now, target, 1, 1.)
    assert not {'cosine', 'rankme', 'feature_std'} & set(line) and 'loss' in line
    refuse = lambda word: pytest.fail(word)
    for text in (tmp_path / 'metrics.jsonl').read_text().splitlines(): json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize('overflow', [(), (2,), (2, 3)])
def test_steps_that_overflowed_16_bits_do_not_count_in_the_mean_of_norms(flowers, tmp_path, overflow):
    trainer, seen = toy(flowers, out=str(tmp_path), warmup_epochs=0), []
    trainer.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    real = trainer.scaler.step
    def spy(opt):
        grads = [p.grad / trainer.scaler.get_scale() for p in trainer.jepa.predictor.parameters()]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return real(opt)
    trainer.scaler.step = spy
    for step in (1, 2, 3):
        handle = trainer.jepa.context.mask_token.register_hook(lambda g: g * (math.inf if step in overflow else 1))
        _, now, target = trainer.train_step()
        handle.remove()
    line = training.log(trainer, now, target, 3, 1.)
    good = [norm for step, norm in enumerate(seen, 1) if step not in overflow]
    assert line['grad_predictor'] == pytest.approx(sum(good) / len(good), rel=1e-4) and line['skipped'] == 0
    assert trainer.norm_sum.tolist() == [0.] * 4


def test_a_part_that_is_not_in_the_loss_has_norm_zero(flowers, tmp_path):
    trainer = toy(flowers, out=str(tmp_path))
    trainer.student = lambda views, keep: trainer.jepa.context(views, keep)  # the predictor stays, and is not asked
    _, now, target = trainer.train_step()
    line = training.log(trainer, now, target, 1, 1.)
    assert line['grad_predictor'] == 0. < line['grad_encoder']


def test_the_quick_knn_takes_every_so_many_of_many_images(labeled, tmp_path, monkeypatch):
    cfg = make_config(command(tmp_path, 'run', '--data', labeled, '--knn-every', '1'))
    def shown(n):
        images = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 1, 1)
        return ImageSet(images, torch.arange(n) % 3, torch.ones(n), list('abc'), 'toy', False, [])
    for n, left in ((100, 100), (10_001, 10_001), (25_000, 12_500)):
        monkeypatch.setattr(training, 'labeled', lambda cfg: shown(n))
        looking = training.prepare(cfg, parallel.Group())[0].neighbors
        assert len(looking.images) == len(looking.labels) == left
        assert torch.equal(looking.labels, looking.images.flatten() % 3)


@pytest.mark.parametrize('old', ['none', 'three'])
def test_a_checkpoint_from_before_norms_were_summed_can_be_resumed(flowers, old):
    first, second = toy(flowers), toy(flowers)
    steps(first, 3)
    state = copy.deepcopy(get_state(first))
    norm_sum = state.pop('norm_sum')
    if old == 'three': state['norm_sum'] = norm_sum[:3]  # without the number of steps in them
    set_state(second, state)
    assert steps(first, 2) == steps(second, 2) and second.norm_sum[3] == 2


# --- a loss that is no number

def diverging(monkeypatch, steps):
    "In these steps a gradient is NaN, as after an overflow."
    real = Trainer.train_step
    def train_step(self):
        if self.step + 1 not in steps: return real(self)
        handle = self.jepa.context.mask_token.register_hook(lambda g: g * math.nan)
        try: return real(self)
        finally: handle.remove()
    monkeypatch.setattr(Trainer, 'train_step', train_step)


@pytest.mark.parametrize('log_every', [1, 100])
def test_a_nan_stops_the_run_and_keeps_the_checkpoint(place, tmp_path, monkeypatch, capsys, log_every, figure):
    diverging(monkeypatch, steps=(4, 5))
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--checkpoint-minutes', '0',
                     '--log-every', str(log_every)))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'nan or infinite at step 4:' in last and '--lr' in last
    run = tmp_path / 'run'
    assert reached(run) == 3
    assert all(t.isfinite().all() for t in tensors(load_checkpoint(run)['jepa']))
    assert all(math.isfinite(m['loss']) for m in read_metrics(run))
    figure(f'07 NaN in step 4, a line of metrics every {log_every} steps', 'stopped, step 4 named, checkpoint of step 3 kept')


def test_a_nan_can_be_skipped_and_is_counted(place, tmp_path, monkeypatch):
    diverging(monkeypatch, steps=(4, 5, 9))
    main(command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--on-nan', 'skip'))
    metrics = read_metrics(tmp_path / 'run')
    assert [m['skipped'] for m in metrics] == [0, 1, 2, 2, 3, 3]  # steps 2, 4, …, 12
    assert all(math.isfinite(m['loss']) for m in metrics)
    state = load_checkpoint(tmp_path / 'run')
    assert all(t.isfinite().all() for t in tensors(state))
    assert {v['step'].item() for v in state['optimizer']['state'].values()} == {9}  # Adam has seen 12 - 3 steps


@pytest.mark.parametrize('without', ['', 'optimizer'])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(flowers, monkeypatch, without):
    trainer = toy(flowers, without=without, on_nan='skip')
    diverging(monkeypatch, steps=(3,))
    for step in (1, 2, 3, 4):
        before = copy.deepcopy([trainer.jepa.context.state_dict(), trainer.opt.state_dict()['state']])
        trainer.train_step()
        after = [trainer.jepa.context.state_dict(), trainer.opt.state_dict()['state']]
        same = all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after))) and bool(before[1])
        assert same == (step == 3)


def test_a_real_overflow_is_noticed(flowers, tmp_path):
    trainer = toy(flowers, lr=1e38, lr_start=1e38, warmup_epochs=0, log_every=1, out=str(tmp_path))
    with pytest.raises(InputError, match=r'nan or infinite at step'): training.fit(trainer)
    assert trainer.step < 12 and not (tmp_path / 'checkpoint.pt').exists()


def test_weights_that_are_no_numbers_are_not_saved(flowers, tmp_path):
    trainer = toy(flowers, out=str(tmp_path))
    save(trainer)
    steps(trainer, 1)
    with torch.no_grad(): trainer.jepa.context.mask_token.fill_(math.inf)
    with pytest.raises(InputError, match='weights are nan or infinite at step 1'): save(trainer)
    assert load_checkpoint(tmp_path)['step'] == 0


# --- low precision

def test_a_step_in_bfloat16_is_finite_and_keeps_weights_in_32_bits(flowers):
    trainer = toy(flowers, amp='bf16')
    assert trainer.dtype == torch.bfloat16
    loss = steps(trainer, 2)
    assert all(map(math.isfinite, loss)) and loss[0] == pytest.approx(steps(toy(flowers), 1)[0], rel=.02)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.jepa.parameters())


# --- files are replaced whole

def test_encoders_that_are_cut_while_saved_leave_the_old_ones(flowers, tmp_path, monkeypatch):
    trainer = toy(flowers, out=str(tmp_path))
    save(trainer)
    steps(trainer, 1)
    def cut(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / 'model.safetensors').write_bytes(b'half')
        raise OSError('no space left on device')
    with monkeypatch.context() as m:
        m.setattr(Encoder, 'save_pretrained', cut)
        with pytest.raises(InputError, match='context could not be written'): save(trainer)
    for name in ('context', 'target'): Encoder.from_pretrained(tmp_path / name)
    save(trainer)
    assert not list(tmp_path.rglob('*.part'))


# --- another device

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('amp', ['off', 'fp16'])
def test_a_run_begun_on_a_cpu_goes_on_on_a_gpu(flowers, amp):
    first, second = toy(flowers), toy(flowers, device='cuda', amp=amp)
    steps(first, 2)
    set_state(second, {**copy.deepcopy(get_state(first)), 'identity': get_state(second)['identity']})  # as with --amp auto
    assert math.isfinite(steps(second, 1)[0]) and second.step == 3


if __name__ == '__main__':
    torch.set_num_threads(1)
    from scott.train.machine import describe_machine
    record = dict(command='python tests/test_training.py', machine=describe_machine(torch.device('cpu')))
    GOLDEN.write_text(json.dumps({**record, 'losses': golden_losses()}, indent=1) + '\n')
