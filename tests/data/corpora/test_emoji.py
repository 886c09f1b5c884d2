"""The emoji corpus: what is a class, scenes true to their words, same arguments same bytes, one line a mistake.

Most of it is drawn from a stand-in for the font, coloured blobs by code point; the font is asked where there is one.
"""

import hashlib
import io
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from configs import UserError
from data.captions import CaptionEncoder
from data.corpora import emoji_classes, emoji_scenes
from data.corpora.emoji_classes import EmojiClass, EmojiFont, choose_classes, farthest_points, named_code_points
from data.corpora.emoji_scenes import (
    COLOURS,
    COMPANION,
    GROUNDS,
    MIN_CONTRAST,
    TILTED,
    draw_emoji_scene,
    emoji_plan,
    ground_palette,
    render_emoji_sample,
    sample_emoji_scene,
)
from data.corpora.synthetic_scenes import contrast, scene_random
from data.corpus import build, main
from evaluation.zero_shot import ClassTable

pytestmark = pytest.mark.L0

needs_font = pytest.mark.skipif(
    not any(Path(place).is_file() for place in emoji_classes.FONT_PATHS),
    reason="no colour emoji font: fonts-noto-color-emoji",
)


@dataclass(frozen=True)
class Blobs:
    """Stands in for a font: every third pictograph has an image, three coloured ellipses of its own."""

    path: Path = Path("blobs.ttf")
    digest: str = "0123456789abcdef"

    def image(self, code_point: int) -> Image.Image | None:
        if code_point % 3:
            return None
        rng = random.Random(code_point)
        image = Image.new("RGBA", (60, 60))
        for _ in range(3):
            x, y, colour = rng.randrange(30), rng.randrange(30), (*rng.randbytes(2), 40)
            ImageDraw.Draw(image).ellipse([x, y, x + 28, y + 24], fill=colour)
        return image.crop(image.getbbox())


BLOBS = Blobs()
CONCEPTS = choose_classes(BLOBS, 20)
NAMES = [concept.name for concept in CONCEPTS]
SCENES = [sample_emoji_scene(CONCEPTS, 0, "train", index) for index in range(400)]
CAPTIONS = [emoji_scenes.emoji_caption(s, NAMES, scene_random(0, "train", i, "caption")) for i, s in enumerate(SCENES)]


def test_names_are_unicodes_own_and_say_what_is_to_be_seen() -> None:
    names = dict(named_code_points())
    assert names[0x1F34E] == "red apple"
    assert len(set(names.values())) == len(names) > 500
    for absent in (0x1F1E6, 0x1F3FB, 0x1F55B, 0x1F600, 0x2B05, 0x1F468, 0x2605):  # flag letter, skin, clock, face, ...
        assert absent not in names


def test_classes_look_least_alike_and_fewer_are_the_first_of_more() -> None:
    points = np.array([[0], [1], [2], [10], [6]])
    assert farthest_points(points, 4) == [0, 3, 4, 2]
    assert farthest_points(np.zeros((3, 1), int), 3) == [0, 1, 2]  # alike, but each is chosen once
    assert choose_classes(BLOBS, 12) == CONCEPTS[:12]
    assert len(set(NAMES)) == 20


def test_letters_in_one_ink_and_images_that_fill_their_frame_are_no_classes() -> None:
    ink, tile, seen = Image.new("RGBA", (50, 50)), Image.new("RGBA", (50, 50), (20, 200, 40, 255)), BLOBS.image(9)
    ImageDraw.Draw(ink).ellipse([0, 0, 49, 49], fill=(30, 30, 30, 255))

    @dataclass(frozen=True)
    class Three:
        def image(self, code_point: int) -> Image.Image | None:
            return {0x1F34E: ink, 0x1F34F: tile, 0x1F350: seen, 0x1F351: seen}.get(code_point)

    assert [concept.name for concept in choose_classes(Three(), 2)] == ["pear", "peach"]
    with pytest.raises(UserError, match=r"--classes 3, but the font has 2 coloured images"):
        choose_classes(Three(), 3)


