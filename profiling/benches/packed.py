"""The trunk over all crops of a step as one packed sequence, against a pass for each kind of crop; with backward.

Clip images and the global and local crops of a quarter of them, at the presets' sizes: ViT-B on a GPU, a ViT-S with few
images on a CPU. Both trunks hold the same weights, eager and compiled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from configs import Config
from engine.assemble import compile_blocks
from kernels.attention import resolve
from model.initialise import initialise
from model.trunk import Trunk
from profiling.benches.compile import step_of, value_of
from profiling.benches.one_rank import configured
from profiling.machine import device, precision_label, sized, training_dtype
from profiling.measurement import Recorder
from profiling.step.three_pass import SeparateTrunk

DRY = ("study_mini", 8)
PRESET, IMAGES = sized(cuda=("vtp_b", 128), cpu=("vtp_s", 8))


def run(recorder: Recorder) -> None:
    """bf16, eager and compiled."""
    config = configured(*(DRY if recorder.is_dry else (PRESET, IMAGES)))
    crops = _crops(config)
    backend = resolve("auto", device(), training_dtype()).name
    towers = {}
    for name, kind in (("a pass each", SeparateTrunk), ("packed", Trunk)):
        for mode in ("eager", "compiled"):
            with device():
                tower = kind(config.model, backend)
            initialise(tower, config, device())
            towers[f"{name}, {mode}"] = tower.to(device(), training_dtype())
            if mode == "compiled":
                compile_blocks(tower)
    values = {name: float(value_of(tower, crops)) for name, tower in towers.items()}
    assert max(values.values()) - min(values.values()) < 0.02 * abs(values["packed, eager"]), values  # bf16
    layout = towers["packed, eager"].layout(crops)
    words = " + ".join(f"{group.segments} x {group.length}" for group in layout.groups)
    workload = f"trunk of {config.name}, {words} tokens, {precision_label()}, attention {backend}, forward and backward"
    variants = {name: step_of(tower, crops) for name, tower in towers.items()}
    found = recorder.measure("packed", workload, variants, "a pass each, eager")
    times = {row.variant: row.median_ms for row in found.rows}
    gains = ", ".join(
        f"{times[f'a pass each, {mode}'] / times[f'packed, {mode}']:.2f} x {mode}" for mode in ("eager", "compiled")
    )
    recorder.add(replace(found, notes=(f"packed is {gains}",)))


def _crops(config: Config) -> dict[str, Tensor]:
    """(B, 3, H, W) by kind, as a step has them."""
    batch, views = config.batch, config.views
    sizes = {
        "clip": (batch.clip, views.image_size),
        "ssl_global": (2 * batch.ssl, views.global_size),
        "ssl_local": (views.num_locals * batch.ssl, views.local_size),
    }
    return {name: torch.randn(count, 3, size, size, device=device()) for name, (count, size) in sizes.items()}
