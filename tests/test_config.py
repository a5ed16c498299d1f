"""Settings of a run: the same presets, ranges and lines in Python and on the command line; what makes two runs one."""
import dataclasses
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from scott.cli import InputError, opt
from scott.train import config
from scott.train.config import FREE, PRESETS, Config, build, differences, identity
from scott.train.pretrain import main, settings
from scott.train.run import Run

RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'


def wrong_values(f):
    "Values that a setting can't have, as they are written on a command line."
    m = f.metadata
    if m['choices']: yield 'nothing-of-this-kind'
    if m['type'] in (int, float):
        yield 'many'
        yield str(m['low'] - 1)
        if m['high'] < float('inf'): yield str(m['high'] + 1)
    if m['type'] is float: yield from ('nan', 'inf')
    if m['type'] is int: yield '1.5'


WRONG = [(f.name, word) for f in fields(Config) for word in wrong_values(f)]


def in_python(name, word):
    "The word as a value of the setting's type, if it can be one."
    try: return Config.__dataclass_fields__[name].metadata['type'](word)
    except ValueError: return word


@pytest.fixture
def line(capsys):
    "The one line that `scott_pretrain` ends with."
    def line(*argv):
        with pytest.raises(SystemExit) as end: main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == '' and len(err.splitlines()) == 1, err
        assert err.startswith('scott_pretrain: ')
        return err.removeprefix('scott_pretrain: ').rstrip('\n')
    return line


def refusal(*preset, **changes):
    with pytest.raises(InputError) as e: Config.of(*preset, **changes)
    return str(e.value)


@pytest.mark.parametrize('name, word', WRONG, ids=[f'{n}={w}' for n, w in WRONG])
def test_a_wrong_value_gets_the_same_line_everywhere(line, tmp_path, name, word):
    said = line('--out', tmp_path / 'run', f'--{name.replace("_", "-")}={word}')
    if word == '1.5':  # Python knows that this is a number, a command line has only the word
        assert said.replace("'1.5'", '1.5') == refusal(**{name: 1.5})
    elif name == 'preset': assert said == refusal(word)
    else: assert said == refusal(**{name: in_python(name, word)})
    assert f'--{name.replace("_", "-")} ' in said and word in said
    assert not (tmp_path / 'run').exists()


def test_every_number_has_a_range():
    "nan and the like aside, none is without a lower limit."
    assert not [f.name for f in fields(Config) if f.metadata['type'] in (int, float) and f.metadata['low'] < 0]
    assert {f.name for f in fields(Config)} == {f.name for f in fields(Config) if len(f.metadata['help']) > 3}


@pytest.mark.parametrize('value', [True, None, [1], '1'])
def test_a_value_of_another_type(value):
    assert '--epochs' in refusal(epochs=value) and 'int' in refusal(epochs=value)
    assert '--lr' in refusal(lr=value) and 'float' in refusal(lr=value)
    assert '--data' in refusal(data=None) and '--compile' in refusal(compile='yes')


@pytest.mark.parametrize('wrong, right', [('epocs', 'epochs'), ('batchsize', 'batch_size'), ('image_size', 'img_size')])
def test_an_unknown_name_is_answered_with_near_ones(line, tmp_path, wrong, right):
    assert wrong in refusal(**{wrong: 3}) and right in refusal(**{wrong: 3})
    flag, near = ('--' + word.replace('_', '-') for word in (wrong, right))
    assert line('--out', tmp_path / 'run', flag, '3').startswith(f'{flag} is no flag: did you mean {near}')
    assert line('--out', tmp_path / 'run', f'{flag}=3').startswith(f'{flag}=3 is no flag: did you mean {near}')


def test_preset_then_changes(tmp_path):
    cfg = Config.of('small', epochs=2, out=tmp_path / 'mine')
    assert (cfg.preset, cfg.epochs, cfg.out) == ('small', 2, str(tmp_path / 'mine'))
    assert all(getattr(cfg, k) == v for k, v in PRESETS['small'].items() if k not in ('epochs', 'warmup_epochs'))
    assert cfg == settings(dict(preset='small', epochs=2, out=str(tmp_path / 'mine')))  # the command line's way
    assert Config.of() == Config()
    json.dumps(asdict(cfg))  # a Path can't be stored


