"""The description counts what is built, at any size."""

from __future__ import annotations

import pytest

from model.describe import count_parameters, describe, longest_step, step_layout
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.L0
REC_ALONE = ("objectives.clip.weight=0", "objectives.ssl.weight=0", "batch.ssl=0")
RELEASED = {  # parameters of the published encoders, in millions
    "s": ((384, 12, 6), 21.6),
    "b": ((768, 12, 12), 85.7),
    "l": ((1024, 24, 16), 303.5),
}


def test_counts_are_those_of_the_model_and_the_layout_is_that_of_a_step() -> None:
    config = tiny_config()
    rows = RankBatchSizes.per_rank(config, 2)
    model = Pretrainer(config, rows)
    assert sum(count_parameters(config, rows).values()) == sum(p.numel() for p in model.parameters())
    batch = random_batch(config, 0, 0, 2)
    crops = {"clip": batch.images, "ssl_global": batch.global_crops, "ssl_local": batch.local_crops}
    assert step_layout(config, rows) == model.trunk.layout(crops)


def test_masked_steps_have_rec_at_the_end_and_each_length_its_line() -> None:
    config = tiny_config("objectives.rec.mask=[-0.1,0.7]", "model.latent=gaussian")
    rows = RankBatchSizes.per_rank(config, 2)
    assert longest_step(config, rows) == 2
    assert longest_step(tiny_config("objectives.rec.mask=[-0.1,0.7]", *REC_ALONE), rows) == 0
    text = describe(config, rows)
    assert "20.3% of the steps: 240 tokens = clip 6 x 17 + ssl_global 6 x 17 + ssl_local 6 x 5 + 6 padding" in text
    assert "2.8% of the steps: 256 tokens = clip 6 x 17 + ssl_global 6 x 17 + ssl_local 6 x 5 + rec 3 x 5 + 7" in text
    assert "latent of a 32 px image: 8 x 4 x 4, gaussian" in text


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_have_the_published_number_of_encoder_parameters(size: str) -> None:
    (width, depth, heads), millions = RELEASED[size]
    config = tiny_config(
        *(f"model.trunk.{key}={value}" for key, value in (("width", width), ("depth", depth), ("heads", heads))),
        "model.patch_size=16",
    )
    count = count_parameters(config, RankBatchSizes.per_rank(config, 1))["trunk"] / 1e6
    assert round(count, 1) == pytest.approx(millions, abs=0.11)


def test_a_seven_billion_trunk_is_described_without_memory() -> None:
    config = tiny_config("model.trunk.width=4096", "model.trunk.depth=40", "model.trunk.heads=32")
    text = describe(config, RankBatchSizes.per_rank(config, 1))
    assert "trunk               8.1B   4096     40     32" in text
    assert "one rank, one step: 480 tokens = clip 12 x 17 + ssl_global 12 x 17 + ssl_local 12 x 5 + 12 padding" in text
    assert "latent of a 32 px image: 8 x 4 x 4" in text
