"""The text tower on captions as long as the web's: packed into rows against padded to the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.assemble import compile_blocks
from kernels.attention import resolve
from model.captions import PackedCaptions, one_a_row, pack_captions
from model.initialise import initialise
from model.text import TextTower
from profiling.machine import device, precision_label, training_dtype
from profiling.measurement import Recorder
from profiling.workload import random_captions, small_step

CAPTIONS = 32


def run(recorder: Recorder) -> None:
    """bf16, forward and backward, eager and compiled."""
    text = small_step().model.text
    captions_BC = random_captions(CAPTIONS, text.context, text.vocab, torch.Generator().manual_seed(0))
    packed, padded = pack_captions(captions_BC).to(device()), one_a_row(captions_BC).to(device())
    eager, compiled = _tower(), _tower()
    compile_blocks(compiled)
    torch.testing.assert_close(eager(packed), eager(padded), atol=0.05, rtol=0.05)  # bf16
    mean = (captions_BC.argmax(dim=1) + 1).float().mean().item()
    slots = " x ".join(str(size) for size in packed.tokens_RC.shape)
    workload = (
        f"{CAPTIONS} captions of {mean:.1f} tokens on average, context {text.context}, packed into {slots} slots, "
    )
    recorder.add(
        recorder.measure(
            "text",
            workload + f"{text.depth} blocks of {text.width}, {precision_label()}, forward and backward",
            {
                "padded, eager": lambda: _step(eager, padded),
                "packed, eager": lambda: _step(eager, packed),
                "padded, compiled": lambda: _step(compiled, padded),
                "packed, compiled": lambda: _step(compiled, packed),
            },
            "padded, eager",
            notes=(f"packing leaves out {packed.saved(captions_BC):.0%} of the token slots",),
        )
    )


def _tower() -> TextTower:
    config = small_step()
    tower = TextTower(config.model.text, config.model.clip_width, resolve("auto", device(), training_dtype()).name)
    initialise(nn.ModuleDict({"text": tower}), config)
    return tower.to(device(), training_dtype())


def _step(tower: TextTower, captions: PackedCaptions) -> tuple[Tensor, ...]:
    weights = [parameter for name, parameter in tower.named_parameters() if "embedding" not in name]
    return torch.autograd.grad(tower(captions).float().pow(2).sum(), weights)
