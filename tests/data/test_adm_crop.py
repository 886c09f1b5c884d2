"""The evaluation crop is ADM's: Pillow's box and bicubic filters are the reference."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.adm_crop import adm_crop

pytestmark = pytest.mark.L0

# (height, width), size: shrunk, halved once and twice, odd sides, enlarged, as it is, long and narrow.
CASES = [
    ((375, 500), 256), ((500, 333), 64), ((257, 259), 64), ((131, 517), 64), ((40, 37), 64), ((64, 64), 64),
    ((64, 99), 64), ((1025, 70), 32), ((33, 1000), 32), ((128, 128), 64), ((127, 200), 64),
]  # fmt: skip


def with_pillow(pixels_HWC: Tensor, size: int) -> Tensor:
    """The same steps in Pillow's own operations, one axis a call: Pillow 13 begins with whichever is cheaper."""

    def resized(picture: Image.Image, width: int, height: int, kind: Image.Resampling) -> Image.Image:
        return picture.resize((width, picture.height), kind).resize((width, height), kind)

    picture = Image.fromarray(pixels_HWC.numpy())
    while min(picture.size) >= 2 * size:
        picture = resized(picture, picture.width // 2, picture.height // 2, Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = resized(picture, round(picture.width * scale), round(picture.height * scale), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    cut = picture.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


@pytest.mark.parametrize(("sides", "size"), CASES)
def test_it_is_pillows_to_one_level(sides: tuple[int, int], size: int) -> None:
    pixels = torch.randint(0, 256, (*sides, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = adm_crop(pixels, size), with_pillow(pixels, size)
    assert ours.shape == (3, size, size)
    apart = (ours.int() - theirs.int()).abs()
    # Noise is the worst case. Pillow's weights are whole numbers of 2^-22: a level, where a sum ends near a half.
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 5e-3


def test_a_picture_of_the_right_size_is_untouched() -> None:
    pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8)
    assert torch.equal(adm_crop(pixels, 48), pixels.permute(2, 0, 1))
