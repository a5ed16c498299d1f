"""What the site's build does after nbdev's own processors: settings.ini names these functions under `procs`."""
import importlib
import inspect
import re
from functools import cached_property
from types import FunctionType

from nbdev.doclinks import NbdevLookup

LINKED = r'\[(`[^`]+`)\]\([^)]*\)'  # a name that nbdev made a link of
TEXT_OF_LINK = re.compile(rf'\[((?:[^][]|{LINKED})+)\](?=\()')
PRIVATE = re.compile(r'\[(`_\w+`)\]\([^)]*\)')  # a link to what has no box on the site
CODE = re.compile(r'^```.*?^```', re.M | re.S)


def plain_names(cell):
    """Names inside signatures and in the text of links stay names: neither can hold a link. So do private names."""
    if cell.cell_type == 'markdown':
        cell.source = TEXT_OF_LINK.sub(lambda m: '[' + re.sub(LINKED, r'\1', m[1]) + ']', cell.source)
        cell.source = PRIVATE.sub(r'\1', cell.source)
    for output in cell.get('outputs', []):
        text = ''.join(output.get('data', {}).get('text/markdown', ''))
        if text:
            text = CODE.sub(lambda m: re.sub(LINKED, lambda name: name[1].strip('`'), m[0]), text)
            text = PRIVATE.sub(r'\1', text)
            output['data']['text/markdown'] = text.splitlines(keepends=True)


def method(owner, name, value):
    """A line about a method or a property, with the anchor that nbdev's links to it lead to."""
    call = ''
    if not isinstance(value, (property, cached_property)):
        parameters = list(inspect.signature(getattr(owner, name)).parameters.values())[isinstance(value, FunctionType):]
        call = f'({", ".join(str(p.replace(annotation=p.empty)) for p in parameters)})'
    about = inspect.cleandoc(value.__doc__ or '').split('\n\n')[0].replace('\n', ' ')
    return f'- []{{#{owner.__name__.lower()}.{name}}}`{name}{call}`{about and ": " + about}\n'


def methods(cell):
    """Below the box of a class, its public methods and properties."""
    name = re.search(r'^show_doc\((\w+)\)', cell.source, re.M)
    found = name and NbdevLookup().syms.get(name[1])
    if not found:
        return
    owner = getattr(importlib.import_module(found[1].removesuffix('.py').replace('/', '.')), name[1])
    kinds = (FunctionType, classmethod, staticmethod, property, cached_property)
    lines = [method(owner, n, v) for n, v in vars(owner).items() if n[0] != '_' and isinstance(v, kinds)] \
        if inspect.isclass(owner) else []
    if lines:
        boxes = [o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]
        if len(boxes) != 1:
            raise ValueError(f'show_doc({name[1]}) of {found[1]} gave {len(boxes)} boxes: {cell.get("outputs", [])}')
        boxes[0]['text/markdown'] = [''.join(boxes[0]['text/markdown']), '\n\n', *lines]
