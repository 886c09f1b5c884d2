"""Sections of a report on one run or on two, in their order.

    sections([run])             # first, median and last of every metric
    sections([run, other])      # the same plots with two lines, last values with their ratio, the configs' difference

Every metric of the log is in the section of the first prefix below that fits, else among the other figures. What a run
lacks is stated in a sentence.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from profiling.report.blocks import (
    Cell,
    ImageGallery,
    Paragraph,
    ReportBlock,
    ReportSection,
    ReportTable,
    StackedBars,
    TextListing,
)
from profiling.report.cost_sections import flops_table, memory_tables, rooflines, traffic_table
from profiling.report.metrics import labelled, labels, metric_plots, metric_table, remarks, side_by_side
from profiling.report.run_record import RunRecord, number

MAX_BAD_SAMPLES = 20
# Title and explanation of pictures, by the name of their files in a run's directory (engine/tasks/).
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
MAX_LINES = 300  # of log.txt
_ESTIMATE = "speed/seconds_left"  # of use only while the run goes on


@dataclass(frozen=True)
class MetricSection:
    """A section on the metrics whose names begin with one of the prefixes."""

    name: str
    title: str
    prefixes: tuple[str, ...]
    absent: str  # the sentence where no run has any
    is_from_zero: bool = True  # the axis of its plots


METRIC_SECTIONS = (
    MetricSection("losses", "Losses", ("loss/",), "The log has no losses (loss/*).", False),
    MetricSection("flops", "FLOPs", ("speed/mfu", "speed/hfu", "speed/tflops", "flops/"),
                  "The log has no utilisation (speed/mfu, speed/hfu, speed/tflops_per_rank)."),
    MetricSection("throughput", "Throughput", ("speed/",), "The log has no speeds (speed/*)."),
    MetricSection("phases", "Phases of a step", ("phase/", "straggler/"),
                  "The log has no phases (phase/*): the run did not time them."),
    MetricSection("memory", "Memory", ("memory/",), "The log has no memory figures (memory/*)."),
    MetricSection("communication", "Communication", ("comm/",), "The log has no bytes of collectives (comm/*)."),
    MetricSection("energy", "Energy", ("energy/",), "The log has no energy (energy/*): it was not measured."),
    MetricSection("health", "Learning health", ("health/", "optim/"),
                  "The log has no health/* or optim/* figures.", False),
    MetricSection("data", "Data health", ("data/",), "The log counts no bad samples (data/bad/*)."),
    MetricSection("other", "Other figures", ("",), "Every figure of the log is in a section of its own."),
)  # fmt: skip
ORDER = (
    "losses", "throughput", "phases", "flops", "roofline", "memory", "communication", "energy", "health", "data",
    "other", "pictures", "choices", "configuration",
)  # fmt: skip


def sections(runs: list[RunRecord]) -> list[ReportSection]:
    """The whole report on one run, or on two."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.keys) if key != _ESTIMATE]
    found = {section.name: _metric_section(section, runs, _keys_of(section, keys)) for section in METRIC_SECTIONS}
    found["roofline"] = ReportSection("roofline", "Roofline", rooflines(runs))
    found["pictures"] = ReportSection("pictures", "Reconstructions and latents", _pictures(runs))
    found["choices"] = ReportSection("choices", "Chosen backends", _choices(runs))
    found["configuration"] = ReportSection("configuration", "Configuration", _configuration(runs))
    return [ReportSection("summary", "Summary", summary(runs)), *(found[name] for name in ORDER)]


def _keys_of(section: MetricSection, keys: list[str]) -> list[str]:
    """The keys that no earlier section has; totals first."""
    own = [key for key in keys if next(each for each in METRIC_SECTIONS if key.startswith(each.prefixes)) is section]
    return sorted(own, key=lambda key: not key.endswith("/total"))


