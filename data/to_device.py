"""Move tensors to where a step runs without making the host wait for the device.

    wait_until(batch.ready)                          # the stream that is current, not the host
    images = to_device(batch.images, device)
    captions = to_device(pack_captions(batch.captions), device)      # tuples of tensors and None too

A copy out of ordinary host memory holds the host until the stream has come to it, behind everything that is queued; out
of page-locked memory it is queued like a kernel. A tensor that another stream made is there already: the allocator is
told that the current stream uses it, so that its memory is not given away before.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """Move a tensor, or a (named) tuple of tensors and None, to `device`, for use on the current stream."""
    if isinstance(value, torch.Tensor):
        return _moved(value, device)  # type: ignore[return-value]
    if isinstance(value, tuple):
        parts: Any = (to_device(part, device) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    assert value is None, f"{type(value).__name__} is no tensor"
    return value


def wait_until(ready: torch.cuda.Event | None) -> None:
    """Make the current CUDA stream wait for the event; None: nothing to wait for."""
    if ready is not None:
        torch.cuda.current_stream().wait_event(ready)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    if not tensor.is_cpu:
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
