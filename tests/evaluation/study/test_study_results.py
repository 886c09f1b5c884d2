"""Cells measured on another machine: taken where all that decides their figures is the same, refused elsewhere."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs import UserError
from evaluation.features import CorpusNetwork, write_corpus_network
from evaluation.fid import open_network
from evaluation.study import results, runner
from evaluation.study.__main__ import overview_table
from evaluation.study.cells import OBJECTIVES, PRESETS, StudyLayout, study_cells
from evaluation.study.page import write_page
from evaluation.study.results import PublishedCells, publish, read_published
from evaluation.study.runner import WorkSession, run_cells
from tests.evaluation.study import made_up
from tests.evaluation.study.made_up import MadeUp, four_cells

pytestmark = pytest.mark.L0

CELLS = four_cells()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.005)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What another machine published after the two cells of the smaller budget."""
    network = tmp_path / "network.safetensors"
    write_corpus_network(network, CorpusNetwork(3, 16), 0.9, "corpus")
    figures = json.loads(json.dumps(made_up.EVALUATION).replace("corpus:1, 64-d, 90 % acc", open_network(network).name))
    monkeypatch.setitem(made_up.RESULTS, "evaluation", figures)
    layout = study(tmp_path / "there")
    own = PublishedCells(network=network, corpus="")  # stands in for training it: all lines of shell write JSON
    finish(layout, own, CELLS[:2])
    publish(layout, results.collect_results(layout, CELLS, own), tmp_path / "published")
    return tmp_path / "published"


def study(out: Path, science: str = "one") -> MadeUp:
    out.mkdir()
    return MadeUp(out, PRESETS["mini"], science=science, has_features=True)


def finish(layout: MadeUp, known: PublishedCells, cells: list[Any] | None = None) -> list[str]:
    """The cells that were done here."""
    asked = [cell for cell in (cells or CELLS) if cell.name not in known.rows]
    return run_cells(layout, asked, WorkSession(), lambda line: None, after_corpus=lambda: known.adopt(layout)).done


def test_known_cells_are_not_run_and_stand_beside_the_others(there: Path, tmp_path: Path) -> None:
    here = study(tmp_path / "here")
    known = read_published([there], here, CELLS)
    assert list(known.rows) == ["rec-0", "clip_rec-0"]
    assert finish(here, known) == ["rec-1", "clip_rec-1"]
    assert not any(line.startswith(("rec-0", "clip_rec-0", "shared-features")) for line in here.ran())
    assert here.network.read_bytes() == (there / "features.safetensors").read_bytes()
    found = results.collect_results(here, CELLS, known)
    assert [row["state"] for row in found["cells"]] == ["done"] * 4
    assert found["cells"][0] == json.loads((there / "results.json").read_text())["cells"][0]
    assert found["cells"][0]["machine"]["torch"]
    states = list(overview_table(here, CELLS, 1, known.rows).columns[4].cells)
    assert states == ["known", "known", "done", "done"]
    publish(here, found, tmp_path / "both")
    assert len(read_published([tmp_path / "both"], here, CELLS).rows) == 4
    assert len(read_published([there, tmp_path / "both"], here, CELLS).rows) == 4


def test_the_overview_names_every_cell_in_full_on_80_columns(tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO())
    cells = [replace(CELLS[0], objective=objective) for objective in OBJECTIVES]
    console.print(overview_table(study(tmp_path / "study"), cells, 1))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(f"{cell.name} " in shown for cell in cells), shown


def test_a_page_can_be_written_of_known_cells_alone(there: Path, tmp_path: Path) -> None:
    here = study(tmp_path / "here")
    pictures = tmp_path / "docs" / "images" / "study"
    pictures.mkdir(parents=True)
    (pictures / "rec_generated.png").write_bytes(b"a picture of then")
    found = results.collect_results(here, CELLS, read_published([there], here, CELLS))
    write_page(here, found, CELLS, tmp_path / "docs" / "study.md")
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "100 classes" in page
    assert "rec, 1.0e+12 FLOPs, generated" in page
    assert "reconstructed" not in page.partition("## Pictures")[2].partition("## What this is")[0]
    assert "`rec-1` (missing)" in page


def test_cells_of_another_science_are_run_again(there: Path, tmp_path: Path) -> None:
    assert read_published([there], study(tmp_path / "here", science="another"), CELLS).rows == {}


def test_another_corpus_is_refused(there: Path, tmp_path: Path) -> None:
    here = study(tmp_path / "here")
    here.corpus.mkdir()
    (here.corpus / "train-000000.tar").write_bytes(b"drawn with another font")
    published = json.loads((there / "results.json").read_text()) | {"corpus_digest": "0" * 64}
    (there / "results.json").write_text(json.dumps(published))
    known = read_published([there], here, CELLS)
    with pytest.raises(UserError, match="those cells learnt from another corpus \\(00000000"):
        known.adopt(here)


def test_a_study_that_was_begun_with_another_network_is_refused(there: Path, tmp_path: Path) -> None:
    here = study(tmp_path / "here")
    finish(here, PublishedCells(), CELLS[:1])  # with its own
    with pytest.raises(UserError, match="measured with another feature network"):
        finish(here, read_published([there], here, CELLS))


def test_what_was_measured_with_another_network_is_not_taken(there: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_bytes((there / "results.json").read_bytes())
    write_corpus_network(other / "features.safetensors", CorpusNetwork(3, 16), 0.9, "corpus")
    here = study(tmp_path / "here")
    assert read_published([other], here, CELLS).rows == {}
    with pytest.raises(UserError, match="another corpus or feature network"):
        read_published([there, other], here, CELLS)


def test_what_is_no_published_study_is_one_line(there: Path, tmp_path: Path) -> None:
    here = study(tmp_path / "here")
    with pytest.raises(UserError, match="give a folder that --publish has written"):
        read_published([tmp_path], here, CELLS)
    (there / "results.json").write_text(json.dumps({"preset": "maxi", "cells": [], "corpus_digest": ""}))
    with pytest.raises(UserError, match="is of the preset maxi, this is mini"):
        read_published([there], here, CELLS)
    with pytest.raises(UserError, match="has no feature network yet"):
        publish(here, {}, tmp_path / "published")


def test_what_this_house_has_published_counts_as_done(tmp_path: Path) -> None:
    """Where it does not: a setting was added without configs/section.py's Later, or what those cells did has changed,
    and then they are to be measured again."""
    layout, folder = StudyLayout(tmp_path, PRESETS["mini"]), Path("docs/study")
    published = json.loads((folder / "results.json").read_text())["cells"]
    known = read_published([folder], layout, study_cells(layout.preset))
    assert [*known.rows] == [row["cell"] for row in published if row["state"] == "done"]
    assert len(known.rows) == 20
