"""The synthetic demo corpus as images: scenes drawn as pixels, encoded and captioned.

    draw_scene(sample_scene(0, "train", 7), size=64)                                         # a 64 x 64 PIL image
    paint_ground("gradient", ((228, 214, 222), (176, 196, 214)), 256, random.Random(0))      # a 256 x 256 PIL image
    next(synthetic_samples(seed=0, split="train", count=6000, size=64, workers=2)).caption

A drawing is a pure function of its scene: random details of a ground (where stars are, how clouds lie) come from the
random source that is given. Everything is painted four times too large and box-reduced, which is the antialiasing. An
object is a polygon filled with its texture and rimmed in a darker shade of its own colour, so that it stands out from
any ground.

A sample depends on (seed, split, index, size) alone. Train and held-out scenes come from different random streams; that
they share no image is tested.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict

from PIL import Image, ImageDraw

from data.corpora.samples import CorpusPlan, CorpusSample, encode_image, render_in_order
from data.corpora.synthetic_scenes import (
    COLOURS,
    Rgb,
    Scene,
    SceneObject,
    class_names,
    sample_scene,
    scene_caption,
    scene_random,
    shape_class_table,
)

OVERSAMPLING = 4
RIM = 0.018  # width of the outline, as a fraction of the image side
PITCH = 0.11  # of stripes and checkers, the same
INK: Rgb = (22, 18, 36)  # what darker shades are darkened with
Points = list[tuple[float, float]]
VOCAB = 1024  # an upper bound: the grammar's words need about 590 ids
README = """\
# Synthetic captioned scenes

{train} train and {held_out} held-out images of {size} x {size} pixels, drawn by `python -m data.corpus
synthetic` with seed {seed}. Nothing here is photographed or taken from anywhere, so there are no rights to
mind.

- `train-*.tar`, `held_out-*.tar`: webdataset shards; a sample is an image (jpg, png or webp), its caption
  (txt) and its attributes (json: `label` and the scene it was drawn from).
- `classes.json`: {classes} classes, shape and colour of the main object, in the order of `label`, with
  their prompts.
- `tokenizer.json`: a byte-pair vocabulary trained on the train captions; its largest id is end-of-text.
- `manifest.json`: the arguments that made this and the shards they made.
"""


def paint_ground(kind: str, palette: tuple[Rgb, Rgb], side: int, rng: random.Random) -> Image.Image:
    """Paint a square ground of `side` pixels; `kind` is a key of PAINTERS, or else the first colour alone."""
    one, other = palette
    if kind in PAINTERS:
        return PAINTERS[kind](one, other, side, rng)
    return Image.new("RGB", (side, side), one)


def mix_colours(one: Rgb, other: Rgb, fraction: float) -> Rgb:
    """Return the colour at `fraction` of the way from one colour to the other."""
    red, green, blue = (round(a + (b - a) * fraction) for a, b in zip(one, other, strict=True))
    return red, green, blue


def paint_gradient(start: Rgb, stop: Rgb, side: int, rng: random.Random | None = None) -> Image.Image:
    """Paint a square gradient from one colour to the other: downwards, or in one of four random directions."""
    weight = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)) if rng else 0)
    return _mix(start, stop, weight.resize((side, side), Image.Resampling.BILINEAR))


def _mix(start: Rgb, stop: Rgb, weight: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", weight.size, stop), Image.new("RGB", weight.size, start), weight)


def _clouds(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Paint smooth noise: a 5 x 5 grid of random weights, enlarged."""
    grid = Image.frombytes("L", (5, 5), rng.randbytes(25))
    return _mix(one, other, grid.resize((side, side), Image.Resampling.BICUBIC))


