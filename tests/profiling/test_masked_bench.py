"""The bench of MAR's encoder runs, and its variants compute the same."""

from __future__ import annotations

from typing import Any

import pytest

from profiling.benches import masked
from profiling.measurement import Recorder

pytestmark = pytest.mark.L0


def test_the_masked_bench_runs_small(monkeypatch: pytest.MonkeyPatch) -> None:
    section = masked.SECTION.model_copy(update={"width": 32, "depth": 2, "heads": 2, "buffer": 4})
    monkeypatch.setattr(masked, "SECTION", section)
    monkeypatch.setattr(masked, "TOKENS", 30)
    recorder = Recorder(rounds=1)
    masked.run(recorder)
    found: list[Any] = recorder.results
    assert [row.variant for row in found[0].rows] == ["exact", "filled", "full"]
    assert "4 + 4 (exact), 4 + 9 (filled), 4 + 30 (full)" in found[0].workload
