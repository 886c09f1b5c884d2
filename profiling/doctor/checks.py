"""Check devices, backends, system limits and speed; each check yields CheckResults.

Backends: whether each one runs here, why not, how to get it, and what `auto` becomes, by the functions that a run calls
at its start. What may be missing (torch, pydantic, the engine) is imported inside the checks.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from profiling.doctor.packages import CheckResult, ImportResult

if TYPE_CHECKING:
    import torch

    from configs import Config

GPU = "use a machine with an NVIDIA GPU"
PART_OF_TORCH = ImportResult("ok", "")  # for modules that are none of the doctor's packages
TRITON = "pip install triton -c constraints.txt"
COMPILER = "install a C++ compiler and ninja (on Debian: apt-get install g++ ninja-build)"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MIN_DISK, MIN_SHARED = 5 * 2**30, 2**30  # bytes
MIN_OPEN_FILES = 1024
MAX_TICK = 1e-5  # seconds; a kernel takes tens of microseconds
NUM_SAMPLES, BATCH = 64, 16  # of the loader's corpus
DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


# --- devices ----------------------------------------------------------------------------------------------------------


def processor_and_memory() -> Iterator[CheckResult]:
    """Name, cores, instructions and memory of the CPU."""
    import torch

    from profiling.instruments.machine import processor

    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    yield CheckResult("CPU", "ok", f"{processor()}: {usable} of {present} cores usable, "
                                   f"{torch.backends.cpu.get_cpu_capability()} instructions")  # fmt: skip
    total, free = memory_bytes()
    is_enough = free > 4 * 2**30
    remedy = "a rank of the demo takes 2 GiB: end other programs, or raise the container's limit"
    yield _limit("memory", is_enough, f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free", remedy)


def gpus() -> Iterator[CheckResult]:
    """Every GPU that torch sees, or why it sees none."""
    import torch

    if not torch.cuda.is_available():
        yield CheckResult("GPU", "absent", *_why_no_gpu(torch.version.cuda))
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield CheckResult(
            f"GPU {index}",
            "ok",
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB; "
            f"CUDA {torch.version.cuda}, NCCL {nccl}",
        )


def memory_bytes() -> tuple[int, int]:
    """(total, free) for this process: the machine's, or what is left of its container's limit."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (1024 * int(facts[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    try:
        limit, used = int(CGROUP_LIMIT.read_text()), int(CGROUP_LIMIT.with_name("memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total, free
    return min(total, limit), min(free, limit - used)


def _why_no_gpu(cuda: str | None) -> tuple[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        return "this torch is built for the CPU alone", "install torch's CUDA build where there is an NVIDIA GPU"
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES"
    if not Path("/dev/nvidiactl").exists():
        return (
            "there is no NVIDIA driver (/dev/nvidiactl is missing)",
            "install the driver; in a container, start it with --gpus all",
        )
    return (
        f"a driver is installed, and CUDA {cuda} of this torch cannot use it",
        "see `nvidia-smi`: the driver may be older than torch's CUDA; update it, or install an older CUDA build",
    )


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedRun:
    """The run whose `auto` settings are resolved."""

    config: Config
    ds_config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The GPU where torch sees one, else the CPU."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention_backends(run: CheckedRun, imports: Mapping[str, ImportResult]) -> Iterator[CheckResult]:
    """system.attention: each name, then auto."""
    from engine.zero import DTYPES
    from kernels.attention import DENSE_KERNELS, REQUIREMENTS, resolve_attention, why_unavailable

    dtype = DTYPES[run.config.optim.precision]
    for name in DENSE_KERNELS:
        yield CheckResult(f"attention {name}", "ok", "part of torch, one call per segment length")
    for name, need in REQUIREMENTS.items():
        obstacle, imported = why_unavailable(name, run.device, dtype), imports.get(need.module, PART_OF_TORCH)
        reason, _, remedy = (obstacle or "").partition("; ")
        remedy = remedy or f"{GPU}: {'Hopper' if name == 'flash3' else 'Ampere or newer'}"
        if imported.state == "broken":
            yield CheckResult(f"attention {name}", "broken", imported.detail, f"reinstall it: {need.remedy}")
        elif obstacle is not None:
            yield CheckResult(f"attention {name}", "absent", reason, remedy)
        else:
            yield CheckResult(f"attention {name}", "ok", "one call for all segments")
    backend = resolve_attention(run.config.system.attention, run.device, dtype)
    name, message = "attention in this run", f"{backend.name} ({backend.reason})"
    module = REQUIREMENTS[backend.name].module if backend.name in REQUIREMENTS else ""
    if imports.get(module, PART_OF_TORCH).state == "broken":  # it is found, chosen, and fails in the first step
        remedy = f"repair {module}, or set system.attention=sdpa"
        yield CheckResult(name, "broken", f"{message}: but {module} does not import", remedy, is_needed=True)
    else:
        yield CheckResult(name, "ok", message)


def linear_backends(run: CheckedRun, imports: Mapping[str, ImportResult]) -> Iterator[CheckResult]:
    """system.linear: FP8 by either library."""
    from kernels import fp8

    for name, module in {"fp8_torchao": "torchao", "fp8_te": "transformer_engine"}.items():
        imported, remedy = imports.get(module, PART_OF_TORCH), f"{GPU} of compute capability 8.9 or newer"
        if imported.state != "ok":
            remedy = f"{fp8.INSTALL_COMMANDS[name]}; {remedy}"
        if imported.state == "broken":
            yield CheckResult(f"linear {name}", "broken", imported.detail, remedy)
            continue
        try:
            reason = fp8.resolve_linears(name, run.device).reason.removeprefix("named in the config; ")
        except (ValueError, ImportError, RuntimeError, OSError) as error:
            yield CheckResult(f"linear {name}", "absent", str(error), remedy)
        else:
            yield CheckResult(f"linear {name}", "ok", reason)
    yield CheckResult("linear in this run", "ok", f"{run.config.system.linear} (system.linear)")


def optimizers(run: CheckedRun, imports: Mapping[str, ImportResult]) -> Iterator[CheckResult]:
    """system.optimizer: which run here, and whether DeepSpeed's can be built."""
    from engine import optim, zero

    yield CheckResult("optimizer torch_fused", "ok", "part of torch, on CPU and GPU")
    is_cuda = run.device.type == "cuda"
    for name, operator in {"deepspeed": "fused_adam", "deepspeed_cpu": "cpu_adam"}.items():
        lacking = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
        lacking += ["nvcc"] if name == "deepspeed" and is_cuda and shutil.which("nvcc") is None else []
        if lacking:
            message = f"DeepSpeed builds it at its first use, {' and '.join(lacking)} missing"
            yield CheckResult(
                f"optimizer {name}", "absent", message, f"{COMPILER}; for GPU operators CUDA's toolkit too"
            )
        elif not zero.can_build(operator):
            message = f"DeepSpeed reports that its operator {operator} cannot be built here"
            yield CheckResult(f"optimizer {name}", "absent", message, "see `ds_report`; torch_fused needs nothing")
        else:
            yield CheckResult(f"optimizer {name}", "ok", "built by DeepSpeed at its first use")
    apex = imports.get("apex.optimizers", ImportResult("absent", "not checked"))
    remedy = "" if apex.state == "ok" else optim.APEX_INSTALL
    yield CheckResult("optimizer apex", apex.state, apex.detail or "installed", remedy)
    choice = optim.resolve(run.config, run.ds_config, run.device)
    yield CheckResult("optimizer in this run", "ok", f"{run.config.optim.kind} by {choice.name} ({choice.reason})")


def compilation(run: CheckedRun, imports: Mapping[str, ImportResult]) -> Iterator[CheckResult]:
    """system.compile, and the compiler that torch.compile generates code for."""
    from engine.build import resolve_compile

    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    if path is None:
        yield CheckResult("compiler", "absent", f"no {compiler}: torch.compile generates C++ and needs one", COMPILER)
    elif run.device.type == "cuda" and imports.get("triton", PART_OF_TORCH).state != "ok":
        yield CheckResult("compiler", "absent", "torch.compile generates Triton for GPUs", TRITON)
    else:
        yield CheckResult("compiler", "ok", f"{path}, for torch.compile")
    is_compiled, reason = resolve_compile(run.config, run.device)
    yield CheckResult("compile in this run", "ok", f"{'on' if is_compiled else 'off'} ({reason})")


def decoding() -> Iterator[CheckResult]:
    """system.loader.device: an image decoded by DALI on each."""
    from PIL import Image

    from configs import UserError
    from data.decode import DecodedImage, Decoder

    with io.BytesIO() as file:
        Image.new("RGB", (48, 32), (200, 30, 30)).save(file, "JPEG")
        jpeg = file.getvalue()
    for device in ("cpu", "gpu"):
        try:
            decoder = Decoder(device)
        except UserError as error:
            yield CheckResult(f"decoding {device}", "absent", str(error), f"{GPU}; the CPU decodes here")
            continue
        [decoded] = decoder.decode([jpeg])
        decoder.close()
        is_needed = device == "cpu"
        if isinstance(decoded, DecodedImage):
            size = f"{decoded.width} x {decoded.height} pixels"
            message = f"DALI decodes on the {device.upper()}: a JPEG of {size} came out"
            yield CheckResult(f"decoding {device}", "ok", message, is_needed=is_needed)
        else:
            remedy = "reinstall nvidia-dali-cuda130"
            yield CheckResult(f"decoding {device}", "broken", f"DALI: {decoded}", remedy, is_needed)


def energy(run: CheckedRun) -> Iterator[CheckResult]:
    """NVML, or the processor's counters."""
    from profiling.instruments.energy import EnergyMeter

    with EnergyMeter(run.device) as meter:
        remedy = ""
        if not meter.is_measuring:
            remedy = (
                "runs go on without; it takes an NVIDIA driver with nvidia-ml-py, or a readable /sys/class/powercap"
            )
        yield CheckResult("energy", "ok" if meter.is_measuring else "absent", meter.description, remedy)


# --- system limits ----------------------------------------------------------------------------------------------------


def limits(folder: Path, shared: Path = Path("/dev/shm")) -> Iterator[CheckResult]:
    """Disk, shared memory, open files and clock; `folder` is where runs are written."""
    free = shutil.disk_usage(folder).free
    yield _limit("disk", free >= MIN_DISK, f"{free / 2**30:.1f} GiB free in {folder}",
                 "make room, or set system.run_dir: a checkpoint takes 16 bytes a parameter")  # fmt: skip
    remedy = "start the container with --shm-size=16g or --ipc=host: ranks of one machine exchange tensors through it"
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        message = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free in {shared}"
        yield _limit("shared memory", usage.free >= MIN_SHARED, message, remedy)
    else:
        yield CheckResult("shared memory", "absent", f"there is no {shared}", remedy)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = "no limit on open files" if files == resource.RLIM_INFINITY else f"{files} files may be open at once"
    is_enough = files == resource.RLIM_INFINITY or files >= MIN_OPEN_FILES
    yield _limit("open files", is_enough, message, "ulimit -n 65536")
    tick = smallest_tick()
    yield _limit("clock", tick <= MAX_TICK, f"time.perf_counter resolves {1e9 * tick:.0f} ns",
                 "steps are timed coarsely: look at /sys/devices/system/clocksource, tsc is the best")  # fmt: skip


def smallest_tick(num_reads: int = 1000) -> float:
    """The smallest difference above zero, in seconds, between two reads of the clock."""
    moments = [time.perf_counter() for _ in range(num_reads)]
    ticks = [after - before for before, after in itertools.pairwise(moments) if after > before]
    return min(ticks, default=float("inf"))


def _limit(name: str, is_ok: bool, message: str, remedy: str) -> CheckResult:
    return CheckResult(name, "ok", message) if is_ok else CheckResult(name, "broken", message, remedy)


# --- speed ------------------------------------------------------------------------------------------------------------


def matmul_speed() -> Iterator[CheckResult]:
    """The fastest square matrix product in bf16 and fp32."""
    import torch

    from profiling.instruments.machine import device, matmul_peak

    speeds = {dtype: matmul_peak(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, speed in speeds.items():
        name = str(dtype).removeprefix("torch.")
        yield CheckResult(f"product {name}", "ok", f"{speed / 1e12:.2f} TFLOP/s on the {device().type.upper()}")
    ratio = speeds[torch.bfloat16] / speeds[torch.float32]
    if ratio < 1:
        yield CheckResult(
            "bf16",
            "absent",
            f"bf16 is slower than fp32 here ({ratio:.2f} times its speed): this processor emulates it",
            "train with optim.precision=fp32 on this machine",
        )


def loader_speed() -> Iterator[CheckResult]:
    """Write, index, read and decode shards of a few drawn images, with the demo's views."""
    from configs import load_config
    from data.captions import CaptionEncoder
    from data.corpora.synthetic_images import synthetic_plan
    from data.corpus import build
    from data.loader import BatchLoader

    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        build(corpus, synthetic_plan(NUM_SAMPLES, held_out=0, size=64, shard_size=NUM_SAMPLES, seed=0, workers=1))
        config = load_config(
            DEMO,
            [
                f"data.train=[{corpus}/train-*.tar]",
                f"data.tokenizer={corpus}/tokenizer.json",
                "data.streams=1",
                f"batch={{clip: {BATCH}, ssl: {BATCH // 4}, rec: {BATCH // 2}}}",
            ],
        )
        encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
        with closing(BatchLoader(config, encoder)) as loader:
            loader.batch(0)  # warms up
            begin, steps = time.perf_counter(), NUM_SAMPLES // BATCH
            loaded = sum(len(loader.batch(step).images) for step in range(1, steps + 1))
            seconds = time.perf_counter() - begin
    threads = config.system.loader.threads
    assert loaded == NUM_SAMPLES, f"{loaded} of {NUM_SAMPLES} images came"
    speed = f"{loaded / seconds:.0f} images/s with all views of the demo, {threads} threads"
    yield CheckResult("loader", "ok", f"{speed} ({NUM_SAMPLES} drawn scenes, 64 px)", is_needed=True)
