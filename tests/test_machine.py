"""Devices that this machine may not have: what is picked, what is refused, and in which number type."""
import platform
import warnings
from pathlib import Path

import pytest
import torch

from scott import __version__
from scott.cli import InputError
from scott.train import machine
from scott.train.machine import Place, cpu_fact, describe_machine, has_bf16_units, pick_device

CPU, BF16, FP16 = torch.device('cpu'), torch.bfloat16, torch.float16


@pytest.fixture
def pretend(monkeypatch):
    "Call it with the GPUs' compute capabilities, whether there is an Apple GPU, and whether the CPU has bf16 units."
    def use(gpus=(), mps=False, units=False):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: gpus[device.index or 0])
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(machine, 'has_bf16_units', lambda: units)
    return use


def refused(*words, **flags):
    with pytest.raises(InputError) as error: pick_device(**flags)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_a_cpu(pretend):
    for units, fast in ((True, BF16), (False, None)):
        pretend(units=units)
        assert pick_device() == pick_device('cpu') == Place(CPU, fast)
        assert [pick_device('cpu', amp).dtype for amp in ('off', 'bf16', 'fp16')] == [None, BF16, FP16]


def test_a_gpu(pretend):
    pretend(gpus=[(7, 5), (8, 0), (9, 0)], units=True)
    assert pick_device() == (torch.device('cuda'), FP16)  # the first one is a T4
    assert [pick_device(f'cuda:{n}').dtype for n in range(3)] == [FP16, BF16, BF16]
    assert pick_device('cuda:0', 'off').dtype is None and pick_device('cpu') == (CPU, BF16)
    refused('--device cuda:7', 'PyTorch sees 3 GPUs', 'use --device auto', device='cuda:7')


def test_no_gpu(pretend):
    pretend()
    for device in ('cuda', 'cuda:0', 'cuda:7'):
        refused(f'--device {device}:', 'PyTorch sees 0 GPUs', 'use --device auto', device=device)
    refused('--device mps', 'no Apple GPU', 'use --device auto', device='mps')


def test_an_apple_gpu_is_asked_for(pretend):
    pretend(mps=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pick_device().device == CPU  # nobody has run it there, so `auto` leaves it
    with pytest.warns(UserWarning, match='--device mps is untested.*use --device cpu'):
        assert pick_device('mps') == (torch.device('mps'), None)
    with pytest.warns(UserWarning, match='untested'): assert pick_device('mps', 'bf16').dtype is BF16
    refused('--amp fp16', 'use --amp off or bf16', device='mps', amp='fp16')


@pytest.mark.parametrize('device', ['tpu', 'cuda:one', 'cuda:-1', 'cuda:01', 'CUDA', 'meta', 'hpu', 'gpu', ''])
def test_no_device_at_all(device, pretend):
    pretend(gpus=[(9, 0)], mps=True)
    refused(f'--device {device}:', 'use auto', device=device)


def test_an_intel_gpu_is_refused_with_the_reason(pretend):
    pretend(gpus=[(9, 0)])
    for device in ('xpu', 'xpu:0'): refused(f'--device {device}:', 'Intel', 'use --device cpu', device=device)


@pytest.mark.parametrize('number', [128, 256, 257, 300])
def test_a_large_number_is_no_small_one(number, pretend):
    "PyTorch keeps eight bits of it: cuda:256 would be the first GPU."
    pretend(gpus=[(9, 0)] * 2)
    refused(f'--device cuda:{number}:', 'there is no such device', device=f'cuda:{number}')


def test_there_is_one_cpu_and_one_apple_gpu(pretend):
    pretend(mps=True)
    refused('--device cpu:1:', 'use --device cpu', device='cpu:1')
    refused('--device mps:1:', 'use --device mps', device='mps:1')
    assert pick_device('cpu:0').device == torch.device('cpu:0')


LINUX = 'processor\t: 0\nmodel name\t: A CPU: the first\nflags\t\t: fpu sse2 {}\n\nprocessor\t: 1\nflags\t: amx_bf16\n'

@pytest.mark.parametrize('flags, capability, units', [
    ('avx2 avx512f avx512_bf16', 'AVX512', True), ('avx512f amx_bf16 amx_tile', 'AVX512', True),
    ('avx2 avx512f', 'AVX512', False), ('avx512_bf16', 'AVX2', False), ('avx512_bf16x', 'AVX512', False)])
def test_bf16_units(monkeypatch, flags, capability, units):
    monkeypatch.setattr(Path, 'read_text', lambda path: LINUX.format(flags))
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert has_bf16_units() is units
    assert cpu_fact('model name') == 'A CPU: the first' and cpu_fact('bogomips') is None
    assert describe_machine(CPU)['hardware'] == 'A CPU: the first'


def test_other_systems_than_linux(monkeypatch):
    def missing(path): raise FileNotFoundError(path)
    monkeypatch.setattr(Path, 'read_text', missing)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    monkeypatch.setattr(platform, 'processor', lambda: 'arm')
    assert cpu_fact('flags') is None and not has_bf16_units() and describe_machine(CPU)['hardware'] == 'arm'


def test_the_machine_names_device_and_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'GPU {device.index}')
    facts = describe_machine(torch.device('cuda:1'))
    assert facts['device'] == 'cuda' and facts['hardware'] == 'GPU 1' and facts['scott'] == __version__
    assert facts['torch'] == torch.__version__ and facts['threads'] == torch.get_num_threads()
