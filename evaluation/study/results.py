"""What a study has found so far: results.json, one row for each cell.

    found = collect(layout, cells, known)
    found["cells"][0]     # {"cell": "rec-0", "state": "done", "flops": 4.0e12, "figures": {"gfid": 41.2, ...}, ...}

Figures, all on held-out or generated pictures: `probe` (linear, on the mean latent), `probe_features` (on CLS and mean
patch of the last block), `zero_shot`, `rfid`, `psnr_db`, `gfid` without guidance and `gfid_guided` with the best scale.
A figure that is not there yet, or that the objective has not got, is left out. `machine` says what a cell was measured
on, `science` what decides its figures (evaluation/study/known.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.durable_files import write_atomic
from evaluation.study.carry_out import is_done, read_record
from evaluation.study.known import Known, corpus_digest, science_of
from evaluation.study.preset import Cell
from evaluation.study.stages import Layout
from evaluation.study.work import failure
from profiling.instruments.machine import describe

Row = dict[str, Any]


def collect(layout: Layout, cells: Sequence[Cell], known: Known | None = None) -> dict[str, Any]:
    """The content of results.json; cells that are not done here may be known from elsewhere."""
    preset, known = layout.preset, known or Known()
    corpus = _read(layout.corpus / "manifest.json").get("arguments")
    return {
        "preset": preset.name,
        "budgets": list(preset.budgets),
        "image_size": preset.image_size,
        "generate": list(preset.generate),
        "corpus": known.setting.get("corpus", {}) if corpus is None else corpus,
        "corpus_digest": corpus_digest(layout) or known.corpus,
        "cells": [_own_or_known(layout, cell, known) for cell in cells],
    }


def state_of(layout: Layout, cell: Cell) -> str:
    """done, failed, partial or missing, here."""
    folder, stages = layout.cell(cell), layout.stages(cell)
    num_done = sum(is_done(folder, stage) for stage in stages)
    if num_done == len(stages):
        return "done"
    return "failed" if failure(folder) else "partial" if num_done else "missing"


def _own_or_known(layout: Layout, cell: Cell, known: Known) -> Row:
    own = _row(layout, cell)
    return own if own["state"] == "done" else known.rows.get(cell.name, own)


def _row(layout: Layout, cell: Cell) -> Row:
    folder, state = layout.cell(cell), state_of(layout, cell)
    done = {stage.name: stage for stage in layout.stages(cell) if is_done(folder, stage)}
    figures: dict[str, Any] = {}
    if "evaluation" in done:
        figures |= _of_tokenizer(_read(done["evaluation"].result))
    if "generation" in done:
        figures |= _of_generator(_read(done["generation"].result))
    row: Row = {
        "cell": cell.name, "objective": cell.objective.name, "title": cell.objective.title, "budget": cell.budget_idx,
        "steps": cell.steps, "flops": cell.flops, "state": state, "figures": figures,
        "seconds": {stage.name: read_record(folder, stage).get("seconds", 0.0) for stage in done.values()},
        "science": science_of(layout, cell), "machine": describe(),
    }  # fmt: skip
    return row | ({"failure": failure(folder)} if state == "failed" else {})


def _of_tokenizer(found: dict[str, Any]) -> dict[str, Any]:
    probe, shot, rec = (found.get(task, {}) for task in ("linear_probe", "zero_shot", "reconstruction"))
    [(network, rfid)] = [(name, value) for name, value in rec.items() if name.startswith("rfid[")]
    figures = {
        "probe": probe["latent_top1"],
        "probe_features": probe["last_1_block_top1"],
        "rfid": rfid,
        "psnr_db": rec["psnr_db"],
        "network": network.removeprefix("rfid[").removesuffix("]"),
        "images": rec["images"],
    }
    return figures | ({"zero_shot": shot["top1"], "chance": shot["chance"]} if shot else {})


def _of_generator(found: dict[str, Any]) -> dict[str, Any]:
    by_guidance = {row["guidance"]: row["gfid"] for row in found["results"]}
    figures = {"gfid": by_guidance[1.0], "samples": found["results"][0]["samples"]}
    guided = {scale: value for scale, value in by_guidance.items() if scale != 1.0}
    if guided:
        best = min(guided, key=guided.__getitem__)
        figures |= {"gfid_guided": guided[best], "guidance": best}
    return figures


def write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: other processes of the study write it too."""
    write_atomic(path, json.dumps(found, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    return content
