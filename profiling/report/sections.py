"""From runs to sections: what a report says, in the order in which it says it.

    sections([run])             # one run: first, median and last of every figure
    sections([run, other])      # two: the same plots with two lines, last figures with their ratio, configs' difference

Every figure of the log has a place: by the first prefix below that fits, else among the other figures. What a run is
without is said in a sentence.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from profiling.report.blocks import Block, Cell, Listing, Pictures, Section, Sentence, Stack, Table
from profiling.report.data import Run
from profiling.report.figures import figures, labels, plots, remarks
from profiling.report.flops_table import flops_table
from profiling.report.predictions import memory_tables, traffic_table
from profiling.report.roofline_section import rooflines
from profiling.report.summary import summary

FIRST_BAD_SAMPLES = 20
# Title and explanation of pictures, by the name of their files in a run's directory (engine/trainings/).
PICTURE_KINDS = {
    "latents": (
        "Latents",
        "Each square is the latent of the image in the same column of the reconstructions, coloured by the first "
        "three principal components of all latents shown: similar colours are similar latents",
    ),
    "reconstructions": (
        "Reconstructions",
        "Each column is one image of the step's batch: the first row is the input, the rows below are its "
        "reconstructions",
    ),
}
STAGE_2_ROWS = ": by the decoder of stage 1, then by the decoder in training"
MOST_LINES = 300  # of log.txt
_AN_ESTIMATE = "speed/seconds_left"  # of use while the run goes on, and told to the person who watches it


@dataclass(frozen=True)
class Group:
    """A section about the figures whose names begin with one of the prefixes."""

    name: str
    title: str
    prefixes: tuple[str, ...]
    absent: str  # what is said where no run has any
    is_from_zero: bool = True  # the axis of its plots


GROUPS = (
    Group("losses", "Losses", ("loss/",), "The log has no losses (loss/*).", False),
    Group(
        "flops",
        "FLOPs",
        ("speed/mfu", "speed/hfu", "speed/tflops", "flops/"),
        "The log has no utilisation (speed/mfu, speed/hfu, speed/tflops_per_rank).",
    ),
    Group("throughput", "Throughput", ("speed/",), "The log has no speeds (speed/*)."),
    Group(
        "phases",
        "Phases of a step",
        ("phase/", "straggler/"),
        "The log has no phases (phase/*): the run did not time them.",
    ),
    Group("memory", "Memory", ("memory/",), "The log has no memory figures (memory/*)."),
    Group("communication", "Communication", ("comm/",), "The log has no bytes of collectives (comm/*)."),
    Group("energy", "Energy", ("energy/",), "The log has no energy (energy/*): nothing measured it beside the run."),
    Group("health", "Learning health", ("health/", "optim/"), "The log has no health/* or optim/* figures.", False),
    Group("data", "Data health", ("data/",), "The log counts no bad samples (data/bad/*)."),
    Group("other", "Other figures", ("",), "Every figure of the log is in a section of its own."),
)
ORDER = (
    "losses", "throughput", "phases", "flops", "roofline", "memory", "communication", "energy", "health", "data",
    "other", "pictures", "choices", "configuration",
)  # fmt: skip


def sections(runs: list[Run]) -> list[Section]:
    """The whole report on one run, or on two."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.keys) if key != _AN_ESTIMATE]
    found = {group.name: _of_group(group, runs, keys_of(group, keys)) for group in GROUPS}
    found["roofline"] = Section("roofline", "Roofline", rooflines(runs))
    found["pictures"] = Section("pictures", "Reconstructions and latents", _pictures(runs))
    found["choices"] = Section("choices", "Chosen backends", _choices(runs))
    found["configuration"] = Section("configuration", "Configuration", _configuration(runs))
    return [Section("summary", "Summary", summary(runs)), *(found[name] for name in ORDER)]


def keys_of(group: Group, keys: list[str]) -> list[str]:
    """The keys that no earlier group has; totals first."""
    own = [key for key in keys if next(other for other in GROUPS if key.startswith(other.prefixes)) is group]
    return sorted(own, key=lambda key: not key.endswith("/total"))


def _of_group(group: Group, runs: list[Run], keys: list[str]) -> Section:
    special = {
        "phases": _phases,
        "flops": _flops,
        "memory": _memory,
        "communication": _communication,
        "data": _bad_samples,
    }.get(group.name, _nothing_special)
    blocks: list[Block] = [*special(runs, keys)]
    if keys:
        blocks += [*plots(runs, keys, group.is_from_zero), figures(runs, keys), *remarks(runs, keys)]
    else:
        blocks.append(Sentence(group.absent))
    return Section(group.name, group.title, blocks)


def _nothing_special(runs: list[Run], keys: list[str]) -> list[Block]:
    return []