def _metric_section(section: MetricSection, runs: list[RunRecord], keys: list[str]) -> ReportSection:
    blocks: list[ReportBlock] = []
    if section.name == "phases":
        blocks += _phases(runs, keys)
    tables = {"flops": flops_table, "memory": memory_tables, "communication": traffic_table, "data": _bad_samples}
    if section.name in tables:
        blocks += [block for run, label in labelled(runs) for block in tables[section.name](run, label)]
    # A sentence that is true of both runs is written once.
    blocks = [each for idx, each in enumerate(blocks) if not isinstance(each, Paragraph) or each not in blocks[:idx]]
    if keys:
        blocks += [*metric_plots(runs, keys, section.is_from_zero), metric_table(runs, keys), *remarks(runs, keys)]
    else:
        blocks.append(Paragraph(section.absent))
    return ReportSection(section.name, section.title, blocks)


def _phases(runs: list[RunRecord], keys: list[str]) -> list[ReportBlock]:
    """A bar for each run: the median milliseconds of each phase."""
    timed = [key for key in keys if key.endswith("_ms")]
    if not timed:
        return []
    parts = {key.removeprefix("phase/").removesuffix("_ms"): [run.median(key) or 0.0 for run in runs] for key in timed}
    return [StackedBars("Where a step's time goes (medians)", "ms a step", labels(runs), parts)]


def _bad_samples(run: RunRecord, label: str) -> list[ReportBlock]:
    if run.bad_samples is None:
        return [Paragraph(f"{label} has no bad_samples.jsonl, which a run begins when it meets a bad sample.")]
    first = run.bad_samples[:MAX_BAD_SAMPLES]
    rows: list[list[Cell]] = [[str(bad.get(name, "")) for name in ("key", "reason", "position")] for bad in first]
    caption = f"Bad samples of {label}: the first {len(first)} of {len(run.bad_samples):,}"
    return [ReportTable(caption, ["sample", "reason", "met at position"], rows)]


