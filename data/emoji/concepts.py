"""Which pictures of a font are classes, and what they are called: Unicode's own names of single code points.

    concepts = choose(font, num_classes=100)
    concepts[0].name, concepts[0].rim           # 'red apple', the mean colour along its outline

A name must say what is to be seen, so symbols, signs, arrows, letters and the like are left out, and so are words for
one picture in several directions, sizes or hands. People and faces are left out because they hardly differ at the few
pixels they get here; pictures that fill their frame, because they bring a ground of their own.

Of what is left (six to seven hundred things) the classes are those that look least like one another: starting from the
first, each next one is the picture that is furthest from all chosen so far (Gonzalez 1985), so the first 50 of 100
classes are the 50. Everything is integer arithmetic on thumbnails: the same font gives the same classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from configs import UserError
from data.emoji.font import Pictures
from data.synthetic.scenes import Rgb

RANGES = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
MOST_WORDS = 3
# Symbols and letters; words of one picture in several versions; people, all alike at 32 pixels; the zodiac and faiths.
_WORDS = """
symbol sign mark squared circled ideograph ideographic cjk latin fullwidth trigram letter capital numeral number keycap
digit button regional indicator modifier component emoji input oclock clock arrow arrows bar points index
black white heavy medium small large double negative left right up down leftwards rightwards upwards downwards vertical
horizontal plus minus multiplication division infinity loop square circle triangle triangular diamond no not for one two
three place level medal off mode oncoming
face hand hands finger fingers fist palm thumbs hearts heart person people man woman men women mans womans boy girl baby
child older adult family mother father prince princess bride couple kiss busts bust restroom closet officer guardsman
worker dancer surfer swimmer bather cyclist bicyclist rower lifter wrestlers fencer runner pedestrian golfer skier
snowboarder climber sleuth imp ogre goblin superhero supervillain mage fairy vampire merperson elf genie zombie troll
ninja santa juggling handball polo handshake shrug selfie clapping standing kneeling feeding haircut
aries taurus gemini cancer leo virgo libra scorpius sagittarius capricorn aquarius pisces ophiuchus cross crescent david
dharma
"""
LEFT_OUT = frozenset(_WORDS.split())
THUMBNAIL = 8  # pixels a side
MOST_FILLED = 0.9  # share of a picture's square that it may cover
RIM = 9  # pixels, odd: width of the outline whose colour counts against the ground
LEAST_SPREAD = 24  # of 255, between the colour channels somewhere: less is a letter in one ink


@dataclass(frozen=True)
class Concept:
    """A named picture. `rim` is the mean colour of its outline, which decides on which grounds it can be seen."""

    code_point: int
    name: str
    rim: Rgb


def choose(pictures: Pictures, num_classes: int) -> list[Concept]:
    """The `num_classes` concepts that look least alike, in the order of their labels. Raises UserError for too few."""
    known = [(code_point, name, picture) for code_point, name in named() if (picture := _usable(pictures, code_point))]
    if len(known) < num_classes:
        raise UserError(
            f"--classes {num_classes}, but the font has {len(known)} coloured pictures of things with a plain name; "
            "lower --classes, or give a fuller colour font with --font"
        )
    thumbnails = np.stack([_thumbnail(picture) for _, _, picture in known])
    return [Concept(known[i][0], known[i][1], _rim(known[i][2])) for i in furthest(thumbnails, num_classes)]


def named() -> Iterator[tuple[int, str]]:
    """(code point, name) of everything that could be a class: pictographs whose name is a few plain words."""
    for code_point in (code_point for block in RANGES for code_point in block):
        name = unicodedata.name(chr(code_point), "").lower()
        words = name.replace("-", " ").split()
        is_pictograph = unicodedata.category(chr(code_point)) == "So"
        if is_pictograph and 0 < len(name.split()) <= MOST_WORDS and LEFT_OUT.isdisjoint(words):
            yield code_point, name


def furthest(points_ND: np.ndarray, count: int) -> list[int]:
    """Rows of integer points, the first and then always the one furthest (L1) from all before; ties go to the lower."""
    chosen = [0]
    distance = np.abs(points_ND - points_ND[0]).sum(axis=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1  # a twin of it may still come, it may not
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(points_ND - points_ND[chosen[-1]]).sum(axis=1))
    return chosen


def squared(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a transparent square."""
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _usable(pictures: Pictures, code_point: int) -> Image.Image | None:
    """The picture, unless there is none, it fills its frame, or it is a letter in one ink."""
    picture = pictures.picture(code_point)
    if picture is None:
        return None
    pixels = np.asarray(squared(picture), np.int64)
    is_seen = pixels[..., 3] > 127
    if not is_seen.any() or is_seen.mean() > MOST_FILLED:
        return None
    return picture if np.ptp(pixels[is_seen, :3], axis=1).max() >= LEAST_SPREAD else None


def _thumbnail(picture: Image.Image) -> np.ndarray:
    square = squared(picture)
    grey = Image.new("RGBA", square.size, (128, 128, 128, 255))
    grey.alpha_composite(square)
    small = grey.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.int64).ravel()


def _rim(picture: Image.Image) -> Rgb:
    """The mean colour of seen pixels that lie within half of RIM of the outside."""
    framed = Image.new("RGBA", (picture.width + 2 * RIM, picture.height + 2 * RIM))
    framed.paste(picture, (RIM, RIM))
    alpha = framed.getchannel("A")
    is_rim = (np.asarray(alpha) > 127) & (np.asarray(alpha.filter(ImageFilter.MinFilter(RIM))) <= 127)
    red, green, blue = (round(float(x)) for x in np.asarray(framed, np.float64)[is_rim][:, :3].mean(axis=0))
    return red, green, blue
