"""Named ranges of flattened tensors: what a checkpoint's safetensors files hold, one file a rank.

    write_ranges(Path("rank-00000.safetensors"), [TensorRange("fp32", "trunk.norm.weight", 192, values)])
    RangeReader(directory).read("fp32", "trunk.norm.weight", start=0, numel=384)      # out of two files
    copies = HostCopies().take(ranges)                      # the next step may change the originals now

A range is (key, name, start, values): key says which of a parameter's vectors it is ("fp32", "exp_avg", "exp_avg_sq",
"teacher", "average"; "whole" and "recent_norms" are no parameter's), start where the values begin in the flattened
tensor. Any rank of any world size reads the range it needs from whichever files hold it, so a checkpoint depends on no
world size. No pickle: nothing executes on load.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
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
GRAD_NORMS = "recent_norms"  # one more, of engines instead of parameters (engine/health/anomalies.py)
MOMENTS = ("exp_avg", "exp_avg_sq")  # and those of AdamW
MAIN = "model"  # the engine whose weights a run produces


@dataclass(frozen=True)
class TensorRange:
    """One range of one vector of a parameter; see the module for the keys."""

    key: str
    name: str
    start: int
    values: Tensor  # (numel,) one range of the flattened tensor


def qualified_name(engine: str, parameter: str) -> str:
    """Return a parameter's name in a checkpoint: prefixed with its engine's name, but for the main engine."""
    return parameter if engine == MAIN else f"{engine}/{parameter}"


def write_ranges(path: Path, ranges: list[TensorRange]) -> None:
    """Write the ranges and sync them to disk; the file is complete when this returns."""
    tensors = {f"{each.key}/{each.name}": each.values.detach().cpu().contiguous() for each in ranges}
    starts = {f"{each.key}/{each.name}": each.start for each in ranges}
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    apply_umask(path)
    fsync_path(path)


class RangeReader:
    """Read the ranges of all `rank-*.safetensors` files in a directory, lazily. Raises UserError for a damaged file."""

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
            for qualified_name, start in json.loads(file.metadata()["starts"]).items():
                key, _, name = qualified_name.partition("/")
                numel = file.get_slice(qualified_name).get_shape()[0]
                self._where[key, name].append((start, numel, len(self._files)))
            self._files.append(file)
        for ranges in self._where.values():
            ranges.sort()

    def names(self, key: str) -> list[str]:
        """List the names that have ranges under this key, in file order."""
        return [name for found, name in self._where if found == key]

    def numel(self, key: str, name: str) -> int:
        """Return the length of the whole flattened tensor."""
        start, numel, _ = self._where[key, name][-1]
        return start + numel

    def read(self, key: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Return the (numel,) range from `start`, joined from as many files as it takes; by default the whole tensor.

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


class HostCopies:
    """Host buffers for copies of a rank's ranges, allocated once and reused at every save.

    Page-locked where the ranges are on a GPU, so that copies run at the bus's speed. The price of saving in the
    background: as much host memory as this rank's part of a checkpoint.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, ranges: list[TensorRange]) -> list[TensorRange]:
        """Copy the ranges to the host; the copies are valid until the next call. Waits for the device."""
        copied = [replace(each, values=self._buffer(each).copy_(each.values, non_blocking=True)) for each in ranges]
        if any(each.values.is_cuda for each in ranges):
            torch.cuda.synchronize()
        return copied

    def _buffer(self, each: TensorRange) -> Tensor:
        key, values = (each.key, each.name), each.values
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key] = buffer
        return buffer
