"""Scenes of the emoji corpus, their captions and drawing: one prominent image, at times a small second one, a ground.

    scene = sample_emoji_scene(concepts, seed=0, split="train", index=7)
    concepts[scene.label].name, scene.ground, scene.colours        # 'red apple', 'gradient', ('blue', 'pink')
    draw_emoji_scene(scene, concepts, font, size=32)               # a 32 x 32 PIL image
    emoji_caption(scene, names, rng)      # 'a sticker of a large red apple on the left, on a blue background'
    emoji_prompts("red apple")[:2]        # ['a red apple', 'a picture of a red apple']

    plan = emoji_plan(EmojiFont.find(None), classes=100, samples=12_000, held_out=2_000, size=32, shard_size=256, ...)

A scene depends on (concepts, seed, split, index) alone, and every run of as many indices as there are classes holds
each class once. Lengths are fractions of the image side, x to the right and y downwards. A sample depends on (font,
classes, seed, split, index, size) alone. Which names Python knows depends on its version of Unicode, so that version
is in the manifest beside the font's digest.

Images are painted four times too large and box-reduced, as the synthetic scenes are; each throws a soft shadow of its
own outline, so that it stands out where its colours are near those of the ground.

A caption always names the main image, by Unicode's name; size, tilt, position, company and ground may be left out, as
people leave things out. Zero-shot prompts are sentences of the same language about the class alone.
"""

from __future__ import annotations

import functools
import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image, ImageFilter

from data.corpora.emoji_classes import EmojiClass, EmojiFont, EmojiImages, choose_classes, pad_to_square
from data.corpora.samples import CorpusPlan, CorpusSample, encode_image, render_in_order
from data.corpora.synthetic_images import OVERSAMPLING, mix_colours, paint_ground
from data.corpora.synthetic_scenes import (
    Rgb,
    balanced_label,
    contrast,
    position_phrase,
    relation_phrase,
    scene_random,
    with_article,
)

COLOURS: dict[str, Rgb] = {
    "red": (204, 62, 60),
    "orange": (238, 148, 66),
    "yellow": (246, 218, 108),
    "green": (98, 170, 98),
    "blue": (82, 134, 210),
    "purple": (142, 98, 184),
    "pink": (240, 166, 196),
    "brown": (136, 98, 72),
    "grey": (150, 154, 160),
    "white": (246, 246, 242),
    "black": (34, 34, 40),
    "light blue": (178, 216, 240),
    "light green": (192, 226, 172),
    "dark blue": (36, 50, 98),
    "dark green": (38, 84, 58),
}
GROUNDS = ("plain", "gradient", "cloudy", "tiled", "striped", "dotted")
GROUND_WEIGHTS = (4, 3, 2, 1, 1, 1)
MIN_CONTRAST = (
    165.0  # between a ground and the outline of the main image, in the units of data/corpora/synthetic_scenes.py
)
SIZES = {"small": (0.48, 0.56), "medium": (0.62, 0.72), "large": (0.78, 0.92)}  # longer side of the main image
TILTS = ((0, 8), (0, 8), (14, 32))  # degrees either way; a third is visibly tilted
TILTED = 12
COMPANION = (0.2, 0.28)
MARGIN = 0.02
SHADE = 0.22  # how far the second colour of a pattern lies from the first, towards white or black
SHADOW = 0.35  # opacity
SHADOW_BLUR = 0.012  # of the image side, and how far down the shadow falls
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
MIN_VOCAB, IDS_PER_CLASS = 1024, 3  # an upper bound on the ids the captions need
README = """\
# Captioned emoji scenes

{train} train and {held_out} held-out images of {size} x {size} pixels, drawn by `python -m data.corpus emoji` with seed
{seed} from the pictures of the font {font} (digest {digest}); the font's licence is that of the pictures
(Noto Color Emoji: SIL Open Font License 1.1). Names are Unicode {unicode}'s.

- `train-*.tar`, `held_out-*.tar`: webdataset shards; a sample is an image (jpg, png or webp), its caption (txt) and its
  attributes (json: `label` and the scene it was drawn from).
- `classes.json`: {classes} classes, what the main picture shows, in the order of `label`, with their prompts.
- `tokenizer.json`: a byte-pair vocabulary trained on the train captions; its largest id is end-of-text.
- `manifest.json`: the arguments that made this and the shards they made.
"""


@dataclass(frozen=True)
class Sticker:
    """One image in a scene. Its longer side is `size` before it is turned by `angle` degrees; (x, y) is its middle."""

    label: int
    size: float
    x: float
    y: float
    angle: float
    is_mirrored: bool

    @property
    def spot(self) -> tuple[float, float]:
        """(x, y) of the middle."""
        return self.x, self.y


