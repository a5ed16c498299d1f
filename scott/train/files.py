"""Files that are whole or not there: atomic writing, checkpoints with a digest, and going back to an older one."""

import errno
import hashlib
import os
import shlex
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..cli import InputError

ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file too large
@contextmanager
def writing(path: Path):  # the file or folder to be replaced
    "Give a temporary path beside `path`; a failed write becomes one InputError line, and no temporary file is left."
    part = path.with_name(f'.{path.name}.part')
    try: yield part
    except (OSError, RuntimeError, SafetensorError) as e:
        cause = e  # PyTorch's zip writer raises a RuntimeError while it handles the system's OSError
        while cause and not isinstance(cause, OSError): cause = cause.__context__
        if isinstance(e, RuntimeError) and not cause and not any(w in str(e) for w in ('inline_container', 'iostream')):
            raise  # not about writing
        why = ('there is no room' if getattr(cause, 'errno', None) in ROOM
               else getattr(cause, 'strerror', None) or f'perhaps there is no room: {str(e) or type(e).__name__}')
        raise InputError(f'{path} could not be written ({why}){"; the previous file is intact" * path.exists()}: '
                         'make room, or name another place') from e
    finally:
        with suppress(OSError): remove(part)

def remove(path: Path):  # a file or a folder; it may be missing
    "Remove a file, or a folder with all it holds."
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)

# %% ../../nbs/65_run.ipynb #d07ad1b3
def write_atomic(
    path: Path,  # the file
    write,  # a function that writes to the path it is given
):
    "Write beside the file, flush to disk, then rename: the file is the old one or the new one, never half of one."
    with writing(path) as part:
        write(part)
        with open(part, 'rb') as f: os.fsync(f.fileno())
        os.replace(part, path)
    with suppress(OSError):  # some network file systems can't flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try: os.fsync(folder)
        finally: os.close(folder)

# %% ../../nbs/65_run.ipynb #3d7b9135
def clear_parts(
    run: Path,  # a run folder that no other process writes to
):
    "Remove the temporary files and folders that a killed process left."
    for part in Path(run).glob('.*.part'): remove(part)

# %% ../../nbs/65_run.ipynb #0f355a1f
def digest(
    state,  # nested dicts, lists and tuples of tensors, numbers and strings
) -> str:  # 64 hexadecimal digits
    "SHA-256 over the content of a state, in order; TypeError for what a checkpoint can't hold."
    sha = hashlib.sha256()
    def walk(value):
        if isinstance(value, torch.Tensor):
            sha.update(f'tensor {value.dtype} {tuple(value.shape)};'.encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            sha.update(f'{"dict" if isinstance(value, dict) else "list"} {len(value)};'.encode())
            for item in value.items() if isinstance(value, dict) else value: walk(item)
        elif type(value) in (bool, int, float, str, bytes, type(None)):
            sha.update(f'{type(value).__name__} {value!r};'.encode())
        else: raise TypeError(f"a checkpoint can't hold {type(value).__name__}")
    walk(state)
    return sha.hexdigest()

# %% ../../nbs/65_run.ipynb #e9bf8671
def older_checkpoints(run: Path) -> dict:  # step -> path, in order
    "The checkpoint-STEP.pt of a run."
    named = {p.stem.removeprefix('checkpoint-'): p for p in Path(run).glob('checkpoint-*.pt')}
    return dict(sorted((int(step), p) for step, p in named.items() if step.isdecimal()))

# %% ../../nbs/65_run.ipynb #bd39ce84
def keep_present(path: Path, step: int):  # RUN/checkpoint.pt, and the step of the state that comes
    "Give the present checkpoint a second name, unless there is none to keep: missing, unreadable, or of the same step."
    try: present = torch.load(path, map_location='cpu', mmap=True, weights_only=True)['step']
    except Exception: return
    if type(present) is not int or present == step: return
    older = path.with_name(f'checkpoint-{present}.pt')
    older.unlink(missing_ok=True)
    try: os.link(path, older)
    except OSError: write_atomic(older, lambda part: shutil.copyfile(path, part))


def write_checkpoint(
    run: Path,  # a run folder
    state: dict,  # state['step'] is an int; the rest as in `digest`
    keep: int = 2,  # how many checkpoints remain, the new one included
):
    "Write RUN/checkpoint.pt with its digest; the one before stays as checkpoint-STEP.pt."
    path, step = Path(run) / 'checkpoint.pt', state['step']
    if type(step) is not int or keep < 1: raise ValueError(f'{step=} must be an int and {keep=} at least 1')
    def write(part):
        with open(part, 'wb') as f: torch.save({**state, 'sha256': digest(state)}, f)
        keep_present(path, step)
    write_atomic(path, write)
    older = older_checkpoints(run)
    before = [s for s in older if s < step]  # others are left from before someone went back to an older state
    for s in older.keys() - before[max(0, len(before) - keep + 1):]: older[s].unlink()

# %% ../../nbs/65_run.ipynb #9495a105
def load_checkpoint(
    run: Path,  # a run folder
) -> dict:  # the state that `write_checkpoint` was given, tensors on the CPU
    "Read RUN/checkpoint.pt, or say why it can't be read and which older ones there are."
    path = Path(run) / 'checkpoint.pt'
    older = [p for p in older_checkpoints(run).values() if not (path.exists() and p.samefile(path))]
    way_out = (f'to go back to an older one ({", ".join(p.name for p in older)}): '
               + shlex.join(['mv', str(older[-1]), str(path)]) if older else 'no older one lies beside it')
    if not path.is_file():
        raise InputError(f'{path} is not there: the run stopped before its first one, or it was moved; {way_out}; '
                         f'or start anew in another --out, or remove {run}')
    try:
        with zipfile.ZipFile(path) as z:  # torch.load does not compare the checksums
            if z.testzip(): raise ValueError('a checksum differs')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(state, dict): raise ValueError('it holds no state')
        said = state.pop('sha256', None)
        if said is not None and said != digest(state): raise ValueError('its digest differs')
    except Exception as e:
        why = str(e) if type(e) is ValueError else type(e).__name__
        raise InputError(f'{path} is damaged ({why}); {way_out}; or restore it from a copy, or start a new run') from e
    if said is None:
        raise InputError(f'{path} has no digest, so nobody can tell whether it is whole: it was not written by '
                         f'write_checkpoint; {way_out}; or start a new run')
    return state

