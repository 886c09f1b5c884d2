"""The device: its name, its peak FLOP/s and bandwidth by data sheet or measured, and timing of variants side by side.

    describe()                                {"device": "AMD EPYC (family 25, model 17)", "threads": 2, ...}
    peak("NVIDIA H100 80GB HBM3", "bf16")     # PeakFlops(989.4e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM")
    peak("NVIDIA A100-SXM4-80GB", "fp8")      # None: it has no FP8 products
    bandwidth("NVIDIA H100 80GB HBM3")        # MemoryBandwidth(3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM")
    measured_peak("fp32")                     # PeakFlops(1.4e11, "measured: ..."): a CPU, on the threads in use
    measured_bandwidth()                      # MemoryBandwidth(1.1e10, "measured: ..."): of this process's share
    times = time_variants({"plain": plain, "fused": fused}, rounds=11)
    times["fused"].median                     # seconds
    times.ratio("plain", "fused")             # 1.8: the median over rounds of plain's time / fused's time

Data sheets: dense products with float32 sums. They print twice as much, "with sparsity"; where one prints that alone,
half of it is taken. A device that is not in the table has no peak. MFU in the benches is against the measured peak.

Ratios are paired: both times of a quotient are of one round. On a shared machine single times vary by half, medians by
a tenth, paired ratios by a few percent.
"""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from configs import UserError


@dataclass(frozen=True)
class VariantTimes:
    """Seconds of one variant, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 with fewer than 4 rounds."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class PairedTimes(dict[str, VariantTimes]):
    """Variant -> its times, all of the same rounds."""

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long `slow` takes as `fast`: the median over rounds."""
        pairs = zip(self[slow].seconds, self[fast].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def time_variants(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmups: int = 2,
    on_timing: Callable[[str, int, float], None] = lambda name, number, seconds: None,
) -> PairedTimes:
    """Time every variant once a round, in an order that rotates; waits for the GPU where there is one.

    `warmups` calls of each come first and do not count: they compile, allocate and fill caches. `on_timing` is
    called with variant, round and seconds after every call; the last warm-up call is round 0, those before it -1, ...
    """
    for name, call in variants.items():
        for number in range(1 - warmups, 1):
            on_timing(name, number, _time(call))
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_time(variants[name]))
            on_timing(name, number + 1, seconds[name][-1])
    return PairedTimes({name: VariantTimes(tuple(seconds[name])) for name in names})


def _time(call: Callable[[], object]) -> float:
    _wait()
    begin = time.perf_counter()
    result = call()
    _wait()
    seconds = time.perf_counter() - begin
    del result  # freeing it is not the variant's time
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


T = TypeVar("T")
NO_BF16 = "this machine has no fast bf16 matrix products"
TRIAD_MIB = 32  # of each of three arrays: together beyond a rank's share of any cache but the very largest


def device() -> torch.device:
    """The device that benches use: the GPU if there is one."""
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


def by_device(*, cpu: T, cuda: T) -> T:
    """Choose a bench's size by device: on a GPU as in a run there, on a CPU so that it takes seconds."""
    return {"cpu": cpu, "cuda": cuda}[device().type]


def describe() -> dict[str, str | int]:
    """Device, threads and versions as the system names them; of a GPU its present clock."""
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
    """FLOP/s of the fastest of some square matrix products (default: three sizes), best of several runs each."""
    sizes = sizes or ((2048, 4096, 8192) if torch.cuda.is_available() else (1024, 2048, 3072))
    return max(_speed(size, dtype) for size in sizes)


