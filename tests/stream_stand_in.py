"""A stand-in for a device with streams: what DeepSpeed and torch.cuda say of one, and no device.

    waits = install()                  # DeepSpeed's, for good: in a rank's own process, before an engine is built
    ...
    waits                              # Counter({"device in zero/stage3.py:_post_step": 1})

    stand_in_for_cuda(monkeypatch)     # torch.cuda.stream and current_stream

Streams compute nothing; each remembers what it is ordered behind, so that a test can ask what has waited for what. No
event is ever reached: the device is as far behind as it can be.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch


class Event:
    """A moment of a stream, never reached by the device."""

    def __init__(self, **options: Any) -> None:
        self.seen: Counter[Stream] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        """The moment is that of everything queued on the stream so far."""
        self.seen = Counter((stream or Stream.current[-1]).seen)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Stream.host_waits[f"event in {asker()}"] += 1


class Stream:
    """A queue of work. `seen[s]` is how many entries of stream `s` come before whatever is queued here next."""

    current: ClassVar[list[Stream]]
    host_waits: ClassVar[Counter[str]] = Counter()

    def __init__(self, **options: Any) -> None:
        self.seen: Counter[Stream] = Counter()

    def work(self) -> None:
        """Something is queued."""
        self.seen[self] += 1

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def synchronize(self) -> None:
        Stream.host_waits[f"stream in {asker()}"] += 1


Stream.current = [Stream()]


def install() -> Counter[str]:
    """Replaces the accelerator of this process for good; the counter has the host's waits by who asked."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    for claim in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        setattr(kind, claim, lambda self: False)
    kind.Stream, kind.Event = property(lambda self: Stream), property(lambda self: Event)
    kind.stream = lambda self, stream: _on(stream)
    kind.current_stream = lambda self, index=None: Stream.current[-1]
    kind.default_stream = lambda self, index=None: Stream.current[0]
    kind.synchronize = lambda self, index=None: Stream.host_waits.update([f"device in {asker()}"])
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    return Stream.host_waits


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's streams are these; a tensor that is handed to another stream takes note of nothing."""
    monkeypatch.setattr(torch.cuda, "stream", _on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    Stream.current.append(stream)
    stream.work()
    try:
        yield
    finally:
        stream.work()
        Stream.current.pop()


def asker(*own: str) -> str:
    """File and function of the caller outside torch, this file and the files `own`."""
    own = (__file__, *own)
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename not in own]
    return f"{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].name}"
