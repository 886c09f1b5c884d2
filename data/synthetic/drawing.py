"""Draws a scene of the demo corpus: a pure function from Scene to an RGB image of any size.

Everything is painted four times too large and box-reduced, which is the antialiasing. An object is a polygon
filled with its texture and rimmed in a darker shade of its own colour, so that it stands out from any ground.

    draw(sample_scene(0, "train", 7), size=64)     # a 64 x 64 PIL image
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from data.synthetic.grounds import blend, paint, ramp
from data.synthetic.scenes import COLOURS, Rgb, Scene, Thing

OVERSAMPLING = 4
RIM = 0.018  # width of the outline, as a share of the image side
PITCH = 0.11  # of stripes and checkers, the same
INK: Rgb = (22, 18, 36)  # what darker shades are darkened with
Points = list[tuple[float, float]]


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    rng = random.Random(scene.details)
    canvas = paint(scene.ground, scene.palette, size * OVERSAMPLING, rng)
    for thing in (*scene.companions, scene.main):
        _paint(canvas, thing, rng)
    return canvas.reduce(OVERSAMPLING)


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(radius: float, start: float, stop: float, steps: int = 48) -> Points:
    """Points around the origin from one angle to another, both in degrees."""
    return [_polar(radius, start + (stop - start) * i / steps) for i in range(steps + 1)]


def _heart() -> Points:
    """The classic parametric heart, moved and scaled into the unit circle."""
    points = []
    for turn in (math.tau * i / 60 for i in range(60)):
        height = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        points.append((0.87 * math.sin(turn) ** 3, -(height + 2.2) / 17.6))
    return points


def _moon() -> Points:
    """A disc with a bite: both arcs run through the disc's points at +-50 degrees."""
    radius, horn, bite_x = 0.92, 50, 0.5
    tip_x, tip_y = _polar(radius, -horn)
    bite_horn = math.degrees(math.atan2(tip_y, tip_x - bite_x))
    back = _arc(radius, horn, 360 - horn)
    front = _arc(math.hypot(tip_x - bite_x, tip_y), 360 + bite_horn, -bite_horn)
    return [(x + 0.1, y) for x, y in back] + [(x + bite_x + 0.1, y) for x, y in front]


def _cross() -> Points:
    a, b = 0.3, 0.94  # half the width and half the length of an arm
    quarter = [(a, -b), (a, -a), (b, -a)]
    return [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]


# Each shape's polygon inside the unit circle, and its hole.
OUTLINES: dict[str, tuple[Points, Points]] = {
    "circle": (_arc(0.94, 0, 360), []),
    "square": ([(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)], []),
    "triangle": ([(0.0, -0.99), (0.86, 0.5), (-0.86, 0.5)], []),
    "star": ([_polar(0.43 if i % 2 else 1.0, 36 * i - 90) for i in range(10)], []),
    "heart": (_heart(), []),
    "cross": (_cross(), []),
    "ring": (_arc(0.96, 0, 360), _arc(0.5, 0, 360)),
    "moon": (_moon(), []),
}


def _paint(canvas: Image.Image, thing: Thing, rng: random.Random) -> None:
    """Fills the object's polygon with its texture, working on the square around it alone."""
    radius = thing.diameter / 2 * canvas.width
    x, y = thing.x * canvas.width, thing.y * canvas.width
    left, top = math.floor(x - radius), math.floor(y - radius)
    solid, hole = (_place(points, thing.angle, radius, x - left, y - top) for points in OUTLINES[thing.shape])
    body = _texture(thing, math.ceil(2 * radius) + 2, canvas.width, rng)
    mask = Image.new("L", body.size)
    ImageDraw.Draw(mask).polygon(solid, fill=255)
    rim, width = blend(COLOURS[thing.colour], INK, 0.5), round(2 * RIM * canvas.width)
    ImageDraw.Draw(body).line([*solid, *solid[:2]], fill=rim, width=width)
    if hole:
        ImageDraw.Draw(mask).polygon(hole, fill=0)
        ImageDraw.Draw(body).line([*hole, *hole[:2]], fill=rim, width=width)
    canvas.paste(body, (left, top), mask)


def _place(points: Points, angle: float, radius: float, x: float, y: float) -> Points:
    """Turns by `angle` degrees, scales by `radius`, moves to (x, y)."""
    cos, sin = _polar(radius, angle)
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points]


def _texture(thing: Thing, tile: int, side: int, rng: random.Random) -> Image.Image:
    """A square of `tile` pixels in the object's colour, patterned with a shade of that same colour."""
    base = COLOURS[thing.colour]
    image, pitch = Image.new("RGB", (tile, tile), base), PITCH * side
    pencil, shade = ImageDraw.Draw(image), _shade(thing.colour)
    if thing.texture == "shaded":
        return ramp(base, blend(base, INK, 0.32), tile, rng)
    count = int(tile / pitch) + 2
    if thing.texture == "striped":
        slope, is_upright = rng.choice((-1, 0, 1)) * tile, rng.random() < 0.5
        for x in (k * pitch for k in range(-count, 2 * count)):
            band = [(x, 0), (x + pitch / 2, 0), (x + pitch / 2 + slope, tile), (x + slope, tile)]
            pencil.polygon(band if is_upright else [(y, x) for x, y in band], fill=shade)
    for row in range(count):
        for column in range(row % 2, count, 2):
            x, y = column * pitch, row * pitch
            if thing.texture == "checkered":
                pencil.rectangle([x, y, x + pitch, y + pitch], fill=shade)
            elif thing.texture == "dotted":
                pencil.ellipse([x, y, x + 0.75 * pitch, y + 0.75 * pitch], fill=shade)
    return image


def _shade(colour: str) -> Rgb:
    """The pattern's second colour: paler, or darker for the colours that are pale already."""
    if colour in ("yellow", "white"):
        return blend(COLOURS[colour], INK, 0.28)
    return blend(COLOURS[colour], (255, 255, 255), 0.5)
