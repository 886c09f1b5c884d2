"""python -m evaluation.study.compare: two pages of a study, held against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.study.compare import main
from evaluation.study.page import render_page
from tests.evaluation.study.made_up import rows

pytestmark = pytest.mark.L0


def written(path: Path, gfid_by_objective: dict[str, list[float]]) -> str:
    found = {"preset": "mini", "corpus": {}, "image_size": 32, "cells": rows(gfid_by_objective)}
    path.write_text(render_page(found, {}))
    return str(path)


def test_quotients_are_of_the_cells_in_both_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = written(tmp_path / "there.md", {"rec": [40.0, 20.0], "clip_rec": [50.0], "joint": [60.0, 25.0]})
    here = written(tmp_path / "here.md", {"rec": [44.0, 20.0, 10.0], "joint": [54.0, 25.0, 8.0]})
    assert main([there, here]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "| gFID | 4 | 1.00 | 0.07 | 0.90, 1.10 |" in said, "1.1, 1, 0.9, 1"
    assert "| rFID | 4 | 1.00 | 0.00 | 1.00, 1.00 |" in said
    assert not [line for line in said if line.startswith("| guided")], "no cell has one"
    assert said[-2:] == ["- there: 1.50, 1.25", "- here: 1.23, 1.25, 0.80"]


def test_pages_that_cannot_be_compared_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_of_rec = written(tmp_path / "rec.md", {"rec": [40.0]})
    prose = tmp_path / "prose.md"
    prose.write_text("# A page\n\n| objective | steps |\n|---|---|\n| rec | 10 |\n")
    torn = tmp_path / "torn.md"
    torn.write_text(Path(page_of_rec).read_text().replace("| 40.00 |", "| 4O.00 |"))
    empty = written(tmp_path / "none.md", {})
    mistakes = {
        str(tmp_path / "absent.md"): "cannot be read",
        str(tmp_path): "cannot be read",
        str(prose): "has no table of cells",
        empty: "has no table of cells",
        str(torn): "'4O.00'",
        written(tmp_path / "joint.md", {"joint": [40.0]}): "no cell in common",
    }
    for other, says in mistakes.items():
        assert main([page_of_rec, other]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert says in error
        assert len(error.splitlines()) == 1
