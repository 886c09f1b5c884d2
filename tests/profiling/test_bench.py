"""Every bench runs, checks its variants against each other and writes its figures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from kernels.attention import DENSE_KERNELS, REQUIREMENTS, why_unavailable
from model.packing import CropGroup
from profiling import bench
from profiling.benches import blocks, fp8, loader, losses, step
from profiling.benches.recorder import BenchRecorder, BenchResult
from profiling.benches.workload import preset_config, random_batch, random_captions, small_step
from profiling.instruments import machine
from profiling.instruments.machine import describe, device, matmul_peak
from tests.harness import run_ranks
from tests.kernels.flash_stand_ins import flash_stand_ins
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_the_attention_bench_tells_every_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SEGMENTS", ((2, 17), (3, 5)))
    out = tmp_path / "attention.json"
    assert bench.main(["attention", "--rounds", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [measurement["name"] for measurement in found] == ["attention"] * 2
    for measurement in found:
        assert measurement["machine"]["torch"] == torch.__version__
        here = [name for name in REQUIREMENTS if why_unavailable(name, device(), torch.bfloat16) is None]
        assert {row["variant"] for row in measurement["rows"]} - set(here) == set(DENSE_KERNELS)
        assert len(measurement["notes"]) >= len(REQUIREMENTS) - len(here)
        assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in measurement["rows"])
    assert "median ms" in capsys.readouterr().out


def test_the_attention_bench_times_each_kernel_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "training_dtype", lambda: torch.float32)
    monkeypatch.setattr(blocks, "SEGMENTS", ((2, 5), (3, 2)))
    monkeypatch.setattr(blocks, "why_unavailable", lambda name, device, dtype: None)
    out = tmp_path / "attention.json"
    with flash_stand_ins(monkeypatch) as calls:
        assert bench.main(["attention", "--rounds", "2", "--json", str(out)]) == 0
        assert current_flash_attention_impl() is None
    found = [[row["variant"] for row in measurement["rows"]] for measurement in json.loads(out.read_text())]
    assert found == [[*DENSE_KERNELS, "varlen", "flash2", "xformers"], [*DENSE_KERNELS, "flash3"]]
    assert [kernel for kernel, _ in groupby(call.split()[0] for call in calls)] == ["torch", "FA3"]


def test_where_bf16_is_emulated_benches_use_float32_and_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor with no more than AVX2, where an emulated product takes about thirty times as long."""
    monkeypatch.setattr(machine, "training_dtype", lambda: torch.float32)
    monkeypatch.setattr(blocks, "SEGMENTS", ((2, 17), (3, 5)))
    out = tmp_path / "attention.json"
    assert bench.main(["attention", "--rounds", "1", "--json", str(out)]) == 0
    [measurement] = json.loads(out.read_text())
    assert "torch.float32" in measurement["workload"]
    assert machine.precision_label() == "float32 (this machine has no fast bf16 matrix products)"
    assert small_step().optim.precision == preset_config("study_mini", 8).optim.precision == "fp32"
    capsys.readouterr()
    assert bench.main(["fp8", "--rounds", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: this machine has no fast bf16 matrix products, and this bench")


def test_every_variant_is_printed_as_it_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def variant(name: str) -> None:
        seen.append((name, capsys.readouterr().out))

    calls = {name: partial(variant, name) for name in "ab"}
    BenchRecorder(rounds=1).measure("sums", "small", calls, "a", with_memory=False, warmups=1)
    lines = [line for _, printed in seen for line in printed.splitlines()] + capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.,]+ m?s", "N", line) for line in lines] == [
        "sums: a: N to warm up",
        "sums: b: N to warm up",
        "sums: a: N, round 1 of 1",
        "sums: b: N, round 1 of 1",
    ]
    assert seen[-1][0] == "b"
    assert "sums: a: " in seen[-1][1], "the time of a is printed before b runs"


def recorded(run: Callable[[BenchRecorder], None], rounds: int = 1) -> list[Any]:
    recorder = BenchRecorder(rounds)
    run(recorder)
    return recorder.results


