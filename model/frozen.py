"""The encoder that learns nothing, whose features the latents are aligned with (objectives.rec.align).

    encoder = load_frozen(config.objectives.rec.align, attention="sdpa", dtype=torch.bfloat16)
    encoder(images, grid=(16, 16)).shape        # (R, 256, W) float32: its final-normed patch tokens

It is the trunk of any weights file of ours, a run's or an imported public one, or DINOv2 (model/dinov2.py). It lies
whole on every rank, outside ZeRO, as the perceptual network does; nothing in it takes a gradient, and no checkpoint
holds it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.architecture import Model, Vit
from configs.learning import Align
from model.dinov2 import PLACES, Dinov2
from model.dinov2_file import load as load_dinov2
from model.dinov2_file import shape_of
from model.trunk import Trunk
from model.weights import described_model, opened

KEY = "objectives.rec.align"
TRUNK = "trunk."


class FrozenEncoder(nn.Module):
    """The trunk that `model` describes. Build it outside DeepSpeed's `zero.Init`."""

    def __init__(self, model: Model, attention: str) -> None:
        super().__init__()
        self.trunk = Trunk(model, attention)
        self.requires_grad_(False)

    @classmethod
    def load(cls, align: Align, attention: str, dtype: torch.dtype) -> FrozenEncoder:
        """The trunk in `align.weights`, its numbers rounded to `dtype`.

        Raises UserError where the file is missing or damaged, holds no trunk, or another than `align` describes.
        """
        path = Path(align.weights)
        model = described(align)
        with opened(path) as stored:
            names = [name for name in stored.keys() if name.startswith(TRUNK)]  # noqa: SIM118 (not a mapping)
            state = {name: stored.get_tensor(name).to(dtype) for name in names}
        with torch.device("meta"):  # no initialisation: every number is given
            encoder = cls(model, attention)
        try:
            encoder.load_state_dict(state, assign=True)
        except RuntimeError as error:  # torch's list of names and shapes that do not fit
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{KEY}.weights={path}: its trunk is not the one that it describes ({reason})") from None
        return encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, 3, H, W) ImageNet-normalised -> (R, P, W) float32 over `grid`, resized bilinearly from its own grid."""
        layout = self.trunk.layout({"clip": images})
        patch_RPW = layout.patches(self.trunk({"clip": images}, {}), "clip").float()
        own = layout.group("clip").grid
        if own == grid:
            return patch_RPW
        feature_RWhw = patch_RPW.transpose(1, 2).unflatten(2, own)
        resized = F.interpolate(feature_RWhw, grid, mode="bilinear", align_corners=False, antialias=True)
        return resized.flatten(2).transpose(1, 2)


Frozen = FrozenEncoder | Dinov2


def load_frozen(align: Align, attention: str, dtype: torch.dtype) -> Frozen:
    """The encoder that `align` describes, from its file, its numbers rounded to `dtype`. Raises UserError like
    `check`, and where the file holds but a part of it."""
    if align.kind == "trunk":
        return FrozenEncoder.load(align, attention, dtype)
    check(align)
    try:
        return load_dinov2(Path(align.weights), align.encoder, align.patch_size, align.registers, attention, dtype)
    except UserError as error:
        raise UserError(f"{KEY}.weights: {error}") from None


def said_of_alignment(align: Align | None) -> str:
    """What a run's choices say of it."""
    if align is None:
        return "off (objectives.rec.align is not set)"
    how = "gradients balanced" if align.adaptive else "fixed weight"
    return f"with the frozen {align.kind} of {align.weights}, weight {align.weight:g}, {how}"


def without_file(align: Align, attention: str) -> Frozen:
    """The same by the section's word alone, with no numbers in it: for what is counted and predicted."""
    if align.kind == "dinov2":
        return Dinov2(align.encoder, align.patch_size, align.registers, PLACES, attention)
    sizes = {"patch_size": align.patch_size, "registers": align.registers}
    return FrozenEncoder(Model(**sizes, trunk=align.encoder, decoder=align.encoder), attention)


def check(align: Align) -> None:
    """Raises UserError where the file is missing or damaged, or holds another encoder than `align` describes."""
    if align.kind == "trunk":
        described(align)
        return
    path = Path(align.weights)
    try:
        found = shape_of(path)
    except UserError as error:
        raise UserError(f"{KEY}.weights: {error}") from None
    _require_same({
        "encoder.width": (found.width, align.encoder.width),
        "encoder.depth": (found.depth, align.encoder.depth),
        "patch_size": (found.patch_size, align.patch_size),
        "registers": (found.registers, align.registers),
    }, path)  # fmt: skip


def described(align: Align) -> Model:
    """What the file says of its model, once that is what `align` says of it. Raises UserError like `load`."""
    path = Path(align.weights)
    try:
        with opened(path) as stored:
            has_trunk = any(name.startswith(TRUNK) for name in stored.keys())  # noqa: SIM118 (not a mapping)
            model = described_model(stored, path)
    except UserError as error:
        raise UserError(f"{KEY}.weights: {error}") from None
    if not has_trunk or model.conv is not None:
        raise UserError(
            f"{KEY}.weights={path} holds no transformer's trunk, whose features the latents would follow; name a run's "
            "weights.safetensors, or what `python -m model.interchange import` wrote"
        )
    _require_same({
        "encoder": (_as_evaluated(model.trunk), _as_evaluated(align.encoder)),
        "patch_size": (model.patch_size, align.patch_size),
        "registers": (model.registers, align.registers),
    }, path)  # fmt: skip
    return model


def _require_same(said: dict[str, tuple[object, object]], path: Path) -> None:
    for key, (there, here) in said.items():
        if there != here:
            raise UserError(f"{KEY}.weights={path} has {key} {there}, but {KEY}.{key} is {here}: describe the file's")


def _as_evaluated(vit: Vit) -> Vit:
    """Stochastic depth is of training: a frozen trunk drops nothing, whatever it was trained with."""
    return vit.model_copy(update={"drop_path": 0.0})
