"""The one thing the loader hands to the engine.

Rows are ordered so that a leading slice is a uniform random subset: ssl rows and rec rows are slices of the clip rows.
Crops are view-major: with S=3 ssl rows, `global_crops` holds rows 0 1 2 of view 0, then rows 0 1 2 of view 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step. Pixels are uint8 RGB; the model normalises them.

    B = batch.clip / world size, S = batch.ssl / world size, N = views.num_locals, P = patches of a global crop,
    C = model.text.context. Without an objective its tensors have no rows (S = 0).
    """

    images: torch.Tensor  # (B, 3, image_size, image_size) uint8
    captions: torch.Tensor  # (B, C) int64: start-of-text, words, end-of-text (the largest id), zeros
    global_crops: torch.Tensor  # (2S, 3, global_size, global_size) uint8, view-major
    local_crops: torch.Tensor  # (N*S, 3, local_size, local_size) uint8, view-major
    masks: torch.Tensor  # (2S, P) bool, True = hidden from the student; the number of True is the same every step
    masked_idx: torch.Tensor  # (M,) int64: flat positions of True in masks, so that no device has to look for them
    step: int  # the step this batch belongs to; the data cursor is step * batch.clip
    keys: tuple[str, ...]  # B sample keys, "shard/sample", after bad samples were replaced
    ready: torch.cuda.Event | None = None  # when crops that a GPU decodes are there; None: they are

    def pinned(self) -> Batch:
        """With what lies in host memory in page-locked memory: only from there a copy to a GPU runs beside the host."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in tensors.items() if value.is_cpu}
        return replace(self, **pinned)
