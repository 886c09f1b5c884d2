"""Every backend the engine can choose: whether it runs here, why not, how to get it; and what `auto` becomes.

The rules are the engine's own: each check asks the function a run asks at its start, and repeats its reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from configs import Config, UserError
from profiling.checks.finding import Finding
from profiling.checks.imports import Answer

GPU = "use a machine with an NVIDIA GPU"
UNASKED = Answer("ok", "")  # about a module that no package of the doctor's list is: part of torch
TRITON = "pip install triton -c constraints.txt"
COMPILER = "install a C++ compiler and ninja (on Debian: apt-get install g++ ninja-build)"


@dataclass(frozen=True)
class Plan:
    """The run the choices are made for."""

    config: Config
    ds_config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The GPU where torch sees one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(plan: Plan, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """system.attention: each name, then auto."""
    from engine.zero import DTYPES
    from kernels.attention import NEEDS, missing, resolve
    from kernels.dense_attention import DENSE

    dtype = DTYPES[plan.config.optim.precision]
    for name in DENSE:
        yield Finding(f"attention {name}", "ok", "part of torch, one call per segment length")
    for name, need in NEEDS.items():
        obstacle, answer = missing(name, plan.device, dtype), answers.get(need.module, UNASKED)
        said, _, remedy = (obstacle or "").partition("; ")
        remedy = remedy or f"{GPU}: {'Hopper' if name == 'flash3' else 'Ampere or newer'}"
        if answer.state == "broken":
            yield Finding(f"attention {name}", "broken", answer.said, f"install it anew: {need.remedy}")
        elif obstacle is not None:
            yield Finding(f"attention {name}", "absent", said, remedy)
        else:
            yield Finding(f"attention {name}", "ok", "one call for all segments")
    backend = resolve(plan.config.system.attention, plan.device, dtype)
    name, said = "attention in this run", f"{backend.name} ({backend.reason})"
    module = NEEDS[backend.name].module if backend.name in NEEDS else ""
    if answers.get(module, UNASKED).state == "broken":  # it is found, chosen, and fails in the first step
        remedy = f"mend {module}, or set system.attention=sdpa"
        yield Finding(name, "broken", f"{said}: but {module} does not import", remedy, is_needed=True)
    else:
        yield Finding(name, "ok", said)


def products(plan: Plan, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """system.linear."""
    libraries = {"fp8_torchao": "torchao", "fp8_te": "transformer_engine"}
    for name, module in libraries.items():
        yield _product(name, plan.device, answers.get(module, UNASKED))
    yield Finding("linear in this run", "ok", f"{plan.config.system.linear} (system.linear)")


def _product(name: str, device: torch.device, answer: Answer) -> Finding:
    from kernels import fp8

    remedy = f"{GPU} of compute capability 8.9 or newer"
    if answer.state != "ok":
        remedy = f"{fp8.INSTALL_COMMANDS[name]}; {remedy}"
    if answer.state == "broken":
        return Finding(f"linear {name}", "broken", answer.said, remedy)
    try:
        found = fp8.resolve(name, device)
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        return Finding(f"linear {name}", "absent", str(error), remedy)
    return Finding(f"linear {name}", "ok", found.reason.removeprefix("named in the config; "))


def optimizers(plan: Plan, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """system.optimizer: which can step here; whether DeepSpeed's can be built."""
    from engine import optim, zero

    yield Finding("optimizer torch_fused", "ok", "part of torch, on CPU and GPU")
    is_cuda = plan.device.type == "cuda"
    for name, operator in {"deepspeed": "fused_adam", "deepspeed_cpu": "cpu_adam"}.items():
        lacking = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
        lacking += ["nvcc"] if name == "deepspeed" and is_cuda and shutil.which("nvcc") is None else []
        if lacking:
            said = f"DeepSpeed builds it at its first use, {' and '.join(lacking)} missing"
            yield Finding(f"optimizer {name}", "absent", said, f"{COMPILER}; for GPU operators CUDA's toolkit too")
        elif not zero.can_build(operator):
            said = f"DeepSpeed holds its operator {operator} to be impossible here"
            yield Finding(f"optimizer {name}", "absent", said, "see `ds_report`; torch_fused needs nothing")
        else:
            yield Finding(f"optimizer {name}", "ok", "built by DeepSpeed at its first use")
    apex = answers.get("apex.optimizers", Answer("absent", "not asked"))
    remedy = "" if apex.state == "ok" else optim.APEX_INSTALL
    yield Finding("optimizer apex", apex.state, apex.said or "installed", remedy)
    choice = optim.resolve(plan.config, plan.ds_config, plan.device)
    yield Finding("optimizer in this run", "ok", f"{plan.config.optim.kind} by {choice.name} ({choice.reason})")


def compiling(plan: Plan, answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """system.compile, and the compiler that torch.compile generates code for."""
    from engine.assemble import resolve_compile

    compiler = os.environ.get("CXX", "g++")
    where = shutil.which(compiler)
    if where is None:
        yield Finding("compiler", "absent", f"no {compiler}: torch.compile generates C++ and needs one", COMPILER)
    elif plan.device.type == "cuda" and answers.get("triton", UNASKED).state != "ok":
        yield Finding("compiler", "absent", "torch.compile generates Triton for GPUs", TRITON)
    else:
        yield Finding("compiler", "ok", f"{where}, for torch.compile")
    is_compiled, why = resolve_compile(plan.config, plan.device)
    yield Finding("compile in this run", "ok", f"{'on' if is_compiled else 'off'} ({why})")


def decoding() -> Iterator[Finding]:
    """system.loader.device: a picture decoded by DALI on each."""
    from data.decode import Decoder, Picture

    for device in ("cpu", "gpu"):
        try:
            decoder = Decoder(device)
        except UserError as error:
            yield Finding(f"decoding {device}", "absent", str(error), f"{GPU}; the CPU decodes here")
            continue
        [found] = decoder.decode([_jpeg()])
        decoder.close()
        if isinstance(found, Picture):
            said = f"DALI decodes on the {device.upper()}: a JPEG of {found.width} x {found.height} pixels came out"
            yield Finding(f"decoding {device}", "ok", said, is_needed=device == "cpu")
        else:
            yield Finding(f"decoding {device}", "broken", f"DALI: {found}", "install nvidia-dali-cuda130 anew",
                          is_needed=device == "cpu")  # fmt: skip


def energy(plan: Plan) -> Iterator[Finding]:
    """NVML, or the processor's counters."""
    from profiling.energy import EnergyMeter

    with EnergyMeter(plan.device) as meter:
        if meter.is_measuring:
            yield Finding("energy", "ok", meter.said)
        else:
            remedy = (
                "runs go on without; it takes an NVIDIA driver with nvidia-ml-py, or a readable /sys/class/powercap"
            )
            yield Finding("energy", "absent", meter.said, remedy)


def _jpeg() -> bytes:
    import io

    from PIL import Image

    with io.BytesIO() as file:
        Image.new("RGB", (48, 32), (200, 30, 30)).save(file, "JPEG")
        return file.getvalue()
