"""Which parameters ZeRO-3 gathers in a step, and when: DeepSpeed's own rules, applied to names and sizes.

    gathers = steady_gathers(config, ds_config, model)       # model: built on the meta device
    gathers.parameters["backward", "trunk.blocks.0.attn.qkv.weight"]     # times in a step
    gathers.messages["forward"], gathers.max_live                        # messages; elements

A module's parameters are gathered before its forward and its backward and freed after it, but for three rules. Small
parameters (`stage3_param_persistence_threshold`) stay between passes. Of what the last trace says comes next, up to
`stage3_prefetch_bucket_size` elements are gathered ahead. What is used again within `stage3_max_reuse_distance`
elements is not freed: below half a billion trained parameters DeepSpeed's default, 1e9, keeps the whole student from
its forward to its backward, and nothing is gathered twice. With zero_hpz_partition_size what is freed leaves a second
copy on its host, and until the step is over the next gather of it stays INSIDE the host.

Rules of deepspeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py); tests compare them with counted bytes. A
trace is of one forward and its backward; a step with two kinds of forward (micro-batches) finds the wrong trace each
time, and falls back to gathering what it needs and freeing everything. The order of modules is that of
Pretrainer.forward, micro-batches before and behind the shared one; DeepSpeed's hooks are on every module that is
called, and backward meets them in reverse.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from configs import Config
from configs.deepspeed import HPZ_SIZE, is_enabled
from engine.build import BLOCK_CLASSES
from model.pretrainer import Pretrainer

INSIDE = ", inside the host"  # ends the purpose of a gather from second copies
NUM_STEPS = 3  # after which the trace of ZeRO-3 no longer changes
# What enters these has no gradient, so DeepSpeed does not see their backward end.
ENDS_UNSEEN = ("trunk", "trunk.patch_embed", "trunk.patch_embed.proj", "text", "text.token_embedding")


class ModuleVisit(NamedTuple):
    """A module begins (`enters`) or ends. A leaf needs all that is in it, another module its own parameters."""

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


class TracedParameter(NamedTuple):
    """A line of ZeRO-3's trace: a parameter, and the visit that needs it."""

    name: str
    visit_idx: int
    purpose: str


@dataclass(frozen=True)
class GatherSettings:
    """Elements; what a DeepSpeed JSON leaves out is DeepSpeed's default."""

    prefetch: int
    reuse: int
    max_live: int
    persistence: int
    has_second_copies: bool  # of the weights, on every host

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> GatherSettings:
        """From a DeepSpeed dictionary that has a `zero_optimization`."""
        zero = ds_config["zero_optimization"]
        return cls(
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
            max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
            has_second_copies=is_enabled(zero, HPZ_SIZE),
        )


class GatherSimulator:
    """One rank's gathered parameters over any number of passes.

    `max_live` is the most elements whole at once, without the buffers in which several are gathered: counted whole,
    they are too much (docs/decisions/planner.md).
    """

    def __init__(self, sizes: Mapping[str, int], settings: GatherSettings) -> None:
        self._sizes, self._settings = sizes, settings
        self.persistent = {name for name, size in sizes.items() if size <= settings.persistence}
        self._available: set[str] = set()
        self._size = 0  # elements of all that are available
        self._ahead: set[str] = set()  # prefetched and not yet used
        self._second: set[str] = set()  # with a copy on the host
        self._trace: list[ModuleVisit] = []
        self._mode = "invalid"  # then "record", then "complete"
        self._reuse_cache: dict[tuple[str, int], frozenset[str]] = {}
        self._gathered: Counter[tuple[str, str]] = Counter()
        self._messages: Counter[str] = Counter()
        self.max_live = 0
        self._start()

    def run(self, visits: Sequence[ModuleVisit]) -> None:
        """Play one forward of the engine with the backward that follows it, if one does."""
        self._drop_ahead()
        if self._mode == "record":
            self._mode = "complete"
        elif self._mode == "invalid":
            self._mode, self._trace = "record", []
        self._start()
        for visit in visits:
            self._enter(visit) if visit.enters else self._leave(visit)

    def end_step(self) -> None:
        """After the optimizer: gather small parameters anew, each by itself. All weights have moved, so second copies
        are void."""
        self._remove(self.persistent)
        self._second = set()
        for name in sorted(self.persistent):
            self._gather_together({name: "after the step"})

    def drop(self, names: set[str]) -> None:
        """Free copies whose shards were written."""
        self._remove(names)

    def pop_counts(self) -> tuple[Counter[tuple[str, str]], Counter[str]]:
        """How often (purpose, parameter) was gathered since the last call, and in how many messages by purpose."""
        counts = self._gathered, self._messages
        self._gathered, self._messages = Counter(), Counter()
        return counts

    def _start(self) -> None:
        traced = (
            TracedParameter(name, idx, visit.purpose)
            for idx, visit in enumerate(self._trace) for name in visit.parameters
        )  # fmt: skip
        self._queue = deque(traced) if self._mode == "complete" else deque()
        self._last_needed: dict[str, int] = {}
        self._visit_idx, self._num_live = 0, 0

    def _enter(self, visit: ModuleVisit) -> None:
        is_off_trace = len(self._trace) <= self._visit_idx or self._trace[self._visit_idx].module != visit.module
        if self._mode == "complete" and is_off_trace:
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
        self._visit_idx += 1

    def _pass_by(self, visit: ModuleVisit) -> None:
        """Take this visit's own lines off the trace, unless a prefetch has read past them."""
        waiting = {name for name in visit.parameters if self._last_needed.get(name, -1) < self._visit_idx}
        for _ in range(len(waiting)):
            line = self._queue.popleft()
            self._last_needed[line.name] = line.visit_idx

    def _prefetch(self) -> None:
        room = min(self._settings.max_live - self._num_live, self._settings.prefetch)
        wanted: dict[str, str] = {}
        size = 0
        while self._queue and size < room:
            line = self._queue.popleft()
            self._last_needed[line.name] = max(self._last_needed.get(line.name, -1), line.visit_idx)
            if line.name not in self._available and line.name not in wanted:
                wanted[line.name] = line.purpose
                size += self._sizes[line.name]
        self._gather_together(wanted)
        self._ahead |= set(wanted)

    def _leave(self, visit: ModuleVisit) -> None:
        freed = self._freed(visit) if self._mode == "complete" else set(visit.parameters)
        self._free(freed - self._ahead - (self.persistent if visit.ends_unseen else set()))

    def _freed(self, visit: ModuleVisit) -> frozenset[str]:
        """What is not needed again soon. DeepSpeed computes it once for a module and a step, and so does this."""
        key = (visit.module, self._visit_idx)
        if key not in self._reuse_cache:
            freed = {name for name in visit.parameters if name not in self.persistent}
            freed -= {name for name in freed if self._last_needed.get(name, -1) > self._visit_idx}
            distance = 0
            for later in self._trace[self._visit_idx :]:
                if distance >= self._settings.reuse:
                    break
                # As DeepSpeed counts: seen from a leaf every later module is whole, from others leaves are empty.
                seen = later.all if visit.is_leaf else later.own
                freed -= set(seen)
                distance += sum(self._sizes[name] for name in seen)
            self._reuse_cache[key] = frozenset(freed)
        return self._reuse_cache[key]

    def _gather_together(self, wanted: Mapping[str, str]) -> None:
        """Gather parameters (name -> purpose) in one message, which counts for the first purpose; in another one those
        that have second copies."""
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
        self.max_live = max(self.max_live, self._size)

    def _free(self, names: set[str] | frozenset[str]) -> None:
        if self._settings.has_second_copies:
            self._second |= names & self._available
        self._num_live -= self._remove(names)

    def _remove(self, names: set[str] | frozenset[str]) -> int:
        """Free those of `names` that are available; return their elements."""
        removed = names & self._available
        self._available -= removed
        freed = sum(self._sizes[name] for name in removed)
        self._size -= freed
        return freed

    def _drop_ahead(self) -> None:
        self._free(self._ahead)
        self._ahead = set()


