"""A tar shard -> its sidecar index: where each sample's bytes lie, and what was set aside and why.

The format is DALI's `wds2idx` v1.2, so one file serves this loader and DALI's own webdataset reader. With one
sample of a 12 kB picture and a 30-byte caption:

    v1.2 1
    jpg 512 12000 000000000.jpg txt 13312 30 000000000.txt
    # {"tar_bytes": 20480, "set_aside": [["000000001", "empty image"]], "usable": {"txt": ...}}

DALI reads as many lines as the first one says; the last line is ours. It makes a stale index visible
(tar_bytes) and gives the counts of a shard from the file's end, so that opening thousands of shards does not
parse them.

White space and % in names are written as %20 and so on, because DALI separates fields by spaces.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from configs import UserError

IMAGE_EXTS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # in order of preference within a sample
# members of other kinds hint at a picture in a format we cannot read
_NOT_IMAGES = frozenset(["txt", "json", "cls", "caption", "csv", "xml", "url"])
_VERSION = "v1.2"
_TAIL_BYTES = 1 << 14


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


@dataclass(frozen=True)
class Usable:
    """A shard for one way of captioning: kept samples as sidecar lines, bad ones as (key, reason)."""

    lines: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


def key_of(name: str) -> str:
    """webdataset's key: the path up to the first dot of the base name. `./a/000.seg.png` -> `a/000`"""
    name = name.removeprefix("./")
    dot = name.find(".", name.rfind("/") + 1)
    return name if dot < 0 else name[:dot]


def image_of(sample: Iterable[Member]) -> Member:
    """The sample's picture; of several the one whose extension comes first in IMAGE_EXTS. ValueError without one."""
    return min((m for m in sample if m.ext in IMAGE_EXTS), key=lambda m: IMAGE_EXTS.index(m.ext))


def parse(line: str) -> tuple[Member, ...]:
    """The members of a sample from its sidecar line."""
    fields = zip(*[iter(line.split(" "))] * 4, strict=True)
    return tuple(Member(_unquote(ext), int(offset), int(size), _unquote(name)) for ext, offset, size, name in fields)


def scan(tar: Path) -> Listing:
    """Walks the headers of a tar (not its data). Raises UserError when it is no uncompressed tar file."""
    infos, cut_key = _walk(tar)
    refused = {} if cut_key is None else {cut_key: "truncated tar"}
    groups: list[list[Member]] = []
    for info in infos:
        key = key_of(info.name)
        ext = info.name[info.name.rfind("/") + 1 :].partition(".")[2].lower()
        if not key or key.endswith("/") or (info.isdir() and ext not in IMAGE_EXTS):
            continue  # hidden files and plain directories are no samples
        if reason := _refusal(info):
            refused.setdefault(key, reason)
            continue
        if not groups or key != key_of(groups[-1][0].name) or ext in {m.ext for m in groups[-1]}:
            groups.append([])
        groups[-1].append(Member(ext, info.offset_data, info.size, info.name))
    return _sort_out(groups, refused)


def write(listing: Listing, tar_bytes: int, target: Path) -> None:
    """Writes the sidecar under a temporary name and renames it: several ranks may index one shard at once."""
    lines = [
        " ".join(f"{_quote(m.ext)} {m.offset} {m.size} {_quote(m.name)}" for m in sample) for sample in listing.samples
    ]
    counts = {ext: _usable(lines, listing.set_aside, ext or None) for ext in ["", *_caption_exts(listing)]}
    trailer = {
        "tar_bytes": tar_bytes,
        "set_aside": listing.set_aside,
        "usable": {ext: [len(u.lines), Counter(reason for _, reason in u.bad)] for ext, u in counts.items()},
    }
    text = "\n".join([f"{_VERSION} {len(lines)}", *lines, f"# {json.dumps(trailer)}", ""])
    partial = target.with_name(f"{target.name}.{os.getpid()}.{time.monotonic_ns()}.part")
    try:
        partial.write_text(text, errors="surrogateescape")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read(sidecar: Path, caption_ext: str | None) -> Usable:
    """A sidecar that `read_trailer` accepts; `caption_ext` None: no caption is needed."""
    first, *lines = sidecar.read_text(errors="surrogateescape").split("\n")
    num_samples = int(first.split()[1])
    trailer = json.loads(lines[num_samples].removeprefix("# "))
    return _usable(lines[:num_samples], trailer["set_aside"], caption_ext)


def read_trailer(sidecar: Path, tar: Path | None, tar_bytes: int | None = None) -> dict[str, Any] | None:
    """Our last line of a sidecar; None when there is no such file, it is foreign, or older than its tar."""
    try:
        with sidecar.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            if b"\n# " not in tail:  # a long list of bad samples
                file.seek(0)
                tail = file.read()
    except FileNotFoundError:
        return None
    _, mark, line = tail.rpartition(b"\n# ")
    if not mark or not line.endswith(b"}\n"):
        return None
    trailer: dict[str, Any] = json.loads(line)
    if tar is not None:
        status = tar.stat()
        if status.st_mtime_ns > sidecar.stat().st_mtime_ns:
            return None
        tar_bytes = status.st_size
    return trailer if tar_bytes in (None, trailer["tar_bytes"]) else None


def _walk(tar: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """The members that are wholly there, and the key at which the tar breaks off (None: it is complete)."""
    tar_bytes = tar.stat().st_size
    if tar_bytes == 0:
        return [], tar.stem
    try:
        archive = tarfile.open(tar, "r:")  # noqa: SIM115 - only opening it says whether it is a tar
    except tarfile.ReadError as error:
        raise UserError(
            f"{tar} is not an uncompressed tar file ({error}): samples are read from the middle of a shard; "
            "unpack it, or write it again"
        ) from None
    infos: list[tarfile.TarInfo] = []
    with archive:
        try:
            infos.extend(archive)  # what came before the break stays in the list
        except tarfile.ReadError:
            return infos, key_of(infos[-1].name)
    return infos, key_of(infos[-1].name) if tar_bytes % tarfile.BLOCKSIZE and infos else None


def _refusal(info: tarfile.TarInfo) -> str | None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "unsafe member name"
    return None if info.isreg() and not info.issparse() else "wrong member type"


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


def _usable(lines: Sequence[str], set_aside: Iterable[tuple[str, str]], caption_ext: str | None) -> Usable:
    bad = [(key, reason) for key, reason in set_aside]
    if caption_ext is None:
        return Usable(tuple(lines), tuple(bad))
    kept = []
    wanted = _quote(caption_ext)
    for line in lines:
        fields = line.split(" ")
        sizes = [size for ext, size in zip(fields[::4], fields[2::4], strict=True) if ext == wanted]
        if sizes and sizes[0] != "0":
            kept.append(line)
        else:
            bad.append((key_of(_unquote(fields[3])), "empty caption" if sizes else "missing caption"))
    return Usable(tuple(kept), tuple(bad))


def _caption_exts(listing: Listing) -> list[str]:
    """The extensions a caption could have here. An uncommon one is counted when it is asked for."""
    found = Counter(m.ext for sample in listing.samples[:64] for m in sample if m.ext not in IMAGE_EXTS)
    return [ext for ext, _ in found.most_common(8)]


def _quote(text: str) -> str:
    return re.sub(r"[\s%]", lambda match: quote(match[0]), text)


def _unquote(text: str) -> str:
    return unquote(text, errors="surrogateescape") if "%" in text else text
