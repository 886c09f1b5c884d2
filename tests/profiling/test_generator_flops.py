"""The analytic count of a generator's forward is torch's own, and the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.generator import DIT, SIT, Diffusion
from model.generator.build import build
from model.generator.shape import LatentShape
from profiling.step.generator_flops import generator_flops

pytestmark = pytest.mark.L0
B, XL = {"width": 768, "depth": 12, "heads": 12}, {"width": 1152, "depth": 28, "heads": 16}
SIZES: dict[str, tuple[dict[str, Any], LatentShape]] = {
    "demo": ({"width": 192, "depth": 6, "heads": 3}, LatentShape(16, 4, 8)),
    "LightningDiT-B/1": (B, LatentShape(64, 16, 16)),
    "SiT-B/1": ({**B, **SIT}, LatentShape(64, 16, 16)),
    "DiT-XL/2": ({**XL, **DIT, "patch": 2}, LatentShape(4, 32, 32)),
    "normed heads": ({"width": 64, "depth": 2, "heads": 2, "qk_norm": True, "mlp_ratio": 3.0}, LatentShape(2, 6, 4)),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_torchs_own(size: str, batch: int) -> None:
    """On the meta device, attention as two products: torch counts none of the fused kernel's there."""
    settings, shape = SIZES[size]
    section = Diffusion(**settings)
    with torch.device("meta"):
        generator = build(section, shape, num_classes=10, attention="matmul")
        x = torch.empty(batch, shape.channels, shape.height, shape.width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generator.backbone(x, torch.empty(batch), torch.empty(batch, dtype=torch.int64))
    assert generator_flops(section, shape, 10, batch) == counter.get_total_flops()


# Multiply-adds in G and parameters in M, as published for 256 pixels.
@pytest.mark.parametrize(("size", "multiply_adds", "parameters"), [("DiT-XL/2", 118.6, 675), ("DiT-B/2", 23.0, 130)])
def test_a_dit_costs_what_was_published(size: str, multiply_adds: float, parameters: float) -> None:
    section, shape = Diffusion(**(XL if "XL" in size else B), **DIT, patch=2), LatentShape(4, 32, 32)
    with torch.device("meta"):
        generator = build(section, shape, num_classes=1000)
    assert generator_flops(section, shape, 1000, batch=1) / 2e9 == pytest.approx(multiply_adds, rel=2e-3)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(parameters, rel=3e-3)
