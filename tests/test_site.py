"""The site without Quarto: its settings, and every page as nbdev's own processors hand it over."""
import ast
import importlib
import os
import re

import llms
import processors
import pytest
import test_docs as docs
import yaml
from execnb.nbio import mk_cell, read_nb
from fastcore.utils import dict2obj
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.showdoc import show_doc
from test_docs import NBS, PAGES, ROOT, cfg

ATTRIBUTES = re.compile(r'#\| fig-alt: "\S.*"')
HEADING = re.compile(r'^#{1,6} +(.+?)(?: *\{.*\})? *$', re.M)
names = pytest.mark.parametrize('name', [p.relative_to(NBS).with_suffix('').as_posix() for p in PAGES])


def box(cell):
    """In place of executing a page: the box of a definition, shown of its module."""
    name = re.search(r'^show_doc\((\w+)\)', cell.source or '', re.M)
    if name:
        path = NbdevLookup().syms[name[1]][1]
        module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
        text = show_doc(getattr(module, name[1]))._repr_markdown_().splitlines(keepends=True)
        cell.outputs = [dict2obj(dict(output_type='execute_result', metadata={}, data={'text/markdown': text}))]


class Site(FilterDefaults):
    def base_procs(self):
        return [box if p is exec_show_docs else p for p in super().base_procs()]


@pytest.fixture(scope='module')
def site():
    """Every page after nbdev's processors and ours, {name: cells}."""
    pages, here = {}, os.getcwd()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    try:
        for path in PAGES:
            nb = read_nb(path)
            Site()(nb)
            pages[path.relative_to(NBS).with_suffix('').as_posix()] = nb.cells
    finally:
        os.chdir(here)
    return pages


def markdown(cells):
    """All markdown that Quarto gets: cells, boxes of the API, tables."""
    shown = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
    return '\n\n'.join([c.source for c in cells if c.cell_type == 'markdown'] + shown)


