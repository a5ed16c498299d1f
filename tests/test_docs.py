"""The pages as documents: what can be checked without Quarto and without running them."""
import ast
import json
import os
import re
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import readme
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))

parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

INSTALL = '\n'.join([  # Colab has what the package asks for: if not, pip says what is missing
    '#| hide', '#| eval: false',
    f"![ -e /content ] && pip install -q --no-deps {cfg['git_url']}/archive/refs/tags/v{cfg['version']}.zip",
    f"![ -e /content ] && pip check | grep '^{cfg['pip_name']} ' && echo 'Get what is missing by: pip install NAME'"])
BADGE = (f'<a href="https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/%s">'
         '<img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open in Colab"></a>')
DIRECTIVES = re.compile(r'default_exp [a-z][\w.]*|exports?( [a-z][\w.]*)?|exporti|hide|echo: false|eval: false|slow|cuda|'
                        r'code-fold: true|fig-(cap|alt): ".+"')
MACHINE_PATH = re.compile(r'(?<![\w.~/-])/(?:work|root|tmp|home|Users|mnt|private)/\S*')
PACKAGE_INDEX = re.compile(r'index-url|file:/{3}|/simple\b|find-links|artifactory|devpi', re.I)
OTHER_PROJECT = re.compile(r"""pip3? install(?: +-\S+)* +["']?scott(?![\w-])""")  # PyPI's `scott` is somebody else's
LINK = re.compile(r'\]\(<?([^)\s>]+)>?(?: "[^"]*")?\)|(?:src|href)="([^"]+)"')

pages = pytest.mark.parametrize('path', PAGES, ids=lambda p: p.relative_to(NBS).with_suffix('').as_posix())


# Reading a page

def text_of(value):
    return value if isinstance(value, str) else ''.join(value)


def read(path):
    """The page as JSON, every cell's source as one string."""
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        cell['source'] = text_of(cell['source'])
    return nb


def cells(path, kind):
    return [c for c in read(path)['cells'] if c['cell_type'] == kind]


def directives(source):
    return [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]


def python(source):
    """The syntax tree of a code cell, its shell lines and magics replaced by `pass`."""
    return ast.parse(re.sub(r'^(\s*)[!%].*$', r'\1pass', source, flags=re.M))


def output_text(output):
    """All the text of a stored output; pictures are not text."""
    data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/')}
    return '\n'.join(map(text_of, [output.get('text', ''), *[v for v in data.values() if isinstance(v, (str, list))]]))


def prose(path):
    """The page's markdown without code and formulas."""
    text = '\n\n'.join(c['source'] for c in cells(path, 'markdown'))
    for pattern in (r'(?ms)^```.*?^```', r'(?s)\$\$.*?\$\$', r'`[^`\n]*`', r'\$[^$\n]+\$'):
        text = re.sub(pattern, ' ', text)
    return text


