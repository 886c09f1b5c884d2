"""What a figure was measured on, and how fast that is at best.

describe()                         {"device": "AMD EPYC (family 25, model 17)", "threads": 2, "torch": "2.13.0+cpu"}
matmul_peak(torch.bfloat16)        9.1e11 FLOP/s: the best of a few square products, here and now
triad_peak()                       1.1e10 bytes/s to and from memory: the best of a few passes

MFU in the benches is against this measured peak, not against a data sheet: a shared CPU has none.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from configs import UserError
from profiling.clock import alternate

T = TypeVar("T")
NO_BF16 = "this machine has no fast bf16 matrix products"
TRIAD_MIB = 32  # of each of three arrays: together beyond a rank's share of any cache but the very largest


def device() -> torch.device:
    """What benches run on: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def training_dtype() -> torch.dtype:
    """Return the dtype that benches train in: bf16, as runs do, or float32 where the machine only emulates bf16.

    Emulated products, as on a processor with no more than AVX2, take about thirty times as long.
    """
    if device().type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def precision_label() -> str:
    """Return the name of `training_dtype` for a table, with the reason where it is float32."""
    return "bf16" if training_dtype() == torch.bfloat16 else f"float32 ({NO_BF16})"


def precision_overrides() -> tuple[str, ...]:
    """Return the config overrides that make a preset train in `training_dtype`."""
    return () if training_dtype() == torch.bfloat16 else ("optim.precision=fp32",)


def compared_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that a bench compares: bf16 first, unless the machine only emulates it, and float32."""
    return tuple(dict.fromkeys((training_dtype(), torch.float32)))


def require_bf16() -> None:
    """Raise UserError on a machine that only emulates bf16 products."""
    if training_dtype() != torch.bfloat16:
        raise UserError(f"{NO_BF16}, and this bench compares FP8 with bf16: run it on another machine")


def sized(*, cpu: T, cuda: T) -> T:
    """A bench's size on what it runs on: on a GPU as in a run there, on a CPU so that it takes seconds."""
    return {"cpu": cpu, "cuda": cuda}[device().type]


def describe() -> dict[str, str | int]:
    """Device, threads and versions, in the words of the system; of a GPU the clock of now."""
    clock: dict[str, str | int] = {}
    if torch.cuda.is_available():
        with suppress(ImportError, RuntimeError):  # it takes nvidia-ml-py, and a driver that answers
            clock = {"clock in MHz": torch.cuda.clock_rate()}
    return clock | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def matmul_peak(dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> float:
    """FLOP/s of the fastest of some square matrix products, three unless told, best of several runs each."""
    sizes = sizes or ((2048, 4096, 8192) if torch.cuda.is_available() else (1024, 2048, 3072))
    return max(_speed(size, dtype) for size in sizes)


def _speed(size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    times = alternate({"product": lambda: left @ right}, rounds=7)["product"]
    return 2 * size**3 / min(times.seconds)


def triad_peak() -> float:
    """Bytes a second of a = b + s c: two arrays read, one written; in some tenth of a second.

    As in STREAM, that a line is read before it is written over does not count.
    """
    a, b, c = (torch.ones(TRIAD_MIB * 2**18, device=device()) for _ in range(3))  # zeros would be one shared page
    times = alternate({"triad": lambda: torch.add(b, c, alpha=3.0, out=a)}, rounds=5, warmups=1)["triad"]
    return 3 * TRIAD_MIB * 2**20 / min(times.seconds)


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )
