"""Transparent images are shown on a background of one's choice, the same in loader, converter and evaluation."""

import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from configs import UserError, fingerprint
from configs.data import WHITE, ImageData, ImageView, Views
from configs.run import LoaderSettings as LoaderSettings
from configs.run import System
from data import augment
from data.corpora.samples import load_image
from data.decode import DecodedImage, Decoder, blend_alpha
from data.held_out import HeldOutImages
from data.loader import ImageLoader
from data.pillow_decoder import blend_on_colour, image_fault
from tests.data.encoded_images import png, saved, with_png_chunk, with_tiff_number
from tests.data.tar_shards import drawn_image, write_tar
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

RGB = np.asarray(drawn_image(0))
ALPHA = np.asarray(drawn_image(1).convert("L"))[:, :, None]
GREY = np.asarray(drawn_image(0).convert("L"))[:, :, None]
RGBA = Image.fromarray(np.concatenate([RGB, ALPHA], axis=2))
LA = Image.fromarray(np.concatenate([GREY, ALPHA], axis=2))
PALETTE = drawn_image(0).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
OPAQUE = np.full_like(ALPHA, 255)
KEY = RGB[3, 3]
DEEP = np.concatenate([RGB, ALPHA], axis=2).astype(int) * 257


def blended(pixels: np.ndarray, alpha: np.ndarray, colour: tuple[int, int, int] = WHITE) -> np.ndarray:
    return (pixels.astype(float) * alpha + np.array(colour, float) * (255 - alpha)) / 255


def premultiplied_tiff() -> bytes:
    pixels = np.rint(RGB.astype(float) * ALPHA / 255).astype(np.uint8)
    data = saved(Image.fromarray(np.concatenate([pixels, ALPHA], axis=2)), "TIFF")
    return with_tiff_number(data, 338, 1)


def grey_png(bits: int, key: int) -> tuple[bytes, np.ndarray]:
    """All samples of a depth, one of which is transparent; what it shows on white."""
    samples = np.arange(64).reshape(8, 8, 1) % 2**bits
    shown = np.rint(samples * 255 / (2**bits - 1))
    data = with_png_chunk(png(samples, bits, 0), b"tRNS", struct.pack(">H", key))
    return data, np.where(samples == key, 255, shown).repeat(3, axis=2)


def palette_alpha() -> np.ndarray:
    return (np.asarray(PALETTE).astype(int) * 16)[:, :, None]


