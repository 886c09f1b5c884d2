"""The page of results, written from results.json: answer, figures, table, pictures, and what it does not show.

draw(found, folder)                                  # gfid.png, probe.png, rfid.png, zero_shot.png, both.png
write_page(layout, found, Path("docs/scaling_study.md"))       # and docs/images/study/ beside it
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import figures
from evaluation.study.answer import answer, others, series
from evaluation.study.preset import JOINT, OBJECTIVES, REC, Cell
from evaluation.study.stages import Layout

IMAGES = Path("images/study")  # below the folder of the page
FLOPS = "training FLOPs of the tokenizer"
# figure -> (file, label of its axis, what to say under it)
DRAWN = {
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
ANSWERED = {
    "gfid": "Without guidance:",
    "gfid_guided": "With the best of the guidance scales, which each cell may choose:",
}
PICTURES = {"generated": "generation/pictures/samples.png", "reconstructed": "evaluation/pictures/held_out.png"}
BOTH = ("understanding.png", "Understanding against generation; along a line compute grows")
COLUMNS: dict[str, tuple[str, str]] = {
    "gfid": ("gFID", "{:.2f}"),
    "gfid_guided": ("guided", "{:.2f}"),
    "rfid": ("rFID", "{:.2f}"),
    "psnr_db": ("PSNR, dB", "{:.2f}"),
    "probe": ("probe, latent", "{:.1%}"),
    "probe_features": ("probe, features", "{:.1%}"),
    "zero_shot": ("zero-shot", "{:.1%}"),
}


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures; one that nothing is known for has empty axes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = found["cells"]
    for figure, (file, label, _) in DRAWN.items():
        lines = {objective.title: series(rows, objective.name, figure) for objective in OBJECTIVES}
        figures.curves(lines, FLOPS, label, folder / file, log_up="fid" in figure)
    pairs = {objective.title: _pairs(rows, objective.name) for objective in OBJECTIVES}
    figures.curves(pairs, DRAWN["probe_features"][1], DRAWN["gfid"][1], folder / BOTH[0], log_across=False, log_up=True)


def write_page(layout: Layout, found: Mapping[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Writes the page, its figures and its pictures."""
    folder = path.parent / IMAGES
    draw(found, folder)
    path.write_text(page(found, _copy_pictures(layout, found["cells"], cells, folder)))


def page(found: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The Markdown of the page; `pictures` are files in IMAGES and what to say above them."""
    rows = found["cells"]
    drawn = [_image(file, caption) for file, _, caption in DRAWN.values()] + [_image(*BOTH)]
    shown = [f"### {title}\n\n{_image(file, title)}\n" for file, title in pictures.items()]
    parts = [
        HEAD.format(preset=found["preset"]), *_answered(rows), *drawn, "",
        "## Every cell", "", _wrapped(_about(found)), "", _table(rows), "", *_undone(rows),
        *(["## Pictures", "", *shown] if shown else []), LIMITS.format(**_setting(found)),
    ]  # fmt: skip
    return "\n".join(parts)


def _answered(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the figures say, as they come and with guidance."""
    lines = []
    for figure, title in ANSWERED.items():
        said = [*answer(rows, figure), *others(rows, figure)]
        lines += [title, "", *(_wrapped(sentence, "- ") for sentence in said), ""]
    return lines


def _pairs(rows: Sequence[dict[str, Any]], objective: str) -> list[tuple[float, float]]:
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


def _about(found: Mapping[str, Any]) -> str:
    known = _setting(found)
    machines = sorted({row["machine"]["device"] for row in found["cells"] if row["figures"] and "machine" in row})
    return (
        f"gFID compares {known['samples']} generated pictures with the training pictures, rFID the {known['images']} "
        f"held-out pictures with their reconstructions; both by the features of `{known['network']}`, so neither can "
        f"be held against figures made with another network. Guessing is right in {known['chance']}."
        + (f" Measured on {' and '.join(machines)}." if machines else "")
    )


def _setting(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the words around the table need; a dash for what no cell has told yet."""
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


def _undone(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for cells without all figures: nobody should take a gap for a result."""
    gaps = [row for row in rows if row["state"] != "done"]
    if not gaps:
        return []
    named = ", ".join(f"`{row['cell']}` ({row['state']})" for row in gaps)
    return [_wrapped(f"Not done when this page was written: {named}."), ""]


def _copy_pictures(
    layout: Layout, rows: Sequence[dict[str, Any]], cells: Sequence[Cell], folder: Path
) -> dict[str, str]:
    """File -> title, of the largest budget that is there for the two objectives of the question. One that was measured
    elsewhere has left its pictures in `folder`."""
    found: dict[str, str] = {}
    here = {row["cell"]: row["state"] == "done" for row in rows}
    for objective in (REC, JOINT):
        own = sorted((c for c in cells if c.objective.name == objective), key=lambda cell: -cell.flops)
        for kind, place in PICTURES.items():
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
    """A paragraph, or an item of a list, in lines of 120 characters."""
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


HEAD = """\
# The scaling study

Does gFID keep falling with pre-training compute for the joint objective, while reconstruction alone stalls? Tokenizers
by objective and compute, each followed by the same generator with the same budget. This page is written by

    python -m evaluation.study --preset {preset} --out runs/study --page docs/scaling_study.md

What the figures say (the rules are in `evaluation/study/answer.py` and were fixed before there were figures).
"""
LIMITS = """\
## What this is, and what it is not

- A study of minutes a cell. Its corpus is {train} drawn scenes of {size} pixels with {classes} classes, its trunk a few
  hundred times smaller than VTP-L's, its largest budget less than a millionth of the paper's. It can show the shape of
  the effect; it cannot show its size, and a shape that it does not show may still be there at scale.
- The horizontal axis is the analytic count of the tokenizer's training FLOPs, forward and backward, each matrix
  product once (`profiling/cost/step_flops.py`). Every objective gets the same FLOPs, so reconstruction alone, whose step is
  cheapest, takes the most steps. Learning rates were set once, for all objectives.
- One seed a cell: differences of a few per cent between neighbours are within what another seed would change.
- FID here is measured with a small network trained on the same corpus's labels, and on {samples} samples; it ranks
  the cells of this study and says nothing beside a published FID.
- The generator is the same in every cell, in size, steps and learning rate, on latents normalised channel by channel.
"""
