"""The class Run: a folder of today, one of an earlier layout, records without weights, and what is refused."""
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import scott
from scott.cli import InputError
from scott.train.config import FREE, Config, build, identity
from scott.train.files import write_checkpoint
from scott.train.run import Run, encoder_step, load_encoder, read_metrics, save_encoder

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'results'
SMALL = dict(preset='demo', data='petals', img_size=64, embed_dim=16, depth=1, num_heads=2, predictor_depth=1, seed=5,
             epochs=2, warmup_epochs=1, batch_size=4)

# config.json and identity as commit c456411 wrote them, spelled out: no code of today takes part
FORMER = dict(
    preset='demo', data='petals', data_root=None, ssl_split='all', on_bad_image='fail', img_size=64, tokenizer='sparse',
    embed_dim=16, depth=1, num_heads=2, ffn='swiglu', reg_tokens=0, predictor_depth=1, drop_rate=0.0,
    attn_drop_rate=0.0, drop_path_rate=0.0, mask='blockwise', mask_ratio=0.6, epochs=2, batch_size=4, lr=0.001,
    lr_start=1e-06, lr_final=1e-05, warmup_epochs=1, flat=0.72, weight_decay=0.04, weight_decay_final=0.4,
    momentum=0.996, momentum_final=1.0, seed=5, device='auto', amp='auto', accumulate=1, without='graphs,amp',
    on_nan='stop', log_every=20, knn_every=0, checkpoint_minutes=5.0, keep_checkpoints=2, out='runs/former',
    resume=False)
FORMER_FACTS = dict(
    images=100, contains_test_images=True, skipped_images=[], processes=1, launch=None, autocast='None',
    machine=dict(device='cpu', hardware='AMD EPYC', threads=1, torch='2.14.1', python='3.11.7', scott='0.1.0'))
FORMER_FREE = {'data_root', 'device', 'accumulate', 'without', 'on_nan', 'knn_every', 'checkpoint_minutes',
               'keep_checkpoints', 'out', 'resume'}
FORMER_ENCODER = dict(
    attn_drop_rate=0.0, depth=1, drop_path_rate=0.0, drop_rate=0.0, embed_dim=16, ffn='swiglu', img_size=64, in_chans=3,
    mlp_ratio=4.0, num_heads=2, patch_size=16, reg_tokens=0, tokenizer='sparse')


def trained(cfg, by=.01):
    "Networks whose three parts all differ from the initial ones."
    jepa = build(cfg)
    with torch.no_grad():
        for p in (*jepa.context.parameters(), *jepa.predictor.parameters()): p.add_(by)
    jepa.update_target(.5)
    return jepa


def write_log(folder, steps):
    lines = (json.dumps(dict(step=step, epoch=step / 25, loss=1 / step)) for step in steps)
    (folder/'metrics.jsonl').write_text(''.join(line + '\n' for line in lines))


def equal(a, b):
    "Bit for bit, names included."
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def mine(tmp_path):
    "A folder as a run leaves it: checkpoints of steps 30 and 45, a log that ends at step 40."
    cfg, folder = Config.of(**SMALL), tmp_path/'mine'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps({**asdict(cfg), 'images': 100}))
    for step in (30, 45):
        jepa = trained(cfg, step / 1000)
        write_checkpoint(folder, dict(step=step, model=jepa.state_dict(), identity=identity(cfg, images=100, draws=2)))
        for name in ('context', 'target'): save_encoder(getattr(jepa, name), folder/name, step)
    write_log(folder, (20, 40))
    return folder


@pytest.fixture
def former(tmp_path):
    "A folder of the layout before the engine was redesigned."
    folder, jepa = tmp_path/'former', trained(Config.of(**SMALL))
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps({**FORMER, **FORMER_FACTS}, indent=1))
    whose = {**{k: v for k, v in FORMER.items() if k not in FORMER_FREE}, 'images': 100}
    write_checkpoint(folder, dict(
        step=50, jepa=jepa.state_dict(), optimizer={'state': {}, 'param_groups': []}, scaler={},
        loss_sum=torch.zeros(()), norm_sum=torch.zeros(4), bad=torch.zeros(3, dtype=torch.int64), identity=whose))
    for name in ('context', 'target'):
        getattr(jepa, name).save_pretrained(folder/name)
        (folder/name/'config.json').write_text(json.dumps(FORMER_ENCODER, indent=2))
    write_log(folder, (20, 40, 50))
    (folder/'probe_petals.json').write_text(json.dumps(dict(step=50, rows=[dict(probe='knn', top1=30.)])))
    return folder


