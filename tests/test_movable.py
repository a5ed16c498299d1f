"""Figures that move: their JavaScript computes what the package computes, in a browser, by mouse and by keyboard."""
import importlib.util
import json
import math
import re
from base64 import b64decode
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
import browser as tool
from browser import PROGRAM, Browser

from scott import masking
from scott.look.movable import ALT, SCRIPTS, TITLES, memory, movable, pixels_read
from scott.schedule import linear
from scott.tokenizer import SparseTokenizer

NBS = Path(__file__).resolve().parent.parent/'nbs'
FIGURE = 'document.querySelector(\'[data-figure="%s"]\')'
LIGHT, DARK = 'background: white; color: black', 'background: #1b1b1b; color: #eee'
in_browser = pytest.mark.skipif(PROGRAM is None or not importlib.util.find_spec('websocket'),
                                reason='needs Chromium (apt install chromium) and the package websocket-client')


# Without a browser

@pytest.fixture(scope='module')
def figures():
    return {name: movable(name) for name in SCRIPTS}


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_bundle_has_what_every_viewer_needs(figures, name):
    bundle, metadata = figures[name]._repr_mimebundle_()
    assert list(bundle) == ['text/html', 'image/png', 'text/plain'] and metadata['image/png']['alt'] == ALT[name]
    assert b64decode(bundle['image/png']).startswith(b'\x89PNG') and repr(figures[name]) == bundle['text/plain'] == ALT[name]
    assert len(bundle['text/html'].encode()) <= 60_000
    still = re.sub(r'(?s)<script>.*</script>', '', bundle['text/html'])  # what a viewer without scripts shows
    assert f'alt="{escape(ALT[name])}"' in still and bundle['image/png'] in still and 'const' not in still
    assert not re.search(r'https?:|import |@import|url\(', bundle['text/html'])


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='masks, field, memory'): movable('mask')


@pytest.mark.parametrize('page', sorted(NBS.glob('*.ipynb')), ids=lambda p: p.stem)
def test_a_page_stores_the_figures_as_they_are_now(figures, page):
    outputs = [o['data'] for c in json.loads(page.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])
               if 'scott-movable' in ''.join(o.get('data', {}).get('text/html', ''))]
    for data in outputs:
        html = ''.join(data['text/html'])
        now = figures[re.search(r'data-figure="(\w+)"', html)[1]].html
        for part in (r'(?s)<script>.*</script>', r'<div class="scott-movable".*'):  # stills may differ between machines
            assert re.search(part, html)[0] == re.search(part, now)[0], 'execute the page again'
        assert 'image/png' in data
    assert len(outputs) == {'35_movable': 3, '10_masking': 1, '11_sparse': 1, '22_schedule': 1}.get(page.stem, 0)


# In a browser

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp('browser'))
    yield browser
    browser.close()


def document(body, style=LIGHT):
    return ('<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>figures</title><body style="{style}">{body}</body></html>')


@pytest.fixture(scope='module')
def files(figures, tmp_path_factory):
    """A page with each figure, and one with all of them, the first one twice."""
    folder = tmp_path_factory.mktemp('pages')
    for name, figure in figures.items():
        (folder/f'{name}.html').write_text(document(figure.html), encoding='utf-8')
    everything = ''.join(f.html for f in [*figures.values(), figures['masks']])
    (folder/'all.html').write_text(document(everything, DARK), encoding='utf-8')
    return folder


def inside(name, what):
    """An element in a figure, as JavaScript: the first whose selector, or whose text, is `what`."""
    root = f'{FIGURE % name}.shadowRoot'
    if re.fullmatch(r'canvas|svg|button|\..+', what):
        return f'{root}.querySelector({json.dumps(what)})'
    return f'[...{root}.querySelectorAll("button, label")].find(e => e.textContent.trim() == {json.dumps(what)})'


