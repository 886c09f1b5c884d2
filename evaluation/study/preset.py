"""What a scaling study consists of: its objectives, its budgets, and what is the same in every cell.

    cells(PRESETS["mini"])[0]          # Cell(objective=rec, budget 0, 2.0e12 FLOPs, 250 steps)

The axis is compute, so a budget is a number of training FLOPs of the tokenizer (profiling/cost/step_flops.py: forward and
backward, each product once) and not a number of steps: a step of the joint objective costs nearly twice one of
reconstruction alone, and an equal number of steps would credit the joint objective with compute that the others never
had. Each objective takes as many steps as the budget buys, so a column of the study compares like with like.

The order is by budget, so that what is there after an hour is a smaller study and not a third of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs import Config, load_config
from model.packing import RankBatchSizes
from profiling.cost.step_flops import step_flops

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Objective:
    """What a tokenizer learns from. `overrides` are keys of the tokenizer's config."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    has_clip: bool = True  # else there is no text tower to ask for a zero-shot answer


_NO_CLIP = ("objectives.clip.weight=0",)
_NO_SSL = ("objectives.ssl.weight=0", "batch.ssl=0")
REC, JOINT = "rec", "joint"  # those that the study's question is about
OBJECTIVES = (
    Objective(REC, "rec", (*_NO_CLIP, *_NO_SSL), has_clip=False),
    Objective("clip_rec", "clip + rec", _NO_SSL),
    Objective("ssl_rec", "ssl + rec", _NO_CLIP, has_clip=False),
    Objective(JOINT, "clip + ssl + rec"),
    Objective("joint_noise", "clip + ssl + rec, latent noise", ("objectives.rec.noise.kind=interpolative",)),
)


@dataclass(frozen=True)
class Preset:
    """Files and figures of one study; lists of words are arguments of the house's own commands."""

    name: str
    tokenizer: Path
    generator: Path
    budgets: tuple[float, ...]  # training FLOPs of a tokenizer, rising
    corpus: tuple[str, ...]  # of python -m data.corpus
    image_size: int  # pixels
    features: tuple[str, ...]  # of python -m evaluation.features
    generate: tuple[str, ...]  # of python -m evaluation.generate
    caption_slots: float  # that a caption takes in the text tower once packed, empty ones included: measured
    # To estimate times before any has been measured, of one thread of one rank:
    flops_per_second: float
    seconds: Mapping[str, float]  # of the stages behind a tokenizer


MINI = Preset(
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
    """One tokenizer and what follows from it."""

    objective: Objective
    budget_idx: int
    steps: int
    flops: float  # of its training: steps times those of a step, next to the budget

    @property
    def name(self) -> str:
        """Objective and budget: "joint-2". Its directory is called so."""
        return f"{self.objective.name}-{self.budget_idx}"


def cells(preset: Preset) -> list[Cell]:
    """All cells, the cheapest budget first and, within one, in the order of OBJECTIVES."""
    of_a_step = {objective.name: flops_of_a_step(preset, objective) for objective in OBJECTIVES}
    found = []
    for budget_idx, budget in enumerate(preset.budgets):
        for objective in OBJECTIVES:
            steps = max(1, round(budget / of_a_step[objective.name]))
            found.append(Cell(objective, budget_idx, steps, steps * of_a_step[objective.name]))
    return found


def config_of(preset: Preset, objective: Objective, overrides: tuple[str, ...] = ()) -> Config:
    """The tokenizer's config. Raises UserError for a preset that does not fit the schema."""
    return load_config(preset.tokenizer, [*objective.overrides, *overrides])


def flops_of_a_step(preset: Preset, objective: Objective) -> float:
    """Training FLOPs of one step over all ranks."""
    config = config_of(preset, objective)
    rows = RankBatchSizes.per_rank(config, 1)
    return step_flops(config, rows, caption_tokens=rows.clip * preset.caption_slots).model_flops
