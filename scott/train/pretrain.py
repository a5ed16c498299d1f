"""From a data set to a run folder: check, load, train or go on, and write down what happened."""

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..augment import eval_view
from ..cli import InputError, check_names, parser_of, run_cli
from ..data.sets import ImageSet, absolute, load
from ..jepa import MIMJEPA
from .config import FREE, Config, build, differences, identity, masks_of, schedule_of
from .feed import DRAWS, Feed, TwoViews
from .files import clear_parts, load_checkpoint, write_atomic, write_checkpoint
from .machine import describe_machine, pick_device
from .processes import Group
from .run import Run, read_metrics, save_encoder
from .signs import PARTS, Neighbors, health_line, look, panel, rows_of_parts, verdict, weight_distance
from .trainer import Line, StopSignal, Trainer, fit, own_randomness

SIDE = 256 / 224  # side of a decoded picture / side of the views

def labeled(
    cfg: Config,
) -> Neighbors | None:  # None if there are no labels, or nobody wants to look
    "About 10,000 images of the training split in the evaluation view, for a quick k-NN."
    if not cfg.knn_every: return None
    data = load(cfg.data, 'train', cfg.img_size, 'center', root=cfg.data_root, on_bad_image=cfg.on_bad_image)
    every = max(1, len(data) // 10_000)
    images, labels = data.images[::every], data.labels[::every]
    counts = labels[labels >= 0].bincount()
    if len(counts) > 1 and counts.max() > 4: return Neighbors(images, labels)  # every fifth of a class is held out
    print(f'{data.name}: too few labels for a k-NN while training; the other signs are measured')
    return None

class Pretraining:
    "A run in the making: a trainer, and the folder it is written to."
    def __init__(self,
        cfg: Config,
        data: ImageSet,  # squashed
        jepa: MIMJEPA | None = None,  # None = as the configuration says
        neighbors: Neighbors | None = None,  # for a quick k-NN
        group: Group | None = None,  # None = a single process
    ):
        self.cfg, self.data, self.neighbors = cfg, data, neighbors
        self.group, self.folder = group or Group(), Path(cfg.out)
        place, jepa = pick_device(cfg.device, cfg.amp), jepa or build(cfg)
        self.jepa = jepa.to(place.device, memory_format=torch.channels_last).train()
        masks = masks_of(cfg, jepa.context.grid)
        views = TwoViews(data.aspect, cfg.img_size, masks, cfg.seed)
        feed = Feed(data, views, cfg.batch_size, cfg.seed, place.device, self.group, cfg.accumulate)
        self.per_epoch, self.knn_random = feed.per_epoch, None
        self.trainer = Trainer(self.jepa, feed, schedule_of(cfg, feed.per_epoch), place, cfg.seed,
                               partial(rows_of_parts, self.jepa), cfg.accumulate, cfg.compile, self.group)
        self.metrics, self.alarmed = [], None  # or the word of the last alarm

    @property
    def identity(self) -> dict:
        "What makes this run this run."
        return identity(self.cfg, images=len(self.data), draws=DRAWS)

    def targets(self, views):  # (b, 3, H, W) -> (b, N, D)
        "The target's tokens, on the device and in the number type of the run."
        views = views.to(self.trainer.device).contiguous(memory_format=torch.channels_last)
        with self.trainer.autocast(): return self.jepa.targets(views)

    def open(self,
        state: dict | None,  # a checkpoint to go on from; None = a new run
    ):
        "Make the run folder, or put the run back to its last checkpoint and drop what was logged after it."
        if self.neighbors: self.knn_random = self.quick_knn()
        if state: self.go_back(state)
        if self.group.rank: return
        if not state:
            try: self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e: raise InputError(f'{self.folder}: {e.strerror}: name another --out') from e
            facts = dict(images=len(self.data), contains_test_images=self.data.has_test, draws=DRAWS,
                         skipped_images=self.data.skipped, machine=describe_machine(self.trainer.device),
                         processes=self.group.world, launch=self.group.launch, autocast=str(self.trainer.dtype))
            text = json.dumps({**asdict(self.cfg), **facts}, indent=1)
            write_atomic(self.folder / 'config.json', lambda part: part.write_text(text))
        clear_parts(self.folder)
        self.metrics = [m for m in read_metrics(self.folder) if m['step'] <= self.trainer.step]
        text = ''.join(json.dumps(m) + '\n' for m in self.metrics)
        write_atomic(self.folder / 'metrics.jsonl', lambda part: part.write_text(text))

    def go_back(self, state: dict):  # a checkpoint
        "Put the trainer back. InputError for a checkpoint of another run: it names what differs."
        path = self.folder / 'checkpoint.pt'
        if 'identity' not in state: raise InputError(f'{path} was not written by scott_pretrain')
        there = {'draws': 1, **state['identity']}
        if there['draws'] != DRAWS:
            raise InputError(f'{path} was made with version {there["draws"]} of the random draws, and this is version '
                             f'{DRAWS}: its weights can be probed, but to go on it needs the version of scott that made '
                             'it; or start a new run')
        if wrong := differences(there, self.identity):
            raise InputError(f'{path} is of another run: {"; ".join(wrong)}. Restore both, or start a new run')
        self.trainer.load_state_dict(state)
        if self.cfg.on_nan == 'stop': self.trainer.tally.forget_bad()  # steps that were skipped before, as asked for

    def save(self):
        "Checkpoint, both encoders and the curves into the run folder."
        self.trainer.check(self.folder, self.cfg.on_nan == 'skip')
        if not all(p.isfinite().all() for p in self.jepa.parameters()):
            raise InputError(f'weights are nan or infinite at step {self.trainer.step}, not saved in {self.folder}: '
                             'lower --lr')
        state = dict(self.trainer.state_dict(), identity=self.identity)
        write_checkpoint(self.folder, state, self.cfg.keep_checkpoints)
        for name in ('context', 'target'): save_encoder(getattr(self.jepa, name), self.folder / name)
        if self.metrics:
            figure = panel(self.metrics)
            write_atomic(self.folder / 'curves.png', lambda part: figure.savefig(part, format='png', dpi=120))

    def log(self, line: Line) -> str:  # for the progress bar
        "Append a line to metrics.jsonl, and report once when it becomes alarming."
        t = self.trainer
        counts, waited, t.feed.waited = t.check(self.folder, self.cfg.on_nan == 'skip'), t.feed.waited, 0.
        t.tally.reset()
        if self.group.rank: return ''
        grads = {f'grad_{part}': norm for part, norm in zip(PARTS, counts.norms)}
        made = dict(step=t.step, epoch=t.step / self.per_epoch, loss=counts.loss, **look(self.targets(t.batch.target)),
                    distance=weight_distance(self.jepa.context, self.jepa.target).item(), **grads,
                    **line.values._asdict(), skipped=counts.skipped, data_wait=waited / line.seconds,
                    images_per_s=line.steps * line.made * self.cfg.batch_size / line.seconds)
        made = {k: v for k, v in made.items() if abs(v) < float('inf')}  # neither nan nor infinite
        span = self.cfg.knn_every * self.per_epoch
        if self.neighbors and t.step // span > (t.step - line.steps) // span:
            made.update(knn=self.quick_knn(), knn_random=self.knn_random, knn_images=self.neighbors.n)
        with open(self.folder / 'metrics.jsonl', 'a') as f: f.write(json.dumps(made) + '\n')
        self.metrics.append(made)
        found = verdict(self.metrics)
        if found['alarm'] and found['word'] != self.alarmed: tqdm.write(found['text'])
        self.alarmed = found['word'] if found['alarm'] else self.alarmed
        return health_line(self.metrics)

    def quick_knn(self) -> float:
        "Percent of held-out training images whose neighbors, by the target's mean token, have their class."
        return self.neighbors(lambda images: self.targets(eval_view(images.to(self.trainer.device))))

    def forecast(self) -> str:
        "How long the run will take, from one forward and backward pass; where a step is compiled first, no number."
        t = self.trainer
        steps = t.schedule.total - t.step
        if t.forward is not t.wrapped: return f'{steps:,} steps'
        with own_randomness(t.device):
            for _ in range(2):
                begun = time.perf_counter()
                for batch in t.feed.batches(t.step + 1):
                    with t.autocast(): t.model(*batch).backward()
                t.model.zero_grad(set_to_none=True)
                if t.device.type != 'cpu': getattr(torch, t.device.type).synchronize()
                seconds = time.perf_counter() - begun
        t.feed.waited, hours = 0., steps * seconds / 3600
        took = f'{hours:.1f} hours' if hours >= 1 else f'{60 * hours:.0f} minutes' if hours >= 1 / 60 else 'a minute'
        return f'{steps:,} steps of {seconds:.2g} s: about {took} on this {"CPU" if t.device.type == "cpu" else "GPU"}'

    def fit(self) -> StopSignal:
        "Train to the end, or to a signal."
        return fit(self.trainer, self.log, self.cfg.log_every, self.save, self.cfg.checkpoint_minutes)

def prepare(cfg: Config, group: Group) -> tuple:  # Pretraining, the state to go on from or None
    "Check what can be refused, then load; on each machine one process first, the others find its cache."
    run, again = Path(cfg.out), group.restarts > 0 and group.made(cfg.out)
    if not cfg.resume and not again and run.exists() and (run.is_file() or any(run.iterdir())):
        raise InputError(f'{run} exists: add --resume to go on with it, or name another --out')
    state = load_checkpoint(run) if cfg.resume or again and (run / 'checkpoint.pt').exists() else None
    jepa = build(cfg)  # a configuration that can't be built is refused before any image is read
    group.wait()
    data = group.in_turn(lambda: load(cfg.data, cfg.ssl_split, round(cfg.img_size * SIDE), root=cfg.data_root,
                                      on_bad_image=cfg.on_bad_image))
    return Pretraining(cfg, data, jepa, None if group.rank else labeled(cfg), group), state

def going_on(
    given: dict,  # settings that were named, `out` among them
) -> Config:
    "The stored configuration of a run; what is named may not contradict it."
    saved = Run(given['out']).config
    clash = [f'{k} is {getattr(saved, k)!r} there and {v!r} here' for k, v in given.items()
             if k not in FREE and getattr(saved, k) != v]
    if clash: raise InputError(f'{given["out"]} holds a run of another configuration: {"; ".join(clash)}. '
                               f'Leave these settings out to go on with it, or name another --out')
    return Config.of(**{**asdict(saved), **{k: v for k, v in given.items() if k in FREE}})

def settings(
    given: dict,  # name -> value, as on the command line
) -> Config:
    "Preset, then changes; with `resume` the run's stored configuration."
    check_names(Config, given)
    if not given.get('out'): raise InputError('no run folder is named: add --out RUN')
    if 'data' in given: given = {**given, 'data': absolute(given['data'])}
    return going_on(given) if given.get('resume') else Config.of(**given)

def pretrain(
    cfg: Config | str | None = None,  # settings, or the name of a preset; None = paper, or the run's own to go on
    **changes,  # settings over those of the preset
) -> Run:
    "A whole run: check, load the images, train (or go on), write the run folder. A signal ends it as SystemExit."
    if isinstance(cfg, Config): cfg = settings({**asdict(cfg), **changes})
    else: cfg = settings({**(dict(preset=cfg) if cfg else {}), **changes})
    group = Group.join(cfg.device)
    training, state = prepare(cfg, group)
    training.open(state)
    if group.rank == 0: print(training.forecast())
    stop = training.fit()
    group.leave()
    if group.rank == 0: print(verdict(read_metrics(cfg.out))['text'])
    said = f'{stop.name} after step {training.trainer.step:,}: saved in {cfg.out}; add --resume to go on'
    if stop.name and group.rank == 0: print(said, file=sys.stderr)
    if stop.name: sys.exit(stop.code)
    return Run(cfg.out)

def main(
    argv: list | None = None,  # the words after `scott_pretrain`; None = sys.argv
):
    "The command `scott_pretrain`."
    given = vars(parser_of(Config, 'scott_pretrain').parse_args(argv))
    run_cli(lambda: print(f'done: {pretrain(settings(given)).folder}'), 'scott_pretrain')
