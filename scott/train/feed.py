"""Which pictures, views and masks a step gets: a function of the seed and the step, made while the step before runs."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from ..augment import apply_views, draw_views
from ..cli import InputError
from ..data.sets import ImageSet
from .processes import Group, shares

DRAWS = 2  # version of everything that is random in a run: a run goes on with the draws that it began with
AHEAD = 16  # steps whose masks are drawn in one call: its fixed cost is shared by them

def stream(
    *place,  # numbers or words: the run's seed, the step, …
) -> int:  # a seed for a generator
    "The seed of the random stream that belongs to this place in the run: its hash."
    return int.from_bytes(sha256(repr(place).encode()).digest()[:7], 'little')

@lru_cache(2)
def epoch_order(
    n: int,  # images
    seed: int,
    epoch: int,  # from 0
) -> Tensor:  # (n,) a permutation; the same tensor for the same arguments, so leave it as it is
    "The order of an epoch: a function of seed and epoch alone, so that a resumed run finds its place."
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream(seed, 'epoch', epoch)))

class Views(NamedTuple):
    "A micro-batch of pre-training: the arguments of `MIMJEPA.forward`."
    context: Tensor  # (b, 3, H, W)
    target: Tensor  # (b, 3, H, W): the same crops in other colors
    keep: Tensor  # (b, N) bool, True = visible

class TwoViews:
    "How pictures become the arguments of `MIMJEPA.forward`: one crop, two colorings, a mask."
    def __init__(self,
        aspect: Tensor,  # (n,) width / height of the original pictures
        size: int,  # side of the views in pixels
        masks: Callable,  # (n, generator=) -> (n, N) bool
        seed: int,  # of the run
    ):
        self.aspect, self.size, self.masks, self.seed = aspect, size, masks, seed
        self.masks_of = lru_cache(2)(self.draw_masks)

    def draw_masks(self, chunk: int, batch: int) -> Tensor:  # (AHEAD, batch, N)
        "The masks of AHEAD steps, in one call."
        generator = torch.Generator().manual_seed(stream(self.seed, 'masks', chunk))
        return self.masks(AHEAD * batch, generator=generator).unflatten(0, (AHEAD, batch))

    def draw(self, rows: Tensor, step: int) -> tuple:  # (B,) images of the step -> Draws, (B, N) masks
        "Everything that is random in a step, on the CPU."
        generator = torch.Generator().manual_seed(stream(self.seed, 'views', step))
        chunk, i = divmod(step - 1, AHEAD)
        return draw_views(self.aspect[rows], generator), self.masks_of(chunk, len(rows))[i]

    def make(self, pictures: Tensor, drawn: tuple, share: Tensor) -> Views:  # (b, 3, S, S) uint8; of the step; (b,)
        "The views of some of the step's images, on the pictures' device."
        draws, keep = drawn
        views = apply_views(pictures, draws.rows(share), self.size)
        return Views(*(v.contiguous(memory_format=torch.channels_last) for v in views),
                     keep[share].to(pictures.device, non_blocking=True))

class Feed:
    "From the number of a step to the micro-batches that this process computes in it."
    def __init__(self,
        data: ImageSet,
        views,  # how pictures become a micro-batch: `draw(rows, step)` and `make(pictures, drawn, share)`
        batch: int,  # images of a step, over all processes
        seed: int,  # of the order
        device: torch.device,
        group: Group | None = None,  # None = a single process
        accumulate: int = 1,  # micro-batches of a step
    ):
        group = group or Group()
        self.data, self.views, self.batch, self.seed, self.device = data, views, batch, seed, device
        self.shares = shares(batch, group.rank, group.world, accumulate)
        self.per_epoch = len(data) // batch
        if not self.per_epoch: raise InputError(f'{data.name} has {len(data)} images, fewer than --batch-size {batch}')
        self.resident = self.place()  # the pictures on the GPU, or None
        self.side = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.ahead, self.pool, self.waited = (None, None), ThreadPoolExecutor(1), 0.  # seconds

    def place(self) -> Tensor | None:
        "The pictures on the GPU, if they take at most half of its free memory."
        images = self.data.images
        if self.device.type != 'cuda' or images.nbytes > torch.cuda.mem_get_info(self.device)[0] // 2: return None
        return images.to(self.device)

    def rows(self, step: int) -> Tensor:  # (B,)
        "The images of a step: its place in its epoch's order."
        epoch, i = divmod(step - 1, self.per_epoch)
        return epoch_order(len(self.data), self.seed, epoch)[i * self.batch:][:self.batch]

    def pictures(self, rows: Tensor) -> Tensor:  # (b,) -> (b, 3, S, S) uint8 on the device
        "Pictures from the GPU's memory, or from the CPU's or the disk."
        if self.resident is not None: return self.resident[rows.to(self.device, non_blocking=True)]
        pixels = torch.from_numpy(self.data.images.numpy()[rows.numpy()])
        return pixels.pin_memory().to(self.device, non_blocking=True) if self.side else pixels.to(self.device)

    def prepare(self, step: int) -> tuple:
        "What can be made before the step begins (on a GPU the views themselves), and the event that tells it is there."
        rows = self.rows(step)
        drawn = self.views.draw(rows, step)
        if not self.side: return [(self.pictures(rows[share]), drawn, share) for share in self.shares], None
        with torch.cuda.stream(self.side):
            made = [self.views.make(self.pictures(rows[share]), drawn, share) for share in self.shares]
            return made, self.side.record_event()

    def batches(self, step: int):
        "A step's micro-batches, one after the other; those of the next step are begun in the background."
        begun, (expected, future) = time.perf_counter(), self.ahead
        pieces, ready = future.result() if expected == step else self.prepare(step)
        self.waited += time.perf_counter() - begun
        self.ahead = step + 1, self.pool.submit(self.prepare, step + 1)
        for piece in pieces: yield self.handed_over(piece, ready) if ready else self.views.make(*piece)

    def handed_over(self, made: tuple, ready) -> tuple:  # tensors of the side stream; the event that they are there
        "The same tensors for the stream that computes: it waits for them, and their memory for it."
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for tensor in made: tensor.record_stream(stream)
        return made
