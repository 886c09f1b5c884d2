"""Scenes of the synthetic demo corpus and their captions: one prominent object, up to two small companions, a ground.

    scene = sample_scene(seed=0, split="train", index=7)
    scene.main.shape, scene.main.colour, class_names()[scene.label]     # 'heart', 'blue', 'blue heart'
    scene_caption(scene, rng)            # 'a big azure heart on the left with a small red star above it'
    class_prompts("red", "heart")[:2]    # ['a red heart', 'a picture of a red heart']

Why procedural: the corpus must exist on any machine in seconds, be free of rights, and still hold something
to learn for all three objectives: words for contrast, parts and views for self-supervision, edges and
textures for reconstruction. The class of a scene is the shape and colour of its main object (8 x 8 = 64
classes).

A scene depends on (seed, split, index) alone, and every run of 64 indices holds each class once. Lengths are
fractions of the image side, x to the right and y downwards. data/corpora/synthetic_images.py draws it.

A caption always names the main object's colour and shape, each by one of several synonyms; size, texture, position,
companions and ground may be left out, as people leave things out. Zero-shot prompts are sentences of the same language
about the class alone.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Protocol

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
TEXTURE_WEIGHTS = (4, 1, 1, 1, 2)  # outlines are clearer when most objects are plain
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
# The first word of each is the class name's own and is used half of the time.
SHAPE_WORDS = {
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "star shape"),
    "heart": ("heart", "love heart"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "moon": ("moon", "crescent"),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "gold"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "white": ("white", "ivory"),
}
SIZE_WORDS = {
    "small": ("smallish", "modest"),
    "medium": ("medium", "middling"),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "shaded": ("shaded",),
}
TEXTURE_PHRASES = {
    "striped": ("with stripes",),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks",),
    "shaded": ("with soft shading",),
}
GROUND_PHRASES = {
    "pale": ("on a pale background", "on a plain light background"),
    "dark": ("on a dark background", "on a plain dark background"),
    "gradient": ("on a smooth gradient",),
    "cloudy": ("in front of clouds", "in the fog"),
    "meadow": ("in a meadow", "on the grass"),
    "beach": ("on a beach", "by the sea"),
    "snowy": ("in the snow", "on a snowy field"),
    "night": ("at night", "in the night sky"),
    "tiled": ("on a tiled floor", "on tiles"),
}
OPENINGS = ("a picture of", "an image of", "a drawing of", "there is", "here is", "we see")
COLUMN_WORDS = {-1: "left", 0: "", 1: "right"}
ROW_WORDS = {-1: "top", 0: "", 1: "bottom"}


@dataclass(frozen=True)
class SceneObject:
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
    """One image's content. `size`, a key of SIZES, and `column` and `row` (-1, 0, 1) are those of the main object."""

    label: int
    main: SceneObject
    size: str
    column: int
    row: int
    companions: tuple[SceneObject, ...]
    ground: str
    palette: tuple[Rgb, Rgb]
    details: int  # seed of random details: stars, clouds, the direction of stripes


def class_names() -> list[str]:
    """Return the 64 class names in the order of their labels: 'red circle', 'orange circle', ... 'white moon'."""
    return [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]


