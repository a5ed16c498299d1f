"""Heads on augmented images, fine-tuning, and the row that is often missing: supervised from scratch, to the end."""

import json
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import draw_changes, eval_view, normalize, random_boxes, recolor, resample
from ..cli import InputError
from ..data.sets import ImageSet
from ..encoder import Encoder
from ..train.feed import Feed, stream
from ..train.files import digest, load_checkpoint, write_atomic, write_checkpoint
from ..train.machine import Place, describe_machine
from ..train.trainer import Line, Trainer, fit, own_randomness
from .classifiers import ranks, scores, summary
from .features import check_apart, read_tokens
from .heads import Recipe

@torch.no_grad()
def augmented(
    images: Tensor,  # (B, 3, S, S) uint8, each picture squashed to S x S
    aspect: Tensor,  # (B,) width / height before squashing
    size: int,  # side of the view in pixels
    seed: int,  # of everything that is random here
) -> Tensor:  # (B, 3, size, size), normalized
    "One training view of each image: crop, mirroring and colors as in pre-training."
    generator = torch.Generator().manual_seed(seed)
    boxes, flip = random_boxes(aspect, generator=generator), torch.rand(len(aspect), generator=generator) < .5
    slot, strength = draw_changes(len(aspect), .6, generator)
    boxes, flip = boxes.to(images.device), flip.to(images.device)
    return normalize(recolor(resample(images, boxes, size, flip), slot, strength))

def fresh_views(
    encoder: Encoder,  # frozen, on its device, in evaluation mode
    data: ImageSet,  # training images, squashed
    size: int,  # side of the views in pixels
    seed: int = 0,
    dtype: torch.dtype | None = None,  # autocast type; None = float32
    norm: bool = True,
) -> Callable:  # what `train_head` reads: the tokens of new views of some rows
    "The frozen encoder on augmented images, as in the paper: a new view of each image in each step."
    device = encoder.mask_token.device
    def read(rows, step):
        views = augmented(data.images[rows].to(device), data.aspect[rows], size, stream(seed, 'views', step))
        return read_tokens(encoder, views, dtype, norm)  # b n d
    return read

class Classifier(nn.Module):
    "An encoder and a linear layer on the mean of its layer-normalized tokens."
    def __init__(
        self,
        encoder: Encoder,
        classes: int,  # C
    ):
        super().__init__()
        self.encoder, self.classify = encoder, nn.Linear(encoder.embed_dim, classes)

    def forward(
        self,
        views: Tensor,  # (B, 3, H, W), normalized
    ) -> Tensor:  # (B, C) logits, float32
        x = self.encoder(views).float()  # b n d
        with torch.autocast(views.device.type, enabled=False):
            return self.classify(F.layer_norm(x, x.shape[-1:]).mean(1))

@torch.inference_mode()
def answer(
    net: Classifier,
    data: ImageSet,  # N images of the evaluation view
    dtype: torch.dtype | None = None,  # autocast type; None = float32
) -> Tensor:  # (N, C) logits on the CPU
    "A network's logits, in batches."
    net.eval()
    device, found = net.classify.weight.device, []
    for images in data.images.split(64):
        views = eval_view(images.to(device)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=dtype is not None): found.append(net(views).cpu())
    return torch.cat(found)

class OneView:
    "How labeled pictures become a batch: one augmented view of each, and its class."
    def __init__(self,
        data: ImageSet,  # squashed, with labels
        size: int,  # side of the views in pixels
        seed: int,
    ):
        self.aspect, self.labels, self.size, self.seed = data.aspect, data.labels, size, seed

    def draw(self, rows: Tensor, step: int) -> tuple:  # (B,) -> (B,) the same; the seed of the step's views
        "What is random in a step."
        return rows, stream(self.seed, 'views', step)

    def make(self, pictures: Tensor, drawn: tuple, share: Tensor) -> tuple:  # (b, 3, S, S) uint8; of the step; (b,)
        "Views (b, 3, size, size) and classes (b,), on the pictures' device."
        rows, seed = drawn[0][share], drawn[1]
        views = augmented(pictures, self.aspect[rows], self.size, seed)
        return views.contiguous(memory_format=torch.channels_last), self.labels[rows].to(pictures.device)

class Labeled(nn.Module):
    "A classifier whose forward pass returns the loss; it counts how often it was right."
    def __init__(self, net: Classifier):
        super().__init__()
        self.net = net
        self.register_buffer('right', torch.zeros(()))  # sum of the batches' shares of right answers

    def forward(self, views: Tensor, labels: Tensor) -> Tensor:  # (b, 3, H, W), (b,) -> scalar
        logits = self.net(views)
        with torch.no_grad(): self.right += (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels)

