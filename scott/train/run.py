"""A run folder: what `pretrain` leaves there, and the one class that everything else reads it with."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import torch

from ..cli import InputError
from ..encoder import Encoder
from ..jepa import MIMJEPA
from .config import Config, build, differences, identity
from .files import load_checkpoint, older_checkpoints, writing

def save_encoder(
    encoder: torch.nn.Module,  # with `save_pretrained`
    folder: Path,  # RUN/context or RUN/target
):
    "Write an encoder's weights and configuration; each file is the old one or the new one, never half of one."
    with writing(folder) as part:
        encoder.save_pretrained(part)
        (part / 'README.md').unlink(missing_ok=True)  # an empty form for a model on the Hub
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read
            os.replace(file, folder / file.name)

def load_encoder(
    folder: Path,  # RUN/context or RUN/target
) -> Encoder:
    "Read an encoder from a run folder; InputError says what is missing or damaged."
    for file in ('config.json', 'model.safetensors'):
        if not (folder / file).is_file():
            raise InputError(f'{folder} has no {file}: the run has not saved its weights; wait, or resume it')
    try:
        with redirect_stdout(None): return Encoder.from_pretrained(folder)  # the hub's class prints a line
    except Exception as e: raise InputError(f'{folder} is damaged ({e}): restore it, or resume the run') from e

def read_metrics(
    folder: str | Path,  # a run folder
) -> list:  # one dict per line of metrics.jsonl
    "The metrics of a run, in order; a last line that was cut is left out."
    path = Path(folder) / 'metrics.jsonl'
    try:
        whole = path.read_text().rpartition('\n')[0] if path.is_file() else ''
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as e: raise InputError(f'{path} is damaged ({e}): restore it') from e

class Run:
    "A run folder, read-only. Folders written by earlier versions are read as well."
    def __init__(self,
        folder: str | Path,  # the --out of scott_pretrain
    ):
        self.folder = Path(folder).expanduser()
        path = self.folder / 'config.json'
        if not path.is_file():
            raise InputError(f'{folder} is no run folder (it has no config.json): name the --out of scott_pretrain')
        try: self.stored = json.loads(path.read_text())
        except ValueError as e: raise InputError(f'{path} is damaged ({e}): restore it, or start a new run') from e
        if 'data' not in self.stored:
            raise InputError(f'{folder} is no run folder, but a part of one: name the --out of that')

    def __repr__(self): return f'Run({str(self.folder)!r}): {self.config.data}, step {self.step:,}'

    @cached_property
    def config(self) -> Config:
        "Its settings; those that did not exist when it was made have their defaults."
        return Config(**{f.name: self.stored[f.name] for f in fields(Config) if f.name in self.stored})

    @property
    def metrics(self) -> list:
        "A dict for each line of metrics.jsonl, in order."
        return read_metrics(self.folder)

    @property
    def step(self) -> int:
        "The step of the stored weights; without a readable checkpoint, that of the last line of metrics."
        return self.reached['step']

    @property
    def reached(self) -> dict:
        "The line of metrics that belongs to the stored weights: step, epoch and more."
        try: step = torch.load(self.folder / 'checkpoint.pt', map_location='cpu', mmap=True, weights_only=True)['step']
        except Exception: step = float('inf')  # there is none, or it is damaged: `checkpoint` tells more
        return next((m for m in reversed(self.metrics) if m['step'] <= step), dict(step=0, epoch=0.))

    def checkpoint(self) -> dict:
        "The state of the last checkpoint; InputError if it is damaged or belongs to another run."
        state = load_checkpoint(self.folder)
        if 'identity' not in state:
            raise InputError(f'{self.folder / "checkpoint.pt"} was not written by scott_pretrain')
        if wrong := differences(state['identity'], identity(self.config)):
            raise InputError(f'{self.folder / "checkpoint.pt"} is of another run than {self.folder / "config.json"}: '
                             f'{"; ".join(wrong)}. Put its own back, or remove it')
        return state

    @property
    def checkpoints(self) -> dict:
        "step -> path of the checkpoints before the last one."
        return older_checkpoints(self.folder)

    def jepa(self) -> MIMJEPA:
        "Context encoder, predictor and target with the weights of the last checkpoint."
        jepa, state = build(self.config), self.checkpoint()
        jepa.load_state_dict(state['model'] if 'model' in state else state['jepa'])  # its name until version 0.1
        return jepa

    def encoder(self,
        which: str = 'target',  # 'context', 'target', or 'random': the state that the run began with
    ) -> Encoder:
        "One of its encoders, in evaluation mode."
        if which not in ('context', 'target', 'random'):
            raise InputError(f'encoder {which!r}: choose context, target or random')
        began = build(self.config).target.eval()
        if which == 'random': return began
        found = load_encoder(self.folder / which).eval()
        there, here = ({k: tuple(v.shape) for k, v in e.state_dict().items()} for e in (found, began))
        if there != here or found.grid != began.grid:
            raise InputError(f'{self.folder / which} is an encoder of another run than {self.folder / "config.json"}: '
                             'put its own back')
        return found

    def table(self,
        data: str | None = None,  # the probes' data set, as in the name of their file; None = the only one
    ) -> dict:  # what `scott_probe` stored
        "The rows of its probes. InputError if there are none, or several and none is named."
        found = {p.stem.removeprefix('probe_'): p for p in sorted(self.folder.glob('probe_*.json'))}
        if data is None and len(found) == 1: data = next(iter(found))
        if data not in found:
            raise InputError(f'{self.folder} has no table {data or ""}: run scott_probe {self.folder}' if not found else
                             f'{self.folder} has several tables: name one of {", ".join(found)}')
        return json.loads(found[data].read_text())
