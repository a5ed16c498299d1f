"""One engine for everything that trains: it takes a module that returns a loss, a feed of batches and a schedule."""

import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..cli import InputError
from ..kernels import keep_freed_memory
from ..schedule import Schedule, Values, make_optimizer, set_values
from .feed import stream
from .machine import Place
from .processes import Group, quiet
from .signs import part_norms

class Counts(NamedTuple):
    "What `Tally` holds, as numbers."
    loss: float  # mean loss of the good steps since the last reset
    norms: list  # mean norm of the gradients of each part, over steps where all are numbers
    skipped: int  # steps since the start that left the weights as they were
    bad: int  # those of them that no overflow of 16 bits explains
    first_bad: int  # the first of these steps

class Tally:
    "Sums that stay on the device until someone reads them: of losses, of gradient norms, of skipped steps."
    def __init__(self,
        parts: int,  # number of parts whose gradient norms are told apart
        device: torch.device,
    ):
        self.loss = torch.zeros((), device=device)
        self.norms = torch.zeros(parts + 1, device=device)  # the last one counts
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # good ones since the reset
        self.bad = torch.zeros(3, dtype=torch.int64, device=device)  # skipped, bad, the first bad step

    def add(self,
        loss: Tensor,  # scalar
        norms: Tensor,  # (parts,)
        skipped: Tensor,  # scalar, bool
        bad: Tensor,  # scalar, bool
        step: int,
    ):
        "Count a step, without reading the device."
        good = ~skipped
        self.loss += torch.where(good, loss, 0.)
        self.steps += good
        counted = good & norms.isfinite().all()
        self.norms += torch.where(counted, torch.cat([norms, torch.ones_like(norms[:1])]), 0.)
        self.bad[:2] += torch.stack([skipped, bad])
        self.bad[2] += bad * (self.bad[1] == 1) * step

    def read(self) -> Counts:
        "The counts as numbers; the device is read once a tensor."
        *norms, count = self.norms.tolist()
        return Counts(self.loss.item() / max(self.steps.item(), 1), [n / max(count, 1) for n in norms],
                      *self.bad.tolist())

    def reset(self):
        "Begin a new line: what counts from the start of the run stays."
        for total in (self.loss, self.norms, self.steps): total.zero_()

    def forget_bad(self):
        "Take it that the bad steps so far were asked for."
        self.bad[1:].zero_()

    def state_dict(self) -> dict:
        "The sums."
        return dict(loss=self.loss, norms=self.norms, steps=self.steps, bad=self.bad)

    def load_state_dict(self, state: dict):  # from `state_dict`, on any device
        "Put the sums back."
        for name, value in state.items(): getattr(self, name).copy_(value)

def load_optimizer(
    opt: torch.optim.Optimizer,  # of the present run
    saved: dict,  # its `state_dict()`, perhaps made on other hardware
):
    "Restore the moments, in the memory layout that the weights have here; how steps are made stays as it is here."
    groups = [{**there, 'fused': here['fused'], 'foreach': here['foreach']}
              for there, here in zip(saved['param_groups'], opt.param_groups)]
    opt.load_state_dict({**saved, 'param_groups': groups})
    for p, moments in opt.state.items():
        for k in ('exp_avg', 'exp_avg_sq'): moments[k] = torch.empty_like(p).copy_(moments[k])

def compiled(
    module: nn.Module,  # the whole step: forward pass and loss
    device: torch.device,
    graphs: bool,  # replay it as CUDA graphs
):  # the same, compiled, or as it was
    "torch.compile where it pays: on GPUs from capability 8."
    if device.type != 'cuda' or torch.cuda.get_device_capability(device)[0] < 8: return module
    return torch.compile(module, mode='reduce-overhead' if graphs else 'default')

