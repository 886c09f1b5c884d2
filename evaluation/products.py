"""What the tokenizer makes of a batch of pictures: each product at most once, all from one pass through the trunk.

    batch = Products(tokenizer, images, labels, positions)
    batch.embedding       # (B, clip_width), for zero-shot
    batch.latent          # (B, L, h, w)
    batch.recon           # (B, 3, H, W), decoded from `latent`
    batch.features        # {"latent": (B, L), "blocks": (B, 5 D)}, for probe and kNN

A task reads what it needs, and what no task reads is not computed.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from model.conv import ConvEncoder
from model.imagenet import normalise
from model.latent import mode
from model.packing import PackedLayout
from model.pretrainer import image_feature
from model.tokenizer import VisualTokenizer

Part = TypeVar("Part", bound=nn.Module)
LAST_BLOCKS = 4  # whose CLS tokens the released table's probe reads, beside the last one alone


class Products:
    """Of one batch: `images` (B, 3, H, W) float in [0, 1], `labels` (B,) with -1 for none, `positions` (B,)."""

    def __init__(self, tokenizer: VisualTokenizer, images: Tensor, labels: Tensor, positions: Tensor) -> None:
        self.tokenizer, self.images, self.labels, self.positions = tokenizer, images, labels, positions

    @cached_property
    @torch.no_grad()
    def embedding(self) -> Tensor:
        """(B, clip_width) float32, L2-normed: VisualTokenizer.embed_images."""
        model, x_TD = self.tokenizer.model, self._blocks[-1]
        if not model.bottleneck_ae_only:
            x_TD = mode(_part(self.tokenizer.bottleneck, "bottleneck")(x_TD), model)
        clip = _part(self.tokenizer.clip, "clip")
        return F.normalize(clip.visual_proj(image_feature(self._layout, x_TD, model.image_feature)).float(), dim=-1)

    @cached_property
    @torch.no_grad()
    def latent(self) -> Tensor:
        """(B, L, h, w): VisualTokenizer.encode."""
        bottleneck = _part(self.tokenizer.bottleneck, "bottleneck")
        latent_BPL = mode(bottleneck(self._layout.patches(self._blocks[-1], "clip")), self.tokenizer.model)
        return latent_BPL.transpose(1, 2).unflatten(2, self._layout.group("clip").grid).contiguous()

    @cached_property
    def recon(self) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]."""
        return self.tokenizer.decode(self.latent)

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Name -> (B, width) float32, what linear probe and kNN see.

        latent: the mean of the bottleneck's output over patches, of width L. blocks: CLS of the last 4 blocks (of all
        where there are fewer), then the mean patch of the last, each final-normed, as DINOv2's probes read them; not of
        a convolutional encoder, which has neither blocks nor CLS.
        """
        if isinstance(self.tokenizer.trunk, ConvEncoder):
            return {"latent": self.latent.float().mean(dim=(2, 3))}
        cls = [self._layout.cls(x_TD, "clip") for x_TD in self._blocks]
        patch_BD = self._layout.patches(self._blocks[-1], "clip").float().mean(dim=1)
        features = {"blocks": torch.cat([*(x_BD.float() for x_BD in cls), patch_BD], dim=1)}
        if self.tokenizer.bottleneck is not None:
            features = {"latent": self.latent.float().mean(dim=(2, 3))} | features
        return features

    @cached_property
    @torch.no_grad()
    def _blocks(self) -> list[Tensor]:
        """Of the last blocks, the deepest at the end; of a convolutional encoder all that it gives."""
        trunk, crops = self.tokenizer.trunk, {"clip": normalise(self.images)}
        return [trunk(crops, {})] if isinstance(trunk, ConvEncoder) else trunk.intermediate(crops, LAST_BLOCKS)

    @cached_property
    def _layout(self) -> PackedLayout:
        return self.tokenizer.trunk.layout({"clip": self.images})


def _part(module: Part | None, name: str) -> Part:
    if module is None:
        raise UserError(
            f"these weights hold no {name}: train with its objective on, or leave out the tasks that need it"
        )
    return module
