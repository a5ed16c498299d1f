"""Which device computes, in which number type, and what stands beside every number: the machine it was made on."""

import os
import platform
from typing import NamedTuple

import torch

from .. import __version__
from ..cli import InputError

class Place(NamedTuple):
    "Where a network runs."
    device: torch.device
    dtype: torch.dtype | None  # the type of autocast; None = float32 throughout

def pick_device(
    device: str = 'auto',  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'
    amp: str = 'auto',  # 'auto', 'bf16', 'fp16' or 'off'
) -> Place:
    "The device and its fast 16-bit type: bf16 on GPUs from capability 8 and on CPUs that have it, fp16 on older GPUs."
    found = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kinds = ('cpu', 'cuda', 'mps')
    try: place = torch.device(found if device == 'auto' else device)
    except RuntimeError as e:
        raise InputError(f'--device {device}: there is no such device; use auto, cpu, mps, cuda or cuda:N') from e
    if place.type not in kinds: raise InputError(f'--device {device}: only {", ".join(kinds)} are known here')
    if place.type == 'cuda' and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f'--device {device}: PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu')
    if place.type == 'mps' and not torch.backends.mps.is_available():
        raise InputError('--device mps: PyTorch finds no Apple GPU here; use --device cpu')
    if place.type == 'mps' and amp == 'fp16':
        raise InputError('--amp fp16: no loss scaling is known for mps; use --amp off or bf16')
    if amp == 'auto' and place.type == 'cuda':
        amp = 'bf16' if torch.cuda.get_device_capability(place)[0] >= 8 else 'fp16'
    elif amp == 'auto':
        amp = 'bf16' if place.type == 'cpu' and has_bf16_units() else 'off'
    return Place(place, dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)[amp])

def has_bf16_units() -> bool:
    "Whether this CPU multiplies bfloat16 numbers in hardware (AVX-512 BF16 or AMX)."
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities != 'AVX512': return False
    try: flags = next(line for line in open('/proc/cpuinfo') if line.startswith('flags')).split()
    except (OSError, StopIteration): return False
    return 'avx512_bf16' in flags or 'amx_bf16' in flags

def describe_machine(
    device: torch.device,
) -> dict:  # names and versions, to stand beside every number
    "The hardware and software a number was made with."
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')),
               platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu
    return dict(device=device.type, hardware=name, threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(), scott=__version__)