# Encoded, what it shows on white, and the largest difference allowed: rounding of a value, of a premultiplied one, or
# the loss of a lossy format.
TRANSPARENT: dict[str, tuple[bytes, np.ndarray, float]] = {
    "rgba png": (saved(RGBA, "PNG"), blended(RGB, ALPHA), 0.5),
    "la png": (saved(LA, "PNG"), blended(GREY.repeat(3, 2), ALPHA), 0.5),
    "16-bit rgba png": (png(DEEP, 16, 6), blended(RGB, ALPHA), 0.5),
    "16-bit la png": (png(DEEP[:, :, [0, 3]], 16, 4), blended(RGB[:, :, :1].repeat(3, 2), ALPHA), 0.5),
    "palette png": (
        saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
        blended(np.asarray(PALETTE.convert("RGB")), palette_alpha()),
        0.5,
    ),
    "palette png of one transparent colour": (
        saved(PALETTE, "PNG", transparency=3),
        blended(np.asarray(PALETTE.convert("RGB")), np.where(np.asarray(PALETTE)[:, :, None] == 3, 0, 255)),
        0,
    ),
    "rgb png of one transparent colour": (
        saved(drawn_image(0), "PNG", transparency=tuple(KEY.tolist())),
        blended(RGB, np.where((RGB == KEY).all(2, keepdims=True), 0, 255)),
        0,
    ),
    "16-bit rgb png of one transparent colour": (
        with_png_chunk(png(DEEP[:, :, :3], 16, 2), b"tRNS", struct.pack(">HHH", *(KEY.astype(int) * 257).tolist())),
        blended(RGB, np.where((RGB == KEY).all(2, keepdims=True), 0, 255)),
        0,
    ),
    **{f"{bits}-bit grey png of one transparent value": (*grey_png(bits, 0), 0) for bits in (1, 2, 4, 8)},
    "16-bit grey png of one transparent value": (*grey_png(16, 40), 0.5),
    "lossless webp": (saved(RGBA, "WEBP", lossless=True, exact=True), blended(RGB, ALPHA), 0.5),
    "lossy webp": (saved(RGBA, "WEBP", quality=95), blended(RGB, ALPHA), 30),
    "rgba tiff": (saved(RGBA, "TIFF"), blended(RGB, ALPHA), 0.5),
    "compressed rgba tiff": (saved(RGBA, "TIFF", compression="tiff_lzw"), blended(RGB, ALPHA), 0.5),
    "la tiff": (saved(LA, "TIFF"), blended(GREY.repeat(3, 2), ALPHA), 0.5),
    "premultiplied tiff": (premultiplied_tiff(), blended(RGB, ALPHA), 1.5),
    "gif": (
        saved(PALETTE, "GIF", transparency=3),
        blended(np.asarray(PALETTE.convert("RGB")), np.where(np.asarray(PALETTE)[:, :, None] == 3, 0, 255)),
        0,
    ),
    "avif": (saved(RGBA, "AVIF", quality=95), blended(RGB, ALPHA), 30),
}
# Images whose format has alpha, and every pixel is opaque: what a decoder gives that has never heard of alpha.
SOLID = Image.fromarray(np.concatenate([RGB, OPAQUE], axis=2))
NOISE = np.random.default_rng(0).integers(0, 65536, (24, 32, 3))
OPAQUE_IMAGES: dict[str, tuple[bytes, bytes]] = {
    "png": (saved(SOLID, "PNG"), saved(drawn_image(0), "PNG")),
    "16-bit png": (png(np.concatenate([NOISE, np.full((24, 32, 1), 65535)], axis=2), 16, 6), png(NOISE, 16, 2)),
    "palette png": (saved(PALETTE, "PNG", transparency=b"\xff" * 16), saved(PALETTE, "PNG")),
    "webp": (saved(SOLID, "WEBP", lossless=True), saved(drawn_image(0), "WEBP", lossless=True)),
    "tiff": (saved(SOLID, "TIFF"), saved(drawn_image(0), "TIFF")),
}


_BOTH: tuple[Literal["cpu", "gpu"], ...] = ("cpu", "gpu")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder("cpu", threads=2)


def decoded(decoder: Decoder, data: bytes) -> DecodedImage:
    assert image_fault(data, 10**6) is None
    [found] = decoder.decode([data])
    assert isinstance(found, DecodedImage), found
    return found


@pytest.mark.parametrize("name", TRANSPARENT)
def test_every_kind_of_transparency_is_shown_on_white(decoder: Decoder, name: str) -> None:
    data, expected, allowed = TRANSPARENT[name]
    shown = np.asarray(decoded(decoder, data).pixels).astype(float)
    assert np.abs(shown - expected).max() <= allowed


@pytest.mark.parametrize("name", OPAQUE_IMAGES)
def test_alpha_without_a_transparent_pixel_changes_no_bit(decoder: Decoder, name: str) -> None:
    with_alpha, without = (decoded(decoder, data) for data in OPAQUE_IMAGES[name])
    assert torch.equal(with_alpha.pixels, without.pixels)
    random = Decoder("cpu", threads=1, background="random")
    assert decoded(random, OPAQUE_IMAGES[name][0]).alpha_HW1 is None


def test_line_art_on_a_transparent_ground_is_black_on_white(decoder: Decoder) -> None:
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black under its transparency, as drawing programs write it
    drawing.paste((0, 0, 0, 255), (10, 10, 54, 14))
    shown = np.asarray(decoded(decoder, saved(drawing, "PNG")).pixels)
    assert (shown[10:14, 10:54] == 0).all()
    assert shown.sum() == 3 * 255 * (64 * 64 - 4 * 44)