def _pictures(runs: list[RunRecord]) -> list[ReportBlock]:
    """Of each kind the first, the middle and the last."""
    blocks: list[ReportBlock] = []
    for run, label in labelled(runs):
        if not run.pictures:
            blocks.append(Paragraph(f"{label} has no pictures."))
        for kind, paths in run.pictures.items():
            shown = [paths[idx] for idx in sorted({0, len(paths) // 2, len(paths) - 1})]
            title, text = PICTURE_KINDS.get(kind, (kind, ""))
            if kind == "reconstructions" and run.config is not None and run.config.kind == "decoder_gan":
                text += STAGE_2_ROWS
            captions = [f"{title}{_step_suffix(path)}" for path in shown]
            blocks += [Paragraph(f"{title} of {label}. {text}.")] * bool(text)
            blocks.append(ImageGallery(f"{title} of {label}", captions, shown))
    return blocks


def _step_suffix(path: Path) -> str:
    """The step in an image's file name, in words: reconstructions-00000300.png -> " after 300 steps"."""
    digits = path.stem.rpartition("-")[2]
    return f" after {int(digits):,} step{'s' * (int(digits) != 1)}" if digits.isdecimal() else ""


def _choices(runs: list[RunRecord]) -> list[ReportBlock]:
    blocks: list[ReportBlock] = []
    known = [run for run in runs if run.choices]
    if known:
        names = dict.fromkeys(name for run in known for name in run.choices or {})
        rows: list[list[Cell]] = [[name, *((run.choices or {}).get(name) for run in runs)] for name in names]
        blocks.append(ReportTable("What every automatic setting became, and why", ["", *labels(runs)], rows))
    for run, label in labelled(runs):
        if not run.choices:
            text = f"{label} has no choices.json; what it printed at its start is below, where log.txt has it."
            blocks.append(Paragraph(text))
        if run.messages:
            blocks.append(TextListing(f"Messages of {label} (log.txt without reports)", run.messages[:MAX_LINES]))
    return blocks


def _configuration(runs: list[RunRecord]) -> list[ReportBlock]:
    blocks: list[ReportBlock] = []
    files: tuple[tuple[str, Callable[[RunRecord], str | None]], ...] = (
        ("config.yaml", lambda run: run.config_text),
        ("ds_config.json", lambda run: run.ds_config_text),
    )
    for name, read in files:
        texts = [read(run) for run in runs]
        for text, label in zip(texts, labels(runs), strict=True):
            if text is None:
                blocks.append(Paragraph(f"{label} has no {name}."))
            elif len(runs) == 1:
                blocks.append(TextListing(name, text.splitlines()))
        if len(runs) == 2 and None not in texts:
            blocks.append(_difference(name, [(text or "").splitlines() for text in texts], labels(runs)))
    return blocks


def _difference(name: str, texts: list[list[str]], names: list[str]) -> ReportBlock:
    lines = list(difflib.unified_diff(texts[0], texts[1], names[0], names[1], n=2, lineterm=""))
    if not lines:
        return Paragraph(f"{name} is the same in both.")
    return TextListing(f"{name}: {names[0]} (-) against {names[1]} (+)", lines, is_difference=True)


# --- the summary ------------------------------------------------------------------------------------------------------


def summary(runs: list[RunRecord]) -> list[ReportBlock]:
    """What ran, what it took, what it reached, how it ended: tables with a column for each run, and sentences on
    resumes and stops, what is missing and what could not be read."""
    blocks: list[ReportBlock] = []
    for caption, facts_of in (("What ran", _facts), ("What it took and reached", _totals), ("Evaluation", _results)):
        facts = [facts_of(run) for run in runs]
        names = dict.fromkeys(name for fact in facts for name in fact)
        if names:
            blocks.append(side_by_side(caption, runs, {name: [fact.get(name) for fact in facts] for name in names}))
    for run, label in labelled(runs):
        if run.evaluation is None:
            blocks.append(Paragraph(f"{label} is not evaluated: python -m evaluation.run {run.directory}"))
        elif run.evaluation.get("steps") not in (None, run.steps[-1]):
            blocks.append(Paragraph(f"{label} was evaluated with the weights of step {run.evaluation['steps']}."))
        sentences = [
            f"{label} was resumed: after step {last:,} its log goes on with step {after:,}; the later figures hold."
            for last, after in run.steps_back
        ]
        sentences += [f"{label} was asked to stop at step {step:,}, saved and left." for step in run.stops]
        blocks += [Paragraph(text) for text in (*sentences, *(f"{label}: {note}" for note in run.notes))]
    return blocks


def _facts(run: RunRecord) -> dict[str, Cell]:
    return {
        "directory": str(run.directory),
        "preset": run.config.name if run.config else None,
        "first report": _clock(run.times, min),
        "last report": _clock(run.times, max),
        "end": _end(run),
    }


def _totals(run: RunRecord) -> dict[str, Cell]:
    last_step = run.steps[-1]
    return {
        "steps": last_step,
        "samples": last_step * run.config.samples_per_step if run.config else None,
        "minutes in steps": _minutes(run),
        "samples/s (median)": run.median("speed/samples_per_second"),
        "ms a step (median)": run.median("speed/step_ms"),
        "peak memory of the first rank, GiB": run.peak_gib,
        "peak memory of the rank with the most, GiB": run.last("memory/peak_max_gib"),
        **{f"loss {name} (last)": run.last(f"loss/{name}") for name in ("total", "clip", "ssl", "rec")},
    }


def _results(run: RunRecord) -> dict[str, Cell]:
    """Every figure of evaluation.json, by task."""
    tasks = {task: results for task, results in (run.evaluation or {}).items() if isinstance(results, dict)}
    return {
        f"{task} {name}": value if isinstance(value, str) else number(value)
        for task, results in tasks.items()
        for name, value in results.items()
    }


def _end(run: RunRecord) -> str:
    last_step = run.steps[-1]
    if run.config is None:
        return f"at step {last_step:,}; without config.yaml the number of steps is not known"
    if last_step >= run.config.optim.steps:
        return "finished"
    if last_step in run.stops:
        return f"stopped when asked to, at step {last_step:,} of {run.config.optim.steps:,}"
    return f"the log ends at step {last_step:,} of {run.config.optim.steps:,}: still running, killed or failed"


def _minutes(run: RunRecord) -> float | None:
    """Time spent in steps, without pauses between a stop and a resume."""
    durations = [
        (step - before) * step_ms / 60_000
        for (before, step), step_ms in zip(pairwise([0, *run.steps]), run.series("speed/step_ms"), strict=True)
        if step_ms is not None and math.isfinite(step_ms)
    ]
    return sum(durations) if durations else None


def _clock(times: list[float], which: Callable[[list[float]], float]) -> str | None:
    known = [moment for moment in times if 0 <= moment < 2**36]
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(which(known))) if known else None
