"""List the samples of a tar shard: members grouped by key, unusable samples set aside with the reason.

    listing = scan_tar(Path("00000.tar"))
    listing.samples[0]       # (TarMember("jpg", 512, 12000, "0000.jpg"), TarMember("txt", 13312, 30, "0000.txt"))
    listing.set_aside        # (("000000001", "empty image"), ("../up", "unsafe member name"))

    split_names(["000.jpg", "000.seg.png", "000.caption.txt"])   # [("000", "jpg"), ("000", "seg.png"), ...]
    split_names(["IMG_2024.03.05.jpg", "IMG_2024.03.05.txt"])    # [("IMG_2024.03.05", "jpg"), ...]
    split_names(["photo.jpg", "photo.jpg.txt"])                  # [("photo", "jpg"), ("photo", "jpg.txt")]

webdataset ends every key at the first dot. Here it ends at the last dot of an image's name, and other members belong
to the longest such key that they begin with. An image whose name extends another's key is a further field of that
sample (`000.seg.png`). It is a sample of its own (`IMG_2024.03.05.jpg` beside `IMG_2024.jpg`) if it has all kinds of
files that the other has, and a .txt file or a digit after the dot.

Members of one key are one sample wherever they are in the tar (`tar cf` of a directory writes them in the order of the
file system). Samples are in the order of their first members. Samples set aside are counted one by one: one lost
image is one bad sample.

A tar may come from anywhere. Nothing is ever unpacked, so a member's name is only a name; names that would leave a
directory are refused all the same, for whoever unpacks the shard later, and so is whatever is no plain file. A hard
link stands for the file of the same tar that it links to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs import UserError
from data.image_headers import IMAGE_EXTS, UNSUPPORTED_TYPES, extension_of, unsupported_type
from data.tar_headers import BLOCK, MAX_NAME_BYTES, NotATar, TarEntry, TarHeaders, parse_header, read_tar_headers

_ALL_IMAGE_EXTS = frozenset([*IMAGE_EXTS, *(ext for exts in UNSUPPORTED_TYPES.values() for ext in exts)])
# Members of samples that are not images; other extensions may be images of a format that is not supported.
TEXT_EXTS = frozenset(["txt", "json", "cls", "caption", "csv", "xml", "url"])
_MAX_DOTS = 32  # from the end of a name, at which a key may end
_IMAGE_KIND = "image"  # the kind of the image itself
_CORRUPT, _TRUNCATED = "corrupt tar", "truncated tar"
_SHORT_NAME = 100  # characters that fit into a header block itself


@dataclass(frozen=True)
class TarMember:
    """One file of a sample: `size` bytes of the tar from byte `offset` on; `ext` is what follows the key in `name`.

    `stored_as`: for a hard link, the name of the member that holds the bytes.
    """

    ext: str
    offset: int
    size: int
    name: str
    stored_as: str = ""


@dataclass(frozen=True)
class TarListing:
    """The samples of a tar with a non-empty image, and the others as (key, reason)."""

    samples: tuple[tuple[TarMember, ...], ...]
    set_aside: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class _SampleGroup:
    """The members of one key, at most one of each extension. `reason`: why they are no usable sample."""

    key: str
    is_repeated: bool
    members: list[TarMember] = field(default_factory=list)
    reason: str = ""


def scan_tar(tar: Path) -> TarListing:
    """Group the members of a tar into samples, by its headers.

    Raises UserError where it is no uncompressed tar file.
    """
    headers = _read_headers(tar)
    groups = _group_by_key(list(_resolve_hard_links(headers.entries)))
    is_truncated = headers.is_cut_off or not tar.stat().st_size
    if is_truncated and groups and (last := groups[-1]):
        last.reason, is_truncated = _TRUNCATED, False
    kept = [group for group in dict.fromkeys(groups) if group]
    unreadable = [(f"{tar.stem}@{offset}", _CORRUPT, num_bytes) for offset, num_bytes in headers.damage.items()]
    if is_truncated or headers.num_zero_bytes:
        unreadable.append((tar.stem, _TRUNCATED, headers.num_zero_bytes))
    return _split_usable(kept, [sample for part in unreadable for sample in _estimate_lost(*part, kept)])


def _read_headers(tar: Path) -> TarHeaders:
    try:
        return read_tar_headers(tar)
    except NotATar as error:
        raise UserError(
            f"{tar} is not an uncompressed tar file ({error}): samples are read from the middle of a shard; "
            "unpack it, or write it again"
        ) from None


def _resolve_hard_links(entries: Iterable[TarEntry]) -> Iterator[TarEntry]:
    """Yield the entries; a hard link to an earlier file gets its offset and size, and its name as `link_target`."""
    files: dict[str, TarEntry] = {}
    for entry in entries:
        file = files.get(entry.link_target.removeprefix("./")) if entry.link_target else None
        found = entry if file is None else replace(file, name=entry.name, link_target=file.link_target or file.name)
        if found.is_file:
            files[found.name.removeprefix("./")] = found
        yield found


def _group_by_key(entries: Sequence[TarEntry]) -> list[_SampleGroup | None]:
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
        group.members.append(TarMember(ext, entry.offset, entry.size, entry.name, entry.link_target))
        group.reason = group.reason or _refusal(entry, name)
        groups.append(group)
    return groups


def _refusal(entry: TarEntry, name: str) -> str:
    """Return why a member makes its sample unusable; "" for a good one."""
    if entry.is_broken:
        return _CORRUPT
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "unsafe member name"
    if len(entry.name) > MAX_NAME_BYTES:
        return "overlong member name"
    if not entry.is_file:
        return "wrong member type"
    return "hidden member name" if is_hidden(name) else ""


def _split_usable(groups: Sequence[_SampleGroup], lost: Sequence[tuple[str, str]]) -> TarListing:
    samples: list[tuple[TarMember, ...]] = []
    set_aside: list[tuple[str, str]] = []
    for group in groups:
        reason = group.reason or ("duplicate key" if group.is_repeated else _fault_of_image(group.members))
        if reason:
            set_aside.append((group.key[:MAX_NAME_BYTES], reason))
        else:
            samples.append(tuple(group.members))
    return TarListing(tuple(samples), (*set_aside, *lost))


def _fault_of_image(members: Sequence[TarMember]) -> str:
    """Return why a sample has no usable image; "" where it has one."""
    if all(m.ext not in IMAGE_EXTS for m in members):
        if refused := next(filter(None, (unsupported_type(m.name) for m in members)), None):
            return refused
        is_text = all(extension_of(m.name) in TEXT_EXTS for m in members)
        return "missing image" if is_text else "unsupported image type"
    return "" if image_of(members).size else "empty image"


def _estimate_lost(key: str, reason: str, num_bytes: int, groups: Sequence[_SampleGroup]) -> Iterator[tuple[str, str]]:
    """Yield bad samples for unreadable bytes: as many as fit by the mean size of the others, at most their number."""
    used_bytes = sum(BLOCK - -m.size // BLOCK * BLOCK for group in groups for m in group.members)
    number = min(round(num_bytes * len(groups) / used_bytes), len(groups)) if used_bytes else 0
    return ((f"{key}+{i}" if i else key, reason) for i in range(max(1, number)))


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, extension in lower case) of every member; names have no leading `./`."""
    kinds = {
        _stem(name): {_IMAGE_KIND} for name in names if extension_of(name) in _ALL_IMAGE_EXTS and not is_hidden(name)
    }
    image_keys = [_longest_key(name, kinds) for name in names]
    for name, image_key in zip(names, image_keys, strict=True):
        if image_key is not None and (kind := _companion_kind(name, image_key)):
            kinds[image_key].add(kind)
    sample_keys = _sample_keys(kinds)
    lone_texts = {
        _stem(name)
        for name, key in zip(names, image_keys, strict=True)
        if key is None and extension_of(name) in TEXT_EXTS
    }
    split = []
    for name, image_key in zip(names, image_keys, strict=True):
        if image_key is not None:
            key = sample_keys[image_key]
        elif extension_of(name) in TEXT_EXTS:
            key = _stem(name)
        else:
            key = _longest_key(name, lone_texts) or _stem(name)
        split.append((key, name[len(key) + 1 :].lower()))
    return split


