"""The loop as a newcomer writes it: one image after the other, float32, plain PyTorch. It is the baseline of timings."""

import io
import math
import os
import random
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

from ..augment import MEAN, STD
from ..data.sets import ImageSet
from ..encoder import Attention
from ..kernels import Dropout
from ..train.config import Config, build, schedule_of
from ..train.machine import pick_device

def plain_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, H, T, d)
    v: Tensor,  # (B, H, T, d)
    p: float = 0.,  # dropout of the weights
) -> Tensor:  # (B, H, T, d)
    "softmax(q k / sqrt(d)) v as two einsums."
    scores = torch.einsum('bhid,bhjd->bhij', q, k) / math.sqrt(q.shape[-1])
    return torch.einsum('bhij,bhjd->bhid', F.dropout(scores.softmax(-1), p), v)

def attention_forward(block: Attention, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
    "`Attention.forward` with the plain attention."
    y = plain_attention(*block.split(x), block.attn_drop if block.training else 0.)
    return block.proj_drop(block.proj(y.transpose(1, 2).flatten(2)))

def plain_mask(rows, columns, visible, generator, min_area=16, aspect=(.3, 1 / .3)):
    "One mask (rows, columns) bool with exactly `visible` patches visible."
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    min_area = min(min_area, rows * columns // 3, (min(rows, columns) - 1) ** 2)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(1000):
        left = visible - int(keep.sum())
        if not left: break
        u = torch.rand(4, generator=generator).tolist()
        area, shape = min_area + (left - min_area) * u[0], math.exp(low + (high - low) * u[1])
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if not (0 < h < rows and 0 < w < columns): continue
        y, x = int(u[2] * (rows - h + 1)), int(u[3] * (columns - w + 1))
        new = h * w - int(keep[y:y + h, x:x + w].sum())
        if 0 < new <= left: keep[y:y + h, x:x + w] = True
    for i in torch.randperm(rows * columns, generator=generator).tolist():
        if keep.sum() == visible: break
        keep.view(-1)[i] = True
    return keep

def plain_masks(
    batch: int,  # number of images
    grid: tuple = (14, 14),  # (rows, columns) of patches
    ratio: float = .6,  # hidden share
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, N) bool, True = visible
    "Block-wise masks, image by image."
    visible = math.ceil((1 - ratio) * grid[0] * grid[1] - 1e-6)
    return torch.stack([plain_mask(*grid, visible, generator).flatten() for _ in range(batch)])

@torch.no_grad()
def plain_ema(
    target: nn.Module,
    context: nn.Module,
    momentum: float,  # m
):
    "target <- m target + (1 - m) context."
    for p, q in zip(target.parameters(), context.parameters()): p.mul_(momentum).add_(q, alpha=1 - momentum)

def to_jpeg(
    images: Tensor,  # (n, 3, S, S) uint8
    quality: int = 90,
) -> list:  # n encoded pictures, as files would hold them
    "Encode pictures."
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, 'JPEG', quality=quality)
        files.append(buffer.getvalue())
    return files

class PlainViews(torch.utils.data.Dataset):
    "Item (row, seed) is the context and the target view of a picture, both (3, size, size), made from its JPEG file."

    def __init__(self,
        files: list,  # encoded pictures
        size: int,  # side of the views in pixels
        color: float = .6,  # probability that a view's colors are changed at all
        aspects: list | None = None):  # width / height of the originals, if the files hold them squashed to a square
        self.files, self.aspects = files, aspects
        self.crop = T.Compose([T.RandomResizedCrop(size, (.2, 1.), interpolation=T.InterpolationMode.BICUBIC),
                               T.RandomHorizontalFlip()])
        changes = T.RandomOrder([T.RandomApply([T.ColorJitter(.4, .4, .2, .1)], .8), T.RandomGrayscale(.1),
                                 T.RandomApply([T.GaussianBlur(9, (.1, 2.))], .3)])
        self.view = T.Compose([T.RandomApply([changes], color), T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self): return len(self.files)

    def __getitem__(self, key):
        row, seed = key
        torch.manual_seed(seed)
        random.seed(seed)
        picture = Image.open(io.BytesIO(self.files[row])).convert('RGB')
        if self.aspects and self.aspects[row] != 1:
            picture = picture.resize((round(picture.height * self.aspects[row]), picture.height), Image.BICUBIC)
        picture = self.crop(picture)
        return self.view(picture), self.view(picture)

class PlainLoop:
    "Everything that a step needs, each piece as one would write it first; a timing may exchange a piece."
    def __init__(self,
        cfg: Config,
        data: ImageSet,  # squashed
    ):
        self.cfg, self.device = cfg, pick_device(cfg.device, 'off').device
        self.jepa = build(cfg).to(self.device).train()
        for m in self.jepa.modules():
            if isinstance(m, Attention): m.forward = partial(attention_forward, m)
            if isinstance(m, Dropout): m.forward = partial(nn.Dropout.forward, m)
        self.opt = torch.optim.AdamW([p for p in self.jepa.parameters() if p.requires_grad], foreach=False)
        self.schedule, self.step, self.waited = schedule_of(cfg, len(data) // cfg.batch_size), 0, 0.  # seconds
        self.files, self.loader = PlainViews(to_jpeg(data.images), cfg.img_size, aspects=data.aspect.tolist()), None

    def views(self) -> tuple:  # context, target, both (B, 3, H, W)
        "The next batch from worker processes that decode and augment image by image."
        if self.loader is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
            n, order = len(self.files), torch.Generator().manual_seed(self.cfg.seed)
            keys = [[(row, row) for row in torch.randperm(n, generator=order)[:self.cfg.batch_size].tolist()]
                    for _ in range(self.schedule.total)]
            self.loader = iter(DataLoader(self.files, batch_sampler=keys, num_workers=workers))
        return tuple(view.to(self.device) for view in next(self.loader))

    def masks(self) -> Tensor:  # (B, N) bool
        "Masks, image by image."
        return plain_masks(self.cfg.batch_size, self.jepa.context.grid, self.cfg.mask_ratio).to(self.device)

    def loss(self, context: Tensor, target: Tensor, keep: Tensor) -> Tensor:  # of `MIMJEPA.forward` -> scalar
        "Forward pass."
        return self.jepa(context, target, keep)

    def average(self, momentum: float):
        "Move the target."
        plain_ema(self.jepa.target, self.jepa.context, momentum)

    def report(self, loss: Tensor):
        "Look at the loss in every step."
        return loss.item()

    def train_step(self):
        "One optimizer step."
        self.step += 1
        values = self.schedule.at(self.step)
        for group in self.opt.param_groups: group.update(lr=values.lr, weight_decay=values.wd)
        context, target = self.views()
        loss = self.loss(context, target, self.masks())
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        self.average(values.momentum)
        self.report(loss)

    def close(self):
        "Stop the worker processes."
        self.loader = None
