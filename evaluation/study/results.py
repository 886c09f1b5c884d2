"""Results of a study: results.json with one row for each cell, and cells published by other machines.

    found = collect_results(layout, cells, known)
    found["cells"][0]     # {"cell": "rec-0", "state": "done", "flops": 4.0e12, "figures": {"gfid": 41.2, ...}, ...}
    publish(layout, found, Path("docs/study"))                       # results.json, features.safetensors
    known = read_published([Path("docs/study")], layout, cells)      # PublishedCells(rows={"rec-0": {...}}, ...)
    known.adopt(layout)                                              # use its feature network in this study

"figures" are metrics on held-out or generated images: `probe` (linear, on the mean latent), `probe_features` (on CLS
and mean patch of the last block), `zero_shot`, `rfid`, `psnr_db`, `gfid` without guidance and `gfid_guided` with the
best scale. A metric that is not there yet, or that the objective does not have, is left out. `machine` describes where
a cell was measured; `science` is a hash of what decides its metrics.

Metrics of two machines are comparable if everything that decides them is the same: the science of each cell (the
fingerprints of its last stages), the corpus to the bit, and the feature network, which another processor would train to
other bits. So the network is published along with the rows, and rows that do not fit are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import UserError
from data.durable_files import write_atomic
from evaluation.fid import open_network
from evaluation.study.cells import Cell, StudyLayout
from evaluation.study.runner import is_done, mark_done, read_failure, read_record
from profiling.instruments.machine import describe

RESULTS, NETWORK = "results.json", "features.safetensors"
Row = dict[str, Any]


@dataclass(frozen=True)
class PublishedCells:
    """Rows of cells that other machines measured, by name; all with one feature network and one corpus (digest)."""

    rows: Mapping[str, Row] = field(default_factory=dict)
    network: Path | None = None
    corpus: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)  # of results.json, without its rows

    def adopt(self, layout: StudyLayout) -> None:
        """Use the published feature network instead of training one. Call it when the corpus exists, under the shared
        lock. Raises UserError if this study's corpus or network differ."""
        if self.network is None:
            return
        if (own := corpus_digest(layout)) != self.corpus:
            raise UserError(
                f"--known: those cells learnt from another corpus ({self.corpus[:8]}; {layout.corpus} is {own[:8]}): "
                "libraries and fonts of the system draw its images; install the same, or leave --known out"
            )
        [features] = [stage for stage in layout.shared() if stage.result == layout.network]
        if not is_done(layout.out, features):
            layout.network.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.network, layout.network)
            mark_done(layout.out, features)
        if layout.network.read_bytes() != self.network.read_bytes():
            raise UserError(
                f"--known: those cells were measured with another feature network than {layout.network}: give an --out "
                "that was begun with --known, or leave it out"
            )


def read_published(folders: Sequence[Path], layout: StudyLayout, cells: Sequence[Cell]) -> PublishedCells:
    """Read the rows of `folders` that are done and whose science is today's.

    Raises UserError for a folder without results, of another preset, or measured with another network than the first.
    """
    rows: dict[str, Row] = {}
    network, corpus, setting = None, "", {}
    science = {cell.name: science_fingerprint(layout, cell) for cell in cells}
    for folder in folders:
        found = _read_published(folder, layout)
        if network is None:
            network, corpus, setting = folder / NETWORK, found["corpus_digest"], found
        elif found["corpus_digest"] != corpus or (folder / NETWORK).read_bytes() != network.read_bytes():
            raise UserError(
                f"--known {folder}: its cells have another corpus or feature network than {network.parent}'s"
            )
        name = open_network(folder / NETWORK).name
        for row in found["cells"]:
            is_same = science.get(row["cell"]) == row.get("science") and row["figures"].get("network") == name
            if row["state"] == "done" and is_same:
                rows.setdefault(row["cell"], row)
    return PublishedCells(rows, network, corpus, {key: value for key, value in setting.items() if key != "cells"})


def publish(layout: StudyLayout, found: Mapping[str, Any], folder: Path) -> None:
    """Write what --known reads. Raises UserError if the study has no feature network yet."""
    if not layout.network.is_file():
        raise UserError(f"--publish {folder}: {layout.out} has no feature network yet, so no cell has figures")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS, json.dumps(found, indent=1) + "\n")
    shutil.copyfile(layout.network, folder / NETWORK)


