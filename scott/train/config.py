"""Every setting of a run in one place: its default, its help, its range, and whether it may differ at a resume."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from .. import masking
from ..cli import InputError, check_names, checked, opt
from ..data.sets import absolute
from ..encoder import Encoder
from ..jepa import MIMJEPA
from ..predictor import Predictor
from ..schedule import Schedule

PRESETS = dict(
    paper={},  # the released configuration: one step is 51 GFLOP an image, 38,100 steps
    colab=dict(img_size=112, depth=7, embed_dim=192, epochs=40, warmup_epochs=4, batch_size=64),
    small=dict(img_size=112, depth=7, embed_dim=192, epochs=36, warmup_epochs=2, batch_size=32),
    demo=dict(data='petals', img_size=64, depth=3, predictor_depth=2, embed_dim=96, drop_rate=0., attn_drop_rate=0.,
              drop_path_rate=0., lr=1e-3, epochs=6, warmup_epochs=1, batch_size=16),
)

@dataclass
class Config:
    "Pre-train SCOTT + MIM-JEPA on images alone, without labels. The defaults shown are those of the preset paper."
    preset: str = opt('paper', 'starting point for every other flag: ' + ', '.join(PRESETS))
    data: str = opt('flowers102', 'petals, flowers102, pets37, imagenet100 or folder:PATH')
    data_root: str = opt(None, 'folder of the data sets (default: $SCOTT_DATA, else ~/.cache/scott)', str, free=True)
    ssl_split: str = opt('all', 'all: the test images too, without labels, as in the paper', choices=('train', 'all'))
    on_bad_image: str = opt('fail', 'a broken image stops the run, or is skipped and counted', choices=('fail', 'skip'))
    img_size: int = opt(224, 'side of the views in pixels, a multiple of 16', low=16)
    tokenizer: str = opt('sparse', "SCOTT's convolutions, or the ViT's patch embedding", choices=('sparse', 'patch'))
    embed_dim: int = opt(384, 'width of a token', low=1)
    depth: int = opt(12, 'blocks of the encoder', low=1)
    num_heads: int = opt(4, 'attention heads of a block', low=1)
    ffn: str = opt('swiglu', 'feed-forward network of a block', choices=('swiglu', 'mlp'))
    reg_tokens: int = opt(0, 'register tokens', low=0)
    predictor_depth: int = opt(3, 'blocks of the predictor', low=1)
    drop_rate: float = opt(.2, 'dropout on positions and attention output', low=0, high=1)
    attn_drop_rate: float = opt(.1, 'dropout on attention weights', low=0, high=1)
    drop_path_rate: float = opt(.1, 'stochastic depth of the last block', low=0, high=1)
    mask: str = opt('blockwise', 'how visible patches are chosen', choices=('uniform', 'blockwise', 'multiblock'))
    mask_ratio: float = opt(.6, 'share of the patches that is hidden')
    epochs: int = opt(300, 'passes over the images', low=1)
    batch_size: int = opt(64, 'images per optimizer step', low=1)
    lr: float = opt(5e-4, 'learning rate after the warm-up', low=0)
    lr_start: float = opt(1e-6, 'learning rate before the first step', low=0)
    lr_final: float = opt(1e-5, 'learning rate of the last step', low=0)
    warmup_epochs: int = opt(40, 'epochs of linear warm-up', low=0)
    flat: float = opt(.72, 'share of the steps after the warm-up at the full learning rate', low=0, high=1)
    weight_decay: float = opt(.04, 'weight decay at the start', low=0)
    weight_decay_final: float = opt(.4, 'weight decay at the end', low=0)
    momentum: float = opt(.996, "the target's momentum at the start", low=0, high=1)
    momentum_final: float = opt(1., "the target's momentum at the end", low=0, high=1)
    seed: int = opt(0, 'seed of weights, order, crops, masks and dropout', low=0)
    device: str = opt('auto', 'auto, cpu, mps, cuda or cuda:N', free=True)
    amp: str = opt('auto', 'autocast; auto takes what the device profits from', choices=('auto', 'bf16', 'fp16', 'off'))
    compile: bool = opt(True, 'torch.compile where it pays: on GPUs from capability 8', free=True)
    accumulate: int = opt(1, 'micro-batches that a batch is computed in, one after the other, to save memory', low=1,
                          free=True)
    on_nan: str = opt('stop', 'at a step whose loss or gradient is nan or infinite', choices=('stop', 'skip'), free=True)
    log_every: int = opt(20, 'steps between two lines of metrics.jsonl', low=1)
    knn_every: int = opt(5, 'epochs between two quick k-NN looks at the features, if there are labels; 0 = none', low=0,
                         free=True)
    checkpoint_minutes: float = opt(5., 'minutes between two checkpoints', low=0, free=True)
    keep_checkpoints: int = opt(2, 'checkpoints that are kept, the newest included', low=1, free=True)
    out: str = opt(None, 'run folder to write', str, free=True)
    resume: bool = opt(False, 'go on with the run in --out, with the configuration stored there', free=True)

    @classmethod
    def of(cls, preset: str = 'paper', **changes):  # any setting of this class
        "A preset, then changes to it, checked. InputError for a name or a value that can't be."
        if preset not in PRESETS: raise InputError(f'preset {preset!r} is unknown: choose one of {", ".join(PRESETS)}')
        check_names(cls, changes)
        if isinstance(changes.get('out'), Path): changes['out'] = str(changes['out'])
        self = checked(cls(**{**PRESETS[preset], **changes, 'preset': preset}))
        self.data = absolute(self.data)  # a run may be resumed from another place
        for name in ('out', 'data_root'):
            if getattr(self, name): setattr(self, name, str(Path(getattr(self, name)).expanduser()))
        if self.warmup_epochs >= self.epochs:
            raise InputError(f'--warmup-epochs {self.warmup_epochs} leaves nothing of --epochs {self.epochs}: '
                             'lower --warmup-epochs, or raise --epochs')
        return self

FREE = {f.name for f in fields(Config) if f.metadata['free']}  # may differ when a run goes on

def identity(
    cfg: Config,
    **facts,  # what else makes a run this run, e.g. the number of images
) -> dict:  # setting -> value
    "What makes a run this run: the facts, and every setting but those that may differ when it goes on."
    return {**{k: v for k, v in asdict(cfg).items() if k not in FREE}, **facts}

def differences(
    there: dict,  # an `identity` that was stored, perhaps before some setting existed
    here: dict,  # the `identity` of the present run
) -> list:  # one line for each difference
    "Where two runs differ; a setting that did not exist when one was stored counts as its default."
    defaults = {f.name: f.default for f in fields(Config)}
    return [f'{k} is {there.get(k, defaults.get(k))!r} there and {v!r} here' for k, v in here.items()
            if there.get(k, defaults.get(k)) != v]

def masks_of(cfg: Config, grid: tuple) -> Callable:  # (rows, columns) of patches -> a function (n, generator=) -> (n, N)
    "How a run draws its masks."
    return partial(getattr(masking, cfg.mask), grid=grid, ratio=cfg.mask_ratio)

def build(cfg: Config) -> MIMJEPA:
    "Encoder, predictor and target of a configuration, with the seed's initial weights; no other random state changes."
    shared = dict(embed_dim=cfg.embed_dim, num_heads=cfg.num_heads, ffn=cfg.ffn, reg_tokens=cfg.reg_tokens,
                  drop_rate=cfg.drop_rate, attn_drop_rate=cfg.attn_drop_rate, drop_path_rate=cfg.drop_path_rate)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(cfg.seed)
        try:
            encoder = Encoder(cfg.tokenizer, cfg.img_size, depth=cfg.depth, **shared)
            masks_of(cfg, encoder.grid)(1, generator=torch.Generator())
        except ValueError as e: raise InputError(str(e)) from e
        return MIMJEPA(encoder, Predictor(encoder.grid, depth=cfg.predictor_depth, encoder_depth=cfg.depth, **shared))

def schedule_of(cfg: Config, per_epoch: int) -> Schedule:  # optimizer steps of an epoch
    "The schedules of a run."
    return Schedule(cfg.epochs * per_epoch, cfg.warmup_epochs * per_epoch, cfg.lr, cfg.lr_start, cfg.lr_final, cfg.flat,
                    cfg.weight_decay, cfg.weight_decay_final, cfg.momentum, cfg.momentum_final)
