"""Classes of the emoji corpus: images of a colour emoji font that show named things and differ from one another.

    font = EmojiFont.find(None)                 # the first of FONT_PATHS that exists
    font.image(0x1F34E)                         # a red apple: an RGBA image, cut to its box; None where there is none
    font.digest                                 # "3a8d...": the same font, the same images

    concepts = choose_classes(font, num_classes=100)
    concepts[0].name, concepts[0].outline_colour           # 'red apple', the mean colour along its outline

The font comes from a package of the system and is never shipped with this code. `EmojiImages` is all that the corpus
needs of a font, so that anything with images by code point can replace one. Processes copy an EmojiFont by its path and
open the file on first use.

Classes are named by Unicode's own names of single code points. A name must say what is seen, so symbols, signs, arrows,
letters and the like are left out, and so are words for one image in several directions, sizes or hands. People and
faces are left out because they hardly differ at this resolution; images that fill their frame, because they bring a
ground of their own.

Of the rest (six to seven hundred things) the classes are those that look least like one another: starting from the
first, each next one is the image furthest from all chosen so far (Gonzalez 1985), so the first 50 of 100
classes are the 50. Everything is integer arithmetic on thumbnails: the same font gives the same classes.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from configs import UserError
from data.corpora.synthetic_scenes import Rgb

FONT_PIXELS = 109  # pixels: the one size of Noto's bitmaps; fonts of outlines have every size
FRAME = 2 * FONT_PIXELS  # an image fits into a square of this side
# Of Debian and Ubuntu, Fedora, Arch.
FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
)
REMEDY = "install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji), or name another colour font with --font"
RANGES = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
MAX_WORDS = 3
# Symbols and letters; words of one image in several versions; people, all alike at 32 pixels; the zodiac and faiths.
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
MAX_FILLED = 0.9  # fraction of its square that an image may cover
RIM = 9  # pixels, odd: width of the outline whose colour counts against the ground
MIN_SPREAD = 24  # of 255, between the colour channels of some pixel: less is a letter in one ink


class EmojiImages(Protocol):
    """Images by code point. Hashable, because the drawing code caches the last few."""

    def __hash__(self) -> int: ...

    def image(self, code_point: int) -> Image.Image | None:
        """Return an RGBA image, cut to the box of what is not transparent; None for a code point without one."""
        ...


@dataclass(frozen=True)
class EmojiFont:
    """A colour emoji font file that Pillow can draw with."""

    path: Path
    digest: str  # 16 hex digits of the file's SHA-256

    @classmethod
    def find(cls, path: Path | None) -> EmojiFont:
        """Open `path`, or the first of FONT_PATHS that exists.

        Raises UserError for none, or for another kind of file.
        """
        path = path or next(filter(Path.is_file, map(Path, FONT_PATHS)), Path(FONT_PATHS[0]))
        if not path.is_file():
            raise UserError(f"no colour emoji font at {path}: the images come from it; {REMEDY}")
        try:
            _open_font(path)
        except OSError as error:
            raise UserError(
                f"--font {path} cannot be used ({error}): a colour font with outlines, or with bitmaps of "
                f"{FONT_PIXELS} pixels as Noto Color Emoji has, is needed; {REMEDY}"
            ) from None
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    def image(self, code_point: int) -> Image.Image | None:
        """Return an RGBA image, cut to its box; None where the font has none."""
        frame = Image.new("RGBA", (FRAME, FRAME))
        ImageDraw.Draw(frame).text(
            (FONT_PIXELS // 2, 0), chr(code_point), font=_open_font(self.path), embedded_color=True
        )
        box = frame.getbbox()
        return frame.crop(box) if box else None


@functools.cache
def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class EmojiClass:
    """A named image. `outline_colour` is a mean, and decides on which grounds it is visible."""

    code_point: int
    name: str
    outline_colour: Rgb


def choose_classes(images: EmojiImages, num_classes: int) -> list[EmojiClass]:
    """Choose the `num_classes` images that look least alike, in the order of their labels.

    Raises UserError for too few.
    """
    candidates = [
        (code_point, name, image) for code_point, name in named_code_points() if (image := _usable(images, code_point))
    ]
    if len(candidates) < num_classes:
        raise UserError(
            f"--classes {num_classes}, but the font has {len(candidates)} coloured images of things with a plain name; "
            "lower --classes, or give a fuller colour font with --font"
        )
    thumbnails = np.stack([_thumbnail(image) for _, _, image in candidates])
    return [
        EmojiClass(candidates[i][0], candidates[i][1], _rim(candidates[i][2]))
        for i in farthest_points(thumbnails, num_classes)
    ]


def named_code_points() -> Iterator[tuple[int, str]]:
    """Yield (code point, name) of possible classes: pictographs whose name is a few plain words."""
    for code_point in (code_point for block in RANGES for code_point in block):
        name = unicodedata.name(chr(code_point), "").lower()
        words = name.replace("-", " ").split()
        is_pictograph = unicodedata.category(chr(code_point)) == "So"
        if is_pictograph and 0 < len(name.split()) <= MAX_WORDS and LEFT_OUT.isdisjoint(words):
            yield code_point, name


def farthest_points(points_ND: np.ndarray, count: int) -> list[int]:
    """Choose rows of integer points: the first, then always the one furthest (L1) from all chosen; lower of equals."""
    chosen = [0]
    distance = np.abs(points_ND - points_ND[0]).sum(axis=1)
    while len(chosen) < count:
        distance[chosen[-1]] = -1  # never chosen again, unlike an equal point
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(points_ND - points_ND[chosen[-1]]).sum(axis=1))
    return chosen


def pad_to_square(image: Image.Image) -> Image.Image:
    """Return the image in the middle of a transparent square."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _usable(images: EmojiImages, code_point: int) -> Image.Image | None:
    """Return the image; None where it is missing, fills its frame, or is a letter in one ink."""
    image = images.image(code_point)
    if image is None:
        return None
    pixels = np.asarray(pad_to_square(image), np.int64)
    is_visible = pixels[..., 3] > 127
    if not is_visible.any() or is_visible.mean() > MAX_FILLED:
        return None
    return image if np.ptp(pixels[is_visible, :3], axis=1).max() >= MIN_SPREAD else None


def _thumbnail(image: Image.Image) -> np.ndarray:
    square = pad_to_square(image)
    grey = Image.new("RGBA", square.size, (128, 128, 128, 255))
    grey.alpha_composite(square)
    small = grey.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.int64).ravel()


def _rim(image: Image.Image) -> Rgb:
    """Return the mean colour of visible pixels within half of RIM of the outside."""
    framed = Image.new("RGBA", (image.width + 2 * RIM, image.height + 2 * RIM))
    framed.paste(image, (RIM, RIM))
    alpha = framed.getchannel("A")
    is_rim = (np.asarray(alpha) > 127) & (np.asarray(alpha.filter(ImageFilter.MinFilter(RIM))) <= 127)
    red, green, blue = (round(float(x)) for x in np.asarray(framed, np.float64)[is_rim][:, :3].mean(axis=0))
    return red, green, blue
