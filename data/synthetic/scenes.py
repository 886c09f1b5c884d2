"""What a scene of the demo corpus is: one prominent object, up to two small companions, a ground.

Why procedural: the corpus must exist on any machine in seconds, be free of rights, and still hold something
to learn for all three objectives: words for contrast, parts and views for self-supervision, edges and
textures for reconstruction. The class of a scene is the shape and colour of its main object (8 x 8 = 64
classes).

    scene = sample_scene(seed=0, split="train", index=7)
    scene.main.shape, scene.main.colour, class_names()[scene.label]     # 'heart', 'blue', 'blue heart'

A scene depends on (seed, split, index) alone, and every run of 64 indices holds each class once. Lengths are
shares of the image side, x to the right and y downwards. data/synthetic/drawing.py turns a scene into pixels,
data/synthetic/grammar.py into words.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 46),
    "orange": (244, 132, 30),
    "yellow": (250, 214, 56),
    "green": (42, 152, 70),
    "blue": (40, 94, 212),
    "purple": (128, 58, 178),
    "pink": (244, 124, 184),
    "white": (250, 250, 247),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "shaded")
TEXTURE_WEIGHTS = (4, 1, 1, 1, 2)  # outlines speak more clearly when most objects are plain
TILT = 7.0  # degrees either way

# Each ground with the pairs of colours it may be painted in, all duller than the objects.
GROUNDS: dict[str, tuple[tuple[Rgb, Rgb], ...]] = {
    "pale": (
        ((236, 228, 212), (236, 228, 212)),
        ((212, 218, 222), (212, 218, 222)),
        ((202, 222, 212), (202, 222, 212)),
    ),
    "dark": (((46, 50, 62), (46, 50, 62)), ((58, 48, 56), (58, 48, 56)), ((36, 56, 58), (36, 56, 58))),
    "gradient": (
        ((228, 214, 222), (176, 196, 214)),
        ((70, 84, 100), (34, 38, 52)),
        ((212, 226, 206), (168, 190, 196)),
    ),
    "cloudy": (
        ((214, 220, 226), (172, 186, 200)),
        ((92, 100, 114), (52, 58, 72)),
        ((230, 222, 210), (196, 186, 178)),
    ),
    "meadow": (((190, 216, 234), (150, 180, 118)), ((206, 222, 228), (124, 150, 104))),
    "beach": (((136, 178, 194), (226, 210, 172)), ((110, 150, 168), (206, 188, 150))),
    "snowy": (((142, 162, 182), (232, 238, 242)), ((168, 176, 190), (240, 242, 246))),
    "night": (((22, 26, 50), (50, 52, 86)), ((18, 18, 30), (36, 46, 64))),
    "tiled": (
        ((206, 208, 206), (182, 186, 188)),
        ((74, 80, 88), (54, 60, 68)),
        ((222, 206, 190), (200, 184, 170)),
    ),
}
MIN_CONTRAST = 165.0  # in the units of `contrast`; 765 is white on black

SIZES = {"small": (0.42, 0.48), "medium": (0.52, 0.59), "large": (0.63, 0.72)}  # diameter of the main object
COMPANION_DIAMETER = (0.16, 0.22)
MARGIN = 0.03  # between an object and the image's edge, and between two objects


@dataclass(frozen=True)
class Thing:
    """One object. It lies inside the circle of `diameter` around (x, y); `angle` is in degrees."""

    shape: str
    colour: str
    texture: str
    diameter: float
    x: float
    y: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """`size` is a key of SIZES and speaks of the main object; `column` and `row` (-1, 0, 1) are its place."""

    label: int
    main: Thing
    size: str
    column: int
    row: int
    companions: tuple[Thing, ...]
    ground: str
    palette: tuple[Rgb, Rgb]
    details: int  # seed of what the drawing invents by itself: stars, clouds, the direction of stripes


def class_names() -> list[str]:
    """The 64 class names in the order of their labels: 'red circle', 'orange circle', ... 'white moon'."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def scene_random(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """The random source for one purpose of one sample. Seeded by text, which Python keeps stable."""
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene at position `index` of a split: a pure function of its arguments."""
    rng = scene_random(seed, split, index, "scene")
    label = _label(seed, split, index)
    colour, shape = class_names()[label].split()
    ground, palette = _ground(colour, rng)
    size = rng.choice(list(SIZES))
    main, column, row = _main(shape, colour, size, rng)
    companions = _companions(main, palette, rng)
    return Scene(label, main, size, column, row, companions, ground, palette, rng.getrandbits(32))


