"""What an autoregressive generator computes: FLOPs of its forward pass, by the rules of profiling/flops.py.

    autoregressive_flops(Autoregressive(), LatentShape(16, 16, 16), batch=1) / 1e9      # 145.2: MAR-B

43 % of them are the head's: four noise levels of every hidden token. A training step takes three times as many, forward
and backward.
"""

from __future__ import annotations

from configs.autoregressive import Autoregressive
from model.generator.autoregressive import head_rows
from model.generator.conditioning import FREQUENCIES
from model.generator.shape import LatentShape
from model.generator.token_order import most_visible
from profiling.flops import attention, linear


def autoregressive_flops(section: Autoregressive, shape: LatentShape, batch: int) -> float:
    """FLOPs of one forward pass over `batch` latents."""
    rows, columns = shape.grid(section.patch)
    tokens, numbers = rows * columns, shape.channels * section.patch**2
    backbone = _masked if section.order == "masked" else _causal
    head = _head(section, numbers, tokens, head_rows(section, tokens))
    return batch * (backbone(section, numbers, tokens) + head)


def _masked(section: Autoregressive, numbers: int, tokens: int) -> float:
    known, half = most_visible(tokens, section.mask_ratio), section.depth // 2
    encoder, decoder = (_block(section, section.buffer + held) for held in (known, tokens))
    embeddings = linear(known, numbers, section.width) + linear(section.buffer + known, section.width, section.width)
    return embeddings + half * (encoder + decoder)


def _causal(section: Autoregressive, numbers: int, tokens: int) -> float:
    return linear(tokens - 1, numbers, section.width) + section.depth * _block(section, section.buffer + tokens - 1)


def _block(section: Autoregressive, length: int) -> float:
    """Of one sample; what a causal mask hides is counted."""
    width, hidden = section.width, int(section.width * section.mlp_ratio)
    return linear(length, width, 4 * width + 2 * hidden) + attention(length**2, width)


def _head(section: Autoregressive, numbers: int, tokens: int, rows: int) -> float:
    """Of one sample: all tokens are conditions, `rows` of their noisy copies are denoised."""
    width = section.head.width
    condition = linear(tokens, section.width, width)
    time = linear(rows, FREQUENCIES, width) + linear(rows, width, width)
    blocks = section.head.depth * linear(rows, width, 5 * width)  # two of the MLP, three of the modulation
    return condition + time + blocks + linear(rows, width, 2 * width) + 2 * linear(rows, numbers, width)
