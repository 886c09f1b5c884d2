"""A study of four cells whose commands are lines of shell: what is orchestrated, without any training.

Each stage appends its name to OUT/ran and writes its result; a file OUT/break-CELL-STAGE makes it fail, one called
OUT/hang-CELL-STAGE makes it save a checkpoint and wait to be stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.study.cells import OBJECTIVES, PRESETS, Cell, Stage, StudyLayout

NAMES = ("tokenizer", "evaluation", "latents", "generator", "generation")
EVALUATION = {
    "linear_probe": {"latent_top1": 0.3, "last_1_block_top1": 0.5},
    "zero_shot": {"top1": 0.2, "chance": 0.01},
    "reconstruction": {"rfid[corpus:1, 64-d, 90 % acc]": 3.5, "psnr_db": 27.0, "images": 2000},
}
GENERATION = {
    "results": [
        {"guidance": 1.0, "gfid": 42.0, "samples": 2000},
        {"guidance": 2.0, "gfid": 31.0, "samples": 2000},
        {"guidance": 4.0, "gfid": 35.0, "samples": 2000},
    ]
}
RESULTS = {"evaluation": EVALUATION, "generation": GENERATION}


@dataclass(frozen=True)
class MadeUp(StudyLayout):
    """Stands in for the layout of a real study; `science` goes into every fingerprint of a tokenizer."""

    science: str = "one"
    has_features: bool = False  # a shared stage of its own; else FID's network is nobody's business

    def shared(self) -> list[Stage]:
        manifest = {"arguments": {"classes": 100}}
        corpus = self._line("shared", "corpus", self.corpus / "manifest.json", "f0", manifest)
        features = self._line("shared", "features", self.network, "f1", {})
        return [corpus, features] if self.has_features else [corpus]

    def stages(self, cell: Cell) -> list[Stage]:
        found: list[Stage] = []
        for name in NAMES:
            before = found[-1].fingerprint if found else f"{self.science}-{cell.name}"
            result = self.cell(cell) / name / "result.json"
            found.append(self._line(cell.name, name, result, f"{name}<{before}", RESULTS.get(name, {})))
        return found

    def _line(self, owner: str, name: str, result: Path, fingerprint: str, content: Any) -> Stage:
        checkpoints, sign = result.parent / "checkpoints", f"{self.out}/hang-{owner}-{name}"
        script = (
            f"echo {owner}-{name} $* >> {self.out}/ran; "
            f"test -e {self.out}/break-{owner}-{name} && {{ echo error: broken on purpose; exit 3; }}; "
            f"if test -e {sign}; then mkdir -p {checkpoints}; echo 7 > {checkpoints}/latest; rm {sign}; sleep 60; fi; "
            f"echo '{json.dumps(content)}' > {result}"
        )
        command = ("/bin/sh", "-c", script, "sh")
        is_training = name in ("tokenizer", "generator")
        return Stage(name, command, result, result.parent, fingerprint, is_training)

    def ran(self) -> list[str]:
        """The stages that were started, in order."""
        path = self.out / "ran"
        return [" ".join(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def made_up(out: Path, science: str = "one") -> MadeUp:
    out.mkdir(exist_ok=True)
    return MadeUp(out, PRESETS["mini"], science=science)


def four_cells() -> list[Cell]:
    """Two budgets of two objectives, in the order of a study."""
    return [Cell(objective, idx, 10 * 2**idx, 1e12 * 2**idx) for idx in range(2) for objective in OBJECTIVES[:2]]


def rows(gfid_by_objective: Mapping[str, Iterable[float]]) -> list[dict[str, Any]]:
    """Rows of results.json with so many budgets, doubling from 1e12 FLOPs."""
    titles = {objective.name: objective.title for objective in OBJECTIVES}
    return [
        {
            "cell": f"{name}-{idx}", "objective": name, "title": titles[name], "budget": idx, "steps": 10,
            "state": "done", "flops": 1e12 * 2**idx, "seconds": {}, "figures": {
                "gfid": value, "probe": 0.1 + idx / 10, "probe_features": 0.4, "rfid": 9.0 - idx, "psnr_db": 20.0 + idx,
                "network": "corpus:1", "samples": 2000, "images": 500,
            },
        }
        for name, values in gfid_by_objective.items()
        for idx, value in enumerate(values)
    ]  # fmt: skip