def _longest_key(name: str, keys: Collection[str]) -> str | None:
    """Return the longest of the keys that the name begins with and that end at a dot of its base name."""
    start, dot = name.rfind("/") + 2, len(name)
    for _ in range(_MAX_DOTS):
        dot = name.rfind(".", start, dot)
        if dot < 0:
            return None
        if name[:dot] in keys:
            return name[:dot]
    return None


def _companion_kind(name: str, image_key: str) -> str:
    """Return the extension of a file named after an image, `0.txt` or `0.jpg.txt`; "" for others and for images."""
    first, dot, rest = name[len(image_key) + 1 :].lower().partition(".")
    kind = first if not dot else rest if first in _ALL_IMAGE_EXTS else ""
    return "" if kind in _ALL_IMAGE_EXTS or "." in kind else kind


def _sample_keys(kinds: Mapping[str, set[str]]) -> dict[str, str]:
    """Map each image's key to the key of its sample: its own, or a shorter one."""
    sample_keys: dict[str, str] = {}
    for key in sorted(kinds, key=len):
        shorter = _longest_key(key, kinds)
        root = key if shorter is None else sample_keys[shorter]
        is_numbered = key[len(root) + 1 : len(root) + 2].isdigit()
        is_complete = kinds[root] <= kinds[key] and (is_numbered or "txt" in kinds[key])
        sample_keys[key] = key if is_complete else root
    return sample_keys


