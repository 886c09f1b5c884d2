"""What torch.compile does for the trunk's blocks: speed, seconds to compile, graphs and breaks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engine.assemble import compile_blocks
from kernels.attention import resolve
from model.initialise import initialise
from model.trunk import Trunk
from profiling.machine import device, precision_label, training_dtype
from profiling.measurement import Recorder
from profiling.workload import small_step

CROPS = {"clip": (8, 256), "ssl_local": (16, 96)}  # name: crops, side in pixels


def run(recorder: Recorder) -> None:
    """Time a ViT-S trunk over packed crops of a step, forward and backward, eager and compiled."""
    eager, compiled = _trunk(), _trunk()
    crops = {name: torch.randn(count, 3, size, size, device=device()) for name, (count, size) in CROPS.items()}
    compile_blocks(compiled)
    counters.clear()
    begin = time.perf_counter()
    torch.testing.assert_close(value_of(compiled, crops), value_of(eager, crops), atol=0, rtol=0.02)  # bf16
    step_of(compiled, crops)()
    seconds = time.perf_counter() - begin
    stats = f"{counters['stats']['unique_graphs']} graphs, {sum(counters['graph_break'].values())} breaks"
    tokens = eager.layout(crops).tokens
    recorder.add(
        recorder.measure(
            "compile",
            f"ViT-S trunk, {tokens} tokens, {precision_label()}, forward and backward",
            {"eager": step_of(eager, crops), "compiled": step_of(compiled, crops)},
            "eager",
            notes=(f"first compiled step, caches included: {seconds:.0f} s; {stats}",),
        )
    )


def _trunk() -> Trunk:
    config = small_step()
    trunk = Trunk(config.model, resolve("auto", device(), training_dtype()).name)
    initialise(trunk, config)
    return trunk.to(device(), training_dtype())


def value_of(trunk: Trunk, crops: dict[str, Tensor]) -> Tensor:
    """A number that every token of the trunk's output goes into."""
    return trunk(crops, {}).float().pow(2).mean()


def step_of(trunk: Trunk, crops: dict[str, Tensor]) -> Callable[[], object]:
    """A forward and a backward pass, to the weights of the blocks."""
    weights = list(trunk.blocks.parameters())
    return lambda: torch.autograd.grad(value_of(trunk, crops), weights)