def _phases(runs: list[Run], keys: list[str]) -> list[Block]:
    """A bar a run: the median milliseconds of each phase."""
    timed = [key for key in keys if key.endswith("_ms")]
    if not timed:
        return []
    parts = {key.removeprefix("phase/").removesuffix("_ms"): [run.median(key) or 0.0 for run in runs] for key in timed}
    return [Stack("Where a step's time goes (medians)", "ms a step", labels(runs), parts)]


def _flops(runs: list[Run], keys: list[str]) -> list[Block]:
    return [block for run, label in zip(runs, labels(runs), strict=True) for block in flops_table(run, label)]


def _memory(runs: list[Run], keys: list[str]) -> list[Block]:
    return _once([block for run, label in zip(runs, labels(runs), strict=True) for block in memory_tables(run, label)])


def _communication(runs: list[Run], keys: list[str]) -> list[Block]:
    return _once([block for run, label in zip(runs, labels(runs), strict=True) for block in traffic_table(run, label)])


def _once(blocks: list[Block]) -> list[Block]:
    """Without sentences that were said of the run before already."""
    return [block for idx, block in enumerate(blocks) if not isinstance(block, Sentence) or block not in blocks[:idx]]


def _bad_samples(runs: list[Run], keys: list[str]) -> list[Block]:
    blocks: list[Block] = []
    for run, label in zip(runs, labels(runs), strict=True):
        if run.bad_samples is None:
            blocks.append(Sentence(f"{label} has no bad_samples.jsonl, which a run begins when it meets a bad sample."))
            continue
        first = run.bad_samples[:FIRST_BAD_SAMPLES]
        rows: list[list[Cell]] = [[str(bad.get(name, "")) for name in ("key", "reason", "position")] for bad in first]
        caption = f"Bad samples of {label}: the first {len(first)} of {len(run.bad_samples):,}"
        blocks.append(Table(caption, ["sample", "reason", "met at position"], rows))
    return blocks


def _pictures(runs: list[Run]) -> list[Block]:
    """Of each kind the first, the middle and the last."""
    blocks: list[Block] = []
    for run, label in zip(runs, labels(runs), strict=True):
        if not run.pictures:
            blocks.append(Sentence(f"{label} has no pictures."))
        for kind, paths in run.pictures.items():
            shown = [paths[idx] for idx in sorted({0, len(paths) // 2, len(paths) - 1})]
            title, text = PICTURE_KINDS.get(kind, (kind, ""))
            if kind == "reconstructions" and run.config is not None and run.config.kind == "decoder_gan":
                text += STAGE_2_ROWS
            captions = [f"{title}{_step_suffix(path)}" for path in shown]
            blocks += [Sentence(f"{title} of {label}. {text}.")] * bool(text)
            blocks.append(Pictures(f"{title} of {label}", captions, shown))
    return blocks


def _step_suffix(path: Path) -> str:
    """Return the step in a picture's file name in words: reconstructions-00000300.png -> " after 300 steps"."""
    number = path.stem.rpartition("-")[2]
    return f" after {int(number):,} step{'s' * (int(number) != 1)}" if number.isdecimal() else ""


def _choices(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = []
    known = [run for run in runs if run.choices]
    if known:
        names = dict.fromkeys(name for run in known for name in run.choices or {})
        rows: list[list[Cell]] = [[name, *((run.choices or {}).get(name) for run in runs)] for name in names]
        blocks.append(Table("What every automatic setting became, and why", ["", *labels(runs)], rows))
    for run, label in zip(runs, labels(runs), strict=True):
        if not run.choices:
            blocks.append(
                Sentence(f"{label} has no choices.json; what it said at its start is below, where log.txt has it.")
            )
        if run.said:
            blocks.append(Listing(f"What {label} said (log.txt without reports)", run.said[:MOST_LINES]))
    return blocks


def _configuration(runs: list[Run]) -> list[Block]:
    blocks: list[Block] = []
    files: tuple[tuple[str, Callable[[Run], str | None]], ...] = (
        ("config.yaml", lambda run: run.config_text),
        ("ds_config.json", lambda run: run.ds_config_text),
    )
    for name, read in files:
        texts = [read(run) for run in runs]
        for text, label in zip(texts, labels(runs), strict=True):
            if text is None:
                blocks.append(Sentence(f"{label} has no {name}."))
            elif len(runs) == 1:
                blocks.append(Listing(name, text.splitlines()))
        if len(runs) == 2 and None not in texts:
            blocks.append(_difference(name, [(text or "").splitlines() for text in texts], labels(runs)))
    return blocks


def _difference(name: str, texts: list[list[str]], names: list[str]) -> Block:
    lines = list(difflib.unified_diff(texts[0], texts[1], names[0], names[1], n=2, lineterm=""))
    if not lines:
        return Sentence(f"{name} is the same in both.")
    return Listing(f"{name}: {names[0]} (-) against {names[1]} (+)", lines, is_difference=True)
