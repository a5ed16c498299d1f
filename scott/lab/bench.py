"""The engine beside what one would write first, on the same images, in the same process; and what the host does."""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..augment import apply_views, draw_views
from ..cli import InputError, opt, parse_args, run_cli
from ..data.petals import petals
from ..data.sets import ImageSet
from ..encoder import Attention
from ..kernels import Dropout, keep_freed_memory
from ..schedule import make_optimizer
from ..train.config import Config, build, masks_of
from ..train.feed import AHEAD, Feed, TwoViews, epoch_order
from ..train.files import write_atomic
from ..train.machine import describe_machine, pick_device
from ..train.pretrain import SIDE, Pretraining
from .plain import PlainLoop

def wait_for(device):
    "Until the device has done all that it was told to do."
    if device.type == 'cuda': torch.cuda.synchronize(device)

def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    n: int | None = None,  # rows and columns; None = 8192 on a GPU, 2048 on a CPU
    repeat: int = 5,
) -> float:  # operations per second
    "The fastest product of two n x n matrices."
    n = n or (8192 if device.type == 'cuda' else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float('inf')
    for _ in range(repeat + 1):
        wait_for(device)
        begun = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * n ** 3 / best

def step_flop(
    cfg: Config,
) -> int:  # operations of one image in a training step; a multiply-add is two
    "Counted on the CPU, where attention is two products that the counter sees."
    jepa, image = build(cfg), torch.zeros(1, 3, cfg.img_size, cfg.img_size)
    keep = masks_of(cfg, jepa.context.grid)(1, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter: jepa(image, image, keep).backward()
    return counter.get_total_flops()

def reset_peak(device):
    "Forget the peak memory so far."
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError): Path('/proc/self/clear_refs').write_text('5')

def peak_memory(device):
    "The most memory held since `reset_peak`, in MB; None where nobody tells."
    if device.type == 'cuda': return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError):
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith('VmHWM'))

class Engine:
    "The trainer as `scott_pretrain` uses it, without its folder."
    def __init__(self, cfg: Config, data: ImageSet):
        self.trainer = Pretraining(cfg, data).trainer
        self.device, self.train_step = self.trainer.device, self.trainer.train_step

    @property
    def waited(self):
        "Seconds that steps have waited for their data so far."
        return self.trainer.feed.waited

    def close(self):
        "There are no worker processes to stop."

def time_steps(
    loop,  # a `PlainLoop` or an `Engine`
    steps: int,
) -> dict:  # seconds a step, share of waiting for data, peak memory in MB
    "Make some steps and look at the clock."
    reset_peak(loop.device)
    waited = loop.waited
    wait_for(loop.device)
    begun = time.perf_counter()
    for _ in range(steps): loop.train_step()
    wait_for(loop.device)
    seconds = time.perf_counter() - begun
    return dict(step_s=seconds / steps, data_wait=(loop.waited - waited) / seconds, peak_mb=peak_memory(loop.device))

def take_turns(
    loops: dict,  # name -> loop
    steps: int,  # of each in a round
    rounds: int = 3,
) -> dict:  # name -> the fastest round's `time_steps`
    "Each turn begins with two steps that don't count, and ends with its worker processes stopped."
    times = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            time_steps(loop, 2)
            times[name].append(time_steps(loop, steps))
            loop.close()
    return {name: min(turns, key=lambda t: t['step_s']) for name, turns in times.items()}

