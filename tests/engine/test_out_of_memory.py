"""A run that asks for more memory than there is ends with advice, and leaves an account beside the run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import Config, UserError
from configs.deepspeed import load_ds_config
from engine import out_of_memory, trainer
from engine.distributed import RankError
from engine.out_of_memory import MemoryAdvisor
from engine.resume import DataCursor
from engine.watchdog.client import RankStatus
from model.losses.comm import Solo
from profiling.cost.peak_memory import Saving, predict_peak, savings
from profiling.instruments.phases import PhaseTimer
from tests.engine.ranks import DEEPSPEED
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

CONFIG = tiny_config("system.attention=sdpa")
ABSURD = 2**50  # floats


def ds_config(stage: str) -> dict[str, Any]:
    """With a bucket of the model's size."""
    given = load_ds_config(DEEPSPEED / f"{stage}.json", CONFIG, 1)
    return {**given, "zero_optimization": {**given["zero_optimization"], "reduce_bucket_size": 100_000}}


def memory(run_dir: Path, config: Config = CONFIG) -> MemoryAdvisor:
    return MemoryAdvisor(config, ds_config("zero3"), run_dir, rank=3, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What savings are is tested by itself."""
    saving = Saving("system.activation_checkpointing=full", "blocks run forward twice", 3 * 2**30, 2**30)
    monkeypatch.setattr(out_of_memory, "savings", lambda *_: [saving])


@pytest.mark.usefixtures("advised")
def test_the_error_names_moment_rank_parts_and_what_lowers_the_peak(tmp_path: Path) -> None:
    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(UserError) as error, memory(tmp_path).explained("in step 12"):
        step()
    told = str(error.value)
    assert told.startswith("memory ran out on rank 3 of 1, in step 12: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "activations: trunk" in told
    assert "  system.activation_checkpointing=full: -2.0 GiB, to 1.0; blocks run forward twice" in told
    account = json.loads((tmp_path / "out_of_memory" / "rank3.json").read_text())
    assert account["moment"] == "in step 12"
    assert account["predicted_peak_bytes"] == predict_peak(CONFIG, ds_config("zero3"), 1).device_bytes
    assert account["held"]["most resident"] > 2**20
    assert account["advice"][0]["after_bytes"] == 2**30


@pytest.mark.usefixtures("advised")
def test_the_hosts_own_refusal_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="you tried to allocate"), memory(tmp_path).explained("assembling"):
        torch.empty(ABSURD)


@pytest.mark.usefixtures("advised")
@pytest.mark.parametrize("kind", [MemoryError, RankError])
def test_a_lack_of_memory_behind_another_error_is_found(kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory ran out"), memory(tmp_path).explained("assembling"):
        raise kind("gather of (4, 8) failed") from torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_go_their_way(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory(tmp_path).explained("in step 1"):
        raise RuntimeError("shapes (2, 3) and (4, 5) do not fit")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_predicted_the_lack_is_still_told(tmp_path: Path) -> None:
    uneven = replace(memory(tmp_path), world_size=5)  # 12 rows do not divide
    with pytest.raises(UserError, match="Nothing could be predicted") as error, uneven.explained("in step 1"):
        raise MemoryError("no more")
    assert "no more" in str(error.value)
    assert (tmp_path / "out_of_memory" / "rank3.json").is_file()


def test_savings_are_what_the_changed_run_is_predicted_to_need() -> None:
    found = savings(CONFIG, ds_config("zero2"), 1)
    by_change = {saving.change: saving for saving in found}
    assert [saving.after_bytes for saving in found] == sorted(saving.after_bytes for saving in found)
    full = CONFIG.model_copy(update={"system": CONFIG.system.model_copy(update={"activation_checkpointing": "full"})})
    expected = predict_peak(full, ds_config("zero2"), 1).device_bytes
    assert by_change["system.activation_checkpointing=full"].after_bytes == expected
    assert {"system.clip.micro_batches=2", "2 ranks instead of 1"} <= set(by_change)
    assert all(saving.bytes > 0 for saving in found)


@pytest.mark.usefixtures("advised")
def test_a_step_of_a_run_is_explained(tmp_path: Path) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    window = SimpleNamespace(before=lambda step: None)
    instruments: Any = SimpleNamespace(utilisation=None, window=window, phases=lambda name: nullcontext())
    nobody: Any = SimpleNamespace()
    phases = PhaseTimer(clock=None)
    batches = lambda first, skipped, offset: iter([None])  # noqa: E731
    setup = SimpleNamespace(config=CONFIG, comm=Solo(), phases=phases)
    task: Any = SimpleNamespace(setup=setup, data=SimpleNamespace(batches=batches), step=no_memory)
    unused: Any = dict.fromkeys(("anomalies", "alarms", "rollbacks", "reporter", "saver"), nobody)
    looped = trainer.Trainer(task=task, instruments=instruments, memory=memory(tmp_path), status=RankStatus(), **unused)
    with pytest.raises(UserError, match="in step 4: CUDA out of memory"):
        looped.run(DataCursor(4))