@dataclass(frozen=True)
class StepGathers:
    """What a step gathers under ZeRO-3."""

    parameters: Counter[tuple[str, str]]  # times by (purpose, parameter)
    messages: Counter[str]  # by purpose
    max_live: int  # elements whole at once


def steady_gathers(
    config: Config, ds_config: dict[str, Any], model: Pretrainer, is_separate: bool = False
) -> StepGathers:
    """Simulate the gathers of a step once ZeRO-3 knows the order of modules.

    `is_separate`: with a trunk pass for each kind of crop.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    gathers = GatherSimulator(sizes, GatherSettings.of(ds_config))
    teacher = {name for name in gathers.persistent if name.startswith("teacher.")}
    whole = _forward(config, model, is_separate)
    clip_only = _visits(model, ["trunk", "" if config.model.bottleneck_ae_only else "bottleneck", "text", "clip"])
    others = config.system.clip.micro_batches - 1
    for _ in range(NUM_STEPS):
        gathers.pop_counts()
        for _ in range(others):
            gathers.run(clip_only)
        gathers.run([*whole, *_backward(whole)])
        for _ in range(others):
            gathers.run([*clip_only, *_backward(clip_only)])
        gathers.end_step()
        gathers.drop(teacher)
    return StepGathers(*gathers.pop_counts(), gathers.max_live)


def _forward(config: Config, model: Pretrainer, is_separate: bool) -> list[ModuleVisit]:
    passes = 1
    if is_separate:
        ssl = 1 + bool(config.views.num_locals) if model.teacher is not None else 0
        passes = max(1, (model.clip is not None) + ssl + (model.decoder is not None))
    is_early = not config.model.bottleneck_ae_only
    parts = ["teacher", *["trunk"] * passes, "bottleneck" if is_early else "", "text", "clip", "prototypes"]
    parts += ["" if is_early else "bottleneck", "align", "decoder"]
    return _visits(model, parts)


def _visits(model: Pretrainer, parts: list[str]) -> list[ModuleVisit]:
    """The engine's module and in it `parts`, where they are built."""
    root = ModuleVisit("forward", "", True, False, (), tuple(name for name, _ in model.named_parameters()))
    present = [(name, getattr(model, name)) for name in parts if name]
    inside = (visit for name, part in present if part is not None for visit in _walk(part, name))
    return [root, *inside, root._replace(enters=False)]


def _walk(module: nn.Module, name: str) -> Iterator[ModuleVisit]:
    """Hooks are on every module that is called, but for those inside a leaf."""
    is_leaf = isinstance(module, tuple(BLOCK_CLASSES))
    own, below = (
        tuple(f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=recurse))
        for recurse in (False, True)
    )
    visit = ModuleVisit("teacher" if name.startswith("teacher") else "forward", name, True, is_leaf, own, below)
    is_called = not isinstance(module, nn.ModuleList)
    if is_called:
        yield visit
    for child, part in () if is_leaf else module.named_children():
        yield from _walk(part, f"{name}.{child}")
    if is_called:
        yield visit._replace(enters=False)


def _backward(forward: list[ModuleVisit]) -> list[ModuleVisit]:
    """In reverse, without what has no gradient and without the whole, whose outputs are no tensors: its hooks do not
    see them."""
    return [
        visit._replace(purpose="backward", enters=not visit.enters, ends_unseen=visit.module in ENDS_UNSEEN)
        for visit in reversed(forward)
        if visit.purpose != "teacher" and visit.module
    ]
