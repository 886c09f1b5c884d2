"""The trunk: a ViT through which all crops of a step, of whatever size, pass once as one packed sequence.

    trunk = Trunk(config.model, backend="sdpa")
    crops = {"clip": (8, 3, 64, 64) pixels, "ssl_global": (4, 3, 64, 64), "ssl_local": (8, 3, 32, 32)}
    layout = trunk.layout(crops)                # patch size 16: 8*17 + 4*17 + 8*5 = 244 tokens, 12 of padding
    x_TD = trunk(crops, masks={"ssl_global": (4, 16) bool})
    layout.cls(x_TD, "clip")                           # (8, D), normed
    layout.patches(x_TD, "ssl_global")                 # (4, 16, D)

The patch embedding is outside the blocks, so that what enters the first block already requires a gradient:
ZeRO-3 cannot run the backward of a leaf module otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Model
from model.block import Block, build_norm
from model.packing import ALIGN, PackedLayout, TokenSubset, kept_segments, packed_layout
from model.rope import build_rope


class PatchEmbed(nn.Module):
    """Patch embedding: a p x p convolution of stride p, as one product over unfolded patches; weight (D, 3, p, p)."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, *pixels: Tensor, visible: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Each (S, 3, height, width) in ImageNet-normalised space -> its (S, P, D), patches row by row.

        `visible`: argument index -> indices (S, V) of the only patches to embed.
        """
        size = self.weight.shape[-1]
        unfolded = [unfold(part.to(self.weight.dtype), size) for part in pixels]
        for argument, visible_idx_SV in (visible or {}).items():
            unfolded[argument] = gather_patches(unfolded[argument], visible_idx_SV)
        flat_PD = F.linear(torch.cat([part.flatten(0, 1) for part in unfolded]), self.weight.flatten(1), self.bias)
        pieces = flat_PD.split([part.shape[0] * part.shape[1] for part in unfolded])
        return [piece.unflatten(0, part.shape[:2]) for piece, part in zip(pieces, unfolded, strict=True)]


class Trunk(nn.Module):
    """ViT over packed crops: patch embedding, CLS, registers, mask token, blocks, final norm.

    The sequence is padded to a multiple of `align` tokens.
    """

    def __init__(self, model: Model, backend: str, align: int = ALIGN) -> None:
        super().__init__()
        vit = model.trunk
        self.patch_size, self.prefix, self.align = model.patch_size, 1 + model.registers, align
        self.rope, self.drop_path = build_rope(model, vit), vit.drop_path
        self.patch_embed = PatchEmbed(vit.width, model.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.registers = nn.Parameter(torch.empty(1, model.registers, vit.width)) if model.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, vit.width))
        self.blocks = nn.ModuleList(Block(vit, backend) for _ in range(vit.depth))
        self.norm = build_norm(vit)

    def layout(self, crops: Mapping[str, Tensor], visible: Mapping[str, Tensor] | None = None) -> PackedLayout:
        """The packed layout of `crops`: name -> (S, 3, height, width) pixels. Reads shapes only."""
        sizes = {name: (pixels.shape[0], pixels.shape[2], pixels.shape[3]) for name, pixels in crops.items()}
        hidden = {}
        for name, visible_idx_SV in (visible or {}).items():
            _, height, width = sizes[name]
            hidden[name] = height * width // self.patch_size**2 - visible_idx_SV.shape[1]
        return packed_layout(sizes, self.patch_size, self.prefix, self.align, hidden)

    def forward(
        self,
        crops: dict[str, Tensor],
        masks: dict[str, Tensor],
        *,
        kept_idx: Tensor | None = None,
        read_tokens: TokenSubset | None = None,
        visible: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the packed sequence (T, D) of `crops` after the final norm, in the order of `layout(crops)`.

        `masks` may name some of the crops: (S, P) bool, True where the mask token replaces the patch. `kept_idx`
        (depth, 2, kept segments) names the segments that each block's attention and MLP see. Without it they see all,
        except for `read_tokens`, the tokens that the last MLP sees: other rows come out unfinished, and nobody may look
        at them. `visible` may name crops of which only these patches are seen: (S, V) int64, ascending.
        """
        layout = self.layout(crops, visible)
        x_TD, rope_2TE = self._embed(crops, masks, layout.pad, visible), self._rope(layout, visible)
        for block, tokens in zip(self.blocks, self._block_tokens(layout, kept_idx, read_tokens), strict=True):
            x_TD = block(x_TD, rope_2TE, layout.segments, *tokens)
        return self.norm(x_TD)

    def intermediate(self, crops: dict[str, Tensor], last: int) -> list[Tensor]:
        """The final-normed outputs (T, D) of the last `last` blocks, in order of depth; for evaluation."""
        layout = self.layout(crops)
        x_TD, rope_2TE = self._embed(crops, {}, layout.pad), self._rope(layout)
        outputs = []
        for block in self.blocks:
            x_TD = block(x_TD, rope_2TE, layout.segments)
            outputs.append(x_TD)
        return [self.norm(x_TD) for x_TD in outputs[-last:]]

    def _embed(
        self,
        crops: dict[str, Tensor],
        masks: dict[str, Tensor],
        pad: int,
        visible: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        parts, numbered = [], {list(crops).index(name): idx_SV for name, idx_SV in (visible or {}).items()}
        for name, patches_SPD in zip(crops, self.patch_embed(*crops.values(), visible=numbered), strict=True):
            if name in masks:
                patches_SPD = torch.where(masks[name].unsqueeze(-1), self.mask_token.to(patches_SPD.dtype), patches_SPD)
            prefix = (self.cls_token,) if self.registers is None else (self.cls_token, self.registers)
            prefix_SND = torch.cat(prefix, dim=1).expand(patches_SPD.shape[0], -1, -1)
            parts.append(torch.cat((prefix_SND, patches_SPD), dim=1).flatten(0, 1))
        return torch.cat((*parts, parts[0].new_zeros(pad, parts[0].shape[1])))

    def _block_tokens(
        self, layout: PackedLayout, kept_idx: Tensor | None, read_tokens: TokenSubset | None
    ) -> list[tuple[Any, ...]]:
        """Tokens that each block's branches see: (2, K) of `kept_idx`; else all, and the last MLP `read_tokens`."""
        if kept_idx is None:
            return [(None, None)] * (len(self.blocks) - 1) + [(None, read_tokens)]
        tokens_L2K = kept_segments(layout.segments, self.drop_path).tokens(kept_idx, layout.segments)
        return [(tokens_2K, None) for tokens_2K in tokens_L2K]

    def _rope(self, layout: PackedLayout, visible: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.rope.packed(layout, self.cls_token.device, visible)


def gather_patches(x_SPF: Tensor, idx_SV: Tensor) -> Tensor:
    """Pick patches by their indices in each row: (S, P, F), (S, V) -> (S, V, F)."""
    return x_SPF.gather(1, idx_SV.unsqueeze(-1).expand(-1, -1, x_SPF.shape[-1]))


def unfold(pixels: Tensor, size: int) -> Tensor:
    """Cut images into patches: (S, 3, h*size, w*size) -> (S, h*w, 3*size*size), in the order channel, row, column."""
    count, channels, height, width = pixels.shape
    grid = pixels.reshape(count, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, (height // size) * (width // size), channels * size * size)