@dataclass(frozen=True)
class EmojiScene:
    """One image's content. `size`, a key of SIZES, and `column` and `row` (-1, 0, 1) are those of the main sticker."""

    main: Sticker
    size: str
    column: int
    row: int
    companion: Sticker | None
    ground: str
    colours: tuple[str, str]  # names; the second is used where the ground is a gradient
    details: int  # seed of random details

    @property
    def label(self) -> int:
        """The class of the main image, an index into the concepts."""
        return self.main.label


def sample_emoji_scene(concepts: Sequence[EmojiClass], seed: int, split: str, index: int) -> EmojiScene:
    """Sample scene `index` of a split: a pure function of its arguments."""
    rng = scene_random(seed, split, index, "emoji")
    label = balanced_label(len(concepts), seed, split, index)
    ground = rng.choices(GROUNDS, GROUND_WEIGHTS)[0]
    colours = _colours(concepts[label].outline_colour, rng)
    size = rng.choice(list(SIZES))
    main, column, row = _main(label, size, rng)
    companion = _companion(main, len(concepts), rng)
    return EmojiScene(main, size, column, row, companion, ground, colours, rng.getrandbits(32))


def _colours(rim: Rgb, rng: random.Random) -> tuple[str, str]:
    """Sample two colours on which the outline is visible; of the three furthest where hardly any is far enough."""
    by_contrast = sorted(COLOURS, key=lambda name: -contrast(COLOURS[name], rim))
    visible = [name for name in COLOURS if contrast(COLOURS[name], rim) >= MIN_CONTRAST]
    one, other = rng.sample(visible if len(visible) >= 3 else by_contrast[:3], 2)
    return one, other


def _main(label: int, size: str, rng: random.Random) -> tuple[Sticker, int, int]:
    side = rng.uniform(*SIZES[size])
    column, row = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
    reach = 0.5 - side / 2 - MARGIN
    x, y = (0.5 + (way * rng.uniform(0.75, 1.0) * reach if way else rng.uniform(-0.03, 0.03)) for way in (column, row))
    angle = rng.choice((-1, 1)) * rng.uniform(*rng.choice(TILTS))
    return Sticker(label, side, x, y, angle, rng.random() < 0.5), column, row


def _companion(main: Sticker, num_classes: int, rng: random.Random) -> Sticker | None:
    """Sample a small image of another class that touches nothing; None in three quarters of the scenes."""
    if num_classes < 2 or rng.random() > 0.4:
        return None
    label = (main.label + rng.randrange(1, num_classes)) % num_classes
    for _ in range(40):
        side = rng.uniform(*COMPANION)
        edge = side / 2 + MARGIN
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        if math.dist((x, y), main.spot) >= 0.55 * (side + main.size) + MARGIN:
            return Sticker(label, side, x, y, rng.uniform(-15, 15), rng.random() < 0.5)
    return None


def draw_emoji_scene(scene: EmojiScene, concepts: Sequence[EmojiClass], images: EmojiImages, size: int) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels."""
    side = size * OVERSAMPLING
    canvas = paint_ground(scene.ground, ground_palette(scene), side, random.Random(scene.details)).convert("RGBA")
    for sticker in filter(None, (scene.companion, scene.main)):
        _stick(canvas, _transformed(images, concepts[sticker.label].code_point, sticker, side), sticker)
    return canvas.convert("RGB").reduce(OVERSAMPLING)


def ground_palette(scene: EmojiScene) -> tuple[Rgb, Rgb]:
    """Return the ground's two colours: those named for a gradient, else one and a shade of it."""
    one, other = (COLOURS[name] for name in scene.colours)
    if scene.ground == "gradient":
        return one, other
    lighter = sum(one) < 450
    return one, mix_colours(one, (255, 255, 255) if lighter else (0, 0, 0), SHADE if lighter else SHADE / 2)


def _stick(canvas: Image.Image, image: Image.Image, sticker: Sticker) -> None:
    blur = SHADOW_BLUR * canvas.width
    left, top = (
        round(centre * canvas.width - length / 2)
        for centre, length in zip((sticker.x, sticker.y), image.size, strict=True)
    )
    layer = Image.new("RGBA", canvas.size)
    layer.paste(image, (left, top))
    shadow = Image.new("RGBA", canvas.size, (0, 0, 0, 255))
    fallen = Image.new("L", canvas.size)
    fallen.paste(image.getchannel("A").point(lambda alpha: alpha * SHADOW), (left, top + round(blur)))
    shadow.putalpha(fallen.filter(ImageFilter.GaussianBlur(blur)))
    canvas.alpha_composite(shadow)
    canvas.alpha_composite(layer)


def _transformed(images: EmojiImages, code_point: int, sticker: Sticker, side: int) -> Image.Image:
    """Return the image at its size on a canvas of `side` pixels, mirrored and rotated."""
    square = _square(images, code_point)
    length = max(1, round(sticker.size * side))
    square = square.resize((length, length), Image.Resampling.LANCZOS)
    if sticker.is_mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square.rotate(sticker.angle, Image.Resampling.BICUBIC, expand=True)


