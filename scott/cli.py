"""One toolkit for every command: a dataclass holds its settings, and every mistake is one line."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields

class InputError(ValueError):
    "Bad input from outside: one line that names the thing and the way out. Command lines turn it into exit code 2."

def opt(
    default,  # the value where none is given
    help: str,  # one line for --help
    type: type | None = None,  # str, int, float or bool; None = the default's own type
    choices: tuple | None = None,  # the allowed values; None = any
    low: float = -math.inf,  # smallest allowed number
    high: float = math.inf,  # largest allowed number
    free: bool = False,  # whether it may differ when a run goes on
    positional: bool = False,  # given by place instead of by --name
):
    "A dataclass field with all that is to be known about a setting: default, help, range, freedom."
    facts = dict(help=help, type=type or default.__class__, choices=choices, low=low, high=high, free=free,
                 positional=positional)
    return field(default=default, metadata=facts)

def flag(
    name: str,  # of a setting, e.g. 'batch_size'
) -> str:  # '--batch-size'
    "How a setting is written on a command line."
    return '--' + name.replace('_', '-')

def checked(
    settings,  # an instance of a dataclass whose fields were made by `opt`
):  # the same
    "Raise an InputError that names the flag if a value has the wrong type, or is not among the allowed ones."
    for f in fields(settings):
        value, m = getattr(settings, f.name), f.metadata
        if value is None and f.default is None: continue
        said = f'{flag(f.name)} {value}'
        kinds = (int, float) if m['type'] is float else m['type']
        if not isinstance(value, kinds) or isinstance(value, bool) and m['type'] is not bool:
            raise InputError(f'{flag(f.name)} {value!r}: it must be of type {m["type"].__name__}')
        if m['choices'] and value not in m['choices']:
            raise InputError(f'{said}: choose one of {", ".join(m["choices"])}')
        if m['type'] in (int, float) and not m['low'] <= value <= m['high']:
            limits = f'at least {m["low"]}' + (f' and at most {m["high"]}' if m['high'] < math.inf else '')
            raise InputError(f'{said}: it must be {limits}')
    return settings

def check_names(
    cls,  # a dataclass whose fields were made by `opt`
    given,  # names of settings
):
    "Raise an InputError for a name that is no setting; it names the nearest ones."
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise InputError(f'{name!r} is no setting of {cls.__name__}: did you mean {", ".join(near)}?')

class Parser(argparse.ArgumentParser):
    "An argument parser whose errors are one line that names the way out; exit code 2."

    def error(self, message):
        "State what is wrong and end with exit code 2."
        self.exit(2, f'{self.prog}: {message} ({self.prog} --help lists every flag)\n')

def parser_of(
    cls,  # a dataclass whose fields were made by `opt`
    prog: str,  # the command's name
) -> Parser:
    "A parser with one flag for each field; flags that are not given stay absent."
    parser = Parser(prog=prog, description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(cls):
        m = f.metadata
        if m['positional']:
            parser.add_argument(f.name, type=m['type'], help=m['help'], metavar=f.name.upper())
            continue
        default = '' if f.default in (None, False) else f' (default: {f.default})'
        how = dict(action=argparse.BooleanOptionalAction) if m['type'] is bool else dict(
            type=m['type'], choices=m['choices'], metavar=None if m['choices'] else m['type'].__name__.upper())
        parser.add_argument(flag(f.name), help=m['help'] + default, **how)
    return parser

def parse_args(
    cls,  # a dataclass whose fields were made by `opt`
    argv: list | None,  # the words of the command line; None = sys.argv
    prog: str,  # the command's name
):  # an instance of cls
    "Read a command line into a dataclass. InputError for a value out of its range."
    return checked(cls(**vars(parser_of(cls, prog).parse_args(argv))))

@dataclass
class OfRun:
    "Flags of a command that reads a run folder."
    run: str = opt(None, 'run folder, the --out of scott_pretrain', str, positional=True)
    data: str = opt(None, "petals, flowers102, pets37, imagenet100 or folder:PATH (default: the run's)", str)
    data_root: str = opt(None, 'folder of the data sets (default: $SCOTT_DATA, else ~/.cache/scott)', str)

def run_cli(
    fn: Callable,  # the command, without arguments
    prog: str,  # its name
):
    "Run a command; bad input ends it with one line on stderr and exit code 2, Ctrl-C with 130."
    try: return fn()
    except InputError as e: said, code = ' '.join(str(e).split()), 2
    except KeyboardInterrupt: said, code = 'interrupted', 130
    print(f'{prog}: {said}', file=sys.stderr)
    sys.exit(code)
