"""MFU and HFU: a step's FLOPs over its time over the peak, with the captions that were packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.reporting.step_meter import DeviceUtilisation, StepMeter, device_utilisation
from engine.tasks.task import StepResult
from model.losses.comm import Solo
from model.packing import RankBatchSizes
from profiling.cost.flops import StepFlops
from profiling.cost.step_flops import step_flops
from profiling.instruments.machine import PeakFlops
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
CONFIG = tiny_config()
ROWS = RankBatchSizes.per_rank(CONFIG, 2)


def flops(counted: Mapping[str, float]) -> StepFlops:
    """Half of what is counted is saved."""
    tokens = (1 - counted.get("saved", 0.0)) * ROWS.clip * CONFIG.model.text.context
    return step_flops(CONFIG, ROWS, tokens)


def use(peak: PeakFlops | None) -> DeviceUtilisation:
    return DeviceUtilisation("fp32", "sdpa", flops, peak, None, "NVIDIA Unheard Of")


def test_the_share_is_flops_over_seconds_over_peak() -> None:
    flops = step_flops(CONFIG, ROWS, caption_tokens=0.5 * ROWS.clip * CONFIG.model.text.context)
    values = use(PeakFlops(1e12, "a test")).values(seconds=0.25, counted={"saved": 0.5})
    assert values["speed/tflops_per_rank"] == pytest.approx(4 * flops.model_flops / 1e12)
    assert values["speed/mfu"] == pytest.approx(4 * flops.model_flops / 1e12)
    assert values["speed/hfu"] == pytest.approx(4 * flops.hardware_flops / 1e12)
    assert values["speed/hfu"] > values["speed/mfu"]


def test_an_unknown_gpu_has_no_share_and_the_run_says_so() -> None:
    assert set(use(None).values(1.0, {})) == {"speed/tflops_per_rank"}
    assert "no MFU: no data sheet's fp32 peak is known for NVIDIA Unheard Of" in str(use(None))


def test_a_report_has_the_share_of_its_own_steps() -> None:
    meter = StepMeter(Solo(), total_steps=4, samples_per_step=8, utilisation=use(PeakFlops(1e12, "a test")))
    for saved in (0.2, 0.6):
        meter.add(StepResult({"total": torch.tensor(1.0)}, {}, torch.tensor(1.0), {"saved": saved}))
    values = meter.read(2, waited_seconds=0.0)
    needed = use(None).flops({"saved": 0.4}).model_flops
    assert values["speed/mfu"] == pytest.approx(needed / (values["speed/step_ms"] / 1000) / 1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the measured peak is then the GPU's")
def test_a_cpu_is_held_against_its_own_products() -> None:
    setup = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), attention="sdpa")
    training: Any = SimpleNamespace(setup=setup, flops=flops)
    found = device_utilisation(training)
    assert found.peak is not None
    assert found.bandwidth is not None
    assert str(found).endswith(f"MFU against {found.peak}; memory {found.bandwidth}")
    assert "measured" in str(found)


def test_what_a_report_must_know_of_the_machine_is_plain_json() -> None:
    known = use(PeakFlops(1e12, "a test")).machine(world_size=2, is_compiled=False)
    assert json.loads(json.dumps(known)) == known
    assert (known["flops_per_second"], known["flops_source"], known["bytes_per_second"]) == (1e12, "a test", None)
