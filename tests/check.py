"""All checks, one after the other though one fails, and at the end a list of what failed.

`python tests/check.py`       the export, the cleaning, then every page, alone as on Colab, and beside it the tests
                              that aren't slow, those of the course in a process of their own
`python tests/check.py slow`  the slow tests and the pages with slow cells
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES, TESTS = r'^\t(\S+\.ipynb)$', r'^(?:FAILED|ERROR) (\S+)'  # how nbdev_test and pytest name what failed
PYTEST = [sys.executable, '-m', 'pytest', '-q', '-rfEs', '--tb=short', '--durations=10',
          '--continue-on-collection-errors']
COURSE = 'tests/test_course.py'


def run(name, command, pattern, place=None, **variables):
    """Run a command, its lines printed behind `name`; what failed, as lines: the matches of `pattern`."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONUNBUFFERED': '1', **variables}
    process = subprocess.Popen(command, cwd=place or ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors='replace')
    failed = []
    for line in process.stdout:
        print(f'{name:6}| {line}', end='', flush=True)
        failed += re.findall(pattern, line)
    if process.wait() and not failed:
        failed = [f'exit code {process.returncode}: {" ".join(map(str, command))}']
    return [f'{name}: {what}' for what in failed]


def files(folder, suffix):
    """The contents of a folder's files by path, without hidden folders."""
    paths = [p.relative_to(ROOT) for p in (ROOT/folder).rglob('*' + suffix)]
    return {p.as_posix(): (ROOT/p).read_bytes() for p in paths if not any(part[0] in '._' for part in p.parent.parts)}


def unchanged(command, folder, suffix):
    """Run a command of nbdev that must leave a folder as it is: the files that it changed, made or removed."""
    before = files(folder, suffix)
    failed = run(command, [BIN/command], r'(?!)')
    after = files(folder, suffix)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return failed + [f'{command} changed {path}: look at it, then commit it' for path in changed]


def alone(place):
    """Into an empty folder: the package as pip installs it from a wheel, and each page in a folder of its own."""
    for name in ('scott', 'nbs/results'):
        shutil.copytree(ROOT/name, place/'source'/name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'settings.ini', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, place/'source')
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', place, place/'source'], check=True)
    wheel, = place.glob('*.whl')
    subprocess.run([*pip, 'install', '--no-deps', '--target', place, wheel], check=True)
    shutil.move(place/'source'/'settings.ini', place)  # nbdev takes its folder for the one to import from
    shutil.rmtree(place/'source')
    for path, page in files('nbs', '.ipynb').items():
        folder = (place/path).with_suffix('')
        folder.mkdir(parents=True)
        (folder/Path(path).name).write_bytes(page)
        if (ROOT/path).with_name('.notest').exists(): (folder/'.notest').touch()  # of nbdev_test: not to be run


def pages():
    """Run every page; what failed."""
    with tempfile.TemporaryDirectory() as place:
        try: alone(Path(place))
        except subprocess.CalledProcessError as e:
            return [f'pages: exit code {e.returncode}: {" ".join(map(str, e.cmd))}']
        workers = str(os.cpu_count())  # they give way to the tests, whose process would be the last to end
        command = ['nice', BIN/'nbdev_test', '--n_workers', workers, '--timing']
        return run('pages', command, PAGES, place, PYTHONPATH=place)


def quick():
    """What `make test` runs; what failed."""
    failed = unchanged('nbdev_export', 'scott', '.py') + unchanged('nbdev_clean', 'nbs', '.ipynb')
    with ThreadPoolExecutor() as pool:
        steps = [pool.submit(pages),
                 pool.submit(run, 'tests', [*PYTEST, '-m', 'not slow', f'--ignore={COURSE}', 'tests'], TESTS),
                 pool.submit(run, 'course', [*PYTEST, '-m', 'not slow', COURSE], TESTS)]
        return failed + sum((step.result() for step in steps), [])


def slow():
    """What `make test-slow` runs; what failed."""
    failed = run('tests', [*PYTEST, 'tests', '-m', 'slow'], TESTS)
    for page, content in sorted(files('nbs', '.ipynb').items()):
        if re.search(rb'"#\| *slow\b', content):
            failed += run('pages', [BIN/'nbdev_test', '--path', ROOT/page, '--flags', 'slow'], PAGES)
    return failed


if __name__ == '__main__':
    failed = slow() if sys.argv[1:] == ['slow'] else quick()
    print('\n' + '\n'.join(['FAILED', *failed] if failed else ['All checks passed.']))
    sys.exit(bool(failed))