def _stem(name: str) -> str:
    """Return the name up to the last dot of its base name; all of it without one, not counting a leading dot."""
    dot = name.rfind(".", name.rfind("/") + 2)
    return name if dot < 0 else name[:dot]


def is_hidden(name: str) -> bool:
    """Whether the base name begins with a dot."""
    return name.startswith(".", name.rfind("/") + 1)


def is_ignored(name: str, present: Collection[str]) -> bool:
    """Whether a member belongs to no sample: a directory, `.DS_Store`, or macOS's `._X` beside a member X."""
    if not is_hidden(name):
        return not name or name.endswith("/")
    folder, base = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
    is_companion = base.startswith("._") and f"{folder.removeprefix('__MACOSX/')}{base[2:]}" in present
    return is_companion or extension_of(name) not in _ALL_IMAGE_EXTS | TEXT_EXTS


def find_extension(exts: Sequence[str], wanted: str) -> int | None:
    """Return the index of an extension: `txt`, or `jpg.txt` as in `photo.jpg.txt`; None without either."""
    if wanted in exts:
        return exts.index(wanted)
    return next(
        (exts.index(f"{ext}.{wanted}") for ext in exts if ext in IMAGE_EXTS and f"{ext}.{wanted}" in exts), None
    )


def key_of(sample: Sequence[TarMember]) -> str:
    """Return the key of a sample: the name of its image without the extension. `./a/000.jpg` -> `a/000`"""
    member = next((m for m in sample if m.ext in IMAGE_EXTS), sample[0])
    name = member.name.removeprefix("./")
    return name[: len(name) - len(member.ext) - 1] if member.ext else name


def image_of(sample: Iterable[TarMember]) -> TarMember:
    """Return the sample's image; of several the one whose extension comes first in IMAGE_EXTS.

    Raises ValueError without one.
    """
    return min((m for m in sample if m.ext in IMAGE_EXTS), key=lambda m: IMAGE_EXTS.index(m.ext))


def matches_header(block: bytes, member: TarMember) -> bool:
    """Whether the 512 bytes before a member's data are still its header in the tar."""
    header, name = parse_header(block), member.stored_as or member.name
    # Longer names, and others than ASCII, are in a header of their own; this one has them shortened.
    has_whole_name = name.isascii() and len(name) <= _SHORT_NAME
    return header is not None and header.size == member.size and (header.name == name or not has_whole_name)
