"""Which parameters ZeRO-3 gathers in a step, and when: DeepSpeed's own rules, played on names and sizes.

A module's parameters are gathered before its forward and its backward and freed after it, but for three rules. Small
parameters (`stage3_param_persistence_threshold`) stay between passes. Of what the last trace says comes next, up to
`stage3_prefetch_bucket_size` elements are gathered ahead. What is used again within `stage3_max_reuse_distance`
elements is not freed: below half a billion trained parameters DeepSpeed's default, 1e9, keeps the whole student from
its forward to its backward, and nothing is gathered twice. With zero_hpz_partition_size what is freed leaves a second
copy on its host, and until the step is over the next gather of it stays INSIDE the host.

    gathers = Gathers(sizes, Settings.of(ds_config))
    gathers.run([Visit("forward", "trunk.blocks.0", ...), ...])      # a pass of the engine and its backward
    gathers.take()                                                   # {("forward", "trunk.norm.weight"): 1, ...}

Rules of deepspeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py), held against counted bytes in
tests/profiling/test_communication.py. A trace is of one forward and its backward; a step that runs two kinds of
forward (micro-batches) finds the wrong trace each time, falls back to gathering what it needs and freeing everything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from configs.scale_out import HPZ, is_asked

INSIDE = ", inside the host"  # ends the purpose of a gather from second copies


class Visit(NamedTuple):
    """A module begins (`enters`) or ends. A leaf needs all that lies in it, another module its own parameters."""

    purpose: str  # "teacher", "forward" or "backward"
    module: str
    enters: bool
    is_leaf: bool
    own: tuple[str, ...]
    all: tuple[str, ...]  # its own and those of the modules in it
    ends_unseen: bool = False  # freed when the backward is over, small parameters not at all

    @property
    def parameters(self) -> tuple[str, ...]:
        """What must be whole between beginning and end."""
        return self.all if self.is_leaf else self.own


class Use(NamedTuple):
    """A line of the trace: a parameter, and the visit that needs it."""

    parameter: str
    step: int
    purpose: str


@dataclass(frozen=True)
class Settings:
    """Elements; what a DeepSpeed JSON leaves out is DeepSpeed's default."""

    prefetch: int
    reuse: int
    max_live: int
    persistence: int
    has_second: bool  # copies of the weights on every host

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> Settings:
        """From a DeepSpeed dictionary that has a `zero_optimization`."""
        zero = ds_config["zero_optimization"]
        return cls(
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
            max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
            has_second=is_asked(zero, HPZ),
        )


