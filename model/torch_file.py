"""A file that torch wrote, as public weights come: read for its tensors, never for code.

read_tensors("vgg16-397923af.pth")["features.0.weight"]
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from configs import UserError


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict at `path`, on the host. Raises UserError where it is missing, cut off or something else."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it met
        reason = " ".join(str(error).split())[:200]
        if "weights_only" in reason:  # torch's own words go on to advise reading it with code and all
            reason = "it is no torch file, or holds more than tensors"
        raise UserError(f"{path} is not a readable torch state dict ({reason}); fetch it anew") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}, not a state dict")
    return stored
