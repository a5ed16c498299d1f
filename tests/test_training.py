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

import numpy as np
import pytest
import torch
from PIL import Image

from scott import training
from scott.config import Config, make_config
from scott.data import ImageSet, InputError, petals
from scott.encoder import Encoder
from scott.runs import load_checkpoint, read_metrics, write_atomic
from scott.schedule import linear, warmup_flat_cosine
from scott.training import Trainer, epoch_order, get_state, main, make_optimizer, pretrain, save, set_state

ROOT = Path(__file__).resolve().parent.parent
TOY = dict(preset='demo', data='petals', img_size=64, embed_dim=32, depth=1, predictor_depth=1, batch_size=16, epochs=3,
           warmup_epochs=1, device='cpu', amp='off', out='unused')


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Sums over several threads may be added in another order; with one thread, bits can be compared across processes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    "max|Δ| over two states: weights, target, Adam's moments and step counts, random generators, loss sum."
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 100
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def lines(run):
    "The metrics of a run without the one number that is a timing."
    return [{k: v for k, v in m.items() if k != 'images_per_s'} for m in read_metrics(run)]


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


def test_killed_and_resumed_is_the_same_run_bit_for_bit(place, straight):
    run, python = place / 'killed', [sys.executable, '-m', 'scott.training']
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


def test_what_is_left_out_of_a_checkpoint_is_missed(flowers):
    "The negative control: every part of the state is needed."
    first, other = toy(flowers), toy(flowers)
    steps(first, 5)
    state = copy.deepcopy(get_state(first))
    expected = steps(first, 3)
    fresh = get_state(toy(flowers, seed=9))
    set_state(other, copy.deepcopy(state))
    assert steps(other, 3) == expected
    for part in ('jepa', 'optimizer', 'step'):
        set_state(other, copy.deepcopy({**state, part: fresh[part]}))
        assert steps(other, 3) != expected, part
    for part in ('cpu', 'generator'):
        set_state(other, copy.deepcopy({**state, 'rng': {**state['rng'], part: fresh['rng'][part]}}))
        assert steps(other, 3) != expected, part


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
        m.setattr(training, 'fit', lambda trainer: None)  # only what comes before the first step
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
        if trainer.step % cfg.log_every == 0: trainer.loss_sum.zero_()
        trainer.loss_sum += trainer.train_step()[0]
    write_atomic(run / 'checkpoint.pt', lambda part: torch.save(get_state(trainer), part))


def test_half_a_line_of_metrics_does_not_prevent_going_on(again, straight):
    write_state_of_step(again, 5)
    with open(again / 'metrics.jsonl', 'a') as f: f.write('{"step": 14, "epo')  # the power failed here
    pretrain(make_config(['--out', str(again), '--resume']))
    assert lines(again) == lines(straight)


# --- seeds

def test_same_seed_same_bits_other_seed_other_weights(flowers):
    def run(seed):  # one after the other: dropout draws from the process's one generator
        trainer = toy(flowers, seed=seed)
        return steps(trainer, 3), copy.deepcopy(get_state(trainer))
    (losses, one), (same, two), (others, _) = map(run, (3, 3, 4))
    assert losses == same != others
    assert distance(one, two) == 0.
    fresh = [training.build(Config(**TOY, seed=seed)).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].values(), fresh[1].values()))
    assert not torch.equal(fresh[0]['context.mask_token'], fresh[2]['context.mask_token'])


def test_initial_weights_depend_on_nothing_but_the_configuration(flowers):
    torch.rand(17)
    one = training.build(Config(**TOY)).state_dict()
    trainer = toy(flowers)
    assert all(torch.equal(v, one[k]) for k, v in trainer.jepa.state_dict().items())


# --- order

def test_each_image_once_per_epoch_and_the_rest_is_dropped(monkeypatch):
    data = images_of(torch.arange(70, dtype=torch.uint8).view(70, 1, 1, 1).expand(70, 3, 64, 64).contiguous())
    seen, real = [], training.two_views
    def spy(images, *args):
        seen.extend(images[:, 0, 0, 0].tolist())
        return real(images, *args)
    monkeypatch.setattr(training, 'two_views', spy)
    trainer = toy(data)
    assert trainer.per_epoch == 4
    for _ in range(2 * 4):
        trainer.batch()
        trainer.step += 1
    first, second = seen[:64], seen[64:]
    assert len(set(first)) == len(set(second)) == 64  # 6 of 70 wait …
    assert set(first) != set(second) and first != second  # … for another epoch, which has another order
    assert first == epoch_order(70, 0, 0)[:64].tolist() and second == epoch_order(70, 0, 1)[:64].tolist()


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(o) == list(range(50)) for o in orders)


