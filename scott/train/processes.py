"""Several processes that make one run: which part of a batch each computes, how gradients are averaged, who waits."""

import contextlib
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..cli import InputError

def shares(
    batch: int,  # images of a whole batch
    rank: int = 0,  # this process, from 0
    world: int = 1,  # number of processes
    accumulate: int = 1,  # micro-batches of each
) -> list:  # `accumulate` index tensors of equal length
    "Which images of a batch this process computes, micro-batch by micro-batch."
    if batch % (world * accumulate):
        raise InputError(f'--batch-size {batch} is no multiple of processes x --accumulate = {world} x {accumulate}')
    return list(torch.arange(batch)[rank::world].chunk(accumulate))

class Group:
    "The processes of a run, as torchrun describes them; with a single one, none of this costs anything."
    def __init__(self,
        rank: int = 0,  # this process among all
        world: int = 1,  # number of processes
        local: int = 0,  # this process among those of its machine
    ):
        self.rank, self.world, self.local = rank, world, local

    @classmethod
    def join(cls,
        device: str = 'auto',  # as in `pick_device`
    ):
        "Read torchrun's variables and meet the others; a group of one without them."
        if 'TORCHELASTIC_RUN_ID' not in os.environ: return cls()
        if ':' in device:
            raise InputError(f'--device {device}: torchrun gives each process a GPU of its own; use --device cuda')
        cuda = device in ('auto', 'cuda') and torch.cuda.is_available()
        self = cls(*(int(os.environ[k]) for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))
        if cuda: torch.cuda.set_device(self.local)
        store, rank, world = next(dist.rendezvous('env://'))
        store = dist.PrefixStore(f'start {self.restarts}', store)  # or addresses of dead processes may be found there
        how = dict(device_id=torch.device('cuda', self.local)) if cuda else {}
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=3), **how)  # one process may decode images that long
        return self

    @property
    def restarts(self) -> int:
        "How often torchrun has started the processes again because one of them died."
        return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))

    @property
    def launch(self) -> str | None:
        "The name of this torchrun; None without it."
        return os.environ.get('TORCHELASTIC_RUN_ID')

    def made(self, run: str | Path) -> bool:  # a run folder, which may be missing
        "Whether this torchrun made the run, so that processes that it starts again go on with it, and with no other."
        try: return self.launch == json.loads((Path(run) / 'config.json').read_text()).get('launch')
        except (OSError, ValueError): return False

    def wrap(self, module: nn.Module) -> nn.Module:
        "The module, its gradients averaged over the processes while the backward pass still runs."
        if self.world == 1: return module
        ids = [self.local] if dist.get_backend() == 'nccl' else None
        return DistributedDataParallel(module, ids, gradient_as_bucket_view=True, broadcast_buffers=False)

    def mean(self, x: Tensor) -> Tensor:
        "A tensor's mean over the processes, in place."
        if self.world > 1: dist.all_reduce(x.div_(self.world))
        return x

    def any(self, flag: bool) -> bool:
        "Whether the flag is true in one of the processes."
        if self.world == 1: return bool(flag)
        device = torch.device('cuda', self.local) if dist.get_backend() == 'nccl' else 'cpu'
        return self.mean(torch.tensor(float(bool(flag)), device=device)).item() > 0

    def wait(self):
        "Go on when all are here."
        if self.world > 1: dist.barrier()

    def in_turn(self, make):  # a function without arguments
        "What `make` returns; one process of each machine runs it first, so that the others find its cache."
        if self.local == 0: made = make()
        self.wait()
        return made if self.local == 0 else make()

    def leave(self):
        "Tell the others that this process is done."
        if self.world > 1: dist.destroy_process_group()

def quiet(
    module: nn.Module,  # wrapped by `Group.wrap`, or not
    last: bool,  # whether this is the last micro-batch of the step
):
    "While gradients are still collected, DDP need not average them: only in the last micro-batch."
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()
