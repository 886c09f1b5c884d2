"""FLOPs of the frozen encoder that latents are aligned with (objectives.rec.align): forward alone.

frozen_encoder(align, rows=32, image_size=256, patches=256)     # Component("frozen encoder", "rec", ...)
"""

from __future__ import annotations

from configs.learning import Align
from model.dinov2 import MLP_RATIO
from model.pack import ALIGN
from profiling.flops import Component, linear
from profiling.step.layer_flops import Block, tokens_and_squares, vit_block


def frozen_encoder(align: Align, rows: int, image_size: int, patches: int) -> Component:
    """Of `rows` pictures whose latents have `patches` places. DINOv2 sees as many, a trunk what its patch size makes of
    the picture, in a sequence that is padded."""
    is_trunk = align.kind == "trunk"
    own = (image_size // align.patch_size) ** 2 if is_trunk else patches
    tokens, squares = tokens_and_squares(rows, 1 + align.registers + own)
    tokens += -tokens % ALIGN if is_trunk else 0
    block = vit_block(align.encoder, tokens, squares, tokens) if is_trunk else _dinov2_block(align, tokens, squares)
    edge = linear(rows * own, 3 * align.patch_size**2, align.encoder.width)
    depth = align.encoder.depth
    return Component("frozen encoder", "rec", depth * block.forward + edge, scores=depth * block.scores)


def _dinov2_block(align: Align, tokens: float, squares: float) -> Block:
    width = align.encoder.width
    attention = vit_block(align.encoder, tokens, squares, 0)
    hidden = linear(tokens, width, MLP_RATIO * width)
    return Block(first=attention.first + hidden, scores=attention.scores, last=hidden)
