"""What stands in for the rest of a run while a step is traced without memory: other ranks, VGG's weights, inputs.

    comm = Pretend(world_size=8)
    comm.gather_with_grad(x_BE).shape        # (8B, E), and there is no other rank
    fake(batch.images, mode)                 # its shape and dtype

To be used under torch's FakeTensorMode: there is nothing in these tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from configs import Config
from model.corruption import Corruption, is_corrupted, num_patches
from model.describe import step_layout
from model.drop_path import subset
from model.frozen import Frozen, without_file
from model.objectives.perceptual import GROUPS, Perceptual
from model.outputs import ClipOutputs
from model.rows import Rows
from profiling.step.layer_flops import VGG_CHANNELS


@dataclass(frozen=True)
class Pretend:
    """A Comm (model/objectives/comm.py) of `world_size` ranks of which only the first is there: right in its shapes."""

    world_size: int
    rank: int = 0

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """What other ranks would send has no gradient here; memory is the same."""
        gathered: Tensor = x if self.world_size == 1 else _Gather.apply(x, self)
        return gathered

    def all_sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def all_max(self, x: Tensor) -> Tensor:
        return x.detach().clone()


class _Gather(torch.autograd.Function):
    """engine.world's gather, with nothing to wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Pretend) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty((comm.world_size * len(x), *x.shape[1:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty((ctx.rows, *grad.shape[1:])), None


def perceptual_network() -> Perceptual:
    """The network of the published metric."""
    channels = [width for width, count in zip(VGG_CHANNELS, GROUPS, strict=True) for _ in range(count)]
    weights: dict[str, Tensor] = {}
    for i, (taken, given) in enumerate(zip([3, *channels], channels, strict=False)):
        weights |= {f"convs.{i}.weight": torch.empty(given, taken, 3, 3), f"convs.{i}.bias": torch.empty(given)}
    heads = {f"heads.{j}.weight": torch.empty(1, width, 1, 1) for j, width in enumerate(VGG_CHANNELS)}
    return Perceptual({key: value.float() for key, value in (weights | heads).items()})


def frozen_encoder(config: Config, attention: str) -> Frozen | None:
    """The encoder that objectives.rec.align describes, without its file; None without the section."""
    align = config.objectives.rec.align
    return None if align is None else without_file(align, attention)


def kept_idx(config: Config, rows: Rows, hidden: int) -> Tensor | None:
    """The draw of stochastic depth, (depth, 2, kept segments), with so many patches hidden from rec; None without."""
    trunk = config.model.trunk
    if config.model.conv is not None or not trunk.drop_path:
        return None
    kept = subset(step_layout(config, rows, hidden).segments, trunk.drop_path).segments
    return torch.zeros(trunk.depth, 2, sum(count for count, _ in kept), dtype=torch.int64)


def corruption(config: Config, rows: Rows, hidden: int) -> Corruption | None:
    """A step's draws for rec when `hidden` patches are; None where there are none."""
    if not is_corrupted(config):
        return None
    num_visible, rec = num_patches(config) - hidden, config.objectives.rec
    normals = torch.zeros(rows.rec, num_visible, config.model.latent_channels, dtype=torch.float32)
    is_noisy = rec.noise.kind != "none"
    return Corruption(
        None if rec.mask is None else torch.zeros(rows.rec, num_visible, dtype=torch.int64),
        normals if config.model.latent == "gaussian" else None,
        normals[:, 0, 0].clone() if is_noisy else None,
        normals.clone() if is_noisy else None,
    )


def clip_outputs(image_shape: torch.Size, text_shape: torch.Size) -> ClipOutputs:
    """Features that no model made; a gradient of theirs goes nowhere."""
    image_BE, text_BE = (torch.empty(shape, requires_grad=True) for shape in (image_shape, text_shape))
    return ClipOutputs(image_BE, text_BE, torch.empty(1), None)


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Every tensor, alone or in a named tuple, without its memory and on the CPU."""
    if isinstance(value, FakeTensor):
        return value
    if isinstance(value, Tensor):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype)
    return type(value)(*(fake(part, mode) for part in value)) if hasattr(value, "_fields") else value
