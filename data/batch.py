"""A training batch: its tensors, made ahead of the step on a thread, and moved to the device.

    for batch in Prefetcher(loader.batch, start=1000, depth=2): ...  # batches 1000 and 1001 are being made already
    wait_until(batch.ready)                                          # the current stream waits, not the host
    images = to_device(batch.images, device)
    captions = to_device(pack_captions(batch.captions), device)      # tuples of tensors and None too

Rows are ordered so that a leading slice is a uniform random subset: ssl rows and rec rows are slices of the clip rows.
Crops are view-major: with S=3 ssl rows, `global_crops` holds rows 0 1 2 of view 0, then rows 0 1 2 of view 1.

A copy from pageable host memory blocks the host until the stream has reached it, behind everything that is queued; from
page-locked memory it is queued like a kernel. A tensor that another stream made is on the device already: the allocator
is told that the current stream uses it, so that its memory is not reused before.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step. Pixels are uint8 RGB; the model normalises them.

    B = batch.clip / world size, S = batch.ssl / world size, N = views.num_locals, P = patches of a global crop,
    C = model.text.context. Without an objective its tensors have no rows (S = 0).
    """

    images: torch.Tensor  # (B, 3, image_size, image_size) uint8
    captions: torch.Tensor  # (B, C) int64: start-of-text, words, end-of-text (the largest id), zeros
    global_crops: torch.Tensor  # (2S, 3, global_size, global_size) uint8, view-major
    local_crops: torch.Tensor  # (N*S, 3, local_size, local_size) uint8, view-major
    masks: torch.Tensor  # (2S, P) bool, True = masked for the student; the number of True is the same every step
    masked_idx: torch.Tensor  # (M,) int64: flat indices of True in masks, so that no device has to search for them
    step: int  # the step this batch belongs to; the data cursor is step * batch.clip
    keys: tuple[str, ...]  # B sample keys, "shard/sample", after bad samples were replaced
    ready: torch.cuda.Event | None = None  # fires when crops decoded on a GPU are complete; None: they are

    def pinned(self) -> Batch:
        """Return a copy with all host tensors in page-locked memory, from which copies to a GPU are asynchronous."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in tensors.items() if value.is_cpu}
        return replace(self, **pinned)


@dataclass(frozen=True)
class _Raised:
    error: BaseException


class Prefetcher(Generic[Item]):
    """Iterator over make(start), make(start + 1), ... without end, made on a thread at most `depth` items ahead.

    An exception in `make` is raised to the consumer at its place in the sequence, and ends the iteration.
    `wait_seconds` is how long the consumer has waited for items.
    """

    def __init__(self, make: Callable[[int], Item], start: int, depth: int) -> None:
        self.wait_seconds = 0.0
        self._make = make
        self._made: queue.SimpleQueue[Item | _Raised] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def __next__(self) -> Item:
        start = time.perf_counter()
        item = self._made.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, _Raised):
            self._made.put(item)  # further calls raise it again
            raise item.error
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread after its current item; `next` returns the items already made, then stops."""
        self._closed.set()
        self._room.release()
        self._thread.join()
        self._made.put(_Raised(StopIteration()))

    def _run(self, number: int) -> None:
        try:
            while self._wait_for_room():
                self._made.put(self._make(number))
                number += 1
        except BaseException as error:  # of any kind: the consumer must not wait for ever
            self._made.put(_Raised(error))

    def _wait_for_room(self) -> bool:
        """Wait until an item may be made; return False once closed."""
        self._room.acquire()
        return not self._closed.is_set()


class RestartablePrefetcher(Generic[Item]):
    """Starts a Prefetcher over `make` at any step, ending the one before; can be closed repeatedly."""

    def __init__(self, make: Callable[[int], Item], depth: int) -> None:
        self._make, self._depth = make, depth
        self._prefetcher: Prefetcher[Item] | None = None

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer waited since this was last read."""
        if self._prefetcher is None:
            return 0.0
        waited, self._prefetcher.wait_seconds = self._prefetcher.wait_seconds, 0.0
        return waited

    def iterate(self, start: int) -> Prefetcher[Item]:
        """Iterate over make(start), make(start + 1), ...; an iteration before this one ends."""
        self.close()
        self._prefetcher = Prefetcher(self._make, start, self._depth)
        return self._prefetcher

    def close(self) -> None:
        """End the thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()


def to_device(value: T, device: torch.device) -> T:
    """Move a tensor, or a (named) tuple of tensors and None, to `device`, for use on the current stream."""
    if isinstance(value, torch.Tensor):
        return _tensor_to_device(value, device)  # type: ignore[return-value]
    if isinstance(value, tuple):
        parts: Any = (to_device(part, device) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    assert value is None, f"{type(value).__name__} is no tensor"
    return value


def _tensor_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    if not tensor.is_cpu:
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def wait_for_event(ready: torch.cuda.Event | None) -> None:
    """Make the current CUDA stream wait for the event; None: nothing to wait for."""
    if ready is not None:
        torch.cuda.current_stream().wait_event(ready)