class Trainer:
    "Makes optimizer steps. The loss comes from the model; `update_target`, if the model has one, is called after each."
    def __init__(self,
        model: nn.Module,  # forward(*batch) -> scalar loss, on its device
        feed,  # `batches(step)` -> the step's micro-batches, each a tuple of tensors
        schedule: Schedule,
        place: Place,  # device, and the type of autocast
        seed: int = 0,  # of dropout
        rows: Callable | None = None,  # parameters -> (parts, parameters) of 0 and 1: whose norms are told apart
        accumulate: int = 1,  # micro-batches of a step
        compile: bool = True,  # where it pays
        group: Group | None = None,  # None = a single process
    ):
        self.model, self.feed, self.schedule, self.seed = model, feed, schedule, seed
        self.accumulate, self.group, self.step, self.batch = accumulate, group or Group(), 0, None  # the last batch
        self.device, self.dtype = place
        self.autocast = partial(torch.autocast, self.device.type, self.dtype, enabled=self.dtype is not None)
        if self.device.type == 'cpu': keep_freed_memory()
        self.wrapped = self.group.wrap(model)
        graphs = self.group.world == 1 and accumulate == 1  # a graph's gradients can't be summed over replays
        self.forward = compiled(self.wrapped, self.device, graphs) if compile else self.wrapped
        self.opt = make_optimizer(model, fused=self.device.type in ('cpu', 'cuda'))
        self.params = [p for g in self.opt.param_groups for p in g['params']]
        self.rows = rows(self.params) if rows else torch.ones(1, len(self.params), device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.tally = Tally(len(self.rows), self.device)

    def train_step(self) -> Values:  # what the schedules gave for it
        "One optimizer step. It seeds PyTorch's global generators for dropout: see `own_randomness`."
        self.step += 1
        values = self.schedule.at(self.step)
        set_values(self.opt, values)
        torch.manual_seed(stream(self.seed, 'dropout', self.step, self.group.rank))
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(self.feed.batches(self.step), 1):
            with quiet(self.wrapped, last=i == self.accumulate):
                with self.autocast(): part = self.forward(*batch) / self.accumulate
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.batch = batch
        self.update(loss, values)
        return values

    def update(self,
        loss: Tensor,  # of this step; the gradients are there
        values: Values,
    ):
        "Optimizer and target; a step whose loss or gradient is no number leaves the weights as they are."
        norms = part_norms([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params], self.rows)
        wrong = torch.stack([~loss.isfinite(), ~norms.sum().isfinite()]).float()
        *wrong, loss = self.group.mean(torch.stack([*wrong, loss])).unbind()  # over all processes
        bad_loss, bad_norm = (w > 0 for w in wrong)
        norms = norms / self.scaler.scale(torch.ones_like(loss))
        skipped = bad_loss | bad_norm
        if self.scaler.is_enabled():
            self.scaler.step(self.opt)
            self.scaler.update()
        elif self.opt.defaults['fused']:
            self.opt.found_inf = skipped.float()  # the fused step is made or not without asking the device
            self.opt.step()
        elif not skipped: self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        if hasattr(self.model, 'update_target'): self.model.update_target(values.momentum)
        self.tally.add(loss, norms, skipped, bad_loss if self.scaler.is_enabled() else skipped, self.step)

    def check(self,
        where: str,  # the folder of the run, for the message
        skip: bool = False,  # whether bad steps are only counted
    ) -> Counts:
        "What was counted. InputError after a step whose loss or gradient was no number, or if 16 bits don't suffice."
        counts = self.tally.read()
        if counts.bad and not skip:
            raise InputError(f'loss or gradient was nan or infinite at step {counts.first_bad}: that step was not made, '
                             f'and the last checkpoint in {where} is from before it; go on with --resume --on-nan skip, '
                             'or start anew with a lower --lr or with --amp off')
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise InputError(f'gradients have overflowed 16 bits again and again before step {self.step}: use --amp off')
        return counts

    def state_dict(self) -> dict:
        "Everything that steps depend on. Random streams have no state: they are functions of the seed and the step."
        return dict(step=self.step, model=self.model.state_dict(), optimizer=self.opt.state_dict(),
                    scaler=self.scaler.state_dict(), tally=self.tally.state_dict())

    def load_state_dict(self, state: dict):  # from `state_dict`; tensors on any device
        "Go back to where `state_dict` was called."
        self.model.load_state_dict(state['model'])
        load_optimizer(self.opt, state['optimizer'])
        if state['scaler']: self.scaler.load_state_dict(state['scaler'])  # empty if the run did not scale so far
        self.tally.load_state_dict(state['tally'])
        self.step = state['step']

@contextmanager
def own_randomness(device: torch.device):
    "What happens inside draws and seeds as it likes; the caller's random generators come back as they were."
    with torch.random.fork_rng([device] if device.type == 'cuda' else []): yield

class StopSignal:
    "`with StopSignal() as stop:` the first SIGTERM or SIGINT sets `stop.name` and `stop.code`; a second one exits."
    name, code = None, None  # e.g. 'SIGTERM' and 128 + 15

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()  # only it may set handlers
        self.former = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT) if main}
        return self

    def handle(self, number, frame):
        "Write down the first signal; leave at the second."
        if self.name and time.monotonic() - self.at < .2: return  # the same one, passed on by the parent process too
        if self.name: os._exit(128 + number)
        self.name, self.code, self.at = signal.Signals(number).name, 128 + number, time.monotonic()
        said = f'\n{self.name}: saving a checkpoint; once more to leave at once\n'
        with suppress(OSError): os.write(2, said.encode())

    def __exit__(self, *error):
        for number, handler in self.former.items(): signal.signal(number, handler or signal.SIG_DFL)

class Line(NamedTuple):
    "What `fit` tells those who write a line of metrics."
    values: Values  # of the last step
    steps: int  # since the last line
    seconds: float  # of this process since then
    made: float  # share of these steps that it made itself

def fit(
    trainer: Trainer,
    log: Callable,  # Line -> the text of the progress bar, or None; called every `log_every` steps and after the last
    log_every: int,  # steps
    save: Callable | None = None,  # writes a checkpoint; None = nothing is kept, and Ctrl-C is an exception as usual
    minutes: float = 5.,  # between two checkpoints
    show: bool = True,  # a progress bar
    until: int | None = None,  # last step to make; None = the schedule's last
) -> StopSignal:  # its `name` is that of the signal that ended the run, or None
    "Steps to the end. The caller's random generators stay as they are."
    total, first = until or trainer.schedule.total, trainer.group.rank == 0
    logged = saved = time.monotonic()
    begun, last = trainer.step, trainer.step - trainer.step % log_every
    bar = tqdm(total=total, initial=trainer.step, unit='step', mininterval=1, disable=not (show and first))
    leave = False
    with own_randomness(trainer.device), StopSignal() if save else nullcontext(StopSignal()) as stop, bar:
        while trainer.step < total and not leave:
            values = trainer.train_step()
            bar.update()
            lines = trainer.step % log_every == 0 or trainer.step == total
            if lines:
                made = (trainer.step - max(begun, last)) / (trainer.step - last)  # the rest was before a resume
                before, logged = logged, time.monotonic()  # so that the time of `log` itself counts in the next line
                bar.set_postfix_str(log(Line(values, trainer.step - last, logged - before, made)) or '')
                last = trainer.step
            if lines or trainer.group.world == 1: leave = trainer.group.any(stop.name)  # all stop at the same step
            if save and first and time.monotonic() - saved > 60 * minutes:
                save()
                saved = time.monotonic()
        if save and first: save()
    return stop
