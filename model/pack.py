"""All crops of a step as one token sequence with a layout known before the first step.

One trunk pass over one sequence costs one parameter gather per block where separate passes per crop size cost
one each. Segments hold no padding, and the layout is plain integers that never change within a run: one
compiled graph.

    crops = {"clip": (2, 32, 32), "ssl_global": (2, 32, 32), "ssl_local": (4, 16, 16)}
    layout = pack(crops, patch_size=16, prefix=1)

    layout.groups    clip: 2 segments of 1 + 2*2 = 5 tokens, ssl_global: 2 of 5, ssl_local: 4 of 1 + 1*1 = 2
    layout.pad       4, because 2*5 + 2*5 + 4*2 = 28 and 32 is the next multiple of 16
    layout.segments  ((4, 5), (4, 2)): attention takes neighbours of equal length together
    layout.rows(x_TD, "ssl_local")     x_TD[20:28] as (4, 2, D)

A group may leave out patches, as many of each of its crops: with `hidden={"clip": 3}` a clip segment has 1 + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from configs import UserError

ALIGN = 16  # tokens: the multiple that FP8 products and tensor cores want


@dataclass(frozen=True)
class Group:
    """Crops of one kind and size: `segments` of them, each `length` tokens: prefix, patches of `grid`."""

    name: str
    segments: int
    length: int
    grid: tuple[int, int]  # patches down, patches across
    hidden: int = 0  # patches of each crop that are not in the sequence

    @property
    def patches(self) -> int:
        """Patch tokens of each crop."""
        return self.grid[0] * self.grid[1] - self.hidden

    @property
    def prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return self.length - self.patches


@dataclass(frozen=True)
class Layout:
    """Where every crop lies in the packed sequence. Hashable and constant within a run."""

    groups: tuple[Group, ...]
    pad: int

    @property
    def tokens(self) -> int:
        """T: length of the packed sequence, padding included."""
        return sum(group.segments * group.length for group in self.groups) + self.pad

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(count, length) pairs for attention, neighbouring groups of equal length merged."""
        runs = groupby(self.groups, key=lambda group: group.length)
        return tuple((sum(group.segments for group in run), length) for length, run in runs)

    def slice(self, name: str) -> slice:
        """The tokens of group `name`, as a slice of the packed sequence."""
        start = 0
        for group in self.groups:
            stop = start + group.segments * group.length
            if group.name == name:
                return slice(start, stop)
            start = stop
        raise KeyError(name)

    def rows(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, length, D): a view of group `name`, one row per crop."""
        group = self.group(name)
        return x_TD[self.slice(name)].unflatten(0, (group.segments, group.length))

    def cls(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, D): the CLS token of every crop of group `name`."""
        return self.rows(x_TD, name)[:, 0]

    def patches(self, x_TD: Tensor, name: str) -> Tensor:
        """(T, D) -> (segments, P, D): the patches of every crop of group `name`, row by row, hidden ones left out."""
        return self.rows(x_TD, name)[:, self.group(name).prefix :]

    def group(self, name: str) -> Group:
        """The group called `name`."""
        return next(group for group in self.groups if group.name == name)

    def has(self, name: str) -> bool:
        """Whether there is a group called `name`."""
        return any(group.name == name for group in self.groups)


def pack(
    crops: Mapping[str, tuple[int, int, int]],
    patch_size: int,
    prefix: int,
    align: int = ALIGN,
    hidden: Mapping[str, int] | None = None,
) -> Layout:
    """The layout of `crops`: name -> (how many, height, width), sizes in pixels, in the order given.

    `hidden` names groups that leave out so many patches of each crop. Padded to a multiple of `align` tokens. Raises
    UserError where a side does not hold whole patches.
    """
    groups = []
    for name, (count, height, width) in crops.items():
        if height % patch_size or width % patch_size or not height or not width:
            raise UserError(
                f"{name} images of {height}x{width} pixels: sides must be multiples of the patch size "
                f"{patch_size}; resize or crop them"
            )
        grid, left_out = (height // patch_size, width // patch_size), (hidden or {}).get(name, 0)
        groups.append(Group(name, count, prefix + grid[0] * grid[1] - left_out, grid, left_out))
    used = sum(group.segments * group.length for group in groups)
    return Layout(tuple(groups), pad=-used % align)
