"""Split the member names of a tar into sample keys and extensions, also where names contain further dots.

    split_names(["000.jpg", "000.seg.png", "000.caption.txt"])   # [("000", "jpg"), ("000", "seg.png"), ...]
    split_names(["IMG_2024.03.05.jpg", "IMG_2024.03.05.txt"])    # [("IMG_2024.03.05", "jpg"), ...]
    split_names(["photo.jpg", "photo.jpg.txt"])                  # [("photo", "jpg"), ("photo", "jpg.txt")]

webdataset ends every key at the first dot. Here it ends at the last dot of a picture's name, and other members belong
to the longest such key that they begin with. A picture whose name extends another's key is a further field of that
sample (`000.seg.png`). It is a sample of its own (`IMG_2024.03.05.jpg` beside `IMG_2024.jpg`) if it has all kinds of
files that the other has, and a .txt file or a digit after the dot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from data.image_types import IMAGE_EXTS, UNSUPPORTED_TYPES, extension_of

_ALL_IMAGE_EXTS = frozenset([*IMAGE_EXTS, *(ext for exts in UNSUPPORTED_TYPES.values() for ext in exts)])
# Members of samples that are not images; other extensions may be images of a format that is not supported.
TEXT_EXTS = frozenset(["txt", "json", "cls", "caption", "csv", "xml", "url"])
_MOST_DOTS = 32  # from the end of a name, at which a key may end
_IMAGE_KIND = "image"  # the kind of the picture itself


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, extension in lower case) of every member; names have no leading `./`."""
    kinds = {
        _stem(name): {_IMAGE_KIND} for name in names if extension_of(name) in _ALL_IMAGE_EXTS and not is_hidden(name)
    }
    pictures = [_longest_key(name, kinds) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture is not None and (kind := _companion_kind(name, picture)):
            kinds[picture].add(kind)
    sample_keys = _sample_keys(kinds)
    lone_texts = {
        _stem(name)
        for name, key in zip(names, pictures, strict=True)
        if key is None and extension_of(name) in TEXT_EXTS
    }
    split = []
    for name, picture in zip(names, pictures, strict=True):
        if picture is not None:
            key = sample_keys[picture]
        elif extension_of(name) in TEXT_EXTS:
            key = _stem(name)
        else:
            key = _longest_key(name, lone_texts) or _stem(name)
        split.append((key, name[len(key) + 1 :].lower()))
    return split


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


def find_ext(exts: Sequence[str], wanted: str) -> int | None:
    """Return the index of an extension: `txt`, or `jpg.txt` as in `photo.jpg.txt`; None without either."""
    if wanted in exts:
        return exts.index(wanted)
    return next(
        (exts.index(f"{ext}.{wanted}") for ext in exts if ext in IMAGE_EXTS and f"{ext}.{wanted}" in exts), None
    )


def _stem(name: str) -> str:
    """Return the name up to the last dot of its base name; all of it without one, not counting a leading dot."""
    dot = name.rfind(".", name.rfind("/") + 2)
    return name if dot < 0 else name[:dot]


def _longest_key(name: str, keys: Collection[str]) -> str | None:
    """Return the longest of the keys that the name begins with and that end at a dot of its base name."""
    start, dot = name.rfind("/") + 2, len(name)
    for _ in range(_MOST_DOTS):
        dot = name.rfind(".", start, dot)
        if dot < 0:
            return None
        if name[:dot] in keys:
            return name[:dot]
    return None


def _companion_kind(name: str, picture: str) -> str:
    """Return the extension of a file named after a picture, `0.txt` or `0.jpg.txt`; "" for others and for pictures."""
    first, dot, rest = name[len(picture) + 1 :].lower().partition(".")
    kind = first if not dot else rest if first in _ALL_IMAGE_EXTS else ""
    return "" if kind in _ALL_IMAGE_EXTS or "." in kind else kind


def _sample_keys(kinds: Mapping[str, set[str]]) -> dict[str, str]:
    """Map each picture's key to the key of its sample: its own, or a shorter one."""
    sample_keys: dict[str, str] = {}
    for picture in sorted(kinds, key=len):
        shorter = _longest_key(picture, kinds)
        root = picture if shorter is None else sample_keys[shorter]
        is_numbered = picture[len(root) + 1 : len(root) + 2].isdigit()
        is_complete = kinds[root] <= kinds[picture] and (is_numbered or "txt" in kinds[picture])
        sample_keys[picture] = picture if is_complete else root
    return sample_keys
