"""A look at the bytes names what is wrong with a picture before it is decoded, and lets good ones pass."""

import struct

import pytest
from PIL import Image

from data.headers import refusal
from tests.data.tar_shards import encoded, huge_png

pytestmark = pytest.mark.L0

GOOD = {
    "jpeg": encoded(0),
    "progressive jpeg": encoded(0, progressive=True),
    "jpeg with bytes after its end": encoded(0) + b"\0" * 99,
    "png": encoded(0, "PNG"),
    "png with bytes after its end": encoded(0, "PNG") + b"made by me",
    "webp": encoded(0, "WEBP"),
    "bmp": encoded(0, "BMP"),
    "tiff": encoded(0, "TIFF"),
}
# a camera file: the thumbnail in its EXIF has an end marker of its own
THUMBNAIL = encoded(1, height=8, width=8)
CAMERA = encoded(0)[:2] + b"\xff\xe1" + struct.pack(">H", len(THUMBNAIL) + 2) + THUMBNAIL + encoded(0)[2:]

BAD = {
    "empty": (b"", "empty image"),
    "html": (b"<!DOCTYPE html><html></html>", "web page"),
    "html after white space": (b"\n\n  <html>", "web page"),
    "gif": (encoded(0, "GIF"), "gif image"),
    "avif": (b"\0\0\0\x1cftypavif", "heif, avif or video"),
    "noise": (bytes(range(256)), "not an image"),
    "half a jpeg": (encoded(0)[:-200], "truncated image"),
    "jpeg without end marker": (encoded(0)[:-2], "truncated image"),
    "half a camera file": (CAMERA[:-200], "truncated image"),
    "half a progressive jpeg": (encoded(0, progressive=True)[:-100], "truncated image"),
    "jpeg cut in its header": (encoded(0)[:100], "corrupt header"),
    "half a png": (encoded(0, "PNG")[:-200], "truncated image"),
    "half a webp": (encoded(0, "WEBP")[:-100], "corrupt header"),
    "half a bmp": (encoded(0, "BMP")[:-200], "truncated image"),
    "png cut in its header": (encoded(0, "PNG")[:20], "corrupt header"),
    "huge": (huge_png(), "too many pixels"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures_pass(name: str) -> None:
    assert refusal(GOOD[name], max_pixels=24 * 32) is None
    assert refusal(GOOD[name], max_pixels=24 * 32 - 1) == "too many pixels"


def test_a_camera_file_with_a_thumbnail_passes() -> None:
    assert refusal(CAMERA, 10**6) is None


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_with_their_reason(name: str) -> None:
    data, reason = BAD[name]
    assert refusal(data, max_pixels=50_000_000) == reason


def test_the_pixel_limit_is_ours_alone() -> None:
    assert refusal(huge_png(), max_pixels=60_000**2) is None
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own limit is neither used nor changed
