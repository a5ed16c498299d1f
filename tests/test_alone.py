"""A page opened on Colab has the package and nothing else: how `make test` sees to it that each of them runs there."""
import json
import os
import subprocess
import sys

import check


def test_every_page_is_in_a_folder_of_its_own(place):
    pages = {p.relative_to(place/'nbs').as_posix() for p in (place/'nbs').rglob('*.ipynb')}
    names = [path.removeprefix('nbs/').removesuffix('.ipynb') for path in check.files('nbs', '.ipynb')]
    assert pages == {f'{name}/{name.split("/")[-1]}.ipynb' for name in names} and len(pages) > 30


def test_the_package_comes_from_the_wheel_with_its_stored_results(place, tmp_path):
    code = ('import scott; from scott.lab.reproduction import results; from scott.train.run import Run; '
            'print(scott.__file__, results("published.json"), Run(results("flowers102-small")).folder)')
    said = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(place)},
                          check=True, capture_output=True, text=True).stdout.split()
    kept = place/'scott'/'results'
    assert said == [str(place/'scott'/'__init__.py'), str(kept/'published.json'), str(kept/'flowers102-small')]


def test_a_page_that_needs_the_repository_fails(place):
    codes = dict(good='import scott\nfrom pathlib import Path\n'
                      f'assert scott.__file__ == {str(place/"scott"/"__init__.py")!r}\nassert len(list(Path().iterdir())) == 1',
                 results="open('results/published.json')", repository="open('../settings.ini')", broken='import scott.nothing')
    for name, code in codes.items():
        (place/'toy'/name).mkdir(parents=True)
        cell = dict(cell_type='code', id=name, source=code, metadata={}, outputs=[], execution_count=None)
        page = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
        (place/'toy'/name/f'{name}.ipynb').write_text(json.dumps(page))
    failed = check.run('pages', [check.BIN/'nbdev_test', '--path', place/'toy', '--n_workers', '1'], check.PAGES, place,
                       PYTHONPATH=str(place))
    assert failed == ['pages: broken.ipynb', 'pages: repository.ipynb', 'pages: results.ipynb']
