"""What `make test` lists at its end: every failure of every step, whichever failed first."""
import json
import subprocess
import sys

import check
import pytest


def script(code):
    return [sys.executable, '-c', code]


@pytest.mark.parametrize('code, pattern, failed', [
    ('print("fine")', check.TESTS, []),
    (r'print("\t10_a.ipynb\nother.ipynb\n\tsub/11_b.ipynb"); raise SystemExit(1)', check.PAGES,
     ['x: 10_a.ipynb', 'x: sub/11_b.ipynb']),
    ('print("FAILED tests/a.py::b - assert 0\\n2 FAILED\\nERROR tests/c.py"); raise SystemExit(1)', check.TESTS,
     ['x: tests/a.py::b', 'x: tests/c.py']),
    ('import os; os.kill(os.getpid(), 9)', check.TESTS, ['x: exit code -9: '])], ids=['none', 'pages', 'tests', 'killed'])
def test_every_failure_of_a_step_is_listed(code, pattern, failed):
    found = check.run('x', script(code), pattern)
    assert len(found) == len(failed) and all(f.startswith(start) for f, start in zip(found, failed))


def test_a_file_that_a_command_changes_makes_or_removes_is_named(tmp_path, monkeypatch):
    for name in ('same.py', 'old.py', 'gone.py', '.hidden/a.py', 'notes.txt'):
        (tmp_path/'scott'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'scott'/name).write_text('x = 1')
    tool = tmp_path/'tool'
    tool.write_text('#!/bin/sh\ncd scott\necho y > old.py\nrm gone.py\necho > new.py\necho > notes.txt\necho > .hidden/a.py\n')
    tool.chmod(0o755)
    monkeypatch.setattr(check, 'ROOT', tmp_path)
    monkeypatch.setattr(check, 'BIN', tmp_path)
    found = check.unchanged('tool', 'scott', '.py')
    assert found == [f'tool changed scott/{name}.py: look at it, then commit it' for name in ('gone', 'new', 'old')]


def test_a_failing_step_does_not_hide_the_next(monkeypatch):
    monkeypatch.setattr(check, 'unchanged', lambda command, *_: [command])
    monkeypatch.setattr(check, 'alone', lambda place: None)  # tests/test_alone.py looks at it
    monkeypatch.setattr(check, 'run', lambda name, *_, **__: [name])
    assert check.quick() == ['nbdev_export', 'nbdev_clean', 'pages', 'tests', 'course']


def test_a_wheel_that_cannot_be_built_hides_no_failure(monkeypatch):
    def broken(place): subprocess.run(script('raise SystemExit(5)'), check=True)
    monkeypatch.setattr(check, 'unchanged', lambda command, *_: [f'{command} changed x'])
    monkeypatch.setattr(check, 'alone', broken)
    monkeypatch.setattr(check, 'run', lambda name, *_, **__: [f'{name}: a::b'])
    export, clean, pages, tests, course = check.quick()
    assert export == 'nbdev_export changed x' and clean == 'nbdev_clean changed x' and tests == 'tests: a::b' and course == 'course: a::b'
    assert pages.startswith('pages: exit code 5: ') and 'SystemExit' in pages


def test_slow_cells_are_found(tmp_path, monkeypatch):
    for name, first in (('10_a', '#| slow'), ('11_b', '#| hide'), ('.ipynb_checkpoints/12_c', '#| slow')):
        page = tmp_path/'nbs'/f'{name}.ipynb'
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(dict(cells=[dict(source=[first + '\n', 'x = 1'])])))
    monkeypatch.setattr(check, 'ROOT', tmp_path)
    monkeypatch.setattr(check, 'run', lambda name, command, _: [f'{name} {" ".join(map(str, command))}'])
    tests, page = check.slow()
    assert tests.endswith('-m slow') and f'--path {tmp_path}/nbs/10_a.ipynb --flags slow' in page
