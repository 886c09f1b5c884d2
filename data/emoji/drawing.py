"""Draws a scene of the emoji corpus: a pure function from scene and pictures to an RGB image of any size.

    draw(scene, concepts, font, size=32)        # a 32 x 32 PIL image

Painted four times too large and box-reduced, as the demo's scenes are; a picture throws a soft shadow of its own
outline, so that it stands out where its colours come near those of the ground.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from PIL import Image, ImageFilter

from data.emoji.concepts import Concept, squared
from data.emoji.font import Pictures
from data.emoji.scenes import COLOURS, EmojiScene, Sticker
from data.synthetic.drawing import OVERSAMPLING
from data.synthetic.grounds import blend, paint
from data.synthetic.scenes import Rgb

SHADE = 0.22  # how far the second colour of a pattern lies from the first, towards white or black
SHADOW = 0.35  # opacity
SHADOW_BLUR = 0.012  # of the image side, and how far down the shadow falls


def draw(scene: EmojiScene, concepts: Sequence[Concept], pictures: Pictures, size: int) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    side = size * OVERSAMPLING
    canvas = paint(scene.ground, palette(scene), side, random.Random(scene.details)).convert("RGBA")
    for sticker in filter(None, (scene.companion, scene.main)):
        _stick(canvas, _turned(pictures, concepts[sticker.label].code_point, sticker, side), sticker)
    return canvas.convert("RGB").reduce(OVERSAMPLING)


def palette(scene: EmojiScene) -> tuple[Rgb, Rgb]:
    """The ground's two colours: those named for a gradient, else one and a shade of it."""
    one, other = (COLOURS[name] for name in scene.colours)
    if scene.ground == "gradient":
        return one, other
    lighter = sum(one) < 450
    return one, blend(one, (255, 255, 255) if lighter else (0, 0, 0), SHADE if lighter else SHADE / 2)


def _stick(canvas: Image.Image, picture: Image.Image, sticker: Sticker) -> None:
    blur = SHADOW_BLUR * canvas.width
    left, top = (
        round(place * canvas.width - length / 2)
        for place, length in zip((sticker.x, sticker.y), picture.size, strict=True)
    )
    layer = Image.new("RGBA", canvas.size)
    layer.paste(picture, (left, top))
    shadow = Image.new("RGBA", canvas.size, (0, 0, 0, 255))
    fallen = Image.new("L", canvas.size)
    fallen.paste(picture.getchannel("A").point(lambda alpha: alpha * SHADOW), (left, top + round(blur)))
    shadow.putalpha(fallen.filter(ImageFilter.GaussianBlur(blur)))
    canvas.alpha_composite(shadow)
    canvas.alpha_composite(layer)


def _turned(pictures: Pictures, code_point: int, sticker: Sticker, side: int) -> Image.Image:
    """The picture at its size on a canvas of `side` pixels, mirrored and turned."""
    square = _square(pictures, code_point)
    length = max(1, round(sticker.size * side))
    square = square.resize((length, length), Image.Resampling.LANCZOS)
    if sticker.is_mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square.rotate(sticker.angle, Image.Resampling.BICUBIC, expand=True)


@functools.lru_cache(maxsize=256)
def _square(pictures: Pictures, code_point: int) -> Image.Image:
    picture = pictures.picture(code_point)
    assert picture is not None, f"U+{code_point:04X} was chosen because it has a picture"
    return squared(picture)
