"""nbs/exercises from nbs/solutions, and the numbers of known mistakes beside each course module: `make exercises`.

A cell of a solution page goes into its exercise without what stands between BEGIN SOLUTION and END SOLUTION. Left out are
exported cells, hidden ones, the headings "The check" with their text, and all from "Other right answers" on.
"""
import ast
import hashlib
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `make exercises` runs this file as a script

import torch  # noqa: E402

from scott.course import engine  # noqa: E402

SOLUTIONS, EXERCISES = ROOT/'nbs/solutions', ROOT/'nbs/exercises'
REGION = re.compile(r'^( *)# BEGIN SOLUTION\n(.*?)^ *# END SOLUTION$', re.M | re.S)
DIRECTIVE = re.compile(r'^#\| *(\w+)', re.M)


def read(path):
    """A notebook, every cell's source as one string."""
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        cell['source'] = ''.join(cell['source'])
    return nb


def code(page):
    return [c['source'] for c in page['cells'] if c['cell_type'] == 'code']


def module(page):
    """The name of the course module that a solution page exports."""
    return re.search(r'^#\| default_exp (course\.\w+)$', '\n'.join(code(page)), re.M)[1]


def functions(page):
    """{name: source} of what the student writes."""
    return {node.name: ast.get_source_segment(source, node) for source in code(page) if REGION.search(source)
            for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and '# BEGIN SOLUTION' in
            ast.get_source_segment(source, node)}


def names(page):
    """What the page defines, as a namespace: its imports, functions, classes and constants; nothing is called."""
    space = {'__name__': 'page'}
    for source in code(page):
        if re.match(r'#\| (default_exp|hide\n#\| eval: false)', source):
            continue
        for node in ast.parse(source).body:
            constant = isinstance(node, (ast.Assign, ast.AugAssign)) and \
                ast.unparse(getattr(node, 'target', None) or node.targets[0]).isupper()
            if constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                exec(compile(ast.Module([node], []), '<page>', 'exec'), space)
    return space


def blank(match):
    lines = [line for line in match[2].splitlines() if line.strip()]
    return f'{match[1]}raise NotImplementedError  # {len(lines)} line{"s" * (len(lines) > 1)}, in place of this one'


def cell(kind, source):
    made = dict(cell_type=kind, id=hashlib.sha256(source.encode()).hexdigest()[:8], metadata={}, source=source)
    return {**made, 'outputs': [], 'execution_count': None} if kind == 'code' else made


def kept(page):
    """The cells that an exercise takes over."""
    check = False
    for c in page['cells']:
        used = set(DIRECTIVE.findall(c['source'])) if c['cell_type'] == 'code' else set()
        if c['cell_type'] == 'markdown':
            if c['source'].startswith('## Other right answers'):
                return
            check = c['source'].startswith('### The check')
        if not check and c['cell_type'] == 'markdown' or used.isdisjoint({'default_exp', 'export', 'exports', 'hide'}) \
                and c['cell_type'] == 'code' or used == {'hide', 'eval'}:
            yield cell(c['cell_type'], REGION.sub(blank, c['source']))


def exercise(path):
    """The exercise of a solution page, as a notebook."""
    page = read(path)
    cells = list(kept(page))
    cells[0]['source'] = cells[0]['source'].replace('# Solutions', '# Exercises', 1)
    cells[1]['source'] = cells[1]['source'].replace('nbs/solutions/', 'nbs/exercises/')
    imports = next(c for c in cells if re.match(r'(import|from) ', c['source']))
    checks = ', '.join(sorted(f'check_{name}' for name in functions(page)))
    lines = [line for line in imports['source'].splitlines() if line != 'from scott.course.engine import mistakes']
    before = next((i for i, line in enumerate(lines) if line.startswith('from scott.')), len(lines))
    line = f'from scott.{module(page)} import {checks}'
    if len(line) > 110:
        line = textwrap.fill(line.replace('import ', 'import (') + ')', 110, subsequent_indent=' ' * (line.index('import') + 8))
    lines[before:before] = ['from scott.course.progress import hello, progress', line]
    imports['source'] = '\n'.join(lines)
    cells.insert(cells.index(imports) + 1, cell('code', 'hello()'))
    end = f'The [solutions](../solutions/{path.name}) show other right answers, and how each known mistake looks. What you have done so far:'
    cells += [cell('markdown', end), cell('code', 'progress()')]
    return dict(cells=cells, metadata=page['metadata'], nbformat=4, nbformat_minor=5)


def written(nb):
    """The text of a notebook file, as nbdev writes it."""
    cells = [{**c, 'source': c['source'].splitlines(keepends=True)} for c in nb['cells']]
    return json.dumps({**nb, 'cells': cells}, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


def look_alikes(path):
    """{function: {mistake: numbers}} of a solution page."""
    page = read(path)
    space, checks = names(page), importlib.import_module(f'scott.{module(page)}')
    found = {}
    for name, source in functions(page).items():
        found[name] = {}
        for mistake, (_, edits) in space['WRONG'][name].items():
            try:
                torch.manual_seed(0)  # for a mistake that draws without the generator
                with engine.limited(engine.LIMIT):
                    numbers = engine.condensed(getattr(checks, f'check_{name}').look(engine.edited(source, edits, space)))
            except engine.TimeUp:
                sys.exit(f'{name}, {mistake}: no end')
            found[name][mistake] = [round(n, 6) for n in numbers]
    return found


def stored(path):
    """Where the numbers of a page's known mistakes are kept."""
    return ROOT/'scott'/(module(read(path)).replace('.', '/') + '.json')


def main():
    EXERCISES.mkdir(exist_ok=True)
    for path in sorted(SOLUTIONS.glob('*.ipynb')):
        (EXERCISES/path.name).write_text(written(exercise(path)), encoding='utf-8')
        found = look_alikes(path)
        stored(path).write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
        print(path.stem, ', '.join(found))


if __name__ == '__main__':
    main()