def test_the_background_is_the_configured_colour(decoder: Decoder) -> None:
    green = Decoder("cpu", threads=1, background=(0, 200, 40))
    shown = np.asarray(decoded(green, TRANSPARENT["rgba png"][0]).pixels)
    assert np.abs(shown - blended(RGB, ALPHA, (0, 200, 40))).max() <= 0.5


def test_the_two_ways_of_blending_give_the_same_bits() -> None:
    values, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    pixels, alpha = np.repeat(values[:, :, None], 3, axis=2), alphas[:, :, None]
    image = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    for colour in (WHITE, (0, 1, 254), (127, 128, 129)):
        tensors = (torch.from_numpy(part.copy()) for part in (pixels, alpha, np.array(colour, np.uint8)))
        assert (blend_alpha(*tensors).numpy() == np.asarray(blend_on_colour(image, colour))).all()


# --- a random background


def crops(decoder: Decoder, names: list[str], keys: list[int], epochs: list[int], data: list[bytes]) -> torch.Tensor:
    found = decoder.decode(data)
    images = [item for item in found if isinstance(item, DecodedImage)]
    sides = [p.height for p in images], [p.width for p in images]
    config = Views(image_size=16, global_size=16, local_size=16, jitter=0, blur=(0, 0, 0), grey=0, solarise=0, flip=0)
    drawn = [augment.draw_view(name, config, 7, keys, epochs, *sides) for name in names]
    return decoder.render(images, augment.concatenate_views(drawn))


def test_a_random_background_depends_on_sample_epoch_and_view_alone() -> None:
    decoder = Decoder("cpu", threads=2, background="random")
    clear = saved(Image.new("RGBA", (40, 30), (9, 9, 9, 0)), "PNG")
    solid = saved(Image.new("RGB", (40, 30), (9, 9, 9)), "PNG")
    names = ["image", "global0", "local3"]
    shown = crops(decoder, names, [1, 2, 3], [0, 0, 0], [clear, solid, clear]).unflatten(0, (3, 3))
    colours = shown[:, [0, 2], :, 0, 0].flatten(0, 1)
    assert (shown == shown[..., :1, :1]).all()  # one colour all over a view
    assert (shown[:, 1] == 9).all()  # nothing shows through
    assert len({tuple(colour.tolist()) for colour in colours}) == 6
    alone = crops(decoder, ["local3"], [3], [0], [clear])
    assert torch.equal(alone[0], shown[2, 2])
    assert not torch.equal(crops(decoder, ["local3"], [3], [1], [clear])[0], alone[0])
    drawn = augment.draw_view("local3", Views(), 7, [3], [0], [30], [40]).background[0]
    assert alone[0, :, 0, 0].tolist() == drawn.tolist()
    many = augment.draw_view("image", Views(), 0, np.arange(4000), np.zeros(4000), [9] * 4000, [9] * 4000).background
    assert np.abs(many.mean(axis=0) - 127.5).max() < 5  # 4 standard errors of a mean of 4,000
    assert (many.min(), many.max()) == (0, 255)


def test_a_random_background_is_blended_into_the_window_of_each_view() -> None:
    random, white = Decoder("cpu", threads=1, background="random"), Decoder("cpu", threads=1)
    data = TRANSPARENT["rgba png"][0]
    [image] = [p for p in random.decode([data]) if isinstance(p, DecodedImage)]
    config = Views(image_size=16)
    numbers = augment.draw_view("image", config, 0, [5], [0], [24], [32])
    colour = tuple(numbers.background[0].tolist())
    [expected] = [p for p in Decoder("cpu", threads=1, background=colour).decode([data]) if isinstance(p, DecodedImage)]
    shown = random.render([image], numbers)
    assert torch.equal(shown, white.render([expected], numbers))
    # the way on a GPU; measured 0.02 apart, for the borders of the window; without the background 60
    windows = augment.round_windows(numbers.windows, [24], [32])
    by_dali = white.render_with_dali([expected.pixels], windows, numbers)
    assert (by_dali.float() - shown.float()).abs().mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_shows_transparent_images_as_the_cpu_does() -> None:
    data = [TRANSPARENT[name][0] for name in ("rgba png", "gif", "lossless webp")]
    shown = [crops(Decoder(device, 2, "random"), ["image", "global0"], [1, 2, 3], [0, 0, 0], data) for device in _BOTH]
    assert (shown[0].float() - shown[1].cpu().float()).abs().mean() < 3


