"""The stages of a cell: commands of this house, what each leaves behind, and what it depends on.

    layout = Layout(Path("runs/study"), PRESETS["mini"], ranks=1)
    layout.shared()                 # corpus, features: once for all cells
    layout.stages(cell)             # tokenizer, evaluation, latents, generator, generation

    OUT/corpus/  features.safetensors  results.json  figures/
        cells/joint-2/tokenizer/  latents/  generator/  generation/  stages/  logs/
        locks/

A stage's fingerprint is that of its command, of the config it names and of the stages before it: changed science, or
another corpus, is another fingerprint, and what lies there of the old one is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.load import fingerprint, load_run
from evaluation.study.preset import Cell, Preset

ROOT = Path(__file__).resolve().parents[2]
PORT = "{port}"  # stands in a command where a free port goes


@dataclass(frozen=True)
class Stage:
    """One command. It is done when it ended well and `result` is there."""

    name: str
    command: tuple[str, ...]
    result: Path
    folder: Path  # what it writes, alone: thrown away to start afresh
    fingerprint: str
    is_training: bool = False  # goes on from the checkpoint in `folder`, if there is one

    @property
    def checkpoint(self) -> Path:
        """What the engine writes last when it saves."""
        return self.folder / "checkpoints" / "latest"


@dataclass(frozen=True)
class Layout:
    """Where everything of a study lies, and the commands that put it there."""

    out: Path
    preset: Preset
    ranks: int = 1

    @property
    def corpus(self) -> Path:
        """The directory of the shards."""
        return self.out / "corpus"

    @property
    def network(self) -> Path:
        """The file of the network that FID compares features of."""
        return self.out / "features" / "features.safetensors"

    def cell(self, cell: Cell) -> Path:
        """The directory of a cell."""
        return self.out / "cells" / cell.name

    def lock(self, name: str) -> Path:
        """The lock (engine/lock.py) of a cell by its name, or of what all cells share."""
        return self.out / "locks" / name

    def shared(self) -> list[Stage]:
        """What all cells need."""
        kind, *rest = self.preset.corpus
        corpus = self._stage(
            "corpus", _module("data.corpus", kind, "--out", self.corpus, *rest), self.corpus / "manifest.json", ()
        )
        learn = _module("evaluation.features", "--data", self.corpus, "--out", self.network, *self.preset.features)
        return [corpus, self._stage("features", learn, self.network, (corpus,))]

    def stages(self, cell: Cell) -> list[Stage]:
        """From nothing to generated pictures; each needs those before it."""
        preset, here, shared = self.preset, self.cell(cell), self.shared()
        run, latents, generator, generation = (
            here / name for name in ("tokenizer", "latents", "generator", "generation")
        )
        tokenizer = self._training(
            "tokenizer", preset.tokenizer, run, shared[:1],
            [
                f"name={cell.name}", *cell.objective.overrides, f"optim.steps={cell.steps}",
                _path("data.train", self.corpus / "train-*.tar"),
                _path("data.held_out", self.corpus / "held_out-*.tar"),
                _path("data.tokenizer", self.corpus / "tokenizer.json"),
            ],
        )  # fmt: skip
        tasks = "linear_probe,reconstruction" + (",zero_shot" if cell.objective.has_clip else "")
        out = here / "evaluation"
        evaluate = _module("evaluation.run", run, "--tasks", tasks, "--fid", self.network, "--out", out)
        evaluation = self._stage("evaluation", evaluate, out / "evaluation.json", (*shared, tokenizer))
        encode = _module("evaluation.latents", run, "--data", self.corpus / "train-*.tar", "--out", latents)
        encoded = self._stage("latents", encode, latents / "manifest.json", (tokenizer,))
        learned = self._training(
            "generator", preset.generator, generator, (encoded,),
            [f"name={cell.name}-generator", _path("latents.train", latents)],
        )  # fmt: skip
        generate = _module(
            "evaluation.generate", generator, "--tokenizer", run, "--fid", self.network, "--out", generation,
            *preset.generate,
        )  # fmt: skip
        generated = self._stage("generation", generate, generation / "generation.json", (shared[1], learned))
        return [tokenizer, evaluation, encoded, learned, generated]

    def _training(self, name: str, config: Path, folder: Path, needs: Iterable[Stage], overrides: list[str]) -> Stage:
        command = (
            *_launcher(self.ranks), str(ROOT / "engine/launch.py"), "--config", str(config),
            "--ds_config", str(ROOT / "configs/deepspeed/zero1.json"), _path("system.run_dir", folder), *overrides,
        )  # fmt: skip
        science = (fingerprint(load_run(config)), *overrides)
        return self._stage(name, command, folder / "weights.safetensors", needs, science)

    def _stage(
        self,
        name: str,
        command: tuple[str, ...],
        result: Path,
        needs: Iterable[Stage],
        science: tuple[str, ...] | None = None,
    ) -> Stage:
        """`science` is what counts of the command; of a training it leaves ranks and places out."""
        words = [word.replace(str(self.out), "OUT") for word in (science or command[1:])]
        content = json.dumps([name, words, [stage.fingerprint for stage in needs]])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return Stage(name, command, result, result.parent, digest, is_training=science is not None)


def _module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def _path(key: str, path: Path) -> str:
    """An override that YAML reads as this very path, whatever signs are in it."""
    return f"{key}={json.dumps(str(path))}"


def _launcher(ranks: int) -> tuple[str, ...]:
    """DeepSpeed's, of this interpreter; a rank alone needs none, and is told at first hand when it is to stop."""
    if ranks == 1:
        return (sys.executable,)
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed") or "deepspeed"
    return (found, "--num_accelerators", str(ranks), "--master_port", PORT)