# --- a run of today

def test_what_a_run_holds(mine):
    run, cfg = scott.Run(mine), Config.of(**SMALL)
    assert run.config == cfg and run.stored['images'] == 100
    assert run.metrics == [dict(step=s, epoch=s / 25, loss=1 / s) for s in (20, 40)]
    assert list(run.checkpoints) == [30] and run.checkpoint()['step'] == 45 and run.checkpoint(30)['step'] == 30
    assert repr(run) == f"Run('{mine}'): petals, step 45"
    assert equal(run.jepa(), trained(cfg, .045)) and equal(run.jepa(30), trained(cfg, .03))
    for which in ('context', 'target'):
        assert equal(run.encoder(which), getattr(trained(cfg, .045), which))
    assert equal(run.encoder(), run.encoder('target')) and not equal(run.encoder(), run.encoder('context'))


def test_the_random_encoder_is_the_one_the_run_began_with(mine):
    run, before = Run(mine), torch.get_rng_state()
    for part in (build(run.config).context, build(run.config).target): assert equal(run.encoder('random'), part)
    assert not equal(run.encoder('random'), build(Config.of(**{**SMALL, 'seed': 6})).context)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on


def test_all_encoders_are_alike(mine):
    "In evaluation mode and trainable, so that a probe may compare them and fine-tuning may begin with any."
    for which in ('context', 'target', 'random'):
        encoder = Run(mine).encoder(which)
        assert not encoder.training and all(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in Run(mine).jepa().modules())
    x = Run(mine).encoder('context').features(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert x.shape == (3, 16) and x.isfinite().all()


def test_the_step_is_that_of_the_weights(mine):
    run = Run(mine)
    assert run.step == 45 and run.reached['step'] == 40     # stopped between two lines
    write_log(mine, (20, 40, 60))
    assert run.step == 45 and run.reached['step'] == 40     # killed after a line, before a checkpoint
    (mine/'checkpoint.pt').write_bytes(b'half')
    assert run.step == 60 and run.reached['step'] == 60     # no better knowledge
    for file in (mine/'checkpoint.pt', mine/'metrics.jsonl'): file.unlink()
    assert run.step == 0 and run.reached == dict(step=0, epoch=0.) and run.metrics == []


@pytest.mark.parametrize('step', [30, 60])
def test_encoders_of_another_step_are_taken_from_the_checkpoint(mine, step):
    "The run was killed between checkpoint and encoders; or someone went back to an older checkpoint."
    run = Run(mine)
    for which in ('context', 'target'):
        assert encoder_step(mine/which) == 45
        save_encoder(getattr(trained(run.config, step / 1000), which), mine/which, step)
        assert equal(run.encoder(which), getattr(trained(run.config, .045), which))
    (mine/'checkpoint.pt').write_bytes(b'half')  # then the folder is all there is
    assert equal(run.encoder('target'), trained(run.config, step / 1000).target)


def test_a_reader_writes_nothing(mine):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in mine.rglob('*') if p.is_file()}
    run = Run(mine)
    repr(run), run.jepa(), run.jepa(30), run.encoder(), run.encoder('random'), run.reached
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in mine.rglob('*') if p.is_file()} == before


def test_a_home_folder_is_found(mine, monkeypatch):
    monkeypatch.setenv('HOME', str(mine.parent))
    assert Run('~/mine').step == 45


def test_the_pictures_of_a_run(mine):
    assert Run(mine).pictures is None  # as an earlier version left it
    hashes = [f'{i:016x}' for i in range(100)]
    (mine/'pictures.txt').write_text('\n'.join(hashes) + '\n')
    assert Run(mine).pictures == hashes
    for content in (b'', b'\n'.join(h.encode() for h in hashes[:99]), b'\xff\xfe'):
        (mine/'pictures.txt').write_bytes(content)
        one_line(lambda: Run(mine).pictures, mine/'pictures.txt', 'is damaged', 'restore it')


# --- earlier layouts

def test_a_former_run_is_read(former):
    run, jepa = Run(former), trained(Config.of(**SMALL))
    assert run.config == Config.of(**{**SMALL, 'knn_every': 0, 'out': 'runs/former'})
    assert run.stored['without'] == 'graphs,amp' and run.stored['contains_test_images'] is True
    assert run.step == 50 and run.reached['epoch'] == 2 and [m['step'] for m in run.metrics] == [20, 40, 50]
    assert equal(run.jepa(), jepa)
    for which in ('context', 'target'): assert equal(run.encoder(which), getattr(jepa, which))
    assert equal(run.encoder('random'), build(Config.of(**SMALL)).context)
    assert run.table() == run.table('petals') == dict(step=50, rows=[dict(probe='knn', top1=30.)])


