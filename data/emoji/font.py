"""The pictures inside a colour emoji font, which the system's packages bring and this code never ships.

    font = EmojiFont.find(None)                 # the first of PLACES that exists
    font.picture(0x1F34E)                       # a red apple: an RGBA image, cut to its box; None where there is none
    font.digest                                 # "3a8d...": the same font, the same pictures

`Pictures` is all that the rest of this package asks of a font, so that anything which gives pictures by code point
can stand in for one. Processes copy an EmojiFont by its path and open the file on first use.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

from configs import UserError

STRIKE = 109  # pixels: the one size of Noto's bitmaps; fonts of outlines have every size
FRAME = 2 * STRIKE  # a picture fits into a square of this side
# Of Debian and Ubuntu, Fedora, Arch.
PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
)
REMEDY = "install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji), or name another colour font with --font"


class Pictures(Protocol):
    """Pictures by code point; what draws keeps the last few, so they are told apart by their hash."""

    def __hash__(self) -> int: ...

    def picture(self, code_point: int) -> Image.Image | None:
        """RGBA, cut to the box of what is not transparent; None where there is no picture of that code point."""
        ...


@dataclass(frozen=True)
class EmojiFont:
    """A font file with pictures, known to be one."""

    path: Path
    digest: str  # 16 hex digits of the file's SHA-256

    @classmethod
    def find(cls, path: Path | None) -> EmojiFont:
        """Opens `path`, or the first of PLACES there is. Raises UserError for none, or for another kind of file."""
        path = path or next(filter(Path.is_file, map(Path, PLACES)), Path(PLACES[0]))
        if not path.is_file():
            raise UserError(f"no colour emoji font at {path}: the pictures come from it; {REMEDY}")
        try:
            _opened(path)
        except OSError as error:
            raise UserError(
                f"--font {path} cannot be used ({error}): a colour font with outlines, or with bitmaps of {STRIKE} "
                f"pixels as Noto Color Emoji has, is needed; {REMEDY}"
            ) from None
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    def picture(self, code_point: int) -> Image.Image | None:
        """RGBA, cut to its box; None where the font has none."""
        frame = Image.new("RGBA", (FRAME, FRAME))
        ImageDraw.Draw(frame).text((STRIKE // 2, 0), chr(code_point), font=_opened(self.path), embedded_color=True)
        box = frame.getbbox()
        return frame.crop(box) if box else None


@functools.cache
def _opened(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
