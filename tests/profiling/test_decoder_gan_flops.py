"""The analytic count of a step of stage 2 is what torch counts in it, product by product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs import DecoderGan
from model.decoder import DecoderStage
from model.losses.comm import Solo
from model.losses.gan import PatchGan, decoder_losses, discriminator_loss
from model.losses.pixels import to_signed
from profiling.cost.step_flops import decoder_gan_flops
from profiling.cost.step_trace import perceptual_network
from tests.engine.tasks.decoder_gan_runs import stage_config
from tests.model.tiny_weights import write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("stage1") / "run", tiny_config()) / "weights.safetensors"


def counted(config: DecoderGan, listens: bool, judges: bool) -> int:
    """Forward and backward of both networks, on the meta device; attention as products."""
    with torch.device("meta"):
        stage, judge = DecoderStage(tiny_config().model, "matmul"), PatchGan(config.discriminator)
        images = torch.empty(config.batch.images, 3, 32, 32)
        perceptual = perceptual_network() if config.objectives.rec.perceptual else None
    with FlopCounterMode(display=False) as counter:
        outputs = stage(images)
        found = decoder_losses(outputs, config.objectives, Solo(), perceptual, judge if listens else None)
        (outputs.recon * found.gradient).sum().backward()
        if judges:
            both = torch.cat((to_signed(outputs.target), to_signed(outputs.recon.detach())))
            discriminator_loss(*judge(both).chunk(2), "hinge").backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("balance", ["adaptive", "fixed"])
@pytest.mark.parametrize(("listens", "judges"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("lpips", [None, "lpips.safetensors"])
def test_the_count_is_torchs_own(weights: Path, balance: str, listens: bool, judges: bool, lpips: str | None) -> None:
    rec: dict[str, Any] = {"perceptual": 0} if lpips is None else {"lpips_weights": lpips}
    config = stage_config(weights, objectives={"rec": rec, "gan": {"balance": balance}})
    found = decoder_gan_flops(config, tiny_config().model, 1, float(listens), float(judges), backend="matmul")
    assert found.model_flops == counted(config, listens, judges)