@in_browser
@pytest.mark.parametrize('width', [390, 1000])
@pytest.mark.parametrize('name', SCRIPTS)
def test_it_loads_and_fits(browser, files, name, width):
    browser.open(files/f'{name}.html', width)
    assert browser.run(f'{FIGURE % name}.figure.draw instanceof Function') and browser.problems == []
    assert browser.run('document.documentElement.scrollWidth') <= width
    wide = browser.run(f'Math.max(...[...{FIGURE % name}.shadowRoot.querySelectorAll("*")]'
                       '.map(e => e.getBoundingClientRect().right))')
    assert wide <= width
    assert browser.run(f'{FIGURE % name}.querySelector("img").getBoundingClientRect().width') == 0  # the still gave way
    unnamed = browser.run(f'[...{FIGURE % name}.shadowRoot.querySelectorAll("input, canvas, svg")].filter(e => !'
                          '(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-hidden")'
                          ' || e.querySelector("title"))).length')
    assert unnamed == 0
    called = browser.run(f'{inside(name, ".figure")}.getAttribute("aria-label")')
    assert called == TITLES[name]
    live = browser.run(f'[...{FIGURE % name}.shadowRoot.querySelectorAll("[aria-live]")].map(e => e.ariaLive)')
    assert live == ['polite']


@in_browser
def test_figures_on_one_page_do_not_clash_and_follow_its_colors(browser, files):
    browser.open(files/'all.html')
    hosts = '[...document.querySelectorAll(".scott-movable")]'
    assert browser.run(f'{hosts}.map(h => h.dataset.figure)') == [*SCRIPTS, 'masks'] and browser.problems == []
    assert browser.run('Object.keys(window).filter(k => /^(draw|uniform|STYLE|start|make|state)$/.test(k))') == []
    themes = f'{hosts}.map(h => h.shadowRoot.querySelector(".figure").dataset.theme)'
    assert browser.run(themes) == ['dark'] * 4
    first, last = browser.run(f'{hosts}.filter(h => h.dataset.figure == "masks").map(h => h.figure.state.drawn)')
    browser.click(inside('masks', 'Draw 100'))
    now = browser.run(f'{hosts}.filter(h => h.dataset.figure == "masks").map(h => h.figure.state.drawn)')
    assert now == [first + 100, last]
    contrast = browser.run(f'''(f => {{ const light = c => {{
        const [r, g, b] = c.match(/\\d+/g).map(v => (v /= 255) <= .04 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; }};
        const s = getComputedStyle(f); return (light(s.color) + .05) / (light(s.backgroundColor) + .05); }})
        ({FIGURE % "masks"}.shadowRoot.querySelector(".figure"))''')
    assert contrast > 7
    browser.run('void (document.body.style.cssText = "background: white; color: black")')
    browser.wait(f'{themes}.every(t => t == "light")')


@in_browser
def test_figures_follow_the_colors_of_the_system(browser, figures, tmp_path):
    colors = '<style>@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }</style>'
    (tmp_path/'page.html').write_text(document(colors + figures['masks'].html, ''), encoding='utf-8')
    browser.open(tmp_path/'page.html')
    for theme in ('dark', 'light'):
        browser.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=theme)])
        browser.wait(f'{inside("masks", ".figure")}.dataset.theme == "{theme}"')


