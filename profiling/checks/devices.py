"""The processor, its memory, and the GPUs that torch can use; where there is none, the likely cause."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from profiling.checks.finding import Finding

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def processor() -> Iterator[Finding]:
    """Name, cores, instructions and memory of the CPU."""
    import torch

    from profiling.machine import processor

    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    yield Finding("CPU", "ok", f"{processor()}: {usable} of {present} cores usable, "
                               f"{torch.backends.cpu.get_cpu_capability()} instructions")  # fmt: skip
    total, free = memory_bytes()
    is_enough = free > 4 * 2**30
    yield Finding(
        "memory",
        "ok" if is_enough else "broken",
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "" if is_enough else "a rank of the demo takes 2 GiB: end other programs, or raise the container's limit",
    )


def gpus() -> Iterator[Finding]:
    """Every GPU torch sees, or why it sees none."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "absent", *_why_none(torch.version.cuda))
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(
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


def _why_none(cuda: str | None) -> tuple[str, str]:
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
        f"a driver is there, and CUDA {cuda} of this torch cannot use it",
        "see `nvidia-smi`: the driver may be older than torch's CUDA; update it, or install an older CUDA build",
    )
