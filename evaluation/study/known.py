"""What a study knows from elsewhere: rows of cells that another machine has measured, and the network it measured with.

    publish(layout, found, Path("docs/study"))                  # results.json, features.safetensors
    known = read_known([Path("docs/study")], layout, cells)     # Known(rows={"rec-0": {...}}, network=Path(...), ...)
    known.adopt(layout)                                         # its network is this study's too

Figures of two machines may stand in one plot where everything that decides them is the same: the science of each cell
(the fingerprints of its last stages), the corpus to the bit, and the feature network, which another processor would
train to other bits. So the network travels along, and rows that do not fit are refused, not mixed in.
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
from evaluation.feature_network import open_network
from evaluation.study.carry_out import is_done, mark_done
from evaluation.study.preset import Cell
from evaluation.study.stages import Layout

RESULTS, NETWORK = "results.json", "features.safetensors"
Row = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """`rows` by cell; empty where nothing is known. `network` is that of all of them, `corpus` the digest of theirs."""

    rows: Mapping[str, Row] = field(default_factory=dict)
    network: Path | None = None
    corpus: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)  # what results.json says beside its rows

    def adopt(self, layout: Layout) -> None:
        """Puts the network in the place of the one that this study would train. Call it with the corpus made, under the
        lock of what is shared. Raises UserError where corpus or network of this study are others."""
        if self.network is None:
            return
        if (own := corpus_digest(layout)) != self.corpus:
            raise UserError(
                f"--known: those cells learnt from another corpus ({self.corpus[:8]}; {layout.corpus} is {own[:8]}): "
                "libraries and fonts of the system draw its pictures; install the same, or leave --known out"
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


def read_known(folders: Sequence[Path], layout: Layout, cells: Sequence[Cell]) -> Known:
    """The rows of `folders` that are done and whose science is today's.

    Raises UserError for a folder without results, of another preset, or measured with another network than the first.
    """
    rows: dict[str, Row] = {}
    network, corpus, setting = None, "", {}
    science = {cell.name: science_of(layout, cell) for cell in cells}
    for folder in folders:
        found = _read(folder, layout)
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
    return Known(rows, network, corpus, {key: value for key, value in setting.items() if key != "cells"})


def publish(layout: Layout, found: Mapping[str, Any], folder: Path) -> None:
    """Writes what --known reads. Raises UserError where the study has no network yet."""
    if not layout.network.is_file():
        raise UserError(f"--publish {folder}: {layout.out} has no feature network yet, so no cell has figures")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS, json.dumps(found, indent=1) + "\n")
    shutil.copyfile(layout.network, folder / NETWORK)


def science_of(layout: Layout, cell: Cell) -> str:
    """What decides a cell's figures, short of its corpus's pictures and the network's weights."""
    return " ".join(stage.fingerprint for stage in layout.stages(cell) if stage.name in ("evaluation", "generation"))


def corpus_digest(layout: Layout) -> str:
    """sha256 over the corpus's shards; "" where there is none."""
    digest, shards = hashlib.sha256(), sorted(layout.corpus.glob("*.tar"))
    for shard in shards:
        digest.update(shard.read_bytes())
    return digest.hexdigest() if shards else ""


def _read(folder: Path, layout: Layout) -> dict[str, Any]:
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
