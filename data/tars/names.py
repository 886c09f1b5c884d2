"""The names in a tar -> keys and extensions: which members are one sample, also where names hold further dots.

    split_names(["000.jpg", "000.seg.png", "000.caption.txt"])   # [("000", "jpg"), ("000", "seg.png"), ...]
    split_names(["IMG_2024.03.05.jpg", "IMG_2024.03.05.txt"])    # [("IMG_2024.03.05", "jpg"), ...]
    split_names(["photo.jpg", "photo.jpg.txt"])                  # [("photo", "jpg"), ("photo", "jpg.txt")]

webdataset ends every key at the first dot. Here it ends at the last dot of a picture's name, and other members belong
to the longest such key that they begin with. A picture that goes on after another one's key is a further field of that
sample (`000.seg.png`), unless it has all that the other has, and a .txt or a digit after the dot: then it is a sample
of its own (`IMG_2024.03.05.jpg` beside `IMG_2024.jpg`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from data.picture_types import IMAGE_EXTS, REFUSED_TYPES, extension_of

_PICTURES = frozenset([*IMAGE_EXTS, *(ext for exts in REFUSED_TYPES.values() for ext in exts)])
# Members of other kinds hint at a picture in a format we cannot read.
NOT_IMAGES = frozenset(["txt", "json", "cls", "caption", "csv", "xml", "url"])
_MOST_DOTS = 32  # from the end of a name: where a key may end
_IMAGE = "image"  # what a key has by being a picture's


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """(key, extension in lower case) of every member, of names without a leading `./`."""
    kinds = {_stem(name): {_IMAGE} for name in names if extension_of(name) in _PICTURES and not is_hidden(name)}
    pictures = [_longest_key(name, kinds) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture is not None and (kind := _kind_beside(name, picture)):
            kinds[picture].add(kind)
    roots = _roots(kinds)
    lone_texts = {
        _stem(name)
        for name, key in zip(names, pictures, strict=True)
        if key is None and extension_of(name) in NOT_IMAGES
    }
    split = []
    for name, picture in zip(names, pictures, strict=True):
        if picture is not None:
            key = roots[picture]
        elif extension_of(name) in NOT_IMAGES:
            key = _stem(name)
        else:
            key = _longest_key(name, lone_texts) or _stem(name)
        split.append((key, name[len(key) + 1 :].lower()))
    return split


def is_hidden(name: str) -> bool:
    """Whether the base name begins with a dot."""
    return name.startswith(".", name.rfind("/") + 1)


def is_ignored(name: str, present: Collection[str]) -> bool:
    """Whether a member is no sample's, and none is lost: a directory, `.DS_Store`, macOS's `._X` beside a member X."""
    if not is_hidden(name):
        return not name or name.endswith("/")
    folder, base = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
    is_companion = base.startswith("._") and f"{folder.removeprefix('__MACOSX/')}{base[2:]}" in present
    return is_companion or extension_of(name) not in _PICTURES | NOT_IMAGES


def named_by(exts: Sequence[str], wanted: str) -> int | None:
    """Which of a sample's extensions is the wanted one: `txt`, else a picture's and it, as in `photo.jpg.txt`."""
    if wanted in exts:
        return exts.index(wanted)
    return next(
        (exts.index(f"{ext}.{wanted}") for ext in exts if ext in IMAGE_EXTS and f"{ext}.{wanted}" in exts), None
    )


def _stem(name: str) -> str:
    """The name up to the last dot; all of it where nothing of the base name would be left."""
    dot = name.rfind(".", name.rfind("/") + 2)
    return name if dot < 0 else name[:dot]


def _longest_key(name: str, keys: Collection[str]) -> str | None:
    """The longest of the keys that end at a dot of the base name."""
    start, dot = name.rfind("/") + 2, len(name)
    for _ in range(_MOST_DOTS):
        dot = name.rfind(".", start, dot)
        if dot < 0:
            return None
        if name[:dot] in keys:
            return name[:dot]
    return None


def _kind_beside(name: str, picture: str) -> str:
    """The extension of a file named as the picture is, `0.txt` or `0.jpg.txt`; "" for others and for pictures."""
    first, dot, rest = name[len(picture) + 1 :].lower().partition(".")
    kind = first if not dot else rest if first in _PICTURES else ""
    return "" if kind in _PICTURES or "." in kind else kind


def _roots(kinds: Mapping[str, set[str]]) -> dict[str, str]:
    """The key of the sample that each picture belongs to: its own, or a shorter one."""
    roots: dict[str, str] = {}
    for picture in sorted(kinds, key=len):
        shorter = _longest_key(picture, kinds)
        root = picture if shorter is None else roots[shorter]
        is_numbered = picture[len(root) + 1 : len(root) + 2].isdigit()
        is_complete = kinds[root] <= kinds[picture] and (is_numbered or "txt" in kinds[picture])
        roots[picture] = picture if is_complete else root
    return roots