def test_batches_are_what_the_configuration_says(flowers):
    context, target, keep = toy(flowers, mask_ratio=.5).batch()
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
        assert set(line) == {'step', 'epoch', 'loss', 'feature_std', 'lr', 'wd', 'momentum', 'images_per_s'}
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


def test_feature_std_tells_a_constant_target(flowers, tmp_path):
    trainer = toy(flowers, out=str(tmp_path))
    _, now, target = trainer.train_step()
    alive = training.log(trainer, now, target, 1, 1.)['feature_std']
    trainer.jepa.target.forward = lambda images: torch.arange(32.).expand(len(images), 16, 32)
    assert training.log(trainer, now, target, 1, 1.)['feature_std'] < 1e-6 < .1 < alive <= 1


# --- a loss that is no number

def diverging(monkeypatch, first):
    "From step `first` on, the loss is NaN and so are the weights, as after a real overflow."
    real = Trainer.train_step
    def train_step(self):
        loss, now, target = real(self)
        if self.step < first: return loss, now, target
        with torch.no_grad(): self.jepa.context.mask_token.fill_(math.nan)
        return loss * math.nan, now, target
    monkeypatch.setattr(Trainer, 'train_step', train_step)


@pytest.mark.parametrize('log_every', [1, 100])
def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(place, tmp_path, monkeypatch, capsys, log_every):
    diverging(monkeypatch, first=4)
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path, 'run', '--data', f'folder:{place / "images"}', '--checkpoint-minutes', '0',
                     '--log-every', str(log_every)))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'nan' in last and 'step' in last and '--lr' in last
    run = tmp_path / 'run'
    assert reached(run) == 3
    assert all(t.isfinite().all() for t in tensors(load_checkpoint(run)['jepa']))
    assert all(math.isfinite(m['loss']) for m in read_metrics(run))


def test_a_real_overflow_is_noticed(flowers, tmp_path):
    trainer = toy(flowers, lr=1e38, lr_start=1e38, warmup_epochs=0, log_every=1, out=str(tmp_path))
    with pytest.raises(InputError, match=r'loss is (nan|inf)'): training.fit(trainer)
    assert trainer.step < 12 and not (tmp_path / 'checkpoint.pt').exists()


# --- low precision

def test_a_step_in_bfloat16_is_finite_and_keeps_weights_in_32_bits(flowers):
    trainer = toy(flowers, amp='bf16')
    assert trainer.dtype == torch.bfloat16
    loss = steps(trainer, 2)
    assert all(map(math.isfinite, loss)) and loss[0] == pytest.approx(steps(toy(flowers), 1)[0], rel=.02)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.jepa.parameters())


# --- files are replaced whole

def test_a_write_that_fails_leaves_the_old_checkpoint(flowers, tmp_path, monkeypatch):
    trainer = toy(flowers, out=str(tmp_path))
    save(trainer)
    before = (tmp_path / 'checkpoint.pt').read_bytes()
    steps(trainer, 1)
    def cut(state, part):
        Path(part).write_bytes(before[:len(before) // 2])
        raise OSError('no space left on device')
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', cut)
        with pytest.raises(OSError): save(trainer)
    assert (tmp_path / 'checkpoint.pt').read_bytes() == before and load_checkpoint(tmp_path)['step'] == 0
    save(trainer)
    assert load_checkpoint(tmp_path)['step'] == 1 and not list(tmp_path.rglob('*.part'))


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
        with pytest.raises(OSError): save(trainer)
    for name in ('context', 'target'): Encoder.from_pretrained(tmp_path / name)
    save(trainer)
    assert not list(tmp_path.rglob('*.part'))


@pytest.mark.parametrize('damage', ['truncated', 'empty', "flipped", 'text'])
def test_a_damaged_checkpoint_is_an_error_with_its_name(straight, tmp_path, damage):
    good = (straight / 'checkpoint.pt').read_bytes()
    i = len(good) // 2
    (tmp_path / 'checkpoint.pt').write_bytes(dict(truncated=good[:i], empty=b'', text=b'not a checkpoint',
                                                  flipped=good[:i] + bytes([good[i] ^ 255]) + good[i + 1:])[damage])
    with pytest.raises(InputError, match=r'checkpoint\.pt is damaged'): load_checkpoint(tmp_path)


# --- another device

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('amp', ['off', 'fp16'])
def test_a_run_begun_on_a_cpu_goes_on_on_a_gpu(flowers, amp):
    first, second = toy(flowers), toy(flowers, device='cuda', amp=amp)
    steps(first, 2)
    set_state(second, copy.deepcopy(get_state(first)))
    assert math.isfinite(steps(second, 1)[0]) and second.step == 3