def test_a_bench_that_is_ended_leaves_what_it_had_measured(tmp_path: Path) -> None:
    out = tmp_path / "sums.json"
    recorder = BenchRecorder(rounds=2, file=out)
    recorder.add(BenchResult("sums", "smaller", "a", ()))
    calls: list[str] = []

    def dies() -> None:
        calls.append("b")
        if len(calls) == 4:  # two to warm up, then the second round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.measure("sums", "small", {"a": lambda: time.sleep(0.01), "b": dies}, "a")
    whole, begun = json.loads(out.read_text())
    assert whole["workload"] == "smaller"
    assert {row["variant"]: row["rounds"] for row in begun["rows"]} == {"a": 1, "b": 1}
    assert begun["rows"][0]["median_ms"] >= 10
    assert begun["rows"][1]["speedup"] > 1, "over the reference, in the round that both have run"
    assert begun["rows"][0]["warm_up_s"] >= 0.02
    assert list(tmp_path.iterdir()) == [out]


def test_a_variant_has_a_figure_before_the_next_compiles() -> None:
    """The last warm-up call's; of a single one, which compiles, none."""
    recorder, seen = BenchRecorder(rounds=1), []

    def note() -> None:
        rows = recorder.results[-1].as_dict()["rows"] if recorder.results else []
        seen.append([(row["variant"], row["rounds"], row["speedup"]) for row in rows])

    recorder.measure("sums", "small", {"a": int, "b": note}, "a", with_memory=False)
    assert seen[0] == [("a", 0, 1.0)]
    alone, seen = BenchRecorder(rounds=1), []
    recorder = alone
    alone.measure("sums", "small", {"a": int, "b": note}, "a", with_memory=False, warmups=1)
    assert seen[0] == []


def run_small() -> dict[str, BenchResult]:
    """The benches that compile, at a size for tests; traced and differentiated, but no code is generated: that takes a
    minute. In a process of their own, which may change torch."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    for module in (step, blocks):
        vars(module)["small_step"] = tiny_config
    step.matmul_peak = lambda dtype: 1e12  # measuring it takes longer than the benches here
    blocks.CROPS = {"clip": (2, 32), "ssl_local": (2, 16)}
    benches = (step.bench_step, blocks.bench_text, blocks.bench_compile)
    return {run.__name__: found for run in benches for found in recorded(run)}


@pytest.mark.L2
def test_the_benches_that_compile_run_small() -> None:
    found = run_ranks(run_small, 1, timeout=300.0, join=False)[0]
    ways = found["bench_step"].rows
    assert [row.variant for row in ways] == [
        "three passes, eager",
        "shared, eager",
        "three passes, compiled",
        "shared, compiled",
    ]
    assert all(row.mfu is not None and 0 < row.mfu < 1 for row in ways)
    assert "of the token slots" in found["bench_text"].notes[0]
    assert [row.variant for row in found["bench_compile"].rows] == ["eager", "compiled"]
    assert ", 0 breaks" in found["bench_compile"].notes[0]


def test_the_benches_step_is_the_one_the_docs_name() -> None:
    config = small_step()
    batch = random_batch(config)
    assert (len(batch.images), len(batch.global_crops), len(batch.local_crops)) == (32, 16, 64)
    captions = random_captions(4096, 77, 49_408, torch.Generator().manual_seed(1))
    lengths = captions.argmax(dim=1) + 1
    assert 19 < lengths.float().mean() < 21
    assert (captions.gather(1, lengths[:, None] - 1) == 49_407).all()


def test_the_depth_bench_compares_the_rate_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GROUPS", (CropGroup("clip", 4, 17, (4, 4)), CropGroup("ssl_local", 3, 5, (2, 2))))
    monkeypatch.setattr(blocks, "VIT", {"width": 32, "depth": 2, "heads": 2})
    for measurement in recorded(blocks.bench_depth):
        assert [row.variant for row in measurement.rows] == ["rate 0", "rate 0.3"]
        assert measurement.notes[0].startswith("73% of the tokens stay: ideally 1.36 times the speed")


def test_the_prototype_bench_tells_time_and_memory_of_both(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ROWS", 256)
    monkeypatch.setattr(losses, "PROTOTYPES", 512)
    monkeypatch.setattr(losses, "PROTOTYPE_WIDTH", 16)
    assert bench.main(["prototypes", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("x lower") == 2
    assert "dense" in out
    assert "chunks" in out


@pytest.mark.L2
def test_the_loader_bench_makes_the_same_tensors_with_both_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own check, that batches agree in types and shapes, runs here too; so do both corpora."""
    pytest.importorskip("skimage")
    pipelines = tuple(replace(each, batch=4, images=8) for each in loader.PIPELINES)
    monkeypatch.setattr(loader, "PIPELINES", pipelines)
    monkeypatch.setattr(loader, "CORES", (1,))
    found = recorded(loader.bench_loader)
    assert [measurement.workload.partition(":")[0] for measurement in found] == [each.name for each in pipelines]
    for measurement in found:
        assert {row.variant for row in measurement.rows} == {"pil", "ours, 1 rank of 1 thread(s)"}
        assert all(row.median_ms > 0 for row in measurement.rows)
        assert all("images/s" in note for note in measurement.notes)