def _night(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    sky = paint_gradient(one, other, side)
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
    """Paint sky above, land below a wavy horizon, both a little darker towards the bottom."""
    image = paint_gradient(mix_colours(sky, (255, 255, 255), 0.12), sky, side)
    horizon, height = rng.uniform(0.45, 0.72) * side, rng.uniform(0.01, 0.03) * side
    phase = rng.uniform(0, math.tau)
    edge = [(x, horizon + height * math.sin(phase + 5 * x / side)) for x in range(0, side + 8, 8)]
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([*edge, (side + 8, side), (0, side)], fill=255)
    image.paste(
        paint_gradient(mix_colours(land, (255, 255, 255), 0.1), mix_colours(land, (0, 0, 0), 0.06), side), (0, 0), mask
    )
    return image


def _stripes(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Paint slanted bands, four to seven across the image."""
    image = Image.new("RGB", (side, side), one)
    pencil, pitch = ImageDraw.Draw(image), side / rng.choice((4, 5, 6, 7))
    slope = rng.choice((-1.0, -0.5, 0.0, 0.5, 1.0)) * side
    for k in range(-8, 16):
        x = k * pitch
        pencil.polygon([(x, 0), (x + pitch / 2, 0), (x + pitch / 2 + slope, side), (x + slope, side)], fill=other)
    return image


def _dots(one: Rgb, other: Rgb, side: int, rng: random.Random) -> Image.Image:
    """Paint polka dots in staggered rows."""
    image = Image.new("RGB", (side, side), one)
    pencil, pitch = ImageDraw.Draw(image), side / rng.choice((4, 5, 6))
    shift_x, shift_y, radius = rng.random() * pitch, rng.random() * pitch, rng.uniform(0.2, 0.3) * pitch
    for row in range(-1, 7):
        for column in range(-1, 7):
            x, y = (column + row % 2 / 2) * pitch + shift_x, row * pitch + shift_y
            pencil.ellipse([x - radius, y - radius, x + radius, y + radius], fill=other)
    return image


PAINTERS: dict[str, Callable[[Rgb, Rgb, int, random.Random], Image.Image]] = {
    "gradient": paint_gradient,
    "cloudy": _clouds,
    "night": _night,
    "tiled": _tiles,
    "meadow": _landscape,
    "beach": _landscape,
    "snowy": _landscape,
    "striped": _stripes,
    "dotted": _dots,
}


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels."""
    rng = random.Random(scene.details)
    canvas = paint_ground(scene.ground, scene.palette, size * OVERSAMPLING, rng)
    for thing in (*scene.companions, scene.main):
        _paint_object(canvas, thing, rng)
    return canvas.reduce(OVERSAMPLING)


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(radius: float, start: float, stop: float, steps: int = 48) -> Points:
    """Return points around the origin from one angle to another, both in degrees."""
    return [_polar(radius, start + (stop - start) * i / steps) for i in range(steps + 1)]


def _heart() -> Points:
    """Return the classic parametric heart, moved and scaled into the unit circle."""
    points = []
    for turn in (math.tau * i / 60 for i in range(60)):
        height = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        points.append((0.87 * math.sin(turn) ** 3, -(height + 2.2) / 17.6))
    return points


def _moon() -> Points:
    """Return a disc with a bite: both arcs run through the disc's points at +-50 degrees."""
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


def _paint_object(canvas: Image.Image, thing: SceneObject, rng: random.Random) -> None:
    """Fill the object's polygon with its texture, working on the square around it alone."""
    radius = thing.diameter / 2 * canvas.width
    x, y = thing.x * canvas.width, thing.y * canvas.width
    left, top = math.floor(x - radius), math.floor(y - radius)
    solid, hole = (_transform(points, thing.angle, radius, x - left, y - top) for points in OUTLINES[thing.shape])
    body = _texture(thing, math.ceil(2 * radius) + 2, canvas.width, rng)
    mask = Image.new("L", body.size)
    ImageDraw.Draw(mask).polygon(solid, fill=255)
    rim, width = mix_colours(COLOURS[thing.colour], INK, 0.5), round(2 * RIM * canvas.width)
    ImageDraw.Draw(body).line([*solid, *solid[:2]], fill=rim, width=width)
    if hole:
        ImageDraw.Draw(mask).polygon(hole, fill=0)
        ImageDraw.Draw(body).line([*hole, *hole[:2]], fill=rim, width=width)
    canvas.paste(body, (left, top), mask)


def _transform(points: Points, angle: float, radius: float, x: float, y: float) -> Points:
    """Rotate by `angle` degrees, scale by `radius`, move to (x, y)."""
    cos, sin = _polar(radius, angle)
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points]


def _texture(thing: SceneObject, tile: int, side: int, rng: random.Random) -> Image.Image:
    """Paint a square of `tile` pixels in the object's colour, patterned with a shade of that same colour."""
    base = COLOURS[thing.colour]
    image, pitch = Image.new("RGB", (tile, tile), base), PITCH * side
    pencil, shade = ImageDraw.Draw(image), _shade(thing.colour)
    if thing.texture == "shaded":
        return paint_gradient(base, mix_colours(base, INK, 0.32), tile, rng)
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
    """Return the pattern's second colour: paler, or darker for the colours that are pale already."""
    if colour in ("yellow", "white"):
        return mix_colours(COLOURS[colour], INK, 0.28)
    return mix_colours(COLOURS[colour], (255, 255, 255), 0.5)


def synthetic_plan(samples: int, held_out: int, size: int, shard_size: int, seed: int, workers: int) -> CorpusPlan:
    """Plan the demo corpus: `samples` train and `held_out` held-out images of `size` x `size` pixels."""
    counts = {"train": samples, "held_out": held_out}
    classes = shape_class_table()
    readme = README.format(**counts, size=size, seed=seed, classes=len(classes))
    return CorpusPlan(
        arguments={"kind": "synthetic", **counts, "size": size, "shard_size": shard_size, "seed": seed},
        splits={split: synthetic_samples(seed, split, count, size, workers) for split, count in counts.items()},
        counts=counts,
        shard_size=shard_size,
        vocab=VOCAB,
        files=lambda: {"README": readme, "classes.json": {"classes": classes}},
    )


def synthetic_samples(seed: int, split: str, count: int, size: int, workers: int) -> Iterator[CorpusSample]:
    """Draw samples 0 .. count-1 of a split, in order, by `workers` processes."""
    return render_in_order(functools.partial(render_synthetic_sample, seed, split, size), count, size * size, workers)


def render_synthetic_sample(seed: int, split: str, size: int, index: int) -> CorpusSample:
    """Draw sample `index` of a split: a pure function of its arguments (and of Pillow's encoders)."""
    scene = sample_scene(seed, split, index)
    image, extension = encode_image(draw_scene(scene, size), scene_random(seed, split, index, "format"))
    words = scene_caption(scene, scene_random(seed, split, index, "caption"))
    attributes = {"label": scene.label, "class": class_names()[scene.label], "width": size, "height": size}
    return CorpusSample(image, extension, words, {**attributes, "scene": asdict(scene)})