def ids(cells):
    """The anchors of a page of the site."""
    text = re.sub(r'(?ms)^```.*?^```', '', markdown(cells))
    found = set(re.findall(r'\{#([\w.-]+)', text) + re.findall(r'\bid="([^"]+)"', text))
    for heading in HEADING.findall(text):
        plain = re.sub(r'[^\w\s.-]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading))
        found.add(re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', plain.strip().lower())))
    return found


@names
def test_no_link_inside_code_or_inside_a_link(name, site):
    text = markdown(site[name])
    code = re.findall(r'(?ms)^```.*?^```', text)
    assert not [c for c in code if re.search(r'\]\(http', c)], 'a link in code'
    assert not re.findall(rf'\[[^][]*{processors.LINKED}[^][]*\]\(', text), 'a link in a link'
    assert not re.findall(r'<[a-z][^<>\n]*\]\(http[^<>]*>', text), 'a link in a tag'


@names
def test_the_badge_and_the_exported_code_are_shown(name, site):
    page = NBS/f'{name}.ipynb'
    assert docs.BADGE % page.relative_to(ROOT).as_posix() in [c.source.strip() for c in site[name]]
    shown = '\n\n'.join(c.source for c in site[name] if c.cell_type == 'code')
    for cell in docs.cells(page, 'code'):
        kinds = {d.split()[0] for d in docs.directives(cell['source'])} & {'export', 'exports'}
        if kinds:
            defined = [n.name for n in ast.parse(cell['source']).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            assert len([d for d in defined if d[0] != '_']) <= 1, f'nbdev turns their order around: {defined}'
            assert not defined or kinds == {'exports'}, f'the site hides {defined}: use exports'
            assert all(re.search(rf'^(def|class) {d}\b', shown, re.M) for d in defined)


@names
def test_links_of_the_site_lead_somewhere(name, site):
    pages = {llms.address(f'{n}.ipynb'): n for n in site}
    for page, anchor in re.findall(re.escape(cfg['doc_host'] + cfg['doc_baseurl']) + r'/([\w/]+\.html)#([\w.-]+)',
                                   markdown(site[name])):
        assert page in pages, f'{page}: no such page'
        assert anchor in ids(site[pages[page]]), f'{page}#{anchor}: no such anchor'


@names
def test_links_name_what_they_lead_to(name):
    assert not re.findall(r'\[[^][]*\bpage \d+[^][]*\]\(', docs.prose(NBS/f'{name}.ipynb'), re.I)


@names
def test_every_picture_says_what_it_shows(name):
    missing = [s[:60] for s in re.findall(r'!\[ *\]\([^)]*\)', docs.prose(NBS/f'{name}.ipynb'))]
    for cell in docs.cells(NBS/f'{name}.ipynb', 'code'):
        hidden = {'hide', 'echo: false'} & set(docs.directives(cell['source'])) == {'hide'}
        pictures = [o for o in cell['outputs'] if any(k.startswith('image/') for k in o.get('data', {}))]
        if pictures and not hidden and not ATTRIBUTES.search(cell['source']):
            missing.append(cell['source'][:60])
    assert not missing, 'no alt text:\n' + '\n---\n'.join(missing)


@names
def test_no_widgets(name):
    nb = docs.read(NBS/f'{name}.ipynb')
    kinds = {kind for c in nb['cells'] for o in c.get('outputs', []) for kind in o.get('data', {})}
    assert not [k for k in kinds if 'widget' in k] and 'widgets' not in nb['metadata']


# Its settings

def test_settings_of_the_site():
    quarto = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    html, web = quarto['format']['html'], quarto['website']
    assert html['html-math-method'] == 'mathml', 'math from a server that nobody pinned'
    assert html['code-overflow'] == 'wrap' and set(html['theme']) == {'light', 'dark'}
    assert web['repo-subdir'] == cfg['nbs_path'] and 'source' in web['repo-actions']
    assert web['open-graph'] and web['twitter-card']['card-style'] == 'summary_large_image' and web['image-alt']
    assert web['navbar']['tools'][0]['href'] == cfg['git_url']
    footer = ' '.join(web['page-footer'].values())
    assert f"({cfg['git_url']})" in footer and f"({cfg['git_url']}/blob/{cfg['branch']}/LICENSE)" in footer
    for file in (web['favicon'], web['image'], html['css'], '404.qmd'):
        assert (NBS/file).is_file(), file
    assert cfg['procs'].split() == ['processors:plain_names', 'processors:methods']


def test_wide_things_scroll_inside_themselves():
    rules = re.sub(r'/\*.*?\*/', '', (NBS/'styles.css').read_text(encoding='utf-8'), flags=re.S)
    scrolling = ' '.join(r for r in rules.split('}') if 'overflow-x: auto' in r)
    for what in ('math[display="block"]', 'main table', '.cell-output-display', '.cell-output-stdout'):
        assert what in scrolling


def test_llms_txt_names_every_page_once():
    addresses = re.findall(r'\]\((\S+)\): \S', llms.llms())
    site = cfg['doc_host'] + cfg['doc_baseurl']
    assert sorted(addresses) == sorted(f'{site}/{llms.address(p.relative_to(NBS).as_posix())}' for p in PAGES)
    assert 'llms.txt' in yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['project']['resources']


@pytest.mark.parametrize('page, there', [
    ('13_encoder.ipynb', 'encoder.html'), ('01_start.ipynb', 'start.html'), ('index.ipynb', 'index.html'),
    ('solutions/10a_Masks.ipynb', 'solutions/masks.html')])
def test_addresses_are_those_of_nbdev(page, there):
    assert llms.address(page) == there


def test_a_box_that_cannot_be_made_is_named():
    cell = mk_cell('show_doc(Run)')
    cell.outputs = [dict2obj(dict(output_type='error', ename='NameError', evalue='Run', traceback=[]))]
    with pytest.raises(ValueError, match=r'Run\) of scott/train/run.py gave 0'): processors.methods(cell)


def test_methods_stand_below_the_box_of_their_class():
    cell = mk_cell('show_doc(Run)')
    cell.outputs = [dict2obj(dict(output_type='execute_result', metadata={}, data={'text/markdown': ['a box']}))]
    processors.methods(cell)
    text = ''.join(cell.outputs[0]['data']['text/markdown'])
    assert text.startswith('a box\n\n- ') and '[]{#run.encoder}`encoder(' in text and '`reached`: ' in text


@pytest.mark.parametrize('before, after', [
    ('see [`Run`](u#run) here', 'see [`Run`](u#run) here'),
    ('see [[`Run`](u#run)](66_run.ipynb) here', 'see [`Run`](66_run.ipynb) here'),
    ('[a [`Run`](u#run) or [`x`](v)](y)', '[a `Run` or `x`](y)')])
def test_names_in_links_stay_names(before, after):
    cell = mk_cell(before, 'markdown')
    processors.plain_names(cell)
    assert cell.source == after
