"""The contrastive bench runs and tells both variants of both losses."""

from __future__ import annotations

import pytest

from profiling import bench
from profiling.benches import contrastive

pytestmark = pytest.mark.L0


def test_the_contrastive_bench_tells_tiles_and_the_whole_matrix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "PAIRS", (5, 33))
    monkeypatch.setattr(contrastive, "WIDTH", 8)
    assert bench.main(["contrastive", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("softmax, 5 pairs of 8", "sigmoid, 33 pairs of 8", "whole matrix", "tiles", "peak MiB"):
        assert words in out
