"""Every bench runs, checks its variants against each other and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from profiling import bench
from profiling.benches import attention
from profiling.machine import describe, matmul_peak
from profiling.measurement import measure

pytestmark = pytest.mark.L0


def test_the_attention_bench_tells_every_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SEGMENTS", ((2, 17), (3, 5)))
    out = tmp_path / "attention.json"
    assert bench.main(["attention", "--rounds", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [measurement["name"] for measurement in found] == ["attention"] * 2
    for measurement in found:
        assert measurement["machine"]["torch"] == torch.__version__
        assert {row["variant"] for row in measurement["rows"]} == set(attention.BACKENDS)
        assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in measurement["rows"])
    assert "median ms" in capsys.readouterr().out


def test_an_unknown_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        bench.main(["juggling"])
    assert refusal.value.code == 2
    assert "attention" in capsys.readouterr().err


def test_mfu_is_flops_over_time_over_peak() -> None:
    x = torch.ones(64, 64)
    found = measure("product", "64 x 64", {"a": lambda: x @ x}, "a", rounds=3, flops=2 * 64**3, peak=1e12)
    (row,) = found.rows
    assert row.mfu == pytest.approx(2 * 64**3 / (row.median_ms / 1000) / 1e12)
    assert row.speedup == 1.0


def test_the_machine_is_named_and_its_peak_measured() -> None:
    assert describe()["threads"] == torch.get_num_threads()
    assert "family" in str(describe()["device"]) or torch.cuda.is_available()
    assert matmul_peak(torch.float32) > 1e9