def identity(
    net: Classifier,  # at its start
    data: ImageSet,  # training images
    recipe: Recipe,
    size: int,  # side of the views in pixels
    dtype: torch.dtype | None,
) -> dict:  # what makes a training this training
    "Start, images, recipe."
    chosen = {k: getattr(recipe, k) for k in ('epochs', 'warmup_epochs', 'batch_size', 'lr', 'seed')}
    return dict(start=digest(net.state_dict()), data=data.name, images=len(data), classes=net.classify.out_features,
                autocast=str(dtype), img_size=size, **chosen)

def place(
    folder: Path,  # RUN/supervised-random
    who: dict,  # from `identity`
) -> Path:  # RUN/supervised-random-1a2b3c4d
    "The folder of a training."
    return Path(f'{folder}-{digest(who)[:8]}')

class Training:
    "A classifier that learns from labels, and the folder where it is kept."
    def __init__(self,
        net: Classifier,  # on its device; trained in place
        data: ImageSet,  # training images, squashed, with labels
        recipe: Recipe,
        size: int,  # side of the views in pixels
        folder: Path,  # its place, without the hash that is added to it; a training found there goes on
        dtype: torch.dtype | None = None,  # autocast type; None = float32
    ):
        device = net.classify.weight.device
        self.folder = place(folder, identity(net, data, recipe, size, dtype))
        feed = Feed(data, OneView(data, size, recipe.seed), recipe.batch_size, recipe.seed, device)
        self.labeled = Labeled(net).to(device).train()
        self.trainer = Trainer(self.labeled, feed, recipe.schedule(feed.per_epoch), Place(device, dtype), recipe.seed,
                               compile=False)
        self.curve, self.per_epoch = [], feed.per_epoch
        try: self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e: raise InputError(f'{self.folder}: {e.strerror}: the training has to be kept there') from e
        if (self.folder / 'checkpoint.pt').exists(): self.resume()

    def resume(self):
        "Go back to the folder's checkpoint."
        state = load_checkpoint(self.folder)
        if 'model' not in state:
            raise InputError(f'{self.folder} was begun by an earlier version of scott: remove it to train anew')
        self.curve = state.pop('curve')
        self.trainer.load_state_dict(state)

    def save(self):
        "Write the checkpoint. InputError instead if a step or a weight was no number."
        self.trainer.check(self.folder)
        if not all(p.isfinite().all() for p in self.labeled.parameters()):
            raise InputError(f'{self.folder}: weights are nan or infinite at step {self.trainer.step}, not saved: the '
                             'recipe of this run is too hot for training with labels')
        write_checkpoint(self.folder, dict(self.trainer.state_dict(), curve=self.curve), keep=1)

    def log(self, line: Line):
        "Add an epoch to the curve."
        counts = self.trainer.check(self.folder)
        self.curve.append(dict(epoch=self.trainer.step // self.per_epoch, loss=counts.loss,
                               train_top1=100 * self.labeled.right.item() / self.per_epoch))
        self.trainer.tally.reset()
        self.labeled.right.zero_()

    def fit(self,
        minutes: float = 5.,  # between two checkpoints
    ) -> list:  # a dict per epoch: epoch, loss, train_top1
        "Train to the end. A signal saves a checkpoint and ends it as SystemExit."
        stop = fit(self.trainer, self.log, self.per_epoch, self.save, minutes)
        if stop.name: sys.exit(stop.code)
        return self.curve

class Sets(NamedTuple):
    "The images that a network is trained and judged with."
    squashed: ImageSet | None  # training images for the augmentation; None if nothing is trained
    shown: ImageSet  # training images in the evaluation view
    test: ImageSet  # test images in the evaluation view

def labeled_row(
    encoder: Encoder,  # where to start; it is trained in place
    sets: Sets,
    recipe: Recipe,
    size: int,  # side of the views in pixels
    folder: Path,  # its place, without the hash
    where: Place,  # device, and the type of autocast
    train: bool = True,  # False: only look whether there is one
) -> dict | None:  # from `summary`, with the curve
    "Train the whole network on the training split, test it once, keep row and curve in row.json; or read that."
    check_apart(sets.shown.names, sets.test.names)
    with own_randomness(torch.device('cpu')):
        torch.default_generator.manual_seed(recipe.seed)
        net = Classifier(encoder, len(sets.shown.classes)).to(where.device, memory_format=torch.channels_last)
    who, started = identity(net, sets.shown, recipe, size, where.dtype), time.monotonic()
    file = place(folder, who) / 'row.json'
    if file.is_file(): return json.loads(file.read_text())
    if not train: return None
    training = Training(net, sets.squashed, recipe, size, folder, where.dtype)
    begun, curve = training.trainer.step, training.fit()
    logits = answer(net, sets.test, where.dtype)
    run = dict(seed=recipe.seed, **scores(logits, sets.test.labels), epochs=recipe.epochs)
    row = dict(**summary([run], (ranks(logits, sets.test.labels) == 1)[None]), identity=who, curve=curve,
               machine=describe_machine(where.device), steps_here=training.trainer.step - begun,
               seconds_here=round(time.monotonic() - started, 1))
    write_atomic(file, lambda part: part.write_text(json.dumps(row, indent=1)))
    return row
