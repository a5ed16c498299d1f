"""README.md from nbs/index.ipynb: `python tests/readme.py` writes it; tests/test_docs.py compares."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 'nbs/images'
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)')
ALT = re.compile(r'^#\| fig-alt: "(.+)"$', re.M)
DIRECTIVE = re.compile(r'^#\|\s*(.+?)\s*$', re.M)


def from_top(text):
    """`text` with its relative links, which start in nbs/, made to start at the top of the repository."""
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join('nbs', m[2])), text)


def visible(cell):
    """Whether a reader of the site would see this cell."""
    return cell.cell_type == 'markdown' or (cell.cell_type == 'code' and cell.source.strip()
        and not {'hide'} & set(DIRECTIVE.findall(cell.source)) and 'default_exp' not in cell.source)


def readme(notebook=ROOT/'nbs/index.ipynb'):
    """README's text, and its images as `{path from the top: bytes}`."""
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}  # so that code blocks are colored
    nb.cells = [cell for cell in nb.cells if visible(cell)]
    alts = [m[1] for cell in nb.cells for m in ALT.finditer(cell.source)]
    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = from_top(cell.source)
        else:
            if 'echo: false' in DIRECTIVE.findall(cell.source):
                cell.metadata['transient'] = {'remove_source': True}
            cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)
    text, resources = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': IMAGES, 'unique_key': 'index'})
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    alts = iter(alts)
    text = re.sub(r'!\[png\]', lambda m: f'![{next(alts)}]', text)
    note = '<!-- Made from nbs/index.ipynb by `make readme`: change that page, not this file. -->\n\n'
    return note + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources['outputs']


if __name__ == '__main__':
    text, images = readme()
    for old in (ROOT/IMAGES).glob('index_*'):
        old.unlink()
    for name, data in images.items():
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/name).write_bytes(data)
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    print(f'README.md and {len(images)} images in {IMAGES}/')
