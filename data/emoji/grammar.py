"""The language of the emoji corpus: scene -> caption, class -> zero-shot prompts.

A caption always names the main picture, as Unicode does; size, tilt, place, company and ground may be left out, as
people leave things out. Prompts are sentences of the same language about the class alone.

    caption(scene, names, rng)       # 'a sticker of a large red apple on the left, on a blue background'
    prompts("red apple")[:2]         # ['a red apple', 'a picture of a red apple']
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from data.emoji.scenes import TILTED, EmojiScene
from data.synthetic.grammar import place, relation, with_article

OPENINGS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "a sticker of",
    "an icon of",
    "a photo of",
    "there is",
    "we see",
)
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium sized",), "large": ("large", "big", "huge")}
TILT_WORDS = ("tilted", "slanted", "leaning")
GROUND_PHRASES = {
    "plain": ("on a {0} background", "on a plain {0} background", "against {0}", "on {0}"),
    "gradient": ("on a gradient of {0} and {1}", "on a background that fades from {0} to {1}", "between {0} and {1}"),
    "cloudy": ("on a cloudy {0} background", "in front of {0} clouds", "in {0} fog"),
    "tiled": ("on {0} tiles", "on a {0} checkered floor"),
    "striped": ("on {0} stripes", "on a striped {0} background"),
    "dotted": ("on {0} dots", "on a dotted {0} background"),
}


def caption(scene: EmojiScene, names: Sequence[str], rng: random.Random) -> str:
    """One sentence about the scene, lower case. All it says is so; it rarely says all that is so."""
    subject = _subject(scene, names[scene.label], rng)
    opening = rng.choice(OPENINGS) + " " if rng.random() < 0.6 else ""
    where = f" {place(scene.row, scene.column, rng)}" if rng.random() < 0.4 else ""
    ground = rng.choice(GROUND_PHRASES[scene.ground]).format(*scene.colours) if rng.random() < 0.7 else ""
    if ground and rng.random() < 0.15:  # the ground speaks first
        return f"{ground}, {subject}{where}{_company(scene, names, rng)}"
    joint = ", " if where else " "
    return f"{opening}{subject}{where}{_company(scene, names, rng)}" + (f"{joint}{ground}" if ground else "")


def prompts(name: str) -> list[str]:
    """The zero-shot prompts of a class: its name alone, then behind every opening."""
    return [named(name), *(f"{opening} {named(name)}" for opening in OPENINGS)]


def named(name: str) -> str:
    """With the article it takes: 'an anchor'; plurals take none: 'grapes'."""
    return name if _is_plural(name) else with_article(name)


def _is_plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith(("ss", "us", "is"))


def _subject(scene: EmojiScene, name: str, rng: random.Random) -> str:
    """The name with what is said of size and tilt, before or after it."""
    words = []
    if rng.random() < 0.4:
        words.append(rng.choice(SIZE_WORDS[scene.size]))
    if abs(scene.main.angle) >= TILTED and rng.random() < 0.5:
        words.append(rng.choice(TILT_WORDS))
    if words and rng.random() < 0.25:
        return f"{named(name)} that {'are' if _is_plural(name) else 'is'} {' and '.join(words)}"
    return named(" ".join([*words, name]))


def _company(scene: EmojiScene, names: Sequence[str], rng: random.Random) -> str:
    """' with ...' about the second picture; sometimes nothing."""
    other = scene.companion
    if other is None or rng.random() < 0.2:
        return ""
    phrase = named(f"{rng.choice(('small', 'tiny', 'little'))} {names[other.label]}")
    if rng.random() < 0.6:
        return f" with {phrase} {relation(other, scene.main, rng)} it"
    return f" {rng.choice(('and', 'next to', 'with'))} {phrase}"
