"""The text of a caption: bytes -> characters, what counts as no text, and which of several captions is served.

decode(b"\\xff\\xfea\\x00")                                    # "a": a byte order mark decides; without one, UTF-8
texts(["a cat", None, "\\u200b"])                             # ("a cat",): what shows nothing is no caption
draw(("a cat", "a tabby"), seed=0, key="00000/17", epoch=3)  # one of them, the same on every rank and resume
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from data.hashing import hash_text, hash_words

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARK = "\ufeff"
# A character that shows: no white space, control, surrogate, format character, filler or replacement character.
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U000e0000-\U000e0fff]"
)
_CAPTION = hash_text("caption")  # what the hash is for: independent of the draws of crops and colours


class NotText(ValueError):
    """Bytes that are no text in the encoding they claim; `at` is the first such byte."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def decode(data: bytes, is_cut_off: bool = False) -> str:
    """The characters of a text, without its byte order mark. Raises NotText: another encoding must not become text.

    `is_cut_off`: the bytes are the beginning of a longer text, and may end inside a character.
    """
    encoding = "utf-8"
    for mark, marked in _MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], marked
            break
    else:
        padded = data.strip(b"\0")  # NULs around a text are the padding of a field of fixed width
        if padded.count(0) * 3 > len(padded):
            raise NotText("every other byte is NUL: UTF-16 without its byte order mark", data.index(0))
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data, final=not is_cut_off)
    except UnicodeDecodeError as error:
        raise NotText(f"byte {data[error.start]:#04x} is not {encoding.upper()}", error.start) from None


def texts(value: object) -> tuple[str, ...]:
    """The captions in a string or a list of strings; those in which no character shows are left out."""
    found = [text.strip().lstrip(_MARK).strip() for text in _listed(value) if isinstance(text, str)]
    return tuple(text for text in found if _VISIBLE.search(text))


def draw(captions: Sequence[str], seed: int, key: str, epoch: int) -> str:
    """One of a sample's captions: a pure function of (seed, sample key, epoch), and the only one where there is one."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(hash_words(seed, _CAPTION, hash_text(key), epoch)[0]) % len(captions)]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]