def test_a_former_run_is_not_gone_on_with(former):
    with pytest.raises(InputError, match='checkpoint.pt was made with version 1 of the random draws') as refused:
        scott.pretrain(out=former, resume=True, device='cpu')
    assert '\n' not in str(refused.value) and 'probed' in str(refused.value)
    assert Run(former).step == 50 and equal(Run(former).jepa(), trained(Config.of(**SMALL)))


def test_unknown_and_missing_settings_read_fine(mine):
    stored = json.loads((mine/'config.json').read_text())
    default = {f.name: f.default for f in fields(Config)}
    for name in ('ffn', 'reg_tokens', 'on_nan', 'compile', 'accumulate'): assert stored.pop(name) == default[name]
    (mine/'config.json').write_text(json.dumps({**stored, 'a_setting_of_tomorrow': [1, 2]}))
    run = Run(mine)
    assert run.config == Config.of(**SMALL) and equal(run.jepa(), trained(Config.of(**SMALL), .045))
    state = torch.load(mine/'checkpoint.pt')
    state.pop('sha256')
    for name in ('ffn', 'reg_tokens'): del state['identity'][name]  # a checkpoint from before they existed
    write_checkpoint(mine, {**state, 'step': 50})
    assert run.step == 50 and equal(run.jepa(), trained(Config.of(**SMALL), .045))


def test_stored_results_are_read_without_weights():
    names = [p.parent.name for p in RESULTS.glob('*/config.json')]
    assert 'flowers102-small' in names
    for name in names:
        run = Run(RESULTS/name)
        assert run.config.data == name.partition('-')[0] and run.metrics and run.step == run.metrics[-1]['step']
        assert run.table(run.config.data)['rows']
    run = Run(RESULTS/'flowers102-small')
    assert run.step == 9180 and run.config.preset == 'small' and run.config.accumulate == 1
    with pytest.raises(InputError, match=r'target has no config\.json: there is no checkpoint'):
        run.encoder('target')
    with pytest.raises(InputError, match=r'checkpoint\.pt is not there'): run.jepa()
    assert Run(RESULTS/'flowers102-small').config == run.config


# --- what is refused, in one line

def one_line(use, *words):
    with pytest.raises(InputError) as refused: use()
    said = str(refused.value)
    assert '\n' not in said and all(str(word) in said for word in words), said


def test_what_is_no_run_folder(mine, tmp_path):
    (tmp_path/'empty').mkdir()
    for place in (tmp_path/'nowhere', tmp_path/'empty', mine/'config.json'):
        one_line(lambda: Run(place), place, 'is no run folder', 'name the --out of scott_pretrain')
    for part in ('context', 'target'): one_line(lambda: Run(mine/part), mine/part, 'a part of one')


@pytest.mark.parametrize('content', [b'', b'{', b'\xff\xfe{}', b'nothing'])
def test_a_damaged_config(mine, content):
    (mine/'config.json').write_bytes(content)
    one_line(lambda: Run(mine), mine/'config.json', 'is damaged', 'restore it')


@pytest.mark.parametrize('content', ['[]', '3', '"data"', '{}'])
def test_a_config_of_something_else(mine, content):
    (mine/'config.json').write_text(content)
    one_line(lambda: Run(mine), mine, 'is no run folder')


@pytest.mark.parametrize('change', [dict(depth='seven'), dict(ffn='relu'), dict(lr=-1), dict(seed=None)])
def test_a_config_that_no_run_can_have(mine, change):
    stored = json.loads((mine/'config.json').read_text())
    (mine/'config.json').write_text(json.dumps({**stored, **change}))
    one_line(lambda: Run(mine).config, mine/'config.json', *(f'--{name}' for name in change))


def test_weights_of_another_run(mine, tmp_path):
    for name, value in (('num_heads', 4), ('embed_dim', 32), ('img_size', 80), ('drop_rate', .5)):
        other = shutil.copytree(mine, tmp_path/name)
        stored = json.loads((other/'config.json').read_text())
        (other/'config.json').write_text(json.dumps({**stored, name: value}))
        words = other/'config.json', f'{name} is {SMALL.get(name, 0.)!r} there and {value!r} here', 'Put its own back'
        one_line(lambda: Run(other).jepa(), other/'checkpoint.pt', *words)
        one_line(lambda: Run(other).jepa(30), other/'checkpoint-30.pt', *words)
        for which in ('context', 'target'): one_line(lambda: Run(other).encoder(which), other/which, *words)