def anchors(path):
    """The anchors of a page's headings, as Pandoc, GitHub and Jupyter make them."""
    found = set()
    for cell in cells(path, 'markdown'):
        text = re.sub(r'(?ms)^```.*?^```', '', cell['source'])
        found.update(re.findall(r'\{#([\w-]+)', text) + re.findall(r'\bid="([^"]+)"', text))
        for heading in re.findall(r'^#+ +(.+?)(?: *\{.*\})? *$', text, re.M):
            plain = re.sub(r'[^\w\s.-]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading))
            dashed = re.sub(r'\s+', '-', plain.strip().lower())
            found.update({re.sub(r'^[^a-z]+', '', dashed), dashed.replace('.', ''), re.sub(r'\s', '-', heading)})
    return found


def speaks(node):
    """Whether running these statements surely prints or draws (bodies of functions and branches aside)."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.If)):
        return False
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ('print', 'plt.show', 'plt.imshow', 'plt.plot', 'plt.subplots', 'plt.figure'):
            return not any(k.arg == 'file' for k in node.keywords)
    return any(map(speaks, ast.iter_child_nodes(node)))


# Every page

@pages
def test_title_and_badge(path):
    """nbdev keeps of the title cell the title, the line below it and the front matter: the badge has a cell of its own."""
    title, badge = read(path)['cells'][:2]
    assert title['cell_type'] == badge['cell_type'] == 'markdown'
    form = r'# \S[^\n]*\n\n> \S[^\n]*(\n\n(- \w+: [^\n]+\n?)+)?'
    assert re.fullmatch(form, title['source'].rstrip('\n')), 'want "# Title" and "> One line."'
    assert badge['source'].rstrip('\n') == BADGE % path.relative_to(ROOT).as_posix()


@pages
def test_opening_code_cells(path):
    code = [c['source'].rstrip('\n') for c in cells(path, 'code')]
    exports = [d for s in code for d in directives(s) if d.split()[0] in ('export', 'exports', 'exporti')]
    owns = any(d in ('export', 'exports', 'exporti') for d in exports)
    if owns:
        assert code[0].startswith('#| default_exp ')
    for module in ([code[0].split()[-1]] if owns else []) + [d.split()[1] for d in exports if ' ' in d]:
        assert (ROOT/'scott'/(module.replace('.', '/') + '.py')).exists(), f'no module {module}'
    if code:
        assert code[1 if owns else 0] == INSTALL


@pages
def test_metadata(path):
    "Colab lends a GPU to the pages that need one; on the others it would only keep a reader waiting."
    project = path.parent.parent == NBS and path.stem == '09_project'  # exercise and solution: the course's one training
    needs = project or any('cuda' in directives(c['source']) for c in cells(path, 'code'))
    assert read(path)['metadata'].get('accelerator') == ('GPU' if needs else None)
    assert needs or 'colab' not in read(path)['metadata']


@pages
def test_directives(path):
    for cell in cells(path, 'code'):
        used = directives(cell['source'])
        assert not [d for d in used if not DIRECTIVES.fullmatch(d)]
        leading = re.match(r'(#\|.*\n?)*', cell['source'])[0]
        assert len(leading.splitlines()) == len(used), f'a directive below code is ignored:\n{cell["source"]}'


@pages
def test_imports(path):
    for cell in cells(path, 'code'):
        body = python(cell['source']).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert len(imports) in (0, len(body)), f'imports want a cell of their own:\n{cell["source"]}'
        for n in ast.walk(ast.Module(body, [])):
            names = [n.module or ''] if isinstance(n, ast.ImportFrom) else \
                [a.name for a in n.names] if isinstance(n, ast.Import) else []
            assert not [name for name in names if name.split('.')[0] in ('nbdev', 'fastcore')]
            assert not (isinstance(n, ast.ImportFrom) and n.names[0].name == '*'), 'a wildcard import'


@pages
def test_size(path):
    assert path.stat().st_size <= 500 * 1024, f'{path.stat().st_size / 1024:.0f} KB'
    for cell in cells(path, 'code'):
        lines = cell['source'].splitlines()
        exported = any(d.startswith('export') for d in directives(cell['source']))  # a class is one cell
        assert len(lines) <= (90 if exported else 45), f'{len(lines)} lines: {lines[:3]}'
        assert not [line for line in lines if len(line) > 120 and not line.startswith('#| fig-')]  # captions are prose


@pages
def test_outputs_stored(path):
    if path.parent.name == 'exercises':  # what a student gets has none
        assert not any(c['outputs'] for c in cells(path, 'code'))
        return
    code = [c for c in cells(path, 'code') if c['source'].strip() and 'eval: false' not in directives(c['source'])]
    silent = [c['source'] for c in code if not c['outputs'] and speaks(python(c['source']))]
    assert not silent, 'execute the page and store its outputs:\n' + '\n---\n'.join(silent)
    if any(directives(c['source'])[:1] == [] for c in code):
        assert any(c['outputs'] for c in code), 'no stored output on the page'


@pages
def test_no_errors_stored(path):
    for cell in cells(path, 'code'):
        for output in cell['outputs']:
            assert output['output_type'] != 'error' and 'Traceback (most recent' not in output_text(output), cell['source']


@pages
def test_no_machine_names(path):
    for cell in read(path)['cells']:
        for text in [cell['source'], *map(output_text, cell.get('outputs', []))]:
            found = MACHINE_PATH.findall(text) + PACKAGE_INDEX.findall(text)
            assert not found, cell['source']


@pages
def test_links(path):
    for groups in LINK.findall(prose(path)):
        link = ''.join(groups)
        if re.match(r'[a-z]+:', link):
            continue
        target, _, anchor = unquote(link).partition('#')
        file = Path(os.path.normpath(path.parent/target)) if target else path
        assert file.exists(), f'{link}: no such file'
        if anchor and file.suffix == '.ipynb':
            assert anchor in anchors(file), f'{link}: no such heading'


@pages
def test_numbers_of_pages(path):
    for number, target in re.findall(r'\[page (\d+)\]\((\d+)_', prose(path)):
        assert number == target, f'a link says page {number} and leads to page {target}'


@pages
def test_no_page_installs_another_project(path):
    text = '\n'.join(c['source'] for c in read(path)['cells'])
    assert not OTHER_PROJECT.search(text)


# The site and the README

def targets(node):
    """Every page that a sidebar names."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return sum(map(targets, node), [])
    return ([node['href']] if 'href' in node else []) + targets(node.get('contents', []))


def quarto():
    return yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))


def test_quarto_file():
    assert os.readlink(NBS/'_quarto.yml') == '../_quarto.yml'
    assert quarto()['project']['output-dir'] == cfg['doc_path']


def test_sidebar_targets_exist():
    assert not [t for t in targets(quarto()['website']['sidebar']) if not (NBS/t).exists()]


def test_every_page_in_sidebar():
    named = targets(quarto()['website']['sidebar'])
    assert len(named) == len(set(named))
    assert not {p.relative_to(NBS).as_posix() for p in PAGES} - set(named)


def test_readme_is_index():
    text, images = readme.readme()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'run `make readme`'
    for name, data in images.items():
        assert (ROOT/name).read_bytes() == data, f'{name}: run `make readme`'


def test_readme_links():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert not OTHER_PROJECT.search(text)
    for groups in LINK.findall(re.sub(r'(?ms)^```.*?^```', '', text)):
        link = ''.join(groups).partition('#')[0]
        assert re.match(r'[a-z]+:', link) or (ROOT/link).exists(), f'{link}: no such file'
