"""What the package promises as a whole: metadata, commands, and the house rules for generated modules."""
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT/'scott').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

modules = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT/'scott').as_posix())


def tree(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def test_version():
    assert importlib.import_module('scott').__version__ == cfg['version']


def test_checks_link_to_the_site():
    assert importlib.import_module('scott.course.syllabus').SITE == cfg['doc_host'] + cfg['doc_baseurl']


def test_editable_install(tmp_path):
    """A clone is called scott too. Installed with -e, it must not hide the package from the folder above it."""
    copy = tmp_path/'scott'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.*', 'runs', 'nbs', '_docs', '*.egg-info', 'build'))
    (tmp_path/'wheel').mkdir()
    build = "from setuptools.build_meta import build_editable; print(build_editable('../wheel'))"
    subprocess.run([sys.executable, '-c', build], cwd=copy, check=True, capture_output=True)
    [wheel] = (tmp_path/'wheel').iterdir()
    with zipfile.ZipFile(wheel) as files:
        [pth] = [name for name in files.namelist() if name.endswith('.pth')]
        files.extractall(tmp_path/'site')
        assert files.read(pth).decode().split() == [str(copy)]     # the folder itself, no import hook
    where = "import site; site.addsitedir('site'); import scott; print(scott.__version__)"
    said = subprocess.run([sys.executable, '-S', '-c', where], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.strip() == cfg['version'], said.stderr


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """What `pip install` would put beside other packages, and what it would write down about it."""
    place = tmp_path_factory.mktemp('installed')
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', place, 'build_py', '--build-lib', place],
                   cwd=ROOT, check=True, capture_output=True)
    return place


def test_an_installation_has_every_module(installed):
    there, here = ({p.relative_to(top) for p in (top/'scott').rglob('*.py')} for top in (installed, ROOT))
    assert there == here


def test_an_installation_has_every_stored_result(installed):
    there, here = ({p.relative_to(top): p.read_bytes() for p in top.rglob('*') if p.is_file()}
                   for top in (installed/'scott'/'results', ROOT/'nbs'/'results'))
    assert there == here and here


def test_an_installation_asks_for_what_its_modules_import(installed):
    about, = distributions(path=[str(installed)])
    asked = {re.match(r'[\w-]+', r)[0] for r in about.requires if 'extra ==' not in r}
    names = {(n.module if isinstance(n, ast.ImportFrom) else a.name).split('.')[0] for path in MODULES
             for n in ast.walk(tree(path)) if isinstance(n, (ast.Import, ast.ImportFrom)) and not getattr(n, 'level', 0)
             for a in n.names} - set(sys.stdlib_module_names) - {'scott', 'pillow_heif'}  # it is used if it is there
    packages = packages_distributions()
    imported = {packages[name][0] for name in names}
    assert imported <= asked
    assert not [r for r in asked if re.match('nbdev|fastcore|pytest|jupyter', r)], 'a development tool at run time'
    assert about.metadata['Name'] == cfg['pip_name'] and about.version == importlib.import_module('scott').__version__


def test_colab_has_what_an_installation_asks_for():
    """The install cell brings the package alone: a requirement that Colab can't meet would show itself in use."""
    colab = json.loads((ROOT/'tests/colab.json').read_text())
    assert Requirement(f'python>={cfg["min_python"]}').specifier.contains(colab['python'])
    for asked in map(Requirement, cfg['requirements'].split()):
        there = colab['packages'].get(asked.name)
        assert there and asked.specifier.contains(there), f'{asked}: Colab of {colab["date"]} has {there}'


def test_commands_of_an_installation_can_be_called(installed):
    about, = distributions(path=[str(installed)])
    commands = {e.name: e for e in about.entry_points if e.group == 'console_scripts'}
    assert {'scott_pretrain', 'scott_probe', 'scott_visualize', 'scott_bench'} <= commands.keys()
    for entry in about.entry_points:
        assert callable(entry.load()) or entry.group == 'nbdev'


@modules
def test_size(path):
    lines = re.sub(r'\n# %% .*\n', '', path.read_text(encoding='utf-8')).splitlines()  # without nbdev's marks of cells
    assert len(lines) <= 400, f'{len(lines)} lines'
    assert not [f'line {i}: {len(line)} characters' for i, line in enumerate(lines, 1) if len(line) > 120
                and not line.startswith('__all__')]  # nbdev breaks that one its own way
    sizes = {d.name: d.end_lineno - d.lineno + 1 for d in ast.walk(tree(path)) if isinstance(d, FUNCTION)}
    assert not {name: n for name, n in sizes.items() if n > 35}, 'functions of more than 35 lines'


@modules
def test_docstrings(path):
    top = tree(path).body
    inside = [m for c in top if isinstance(c, ast.ClassDef) for m in c.body]
    public = [d for d in top + inside if isinstance(d, (*FUNCTION, ast.ClassDef)) and not d.name.startswith('_')
              and d.name != 'forward']  # its class says what it takes and gives
    assert not [d.name for d in public if not ast.get_docstring(d)], 'without a docstring'


@modules
def test_no_globals_no_wildcards(path):
    nodes = list(ast.walk(tree(path)))
    assert not [n.lineno for n in nodes if isinstance(n, ast.Global)], 'a global statement'
    assert not [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.names[0].name == '*'], 'a wildcard import'


def name_of(path):
    """'train.run' for scott/train/run.py."""
    return '.'.join(path.relative_to(ROOT/'scott').with_suffix('').parts)


NAMES = {name_of(p) for p in MODULES}


def scott_imports(path):
    """The scott modules that the module at `path` imports, by their dotted names."""
    here = name_of(path).split('.')
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').split('.')[0] == 'scott'):
            base = here[:len(here) - n.level] if n.level else []
            inner = (n.module or '') if n.level else n.module.partition('.')[2]
            target = '.'.join([*base, *filter(None, inner.split('.'))])
            for name in [target] if target in NAMES else [f'{target}.{a.name}'.lstrip('.') for a in n.names]:
                if name in NAMES:
                    yield name
                elif target:
                    yield target  # a folder, whose __init__ has the name
        elif isinstance(n, ast.Import):
            yield from (a.name.partition('.')[2] for a in n.names if a.name.startswith('scott.'))


METHOD = {'masking', 'tokenizer', 'encoder', 'predictor', 'jepa', 'augment', 'schedule', 'interop', 'kernels'}
ROOMS = ['cli', 'data', 'method', 'train', 'probe', 'look', 'peers', 'lab', 'course']  # each may use those before it


def room(name):
    """The room that a module stands in."""
    return 'method' if name in METHOD else name.split('.')[0]


@modules
def test_rooms(path):
    name = name_of(path)
    assert room(name) in ROOMS, f'{name} stands in no room'
    for used in scott_imports(path):
        if room(name) == 'method':
            assert used in METHOD or (name, used) == ('interop', 'probe.heads'), f'the method ({name}) imports {used}'
        assert ROOMS.index(room(used)) <= ROOMS.index(room(name)) or name == 'interop', f'{name} imports {used}'


def test_no_import_cycle():
    needs = {name_of(path): set(scott_imports(path)) for path in MODULES}
    while ready := [name for name, n in needs.items() if not n & set(needs)]:
        for name in ready:
            del needs[name]
    assert not needs, f'a cycle among {sorted(needs)}'
