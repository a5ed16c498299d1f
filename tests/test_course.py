"""The checks of the course: right answers pass, blank ones are told so, wrong ones and automatic changes are rejected.

A new exercise adds a page in nbs/solutions; nothing is to be added here.
"""
import importlib
import inspect
import json
import os
import re
import resource
import sys
import time
from importlib.metadata import version

import exercises
import figures
import mutants
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from scott.course import engine
from scott.course.syllabus import SYLLABUS

PAGES = sorted(exercises.SOLUTIONS.glob('*.ipynb'))
CASES = [(path, name) for path in PAGES for name in exercises.functions(exercises.read(path))]
pytestmark = pytest.mark.usefixtures('one_thread')
pages = pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
cases = pytest.mark.parametrize('path, name', CASES, ids=[f'{p.stem}-{n}' for p, n in CASES])


@pytest.fixture(autouse=True)
def own_book(tmp_path, monkeypatch):
    monkeypatch.setenv('SCOTT_COURSE', str(tmp_path))


class Case:
    """A function that a student writes: its solution, its check, and what the page lists."""

    def __init__(self, path, name):
        page = exercises.read(path)
        self.name, self.space, self.source = name, exercises.names(page), exercises.functions(page)[name]
        self.solution = self.space[name]
        self.check = getattr(importlib.import_module(f'scott.{exercises.module(page)}'), f'check_{name}')
        self.wrong, self.equivalent = self.space['WRONG'][name], self.space['EQUIVALENT'][name]

    def judge(self, f, seed=0):
        "Properties alone."
        return engine.judge(self.check.__wrapped__, f, seed)


@cases
def test_right_answers_pass(path, name):
    case = Case(path, name)
    answers = [f for n, f in case.space.items() if inspect.isfunction(f) and (n == name or n.startswith(f'{name}_'))]
    assert len(answers) >= 3, 'the solution and two other right answers'
    for f in answers:
        for seed in range(20):
            torch.manual_seed(seed)
            outcome = case.judge(f, seed)
            assert outcome, f'{f.__name__}, seed {seed}: {outcome}'


@cases
def test_wrong_answers_are_rejected_and_named(path, name, monkeypatch):
    case = Case(path, name)
    assert len(case.wrong) >= 5
    monkeypatch.setattr(engine, 'LIMIT', 3)
    for mistake, (word, edits) in case.wrong.items():
        f = engine.edited(case.source, edits, case.space)
        outcome = case.judge(f)
        assert outcome.state in ('wrong', 'error') and word in outcome.message, f'{mistake}: {word!r} is not in {outcome}'
        assert engine.alike(case.check, f) == mistake


@cases
def test_changes_of_the_solution_are_rejected(path, name, monkeypatch, figure):
    case, survivors, total = Case(path, name), [], 0
    monkeypatch.setattr(engine, 'LIMIT', 4)
    for change, source in mutants.of(case.source):
        total += 1
        torch.manual_seed(0)
        if case.judge(engine.edited(source, [], case.space)):
            survivors.append(change)
    figure(f'course, {name}: automatic changes of the solution that the check rejects', f'{total - len(survivors)} of {total}')
    print(f'{name}: {total - len(survivors)} of {total} changes rejected')
    assert sorted(survivors) == sorted(case.equivalent), 'not listed as equivalent, or listed and rejected'
    assert all(case.equivalent.values()) and len(survivors) <= max(1, .05 * total)