def test_settings_that_may_differ_do_not_count(mine):
    stored = json.loads((mine/'config.json').read_text())
    (mine/'config.json').write_text(json.dumps({**stored, 'device': 'cuda:3', 'accumulate': 2, 'keep_checkpoints': 9}))
    assert {'device', 'accumulate', 'keep_checkpoints'} <= FREE
    assert Run(mine).checkpoint()['step'] == 45 and Run(mine).encoder('context')


def test_checkpoints_that_are_none(mine):
    write_checkpoint(mine, dict(step=50, head=torch.ones(3)))
    one_line(lambda: Run(mine).jepa(), mine/'checkpoint.pt', 'was not written by scott_pretrain')
    (mine/'checkpoint.pt').write_bytes((mine/'checkpoint.pt').read_bytes()[:-1])
    one_line(lambda: Run(mine).jepa(), mine/'checkpoint.pt', 'is damaged', 'checkpoint-45.pt')
    assert Run(mine).checkpoint(45)['step'] == 45  # the older one can be read all the same
    (mine/'checkpoint-45.pt').write_bytes(b'half')
    one_line(lambda: Run(mine).jepa(45), mine/'checkpoint-45.pt', 'is damaged')
    one_line(lambda: Run(mine).jepa(7), mine/'checkpoint-7.pt', 'is not there')


@pytest.mark.parametrize('damage', [
    lambda f: (f/'model.safetensors').write_bytes(b'half'), lambda f: (f/'config.json').write_text('{"depth": 1}'),
    lambda f: (f/'config.json').write_text('{')])
def test_a_damaged_encoder(mine, damage):
    damage(mine/'context')
    for use in (lambda: Run(mine).encoder('context'), lambda: load_encoder(mine/'context')):
        one_line(use, 'damaged', mine/'context', 'go on with the run (--resume)')
    assert Run(mine).encoder('target') is not None


def test_an_encoder_that_is_none(mine):
    one_line(lambda: Run(mine).encoder('teacher'), "'teacher'", 'choose context, target or random')
    shutil.rmtree(mine/'context')
    one_line(lambda: Run(mine).encoder('context'), mine/'context', 'has no config.json', 'go on with the run (--resume)')
    (mine/'checkpoint.pt').unlink()
    with pytest.raises(InputError, match='there is no checkpoint yet that it could be made from: wait') as e: Run(mine).encoder('context')
    assert '--resume' not in str(e.value)


def test_tables(mine):
    run = Run(mine)
    for use in (run.table, lambda: run.table('petals')): one_line(use, mine, f'run scott_probe {mine}')
    (mine/'probe_petals.json').write_text('{"rows": []}')
    assert run.table() == {'rows': []}
    one_line(lambda: run.table('pets37'), mine, 'no table pets37', 'petals')
    (mine/'probe_d.json').write_text('{"data": "folder:/d", "rows": []}')
    one_line(lambda: run.table('d'), mine/'probe_d.json', 'earlier version', f'run scott_probe {mine} again')
    (mine/'probe_d.json').write_text('{"data": "folder:/d", "how_split": "names", "rows": []}')
    assert run.table('d')['how_split'] == 'names'
    (mine/'probe_pets37.json').write_text('{"rows"')
    one_line(run.table, mine, 'several tables', 'pets37', 'petals')
    one_line(lambda: run.table('pets37'), mine/'probe_pets37.json', 'is damaged', 'run scott_probe again')
    assert run.table('petals') == {'rows': []}


# --- metrics

@pytest.mark.parametrize('damage', [b'{"step": 40, "lo\n', b'{"step": 40}{"step": 60}\n', b'\xff\xfe\n'])
def test_a_damaged_line_of_metrics_is_named(tmp_path, damage):
    path = tmp_path/'metrics.jsonl'
    path.write_bytes(b'{"step": 20}\n{"step": 40, "lo')
    assert read_metrics(tmp_path) == [{'step': 20}]  # a last line that was cut is no damage
    path.write_bytes(b'{"step": 20}\n' + damage + b'{"step": 80}\n')
    with pytest.raises(InputError, match=r'metrics\.jsonl is damaged .*: restore it'): read_metrics(tmp_path)