@dataclass
class Bench:
    "Time the engine beside a plain baseline, in one process and on the same images."
    preset: str = opt('auto', 'sizes: demo, colab, small or paper; auto is paper on a GPU and small on a CPU')
    img_size: int = opt(0, 'side of the views in pixels (0: as the preset says, also below)')
    embed_dim: int = opt(0, 'width of a token')
    depth: int = opt(0, 'blocks of the encoder')
    batch_size: int = opt(0, 'images per step')
    images: int = opt(512, 'drawn images to train on')
    steps: int = opt(5, 'steps of a round; three rounds are made, the fastest counts')
    device: str = opt('auto', 'auto, cpu, mps, cuda or cuda:N')
    amp: str = opt('auto', "the engine's 16-bit type", choices=('auto', 'bf16', 'fp16', 'off'))
    ladder: bool = opt(False, 'also exchange the pieces of the baseline for those of the engine, one after the other')
    sweep: bool = opt(False, 'also time the engine for other batches, image sizes and depths')
    host: bool = opt(False, 'only the main thread: milliseconds of each part of a step, and operations of the views')
    json: str = opt(None, 'file to write the figures to', str)

def config_of(
    bench: Bench,
    **changes,
) -> Config:
    "The training configuration that is timed."
    auto = 'paper' if pick_device(bench.device).device.type == 'cuda' or bench.host else 'small'
    sizes = {k: getattr(bench, k) for k in ('img_size', 'embed_dim', 'depth', 'batch_size') if getattr(bench, k)}
    rest = dict(data='petals', amp=bench.amp, device=bench.device, epochs=1000, warmup_epochs=1, out='none')
    return Config.of(auto if bench.preset == 'auto' else bench.preset, **{**sizes, **rest, **changes})

def drawn(
    cfg: Config,
    n: int,  # images
) -> ImageSet:
    "Drawn flowers at the size of a decoded cache."
    images, labels = petals(n=n, size=round(cfg.img_size * SIDE))
    return ImageSet(images, labels, torch.ones(n), [], 'petals', True, [])

def feed_of(loop: PlainLoop, data: ImageSet) -> Feed:
    "The engine's feed for a plain loop."
    cfg = loop.cfg
    views = TwoViews(data.aspect, cfg.img_size, masks_of(cfg, loop.jepa.context.grid), cfg.seed)
    return Feed(data, views, cfg.batch_size, cfg.seed, loop.device)

def better_views(loop, data):
    "Whole batches of bytes from memory, changed on the device."
    feed = feed_of(loop, data)
    loop.views = lambda: next(iter(feed.batches(loop.step)))[:2]

def better_masks(loop, data):
    "Masks of many steps in one call."
    views = feed_of(loop, data).views
    def draw():
        chunk, i = divmod(loop.step - 1, AHEAD)
        return views.masks_of(chunk, loop.cfg.batch_size)[i].to(loop.device)
    loop.masks = draw

def better_types(loop, data):
    "16-bit products, where the device has units for them."
    device, dtype = pick_device(loop.cfg.device, loop.cfg.amp)
    def loss(*batch):
        with torch.autocast(device.type, dtype, enabled=dtype is not None): return loop.jepa(*batch)
    loop.loss = loss

def better_blocks(loop, data):
    "Attention and dropout from `scott.kernels`."
    for m in loop.jepa.modules():
        if isinstance(m, (Attention, Dropout)): del m.forward

def better_layout(loop, data):
    "Convolutions read pixel by pixel (channels last)."
    loop.jepa.to(memory_format=torch.channels_last)
    views = loop.views
    loop.views = lambda: tuple(v.contiguous(memory_format=torch.channels_last) for v in views())

def better_optimizer(loop, data):
    "AdamW for all tensors in one call."
    loop.opt = make_optimizer(loop.jepa)

def better_average(loop, data):
    "The moving average for all tensors in one call."
    loop.average = loop.jepa.update_target

def no_reading(loop, data):
    "The loss stays on the device."
    loop.report = lambda loss: None

def kept_memory(loop, data):
    "Freed memory is kept for the next step (Linux, CPU)."
    keep_freed_memory()

RUNGS = dict(views=better_views, masks=better_masks, types=better_types, blocks=better_blocks, layout=better_layout,
             optimizer=better_optimizer, average=better_average, reading=no_reading, memory=kept_memory)

