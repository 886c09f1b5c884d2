"""The language of the demo corpus: scene -> caption, class -> zero-shot prompts.

A caption always names the main object's colour and shape, each through one of several synonyms; size,
texture, place, companions and ground may be left out, as people leave things out. Prompts are sentences of
the same language about the class alone, so a zero-shot classifier asks only what captions say.

    caption(scene, rng)                  # 'a big crimson heart on the left with a small blue star above it'
    class_prompts("red", "heart")[:2]    # ['a red heart', 'a picture of a red heart']
"""

from __future__ import annotations

import random
from typing import Any, Protocol

from data.synthetic.scenes import Scene, Thing, class_names

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


class Placed(Protocol):
    """Something with a middle."""

    @property
    def x(self) -> float:
        """From the left, as a share of the image side."""
        ...

    @property
    def y(self) -> float:
        """From the top, as a share of the image side."""
        ...


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence about the scene, lower case. All it says is so; it rarely says all that is so."""
    main = _main_phrase(scene, rng)
    if scene.companions and rng.random() < 0.15:  # the companion speaks first
        company = scene.companions[0]
        return f"{_companion_phrase(company, rng)} {relation(company, scene.main, rng)} {main}"
    ground = rng.choice(GROUND_PHRASES[scene.ground]) if rng.random() < 0.5 else ""
    if ground and rng.random() < 0.2:  # the ground speaks first
        return f"{ground}, {main}{_company(scene, rng)}"
    opening = rng.choice(OPENINGS) + " " if rng.random() < 0.5 else ""
    where = " " + place(scene.row, scene.column, rng) if rng.random() < 0.5 else ""
    return f"{opening}{main}{where}{_company(scene, rng)}" + (f" {ground}" if ground else "")


def class_prompts(colour: str, shape: str) -> list[str]:
    """The zero-shot prompts of one class: every opening with its own name, then every synonym once."""
    name = f"{colour} {shape}"
    subjects = [f"{c} {s}" for c in COLOUR_WORDS[colour] for s in SHAPE_WORDS[shape] if f"{c} {s}" != name]
    return [
        with_article(name),
        *(f"{opening} {with_article(name)}" for opening in OPENINGS),
        *map(with_article, subjects),
    ]


def class_table() -> list[dict[str, Any]]:
    """The classes of classes.json, [{"name": ..., "prompts": [...]}, ...], in the order of the labels."""
    return [{"name": name, "prompts": class_prompts(*name.split())} for name in class_names()]


def relation(thing: Placed, anchor: Placed, rng: random.Random) -> str:
    """Where `thing` lies as seen from `anchor`, along the axis on which they are further apart."""
    dx, dy = thing.x - anchor.x, thing.y - anchor.y
    if abs(dx) >= abs(dy):
        side = "left" if dx < 0 else "right"
        return rng.choice((f"to the {side} of", f"{side} of"))
    return rng.choice(("above", "over") if dy < 0 else ("below", "under"))


def place(row_way: int, column_way: int, rng: random.Random) -> str:
    """Where something is, by its row and column (-1, 0, 1): 'at the top left', 'in the middle'."""
    row, column = ROW_WORDS[row_way], COLUMN_WORDS[column_way]
    if row and column:
        return rng.choice((f"at the {row} {column}", f"in the {row} {column} corner"))
    if row:
        return f"at the {row}"
    return f"on the {column}" if column else rng.choice(("in the middle", "in the centre"))


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


def _companion_phrase(thing: Thing, rng: random.Random) -> str:
    return f"a {rng.choice(('small', 'little', 'tiny'))} {thing.colour} {thing.shape}"


def _company(scene: Scene, rng: random.Random) -> str:
    """', with ...' about the companions; sometimes nothing."""
    things = scene.companions
    if not things or rng.random() < 0.25:
        return ""
    if len(things) == 1:
        phrase = _companion_phrase(things[0], rng)
        if rng.random() < 0.7:
            return f" with {phrase} {relation(things[0], scene.main, rng)} it"
        return f" {rng.choice(('and', 'next to'))} {phrase}"
    one, other = things
    if (one.shape, one.colour) == (other.shape, other.colour):
        return f" {rng.choice(('and', 'with'))} two small {one.colour} {_plural(one.shape)}"
    return f" with {_companion_phrase(one, rng)} and {_companion_phrase(other, rng)}"


def _synonym(words: tuple[str, ...], rng: random.Random) -> str:
    return words[0] if rng.random() < 0.5 else rng.choice(words[1:])


def with_article(phrase: str) -> str:
    """The indefinite article in front: orange disc -> an orange disc."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"
