"""The analytic count of an autoregressive generator is what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.autoregressive import Autoregressive, MaskRatio
from model.generator.build import build
from model.generator.shape import LatentShape
from profiling.step.autoregressive_flops import autoregressive_flops
from profiling.step.generator_flops import generator_flops
from tests.model.generator.tiny_autoregressive import drawn, section, tiny

pytestmark = pytest.mark.L0


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
def test_the_count_is_torchs(settings: dict[str, object]) -> None:
    shape = LatentShape(5, 6, 4)
    generator, made = tiny(shape=shape, **settings), section(**settings)
    latents_BLhw, labels_B = torch.randn(3, 5, 6, 4), torch.tensor([0, 1, 2])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generator(latents_BLhw, labels_B, drawn(generator.needs, rows=3))
    assert counter.get_total_flops() == generator_flops(made, shape, num_classes=4, batch=3)


def test_a_published_generator_has_the_published_size() -> None:
    shape = LatentShape(16, 16, 16)
    with torch.device("meta"):
        masked = build(Autoregressive(), shape, num_classes=1000)
    assert round(sum(p.numel() for p in masked.parameters()) / 1e6) == 208  # MAR-B
    flops = [autoregressive_flops(Autoregressive(order=order), shape, 1) / 1e9 for order in ("masked", "raster")]
    assert flops == [pytest.approx(145.186, abs=1e-3), pytest.approx(187.759, abs=1e-3)]
