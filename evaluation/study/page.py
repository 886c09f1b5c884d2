"""The study's page of results, written from results.json: the answer in sentences, figures, table, images, limits.

    answer(rows)      # ["With clip + ssl + rec, gFID keeps falling (...): 61.0 at 4.0e12, 33.5 at 1.1e14 FLOPs.", ...]
    draw_figures(found, folder)                                    # gfid.png, probe.png, rfid.png, zero_shot.png, ...
    write_page(layout, found, Path("docs/scaling_study.md"))       # and docs/images/study/ beside it

The question: does gFID keep falling with compute for the joint objective, while it stalls for reconstruction alone, and
where do the two cross? Rules, fixed before the results were seen: the trend of an objective is the slope of ln gFID
over log2 FLOPs (least squares). It *falls* if the slope is below -2 % a doubling and the last budget is the best so
far, *rises* above +2 %, and otherwise *stalls*. The crossover is the compute from which on the joint objective stays
ahead of reconstruction alone, interpolated in log FLOPs between the two budgets around it. Added later, without
deciding anything: the change between the last two budgets, and the ratio of both objectives at each budget.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evaluation import plots
from evaluation.study.cells import JOINT, OBJECTIVES, REC, Cell, StudyLayout

Series = list[tuple[float, float]]  # (FLOPs, value), by FLOPs
Verdict = Literal["falls", "stalls", "rises"]
STALL_SLOPE = 0.02  # a change a doubling of at most this is a stall


def series(rows: Sequence[dict[str, Any]], objective: str, figure: str) -> Series:
    """Return (FLOPs, value) of one metric of one objective, sorted by FLOPs."""
    own = [row for row in rows if row["objective"] == objective and figure in row["figures"]]
    return sorted((row["flops"], row["figures"][figure]) for row in own)


def rows_with_baseline(rows: Sequence[dict[str, Any]], figure: str, objective: str = JOINT) -> list[dict[str, Any]]:
    """Select the rows of budgets at which both the objective and reconstruction alone have the metric."""
    there = {(row["objective"], row["budget"]) for row in rows if figure in row["figures"]}
    return [row for row in rows if {(objective, row["budget"]), (REC, row["budget"])} <= there]


def slope(points: Series) -> float:
    """Fit the change of a metric's logarithm per doubling of compute, by least squares; two points at least."""
    x, y = [math.log2(flops) for flops, _ in points], [math.log(value) for _, value in points]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def verdict(points: Series) -> Verdict:
    """Classify the trend of a metric of which less is better, by the rules above."""
    change, last = slope(points), points[-1][1]
    if change < -STALL_SLOPE and last == min(value for _, value in points):
        return "falls"
    return "rises" if change > STALL_SLOPE else "stalls"


def crossover(ours: Series, theirs: Series) -> float | Literal["ahead", "behind"]:
    """Find the FLOPs from which on `ours` stays below `theirs`; "ahead" or "behind" if there is no crossing.

    Both have the same budgets, two at least.
    """
    pairs = list(zip(ours, theirs, strict=True))
    gaps = [math.log(mine) - math.log(other) for (_, mine), (_, other) in pairs]
    if gaps[-1] >= 0:
        return "behind"
    if max(gaps) < 0:
        return "ahead"
    before = max(i for i, gap in enumerate(gaps) if gap >= 0)
    (x0, x1), (g0, g1) = (math.log(pairs[i][0][0]) for i in (before, before + 1)), gaps[before : before + 2]
    return math.exp(x0 + (x1 - x0) * g0 / (g0 - g1))


def answer(rows: Sequence[dict[str, Any]], figure: str = "gfid") -> list[str]:
    """Return sentences: the two trends, their distance, the crossover and the conclusion."""
    common = rows_with_baseline(rows, figure)
    joint, alone = (series(common, objective, figure) for objective in (JOINT, REC))
    if len(joint) < 2:
        return [
            "Not answered yet: it takes two budgets at which both the joint objective and reconstruction alone are "
            f"done, and there are {len(joint)}."
        ]
    titles = {row["objective"]: row["title"] for row in rows}
    trends = [_trend(titles[name], points) for name, points in ((JOINT, joint), (REC, alone))]
    crossing = f"The joint objective {_crossing(crossover(joint, alone))}."
    return [*trends, _distance(joint, alone), crossing, _conclusion(verdict(joint), verdict(alone))]


def answer_others(rows: Sequence[dict[str, Any]], figure: str = "gfid") -> list[str]:
    """Return a sentence for each further objective that shares two budgets with reconstruction alone."""
    titles = {row["objective"]: row["title"] for row in rows if row["objective"] not in (JOINT, REC)}
    sentences = []
    for objective, title in titles.items():
        common = rows_with_baseline(rows, figure, objective)
        own, alone = (series(common, name, figure) for name in (objective, REC))
        if len(own) > 1:
            sentences.append(f"{_trend(title, own)} It {_crossing(crossover(own, alone))}.")
    return sentences


