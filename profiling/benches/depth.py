"""Stochastic depth in the trunk, forward and backward: what is dropped is not computed, and what is left of the time.

The workload is a share of a ViT-S step at 256 px: crops of 257 tokens (clip, ssl global) and of 37 (ssl local). The
note holds the time at rate 0.3 against the ideal, the share of tokens that stay.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from configs.architecture import Vit
from engine.drop_path import DropPath
from kernels.attention import resolve
from model.block import Block
from model.drop_path import subset
from model.pack import Group, Layout
from model.rope import Rope
from profiling.machine import compared_dtypes, device
from profiling.measurement import Recorder

GROUPS = (Group("clip", 10, 257, (16, 16)), Group("ssl_local", 20, 37, (6, 6)))
VIT = {"width": 384, "depth": 4, "heads": 6}
RATE = 0.3


def run(recorder: Recorder) -> None:
    """One measurement a dtype."""
    for dtype in compared_dtypes():
        _measure(dtype, recorder)


def _measure(dtype: torch.dtype, recorder: Recorder) -> None:
    used = sum(group.segments * group.length for group in GROUPS)
    layout, vit = Layout(GROUPS, pad=-used % 16), Vit(**VIT, drop_path=RATE)
    blocks = [_block(vit, dtype) for _ in range(vit.depth)]
    rope_2TE = Rope(vit.width // vit.heads, 100.0, torch.bfloat16).packed(layout, device())
    x_TD = torch.randn(layout.tokens, vit.width, device=device()).to(dtype).requires_grad_()
    kept = subset(layout.segments, RATE)
    drawn = DropPath(layout.segments, RATE, vit.depth, seed=0, rank=0).draw(0).to(device())
    tokens_L2K = kept.tokens(drawn, layout.segments)

    def step(tokens: Tensor | None) -> None:
        y_TD = x_TD
        for block, tokens_2K in zip(blocks, tokens if tokens is not None else [None] * vit.depth, strict=True):
            y_TD = block(y_TD, rope_2TE, layout.segments, tokens_2K)
        y_TD.float().sum().backward()

    share = kept.used / used
    words = " + ".join(f"{group.segments} segments of {group.length}" for group in GROUPS)
    workload = f"{words} tokens, {vit.depth} blocks of width {vit.width}, {dtype}, forward and backward"
    variants = {"rate 0": partial(step, None), f"rate {RATE}": partial(step, tokens_L2K)}
    found = recorder.measure("depth", workload, variants, "rate 0")
    speedup = found.rows[1].speedup
    assert speedup is not None
    note = f"{share:.0%} of the tokens stay: ideally {1 / share:.2f} times the speed; {speedup * share:.0%} of that"
    recorder.add(replace(found, notes=(note,)))


def _block(vit: Vit, dtype: torch.dtype) -> Block:
    block = Block(vit, resolve("auto", device(), dtype).name).to(device(), dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block
