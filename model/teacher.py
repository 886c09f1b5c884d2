"""The teacher's side of ssl: what it says of whole crops, for the student to learn from.

    teacher = Teacher(config.model, backend="sdpa")
    cls_GE, patch_ME, prototypes_KE = teacher(global_crops, masked_idx)      # under no_grad

Its parameters follow the student's: engine/teacher.py moves them, teacher_pairs (model/pretrainer.py) says which.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.architecture import Model
from model.heads import PrototypeHead
from model.latent import bottleneck, head_width, mode
from model.reads import masked_patches, reads_of, tokens
from model.trunk import Trunk


class Teacher(nn.Module):
    """A slow copy of the student's trunk and prototype head; sees whole crops, learns nothing by gradient."""

    def __init__(self, model: Model, backend: str) -> None:
        super().__init__()
        self.model = model
        self.trunk = Trunk(model, backend)
        self.bottleneck = None if model.bottleneck_ae_only else bottleneck(model)
        self.prototypes = PrototypeHead(head_width(model), model.prototypes)
        self.requires_grad_(False)

    def forward(self, global_crops: Tensor, masked_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(G, 3, height, width) normalised pixels -> CLS (G, E), hidden patches (M, E), prototypes (K, E)."""
        crops = {"ssl_global": global_crops}
        layout = self.trunk.layout(crops)
        token_T1 = tokens(layout, global_crops.device)
        reads = reads_of((layout.cls(token_T1, "ssl_global"), masked_patches(token_T1, layout, masked_idx)))
        x_TD = self.trunk(crops, {}, reads=reads)
        if self.bottleneck is not None:
            x_TD = mode(self.bottleneck(x_TD), self.model)
        cls_GD, patch_MD = layout.cls(x_TD, "ssl_global"), masked_patches(x_TD, layout, masked_idx)
        rows_XE, prototypes_KE = self.prototypes(torch.cat((cls_GD, patch_MD)))
        return *rows_XE.split((cls_GD.shape[0], patch_MD.shape[0])), prototypes_KE
