"""The demo corpus as samples: scenes, drawn, encoded and captioned, by as many processes as there are cores.

A sample depends on (seed, split, index, size) alone, so the corpus is the same bytes whatever the number of
processes. Train and held-out scenes come from different random streams; that they share no image is tested.

    next(synthetic_samples(seed=0, split="train", count=6000, size=64, workers=2)).caption
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from data.drawing import draw
from data.grammar import caption, class_table
from data.sample import Plan, Sample
from data.scenes import class_names, sample_scene, scene_random

# Shares as on the web, so that every decoder is used: (extension, Pillow format, weight, options).
FORMATS: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("jpg", "JPEG", 8, {"quality": 92, "subsampling": 0}),
    ("png", "PNG", 1, {}),
    ("webp", "WEBP", 1, {"quality": 92, "method": 2}),
)
VOCAB = 1024  # an upper bound: the grammar's words need about 590 ids
WORTH_A_POOL = 2_000_000  # pixels; below it, starting processes takes longer than drawing

README = """\
# Synthetic captioned scenes

{train} train and {held_out} held-out images of {size} x {size} pixels, drawn by `python -m data.corpus
synthetic` with seed {seed}. Nothing here is photographed or taken from anywhere, so there are no rights to
mind.

- `train-*.tar`, `held_out-*.tar`: webdataset shards; a sample is an image (jpg, png or webp), its caption
  (txt) and its attributes (json: `label` and the scene it was drawn from).
- `classes.json`: {classes} classes, shape and colour of the main object, in the order of `label`, with
  their prompts.
- `tokenizer.json`: a byte-pair vocabulary trained on the train captions; its largest id is end-of-text.
- `manifest.json`: the arguments that made this and the shards they made.
"""


def synthetic_plan(samples: int, held_out: int, size: int, shard_size: int, seed: int, workers: int) -> Plan:
    """The demo corpus: `samples` train and `held_out` held-out images of `size` x `size` pixels."""
    counts = {"train": samples, "held_out": held_out}
    classes = class_table()
    readme = README.format(**counts, size=size, seed=seed, classes=len(classes))
    return Plan(
        arguments={"kind": "synthetic", **counts, "size": size, "shard_size": shard_size, "seed": seed},
        splits={split: synthetic_samples(seed, split, count, size, workers) for split, count in counts.items()},
        counts=counts,
        shard_size=shard_size,
        vocab=VOCAB,
        files=lambda: {"README": readme, "classes.json": {"classes": classes}},
    )


def synthetic_samples(seed: int, split: str, count: int, size: int, workers: int) -> Iterator[Sample]:
    """Samples 0 .. count-1 of a split, in order, drawn by `workers` processes."""
    render = functools.partial(render_sample, seed, split, size)
    if workers == 1 or count * size * size < WORTH_A_POOL:
        yield from map(render, range(count))
        return
    # spawn: the caller may hold threads (torch, tokenizers), which a forked child must not inherit half
    # alive.
    with _interrupts_left_to_this_process():
        pool = multiprocessing.get_context("spawn").Pool(workers, _ignore_interrupts)
    with pool:
        yield from pool.imap(render, range(count), chunksize=32)


@contextmanager
def _interrupts_left_to_this_process() -> Iterator[None]:
    """Processes started inside ignore interrupts from their first moment on: children inherit what is ignored.

    For the milliseconds it takes this process ignores them too. (A blocked signal is not lost, but multiprocessing
    unblocks it.) Only a main thread can do that; called from another, workers are deaf once their imports are done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def render_sample(seed: int, split: str, size: int, index: int) -> Sample:
    """Sample `index` of a split: a pure function of its arguments (and of Pillow's encoders)."""
    scene = sample_scene(seed, split, index)
    extension, name, _, options = _choose_format(seed, split, index)
    with io.BytesIO() as file:
        draw(scene, size).save(file, name, **options)
        image = file.getvalue()
    words = caption(scene, scene_random(seed, split, index, "caption"))
    attributes = {"label": scene.label, "class": class_names()[scene.label], "width": size, "height": size}
    return Sample(image, extension, words, {**attributes, "scene": asdict(scene)})


def _choose_format(seed: int, split: str, index: int) -> tuple[str, str, int, dict[str, int]]:
    rng = scene_random(seed, split, index, "format")
    return rng.choices(FORMATS, weights=[weight for _, _, weight, _ in FORMATS])[0]
