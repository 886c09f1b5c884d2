"""The text tower of CLIP, a causal transformer, and the packing of its captions.

    packed = pack_captions(captions_BC)        # 32 captions of 77 slots, 20 tokens each on average
    packed.tokens_RC.shape                     # (9, 80): 9 rows instead of 32
    tower = TextTower(Text(width=768, depth=12, heads=12), clip_width=768, backend="sdpa")
    tower(packed)                              # (32, 768), not yet L2-normalised; padding changes nothing

The tower is causal and reads a caption at its end-of-text token, so nothing after that token can reach the result:
dropping the padding is exact. The remaining tokens (about 20 of 77 in web data) are packed into as few rows as
possible, several captions a row, each with its own positions and without attention to its neighbours.

Shapes change little from step to step: rows are as wide as the context (aligned to 16) and their number is rounded up
to one of at most 8 values per octave, so that a run has two or three shapes and compiled blocks as many graphs.

LayerNorm eps is 1e-5, GELU is exact [C]. Parameter names are those of open_clip: resblocks.N.attn.in_proj_weight,
mlp.c_fc, ln_final ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.model import Text
from kernels.attention import Segments, Spans, attend
from model.block import LayerNorm

Ids = NDArray[np.int64]
CAPTION_ALIGN = 16  # a row's width is a multiple of this, and so is the number of slots of all rows


class PackedCaptions(NamedTuple):
    """B captions in R rows of C slots. Empty slots hold id 0 and belong to no caption."""

    tokens_RC: Tensor  # int64 ids
    positions_RC: Tensor  # int64: each token's position in its own caption
    spans: Spans  # which slots attend to each other
    ends_B: Tensor  # int64: index of each caption's end-of-text in the flattened rows

    def saved_fraction(self, captions_BC: Tensor) -> float:
        """Fraction of the token slots of `captions_BC` that packing saves; negative where it needs more."""
        return 1 - self.tokens_RC.numel() / captions_BC.numel() if captions_BC.numel() else 0.0

    def to(self, device: torch.device) -> PackedCaptions:
        """Copy to `device`."""
        tokens, positions, ends = (
            t.to(device, non_blocking=True) for t in (self.tokens_RC, self.positions_RC, self.ends_B)
        )
        return PackedCaptions(tokens, positions, Spans(*(t.to(device, non_blocking=True) for t in self.spans)), ends)


def pack_captions(captions_BC: Tensor) -> PackedCaptions:
    """Pack (B, C) int64 ids on the host: start, words, end-of-text (the row's largest id), zeros.

    First-fit decreasing: the longest captions open rows, shorter ones fill them.
    """
    ids_BC = captions_BC.numpy()
    length_B = ids_BC.argmax(axis=1) + 1
    width = packed_row_width(ids_BC.shape[1])
    bins = _first_fit(length_B.tolist(), width)
    return _fill_rows(ids_BC, length_B, bins, _rounded_num_rows(len(bins)), width)


def one_caption_per_row(captions_BC: Tensor) -> PackedCaptions:
    """Put each caption, padding included, into a row of its own, as a tower without packing would; for comparison."""
    count, width = captions_BC.shape
    packed = _fill_rows(captions_BC.numpy(), np.full(count, width), [[row] for row in range(count)], count, width)
    return packed._replace(ends_B=torch.arange(count) * width + captions_BC.argmax(dim=1))


def packed_row_width(context: int) -> int:
    """Slots of a packed row: the context, rounded up to a multiple of 16."""
    return -(-context // CAPTION_ALIGN) * CAPTION_ALIGN


def _first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """The captions of each row: rows are filled one by one with the longest caption that still fits."""
    waiting: list[list[int]] = [[] for _ in range(width + 1)]  # by length
    for caption in reversed(range(len(lengths))):
        waiting[lengths[caption]].append(caption)
    bins, left = [], len(lengths)
    while left:
        row: list[int] = []
        room = width
        for length in range(width, 0, -1):
            while length <= room and waiting[length]:
                row.append(waiting[length].pop())
                room -= length
        bins.append(row)
        left -= len(row)
    return bins


def _rounded_num_rows(rows: int) -> int:
    """Round up to any number up to 16, then to 8 values per octave; less than an eighth of the rows stays empty."""
    step = max(1, 2 ** (rows - 1).bit_length() // 16)
    return -(-rows // step) * step


def _fill_rows(ids_BC: Ids, length_B: Ids, bins: list[list[int]], rows: int, width: int) -> PackedCaptions:
    """Fill rows; `bins` lists the captions of each. Computed on the host with numpy."""
    order_N = np.array([caption for row in bins for caption in row], dtype=np.int64)
    length_N = length_B[order_N]
    row_N = np.repeat(np.arange(len(bins)), [len(row) for row in bins])
    used_R = np.bincount(row_N, weights=length_N, minlength=rows).astype(np.int64)
    before_N, before_R = length_N.cumsum() - length_N, used_R.cumsum() - used_R  # tokens of earlier captions, rows
    start_N = row_N * width + before_N - before_R[row_N]  # first slot of each caption in the flattened rows

    position_T = np.arange(length_N.sum()) - before_N.repeat(length_N)
    slot_T, caption_T = start_N.repeat(length_N) + position_T, order_N.repeat(length_N)
    tokens, positions, spans = (np.zeros(rows * width, kind) for kind in (np.int64, np.int64, np.int32))
    tokens[slot_T], positions[slot_T], spans[slot_T] = ids_BC[caption_T, position_T], position_T, caption_T + 1
    end_B = np.empty_like(order_N)
    end_B[order_N] = start_N + length_N - 1
    tokens_RC, positions_RC, ids_RC = (torch.from_numpy(x).view(rows, width) for x in (tokens, positions, spans))
    offsets = torch.from_numpy(_offsets(start_N, used_R, width))
    return PackedCaptions(tokens_RC, positions_RC, Spans(ids_RC, offsets), torch.from_numpy(end_B))


def _offsets(start_N: Ids, used_R: Ids, width: int) -> NDArray[np.int32]:
    """(N + R + 1,): first slot of each span, counting the empty ends of rows as spans, and the end of the last."""
    fill_R = np.arange(len(used_R)) * width + used_R
    starts = np.sort(np.concatenate((start_N, fill_R)))  # a full row has an empty span at its end
    return np.append(starts, len(used_R) * width).astype(np.int32)


class TextTower(nn.Module):
    """Token ids -> one embedding per caption in the joint image-text space, read at its end-of-text token."""

    def __init__(self, text: Text, clip_width: int, backend: str) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(text.vocab, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.resblocks = nn.ModuleList(TextBlock(text, backend) for _ in range(text.depth))
        self.ln_final = LayerNorm(text.width, eps=1e-5)
        self.text_projection = nn.Parameter(torch.empty(text.width, clip_width))

    def forward(self, captions: PackedCaptions) -> Tensor:
        """B captions, positions below the context -> (B, clip_width)."""
        positions_RCD = F.embedding(captions.positions_RC, self.positional_embedding)
        x_TD = (self.token_embedding(captions.tokens_RC) + positions_RCD).flatten(0, 1)
        rows, width = captions.tokens_RC.shape
        for block in self.resblocks:
            x_TD = block(x_TD, ((rows, width),), captions.spans)
        return self.ln_final(x_TD.index_select(0, captions.ends_B)) @ self.text_projection


class TextBlock(nn.Module):
    """One pre-norm residual block; like model.block.Block one ZeRO-3 leaf, one compiled graph, run once a step."""

    def __init__(self, text: Text, backend: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(text.width, eps=1e-5)
        self.attn = TextAttention(text.width, text.heads, backend)
        self.ln_2 = LayerNorm(text.width, eps=1e-5)
        self.mlp = TextMlp(text.width, text.mlp_ratio)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans) -> Tensor:
        """(T, D) -> (T, D): `segments` are R rows of C tokens, `spans` the captions in them."""
        x_TD = x_TD + self.attn(self.ln_1(x_TD), segments, spans)
        return x_TD + self.mlp(self.ln_2(x_TD))


class TextAttention(nn.Module):
    """Causal multi-head self-attention within each caption."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.in_product: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            F.linear
        )  # engine/block_transforms.py may replace it for FP8
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, segments: Segments, spans: Spans) -> Tensor:
        """(T, D) normed tokens -> (T, D), causal within captions."""
        qkv_T3HE = self.in_product(x_TD, self.in_proj_weight, self.in_proj_bias).unflatten(1, (3, self.heads, -1))
        q_THE, k_THE, v_THE = qkv_T3HE.unbind(1)
        out_THE = attend(q_THE, k_THE, v_THE, segments, causal=True, backend=self.backend, spans=spans)
        return self.out_proj(out_THE.flatten(1))


class TextMlp(nn.Module):
    """MLP of a text block: c_proj(gelu(c_fc x))."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, int(width * ratio))
        self.c_proj = nn.Linear(int(width * ratio), width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), token by token."""
        return self.c_proj(F.gelu(self.c_fc(x_TD)))