@in_browser
def test_a_browser_that_does_not_start_is_named_and_ended(monkeypatch, tmp_path):
    program = tmp_path/'chromium'
    program.write_text('#!/bin/sh\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setattr(tool, 'PROGRAM', str(program))
    with pytest.raises(RuntimeError, match='exit code 3'): Browser(tmp_path/'profile')


# Masks

SAMPLE = '''(f => { const sum = Array(%(n)d).fill(0), sizes = new Set(), r = f.randomFrom(%(seed)d); let near = 0;
    for (let i = 0; i < %(draws)d; i++) { const keep = f.%(kind)s(%(rows)d, %(cols)d, %(ratio)s, r);
        let size = 0; keep.forEach((k, n) => { sum[n] += k; size += k; }); sizes.add(size);
        if (%(rows)d == %(cols)d) near += f.touching(keep, %(rows)d); }
    return {sum, sizes: [...sizes], near: near / %(draws)d}; })(%(figure)s.figure)'''


def touching(keep, side):
    seen = torch.nn.functional.max_pool2d(keep.view(-1, 1, side, side).float(), 3, stride=1, padding=1).flatten(1)
    return ((seen * ~keep).sum(1) / (~keep).sum(1)).mean().item()


@in_browser
@pytest.mark.parametrize('kind', ['uniform', 'blockwise', 'multiblock'])
@pytest.mark.parametrize('grid, ratio', [((14, 14), .6), ((6, 6), .75), ((7, 7), .4), ((4, 9), .5)])
def test_masks_are_distributed_as_the_package_draws_them(browser, files, kind, grid, ratio):
    browser.open(files/'masks.html')
    draws, n = 1000, math.prod(grid)
    got = browser.run(SAMPLE % dict(n=n, seed=7, draws=draws, kind=kind, rows=grid[0], cols=grid[1], ratio=ratio,
                                    figure=FIGURE % 'masks'))
    keep = getattr(masking, kind)(4000, grid, ratio, generator=torch.Generator().manual_seed(0))
    assert got['sizes'] == [masking.visible_count(grid, ratio)]
    ours, theirs = np.array(got['sum']) / draws, keep.float().mean(0).numpy()
    error = np.sqrt(theirs * (1 - theirs) * (1 / draws + 1 / 4000) + 1e-4 / draws)
    assert np.abs((ours - theirs) / error).max() < 5
    assert (((ours - theirs) / error) ** 2).mean() < 2  # all patches together
    if grid[0] == grid[1]:
        assert abs(got['near'] - touching(keep, grid[0])) < .015


@in_browser
def test_counts_are_exact_for_every_ratio_and_grid(browser, files):
    browser.open(files/'masks.html')
    cases = [(side, r / 100) for side in (6, 7, 8, 14) for r in range(10, 91)]
    got = browser.run(f'{json.dumps(cases)}.map(([n, r]) => {FIGURE % "masks"}.figure.visibleCount(n, n, r))')
    assert got == [masking.visible_count((side, side), ratio) for side, ratio in cases]


@in_browser
def test_masks_by_mouse(browser, files):
    browser.open(files/'masks.html')
    state = f'(s => ({{kind: s.kind, side: s.side, ratio: s.ratio, drawn: s.drawn}}))({FIGURE % "masks"}.figure.state)'
    assert browser.run(state) == dict(kind='blockwise', side=14, ratio=.6, drawn=1)
    browser.click(inside('masks', 'Draw 100'))
    browser.click(inside('masks', 'Draw one'))
    assert browser.run(state)['drawn'] == 102 and 'drawn: 102' in browser.run(f'{inside("masks", ".readout")}.textContent')
    before = browser.run(f'{inside("masks", "canvas")}.toDataURL()')
    browser.click(inside('masks', 'multi-block'))
    browser.click(inside('masks', '7 × 7'))
    assert browser.run(state) == dict(kind='multiblock', side=7, ratio=.6, drawn=1)
    assert browser.run(f'{inside("masks", "canvas")}.toDataURL()') != before
    browser.click(inside('masks', 'Keep drawing'))
    browser.wait(f'{FIGURE % "masks"}.figure.state.drawn > 20')
    assert browser.run(f'{inside("masks", ".readout")}.ariaLive') == 'off'  # not at every frame
    browser.click(inside('masks', 'Pause'))
    assert browser.run(f'{inside("masks", ".readout")}.ariaLive') == 'polite'
    drawn = browser.run(state)['drawn']
    browser.run('new Promise(done => setTimeout(done, 100))')
    assert browser.run(state)['drawn'] == drawn and browser.problems == []


@in_browser
def test_masks_by_keyboard_alone(browser, files):
    browser.open(files/'masks.html')
    state = f'(s => [s.kind, s.side, Math.round(100 * s.ratio), s.drawn])({FIGURE % "masks"}.figure.state)'
    browser.press('Tab', 'ArrowLeft')  # the checked kind of three, then the one before it
    assert browser.run(state) == ['uniform', 14, 60, 1]
    browser.press('Tab', 'ArrowLeft', 'Tab', 'ArrowRight', 'ArrowRight')
    assert browser.run(state) == ['uniform', 8, 62, 1]
    browser.press('Tab', ' ', 'Tab', 'Enter')  # the buttons
    assert browser.run(state) == ['uniform', 8, 62, 102] and browser.problems == []


# Receptive field

@in_browser
@pytest.mark.parametrize('row, column, masked', [(3, 3, False), (0, 0, False), (6, 2, False), (3, 3, True), (1, 5, True)])
def test_fields_are_those_of_autograd(browser, files, row, column, masked):
    browser.open(files/'field.html')
    keep = masking.blockwise(1, (7, 7), generator=torch.Generator().manual_seed(row)).view(7, 7)
    keep[row, column] = True
    mask = json.dumps(keep.int().flatten().tolist()) if masked else 'null'
    maps = browser.run(f'{FIGURE % "field"}.figure.receptiveField({row}, {column}, {mask}).map(m => [...m])')
    assert [len(m) for m in maps] == [112 ** 2, 56 ** 2, 28 ** 2, 14 ** 2, 7 ** 2]
    ours, theirs = torch.tensor(maps[0]).view(112, 112) > 0, pixels_read(row, column, keep if masked else None)
    assert torch.equal(ours, theirs)
    hidden = ~keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert (ours & hidden).any() != masked


@in_browser
def test_the_small_network_is_the_tokenizer(browser, files):
    browser.open(files/'field.html')
    g = torch.Generator().manual_seed(0)
    image, keep = torch.randn(1, 3, 112, 112, generator=g), masking.blockwise(1, (7, 7), generator=g)
    call = (f'(f => [f.net, null, {keep.int()[0].tolist()}].map((k, i) => i ? [...f.tokenize('
            f'{json.dumps([round(v, 4) for v in image.flatten().tolist()])}, k, f.net)] : k.map(w => [...w])))')
    (first, second), *tokens = browser.run(f'{call}({FIGURE % "field"}.figure)')
    net = SparseTokenizer(3, 8, 4)
    with torch.no_grad():
        net.conv1.weight.copy_(torch.tensor(first).view(4, 3, 7, 7))
        net.conv2.weight.copy_(torch.tensor(second).view(8, 4, 7, 7))
        for got, mask in zip(tokens, (None, keep)):
            want = net(image.mul(1e4).round().div(1e4), mask)[0].T
            torch.testing.assert_close(torch.tensor(got).view(8, 49), want, atol=1e-4, rtol=1e-4)
    assert first and abs(np.std(first) / math.sqrt(2 / 147) - 1) < .1  # Kaiming's rule


@in_browser
def test_field_by_mouse_and_keyboard(browser, files):
    browser.open(files/'field.html')
    state = f'(s => [s.row, s.column, [...s.keep]])({FIGURE % "field"}.figure.state)'
    numbers = f'{FIGURE % "field"}.figure.state.numbers'
    *_, keep = browser.run(state)
    browser.click(inside('field', 'canvas'), 1.5 / 7, 4.5 / 7)
    assert browser.run(state) == [4, 1, keep]
    browser.press('ArrowRight', 'ArrowUp')  # the click put the focus there
    assert browser.run(state) == [3, 2, keep]
    for row in range(7):  # the whole column: masked, no hidden pixel flows in, whatever token is looked at
        got = browser.run(numbers)
        assert got['masked']['leak'] == 0 and got['masked']['moved'] == 0
        browser.press('ArrowUp' if row < 3 else 'ArrowDown')
    browser.run(f'void {inside("field", "button")}.focus()')
    browser.press('Tab', 'Tab', 'Tab', 'ArrowLeft')  # past the other buttons, to the picture
    row, column, keep = browser.run(state)
    browser.press(' ')
    changed = [k if i != 7 * row + column else 1 - k for i, k in enumerate(keep)]
    assert browser.run(state) == [row, column, changed]
    browser.click(inside('field', 'New mask'))
    assert sum(browser.run(state)[2]) == masking.visible_count((7, 7), .6) and browser.problems == []


@in_browser
def test_only_the_dense_field_leaks(browser, files):
    browser.open(files/'field.html')
    got = browser.run(f'{FIGURE % "field"}.figure.state.numbers')
    assert got['dense']['read'] == 61 ** 2 and got['dense']['leak'] > 100 and got['dense']['moved'] > .01
    assert 0 < got['masked']['read'] < 61 ** 2 and got['masked']['leak'] == 0 and got['masked']['moved'] == 0
    text = browser.run(f'{FIGURE % "field"}.shadowRoot.querySelector(".panel p").textContent')
    assert '0 of them hidden' in text and 'exactly 0' in text


# Memory

@in_browser
@pytest.mark.parametrize('m, rises, now', [(.996, False, 600), (.996, True, 1000), (.9, True, 1), (0, False, 5), (1, False, 50)])
def test_memory_and_lag_are_those_of_the_schedule(browser, files, m, rises, now):
    browser.open(files/'memory.html')
    momenta = [linear(k, 1000, m, 1. if rises else m) for k in range(1, now + 1)]
    weights = memory(momenta)
    arguments = f'{now}, 1000, {m}, {json.dumps(rises)}'
    got = browser.run(f'[...{FIGURE % "memory"}.figure.memoryOf({arguments})]')
    np.testing.assert_allclose(got, weights, atol=1e-12)
    place = browser.run(f'{FIGURE % "memory"}.figure.follow(1000, {m}, {json.dumps(rises)})[{now}]')
    assert abs(place - (weights @ torch.arange(now + 1.).double()).item()) < 1e-8


@in_browser
def test_half_lives(browser, files):
    browser.open(files/'memory.html')
    for m in (.5, .9, .996, .9999):
        value = browser.run(f'{FIGURE % "memory"}.figure.halfLife({m})')
        assert abs(m ** value - .5) < 1e-9
        youngest = browser.run(f'(f => f.half(f.memoryOf(20000, 20000, {m}, false)))({FIGURE % "memory"}.figure)')
        assert youngest == math.ceil(value - 1e-9)
    assert browser.run(f'(f => [f.halfLife(0), f.halfLife(1) === Infinity, f.half(f.memoryOf(9, 9, 1, false)) === '
                       f'Infinity])({FIGURE % "memory"}.figure)') == [0, True, True]


@in_browser
def test_memory_by_mouse_and_keyboard(browser, files):
    browser.open(files/'memory.html')
    state = f'(s => [s.m, s.total, s.now, s.rises])({FIGURE % "memory"}.figure.state)'
    assert browser.run(state) == [.996, 1000, 600, False]
    browser.press('Tab', 'ArrowRight', 'Tab', 'ArrowRight', 'Tab', 'ArrowRight', 'Tab', 'Home')
    assert browser.run(state) == [.997, 2000, 0, True]
    browser.press('End')
    text = browser.run(f'{inside("memory", ".readout")}.textContent')
    assert browser.run(state)[2] == 2000 and 'm = 1:' in text and '∞' in text
    browser.click(inside('memory', 'svg'), (66 + .25 * 322) / 400)
    assert abs(browser.run(state)[2] - 500) <= 10 and browser.problems == []


# The gallery of a run

@in_browser
def test_a_gallery_opens(browser, tmp_path, monkeypatch):
    from conftest import write_images
    from test_gallery import write_run

    from scott.look.gallery import main
    monkeypatch.setenv('SCOTT_CACHE', str(tmp_path/'cache'))
    write_images(tmp_path/'images', 77, 80)
    main([str(write_run(tmp_path/'run')), '--images', '3', '--out', str(tmp_path/'out')])
    for width in (390, 1000):
        browser.open(tmp_path/'out/gallery.html', width)
        assert browser.problems == []
        shown = browser.run('[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 0])')
        assert len(shown) >= 5 and all(map(all, shown))
        assert browser.run('document.documentElement.scrollWidth') <= width
        assert 'Gallery of run' in browser.run('document.body.innerText')
