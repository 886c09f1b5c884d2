"""The emoji corpus as samples: scenes, drawn, encoded and captioned.

    plan = emoji_plan(EmojiFont.find(None), classes=100, samples=12_000, held_out=2_000, size=32, shard_size=256, ...)

A sample depends on (font, classes, seed, split, index, size) alone. Which names Python knows depends on its version of
Unicode, so that version stands in the manifest beside the font's digest.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict

from data.drawn_samples import encoded, in_order
from data.emoji.concepts import Concept, choose
from data.emoji.drawing import draw
from data.emoji.font import EmojiFont, Pictures
from data.emoji.grammar import caption, prompts
from data.emoji.scenes import sample_scene
from data.sample import Plan, Sample
from data.synthetic.scenes import scene_random

FEWEST_WORDS, WORDS_A_CLASS = 1024, 3  # an upper bound on the ids the captions need
README = """\
# Captioned emoji scenes

{train} train and {held_out} held-out images of {size} x {size} pixels, drawn by `python -m data.corpus emoji` with seed
{seed} from the pictures of the font {font} (digest {digest}); the font's licence is that of the pictures
(Noto Color Emoji: SIL Open Font License 1.1). Names are Unicode {unicode}'s.

- `train-*.tar`, `held_out-*.tar`: webdataset shards; a sample is an image (jpg, png or webp), its caption (txt) and its
  attributes (json: `label` and the scene it was drawn from).
- `classes.json`: {classes} classes, what the main picture shows, in the order of `label`, with their prompts.
- `tokenizer.json`: a byte-pair vocabulary trained on the train captions; its largest id is end-of-text.
- `manifest.json`: the arguments that made this and the shards they made.
"""


def emoji_plan(
    font: EmojiFont, classes: int, samples: int, held_out: int, size: int, shard_size: int, seed: int, workers: int
) -> Plan:
    """`samples` train and `held_out` held-out images of `size` x `size` pixels. UserError for too few pictures."""
    concepts = choose(font, classes)
    counts = {"train": samples, "held_out": held_out}
    about = {"size": size, "seed": seed, "classes": classes, "unicode": unicodedata.unidata_version}
    readme = README.format(**counts, **about, font=font.path.name, digest=font.digest)
    table = [{"name": concept.name, "prompts": prompts(concept.name)} for concept in concepts]

    def render(split: str) -> functools.partial[Sample]:
        return functools.partial(render_sample, concepts, font, seed, split, size)

    return Plan(
        arguments={"kind": "emoji", **counts, **about, "shard_size": shard_size, "font": font.digest},
        splits={split: in_order(render(split), count, size * size, workers) for split, count in counts.items()},
        counts=counts,
        shard_size=shard_size,
        vocab=max(FEWEST_WORDS, WORDS_A_CLASS * classes),
        files=lambda: {"README": readme, "classes.json": {"classes": table}},
    )


def render_sample(
    concepts: Sequence[Concept], pictures: Pictures, seed: int, split: str, size: int, index: int
) -> Sample:
    """Sample `index` of a split: a pure function of its arguments (and of Pillow's drawing and encoders)."""
    scene = sample_scene(concepts, seed, split, index)
    drawn = draw(scene, concepts, pictures, size)
    image, extension = encoded(drawn, scene_random(seed, split, index, "format"))
    words = caption(scene, [concept.name for concept in concepts], scene_random(seed, split, index, "caption"))
    attributes = {"label": scene.label, "class": concepts[scene.label].name, "width": size, "height": size}
    return Sample(image, extension, words, {**attributes, "scene": asdict(scene)})