def _speed(size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    times = time_variants({"product": lambda: left @ right}, rounds=7)["product"]
    return 2 * size**3 / min(times.seconds)


def triad_peak() -> float:
    """Bytes a second of STREAM's triad, a = b + s c: two arrays read, one written; takes some tenth of a second.

    As in STREAM, that a line is read before it is overwritten does not count.
    """
    a, b, c = (torch.ones(TRIAD_MIB * 2**18, device=device()) for _ in range(3))  # zeros would be one shared page
    times = time_variants({"triad": lambda: torch.add(b, c, alpha=3.0, out=a)}, rounds=5, warmups=1)["triad"]
    return 3 * TRIAD_MIB * 2**20 / min(times.seconds)


def processor() -> str:
    """Name of the CPU, family and model included."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return (
        f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family')}, model {facts.get('model')})"
    )


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUGH_SIZE = 1024  # of the square product that measures a CPU: larger ones take seconds and are no faster


@dataclass(frozen=True)
class PeakFlops:
    """FLOP/s, and the source of the number."""

    flops_per_second: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e12:,.4g} TFLOP/s ({self.source})"


@dataclass(frozen=True)
class MemoryBandwidth:
    """Bytes a second between a device and its memory, and the source of the number."""

    bytes_per_second: float
    source: str

    def __str__(self) -> str:
        return f"{self.bytes_per_second / 1e9:,.4g} GB/s ({self.source})"


@dataclass(frozen=True)
class GpuDataSheet:
    """`name` matches all of torch.cuda.get_device_name after "NVIDIA "; TFLOP/s, dense; TB/s."""

    name: str
    bf16: float
    fp8: float | None
    memory: float
    source: str


_SAME = "differs in links and float64 alone"
_GPUS = (
    GpuDataSheet(r"A100-SXM.*80GB", 312, None, 2.039, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    GpuDataSheet(r"A100 80GB PCIe", 312, None, 1.935, "NVIDIA A100 Tensor Core GPU data sheet, PCIe"),
    GpuDataSheet(r"A100[- ].*40GB", 312, None, 1.555, "NVIDIA A100 Tensor Core GPU data sheet, 40 GB"),
    GpuDataSheet(r"A800-SXM4-80GB", 312, None, 2.039, f"NVIDIA A100 Tensor Core GPU data sheet, SXM; the A800 {_SAME}"),
    GpuDataSheet(
        r"A800 80GB PCIe", 312, None, 1.935, f"NVIDIA A100 Tensor Core GPU data sheet, PCIe; the A800 {_SAME}"
    ),
    GpuDataSheet(
        r"A800[- ].*40GB.*", 312, None, 1.555, f"NVIDIA A100 Tensor Core GPU data sheet, 40 GB; the A800 {_SAME}"
    ),
    GpuDataSheet(r"A30", 165, None, 0.933, "NVIDIA A30 Tensor Core GPU data sheet"),
    GpuDataSheet(r"A40", 149.7, None, 0.696, "NVIDIA A40 data sheet"),
    GpuDataSheet(r"A10", 125, None, 0.6, "NVIDIA A10 Tensor Core GPU data sheet"),
    GpuDataSheet(r"RTX A6000", 154.8, None, 0.768, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    GpuDataSheet(r"GeForce RTX 3090", 71, None, 0.936, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    GpuDataSheet(r"H100 PCIe", 756.5, 1513, 2, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    GpuDataSheet(r"H800 PCIe", 756.5, 1513, 2, f"NVIDIA H100 Tensor Core GPU data sheet, PCIe; the H800 {_SAME}"),
    GpuDataSheet(r"H100 NVL", 835.5, 1670.5, 3.9, "NVIDIA H100 Tensor Core GPU data sheet, NVL"),
    GpuDataSheet(r"H200 NVL", 835.5, 1670.5, 4.8, "NVIDIA H200 Tensor Core GPU data sheet, NVL"),
    GpuDataSheet(r"H100 80GB HBM3", 989.4, 1978.9, 3.35, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    GpuDataSheet(r"H800", 989.4, 1978.9, 3.35, f"NVIDIA H100 Tensor Core GPU data sheet, SXM; the H800 {_SAME}"),
    GpuDataSheet(r"H200", 989.4, 1978.9, 4.8, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    GpuDataSheet(r"GH200 480GB", 989.4, 1978.9, 4, "NVIDIA GH200 Grace Hopper Superchip data sheet, 96 GB of HBM3"),
    GpuDataSheet(r"GH200 144G HBM3e", 989.4, 1978.9, 4.9, "NVIDIA GH200 Grace Hopper Superchip data sheet, HBM3e"),
    GpuDataSheet(r"B200", 2250, 4500, 8, "NVIDIA DGX B200 data sheet, one of 8 GPUs"),
    GpuDataSheet(r"GB200", 2500, 5000, 8, "NVIDIA GB200 NVL72 data sheet, one of 72 GPUs"),
    GpuDataSheet(r"L4", 121, 242.5, 0.3, "NVIDIA L4 Tensor Core GPU data sheet"),
    GpuDataSheet(r"L40", 181.05, 362, 0.864, "NVIDIA L40 data sheet"),
    GpuDataSheet(r"L40S", 362.05, 733, 0.864, "NVIDIA L40S data sheet"),
    GpuDataSheet(r"RTX 6000 Ada Generation", 364.2, 728.5, 0.96, "NVIDIA RTX 6000 Ada Generation data sheet"),
    GpuDataSheet(r"GeForce RTX 4090", 165.2, 330.3, 1.008, "NVIDIA Ada GPU architecture whitepaper"),
)


def peak(device: str, precision: str) -> PeakFlops | None:
    """Peak of the GPU that CUDA calls `device`, for products in "bf16" or "fp8". None where no data sheet is known:
    another name (a slice of a GPU has one), FP8 on a GPU without it, "fp32"."""
    gpu = _known(device)
    tera = {"bf16": gpu.bf16, "fp8": gpu.fp8}.get(precision) if gpu else None
    return PeakFlops(tera * 1e12, gpu.source) if gpu and tera else None


def bandwidth(device: str) -> MemoryBandwidth | None:
    """Memory bandwidth of the GPU that CUDA calls `device`; None where no data sheet is known."""
    gpu = _known(device)
    return MemoryBandwidth(gpu.memory * 1e12, gpu.source) if gpu else None


def _known(device: str) -> GpuDataSheet | None:
    name = device.removeprefix("NVIDIA ")
    return next((gpu for gpu in _GPUS if re.fullmatch(gpu.name, name) and " MIG " not in name), None)


def measured_peak(precision: str) -> PeakFlops:
    """Measure this CPU's peak on torch's present threads, in "bf16" or "fp32"; takes a fraction of a second."""
    speed = matmul_peak(DTYPES[precision], (ROUGH_SIZE,))
    return PeakFlops(speed, f"measured: {ROUGH_SIZE} x {ROUGH_SIZE} products in {precision} on {_threads()}")


def measured_bandwidth() -> MemoryBandwidth:
    """Measure this process's memory bandwidth on torch's present threads: STREAM's triad (a = b + s c), the best of
    five. Ranks that call it together share the memory, as their steps do."""
    return MemoryBandwidth(triad_peak(), f"measured: triad of three float32 arrays of {TRIAD_MIB} MiB on {_threads()}")


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread{'' if threads == 1 else 's'}"