def science_fingerprint(layout: StudyLayout, cell: Cell) -> str:
    """Join the fingerprints that decide a cell's metrics, except the corpus's images and the network's weights."""
    return " ".join(stage.fingerprint for stage in layout.stages(cell) if stage.name in ("evaluation", "generation"))


def corpus_digest(layout: StudyLayout) -> str:
    """Hash the corpus's shards (sha256); "" without any."""
    digest, shards = hashlib.sha256(), sorted(layout.corpus.glob("*.tar"))
    for shard in shards:
        digest.update(shard.read_bytes())
    return digest.hexdigest() if shards else ""


def _read_published(folder: Path, layout: StudyLayout) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RESULTS).read_text())
        preset, _, _ = found["preset"], found["cells"], found["corpus_digest"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--known {folder}: {folder / RESULTS} cannot be read ({type(error).__name__}: {error}); give a folder "
            "that --publish has written"
        ) from None
    if preset != layout.preset.name:
        raise UserError(f"--known {folder} is of the preset {preset}, this is {layout.preset.name}: leave it out")
    return found


def collect_results(layout: StudyLayout, cells: Sequence[Cell], known: PublishedCells | None = None) -> dict[str, Any]:
    """Build the content of results.json; cells that are not done here may be `known` from other machines."""
    preset, known = layout.preset, known or PublishedCells()
    corpus = _read_json(layout.corpus / "manifest.json").get("arguments")
    return {
        "preset": preset.name,
        "budgets": list(preset.budgets),
        "image_size": preset.image_size,
        "generate": list(preset.generate),
        "corpus": known.setting.get("corpus", {}) if corpus is None else corpus,
        "corpus_digest": corpus_digest(layout) or known.corpus,
        "cells": [_own_or_known(layout, cell, known) for cell in cells],
    }


def cell_state(layout: StudyLayout, cell: Cell) -> str:
    """Return the state of a cell on this machine: done, failed, partial or missing."""
    folder, stages = layout.cell(cell), layout.stages(cell)
    num_done = sum(is_done(folder, stage) for stage in stages)
    if num_done == len(stages):
        return "done"
    return "failed" if read_failure(folder) else "partial" if num_done else "missing"


def _own_or_known(layout: StudyLayout, cell: Cell, known: PublishedCells) -> Row:
    own = _row(layout, cell)
    return own if own["state"] == "done" else known.rows.get(cell.name, own)


def _row(layout: StudyLayout, cell: Cell) -> Row:
    folder, state = layout.cell(cell), cell_state(layout, cell)
    done = {stage.name: stage for stage in layout.stages(cell) if is_done(folder, stage)}
    figures: dict[str, Any] = {}
    if "evaluation" in done:
        figures |= _tokenizer_metrics(_read_json(done["evaluation"].result))
    if "generation" in done:
        figures |= _generator_metrics(_read_json(done["generation"].result))
    row: Row = {
        "cell": cell.name, "objective": cell.objective.name, "title": cell.objective.title, "budget": cell.budget_idx,
        "steps": cell.steps, "flops": cell.flops, "state": state, "figures": figures,
        "seconds": {stage.name: read_record(folder, stage).get("seconds", 0.0) for stage in done.values()},
        "science": science_fingerprint(layout, cell), "machine": describe(),
    }  # fmt: skip
    return row | ({"failure": read_failure(folder)} if state == "failed" else {})


def _tokenizer_metrics(found: dict[str, Any]) -> dict[str, Any]:
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


def _generator_metrics(found: dict[str, Any]) -> dict[str, Any]:
    by_guidance = {row["guidance"]: row["gfid"] for row in found["results"]}
    figures = {"gfid": by_guidance[1.0], "samples": found["results"][0]["samples"]}
    guided = {scale: value for scale, value in by_guidance.items() if scale != 1.0}
    if guided:
        best = min(guided, key=guided.__getitem__)
        figures |= {"gfid_guided": guided[best], "guidance": best}
    return figures


def write_study_results(path: Path, found: dict[str, Any]) -> None:
    """Write results.json atomically: other processes of the study write it too."""
    write_atomic(path, json.dumps(found, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    return content