def test_the_rim_is_the_colour_of_the_outline_alone() -> None:
    image = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(image).ellipse([0, 0, 59, 59], fill=(200, 10, 20, 255))
    ImageDraw.Draw(image).ellipse([10, 10, 49, 49], fill=(0, 255, 255, 255))
    assert emoji_classes._rim(image) == (200, 10, 20)


def test_a_scene_depends_on_its_arguments_alone_and_classes_are_balanced() -> None:
    assert [sample_emoji_scene(CONCEPTS, 0, "train", index) for index in reversed(range(400))][::-1] == SCENES
    assert sample_emoji_scene(CONCEPTS, 1, "train", 0) != SCENES[0] != sample_emoji_scene(CONCEPTS, 0, "held_out", 0)
    for start in range(0, 400, 20):
        assert sorted(scene.label for scene in SCENES[start : start + 20]) == list(range(20))


def test_the_scenes_of_this_format_number_are_pinned() -> None:
    # When this fails by intent, raise data.corpus.FORMAT: the same arguments now give another corpus.
    fixed = [EmojiClass(0x1F34E + i, f"thing {i}", (40 * i, 90, 200 - 40 * i)) for i in range(5)]
    scenes = [sample_emoji_scene(fixed, 0, "train", index) for index in range(100)]
    words = [
        emoji_scenes.emoji_caption(s, [c.name for c in fixed], scene_random(0, "train", i, "caption"))
        for i, s in enumerate(scenes)
    ]
    content = json.dumps([[asdict(s), w] for s, w in zip(scenes, words, strict=True)])
    rounded = json.dumps(json.loads(content, parse_float=lambda x: round(float(x), 6)))
    assert hashlib.sha256(rounded.encode()).hexdigest()[:16] == "4bb7da8b5f53ba8e"


def test_images_stay_inside_and_stand_out_from_their_ground() -> None:
    assert {scene.ground for scene in SCENES} == set(GROUNDS)
    for scene in SCENES:
        half = scene.main.size / 2
        assert all(half <= place <= 1 - half for place in scene.main.spot)
        rim = CONCEPTS[scene.label].outline_colour
        if sum(contrast(colour, rim) >= MIN_CONTRAST for colour in COLOURS.values()) >= 3:
            assert min(contrast(COLOURS[name], rim) for name in scene.colours) >= MIN_CONTRAST
        if scene.companion is not None:
            assert scene.companion.label != scene.label
            assert COMPANION[0] <= scene.companion.size <= COMPANION[1] < scene.main.size
    shares = Counter(scene.companion is not None for scene in SCENES)
    assert 0.1 < shares[True] / 400 < 0.5


def test_captions_name_the_image_and_say_nothing_false() -> None:
    for scene, words in zip(SCENES, CAPTIONS, strict=True):
        assert NAMES[scene.label] in words
        assert words == words.lower()
        assert words.isprintable()
        assert "  " not in words
        for size, sayings in emoji_scenes.SIZE_WORDS.items():
            about_main = words.split(NAMES[scene.label])[0]
            if size != scene.size and size != "small":  # a companion is called small too
                assert not any(saying in about_main.split() for saying in sayings)
        if any(tilt in words for tilt in emoji_scenes.TILT_WORDS):
            assert abs(scene.main.angle) >= TILTED
        said = [name for name in COLOURS if f" {name} background" in words or f"{name} tiles" in words]
        assert all(name in " ".join(scene.colours) for name in said)
    assert len(set(CAPTIONS)) > 380


def test_articles() -> None:
    assert emoji_scenes.with_article_if_singular("anchor") == "an anchor"
    assert emoji_scenes.with_article_if_singular("grapes") == "grapes"
    assert emoji_scenes.with_article_if_singular("hibiscus") == "a hibiscus"
    assert emoji_scenes.emoji_prompts("red apple")[:2] == ["a red apple", "a picture of a red apple"]