def other_things(right):
    """What a student's function may do, around a right answer."""
    def endless(*args):
        while True: pass

    def noisy(*args):
        for _ in range(20_000): print('x' * 100)
        raise KeyError('nothing')

    def recursive(*args): return recursive(*args)

    def change(*args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        for a in tensors: a.zero_()
        return right(*args) if tensors else None

    def tensor(f):
        def g(*args):
            out = right(*args)
            return f(out) if isinstance(out, torch.Tensor) else [f(o) for o in out] if isinstance(out, (list, tuple)) else f(torch.tensor([out]))
        return g
    return dict(
        none=lambda *a: None, no_arguments=lambda: None, list=tensor(lambda x: [x.tolist()]), numpy=tensor(lambda x: x.detach().numpy()),
        meta=tensor(lambda x: x.to('meta')), double=tensor(lambda x: x.double()), flat=tensor(lambda x: x.reshape(1, -1)), half=tensor(lambda x: x.half()),
        complex=tensor(lambda x: x.to(torch.complex64)), empty=lambda *a: torch.zeros(0), sparse=tensor(lambda x: x.float().to_sparse()),
        huge=lambda *a: torch.zeros(1).expand(10**6, 10**6), text=lambda *a: 'text', nan=tensor(lambda x: x.float() * float('nan')),
        exit=lambda *a: sys.exit(), endless=endless, noisy=noisy, recursive=recursive, change=change, number=5)


@cases
def test_whatever_a_student_returns_is_an_outcome(path, name, monkeypatch, capsys):
    case = Case(path, name)
    monkeypatch.setattr(engine, 'LIMIT', .5)
    for kind, f in other_things(case.solution).items():
        outcome = case.check(f)
        assert isinstance(outcome, engine.Outcome) and outcome.state in {'wrong', 'error'}, kind
        assert 'Traceback' not in capsys.readouterr().out and len(str(outcome)) < 1500
    monkeypatch.undo()
    torch.set_default_dtype(torch.float64)
    try:
        assert case.judge(case.solution)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@cases
def test_a_check_is_quick_and_leaves_the_random_state(path, name, figure):
    case, times, state = Case(path, name), [], torch.get_rng_state()
    for _ in range(3):
        start = time.process_time()
        case.judge(case.solution)
        times.append(time.process_time() - start)
    uses = 'generator' not in case.source and 'torch.rand' in case.source  # the student's own draws
    assert uses or torch.get_rng_state().equal(state)
    figure(f'course, {name}: processor time of a check of the solution', f'{1000 * min(times):.0f} ms')
    print(f'{name}: {1000 * min(times):.0f} ms')
    assert min(times) <= .7


@pages
def test_exercises_are_what_is_generated(path):
    assert (exercises.EXERCISES/path.name).read_text(encoding='utf-8') == exercises.written(exercises.exercise(path)), 'run make exercises'
    kept, found = json.loads(exercises.stored(path).read_text(encoding='utf-8')), exercises.look_alikes(path)
    assert {f: list(known) for f, known in kept.items()} == {f: list(known) for f, known in found.items()}, 'run make exercises'
    for f, known in found.items():
        for mistake, numbers in known.items():
            assert numbers == pytest.approx(kept[f][mistake], rel=1e-3, abs=1e-3), f'{f}, {mistake}: run make exercises'


@pages
def test_exercise_has_no_solution_and_a_syllabus_entry(path):
    nb = exercises.exercise(path)
    text = '\n'.join(c['source'] for c in nb['cells'])
    assert 'SOLUTION' not in text and 'WRONG' not in text and 'export' not in text
    listed = ' '.join(e.functions for e in SYLLABUS if e.notebook == path.stem).split()
    assert set(exercises.functions(exercises.read(path))) <= set(listed)
    for name in exercises.functions(exercises.read(path)):
        assert f'check_{name}(' in text
    assert len(re.findall('<details><summary>Hint 1', text)) == len(re.findall('<details><summary>Hint 3', text))


def test_the_pages_of_the_book_link_to_their_exercises():
    assert [e.number for e in SYLLABUS] == list(range(1, 17))
    for e in SYLLABUS[:14]:
        assert f'(exercises/{e.notebook}.ipynb)' in (exercises.ROOT/f'nbs/{e.page}.ipynb').read_text(encoding='utf-8'), e


@pages
def test_blank_exercise_runs_to_its_end_in_an_empty_folder(path, place, monkeypatch, tmp_path, figure):
    """As on Colab: the package from a wheel, the notebook alone. Nothing is written, so nothing is kept either."""
    (tmp_path/'empty').mkdir()
    nb = nbformat.read(exercises.EXERCISES/path.name, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = NotebookClient(nb, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path/'empty'))))
    client.execute(env={**os.environ, 'PYTHONPATH': str(place), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert {o.output_type for o in outputs} <= {'stream', 'display_data'}, 'an error'
    text = ''.join(o.text for o in outputs if o.get('name') == 'stdout')
    assert f'scott {version("scott-mim-jepa")}' in text and '✓' not in text and not (tmp_path/'course.json').exists()
    for name in exercises.functions(exercises.read(path)):
        line = next(line for line in text.splitlines() if f'○ {name}: ' in line)
        assert 'not written yet' in line and 'Hint 1' in line
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figure(f'course, {path.stem}: processor time of the blank notebook in an empty folder', f'{took:.0f} s')
    assert took <= 60


def test_figures_of_a_class_are_those_of_the_pages():
    """Run make exercises after a page was run anew."""
    kept = {path.name: path.read_bytes() for path in figures.FOLDER.glob('*.png')}
    assert kept == figures.pictures()
    assert (exercises.ROOT/'nbs/54_figures.ipynb').read_text(encoding='utf-8') == exercises.written(figures.page())
