"""Cells of a scaling study, objectives x compute budgets, and the stages (commands) of each.

    study_cells(PRESETS["mini"])[0]          # Cell(objective=rec, budget 0, 2.0e12 FLOPs, 250 steps)

    layout = StudyLayout(Path("runs/study"), PRESETS["mini"], ranks=1)
    layout.shared()                 # corpus, features: once for all cells
    layout.stages(cell)             # tokenizer, evaluation, latents, generator, generation

    OUT/corpus/  features.safetensors  results.json  figures/
        cells/joint-2/tokenizer/  latents/  generator/  generation/  stages/  logs/
        locks/

A budget is a number of training FLOPs of the tokenizer (profiling/cost/step_flops.py: forward and backward, each
product once), not a number of steps: a step of the joint objective costs nearly twice one of reconstruction alone, and
an equal number of steps would credit the joint objective with compute that the others never had. Each takes as many
steps as the budget buys. Cells are ordered by budget, so that a study cut short is a smaller study rather than a third
of one.

A stage's fingerprint is a hash of its command, of the config it names and of the stages before it: changed science, or
another corpus, changes it, and what an earlier fingerprint has left is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs import Config, load_config
from configs.load import fingerprint, load_run
from model.packing import RankBatchSizes
from profiling.cost.step_flops import step_flops

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class StudyObjective:
    """A combination of training objectives; `overrides` select it in the tokenizer's config."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    has_clip: bool = True  # without it there is no text tower for zero-shot evaluation


_NO_CLIP = ("objectives.clip.weight=0",)
_NO_SSL = ("objectives.ssl.weight=0", "batch.ssl=0")
REC, JOINT = "rec", "joint"  # the objectives that the study's question compares
OBJECTIVES = (
    StudyObjective(REC, "rec", (*_NO_CLIP, *_NO_SSL), has_clip=False),
    StudyObjective("clip_rec", "clip + rec", _NO_SSL),
    StudyObjective("ssl_rec", "ssl + rec", _NO_CLIP, has_clip=False),
    StudyObjective(JOINT, "clip + ssl + rec"),
    StudyObjective("joint_noise", "clip + ssl + rec, latent noise", ("objectives.rec.noise.kind=interpolative",)),
)


@dataclass(frozen=True)
class StudyPreset:
    """Configs, budgets and command arguments of one study."""

    name: str
    tokenizer: Path
    generator: Path
    budgets: tuple[float, ...]  # training FLOPs of a tokenizer, rising
    corpus: tuple[str, ...]  # arguments of python -m data.corpus
    image_size: int  # pixels
    features: tuple[str, ...]  # arguments of python -m evaluation.features
    generate: tuple[str, ...]  # arguments of python -m evaluation.generate
    caption_slots: float  # of a caption in the packed text tower, empty ones included: measured
    # For estimates before any time has been measured; one thread of one rank:
    flops_per_second: float
    seconds: Mapping[str, float]  # of each stage after the tokenizer


MINI = StudyPreset(
    name="mini",
    tokenizer=CONFIGS / "study_mini.yaml",
    generator=CONFIGS / "generator_mini.yaml",
    budgets=(2e12, 6e12, 18e12, 54e12),
    corpus=("emoji", "--samples", "12000", "--held-out", "2000", "--size", "32", "--classes", "100"),
    image_size=32,
    features=("--size", "32"),
    generate=(
        *("--num-samples=2000", "--guidance=1,2,4", "--sampler=euler", "--steps=25"),
        *("--batch-size=250", "--precision=bfloat16"),
    ),
    caption_slots=14.5,
    flops_per_second=70e9,
    seconds={"evaluation": 45, "latents": 25, "generator": 300, "generation": 120},
)
PRESETS = {preset.name: preset for preset in (MINI,)}


@dataclass(frozen=True)
class Cell:
    """One tokenizer of the study, with its evaluation and generator."""

    objective: StudyObjective
    budget_idx: int
    steps: int
    flops: float  # of its training: steps x FLOPs of a step, nearest to the budget

    @property
    def name(self) -> str:
        """Objective and budget, such as "joint-2"; also the name of its directory."""
        return f"{self.objective.name}-{self.budget_idx}"


