"""The step without a shared pass: what one writes around the public model class, for benches to compare with.

Same modules, same weights, same losses. Images pass the trunk once for each purpose (clip; ssl, where global and local
crops are two calls, because the class takes one size a call; rec), and captions keep their padding. Attention is
torch's fused kernel.

    reference = ThreePass(config, Rows.per_rank(config, 1))
    outputs = reference(**padded_inputs(batch, device))      # the Outputs of Pretrainer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs import Config
from data.batch import Batch
from engine.step import model_inputs
from model.captions import one_a_row
from model.outputs import RecOutputs
from model.pack import Layout
from model.pretrainer import Pretrainer, Rows
from model.trunk import Trunk


class SeparateTrunk(Trunk):
    """A trunk that takes one kind of crop a pass, and lays the results where a packed pass would have put them."""

    def forward(self, crops: dict[str, Tensor], masks: dict[str, Tensor], kept_idx: Tensor | None = None) -> Tensor:
        assert kept_idx is None, "the reference has no stochastic depth"
        parts = [
            self._alone(name, pixels, {name: masks[name]} if name in masks else {}) for name, pixels in crops.items()
        ]
        return torch.cat((*parts, parts[0].new_zeros(self.layout(crops).pad, parts[0].shape[1])))

    def _alone(self, name: str, pixels: Tensor, masks: dict[str, Tensor]) -> Tensor:
        crops = {name: pixels}
        return super().forward(crops, masks)[self.layout(crops).slice(name)]


class ThreePass(Pretrainer):
    """A Pretrainer whose trunk takes clip, ssl and rec images apart."""

    def __init__(self, config: Config, rows: Rows) -> None:
        super().__init__(config, rows, "sdpa")
        self.trunk = SeparateTrunk(config.model, "sdpa")
        assert rows.rec_start == 0, "rec rows lead the clip rows: batch.layout=nested"

    def _rec(self, layout: Layout, z_TD: Tensor, crops: dict[str, Tensor]) -> RecOutputs | None:
        """Reconstructs from a pass of its own."""
        own = {"clip": crops["clip"][self._rec_rows()]} if self.clip is not None else crops
        return super()._rec(self.trunk.layout(own), self._features(own), own)

    def _features(self, crops: dict[str, Tensor]) -> Tensor:
        x_TD = self.trunk(crops, {})
        return x_TD if self.bottleneck_ae_only else self._through_bottleneck(x_TD)


def padded_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """As engine.step.model_inputs, with every caption in a row of its own, padding and all."""
    return model_inputs(batch, device) | {"captions": one_a_row(batch.captions).to(device)}
