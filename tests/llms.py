"""nbs/llms.txt, the site's index for programs that read: `python tests/llms.py` writes it before the site is built."""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def address(page):
    """Where nbdev puts a page, below the site's address: '13_encoder.ipynb' becomes 'encoder.html'."""
    path = Path(page.lower())
    return path.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name)).with_suffix('.html').as_posix()


def entry(page, site):
    """A line about a page: its title, its address on the site, and the line below its title."""
    cells = json.loads((ROOT/'nbs'/page).read_text(encoding='utf-8'))['cells']
    title, about = re.match(r'# (.+)\n\n> (.+)', ''.join(cells[0]['source'])).groups()
    return f'- [{title}]({site}/{address(page)}): {about}'


def pages(item):
    """The pages of a sidebar entry, those of its sections included."""
    if isinstance(item, str):
        return [item]
    return sum(map(pages, item['contents']), []) if 'contents' in item else [item['href']]


def llms():
    """The text: what the project is, then the pages as the sidebar orders them."""
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = parser['DEFAULT']
    lines = [f"# {cfg['title']}\n\n> {cfg['description']}. "
             f"The source of every page is a notebook in {cfg['git_url']}.\n"]
    quarto = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    for item in quarto['website']['sidebar']['contents']:
        lines += [f"\n## {item['section']}\n"] if 'section' in item else []
        lines += [entry(page, cfg['doc_host'] + cfg['doc_baseurl']) for page in pages(item)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    (ROOT/'nbs'/'llms.txt').write_text(llms(), encoding='utf-8')