def test_a_drawing_shows_the_ground_in_its_corner_and_the_image_in_its_place() -> None:
    for scene in SCENES[:60]:
        image = draw_emoji_scene(scene, CONCEPTS, BLOBS, 32)
        assert (image.size, image.mode) == ((32, 32), "RGB")
        bare = draw_emoji_scene(
            replace(scene, main=replace(scene.main, size=0.01), companion=None), CONCEPTS, BLOBS, 32
        )
        changed = np.abs(np.asarray(image, int) - np.asarray(bare, int)).sum(axis=2) > 20
        x, y = (int(place * 32) for place in scene.main.spot)
        assert changed[max(0, y - 6) : y + 6, max(0, x - 6) : x + 6].mean() > 0.3
        if scene.ground == "plain":
            assert ground_palette(scene)[0] in (bare.getpixel((0, 0)), bare.getpixel((31, 31)))


def test_the_corpus_is_whole_and_the_same_whatever_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EmojiFont, "find", classmethod(lambda cls, path: BLOBS))
    command = ["emoji", "--out", str(tmp_path / "one"), "--samples", "120", "--held-out", "40", "--size", "32"]
    command += ["--classes", "20", "--shard-size", "50"]
    assert main([*command, "--workers", "1"]) == 0
    assert main(command) == 0
    assert "already holds this corpus" in capsys.readouterr().out
    build(tmp_path / "two", emoji_plan(BLOBS, 20, 120, 40, 32, 50, 0, workers=1))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert sorted(one)[:3] == ["README", "classes.json", "held_out-000000.tar"]
    arguments = json.loads(one["manifest.json"])["arguments"]
    assert (arguments["font"], arguments["classes"]) == (BLOBS.digest, 20)
    table = ClassTable.read(tmp_path / "one" / "classes.json")
    assert list(table.names) == NAMES
    assert CaptionEncoder(str(tmp_path / "one" / "tokenizer.json"), 32).encode(list(table.prompts[0])).shape[1] == 32
    assert main([*command[:-4], "--classes", "19", "--shard-size", "50"]) == 2
    assert "classes: 20 there, 19 requested" in capsys.readouterr().err


def test_a_sample_is_a_function_of_its_index() -> None:
    sample = render_emoji_sample(CONCEPTS, BLOBS, 0, "train", 32, 7)
    assert sample == render_emoji_sample(CONCEPTS, BLOBS, 0, "train", 32, 7)
    assert sample.attributes["class"] == NAMES[sample.attributes["label"]]
    assert Image.open(io.BytesIO(sample.image)).size == (32, 32)
    assert sample != render_emoji_sample(CONCEPTS, BLOBS, 1, "train", 32, 7)


def test_a_missing_font_is_one_line_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["emoji", "--out", str(tmp_path / "out"), "--samples", "4", "--font"]
    assert main([*command, str(tmp_path / "absent.ttf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no colour emoji font at {tmp_path / 'absent.ttf'}")
    assert "fonts-noto-color-emoji" in error
    assert error.count("\n") == 1
    (tmp_path / "no.ttf").write_text("no font")
    assert main([*command, str(tmp_path / "no.ttf")]) == 2
    assert "cannot be used (unknown file format)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_font_of_letters_alone_has_no_classes(tmp_path: Path) -> None:
    import matplotlib

    letters = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    assert ImageFont.truetype(str(letters), 12)
    with pytest.raises(UserError, match="--classes 100, but the font has 0 coloured images"):
        choose_classes(EmojiFont.find(letters), 100)


@needs_font
def test_the_systems_font_has_hundreds_of_things() -> None:
    found = EmojiFont.find(None)
    assert found.image(0xE000) is None
    chosen = choose_classes(found, 400)
    assert len({concept.name for concept in chosen}) == 400
    sample = render_emoji_sample(chosen, found, 0, "train", 64, 3)
    assert Image.open(io.BytesIO(sample.image)).size == (64, 64)