def contrast(one: Rgb, other: Rgb) -> float:
    """How far apart two colours look: RGB distance with the "redmean" weights, 0 to 765."""
    red = (one[0] + other[0]) / 2
    dr, dg, db = (a - b for a, b in zip(one, other, strict=True))
    return math.sqrt((2 + red / 256) * dr * dr + 4 * dg * dg + (2 + (255 - red) / 256) * db * db)


def stands_out(colour: str, palette: tuple[Rgb, Rgb]) -> bool:
    """Whether an object of this colour is easy to see on this ground."""
    return min(contrast(COLOURS[colour], ground) for ground in palette) >= MIN_CONTRAST


def _label(seed: int, split: str, index: int) -> int:
    """Every run of 64 indices is a permutation of the classes, so any split is balanced and in no order."""
    run, position = divmod(index, len(SHAPES) * len(COLOURS))
    labels = list(range(len(SHAPES) * len(COLOURS)))
    scene_random(seed, split, run, "labels").shuffle(labels)
    return labels[position]


def _ground(colour: str, rng: random.Random) -> tuple[str, tuple[Rgb, Rgb]]:
    fitting = {name: [p for p in palettes if stands_out(colour, p)] for name, palettes in GROUNDS.items()}
    name = rng.choice([name for name, palettes in fitting.items() if palettes])
    return name, rng.choice(fitting[name])


def _main(shape: str, colour: str, size: str, rng: random.Random) -> tuple[Thing, int, int]:
    diameter = rng.uniform(*SIZES[size])
    column, row = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
    reach = 0.5 - diameter / 2 - MARGIN  # how far from the middle the centre may lie
    x, y = (
        0.5 + (side * rng.uniform(0.75, 1.0) * reach if side else rng.uniform(-0.03, 0.03)) for side in (column, row)
    )
    texture = rng.choices(TEXTURES, TEXTURE_WEIGHTS)[0]
    return Thing(shape, colour, texture, diameter, x, y, rng.uniform(-TILT, TILT)), column, row


def _companions(main: Thing, palette: tuple[Rgb, Rgb], rng: random.Random) -> tuple[Thing, ...]:
    """None, one or two small objects of other colours than the main one; two are twins half of the time."""
    colours = [c for c in COLOURS if c != main.colour and stands_out(c, palette)]
    kinds = [(rng.choice(SHAPES), rng.choice(colours)) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    if len(kinds) == 2 and rng.random() < 0.5:
        kinds[1] = kinds[0]
    placed: list[Thing] = []
    for shape, colour in kinds:
        spot = _free_spot([main, *placed], rng)
        if spot is not None:
            placed.append(Thing(shape, colour, "plain", *spot, rng.uniform(-TILT, TILT)))
    return tuple(placed)


def _free_spot(taken: list[Thing], rng: random.Random) -> tuple[float, float, float] | None:
    """(diameter, x, y) of a place that touches nothing; None where the picture is full."""
    for _ in range(40):
        diameter = rng.uniform(*COMPANION_DIAMETER)
        edge = diameter / 2 + MARGIN
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        gaps = (math.dist((x, y), (t.x, t.y)) - (diameter + t.diameter) / 2 for t in taken)
        if min(gaps) >= MARGIN:
            return diameter, x, y
    return None
