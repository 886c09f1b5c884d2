"""A tar shard -> its samples: members that belong together by name, and what is set aside and why.

    listing = scan(Path("00000.tar"))
    listing.samples[0]       # (Member("jpg", 512, 12000, "000000000.jpg"), Member("txt", 13312, 30, "000000000.txt"))
    listing.set_aside        # (("000000001", "empty image"), ("../up", "unsafe member name"))

A tar comes from anywhere. Nothing is ever unpacked, so a member's name is only a name; names that would leave a
directory are refused all the same, for whoever unpacks the shard later, and so is whatever is no plain file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs import UserError
from data.tars.headers import LONGEST_NAME, Entry, Headers, NotATar, parse, walk

IMAGE_EXTS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # in order of preference within a sample
# members of other kinds hint at a picture in a format we cannot read
_NOT_IMAGES = frozenset(["txt", "json", "cls", "caption", "csv", "xml", "url"])
_SHORT_NAME = 100  # characters that a header holds itself


@dataclass(frozen=True)
class Member:
    """One file of a sample: `size` bytes of the tar from byte `offset` on; `ext` is what follows the key in `name`."""

    ext: str
    offset: int
    size: int
    name: str


@dataclass(frozen=True)
class Listing:
    """The samples of a tar whose picture can be read at all, and the bad ones as (key, reason)."""

    samples: tuple[tuple[Member, ...], ...]
    set_aside: tuple[tuple[str, str], ...]


def key_of(name: str) -> str:
    """webdataset's key: the path up to the first dot of the base name. `./a/000.seg.png` -> `a/000`"""
    name = name.removeprefix("./")
    dot = name.find(".", name.rfind("/") + 1)
    return name if dot < 0 else name[:dot]


def image_of(sample: Iterable[Member]) -> Member:
    """The sample's picture; of several the one whose extension comes first in IMAGE_EXTS. ValueError without one."""
    return min((m for m in sample if m.ext in IMAGE_EXTS), key=lambda m: IMAGE_EXTS.index(m.ext))


def is_header_of(block: bytes, member: Member) -> bool:
    """Whether the 512 bytes before a member's data are still its header in the tar."""
    header = parse(block)
    # Longer names, and others than ASCII, stand in a header of their own; this one has them shortened.
    has_whole_name = member.name.isascii() and len(member.name) <= _SHORT_NAME
    return header is not None and header.size == member.size and (header.name == member.name or not has_whole_name)


def scan(tar: Path) -> Listing:
    """Walks the headers of a tar (not its data). Raises UserError when it is no uncompressed tar file."""
    headers = _walked(tar)
    refused = headers.damage
    if headers.is_cut_off or not tar.stat().st_size:
        refused[key_of(headers.entries[-1].name) if headers.entries else tar.stem] = "truncated tar"
    groups: list[list[Member]] = []
    for entry in headers.entries:
        key = key_of(entry.name)
        ext = entry.name[entry.name.rfind("/") + 1 :].partition(".")[2].lower()
        if not key or key.endswith("/") or (entry.is_folder and ext not in IMAGE_EXTS):
            continue  # hidden files and plain directories are no samples
        if reason := _refusal(entry):
            refused.setdefault(key[:LONGEST_NAME], reason)
            continue
        if not groups or key != key_of(groups[-1][0].name) or ext in {m.ext for m in groups[-1]}:
            groups.append([])
        groups[-1].append(Member(ext, entry.offset, entry.size, entry.name))
    return _sort_out(groups, refused)


def _walked(tar: Path) -> Headers:
    try:
        return walk(tar)
    except NotATar as error:
        raise UserError(
            f"{tar} is not an uncompressed tar file ({error}): samples are read from the middle of a shard; "
            "unpack it, or write it again"
        ) from None


def _refusal(entry: Entry) -> str | None:
    if entry.name.startswith("/") or ".." in entry.name.split("/") or "\0" in entry.name:
        return "unsafe member name"
    if len(entry.name) > LONGEST_NAME:
        return "overlong member name"
    return None if entry.is_file else "wrong member type"


def _sort_out(groups: list[list[Member]], refused: dict[str, str]) -> Listing:
    samples: list[tuple[Member, ...]] = []
    aside: list[tuple[str, str]] = []
    seen: set[str] = set()
    for group in groups:
        key = key_of(group[0].name)
        if key in refused:
            continue
        if reason := "duplicate key" if key in seen else _picture_fault(group):
            aside.append((key, reason))
        else:
            samples.append(tuple(group))
        seen.add(key)
    return Listing(tuple(samples), (*aside, *refused.items()))


def _picture_fault(group: list[Member]) -> str | None:
    exts = {m.ext for m in group}
    if exts.isdisjoint(IMAGE_EXTS):
        return "missing image" if exts <= _NOT_IMAGES else "unsupported image type"
    return None if image_of(group).size else "empty image"
