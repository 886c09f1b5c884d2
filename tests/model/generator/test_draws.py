"""A row's random numbers belong to its position: whatever the batch, the rank, the world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.generator.draws import DrawCounts, draw

pytestmark = pytest.mark.L0
NEEDS = DrawCounts(normals=24, uniforms=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_draws_do_not_depend_on_how_positions_are_dealt_to_ranks(world_size: int) -> None:
    whole = draw(NEEDS, seed=0, step=3, positions=np.arange(16, 24))
    for rank in range(world_size):
        part = draw(NEEDS, seed=0, step=3, positions=np.arange(16, 24)[rank::world_size])
        assert torch.equal(part.normal_BN, whole.normal_BN[rank::world_size])
        assert torch.equal(part.uniform_BU, whole.uniform_BU[rank::world_size])


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 4}, {"positions": np.array([6])}])
def test_seed_step_and_position_each_make_other_numbers(other: dict[str, object]) -> None:
    place = {"seed": 0, "step": 3, "positions": np.array([5])}
    first, second = draw(NEEDS, **place), draw(NEEDS, **{**place, **other})
    assert not torch.isin(first.normal_BN, second.normal_BN).any()
    assert not torch.isin(first.uniform_BU, second.uniform_BU).any()


def test_needing_more_normals_leaves_the_first_ones_and_the_uniforms_alone() -> None:
    few, many = (draw(DrawCounts(normals, 2), 0, 0, np.array([9])) for normals in (8, 800))
    assert torch.equal(few.normal_BN, many.normal_BN[:, :8])
    assert torch.equal(few.uniform_BU, many.uniform_BU)


def test_numbers_are_distributed_as_they_say() -> None:
    """128,000 of each: four standard errors of a mean, a variance, a share."""
    draws = draw(DrawCounts(64, 64), seed=0, step=0, positions=np.arange(2000))
    count = draws.normal_BN.numel()
    assert draws.normal_BN.dtype == draws.uniform_BU.dtype == torch.float32
    assert abs(draws.normal_BN.mean()) < 4 * count**-0.5
    assert abs(draws.normal_BN.var() - 1) < 4 * (2 / count) ** 0.5
    shares = torch.histc(draws.uniform_BU, bins=10, min=0, max=1) / count
    assert (shares - 0.1).abs().max() < 4 * (0.09 / count) ** 0.5


def test_a_rows_normals_say_nothing_of_its_uniforms() -> None:
    """Nor their size: 20,000 rows, four standard errors of a correlation. Out of one stream it would be 0.75 with the
    size."""
    draws = draw(DrawCounts(3, 3), seed=0, step=0, positions=np.arange(20_000))
    for normals in (draws.normal_BN, draws.normal_BN.abs()):
        found = np.corrcoef(normals.numpy(), draws.uniform_BU.numpy(), rowvar=False)[:3, 3:]
        assert np.abs(found).max() < 4 * 20_000**-0.5


def test_uniforms_leave_out_zero_and_one() -> None:
    """The largest and the smallest possible, through the same formula in float32: the logit of each is finite."""
    ends = torch.from_numpy(((np.array([0, (1 << 23) - 1]) + 0.5) * 2.0**-23).astype(np.float32))
    assert 0 < ends[0] < ends[1] < 1
    assert torch.special.ndtri(ends).isfinite().all()


def test_a_stream_is_philoxs_own_at_that_counter() -> None:
    """Each as a new generator gives it: nothing is left over from the row before."""
    draws = draw(DrawCounts(5, 3), seed=7, step=2, positions=np.array([11, 4]))
    for row, position in enumerate((11, 4)):
        normals, bits = (
            np.random.Generator(np.random.Philox(key=7, counter=[0, position, 2, purpose])) for purpose in (0, 1)
        )
        assert draws.normal_BN[row].tolist() == normals.standard_normal(5, dtype=np.float32).tolist()
        assert draws.uniform_BU[row].tolist() == ((bits.integers(1 << 23, size=3) + 0.5) * 2.0**-23).tolist()
