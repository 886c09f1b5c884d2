"""The checkpoint's grain: named ranges of flattened tensors, one safetensors file a rank.

A piece is (key, name, start, values): key says which of a parameter's vectors it is ("fp32", "exp_avg", "exp_avg_sq",
"teacher", "average"; "whole" and "recent_norms" are no parameter's), start where the values begin in the flattened
tensor. Any rank of any world size reads the range it needs from whichever files hold it, so a checkpoint knows no world
size. No pickle, nothing executes on load.

    write_pieces(Path("rank-00000.safetensors"), [Piece("fp32", "trunk.norm.weight", 192, values)])
    Pieces(directory).read("fp32", "trunk.norm.weight", start=0, numel=384)      # out of two files
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.command_line import apply_umask
from data.durable_files import fsync_path

MASTER, TEACHER, AVERAGE, WHOLE = "fp32", "teacher", "average", "whole"  # the keys a checkpoint has
NORMS = "recent_norms"  # one more, of engines instead of parameters (engine/health/judge.py)
MOMENTS = ("exp_avg", "exp_avg_sq")  # and those of AdamW
MAIN = "model"  # the engine whose weights the run is for


@dataclass(frozen=True)
class Piece:
    """One range of one vector of a parameter; see the module for the keys."""

    key: str
    name: str
    start: int
    values: Tensor  # (numel,) one range of the flattened tensor


def label(engine: str, parameter: str) -> str:
    """The main engine's parameters have their own names, those of another engine its name before theirs."""
    return parameter if engine == MAIN else f"{engine}/{parameter}"


def write_pieces(path: Path, pieces: list[Piece]) -> None:
    """Writes the pieces and forces them to disk; the file is complete when this returns."""
    tensors = {f"{piece.key}/{piece.name}": piece.values.detach().cpu().contiguous() for piece in pieces}
    starts = {f"{piece.key}/{piece.name}": piece.start for piece in pieces}
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    apply_umask(path)
    fsync_path(path)


class Pieces:
    """All pieces of the `rank-*.safetensors` files in a directory, read lazily. Raises UserError for a damaged one."""

    def __init__(self, directory: Path) -> None:
        self._files: list[Any] = []
        self._where: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
        for path in sorted(directory.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"{path} is not a safetensors file, or is cut off ({error}): the checkpoint is damaged; write the "
                    f"name of an earlier one into {directory.parent}/latest, or start anew"
                ) from None
            for label, start in json.loads(file.metadata()["starts"]).items():
                key, _, name = label.partition("/")
                numel = file.get_slice(label).get_shape()[0]
                self._where[key, name].append((start, numel, len(self._files)))
            self._files.append(file)
        for ranges in self._where.values():
            ranges.sort()

    def names(self, key: str) -> list[str]:
        """The names that have pieces under this key, in file order."""
        return [name for found, name in self._where if found == key]

    def numel(self, key: str, name: str) -> int:
        """Length of the whole flattened tensor."""
        start, numel, _ = self._where[key, name][-1]
        return start + numel

    def read(self, key: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """(numel,) the range from `start`, put together from as many files as it takes; the whole tensor by default.

        Raises UserError when no file holds part of the range: the checkpoint is incomplete or of another model.
        """
        end = self.numel(key, name) if numel is None and (key, name) in self._where else start + (numel or 0)
        parts, at = [], start
        for first, length, file_idx in self._where.get((key, name), []):
            if first <= at < min(first + length, end):
                stop = min(first + length, end)
                parts.append(self._files[file_idx].get_slice(f"{key}/{name}")[at - first : stop - first])
                at = stop
        if at != end:
            raise UserError(
                f"the checkpoint holds no {key} of {name} from {at} to {end}: it is incomplete or of another model"
            )
        return torch.cat(parts) if parts else torch.empty(0)