def test_places(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    for kind in (str, Path):
        cfg = Config.of('demo', out=kind('~/run'), data_root=kind('~/data'), labels=kind('~/photos.csv'))
        expected = (str(tmp_path / name) for name in ('run', 'data', 'photos.csv'))
        assert (cfg.out, cfg.data_root, cfg.labels) == tuple(expected)
    monkeypatch.chdir(tmp_path)
    assert Config.of(labels='photos.csv').labels == str(tmp_path / 'photos.csv') and Config.of().labels is None
    assert Config.of(data='folder:photos').data == f'folder:{tmp_path.resolve() / "photos"}'
    assert Config.of(data='folder:~/photos').data == f'folder:{tmp_path.resolve() / "photos"}'
    assert Config.of(out='').out == ''  # not the present folder


def test_a_warm_up_fits():
    "A preset's that would leave nothing becomes half of the epochs; one that is named is kept or refused."
    assert [Config.of('paper', epochs=n).warmup_epochs for n in (1, 2, 40, 60, 300)] == [0, 1, 20, 40, 40]
    assert Config.of('paper', epochs=41, warmup_epochs=40).warmup_epochs == 40
    assert '--warmup-epochs 40 leaves nothing of --epochs 40' in refusal(epochs=40, warmup_epochs=40)


@pytest.mark.parametrize('given', [dict(preset='demo', data='petals', out='x'), dict(preset='small', epochs=2),
                                   dict(preset='colab')], ids=str)
def test_the_class_itself_takes_no_preset(given):
    with pytest.raises(InputError, match='Config.of'): Config(**given)


def test_a_complete_configuration_passes_the_class():
    for name in PRESETS:
        cfg = Config.of(name, epochs=9, img_size=32, seed=4)
        assert Config(**asdict(cfg)) == cfg == dataclasses.replace(cfg)
    size = dict(epochs=1, img_size=32, depth=1, embed_dim=16, batch_size=2, warmup_epochs=0)  # nothing of the preset
    assert Config(**asdict(Config.of('small', **size))).img_size == 32


@pytest.mark.parametrize('folder', sorted(p.parent for p in RESULTS.glob('*/config.json')), ids=lambda p: p.name)
def test_stored_runs_are_read(folder):
    stored = json.loads((folder / 'config.json').read_text())
    cfg = Run(folder).config
    assert {k: getattr(cfg, k) for k in stored if hasattr(cfg, k)} == {k: v for k, v in stored.items() if hasattr(cfg, k)}
    assert cfg == Config(**{k: v for k, v in stored.items() if k in Config.__dataclass_fields__})


def test_what_is_free():
    assert FREE == {'accumulate', 'checkpoint_minutes', 'compile', 'data_root', 'device', 'keep_checkpoints', 'knn_every',
                    'labels', 'on_nan', 'out', 'resume'}
    one = Config.of('demo')
    for f in fields(Config):
        if f.name == 'preset': continue
        value = 'other' if f.metadata['type'] is str else not f.default if f.metadata['type'] is bool else f.default + 1
        other = dataclasses.replace(one, **{f.name: value})
        assert bool(differences(identity(one), identity(other))) is (f.name not in FREE), f.name


def test_where_pictures_lie_is_no_part_of_a_run():
    one, other, petals = (identity(Config.of('demo', data=d)) for d in ('folder:/a', 'folder:/b/c', 'petals'))
    assert one == other and one['data'] == 'folder:' and differences(one, other) == []
    assert differences({**one, 'data': 'folder:/a'}, one) == []  # as version 0.1 stored it
    assert differences({**one, 'data': 'folder:/a'}, petals) == ["data is 'folder:/a' there and 'petals' here"]
    assert differences(petals, one) == ["data is 'petals' there and 'folder:' here"]


def test_a_new_setting_leaves_old_checkpoints_usable(monkeypatch):
    "A program with one setting more reads what was stored before: it counts as its default."
    @dataclasses.dataclass
    class Newer(Config):
        warp: int = opt(3, 'a setting of tomorrow', low=0)
    there = identity(Config.of('demo'), images=4)
    monkeypatch.setattr(config, 'Config', Newer)
    assert 'warp' in identity(Newer.of('demo')) and 'warp' not in there
    assert differences(there, identity(Newer.of('demo'), images=4)) == []
    assert differences(there, identity(Newer.of('demo', warp=4), images=4)) == ['warp is 3 there and 4 here']
    assert Newer(**asdict(Config.of('demo'))).warp == 3


def test_a_setting_that_is_gone_leaves_old_checkpoints_usable():
    here = identity(Config.of('demo'), images=4)
    assert differences({**here, 'without': 'all'}, here) == []
    assert differences(here, {**here, 'draws': 2}) == ['draws is None there and 2 here']  # a fact is no setting


@pytest.mark.parametrize('changes, words', [
    (dict(img_size=60), ['60', '16', '48']), (dict(embed_dim=30), ['30', 'multiple']), (dict(mask_ratio=1), ['ratio']),
    (dict(img_size=16), ['one patch', 'a larger image'])], ids=str)
def test_settings_that_do_not_fit_together(changes, words):
    with pytest.raises(InputError) as e: build(Config.of('demo', **changes))
    assert all(word in str(e.value) for word in words)


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build(Config.of('demo', embed_dim=16, depth=1, predictor_depth=1, img_size=48, seed=5))
    assert torch.equal(torch.rand(4), expected)


def test_help_has_every_default_and_range(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end: main(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for f in fields(Config):
        assert f'--{f.name.replace("_", "-")}' in said and f.metadata['help'] in said
        if f.default is not None and f.default is not False: assert f'default: {f.default}' in said
    assert 'default: 0; at least 0' in said and 'between 0 and 1' in said
    assert 'mps (the GPU of a Mac; untested)' in said and '--no-compile' in said and 'bf16' in said