def test_the_fp8_bench_tells_errors_and_what_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "SHAPES", {device: {"small": (40, 64, 96)} for device in ("cpu", "cuda")})
    monkeypatch.setattr(fp8, "matmul_peak", lambda dtype: 1e12)
    [found] = recorded(fp8.bench_fp8)
    assert {row.variant for row in found.rows} >= {"bf16", "fp8_torchao"}
    assert found.workload.startswith("small: 40 x 64 by 64 x 96")
    assert any(note.startswith("fp8_torchao: off float32 by 3") for note in found.notes)
    assert found.notes[-1] == "on a GPU the rule leaves this in bf16: too small to pay"
    assert torch.cuda.is_available() or "emulated on the CPU" in found.workload


def test_an_unknown_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        bench.main(["juggling"])
    assert refusal.value.code == 2
    assert "attention" in capsys.readouterr().err


def test_a_dry_run_has_one_round_and_takes_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        bench.main(["attention", "--dry", "--rounds", "3"])
    assert refusal.value.code == 2
    assert "not allowed with argument --dry" in capsys.readouterr().err
    recorder = BenchRecorder(rounds=1, is_dry=True)
    losses.bench_prototypes(recorder)
    assert all(shown.as_dict()["workload"].startswith("512 rows, 1024 prototypes") for shown in recorder.results)


def test_mfu_is_flops_over_time_over_peak() -> None:
    x = torch.ones(64, 64)
    recorder = BenchRecorder(rounds=3)
    found = recorder.measure("product", "64 x 64", {"a": lambda: x @ x}, "a", flops=2 * 64**3, peak=1e12)
    (row,) = found.rows
    assert row.mfu == pytest.approx(2 * 64**3 / (row.median_ms / 1000) / 1e12)
    assert row.speedup == 1.0


def test_the_machine_is_named_and_its_peak_measured() -> None:
    assert describe()["threads"] == torch.get_num_threads()
    assert "family" in str(describe()["device"]) or torch.cuda.is_available()
    assert matmul_peak(torch.float32, sizes=(128, 256)) > 1e9


def test_the_contrastive_bench_tells_tiles_and_the_whole_matrix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PAIRS", (5, 33))
    monkeypatch.setattr(losses, "WIDTH", 8)
    assert bench.main(["contrastive", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("softmax, 5 pairs of 8", "sigmoid, 33 pairs of 8", "whole matrix", "tiles", "peak MiB"):
        assert words in out


def test_the_masked_bench_runs_small(monkeypatch: pytest.MonkeyPatch) -> None:
    section = blocks.SECTION.model_copy(update={"width": 32, "depth": 2, "heads": 2, "buffer": 4})
    monkeypatch.setattr(blocks, "SECTION", section)
    monkeypatch.setattr(blocks, "TOKENS", 30)
    recorder = BenchRecorder(rounds=1)
    blocks.bench_masked(recorder)
    found: list[Any] = recorder.results
    assert [row.variant for row in found[0].rows] == ["exact", "filled", "full"]
    assert "4 + 4 (exact), 4 + 9 (filled), 4 + 30 (full)" in found[0].workload