class Gathers:
    """One rank's gathered parameters over any number of passes. `most_live` is the most elements held at once, without
    the buffers in which several travel: counted whole, they are too much (docs/decisions/planner.md)."""

    def __init__(self, sizes: Mapping[str, int], settings: Settings) -> None:
        self._sizes, self._settings = sizes, settings
        self.persistent = {name for name, size in sizes.items() if size <= settings.persistence}
        self._available: set[str] = set()
        self._size = 0  # elements of all that are available
        self._ahead: set[str] = set()  # prefetched and not yet used
        self._second: set[str] = set()  # with a copy on the host
        self._trace: list[Visit] = []
        self._mode = "invalid"  # then "record", then "complete"
        self._queue: deque[Use] = deque()
        self._reuse_cache: dict[tuple[str, int], frozenset[str]] = {}
        self._gathered: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[str] = Counter()
        self.most_live = 0
        self._start()

    def run(self, visits: Sequence[Visit]) -> None:
        """One forward of the engine with the backward that follows it, if one does."""
        self._start_of_forward()
        for visit in visits:
            self._enter(visit) if visit.enters else self._leave(visit)

    def end_step(self) -> None:
        """After the optimizer: small parameters are gathered anew, all of them, each by itself. All weights have moved,
        so second copies are void."""
        self._remove(self.persistent)
        self._second = set()
        for name in sorted(self.persistent):
            self._gather_together({name: "after the step"})

    def drop(self, names: set[str]) -> None:
        """Frees copies whose shards were written."""
        self._remove(names)

    def take(self) -> tuple[Counter[tuple[str, str]], Counter[str]]:
        """How often (purpose, parameter) was gathered since the last call, and in how many messages by purpose."""
        taken = self._gathered, self._messages
        self._gathered, self._messages = Counter(), Counter()
        return taken

    def _start(self) -> None:
        self._queue = deque(self._uses()) if self._mode == "complete" else deque()
        self._last_needed: dict[str, int] = {}
        self._step, self._num_live = 0, 0

    def _start_of_forward(self) -> None:
        self._drop_ahead()
        if self._mode == "record":
            self._mode = "complete"
        elif self._mode == "invalid":
            self._mode, self._trace = "record", []
        self._start()

    def _uses(self) -> list[Use]:
        return [Use(name, step, visit.purpose) for step, visit in enumerate(self._trace) for name in visit.parameters]

    def _enter(self, visit: Visit) -> None:
        if self._mode == "complete" and self._is_off_trace(visit):
            self._mode, self._trace = "invalid", []
            self._drop_ahead()
            self._last_needed, self._queue = {}, deque()
        if self._mode == "record":
            self._trace.append(visit)
        self._gather_together(dict.fromkeys(visit.parameters, visit.purpose))
        self._ahead -= set(visit.parameters)
        if self._mode == "complete":
            self._pass_by(visit)
            self._prefetch()
        self._step += 1

    def _is_off_trace(self, visit: Visit) -> bool:
        return len(self._trace) <= self._step or self._trace[self._step].module != visit.module

    def _pass_by(self, visit: Visit) -> None:
        """Takes this visit's own lines off the trace, unless a prefetch has read past them."""
        waiting = {name for name in visit.parameters if self._last_needed.get(name, -1) < self._step}
        for _ in range(len(waiting)):
            use = self._queue.popleft()
            self._last_needed[use.parameter] = use.step

    def _prefetch(self) -> None:
        room = min(self._settings.max_live - self._num_live, self._settings.prefetch)
        wanted: dict[str, str] = {}
        size = 0
        while self._queue and size < room:
            use = self._queue.popleft()
            self._last_needed[use.parameter] = max(self._last_needed.get(use.parameter, -1), use.step)
            if use.parameter not in self._available and use.parameter not in wanted:
                wanted[use.parameter] = use.purpose
                size += self._sizes[use.parameter]
        self._gather_together(wanted)
        self._ahead |= set(wanted)

    def _leave(self, visit: Visit) -> None:
        freed = self._freed(visit) if self._mode == "complete" else set(visit.parameters)
        self._free(freed - self._ahead - (self.persistent if visit.ends_unseen else set()))

    def _freed(self, visit: Visit) -> frozenset[str]:
        """What is not needed again soon. DeepSpeed works it out once for a module and a step, and so does this."""
        key = (visit.module, self._step)
        if key not in self._reuse_cache:
            freed = {name for name in visit.parameters if name not in self.persistent}
            freed -= {name for name in freed if self._last_needed.get(name, -1) > self._step}
            distance = 0
            for later in self._trace[self._step :]:
                if distance >= self._settings.reuse:
                    break
                # As DeepSpeed counts: seen from a leaf every later module is whole, from others leaves are empty.
                seen = later.all if visit.is_leaf else later.own
                freed -= set(seen)
                distance += sum(self._sizes[name] for name in seen)
            self._reuse_cache[key] = frozenset(freed)
        return self._reuse_cache[key]

    def _gather_together(self, wanted: Mapping[str, str]) -> None:
        """Parameter -> purpose, in one message, which counts for the first of its purposes; another for what has second
        copies."""
        missing = {name: purpose for name, purpose in wanted.items() if name not in self._available}
        if not missing:
            return
        size = sum(self._sizes[name] for name in missing)
        self._available |= set(missing)
        near = {name: purpose + INSIDE for name, purpose in missing.items() if name in self._second}
        far = {name: purpose for name, purpose in missing.items() if name not in self._second}
        for part in (part for part in (near, far) if part):
            self._gathered.update((purpose, name) for name, purpose in part.items())
            self._messages[next(iter(part.values()))] += 1
        self._num_live += size
        self._size += size
        self.most_live = max(self.most_live, self._size)

    def _free(self, names: set[str] | frozenset[str]) -> None:
        if self._settings.has_second:
            self._second |= names & self._available
        self._num_live -= self._remove(names)

    def _remove(self, names: set[str] | frozenset[str]) -> int:
        """Elements of those of `names` that were there."""
        there = names & self._available
        self._available -= there
        freed = sum(self._sizes[name] for name in there)
        self._size -= freed
        return freed

    def _drop_ahead(self) -> None:
        self._free(self._ahead)
        self._ahead = set()
