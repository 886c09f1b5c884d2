"""What a scene of the emoji corpus is: one prominent picture, at times a small second one, a coloured ground.

    scene = sample_scene(concepts, seed=0, split="train", index=7)
    concepts[scene.label].name, scene.ground, scene.colours        # 'red apple', 'gradient', ('blue', 'pink')

A scene depends on (concepts, seed, split, index) alone, and every run of as many indices as there are classes holds
each class once. Lengths are shares of the image side, x to the right and y downwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.emoji.concepts import Concept
from data.synthetic.scenes import Rgb, contrast, scene_random

COLOURS: dict[str, Rgb] = {
    "red": (204, 62, 60),
    "orange": (238, 148, 66),
    "yellow": (246, 218, 108),
    "green": (98, 170, 98),
    "blue": (82, 134, 210),
    "purple": (142, 98, 184),
    "pink": (240, 166, 196),
    "brown": (136, 98, 72),
    "grey": (150, 154, 160),
    "white": (246, 246, 242),
    "black": (34, 34, 40),
    "light blue": (178, 216, 240),
    "light green": (192, 226, 172),
    "dark blue": (36, 50, 98),
    "dark green": (38, 84, 58),
}
GROUNDS = ("plain", "gradient", "cloudy", "tiled", "striped", "dotted")
GROUND_WEIGHTS = (4, 3, 2, 1, 1, 1)
MIN_CONTRAST = 165.0  # between a ground and the outline of the main picture, in the units of data/synthetic/scenes.py
SIZES = {"small": (0.48, 0.56), "medium": (0.62, 0.72), "large": (0.78, 0.92)}  # longer side of the main picture
TILTS = ((0, 8), (0, 8), (14, 32))  # degrees either way; a third is visibly tilted
TILTED = 12
COMPANION = (0.2, 0.28)
MARGIN = 0.02


@dataclass(frozen=True)
class Sticker:
    """One picture. Its longer side is `size` before it is turned by `angle` degrees; (x, y) is its middle."""

    label: int
    size: float
    x: float
    y: float
    angle: float
    is_mirrored: bool

    @property
    def spot(self) -> tuple[float, float]:
        """(x, y) of the middle."""
        return self.x, self.y


@dataclass(frozen=True)
class EmojiScene:
    """`size` is a key of SIZES and speaks of the main picture; `column` and `row` (-1, 0, 1) are its place."""

    main: Sticker
    size: str
    column: int
    row: int
    companion: Sticker | None
    ground: str
    colours: tuple[str, str]  # names; the second counts where the ground is a gradient
    details: int  # seed of what the drawing invents by itself

    @property
    def label(self) -> int:
        """The class: that of the main picture, an index into the concepts."""
        return self.main.label


def sample_scene(concepts: Sequence[Concept], seed: int, split: str, index: int) -> EmojiScene:
    """The scene at position `index` of a split: a pure function of its arguments."""
    rng = scene_random(seed, split, index, "emoji")
    label = _label(len(concepts), seed, split, index)
    ground = rng.choices(GROUNDS, GROUND_WEIGHTS)[0]
    colours = _colours(concepts[label].rim, rng)
    size = rng.choice(list(SIZES))
    main, column, row = _main(label, size, rng)
    companion = _companion(main, len(concepts), rng)
    return EmojiScene(main, size, column, row, companion, ground, colours, rng.getrandbits(32))


def _label(num_classes: int, seed: int, split: str, index: int) -> int:
    """Every run of `num_classes` indices is a permutation of the classes: any split is balanced and in no order."""
    run, position = divmod(index, num_classes)
    labels = list(range(num_classes))
    scene_random(seed, split, run, "labels").shuffle(labels)
    return labels[position]


def _colours(rim: Rgb, rng: random.Random) -> tuple[str, str]:
    """Two colours against which the outline is seen; the three furthest where hardly any is far enough."""
    by_contrast = sorted(COLOURS, key=lambda name: -contrast(COLOURS[name], rim))
    seen = [name for name in COLOURS if contrast(COLOURS[name], rim) >= MIN_CONTRAST]
    one, other = rng.sample(seen if len(seen) >= 3 else by_contrast[:3], 2)
    return one, other


def _main(label: int, size: str, rng: random.Random) -> tuple[Sticker, int, int]:
    side = rng.uniform(*SIZES[size])
    column, row = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
    reach = 0.5 - side / 2 - MARGIN
    x, y = (0.5 + (way * rng.uniform(0.75, 1.0) * reach if way else rng.uniform(-0.03, 0.03)) for way in (column, row))
    angle = rng.choice((-1, 1)) * rng.uniform(*rng.choice(TILTS))
    return Sticker(label, side, x, y, angle, rng.random() < 0.5), column, row


def _companion(main: Sticker, num_classes: int, rng: random.Random) -> Sticker | None:
    """In a quarter of the scenes: a small picture of another class that touches nothing."""
    if num_classes < 2 or rng.random() > 0.4:
        return None
    label = (main.label + rng.randrange(1, num_classes)) % num_classes
    for _ in range(40):
        side = rng.uniform(*COMPANION)
        edge = side / 2 + MARGIN
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        if math.dist((x, y), main.spot) >= 0.55 * (side + main.size) + MARGIN:
            return Sticker(label, side, x, y, rng.uniform(-15, 15), rng.random() < 0.5)
    return None
