"""A look at the bytes names what is wrong with a picture before it is decoded, and lets good ones pass."""

import struct

import pytest
from PIL import Image

from data.claimed_sizes import claimed_pixels
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


def two_frames(huge_first: bool) -> bytes:
    """A JPEG with a second frame header, of 60,000 x 60,000 pixels: libraries believe the first, or the last."""
    data = encoded(0)
    start = data.find(b"\xff\xc0")
    frame = data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
    huge = frame[:5] + struct.pack(">HH", 60_000, 60_000) + frame[9:]
    both = huge + frame if huge_first else frame + huge
    return data[:start] + both + data[start + len(frame) :]


def two_widths(huge_first: bool, tags: tuple[int, int] = (256, 257)) -> bytes:
    """A TIFF whose directory has a second width and height."""
    data = encoded(0, "TIFF")
    [start] = struct.unpack("<I", data[4:8])
    [count] = struct.unpack("<H", data[start : start + 2])
    entries = data[start + 2 : start + 2 + 12 * count]
    huge = b"".join(struct.pack("<HHII", tag, 4, 1, 60_000) for tag in tags)
    directory = struct.pack("<H", count + 2) + (huge + entries if huge_first else entries + huge) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


def many_scans(count: int) -> bytes:
    """A progressive JPEG that refines its last coefficients again and again: seconds to decode for a few kB."""
    data = encoded(0, progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + b"\xff\xd9"


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
    "a jpeg of two frames, the first one huge": (two_frames(huge_first=True), "too many pixels"),
    "a jpeg of two frames, the second one huge": (two_frames(huge_first=False), "too many pixels"),
    "a png of two headers, the first one huge": (huge_png()[:33] + encoded(0, "PNG")[8:], "too many pixels"),
    "a png of two headers, the second one huge": (
        encoded(0, "PNG")[:33] + huge_png()[8:33] + encoded(0, "PNG")[33:],
        "too many pixels",
    ),
    "a tiff of two widths, the first one huge": (two_widths(huge_first=True), "too many pixels"),
    "a tiff of two widths, the second one huge": (two_widths(huge_first=False), "too many pixels"),
    "a tiff of one huge tile": (two_widths(huge_first=False, tags=(322, 323)), "too many pixels"),
    "a jpeg of a thousand scans": (many_scans(1000), "too many scans"),
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


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_what_a_picture_claims_is_its_size_where_it_is_honest(kind: str) -> None:
    data = GOOD[kind]
    assert claimed_pixels(kind, data) == 24 * 32
    for end in range(len(data)):
        assert claimed_pixels(kind, data[:end]) in (0, 24 * 32)  # cut anywhere
