"""python -m evaluation.run RUN --tasks zero_shot,reconstruction

Reads RUN/weights.safetensors and RUN/config.yaml, looks at every held-out image once, writes RUN/evaluation.json and
pictures under RUN/pictures, prints a table. One process, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from configs import Config, UserError, load_config
from data.captions import CaptionEncoder
from data.loader import HeldOut, HeldOutBatch
from engine.pictures import latent_colours, reconstructions, write_png
from evaluation.reconstruction import Psnr
from evaluation.zero_shot import Accuracy, ClassTable, classifier
from model.tokenizer import VisualTokenizer

TASKS = ("zero_shot", "reconstruction")


def evaluate(run: Path, tasks: Iterable[str], batch_size: int, classes: Path | None = None) -> dict[str, Any]:
    """The results by task. Raises UserError for a run without weights, an unknown task or a missing corpus."""
    tasks = check_tasks(tasks)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml; name one that training wrote, runs/NAME")
    config = load_config(run / "config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = VisualTokenizer.from_run(run).to(device)
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    held_out = HeldOut(config, encoder)
    accuracy = None
    if "zero_shot" in tasks:
        table = ClassTable.read(classes or class_table_of(config))
        accuracy = Accuracy(classifier(tokenizer, encoder, table.prompts, device))
    quality = Psnr() if "reconstruction" in tasks else None
    for batch_idx, batch in enumerate(_progress(held_out, batch_size)):
        images = batch.images.to(device).float() / 255
        if accuracy is not None:
            accuracy.add(tokenizer.embed_images(images), batch.labels.to(device))
        if quality is not None:
            recon = tokenizer.decode(tokenizer.encode(images))
            quality.add(images, recon)
            if batch_idx == 0:
                _show(run / "pictures", tokenizer, images, recon)
    results: dict[str, Any] = {}
    if accuracy is not None:
        results["zero_shot"] = accuracy.result()
    if quality is not None:
        results["reconstruction"] = quality.result()
    return {**results, "held_out": list(config.data.held_out), "bad_samples": dict(held_out.bad)}


def check_tasks(tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks, all known."""
    tasks = tuple(tasks)
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task!r} is not one of {', '.join(TASKS)}")
    return tasks


def class_table_of(config: Config) -> Path:
    """The classes.json that lies beside the first held-out shard."""
    if not config.data.held_out:
        raise UserError("data.held_out is empty: evaluation reads held-out shards; name them in the config")
    return Path(config.data.held_out[0]).parent / "classes.json"


def _progress(held_out: HeldOut, batch_size: int) -> Iterable[HeldOutBatch]:
    total = -(-len(held_out) // batch_size)
    return track(held_out.batches(batch_size), "evaluating", total=total, disable=not sys.stdout.isatty())


def _show(folder: Path, tokenizer: VisualTokenizer, images: Tensor, recon: Tensor) -> None:
    folder.mkdir(exist_ok=True)
    latent = tokenizer.encode(images)
    scale = images.shape[-1] // latent.shape[-1]
    picture = torch.cat([reconstructions(images, recon), latent_colours(latent, scale)], dim=1)
    write_png(picture, folder / "held_out.png")


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description="What a trained tokenizer is worth.")
    parser.add_argument("run", type=Path, help="a run directory with weights.safetensors and config.yaml")
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help=f"comma-separated, of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes", type=Path, help="class table (default: classes.json beside the held-out shards)")
    parsed = parser.parse_args(arguments)
    try:
        results = evaluate(parsed.run, parsed.tasks.split(","), parsed.batch_size, parsed.classes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (parsed.run / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    for task in TASKS:
        for name, value in results.get(task, {}).items():
            print(f"{task:16s} {name:24s} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
