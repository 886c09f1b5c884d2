"""Roofline, predicted memory and predicted bytes on the page: true to what counts them, and absent with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.deepspeed import load_ds_config
from profiling.cost.communication import by_kind, predict_collectives
from profiling.cost.peak_memory import predict_peak
from profiling.cost.roofline import phase_work
from profiling.report.blocks import RooflinePlot
from profiling.report.page import write_report
from profiling.report.plots import roofline_plot
from tests.engine.ranks import DEEPSPEED
from tests.profiling.test_report import blocks, facts_of, figures, make_run, read, sentences
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

CONFIG = tiny_config("optim.steps=3")
MACHINE: dict[str, Any] = {
    "world_size": 2, "device": "cpu", "attention": "sdpa", "is_compiled": False,
    "flops_per_second": 1e11, "flops_source": "measured: here", "bytes_per_second": 1e10, "bytes_source": "triad",
}  # fmt: skip
MEASURED = {
    "phase/trunk_ms": 2.0, "phase/backward_ms": 5.0, "phase/objectives_ms": 1.0, "phase/data_ms": 1.0,
    "memory/peak_min_gib": 1.0, "memory/peak_mean_gib": 1.5, "memory/peak_max_gib": 2.0, "memory/peak_rank": 1.0,
}  # fmt: skip


def whole_run(directory: Path, **machine: Any) -> Path:
    """With everything a roofline and the predictions need."""
    ds_config = load_ds_config(DEEPSPEED / "zero3.json", CONFIG, 2)
    sent = {
        f"comm/{kind}_mb": 1.01 * count / 1e6
        for kind, count in by_kind(predict_collectives(CONFIG, ds_config, 2)).items()
    }
    reports = [(step, figures(step, **MEASURED, **sent)) for step in (1, 2, 3)]
    run = make_run(directory, reports)
    (run / "ds_config.json").write_text(json.dumps(ds_config))
    (run / "machine.json").write_text(json.dumps(MACHINE | machine))
    return run


def rows_of(facts: dict[str, Any], section: str, caption: str) -> dict[str, list[Any]]:
    [table] = [table for table in blocks(facts, "table", section) if table["caption"].startswith(caption)]
    return {row[0]: dict(zip(table["header"][1:], row[1:], strict=True)) for row in table["rows"]}


def test_the_roofline_puts_a_phases_work_over_its_time_under_the_roof(tmp_path: Path) -> None:
    facts = facts_of(whole_run(tmp_path / "run"))
    rows = rows_of(facts, "roofline", "What run reached")
    assert list(rows) == ["trunk", "objectives", "backward"]  # what is timed and computes
    work = phase_work(CONFIG, 2, "sdpa")["trunk"]
    trunk = rows["trunk"]
    counts = rows_of(facts, "roofline", "Work in one step of one rank of run")["trunk"]
    assert (counts["MB moved"], counts["MB of products"]) == (work.bytes / 1e6, work.product_bytes / 1e6)
    assert trunk["GFLOP/s"] == pytest.approx(work.flops / 0.002 / 1e9)
    roof = min(1e11, 1e10 * work.flops / work.bytes)
    assert trunk["of the roof"] == pytest.approx(work.flops / 0.002 / roof)
    assert trunk["bound by"] == ("memory" if roof < 1e11 else "compute")
    [drawn] = blocks(facts, "roofline")
    assert drawn["points"]["trunk"] == pytest.approx([work.flops / work.bytes, work.flops / 0.002])
    told = sentences(facts, "roofline")
    assert "at most 100 GFLOP/s (measured: here) and moves at most 10 GB/s (triad)" in told
    assert "below 10 FLOPs a byte memory is the limit" in told
    assert f"backward at {100 * rows['backward']['of the roof']:.0f} % of its roof" in told


def test_compiled_phases_are_held_against_what_fused_products_move(tmp_path: Path) -> None:
    rows = rows_of(facts_of(whole_run(tmp_path / "run", is_compiled=True)), "roofline", "What run reached")
    work = phase_work(CONFIG, 2, "sdpa")["trunk"]
    assert rows["trunk"]["FLOP/byte"] == pytest.approx(work.flops / work.product_bytes)


def test_the_page_draws_one_roof_a_run_and_compares_the_shares(tmp_path: Path) -> None:
    first, second = whole_run(tmp_path / "first"), whole_run(tmp_path / "second", bytes_per_second=1e9)
    page, facts = read(write_report(first, second))
    assert len(blocks(facts, "roofline")) == 2
    assert page.tags.count("svg") > 2
    shares = rows_of(facts, "roofline", "Share of its roof")
    assert shares["backward"]["second"] > shares["backward"]["first"]
    svg = roofline_plot(RooflinePlot("<b>", 1e11, 1e10, {"<i>": (0.1, 1e8), "other": (1e4, 9e10)}))
    assert "<i>" not in svg
    assert "<b>" not in svg


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("machine.json", None, "names no peak"),
        ("machine.json", {**MACHINE, "bytes_per_second": None}, "names no peak"),
        ("machine.json", {**MACHINE, "flops_per_second": "fast"}, "names no peak"),
        ("machine.json", {**MACHINE, "flops_per_second": -1}, "names no peak"),
        ("machine.json", {**MACHINE, "world_size": 5}, "not a multiple of the 5 ranks"),
        ("ds_config.json", None, "needs config.yaml, ds_config.json"),
        ("ds_config.json", [], "needs config.yaml, ds_config.json"),
        ("ds_config.json", {"zero_optimization": 7}, "can be counted by"),
    ],
)
def test_what_a_roofline_lacks_is_said(tmp_path: Path, file: str, content: Any, reason: str) -> None:
    run = whole_run(tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(json.dumps(content))
    facts = facts_of(run)
    assert reason in sentences(facts, "roofline")
    assert blocks(facts, "roofline") == []
    if file == "ds_config.json":
        assert "no predicted memory" in sentences(facts, "memory")
        assert "no predicted bytes" in sentences(facts, "communication")


def test_the_predicted_peak_stands_over_the_measured_peaks(tmp_path: Path) -> None:
    facts = facts_of(whole_run(tmp_path / "run"))
    rows = rows_of(facts, "memory", "GiB of one rank of run")
    predicted = predict_peak(CONFIG, load_ds_config(DEEPSPEED / "zero3.json", CONFIG, 2), 2)
    assert rows["predicted peak on the device"]["GiB"] == predicted.device_bytes / 2**30
    assert rows["activations: trunk"]["GiB"] > 0
    assert [row["GiB"] for row in list(rows.values())[-3:]] == [1.0, 1.5, 2.0]
    assert rows["measured peak, most of all ranks"][""] == "rank 1"
    assert "worst moment of a step" in sentences(facts, "memory")
    assert "resident memory" in sentences(facts, "memory")


def test_on_a_gpu_the_measured_peak_is_a_multiple_of_the_predicted_one(tmp_path: Path) -> None:
    facts = facts_of(whole_run(tmp_path / "run", device="NVIDIA H200"))
    predicted = rows_of(facts, "memory", "GiB of one rank")["predicted peak on the device"]["GiB"]
    assert f"took {2.0 / predicted:.2f} times the prediction" in sentences(facts, "memory")
    assert "resident memory" not in sentences(facts, "memory")


def test_predicted_bytes_stand_beside_the_counted_ones(tmp_path: Path) -> None:
    facts = facts_of(whole_run(tmp_path / "run"))
    rows = rows_of(facts, "communication", "MB a step of run")
    assert [row["counted / predicted"] for row in rows.values()] == pytest.approx([1.01] * 3)
    parts = rows_of(facts, "communication", "Predicted collectives of run")
    assert sum(row["message, MB"] for row in parts.values()) == pytest.approx(
        sum(row["predicted"] for row in rows.values())
    )
    alone = whole_run(tmp_path / "alone", world_size=1)
    assert "has one rank, which sends nothing" in sentences(facts_of(alone), "communication")
