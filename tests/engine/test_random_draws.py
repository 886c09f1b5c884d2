"""rec's random numbers: the same for an image whoever draws them, and of the distribution that is said."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from configs import UserError
from engine import consolidate
from engine.checkpoint import reading
from engine.random_draws import RecNoiseDraws, rec_noise_draws
from model.latent import hidden_patch_probabilities
from model.packing import RankBatchSizes
from model.tokenizer import VisualTokenizer
from model.weights import read_weights
from tests.engine.test_resume import DISTURBED, train_and_save
from tests.harness import run_ranks
from tests.tiny import random_batch, tiny_config


def of(*overrides: str) -> RecNoiseDraws:
    found = rec_noise_draws(tiny_config(*overrides), 0, 1)
    assert found is not None
    return found


@pytest.mark.L0
@pytest.mark.parametrize("layout", ["nested", "disjoint"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_draw_the_shares_of_one_global_draw(layout: str, world_size: int) -> None:
    config = tiny_config(*DISTURBED, f"batch.layout={layout}")
    for step in (0, 5):
        whole = RecNoiseDraws(config, RankBatchSizes.per_rank(config, 1), 0, 1).draw(step)
        for rank in range(world_size):
            own = RecNoiseDraws(config, RankBatchSizes.per_rank(config, world_size), rank, world_size).draw(step)
            for one, all_rows in zip(own, whole, strict=True):
                assert one is not None
                assert all_rows is not None
                assert torch.equal(one, all_rows[rank::world_size])


@pytest.mark.L0
def test_draws_differ_by_image_step_seed_and_use() -> None:
    draws, other = of(*DISTURBED), of(*DISTURBED, "seed=1")
    step = next(step for step in range(1, 99) if draws.hidden(step) == draws.hidden(0))
    first, later = draws.draw(0), draws.draw(step)
    for one, next_one in zip(first, later, strict=True):
        assert not torch.equal(one, next_one)
        assert not torch.equal(one[0], one[1])
    assert not torch.equal(first.sample_RVL, first.noise_RVL)
    assert not torch.equal(first.level_R, other.draw(0).level_R)
    assert torch.equal(draws.draw(0).noise_RVL, first.noise_RVL)


@pytest.mark.L0
def test_nothing_is_drawn_that_nobody_asked_for() -> None:
    assert rec_noise_draws(tiny_config(), 0, 1) is None
    assert rec_noise_draws(tiny_config("objectives.rec.weight=0", "batch.rec=0"), 0, 1) is None
    masks, noise, latent = of(DISTURBED[5]), of(DISTURBED[4]), of(DISTURBED[0])
    assert [part is not None for part in masks.draw(0)] == [True, False, False, False]
    assert [part is not None for part in latent.draw(0)] == [False, True, False, False]
    assert [part is not None for part in noise.draw(0)] == [False, False, True, True]
    assert noise.draw(0).noise_RVL.shape == (6, 16, 8)
    assert str(masks) == "hides 0, 2, 4, 6, 8, 10, 12 of 16 patches (objectives.rec.mask)"


@pytest.mark.L0
def test_steps_hide_as_much_as_is_said_and_any_patch_as_often() -> None:
    draws, steps = of(*DISTURBED), 4000
    counts = Counter(draws.hidden(step) for step in range(steps))
    shares = hidden_patch_probabilities((-0.1, 0.7), 16)
    assert counts.keys() == shares.keys()
    for hidden, share in shares.items():  # within 4 standard deviations of a binomial count
        assert counts[hidden] == pytest.approx(steps * share, abs=4 * (steps * share * (1 - share)) ** 0.5)
    chosen = [step for step in range(steps) if draws.hidden(step) == 8][:300]
    seen_P = torch.stack([draws._visible(step, 8) for step in chosen]).flatten().bincount(minlength=16)
    assert (seen_P - 900).abs().max() < 4 * (1800 * 0.25) ** 0.5
    visible_idx_RV = draws._visible(chosen[0], 8)
    assert torch.equal(visible_idx_RV, visible_idx_RV.sort(dim=1).values)


@pytest.mark.L2
def test_a_disturbed_run_learns_is_the_same_on_other_ranks_and_its_weights_are_a_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(*DISTURBED, "optim.steps=12")
    losses = {}
    for world_size in (1, 2, 3):
        root = tmp_path / str(world_size)
        [trained] = run_ranks(train_and_save, world_size, config, "zero3", {str(root): 12})[0]
        losses[world_size] = trained.losses
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)  # worst seen 4e-7; other noise is other digits
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)
    assert sum(losses[1][-4:]) < 0.9 * sum(losses[1][:4])

    path = tmp_path / "weights.safetensors"
    consolidate.write_weights_file(reading.latest_readable(tmp_path / "2"), path)
    assert {"decoder.mask_token", "bottleneck.weight"} <= read_weights(path)[0].keys()
    tokenizer, images = VisualTokenizer.from_file(path), random_batch(config, 0).images[:2]
    assert tokenizer.encode(images).shape == (2, 8, 4, 4)
    assert torch.equal(tokenizer.encode(images), tokenizer.moments(images).mean)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    with pytest.raises(UserError, match="holds no variance; not exported"):
        tokenizer.save_pretrained(tmp_path / "public")
