"""The demo corpus as samples: scenes, drawn, encoded and captioned.

A sample depends on (seed, split, index, size) alone. Train and held-out scenes come from different random streams; that
they share no image is tested.

    next(synthetic_samples(seed=0, split="train", count=6000, size=64, workers=2)).caption
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict

from data.drawn_samples import encoded, in_order
from data.sample import Plan, Sample
from data.synthetic.drawing import draw
from data.synthetic.grammar import caption, class_table
from data.synthetic.scenes import class_names, sample_scene, scene_random

VOCAB = 1024  # an upper bound: the grammar's words need about 590 ids

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
    return in_order(functools.partial(render_sample, seed, split, size), count, size * size, workers)


def render_sample(seed: int, split: str, size: int, index: int) -> Sample:
    """Sample `index` of a split: a pure function of its arguments (and of Pillow's encoders)."""
    scene = sample_scene(seed, split, index)
    image, extension = encoded(draw(scene, size), scene_random(seed, split, index, "format"))
    words = caption(scene, scene_random(seed, split, index, "caption"))
    attributes = {"label": scene.label, "class": class_names()[scene.label], "width": size, "height": size}
    return Sample(image, extension, words, {**attributes, "scene": asdict(scene)})
