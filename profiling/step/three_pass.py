"""The step without a shared pass: what one writes around the public model class, for benches to compare with.

Same modules, same weights. Images pass the trunk once for each purpose (clip; ssl, where global and local crops are two
calls, because the class takes one size a call; rec), captions keep their padding, attention is torch's fused kernel,
and losses are computed as formulas are written, with every matrix of logits.

    reference = ThreePass(config, Rows.per_rank(config, 1))
    outputs = reference(**padded_inputs(batch, device))      # the Outputs of Pretrainer
    written_out_loss(outputs, config.objectives, 0.07)         # compute(...).total
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs import Config
from configs.learning import Objectives
from data.batch import Batch
from engine.step import model_inputs
from kernels.contrastive import softmax_reference
from model.captions import one_a_row
from model.corruption import Corruption
from model.objectives.comm import Solo
from model.objectives.dense import cross_entropy, sinkhorn
from model.objectives.koleo import koleo_loss
from model.objectives.pixels import l1_loss
from model.outputs import Outputs, RecOutputs, SslOutputs
from model.pack import Layout
from model.pretrainer import Pretrainer
from model.rows import Rows
from model.trunk import Trunk


class SeparateTrunk(Trunk):
    """A trunk that takes one kind of crop a pass, and lays the results where a packed pass would have put them."""

    def forward(self, crops: dict[str, Tensor], masks: dict[str, Tensor], **chosen: Any) -> Tensor:
        """Every token of every crop, whatever is read of it."""
        assert chosen.get("kept_idx") is None, "the reference has no stochastic depth"
        assert not chosen.get("visible"), "nor patches that only rec does not see"
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
        assert self.teacher is not None, "the reference computes all three objectives"
        self.teacher.trunk = SeparateTrunk(config.model, "sdpa").requires_grad_(False)
        assert rows.rec_start == 0, "rec rows lead the clip rows: batch.layout=nested"

    def _rec(
        self, layout: Layout, x_TD: Tensor, y_TD: Tensor, crops: dict[str, Tensor], corruption: Corruption
    ) -> RecOutputs | None:
        """Reconstructs from a pass of its own."""
        own = {"clip": crops["clip"][self._rec_rows()]}
        own_TD = self.trunk(own, {})
        latent_TD = own_TD if self.bottleneck_ae_only else self._through_bottleneck(own_TD)
        return super()._rec(self.trunk.layout(own), own_TD, latent_TD, own, corruption)


def padded_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """As engine.step.model_inputs, with every caption in a row of its own, padding and all."""
    return model_inputs(batch, device) | {"captions": one_a_row(batch.captions).to(device)}


def written_out_loss(outputs: Outputs, objectives: Objectives, teacher_temp: float) -> Tensor:
    """The total of model.objectives.total.compute: softmax contrast, Sinkhorn targets, no perceptual term."""
    assert outputs.clip is not None
    assert outputs.ssl is not None
    assert outputs.rec is not None
    clip, _ = softmax_reference(outputs.clip.image_BE, outputs.clip.text_BE, outputs.clip.logit_scale)
    ssl = _written_out_ssl(outputs.ssl, objectives.ssl.student_temp, teacher_temp)
    ssl = ssl + objectives.ssl.koleo * koleo_loss(outputs.ssl.student_cls_GD, Solo())
    rec = objectives.rec.l1 * l1_loss(outputs.rec.recon, outputs.rec.target)
    return objectives.clip.weight * clip + objectives.ssl.weight * ssl + objectives.rec.weight * rec


def _written_out_ssl(ssl: SslOutputs, student_temp: float, teacher_temp: float) -> Tensor:
    """DINO and iBOT."""
    num_crops = len(ssl.student_global_GE)
    num_images, num_locals = num_crops // 2, 2 * len(ssl.student_local_LE) // num_crops
    cls_GK, patch_MK = (
        sinkhorn(rows @ ssl.teacher_KE.T, teacher_temp, Solo())
        for rows in (ssl.teacher_global_GE, ssl.teacher_patch_ME)
    )
    global_GK, local_LK, hidden_MK = (
        rows @ ssl.student_KE.T for rows in (ssl.student_global_GE, ssl.student_local_LE, ssl.student_patch_ME)
    )
    both_views_LK = cls_GK.unflatten(0, (2, num_images)).sum(dim=0).repeat(num_locals, 1)
    local = cross_entropy(local_LK, both_views_LK, student_temp).sum()
    across = cross_entropy(global_GK, cls_GK.roll(num_images, dims=0), student_temp).sum()
    hidden = (ssl.patch_weight_M * cross_entropy(hidden_MK, patch_MK, student_temp)).sum()
    return (local + across) / (num_images * (2 + 2 * num_locals)) + hidden / num_crops