def rung(bench: Bench, k: int) -> dict:
    "The plain loop with the first k pieces exchanged."
    cfg = config_of(bench)
    data = drawn(cfg, max(bench.images, cfg.batch_size))
    loop = PlainLoop(cfg, data)
    for exchange in list(RUNGS.values())[:k]: exchange(loop, data)
    return take_turns({'t': loop}, bench.steps, rounds=2)['t']

def point(bench: Bench, **changes) -> dict:
    "The engine with something changed."
    cfg = config_of(bench, **changes)
    times = take_turns({'t': Engine(cfg, drawn(cfg, max(bench.images, cfg.batch_size)))}, bench.steps, rounds=2)['t']
    return dict(times, images_per_s=cfg.batch_size / times['step_s'], gflop=step_flop(cfg) / 1e9)

def alone(what, *args, **changes):
    "A function's result from a process of its own: its memory, nothing left over from the point before."
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: return pool.submit(what, *args, **changes).result()

def climb(bench: Bench) -> list:  # [{lever, step_s, …}], the first is the plain loop
    "The ladder: the pieces of the plain loop are exchanged one after the other, each rung in its own process."
    return [dict(lever=name, **alone(rung, bench, k)) for k, name in enumerate(['none', *RUNGS])]

def grow(bench: Bench) -> list:  # [{varied, value, step_s, …}]
    "The sweep: other batches, sizes and depths, one changed at a time."
    b = config_of(bench).batch_size
    grid = dict(batch_size=[max(b // 4, 1), max(b // 2, 1), b, 2 * b], img_size=[64, 112, 160, 224], depth=[3, 7, 12])
    return [dict(varied=name, value=v, **alone(point, bench, **{name: v})) for name, vs in grid.items() for v in vs]

class Operations(TorchDispatchMode):
    "Counts the operations that are issued; views of a tensor, which compute nothing, are left out."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        "Count one and go on."
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))

def milliseconds(
    work,  # a function of the repetition's number, from 0
    repeat: int = 20,
) -> float:
    "Median time of a call on the main thread."
    times = []
    for i in range(repeat):
        begun = time.perf_counter()
        work(i)
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times)[repeat // 2]

def host(
    bench: Bench,
    images: int = 126_689,  # of ImageNet-100, for the order
) -> dict:  # ms: part -> milliseconds a step; views_operations
    "What a step costs on the main thread beside the networks, at the size of a batch; one thread computes."
    cfg, threads = config_of(bench), torch.get_num_threads()
    data, per_epoch = drawn(cfg, cfg.batch_size), images // cfg.batch_size
    masks, generator = masks_of(cfg, build(cfg).context.grid), torch.Generator().manual_seed(0)
    draws = draw_views(data.aspect, generator)
    torch.set_num_threads(1)
    try:
        ms = dict(masks=milliseconds(lambda i: masks(AHEAD * cfg.batch_size, generator=generator)) / AHEAD,
                  draws=milliseconds(lambda i: draw_views(data.aspect, generator)),
                  order=milliseconds(lambda epoch: epoch_order(images, -1, epoch)) / per_epoch)
        with Operations() as operations: apply_views(data.images, draws, cfg.img_size)
    finally: torch.set_num_threads(threads)
    return dict(batch_size=cfg.batch_size, img_size=cfg.img_size, ms=ms, views_operations=operations.count)

def measure(
    bench: Bench,
) -> dict:  # what --json writes
    "Baseline, engine, ceiling; the ladder, the sweep and the host's share if asked for."
    cfg = config_of(bench)
    if bench.host: return dict(machine=describe_machine(torch.device('cpu')), config=asdict(cfg), host=host(bench))
    data = drawn(cfg, max(bench.images, cfg.batch_size))
    loops = dict(baseline=PlainLoop(cfg, data), engine=Engine(cfg, data))
    device, dtype = pick_device(cfg.device, cfg.amp)
    dtype = dtype or torch.float32
    flop, ceiling = step_flop(cfg) * cfg.batch_size, product_rate(device, dtype)
    report = dict(machine=describe_machine(device), config=asdict(cfg), gflop_per_image=flop / cfg.batch_size / 1e9,
                  product=dict(dtype=str(dtype), gflop_per_s=ceiling / 1e9))
    for name, t in take_turns(loops, bench.steps).items():
        report[name] = dict(images_per_s=cfg.batch_size / t['step_s'], **t, gflop_per_s=flop / t['step_s'] / 1e9,
                            share_of_product=flop / t['step_s'] / ceiling)
    report['ratio'] = report['engine']['images_per_s'] / report['baseline']['images_per_s']
    if bench.ladder: report['ladder'] = climb(bench)
    if bench.sweep: report['sweep'] = grow(bench)
    return report

def host_table(report: dict) -> str:  # from `measure`, with `host`
    "The host's figures as lines of text."
    m, h = report['machine'], report['host']
    lines = [f'{m["hardware"]}, main thread, torch {m["torch"]}: batch {h["batch_size"]}, {h["img_size"]} px']
    lines += [f'{part:8}{ms:8.3f} ms a step' for part, ms in h['ms'].items()]
    return '\n'.join([*lines, f'views   {h["views_operations"]:8} operations a batch'])

def table(
    report: dict,  # from `measure`
) -> str:
    "The figures as lines of text."
    if 'host' in report: return host_table(report)
    c, m, p = report['config'], report['machine'], report['product']
    lines = [f'{m["hardware"]}, {m["threads"]} threads, torch {m["torch"]}: {c["img_size"]} px, depth {c["depth"]}, '
             f'width {c["embed_dim"]}, batch {c["batch_size"]}, {report["gflop_per_image"]:.2f} GFLOP an image',
             f'{"":10}{"img/s":>8}{"ms/step":>9}{"waits":>7}{"MB":>8}{"GFLOP/s":>9}{"of product":>12}']
    for name in ('baseline', 'engine'):
        r = report[name]
        lines.append(f'{name:10}{r["images_per_s"]:8.1f}{1e3 * r["step_s"]:9.0f}{r["data_wait"]:7.1%}'
                     f'{r["peak_mb"] or float("nan"):8.0f}{r["gflop_per_s"]:9.0f}{r["share_of_product"]:12.1%}')
    lines.append(f'engine / baseline = {report["ratio"]:.2f}; '
                 f'a product in {p["dtype"]}: {p["gflop_per_s"]:.0f} GFLOP/s')
    before = None
    for r in report.get('ladder', []):
        gain = f'  x {before / r["step_s"]:.2f}' if before else ''
        lines.append(f'  + {r["lever"]:14}{1e3 * r["step_s"]:8.0f} ms{gain}')
        before = r['step_s']
    for r in report.get('sweep', []):
        memory = r['peak_mb'] or float('nan')
        lines.append(f'  {r["varied"]:10} {r["value"]:5}{r["images_per_s"]:9.1f} img/s{memory:9.0f} MB')
    return '\n'.join(lines)

def main(
    argv: list | None = None,  # the words after `scott_bench`; None = sys.argv
):
    "The command `scott_bench`."
    def go():
        bench = parse_args(Bench, argv, 'scott_bench')
        if min(bench.images, bench.steps) < 1:
            raise InputError(f'--images {bench.images}, --steps {bench.steps}: both must be at least 1')
        if bench.json and not Path(bench.json).parent.is_dir():
            raise InputError(f'--json {bench.json}: no folder {Path(bench.json).parent}; make it, or name another')
        report = measure(bench)
        print(table(report))
        if bench.json: write_atomic(Path(bench.json), lambda part: part.write_text(json.dumps(report, indent=1)))
    run_cli(go, 'scott_bench')


if __name__ == '__main__' and '__file__' in globals(): main()  # python -m scott.lab.bench