@functools.lru_cache(maxsize=256)
def _square(images: EmojiImages, code_point: int) -> Image.Image:
    image = images.image(code_point)
    assert image is not None, f"U+{code_point:04X} was chosen because it has an image"
    return pad_to_square(image)


def emoji_caption(scene: EmojiScene, names: Sequence[str], rng: random.Random) -> str:
    """Write one lower-case sentence about the scene: true, and rarely complete."""
    subject = _subject(scene, names[scene.label], rng)
    opening = rng.choice(OPENINGS) + " " if rng.random() < 0.6 else ""
    where = f" {position_phrase(scene.row, scene.column, rng)}" if rng.random() < 0.4 else ""
    ground = rng.choice(GROUND_PHRASES[scene.ground]).format(*scene.colours) if rng.random() < 0.7 else ""
    if ground and rng.random() < 0.15:  # the ground comes first
        return f"{ground}, {subject}{where}{_company(scene, names, rng)}"
    joint = ", " if where else " "
    return f"{opening}{subject}{where}{_company(scene, names, rng)}" + (f"{joint}{ground}" if ground else "")


def emoji_prompts(name: str) -> list[str]:
    """Return the zero-shot prompts of a class: its name alone, then after every opening."""
    return [with_article_if_singular(name), *(f"{opening} {with_article_if_singular(name)}" for opening in OPENINGS)]


def with_article_if_singular(name: str) -> str:
    """Put the article in front, 'an anchor'; plurals take none: 'grapes'."""
    return name if _is_plural(name) else with_article(name)


def _is_plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith(("ss", "us", "is"))


def _subject(scene: EmojiScene, name: str, rng: random.Random) -> str:
    """Write the name with words for size and tilt, before or after it."""
    words = []
    if rng.random() < 0.4:
        words.append(rng.choice(SIZE_WORDS[scene.size]))
    if abs(scene.main.angle) >= TILTED and rng.random() < 0.5:
        words.append(rng.choice(TILT_WORDS))
    if words and rng.random() < 0.25:
        return f"{with_article_if_singular(name)} that {'are' if _is_plural(name) else 'is'} {' and '.join(words)}"
    return with_article_if_singular(" ".join([*words, name]))


def _company(scene: EmojiScene, names: Sequence[str], rng: random.Random) -> str:
    """Write ' with ...' about the second image; sometimes nothing."""
    other = scene.companion
    if other is None or rng.random() < 0.2:
        return ""
    phrase = with_article_if_singular(f"{rng.choice(('small', 'tiny', 'little'))} {names[other.label]}")
    if rng.random() < 0.6:
        return f" with {phrase} {relation_phrase(other, scene.main, rng)} it"
    return f" {rng.choice(('and', 'next to', 'with'))} {phrase}"


def emoji_plan(
    font: EmojiFont, classes: int, samples: int, held_out: int, size: int, shard_size: int, seed: int, workers: int
) -> CorpusPlan:
    """Plan the emoji corpus: `samples` train and `held_out` held-out images of `size` x `size` pixels.

    Raises UserError.
    """
    concepts = choose_classes(font, classes)
    counts = {"train": samples, "held_out": held_out}
    about = {"size": size, "seed": seed, "classes": classes, "unicode": unicodedata.unidata_version}
    readme = README.format(**counts, **about, font=font.path.name, digest=font.digest)
    table = [{"name": concept.name, "prompts": emoji_prompts(concept.name)} for concept in concepts]

    def render(split: str) -> functools.partial[CorpusSample]:
        return functools.partial(render_emoji_sample, concepts, font, seed, split, size)

    return CorpusPlan(
        arguments={"kind": "emoji", **counts, **about, "shard_size": shard_size, "font": font.digest},
        splits={split: render_in_order(render(split), count, size * size, workers) for split, count in counts.items()},
        counts=counts,
        shard_size=shard_size,
        vocab=max(MIN_VOCAB, IDS_PER_CLASS * classes),
        files=lambda: {"README": readme, "classes.json": {"classes": table}},
    )


def render_emoji_sample(
    concepts: Sequence[EmojiClass], images: EmojiImages, seed: int, split: str, size: int, index: int
) -> CorpusSample:
    """Draw sample `index` of a split: a pure function of its arguments (and of Pillow's drawing and encoders)."""
    scene = sample_emoji_scene(concepts, seed, split, index)
    drawn = draw_emoji_scene(scene, concepts, images, size)
    image, extension = encode_image(drawn, scene_random(seed, split, index, "format"))
    words = emoji_caption(scene, [concept.name for concept in concepts], scene_random(seed, split, index, "caption"))
    attributes = {"label": scene.label, "class": concepts[scene.label].name, "width": size, "height": size}
    return CorpusSample(image, extension, words, {**attributes, "scene": asdict(scene)})
