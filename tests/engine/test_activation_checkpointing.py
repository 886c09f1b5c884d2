"""Activation checkpointing holds less and computes the same."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from configs.model import Text, Vit
from engine.block_transforms import Mode, checkpoint_activations
from kernels.attention import Spans
from model.block import Block
from model.losses.comm import Comm
from model.packing import CropGroup, PackedLayout
from model.rope import Rope
from model.text import TextBlock
from profiling.instruments.memory import peak_bytes
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

MODES: tuple[Mode, ...] = get_args(Mode)
LAYOUT = PackedLayout((CropGroup("clip", 6, 65, (8, 8)), CropGroup("ssl_local", 5, 17, (4, 4))), pad=5)
HALVES = Spans((torch.arange(80) // 40).expand(6, 80), torch.arange(0, 481, 40, dtype=torch.int32))  # two a row


def gradients(blocks: nn.ModuleList, dtype: torch.dtype) -> list[Tensor]:
    """Of a weighted sum of what leaves the blocks: for their input and every parameter."""
    x_TD = torch.randn(LAYOUT.tokens, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    rope_2TE, y_TD = Rope(32, 100.0, torch.bfloat16).packed(LAYOUT, "cpu"), x_TD
    for block in blocks:
        y_TD = block(y_TD, rope_2TE, LAYOUT.segments) if isinstance(block, Block) else block(y_TD, ((6, 80),), HALVES)
    return list(torch.autograd.grad(y_TD.float().square().sum(), [x_TD, *blocks.parameters()]))


def build(mode: Mode, attention: str, dtype: torch.dtype) -> nn.ModuleList:
    vit, text = Vit(width=64, depth=4, heads=2), Text(width=64, depth=2, heads=2)
    blocks = nn.ModuleList([Block(vit, attention) for _ in range(4)] + [TextBlock(text, attention) for _ in range(2)])
    generator = torch.Generator().manual_seed(3)
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    checkpoint_activations(blocks.to(dtype), mode, (Block, TextBlock))
    return blocks


@pytest.mark.L0
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_gradients_are_the_same_bitwise_and_peak_memory_falls(attention: str, dtype: torch.dtype) -> None:
    expected, peaks = gradients(build("off", attention, dtype), dtype), {}
    for mode in MODES:
        blocks = build(mode, attention, dtype)
        assert all(map(torch.equal, gradients(blocks, dtype), expected)), mode
        peaks[mode] = peak_bytes(lambda blocks=blocks: gradients(blocks, dtype))
    # Measured with these six blocks: selective 0.56 to 0.63 of off, full 0.28 to 0.30.
    assert peaks["selective"] < 0.8 * peaks["off"], peaks
    assert peaks["full"] < 0.8 * peaks["selective"], peaks


def train_in_every_mode(comm: Comm) -> list[ranks.Trained]:
    overrides = [(f"system.activation_checkpointing={mode}", "optim.precision=bf16") for mode in MODES]
    return [ranks.train(comm, tiny_config(*override), "zero3", 2) for override in overrides]


@pytest.mark.L1
def test_under_zero_3_every_mode_takes_the_same_steps_bitwise() -> None:
    off, *others = run_ranks(train_in_every_mode, 2)[0]
    for other in others:
        assert other.losses == off.losses
        assert [name for name, weight in off.weights.items() if not torch.equal(weight, other.weights[name])] == []
