"""A look at the bytes names what is wrong with an image before it is decoded, and lets good ones pass."""

import struct
import zlib

import pytest
from PIL import AvifImagePlugin, Image

from data.image_headers import (
    IMAGE_EXTS,
    SUPPORTED_TYPES,
    UNSUPPORTED_TYPES,
    is_image_name,
    max_claimed_pixels,
    unsupported_type,
)
from data.pillow_decoder import image_fault
from tests.data.encoded_images import app_segment, exif, png_chunk, riff, saved, vp8x, webp_chunk, with_png_chunk
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
    "tiff of 64-bit offsets": encoded(0, "TIFF", big_tiff=True),
    "gif": encoded(0, "GIF"),
    "avif": encoded(0, "AVIF"),
    # A motion photo: a film behind the end marker, in which 0xFFDA and 0xFFD9 stand by chance.
    "jpeg with a film": encoded(0) + b"\0\0\0\x18ftypmp42" + b"\xff\xd9" + bytes(range(256)) + b"\xff\xda..." * 300,
    "jpeg with scans' markers in its profile": encoded(0)[:2]
    + app_segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xda\xff\xd9" * 9000) * 3
    + encoded(0)[2:],
    "jpeg with scans' markers in both": encoded(0)[:2]
    + app_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xda" * 9000)
    + encoded(0)[2:]
    + b"\xff\xda" * 99,
    "jpeg with filling before its markers": encoded(0)[:2] + b"\xff" * 9 + encoded(0)[2:-2] + b"\xff\xff\xff\xd9!",
    "png with a long tail": encoded(0, "PNG") + bytes(1 << 18),
    "png with more text than Pillow takes": with_png_chunk(
        encoded(0, "PNG"), b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 << 20))
    ),
    "png with damaged text": with_png_chunk(encoded(0, "PNG"), b"tEXt", b"a\0b").replace(b"a\0b", b"a\0c"),
    "webp with bytes after its end": encoded(0, "WEBP") + bytes(99),
    "webp with EXIF of odd length, not filled up": riff(
        vp8x(0x08, 32, 24), encoded(0, "WEBP")[12:], webp_chunk(b"EXIF", exif(1) + b"\0")[:-1]
    ),
    "webp cut in its EXIF": riff(vp8x(0x08, 32, 24), encoded(0, "WEBP")[12:], webp_chunk(b"EXIF", exif(1)))[:-9],
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


def two_widths_of_64_bits() -> bytes:
    data = encoded(0, "TIFF", big_tiff=True)
    [start] = struct.unpack("<Q", data[8:16])
    [count] = struct.unpack("<Q", data[start : start + 8])
    entries = data[start + 8 : start + 8 + 20 * count]
    huge = b"".join(struct.pack("<HHQQ", tag, 16, 1, 60_000) for tag in (256, 257))
    return (
        data[:8] + struct.pack("<Q", len(data)) + data[16:] + struct.pack("<Q", count + 2) + entries + huge + bytes(8)
    )


def many_scans(count: int) -> bytes:
    """A progressive JPEG that refines its last coefficients again and again: seconds to decode for a few kB."""
    data = encoded(0, progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + b"\xff\xd9"


BAD = {
    "empty": (b"", "empty image"),
    "html": (b"<!DOCTYPE html><html></html>", "web page"),
    "html after white space": (b"\n\n  <html>", "web page"),
    "half a gif header": (encoded(0, "GIF")[:12], "corrupt header"),
    "avif without an image": (b"\0\0\0\x1cftypavif", "corrupt header"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic image"),
    "heic by its second brand": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "heic image"),
    "a film": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "video"),
    "jpeg 2000": (encoded(0, "JPEG2000"), "jpeg 2000 image"),
    "jpeg xl": (b"\xff\x0a\xfa\x7f", "jpeg xl image"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "svg image"),
    "a page with an svg": (b"<!DOCTYPE html><html><body><svg/></body></html>", "web page"),
    "floating-point tiff": (saved(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels"),
    "signed tiff": (saved(Image.new("I", (4, 4)), "TIFF"), "signed pixels"),
    "png with a damaged header": (encoded(0, "PNG").replace(b"\x08\x02\0\0\0", b"\x08\x06\0\0\0", 1), "corrupt header"),
    "png cut in its text": (
        with_png_chunk(encoded(0, "PNG"), b"tEXt", bytes(999))[: encoded(0, "PNG").find(b"IDAT") + 99],
        "truncated image",
    ),
    "jpeg cut before its film": (encoded(0)[:-9] + bytes(999), "truncated image"),
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
    "a jpeg of a thousand scans before a film": (many_scans(1000) + b"\xff\xda" * 9, "too many scans"),
    "a tiff of 64-bit offsets, its second width huge": (two_widths_of_64_bits(), "too many pixels"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_pass(name: str) -> None:
    assert image_fault(GOOD[name], max_pixels=24 * 32) is None
    assert image_fault(GOOD[name], max_pixels=24 * 32 - 1) == "too many pixels"


def test_a_camera_file_with_a_thumbnail_passes() -> None:
    assert image_fault(CAMERA, 10**6) is None


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_their_reason(name: str) -> None:
    data, reason = BAD[name]
    assert image_fault(data, max_pixels=50_000_000) == reason


def test_the_pixel_limit_is_ours_alone() -> None:
    assert image_fault(huge_png(), max_pixels=60_000**2) is None
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own limit is neither used nor changed


def test_avif_is_refused_by_its_name_where_pillow_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    assert image_fault(GOOD["avif"], 10**6) == "avif image"


def test_an_image_of_too_many_segments_or_chunks_is_refused() -> None:
    assert image_fault(encoded(0)[:-2] + b"\xff\x01" * 20_000, 10**6) == "truncated image"
    assert image_fault(encoded(0, "PNG")[:33] + png_chunk(b"tEXt", b"") * 140_000 + b"more", 10**6) == "truncated image"


def test_supported_and_unsupported_image_types_have_disjoint_extensions() -> None:
    assert [is_image_name(name) for name in ("a/b.JPG", "b.jfif", "c.d.avif", "e.gif", "f.heic", "jpg", "g.txt")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert unsupported_type("a/IMG_2024.03.HEIC") == "heic image"
    assert unsupported_type("a.jpg") is unsupported_type("a.txt") is None
    refused = [ext for exts in UNSUPPORTED_TYPES.values() for ext in exts]
    assert not set(refused) & set(IMAGE_EXTS)
    assert IMAGE_EXTS[:7] == ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # the order in which one is preferred
    assert len({*refused, *IMAGE_EXTS}) == len(refused) + len(IMAGE_EXTS)
    assert set(SUPPORTED_TYPES) == {"jpeg", "png", "webp", "bmp", "tiff", "avif", "gif"}


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_what_an_image_claims_is_its_size_where_it_is_honest(kind: str) -> None:
    data = GOOD[kind]
    assert max_claimed_pixels(kind, data) == 24 * 32
    for end in range(len(data)):
        assert max_claimed_pixels(kind, data[:end]) in (0, 24 * 32)  # cut anywhere
