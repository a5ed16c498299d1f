"""Is it learning? Runs that are sick on purpose, healthy ones, and the curves that tell them apart."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.petals import petal_names, petals
from ..data.sets import ImageSet
from ..jepa import MIMJEPA, hidden_smooth_l1
from ..train.config import Config, build
from ..train.pretrain import Pretraining
from ..train.signs import Neighbors, verdict

TOY = dict(data='petals', img_size=64, tokenizer='patch', embed_dim=32, depth=1, predictor_depth=1, batch_size=16,
           epochs=8, warmup_epochs=1, lr=3e-3, log_every=10, knn_every=2, device='cpu', amp='off')

class NoPredictor(MIMJEPA):
    "The predictor is there, but never used: the context encoder's own tokens are compared with the target's."
    def forward(self, context, target, keep): return hidden_smooth_l1(self.context(context, keep), self.targets(target), keep)

class NothingHidden(MIMJEPA):
    "The context encoder sees the whole picture; the loss is where it would have been hidden."
    def forward(self, context, target, keep):
        return hidden_smooth_l1(self.predictor(self.context(context)), self.targets(target), keep)

class Defect(NamedTuple):
    "What is changed in a toy run."
    settings: dict  # of `Config`, over TOY
    method: type = MIMJEPA

DEFECTS = {
    'healthy': Defect({}),
    'no EMA': Defect(dict(momentum=0., momentum_final=0.)),
    'no predictor': Defect({}, NoPredictor),
    'nothing hidden': Defect({}, NothingHidden),
    'one patch hidden': Defect(dict(mask='uniform', mask_ratio=1 / 16)),
    'learning rate x 30': Defect(dict(lr=30 * TOY['lr'])),
    'healthy, sparse': Defect(dict(tokenizer='sparse')),
    'weak EMA, sparse': Defect(dict(tokenizer='sparse', momentum=.5, momentum_final=.5)),
}

@cache
def toy_data() -> ImageSet:
    "480 drawn flowers of 20 classes, 73 px."
    images, labels = petals(n=480, size=73)
    return ImageSet(images, labels, torch.ones(len(labels)), petal_names(), 'toy', False, [])

def toy_run(
    defect: str,  # one of DEFECTS
    out: str | Path,  # the run folder to make
    seed: int = 0,
    **settings,  # of `Config`, over those of TOY
) -> list:  # its metrics
    "A short run of a small network on 480 drawn flowers, with or without a defect."
    changes, method = DEFECTS[defect]
    cfg = Config.of('demo', **{**TOY, **changes, **settings, 'seed': seed, 'out': str(out)})
    data, jepa = toy_data(), build(cfg)
    neighbors = Neighbors(data.images[:, :, 4:68, 4:68], data.labels)
    training = Pretraining(cfg, data, method(jepa.context, jepa.predictor), neighbors)
    training.open(None)
    training.fit()
    return training.metrics

class Alarm(NamedTuple):
    "When a run was first called sick, and what was found."
    step: int
    word: str
    text: str
    curves: tuple  # keys of metrics that betray it

def first_alarm(
    metrics: list,  # of a run
) -> Alarm | None:  # None if there was none
    "The first alarm, line after line as the metrics were written."
    for n in range(1, len(metrics) + 1):
        found = verdict(metrics[:n])
        if found['alarm']: return Alarm(metrics[n - 1]['step'], found['word'], found['text'], found['curves'])
    return None
