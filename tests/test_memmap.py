"Data sets beyond memory: the decoded cache is read from its file, and no copy of it is held."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scott.data.decode import map_pixels

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='private memory is read from /proc/self/status')
ALLOWED = 60e6                                                # bytes of private memory
ROWS, SIDE, BATCH = 1536, 256, 64
PIXELS = ROWS * 3 * SIDE ** 2                                 # bytes, five times what is allowed

SCRIPT = """
import json, os, sys, threading
from functools import partial
from pathlib import Path
import torch
os.cpu_count = lambda: 2                                      # threads that decode: the same on every machine
from scott.data.decode import read_cache, write_cache
from scott.data.sets import ImageSet
from scott.masking import uniform
from scott.train.feed import Feed, TwoViews


def private():
    return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) * 1024


def grown(action):
    "What `action()` returns, and by how many bytes private memory has grown over `start` at most while it ran."
    done, peak = threading.Event(), [private()]
    def watch():
        while not done.wait(.005): peak.append(private())
    thread = threading.Thread(target=watch)
    thread.start()
    result = action()
    done.set()
    thread.join()
    return result, max(*peak, private()) - start


def read():
    "One epoch, as training reads it; how many different rows that were, and the sum of all pixels."
    data = ImageSet(images, torch.full((rows,), -1), torch.ones(rows), [], 'toy', False, [])
    views = TwoViews(data.aspect, 32, partial(uniform, grid=(2, 2), ratio=.5), seed=0)
    feed, seen, total = Feed(data, views, batch, 0, torch.device('cpu')), set(), 0
    for step in range(1, feed.per_epoch + 1):
        chosen = feed.rows(step)
        seen.update(chosen.tolist())
        total += int(feed.pictures(chosen).numpy().sum(dtype='int64'))
    return len(seen), total


home, rows, side, batch = Path(sys.argv[1]), *map(int, sys.argv[2:])
files = sorted(home.glob('*.jpg'))
paths = (files * rows)[:rows]
path = home / 'cache' / 'toy.npy'
start = private()
first, build = grown(lambda: write_cache(path, paths, side, 'squash', 'toy'))
del first
os.utime(path)                                                # as if it were a copy: all pixels are checked
cached, check = grown(lambda: read_cache(path))
images, broken = cached.images, cached.broken
del cached
(seen, total), reading = grown(read)
each = [int(images[i].sum()) for i in range(len(files))]
copy, copied = grown(images.clone)
del copy
_, written = grown(lambda: images.add_(1))
print(json.dumps(dict(build=build, check=check, read=reading, copied=copied, written=written, seen=seen, total=total,
                      each=each, bytes=images.nbytes, broken=broken, intact=read_cache(path) is not None)))
"""


@pytest.fixture(scope='module')
def facts(tmp_path_factory):
    "What a process of its own measured: build, check, read, and then two ways to fill the memory."
    home = tmp_path_factory.mktemp('memmap')
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(home / f'{i}.jpg')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '2'}
    done = subprocess.run([sys.executable, '-c', SCRIPT, home, *map(str, (ROWS, SIDE, BATCH))], env=env,
                          cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    for file in (home / 'cache').glob('*'):
        file.unlink()                                         # 300 MB; pytest would keep them
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['build', 'check', 'read'])
def test_a_cache_larger_than_the_allowed_memory(facts, stage):
    assert facts['bytes'] == PIXELS > 4 * ALLOWED and not facts['broken']
    assert facts['seen'] == ROWS and facts['total'] == sum(facts['each']) * ROWS // 6     # all rows, the right pixels
    assert facts[stage] < ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['copied', 'written'])
def test_the_measurement_sees_pixels_that_are_held(facts, stage):
    "The control: a copy, and writing in place (copy-on-write), do take the memory. The file stays as it was."
    assert facts[stage] > .9 * PIXELS > ALLOWED and facts['intact']


def test_a_file_larger_than_memory_and_swap_can_be_mapped(tmp_path):
    "Linux refuses a private mapping that it could not keep in memory, unless it is told that none will be needed."
    info = dict(line.split(':') for line in Path('/proc/meminfo').read_text().splitlines())
    memory = sum(int(info[key].split()[0]) * 1024 for key in ('MemTotal', 'SwapTotal'))
    policy = Path('/proc/sys/vm/overcommit_memory').read_text().strip()
    if policy == '2':
        pytest.skip('this machine reserves memory for every private mapping (vm.overcommit_memory = 2)')
    path = tmp_path / 'hole.npy'
    np.lib.format.open_memmap(path, 'w+', np.uint8, (2 * memory // (3 * 256 ** 2), 3, 256, 256))     # no disk is used
    if policy == '0':
        with pytest.raises(OSError, match='Cannot allocate memory'):
            np.load(path, mmap_mode='c')
    images = torch.from_numpy(map_pixels(path))
    assert images.nbytes > 1.9 * memory and not images[-1].any()
    images[-1] = 7                                            # this process's copy
    assert images[-1].all() and not map_pixels(path)[-1].any()
