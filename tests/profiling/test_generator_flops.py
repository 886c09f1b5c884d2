"""The analytic count of a generator's forward is torch's own, and the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.generator import DIT, SIT, Autoregressive, Diffusion, MaskRatio
from model.generator.factory import build_generator
from model.generator.tokens import LatentShape
from profiling.cost.flops import generator_flops
from tests.model.generator.tiny_autoregressive import drawn, section, tiny

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
    made = Diffusion(**settings)
    with torch.device("meta"):
        generator = build_generator(made, shape, num_classes=10, attention="matmul")
        x = torch.empty(batch, shape.channels, shape.height, shape.width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generator.backbone(x, torch.empty(batch), torch.empty(batch, dtype=torch.int64))
    assert generator_flops(made, shape, 10, batch) == counter.get_total_flops()


# Multiply-adds in G and parameters in M, as published for 256 pixels.
@pytest.mark.parametrize(("size", "multiply_adds", "parameters"), [("DiT-XL/2", 118.6, 675), ("DiT-B/2", 23.0, 130)])
def test_a_dit_costs_what_was_published(size: str, multiply_adds: float, parameters: float) -> None:
    made, shape = Diffusion(**(XL if "XL" in size else B), **DIT, patch=2), LatentShape(4, 32, 32)
    with torch.device("meta"):
        generator = build_generator(made, shape, num_classes=1000)
    assert generator_flops(made, shape, 1000, batch=1) / 2e9 == pytest.approx(multiply_adds, rel=2e-3)
    assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(parameters, rel=3e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "random"},
        {"order": "raster", "patch": 2},
        {"patch": 2, "buffer": 7, "mask_ratio": MaskRatio(low=0.4, std=0.5)},
        {"depth": 4, "repeats": 3, "mlp_ratio": 2.5, "objective": "velocity"},
    ],
)
def test_an_autoregressive_count_is_torchs_own(settings: dict[str, object]) -> None:
    shape = LatentShape(5, 6, 4)
    generator, made = tiny(shape=shape, **settings), section(**settings)
    latents_BLhw, labels_B = torch.randn(3, 5, 6, 4), torch.tensor([0, 1, 2])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generator(latents_BLhw, labels_B, drawn(generator.draw_counts, rows=3))
    assert counter.get_total_flops() == generator_flops(made, shape, num_classes=4, batch=3)


def test_mar_b_has_the_published_size() -> None:
    shape = LatentShape(16, 16, 16)
    with torch.device("meta"):
        masked = build_generator(Autoregressive(), shape, num_classes=1000)
    assert round(sum(p.numel() for p in masked.parameters()) / 1e6) == 208  # MAR-B
    flops = [generator_flops(Autoregressive(order=order), shape, 1000, 1) / 1e9 for order in ("masked", "raster")]
    assert flops == [pytest.approx(145.186, abs=1e-3), pytest.approx(187.759, abs=1e-3)]
