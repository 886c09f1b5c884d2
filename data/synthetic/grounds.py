"""Backgrounds of drawn scenes: plain, gradients, clouds, landscapes, nights, tiles, stripes and dots of two colours.

    paint("gradient", ((228, 214, 222), (176, 196, 214)), 256, random.Random(0))     # a 256 x 256 PIL image

What a ground invents by itself (where stars are, how clouds lie) comes from the random source that is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from data.synthetic.scenes import Rgb


def paint(kind: str, palette: tuple[Rgb, Rgb], side: int, rng: random.Random) -> Image.Image:
    """A square ground of `side` pixels; `kind` is a key of PAINTERS or names a single colour, the first."""
    one, other = palette
    if kind in PAINTERS:
        return PAINTERS[kind](one, other, side, rng)
    return Image.new("RGB", (side, side), one)


def blend(one: Rgb, other: Rgb, share: float) -> Rgb:
    """`share` of the way from one colour to the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def ramp(start: Rgb, stop: Rgb, side: int, rng: random.Random | None = None) -> Image.Image:
    """A square that runs from one colour to the other: downwards, or in one of four directions by chance."""
    weight = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)) if rng else 0)
    return _mix(start, stop, weight.resize((side, side), Image.Resampling.BILINEAR))


def _mix(start: Rgb, stop: Rgb, weight: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", weight.size, stop), Image.new("RGB", weight.size, start), weight)


def _clouds(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Smooth noise: a 5 x 5 grid of random weights, enlarged."""
    grid = Image.frombytes("L", (5, 5), rng.randbytes(25))
    return _mix(one, other, grid.resize((side, side), Image.Resampling.BICUBIC))


def _night(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    sky = ramp(one, other, side)
    pencil = ImageDraw.Draw(sky)
    for _ in range(14):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.006, 0.012) * side
        pencil.ellipse([x - r, y - r, x + r, y + r], fill=(198, 200, 214))
    return sky


def _tiles(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (side, side), one)
    pencil = ImageDraw.Draw(image)
    pitch = side / rng.choice((4, 5, 6))
    for row in range(6):
        for column in range(row % 2, 6, 2):
            x, y = column * pitch, row * pitch
            pencil.rectangle([x, y, x + pitch - 1, y + pitch - 1], fill=other)
    return image


def _landscape(sky: Rgb, land: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Sky above, land below a wavy horizon, both a little darker towards the bottom."""
    image = ramp(blend(sky, (255, 255, 255), 0.12), sky, side)
    horizon, height = rng.uniform(0.45, 0.72) * side, rng.uniform(0.01, 0.03) * side
    phase = rng.uniform(0, math.tau)
    edge = [(x, horizon + height * math.sin(phase + 5 * x / side)) for x in range(0, side + 8, 8)]
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([*edge, (side + 8, side), (0, side)], fill=255)
    image.paste(ramp(blend(land, (255, 255, 255), 0.1), blend(land, (0, 0, 0), 0.06), side), (0, 0), mask)
    return image


def _stripes(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Slanted bands, four to seven across the picture."""
    image = Image.new("RGB", (side, side), one)
    pencil, pitch = ImageDraw.Draw(image), side / rng.choice((4, 5, 6, 7))
    slope = rng.choice((-1.0, -0.5, 0.0, 0.5, 1.0)) * side
    for k in range(-8, 16):
        x = k * pitch
        pencil.polygon([(x, 0), (x + pitch / 2, 0), (x + pitch / 2 + slope, side), (x + slope, side)], fill=other)
    return image


def _dots(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Polka dots in staggered rows."""
    image = Image.new("RGB", (side, side), one)
    pencil, pitch = ImageDraw.Draw(image), side / rng.choice((4, 5, 6))
    shift_x, shift_y, radius = rng.random() * pitch, rng.random() * pitch, rng.uniform(0.2, 0.3) * pitch
    for row in range(-1, 7):
        for column in range(-1, 7):
            x, y = (column + row % 2 / 2) * pitch + shift_x, row * pitch + shift_y
            pencil.ellipse([x - radius, y - radius, x + radius, y + radius], fill=other)
    return image


PAINTERS: dict[str, Callable[[Rgb, Rgb, int, random.Random], Image.Image]] = {
    "gradient": ramp,
    "cloudy": _clouds,
    "night": _night,
    "tiled": _tiles,
    "meadow": _landscape,
    "beach": _landscape,
    "snowy": _landscape,
    "striped": _stripes,
    "dotted": _dots,
}