def scene_random(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """Return the random source for one purpose of one sample. Seeded by text, which Python keeps stable."""
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Sample scene `index` of a split: a pure function of its arguments."""
    rng = scene_random(seed, split, index, "scene")
    label = balanced_label(len(SHAPES) * len(COLOURS), seed, split, index)
    colour, shape = class_names()[label].split()
    ground, palette = _ground(colour, rng)
    size = rng.choice(list(SIZES))
    main, column, row = _main(shape, colour, size, rng)
    companions = _companions(main, palette, rng)
    return Scene(label, main, size, column, row, companions, ground, palette, rng.getrandbits(32))


def contrast(one: Rgb, other: Rgb) -> float:
    """Return the perceived distance of two colours: RGB distance with the "redmean" weights, 0 to 765."""
    red = (one[0] + other[0]) / 2
    dr, dg, db = (a - b for a, b in zip(one, other, strict=True))
    return math.sqrt((2 + red / 256) * dr * dr + 4 * dg * dg + (2 + (255 - red) / 256) * db * db)


def stands_out(colour: str, palette: tuple[Rgb, Rgb]) -> bool:
    """Whether an object of this colour is easy to see on this ground."""
    return min(contrast(COLOURS[colour], ground) for ground in palette) >= MIN_CONTRAST


def balanced_label(num_classes: int, seed: int, split: str, index: int) -> int:
    """Return a sample's class: every run of `num_classes` indices is a permutation, so any split is balanced."""
    run, position = divmod(index, num_classes)
    labels = list(range(num_classes))
    scene_random(seed, split, run, "labels").shuffle(labels)
    return labels[position]


def _ground(colour: str, rng: random.Random) -> tuple[str, tuple[Rgb, Rgb]]:
    fitting = {name: [p for p in palettes if stands_out(colour, p)] for name, palettes in GROUNDS.items()}
    name = rng.choice([name for name, palettes in fitting.items() if palettes])
    return name, rng.choice(fitting[name])


def _main(shape: str, colour: str, size: str, rng: random.Random) -> tuple[SceneObject, int, int]:
    diameter = rng.uniform(*SIZES[size])
    column, row = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
    reach = 0.5 - diameter / 2 - MARGIN  # how far from the middle the centre may lie
    x, y = (
        0.5 + (side * rng.uniform(0.75, 1.0) * reach if side else rng.uniform(-0.03, 0.03)) for side in (column, row)
    )
    texture = rng.choices(TEXTURES, TEXTURE_WEIGHTS)[0]
    return SceneObject(shape, colour, texture, diameter, x, y, rng.uniform(-TILT, TILT)), column, row


def _companions(main: SceneObject, palette: tuple[Rgb, Rgb], rng: random.Random) -> tuple[SceneObject, ...]:
    """Sample up to two small objects of other colours than the main one; two are twins half of the time."""
    colours = [c for c in COLOURS if c != main.colour and stands_out(c, palette)]
    kinds = [(rng.choice(SHAPES), rng.choice(colours)) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    if len(kinds) == 2 and rng.random() < 0.5:
        kinds[1] = kinds[0]
    placed: list[SceneObject] = []
    for shape, colour in kinds:
        spot = _free_spot([main, *placed], rng)
        if spot is not None:
            placed.append(SceneObject(shape, colour, "plain", *spot, rng.uniform(-TILT, TILT)))
    return tuple(placed)


def _free_spot(taken: list[SceneObject], rng: random.Random) -> tuple[float, float, float] | None:
    """Sample (diameter, x, y) of a spot that touches no object; None where the image is full."""
    for _ in range(40):
        diameter = rng.uniform(*COMPANION_DIAMETER)
        edge = diameter / 2 + MARGIN
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        gaps = (math.dist((x, y), (t.x, t.y)) - (diameter + t.diameter) / 2 for t in taken)
        if min(gaps) >= MARGIN:
            return diameter, x, y
    return None


class HasPosition(Protocol):
    """An object with a centre."""

    @property
    def x(self) -> float:
        """From the left, as a fraction of the image side."""
        ...

    @property
    def y(self) -> float:
        """From the top, as a fraction of the image side."""
        ...


def scene_caption(scene: Scene, rng: random.Random) -> str:
    """Write one lower-case sentence about the scene: true, and rarely complete."""
    main = _main_phrase(scene, rng)
    if scene.companions and rng.random() < 0.15:  # the companion comes first
        company = scene.companions[0]
        return f"{_companion_phrase(company, rng)} {relation_phrase(company, scene.main, rng)} {main}"
    ground = rng.choice(GROUND_PHRASES[scene.ground]) if rng.random() < 0.5 else ""
    if ground and rng.random() < 0.2:  # the ground comes first
        return f"{ground}, {main}{_company(scene, rng)}"
    opening = rng.choice(OPENINGS) + " " if rng.random() < 0.5 else ""
    where = " " + position_phrase(scene.row, scene.column, rng) if rng.random() < 0.5 else ""
    return f"{opening}{main}{where}{_company(scene, rng)}" + (f" {ground}" if ground else "")


def class_prompts(colour: str, shape: str) -> list[str]:
    """Return the zero-shot prompts of a class: every opening with its name, then every synonym once."""
    name = f"{colour} {shape}"
    subjects = [f"{c} {s}" for c in COLOUR_WORDS[colour] for s in SHAPE_WORDS[shape] if f"{c} {s}" != name]
    return [
        with_article(name),
        *(f"{opening} {with_article(name)}" for opening in OPENINGS),
        *map(with_article, subjects),
    ]


def shape_class_table() -> list[dict[str, Any]]:
    """Return the classes of classes.json, [{"name": ..., "prompts": [...]}, ...], in the order of the labels."""
    return [{"name": name, "prompts": class_prompts(*name.split())} for name in class_names()]


def relation_phrase(thing: HasPosition, anchor: HasPosition, rng: random.Random) -> str:
    """Say where `thing` lies relative to `anchor`, along the axis on which they are further apart."""
    dx, dy = thing.x - anchor.x, thing.y - anchor.y
    if abs(dx) >= abs(dy):
        side = "left" if dx < 0 else "right"
        return rng.choice((f"to the {side} of", f"{side} of"))
    return rng.choice(("above", "over") if dy < 0 else ("below", "under"))


def position_phrase(row: int, column: int, rng: random.Random) -> str:
    """Say where something is, by its row and column (-1, 0, 1): 'at the top left', 'in the middle'."""
    row_word, column_word = ROW_WORDS[row], COLUMN_WORDS[column]
    if row_word and column_word:
        return rng.choice((f"at the {row_word} {column_word}", f"in the {row_word} {column_word} corner"))
    if row_word:
        return f"at the {row_word}"
    return f"on the {column_word}" if column_word else rng.choice(("in the middle", "in the centre"))


def _main_phrase(scene: Scene, rng: random.Random) -> str:
    size = rng.choice(SIZE_WORDS[scene.size]) if rng.random() < 0.4 else ""
    colour, shape = (
        _synonym(COLOUR_WORDS[scene.main.colour], rng),
        _synonym(SHAPE_WORDS[scene.main.shape], rng),
    )
    texture, pattern = "", ""
    if rng.random() < 0.5:
        phrases = TEXTURE_PHRASES.get(scene.main.texture, ())
        if phrases and rng.random() < 0.4:
            pattern = rng.choice(phrases)
        else:
            texture = rng.choice(TEXTURE_WORDS[scene.main.texture])
    if rng.random() < 0.12:  # the colour comes last: 'a big star in red'
        return " ".join(filter(None, (with_article(" ".join(filter(None, (size, texture, shape)))), "in", colour)))
    return " ".join(filter(None, (with_article(" ".join(filter(None, (size, texture, colour, shape)))), pattern)))


def _companion_phrase(thing: SceneObject, rng: random.Random) -> str:
    return f"a {rng.choice(('small', 'little', 'tiny'))} {thing.colour} {thing.shape}"


def _company(scene: Scene, rng: random.Random) -> str:
    """Write ' with ...' about the companions; sometimes nothing."""
    things = scene.companions
    if not things or rng.random() < 0.25:
        return ""
    if len(things) == 1:
        phrase = _companion_phrase(things[0], rng)
        if rng.random() < 0.7:
            return f" with {phrase} {relation_phrase(things[0], scene.main, rng)} it"
        return f" {rng.choice(('and', 'next to'))} {phrase}"
    one, other = things
    if (one.shape, one.colour) == (other.shape, other.colour):
        return f" {rng.choice(('and', 'with'))} two small {one.colour} {_plural(one.shape)}"
    return f" with {_companion_phrase(one, rng)} and {_companion_phrase(other, rng)}"


def _synonym(words: tuple[str, ...], rng: random.Random) -> str:
    return words[0] if rng.random() < 0.5 else rng.choice(words[1:])


def with_article(phrase: str) -> str:
    """Put the indefinite article in front: orange disc -> an orange disc."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"