def _trend(title: str, points: Series) -> str:
    says = {"falls": "keeps falling", "stalls": "stalls", "rises": "rises"}[verdict(points)]
    figures = ", ".join(f"{value:.3g} at {flops:.1e}" for flops, value in points)
    return (
        f"With {title}, gFID {says} ({100 * math.expm1(slope(points)):+.1f} % a doubling of compute, "
        f"{100 * math.expm1(slope(points[-2:])):+.1f} % a doubling between the last two budgets): {figures} FLOPs."
    )


def _distance(ours: Series, theirs: Series) -> str:
    ratios = [mine / other for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"From the smallest budget to the largest, gFID of the joint objective is {listed} times that of the other."


def _crossing(found: float | str) -> str:
    if found == "ahead":
        return "is ahead of reconstruction alone at every budget: a crossover, if any, lies below"
    if found == "behind":
        return "is behind reconstruction alone at the largest budget: a crossover, if any, lies above"
    assert isinstance(found, float)
    return f"is ahead of reconstruction alone from about {found:.1e} FLOPs on, and behind below that"


def _conclusion(joint: Verdict, alone: Verdict) -> str:
    if joint == "falls" and alone != "falls":
        return (
            "So the claim is seen in this study: more pre-training compute buys better generation for the joint "
            f"objective, while for reconstruction alone it {'does harm' if alone == 'rises' else 'stalls'}."
        )
    if joint == "falls":
        return "So half of the claim is seen: the joint objective gains from compute, but so does reconstruction alone."
    return "So the claim is not seen in this study: gFID of the joint objective does not keep falling with compute."


IMAGES = Path("images/study")  # below the folder of the page
FLOPS = "training FLOPs of the tokenizer"
# figure -> (file, label of its axis, what to say under it)
PLOTS = {
    "gfid": ("gfid.png", "gFID, no guidance (less is better)", "Generation against compute"),
    "gfid_guided": (
        "gfid_guided.png",
        "gFID, best guidance (less is better)",
        "The same with the best guidance scale of each cell",
    ),
    "probe_features": (
        "probe_features.png",
        "linear probe on features, top-1",
        "Understanding against compute: a probe on CLS and mean patch of the last block",
    ),
    "probe": ("probe.png", "linear probe on the mean latent, top-1", "And what of it stands in the latent's mean"),
    "rfid": ("rfid.png", "rFID (less is better)", "Reconstruction against compute"),
    "zero_shot": ("zero_shot.png", "zero-shot top-1", "Zero-shot classification against compute, where there is text"),
}
ANSWER_TITLES = {
    "gfid": "Without guidance:",
    "gfid_guided": "With the best of the guidance scales, which each cell may choose:",
}
IMAGE_FILES = {"generated": "generation/pictures/samples.png", "reconstructed": "evaluation/pictures/held_out.png"}
UNDERSTANDING_PLOT = ("understanding.png", "Understanding against generation; along a line compute grows")
COLUMNS: dict[str, tuple[str, str]] = {
    "gfid": ("gFID", "{:.2f}"),
    "gfid_guided": ("guided", "{:.2f}"),
    "rfid": ("rFID", "{:.2f}"),
    "psnr_db": ("PSNR, dB", "{:.2f}"),
    "probe": ("probe, latent", "{:.1%}"),
    "probe_features": ("probe, features", "{:.1%}"),
    "zero_shot": ("zero-shot", "{:.1%}"),
}


def draw_figures(found: Mapping[str, Any], folder: Path) -> None:
    """Write the figures as PNG files; a metric without values has empty axes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = found["cells"]
    for figure, (file, label, _) in PLOTS.items():
        lines = {objective.title: series(rows, objective.name, figure) for objective in OBJECTIVES}
        plots.draw_curves(lines, FLOPS, label, folder / file, log_up="fid" in figure)
    pairs = {objective.title: _understanding_points(rows, objective.name) for objective in OBJECTIVES}
    plots.draw_curves(
        pairs,
        PLOTS["probe_features"][1],
        PLOTS["gfid"][1],
        folder / UNDERSTANDING_PLOT[0],
        log_across=False,
        log_up=True,
    )


def write_page(layout: StudyLayout, found: Mapping[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Write the page, its figures and its images."""
    folder = path.parent / IMAGES
    draw_figures(found, folder)
    path.write_text(render_page(found, _copy_pictures(layout, found["cells"], cells, folder)))


def render_page(found: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return the Markdown of the page; `pictures` maps files in IMAGES to their titles."""
    rows = found["cells"]
    drawn = [_image(file, caption) for file, _, caption in PLOTS.values()] + [_image(*UNDERSTANDING_PLOT)]
    shown = [f"### {title}\n\n{_image(file, title)}\n" for file, title in pictures.items()]
    parts = [
        PAGE_HEAD.format(preset=found["preset"]), *_answer_section(rows), *drawn, "",
        "## Every cell", "", _wrapped(_table_caption(found)), "", _table(rows), "", *_unfinished_cells(rows),
        *(["## Pictures", "", *shown] if shown else []), PAGE_LIMITS.format(**_caption_values(found)),
    ]  # fmt: skip
    return "\n".join(parts)


def _answer_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the answer, without and with guidance."""
    lines = []
    for figure, title in ANSWER_TITLES.items():
        sentences = [*answer(rows, figure), *answer_others(rows, figure)]
        lines += [title, "", *(_wrapped(sentence, "- ") for sentence in sentences), ""]
    return lines


def _understanding_points(rows: Sequence[dict[str, Any]], objective: str) -> list[tuple[float, float]]:
    both = {"probe_features", "gfid"}
    own = (row for row in rows if row["objective"] == objective and both <= row["figures"].keys())
    return [
        (row["figures"]["probe_features"], row["figures"]["gfid"]) for row in sorted(own, key=lambda row: row["flops"])
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| objective | FLOPs | steps | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * (2 + len(COLUMNS)),
    ]
    for objective in OBJECTIVES:
        for row in (row for row in rows if row["objective"] == objective.name and row["figures"]):
            values = [
                form.format(row["figures"][key]) if key in row["figures"] else "" for key, (_, form) in COLUMNS.items()
            ]
            lines.append(f"| {row['title']} | {row['flops']:.1e} | {row['steps']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _table_caption(found: Mapping[str, Any]) -> str:
    known = _caption_values(found)
    machines = sorted({row["machine"]["device"] for row in found["cells"] if row["figures"] and "machine" in row})
    return (
        f"gFID compares {known['samples']} generated pictures with the training pictures, rFID the {known['images']} "
        f"held-out pictures with their reconstructions; both by the features of `{known['network']}`, so neither can "
        f"be held against figures made with another network. Guessing is right in {known['chance']}."
        + (f" Measured on {' and '.join(machines)}." if machines else "")
    )


def _caption_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in the table's caption and the page's last section; a dash for what is not known yet."""
    known: dict[str, Any] = dict.fromkeys(("samples", "images", "network", "chance"), "-")
    for row in found["cells"]:
        known |= {key: value for key, value in row["figures"].items() if key in known}
    corpus = found["corpus"]
    known["chance"] = f"{known['chance']:.1%}" if known["chance"] != "-" else "-"
    return known | {
        "train": corpus.get("train", "-"),
        "classes": corpus.get("classes", "-"),
        "size": found["image_size"],
    }


def _unfinished_cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence that names the unfinished cells, so that a gap is not taken for a result."""
    gaps = [row for row in rows if row["state"] != "done"]
    if not gaps:
        return []
    named = ", ".join(f"`{row['cell']}` ({row['state']})" for row in gaps)
    return [_wrapped(f"Not done when this page was written: {named}."), ""]


def _copy_pictures(
    layout: StudyLayout, rows: Sequence[dict[str, Any]], cells: Sequence[Cell], folder: Path
) -> dict[str, str]:
    """Copy images of the largest finished budget of the two compared objectives into `folder`; return file -> title.

    Those of a cell that was measured elsewhere are there already.
    """
    found: dict[str, str] = {}
    here = {row["cell"]: row["state"] == "done" for row in rows}
    for objective in (REC, JOINT):
        own = sorted((c for c in cells if c.objective.name == objective), key=lambda cell: -cell.flops)
        for kind, place in IMAGE_FILES.items():
            file = f"{objective}_{kind}.png"
            for cell in own:
                source = layout.cell(cell) / place
                if source.is_file():
                    shutil.copyfile(source, folder / file)
                if source.is_file() or (here[cell.name] and (folder / file).is_file()):
                    found[file] = f"{cell.objective.title}, {cell.flops:.1e} FLOPs, {kind}"
                    break
    return found


def _wrapped(text: str, mark: str = "") -> str:
    """Wrap a paragraph, or an item of a list, to lines of 120 characters."""
    return textwrap.fill(
        text,
        120,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _image(file: str, caption: str) -> str:
    return f"![{caption}]({IMAGES / file})"


PAGE_HEAD = """\
# The scaling study

Does gFID keep falling with pre-training compute for the joint objective, while reconstruction alone stalls? Tokenizers
by objective and compute, each followed by the same generator with the same budget. This page is written by

    python -m evaluation.study --preset {preset} --out runs/study --page docs/scaling_study.md

What the figures say (the rules are in `evaluation/study/page.py` and were fixed before there were figures).
"""
PAGE_LIMITS = """\
## What this is, and what it is not

- A study of minutes a cell. Its corpus is {train} drawn scenes of {size} pixels with {classes} classes, its trunk a few
  hundred times smaller than VTP-L's, its largest budget less than a millionth of the paper's. It can show the shape of
  the effect; it cannot show its size, and a shape that it does not show may still be there at scale.
- The horizontal axis is the analytic count of the tokenizer's training FLOPs, forward and backward, each matrix
  product once (`profiling/cost/step_flops.py`). Every objective gets the same FLOPs, so reconstruction alone, whose
  step is cheapest, takes the most steps. Learning rates were set once, for all objectives.
- One seed a cell: differences of a few per cent between neighbours are within what another seed would change.
- FID here is measured with a small network trained on the same corpus's labels, and on {samples} samples; it ranks
  the cells of this study and says nothing beside a published FID.
- The generator is the same in every cell, in size, steps and learning rate, on latents normalised channel by channel.
"""
