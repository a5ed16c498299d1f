"""Packaging: everything said here is read from settings.ini."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
licenses = {'bsd2': 'BSD-2-Clause'}  # settings.ini's name: SPDX name
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
readme = here/'README.md'


class WithResults(build_py):
    """nbs/results goes with an installed package, as scott/results; a checkout keeps it where it is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(here/'nbs/results', Path(self.build_lib)/cfg['lib_path']/'results', dirs_exist_ok=True)


setup(
    name=cfg['pip_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license=licenses[cfg['license']],
    keywords=cfg['keywords'],
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    package_dir={'': '.'},  # pip install -e then adds this folder to the path, so that an import from the folder above works
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    package_data={cfg['lib_name']: ['encoders/*/*', 'look/figures/*', 'course/*.json', 'course/*.jsonl']},  # runs and known mistakes too
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={'build_py': WithResults},
    zip_safe=False,
)
