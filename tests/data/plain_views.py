"""Views without colour, blur or flip: the centred square of a picture, resized."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from data.views import ViewNumbers


def centred(size: int, heights: ArrayLike, widths: ArrayLike) -> ViewNumbers:
    """One view of each picture of these sides."""
    height, width = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    side = np.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    no, zero, one = np.zeros(len(side), bool), np.zeros(len(side)), np.ones(len(side))
    windows = np.stack([top, left, top + side, left + side], axis=1)
    black = np.zeros((len(side), 3), np.uint8)
    return ViewNumbers(size, windows, no, no, one, one, one, zero, no, zero, no, black)