def study_cells(preset: StudyPreset) -> list[Cell]:
    """List all cells, cheapest budget first and, within a budget, in the order of OBJECTIVES."""
    of_a_step = {objective.name: flops_per_step(preset, objective) for objective in OBJECTIVES}
    found = []
    for budget_idx, budget in enumerate(preset.budgets):
        for objective in OBJECTIVES:
            steps = max(1, round(budget / of_a_step[objective.name]))
            found.append(Cell(objective, budget_idx, steps, steps * of_a_step[objective.name]))
    return found


def tokenizer_config(preset: StudyPreset, objective: StudyObjective, overrides: tuple[str, ...] = ()) -> Config:
    """Load the tokenizer's config for an objective. Raises UserError for a preset that does not fit the schema."""
    return load_config(preset.tokenizer, [*objective.overrides, *overrides])


def flops_per_step(preset: StudyPreset, objective: StudyObjective) -> float:
    """Count the training FLOPs of one step over all ranks."""
    config = tokenizer_config(preset, objective)
    rows = RankBatchSizes.per_rank(config, 1)
    return step_flops(config, rows, caption_tokens=rows.clip * preset.caption_slots).model_flops


ROOT = Path(__file__).resolve().parents[2]
PORT = "{port}"  # placeholder of a free port in a command


@dataclass(frozen=True)
class Stage:
    """One command of a cell. It is done if it exited with 0 and `result` exists."""

    name: str
    command: tuple[str, ...]
    result: Path
    folder: Path  # written by this stage alone; deleted before it starts again
    fingerprint: str
    is_training: bool = False  # resumes from the checkpoint in `folder`, if there is one

    @property
    def checkpoint(self) -> Path:
        """The file that the engine writes last when it saves a checkpoint."""
        return self.folder / "checkpoints" / "latest"


@dataclass(frozen=True)
class StudyLayout:
    """Paths of a study, and the stages that write them."""

    out: Path
    preset: StudyPreset
    ranks: int = 1

    @property
    def corpus(self) -> Path:
        """The directory of the shards."""
        return self.out / "corpus"

    @property
    def network(self) -> Path:
        """The file of the feature network for FID."""
        return self.out / "features" / "features.safetensors"

    def cell(self, cell: Cell) -> Path:
        """The directory of a cell."""
        return self.out / "cells" / cell.name

    def lock(self, name: str) -> Path:
        """The lock file (engine/run_directory.py) of a cell by its name, or of the shared stages ("shared")."""
        return self.out / "locks" / name

    def shared(self) -> list[Stage]:
        """Stages that all cells need: corpus and feature network."""
        kind, *rest = self.preset.corpus
        corpus = self._stage(
            "corpus", _module("data.corpus", kind, "--out", self.corpus, *rest), self.corpus / "manifest.json", ()
        )
        learn = _module("evaluation.features", "--data", self.corpus, "--out", self.network, *self.preset.features)
        return [corpus, self._stage("features", learn, self.network, (corpus,))]

    def stages(self, cell: Cell) -> list[Stage]:
        """Stages of a cell, from the tokenizer's training to generated images; each needs those before it."""
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
        """Build a stage; `science` replaces the command in the fingerprint: a training's leaves ranks and paths out."""
        words = [word.replace(str(self.out), "OUT") for word in (science or command[1:])]
        content = json.dumps([name, words, [stage.fingerprint for stage in needs]])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return Stage(name, command, result, result.parent, digest, is_training=science is not None)


def _module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def _path(key: str, path: Path) -> str:
    """Build an override whose value YAML reads as this path, whatever characters it contains."""
    return f"{key}={json.dumps(str(path))}"


def _launcher(ranks: int) -> tuple[str, ...]:
    """Return DeepSpeed's launcher; for one rank the interpreter alone, which then receives stop signals itself."""
    if ranks == 1:
        return (sys.executable,)
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed") or "deepspeed"
    return (found, "--num_accelerators", str(ranks), "--master_port", PORT)
