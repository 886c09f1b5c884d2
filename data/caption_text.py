"""Caption text: decode bytes to characters, drop captions without visible text, choose one of several.

decode(b"\\xff\\xfea\\x00")                                    # "a": decoded by its byte order mark, else as UTF-8
visible_captions(["a cat", None, "\\u200b"])                  # ("a cat",): the others show no character
draw(("a cat", "a tabby"), seed=0, key="00000/17", epoch=3)  # one of them, the same on every rank and after a resume
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from data.hashing import hash_text, hash_words

# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BOM = "\ufeff"
# Matches a visible character: not white space, control, surrogate, format, filler or replacement character.
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U000e0000-\U000e0fff]"
)
_CAPTION_HASH = hash_text("caption")  # a constant of its own: independent of the draws of crops and colours


class TextDecodeError(ValueError):
    """Bytes that are not valid in the encoding of their byte order mark, or in UTF-8; `at` is the first such byte."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def decode(data: bytes, is_cut_off: bool = False) -> str:
    """Decode a text by its byte order mark, else as UTF-8. Raises TextDecodeError, rather than return wrong characters.

    `is_cut_off`: the bytes are the beginning of a longer text, which may end inside a character.
    """
    encoding = "utf-8"
    for mark, marked in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], marked
            break
    else:
        padded = data.strip(b"\0")  # NULs around a text are padding to a fixed width
        if padded.count(0) * 3 > len(padded):
            raise TextDecodeError("many bytes are NUL, as in UTF-16 without a byte order mark", data.index(0))
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data, final=not is_cut_off)
    except UnicodeDecodeError as error:
        raise TextDecodeError(f"byte {data[error.start]:#04x} is not {encoding.upper()}", error.start) from None


def visible_captions(value: object) -> tuple[str, ...]:
    """Return the captions in a string or a list of strings, without those that have no visible character."""
    found = [text.strip().lstrip(_BOM).strip() for text in _listed(value) if isinstance(text, str)]
    return tuple(text for text in found if _VISIBLE.search(text))


def draw(captions: Sequence[str], seed: int, key: str, epoch: int) -> str:
    """Choose one of a sample's captions: a pure function of (seed, sample key, epoch)."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(hash_words(seed, _CAPTION_HASH, hash_text(key), epoch)[0]) % len(captions)]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]
