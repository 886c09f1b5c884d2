"""The benches around the engine itself run, at a size for tests, and tell what they promise."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch

from configs import Config
from profiling import bench
from profiling.benches import fp8, step, train
from profiling.benches.recorder import BenchRecorder
from profiling.benches.workload import preset_config, zero1_ds_config
from profiling.cost.peak_memory import predict_peak
from profiling.instruments.machine import MemoryBandwidth, PeakFlops
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.L1


def tiny(name: str, clip: int, *overrides: str) -> Config:
    rows = (f"batch.clip={clip}", f"batch.ssl={clip // 4}", f"batch.rec={clip // 8}", "data.streams=1")
    return tiny_config("optim.precision=bf16", *rows, *overrides)


def run_small(name: str) -> list[Any]:
    """In a process of its own, which may change torch: traced, and no code generated, which takes a minute."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    for module in (train, step, fp8):
        vars(module)["preset_config"] = tiny
    train.MAIN, train.SMALLER, train.GRAIN = "tiny", ("tiny",), 8
    train.measured_peak = lambda precision: PeakFlops(1e12, "made up")
    train.measured_bandwidth = lambda: MemoryBandwidth(1e10, "made up")
    step.IMAGES = 8
    train.PAIRS, train.PART = 32, 8
    fp8.CLIP, fp8.SHORT = 8, ("optim.steps=6", "model.trunk.depth=1")
    fp8.L = {"L": fp8.L["tiny"]}
    fp8.matmul_peak = lambda dtype: 1e12
    recorder = BenchRecorder(rounds=2)
    getattr(sys.modules[f"profiling.benches.{bench.BENCHES[name]}"], f"bench_{name}")(recorder)
    return recorder.results


def ran(name: str) -> list[Any]:
    found: list[Any] = run_ranks(run_small, 1, name, timeout=300.0, join=False)[0]
    assert all(measurement.as_dict()["name"] == name for measurement in found)
    assert all(measurement.as_table().row_count for measurement in found)
    return found


def test_training_steps_tell_speed_kernels_and_the_worst_phases() -> None:
    [found] = ran("train")
    [row] = found.rows
    assert found.workload.startswith("tiny: 16 clip, 4 ssl, 2 rec images")
    assert row.mfu is not None
    assert 0 < row.mfu < 1
    speed, kernels, slowest, *gaps = found.notes
    assert "samples/s" in speed
    assert "made up" in speed
    assert "s to build" in speed
    assert row.warm_up_s > 0
    assert "products" in kernels
    assert "aten::" in slowest
    assert len(gaps) == train.NUM_WORST
    assert all(gap.startswith("phase ") and gap.endswith("is lost there") for gap in gaps)


def test_overlap_is_held_against_none() -> None:
    [found] = ran("overlap")
    assert [row.variant for row in found.rows] == ["overlap_comm off", "overlap_comm on"]


def test_the_batch_of_vtp_l_is_predicted_to_fit() -> None:
    for gib, clip in train.IMAGES["vtp_l"].items():
        config = preset_config("vtp_l", clip, "optim.precision=bf16")
        predicted = predict_peak(config, zero1_ds_config(config), 1, "sdpa", "cuda").device_bytes
        assert 0.5 * gib * 2**30 < predicted < train.FITS * gib * 2**30


def test_packed_crops_are_held_against_a_pass_each() -> None:
    [found] = ran("packed")
    assert [row.variant for row in found.rows] == [
        f"{way}, {mode}" for way in ("a pass each", "packed") for mode in ("eager", "compiled")
    ]
    assert found.notes[0].startswith("packed is ")


def test_the_gradient_cache_is_held_against_a_part_of_its_batch() -> None:
    one, whole = ran("grad_cache")
    assert "8 pairs in 1 parts" in one.workload
    assert "32 pairs in 4 parts" in whole.workload
    # The shared part has the activations of one part; features and captions of the others are small beside them.
    assert whole.rows[0].peak_mib < 1.5 * one.rows[0].peak_mib
    assert "pairs/s in one part" in whole.notes[0]


@pytest.mark.L2
def test_the_losses_of_fp8_stand_beside_those_of_bf16() -> None:
    [found] = ran("fp8_losses")
    plain, other = found.losses["bf16"], found.losses["fp8_torchao"]
    assert len(plain) == len(other) == fp8.STEPS
    assert plain != other
    assert other == pytest.approx(plain, rel=0.02)
    assert any(note.startswith("without fp8_te: ") for note in found.notes)
    assert any(note.startswith("fp8_torchao: ") for note in found.notes)


def test_blocks_in_fp8_are_held_against_blocks_in_bf16() -> None:
    [found] = ran("fp8_blocks")
    assert {row.variant for row in found.rows} == {"bf16", "fp8_torchao"}
    assert any("off bf16 by" in note for note in found.notes)
    assert found.notes[-1].startswith("wanted 1.15 x bf16; the best here ")
