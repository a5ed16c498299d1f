"""What the tests share: the markers of tests that not every machine runs, and the figures that some of them report."""
import json
import os
from pathlib import Path

import check
import pytest
import torch
from PIL import Image

from scott.data.petals import petals
from scott.train.machine import describe_machine

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # deterministic products on a GPU; read when CUDA starts


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: long by nature: `make test-slow` runs it, `make test` does not')
    config.addinivalue_line('markers', 'cuda: needs a CUDA device')
    config.figures = []


@pytest.fixture(scope='module')
def one_thread():
    "Sums over several threads may be added in another order; with one thread, bits can be compared across processes."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gap(ours, theirs):
    "max|ours − theirs| / max(1, max|theirs|): rounding grows with the values, and processors add in other orders."
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def write_images(folder, count, size=32, classes=('a', 'b', 'c')):
    "Small PNG flowers, one sub-folder a class."
    for i, image in enumerate(petals(count, size)[0]):
        path = folder / classes[i % len(classes)] / f'{i:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def tensors(tree):
    "Every tensor and number of a nested state, in order."
    if isinstance(tree, dict): tree = [tree[k] for k in sorted(tree, key=str)]
    if isinstance(tree, (list, tuple)): return [t for branch in tree for t in tensors(branch)]
    return [torch.as_tensor(tree)] if isinstance(tree, (torch.Tensor, int, float)) else []


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    "A folder with the package as pip installs it from a wheel, and each page in a folder of its own."
    place = tmp_path_factory.mktemp('alone')
    check.alone(place)
    return place


@pytest.fixture
def figure(request):
    "Call it with a promise and what was measured, after the assertions; see `pytest_sessionfinish`."
    def note(promise, measured):
        where = request.node.nodeid.split('/')[-1]
        request.config.figures.append(dict(promise=promise, measured=measured, test=where))
    return note


def pytest_sessionfinish(session, exitstatus):
    "`SCOTT_FIGURES=nbs/results/reliability.json pytest tests` writes the figures down if every test passed."
    path = os.environ.get('SCOTT_FIGURES')
    if path and exitstatus == 0:
        record = dict(command='SCOTT_FIGURES=nbs/results/reliability.json python -m pytest tests',
                      machine=describe_machine(torch.device('cpu')),
                      figures=sorted(session.config.figures, key=lambda f: f['promise']))
        Path(path).write_text(json.dumps(record, indent=1) + '\n')
