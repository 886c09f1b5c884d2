"""A tar shard -> its samples: members that belong together by name, and what is set aside and why.

    listing = scan(Path("00000.tar"))
    listing.samples[0]       # (Member("jpg", 512, 12000, "000000000.jpg"), Member("txt", 13312, 30, "000000000.txt"))
    listing.set_aside        # (("000000001", "empty image"), ("../up", "unsafe member name"))

Members of one key are one sample wherever they are in the tar (`tar cf` of a directory writes them in the order of the
file system). Samples are in the order of their first members. Samples set aside are counted one by one: one lost
picture is one bad sample.

A tar comes from anywhere. Nothing is ever unpacked, so a member's name is only a name; names that would leave a
directory are refused all the same, for whoever unpacks the shard later, and so is whatever is no plain file. A hard
link is the file of the same tar that it links to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs import UserError
from data.image_types import IMAGE_EXTS, extension_of, unsupported_type
from data.tars.headers import BLOCK, LONGEST_NAME, Entry, Headers, NotATar, parse, walk
from data.tars.names import TEXT_EXTS, is_hidden, is_ignored, split_names

_CORRUPT, _TRUNCATED = "corrupt tar", "truncated tar"
_SHORT_NAME = 100  # characters that a header holds itself


@dataclass(frozen=True)
class Member:
    """One file of a sample: `size` bytes of the tar from byte `offset` on; `ext` is what follows the key in `name`.

    `stored_as`: for a hard link, the name of the member that holds the bytes.
    """

    ext: str
    offset: int
    size: int
    name: str
    stored_as: str = ""


@dataclass(frozen=True)
class Listing:
    """The samples of a tar whose picture can be read at all, and the bad ones as (key, reason)."""

    samples: tuple[tuple[Member, ...], ...]
    set_aside: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class _SampleGroup:
    """The members of one key, at most one of each extension. `reason`: why they are not a usable sample."""

    key: str
    is_repeated: bool
    members: list[Member] = field(default_factory=list)
    reason: str = ""


def key_of(sample: Sequence[Member]) -> str:
    """Return the key of a sample: the name of its picture without the extension. `./a/000.jpg` -> `a/000`"""
    member = next((m for m in sample if m.ext in IMAGE_EXTS), sample[0])
    name = member.name.removeprefix("./")
    return name[: len(name) - len(member.ext) - 1] if member.ext else name


def image_of(sample: Iterable[Member]) -> Member:
    """The sample's picture; of several the one whose extension comes first in IMAGE_EXTS. ValueError without one."""
    return min((m for m in sample if m.ext in IMAGE_EXTS), key=lambda m: IMAGE_EXTS.index(m.ext))


def is_header_of(block: bytes, member: Member) -> bool:
    """Whether the 512 bytes before a member's data are still its header in the tar."""
    header, name = parse(block), member.stored_as or member.name
    # Longer names, and others than ASCII, stand in a header of their own; this one has them shortened.
    has_whole_name = name.isascii() and len(name) <= _SHORT_NAME
    return header is not None and header.size == member.size and (header.name == name or not has_whole_name)


def scan(tar: Path) -> Listing:
    """Walks the headers of a tar (not its data). Raises UserError when it is no uncompressed tar file."""
    headers = _walked(tar)
    groups = _group_by_key(list(_resolve_hard_links(headers.entries)))
    is_truncated = headers.is_cut_off or not tar.stat().st_size
    if is_truncated and groups and (last := groups[-1]):
        last.reason, is_truncated = _TRUNCATED, False
    kept = [group for group in dict.fromkeys(groups) if group]
    lost = [(f"{tar.stem}@{offset}", _CORRUPT, num_bytes) for offset, num_bytes in headers.damage.items()]
    if is_truncated or headers.num_zero_bytes:
        lost.append((tar.stem, _TRUNCATED, headers.num_zero_bytes))
    return _sort_out(
        kept, [found for key, reason, num_bytes in lost for found in _estimate_lost(key, reason, num_bytes, kept)]
    )


def _walked(tar: Path) -> Headers:
    try:
        return walk(tar)
    except NotATar as error:
        raise UserError(
            f"{tar} is not an uncompressed tar file ({error}): samples are read from the middle of a shard; "
            "unpack it, or write it again"
        ) from None


def _resolve_hard_links(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries; a hard link to an earlier file gets its offset and size, and its name as `link_target`."""
    files: dict[str, Entry] = {}
    for entry in entries:
        file = files.get(entry.link_target.removeprefix("./")) if entry.link_target else None
        found = entry if file is None else replace(file, name=entry.name, link_target=file.link_target or file.name)
        if found.is_file:
            files[found.name.removeprefix("./")] = found
        yield found


def _group_by_key(entries: Sequence[Entry]) -> list[_SampleGroup | None]:
    """Return the group of each entry. The second member of one key and extension is in the second group of its key."""
    names = [entry.name.removeprefix("./") for entry in entries]
    by_key: dict[str, list[_SampleGroup]] = {}
    times: Counter[tuple[str, str]] = Counter()
    present = frozenset(names)
    groups: list[_SampleGroup | None] = []
    for entry, name, (key, ext) in zip(entries, names, split_names(names), strict=True):
        if (entry.is_folder and extension_of(name) not in IMAGE_EXTS) or is_ignored(name, present):
            groups.append(None)
            continue
        of_key = by_key.setdefault(key, [])
        if times[key, ext] == len(of_key):
            of_key.append(_SampleGroup(key, is_repeated=bool(of_key)))
        group = of_key[times[key, ext]]
        times[key, ext] += 1
        group.members.append(Member(ext, entry.offset, entry.size, entry.name, entry.link_target))
        group.reason = group.reason or _refusal(entry, name)
        groups.append(group)
    return groups


def _refusal(entry: Entry, name: str) -> str:
    """Return why a member makes its sample unusable; "" for a good one."""
    if entry.is_broken:
        return _CORRUPT
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "unsafe member name"
    if len(entry.name) > LONGEST_NAME:
        return "overlong member name"
    if not entry.is_file:
        return "wrong member type"
    return "hidden member name" if is_hidden(name) else ""


def _sort_out(groups: Sequence[_SampleGroup], damage: Sequence[tuple[str, str]]) -> Listing:
    samples: list[tuple[Member, ...]] = []
    aside: list[tuple[str, str]] = []
    for group in groups:
        reason = group.reason or ("duplicate key" if group.is_repeated else _picture_fault(group.members))
        if reason:
            aside.append((group.key[:LONGEST_NAME], reason))
        else:
            samples.append(tuple(group.members))
    return Listing(tuple(samples), (*aside, *damage))


def _estimate_lost(key: str, reason: str, num_bytes: int, groups: Sequence[_SampleGroup]) -> Iterator[tuple[str, str]]:
    """Yield bad samples for unreadable bytes: as many as fit by the mean size of the others, at most their number."""
    held = sum(BLOCK - -m.size // BLOCK * BLOCK for group in groups for m in group.members)
    number = min(round(num_bytes * len(groups) / held), len(groups)) if held else 0
    return ((f"{key}+{i}" if i else key, reason) for i in range(max(1, number)))


def _picture_fault(members: Sequence[Member]) -> str:
    if all(m.ext not in IMAGE_EXTS for m in members):
        if refused := next(filter(None, (unsupported_type(m.name) for m in members)), None):
            return refused
        is_text = all(extension_of(m.name) in TEXT_EXTS for m in members)
        return "missing image" if is_text else "unsupported image type"
    return "" if image_of(members).size else "empty image"