# --- loader, converter and evaluation


def test_loader_converter_and_evaluation_decode_transparency_alike(tmp_path: Path) -> None:
    """As PNG, and as a TIFF, of which the converter makes a PNG."""
    members, converted = {}, {}
    for name, kind in (("a.png", "PNG"), ("b.tif", "TIFF"), ("c.webp", "WEBP")):
        square = RGBA.crop((0, 0, 16, 16))
        (tmp_path / name).write_bytes(saved(square, kind, **({"lossless": True} if kind == "WEBP" else {})))
        members[name] = (tmp_path / name).read_bytes()
        content, extension, _ = load_image(tmp_path / name, None)
        converted[f"{name[0]}.{extension}"] = content
    (tmp_path / "direct").mkdir()
    (tmp_path / "folder").mkdir()
    write_tar(tmp_path / "direct" / "0.tar", members)
    write_tar(tmp_path / "folder" / "0.tar", converted)
    assert set(converted) == {"a.png", "b.png", "c.webp"}
    green = (0, 200, 40)
    expected = np.rint(blended(RGB[:16, :16], ALPHA[:16, :16], green)).transpose(2, 0, 1)
    for folder in ("direct", "folder"):
        held_out = HeldOutImages([f"{tmp_path}/{folder}/*.tar"], 16, System(), 10**6, background=green)
        [batch] = held_out.batches(8)
        assert np.abs(batch.images.numpy() - expected).max() <= 1
        data = ImageData(train=(f"{tmp_path}/{folder}/*.tar",), streams=1, background=green)
        loader = ImageLoader(data, ImageView(image_size=16, image_scale=(1, 1)), 3, 0, LoaderSettings())
        assert np.abs(loader.batch(0).images.numpy() - expected).max() <= 1
        held_out.close()
        loader.close()


def test_a_smaller_copy_keeps_its_transparency(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(TRANSPARENT["palette png"][0])
    content, extension, size = load_image(tmp_path / "a.png", 16)
    image = Image.open(io.BytesIO(content))
    assert (extension, size, image.mode, image.size) == ("png", (16, 12), "RGBA", (16, 12))
    full = Image.fromarray(np.rint(TRANSPARENT["palette png"][1]).astype(np.uint8))
    expected = np.asarray(full.resize((16, 12), Image.Resampling.LANCZOS)).astype(int)
    # measured 2: values are rounded once more; with the colours under the transparency 100 and more
    assert np.abs(np.asarray(blend_on_colour(image, WHITE)).astype(int) - expected).max() <= 4


# --- the setting


def test_the_background_is_a_colour_or_random_and_else_an_error(tmp_path: Path) -> None:
    assert tiny_config().data.background == WHITE
    assert tiny_config("data.background=black").data.background == (0, 0, 0)
    assert tiny_config("data.background=[1,2,3]").data.fixed_background == (1, 2, 3)
    assert tiny_config("data.background=random").data.fixed_background == WHITE
    for wrong in ("[1,2,256]", "[1,2]", "[1,2,3.5]", "mauve", "7"):
        with pytest.raises(UserError, match=r"is not a background: it must be \[red, green, blue\]"):
            tiny_config(f"data.background={wrong}")


def test_the_background_is_science_and_white_keeps_earlier_fingerprints() -> None:
    assert fingerprint(tiny_config("data.background=white")) == fingerprint(tiny_config())
    assert fingerprint(tiny_config("data.background=random")) != fingerprint(tiny_config())
