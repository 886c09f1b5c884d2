"""One training step on tensors without memory: which bytes come and go, in their order.

    events = step_events(config, world_size=8, attention="sdpa")
    peak(events)              # bytes that forward, objectives and backward need beyond parameters and batch

The real model, objectives, activation checkpointing and micro-batches run under torch's FakeTensorMode, so there is no
formula to fall behind them. Of a tower of equal blocks three are run, and what the middle one does, forward and
backward, is repeated as often as the tower is deep: exact, and vtp_7b takes as long as vtp_s.

A parameter's gradient leaves when ZeRO takes it: at once, in a leaf of ZeRO-3 when the leaf is done, with micro-batches
at the end. Blocks are not compiled here, and a compiled one keeps less; FP8 products are taken for bf16. With
objectives.rec.mask the step is one of those whose sequence is longest. Kernels are the CPU's, because torch cannot
pretend to a CUDA device unless it was built for one: fused attention keeps the same on both (output and log-sum-exp),
and the chunks of the prototype losses are taken as large as on `device`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import Config
from data.batch import Batch
from engine.assemble import LEAVES
from engine.grad_cache import GradientCache
from engine.recompute import recompute_blocks
from engine.step import model_inputs
from engine.zero import DTYPES
from kernels import prototypes
from model.describe import longest_layout
from model.objectives.total import Centres, compute
from model.outputs import ClipOutputs, Outputs
from model.pretrainer import Pretrainer
from model.rows import Rows
from profiling.step.live_bytes import Event, LiveBytes
from profiling.step.pretend import Pretend, clip_outputs, corruption, fake, frozen_encoder, kept_idx, perceptual_network
from profiling.workload import imagined_batch

RUN = 3  # blocks of a tower that are run: the first, one for all in the middle, the last
FIRST = 0  # a block's number in its tower; from 1 on the events of one may be repeated
TOWERS = {"trunk": "trunk.blocks", "teacher": "teacher.trunk.blocks", "text": "text.resblocks",
          "decoder": "decoder.blocks"}  # fmt: skip
HEADS, OBJECTIVES, BACKWARD, GRADIENTS = "heads", "objectives", "backward", "kept gradients"
TEMPERATURE = 0.05  # of the teacher; no shape depends on it


@lru_cache(maxsize=64)
def step_events(
    config: Config,
    world_size: int,
    attention: str,
    device: str = "cpu",
    by_leaf: bool = True,
    batch: Batch | None = None,
    run: int = RUN,
    keeps: bool = False,
) -> tuple[Event, ...]:
    """Events of one rank's step, in order; up to the optimizer. Remembered for the last few configs.

    `attention` is "sdpa", for every fused backend, or "matmul", which keeps its scores. `batch`, a rank's own whose
    numbers do not matter, is made up if not given. `by_leaf`: gradients leave as under ZeRO-3; `keeps`: they stay
    to the end of backward, as they do with micro-batches. `run` blocks of a tower are run, all of them if it has no
    more.
    """
    rows, depths = Rows.per_rank(config, world_size), _depths(config)
    batch = imagined_batch(config, rows) if batch is None else batch
    is_collecting = gc.isenabled()
    gc.disable()  # what is in a cycle stays, as in a run (engine/garbage.py)
    try:
        with _chunks_of(device):
            step = _Step(_shallow(config, run), rows, attention, Pretend(world_size), by_leaf, keeps)
            events = step.take(batch)
    finally:
        if is_collecting:
            gc.enable()
    return tuple(_unrolled(events, {tower: max(1, depth - run + 1) for tower, depth in depths.items()}))


class _Step:
    """engine.step.train_step without an engine."""

    def __init__(self, config: Config, rows: Rows, attention: str, comm: Pretend, by_leaf: bool, keeps: bool) -> None:
        self.config, self.comm, self.live, self.mode = config, comm, LiveBytes(), FakeTensorMode()
        objectives, ssl = config.objectives, config.objectives.ssl
        with _dtype(config), self.mode:
            self.model = Pretrainer(config, rows, attention)
            self.perceptual = perceptual_network() if objectives.rec.weight and objectives.rec.perceptual else None
            self.frozen = frozen_encoder(config, attention)
            is_centred = ssl.weight > 0 and ssl.targets == "centering"
            self.centres = Centres.zeros(config.model.prototypes.num) if is_centred else None
            self.kept_idx = kept_idx(config, rows, longest_layout(config, rows))
        self.corruption = corruption(config, rows, longest_layout(config, rows))
        self.stood_for: dict[bool, tuple[torch.Size, torch.Size]] = {}
        recompute_blocks(self.model, config.system.activation_checkpointing, tuple(LEAVES))
        self.watch = _Watch(self.model, self.live, by_leaf, keeps or rows.micro_batches > 1)
        networks = [network for network in (self.model, self.perceptual, self.frozen) if network is not None]
        self.live.known(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))

    def take(self, batch: Batch) -> list[Event]:
        """Everything but the optimizer; the outputs are still there at the end, as they are in a run."""
        inputs = {name: fake(value, self.mode) for name, value in vars(batch).items() if name != "captions"}
        cache = GradientCache(Batch(**inputs, captions=batch.captions), self.model.rows, self._clip_alone)
        outputs = self._forward(cache.shared, kept_idx=self.kept_idx, corruption=fake(self.corruption, self.mode))
        with self.mode, self.live.on(OBJECTIVES):
            outputs = cache.complete(outputs)
            networks = (self.perceptual, self.frozen)
            losses = compute(outputs, self.config.objectives, TEMPERATURE, self.comm, self.centres, *networks)
        self._backward(losses.total)
        cache.replay(self._backward)
        self.watch.release()
        return list(self.live.events)

    def _clip_alone(self, part: Batch) -> ClipOutputs:
        """Parts are equal: the first without gradient, and the first with it, stand for all of their kind."""
        kind = torch.is_grad_enabled()
        if kind in self.stood_for:
            with self.mode, self.live.on(HEADS):
                return clip_outputs(*self.stood_for[kind])
        clip = self._forward(part, clip_only=True).clip
        assert clip is not None, "micro-batches are parts of the clip batch"
        self.stood_for[kind] = (clip.image_BE.shape, clip.text_BE.shape)
        return clip

    def _forward(self, part: Batch, **options: Any) -> Outputs:
        inputs = {name: fake(value, self.mode) for name, value in model_inputs(part, torch.device("cpu")).items()}
        with self.mode, self.live.on(HEADS):
            outputs: Outputs = self.model(**inputs, **options)
        return outputs

    def _backward(self, total: Tensor) -> None:
        with self.mode, self.live.on(BACKWARD):
            total.backward()


class _Watch:
    """Hooks that say who is running and where blocks begin, and take gradients away as ZeRO does, or keep them."""

    def __init__(self, model: Pretrainer, live: LiveBytes, by_leaf: bool, keeps: bool) -> None:
        self._live, self._waiting = live, list[Tensor]()
        self._kept: set[Tensor] = set()
        for name in TOWERS:
            tower = getattr(model, name)
            if tower is not None:
                tower.register_forward_pre_hook(partial(self._is_running, name))
                tower.register_forward_hook(partial(self._is_running, HEADS))
                for number, block in self._blocks(model, name):
                    block.register_forward_pre_hook(partial(self._enter, name, number))
                    block.register_forward_hook(partial(self._leave, name, number))
        leaves = [module for module in model.modules() if isinstance(module, tuple(LEAVES))]
        in_leaf = {parameter for leaf in leaves for parameter in leaf.parameters()} if by_leaf else set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                take = self._keep if keeps else partial(self._take, parameter in in_leaf)
                parameter.register_post_accumulate_grad_hook(take)

    @staticmethod
    def _blocks(model: Pretrainer, tower: str) -> list[tuple[int, nn.Module]]:
        """Numbered where one stands for others; of convolutions each is alone of its shape, and the first of none."""
        if model.model.conv is not None:
            inside: nn.Module = getattr(model, tower)
            return [(FIRST, leaf) for leaf in inside.modules() if isinstance(leaf, tuple(LEAVES))]
        blocks = model.get_submodule(TOWERS[tower])
        assert isinstance(blocks, nn.ModuleList)
        return list(enumerate(blocks))

    def release(self) -> None:
        """The leaf is done: its gradients go into the bucket."""
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting.clear()

    def _is_running(self, name: str, *_: Any) -> None:
        self._live.label = name

    def _enter(self, tower: str, number: int, *_: Any) -> None:
        self._live.mark("forward", tower, number)

    def _leave(self, tower: str, number: int, _module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._return, tower, number))

    def _return(self, tower: str, number: int, _gradient: Tensor) -> None:
        self._live.mark("backward", tower, number)
        self.release()

    def _take(self, waits: bool, parameter: Tensor) -> None:
        self._live.events.append(Event(self._live.label, gradient=parameter.numel()))
        if waits:
            self._waiting.append(parameter)
        else:
            parameter.grad = None

    def _keep(self, parameter: Tensor) -> None:
        """The first gradient of a parameter stays, and takes up what others add."""
        if parameter not in self._kept:
            self._kept.add(parameter)
            size = parameter.numel() * parameter.element_size()
            self._live.events += [Event(self._live.label, -size), Event(GRADIENTS, size)]


def _unrolled(events: list[Event], repeats: dict[str, int]) -> Iterator[Event]:
    """With the events of every middle block as often as there are middle blocks."""
    place = 0
    while place < len(events):
        end = place + 1
        kind, tower, number = events[place].mark or ("", "", 0)
        if number == 1 and repeats[tower] > 1:
            last = (kind, tower, 2 if kind == "forward" else 0)
            end = next(at for at in range(place, len(events)) if events[at].mark == last)
            yield from events[place:end] * (repeats[tower] - 1)
        yield from events[place:end]
        place = end


def _depths(config: Config) -> dict[str, int]:
    model = config.model
    if model.conv is not None:
        return {}
    return {"trunk": model.trunk.depth, "teacher": model.trunk.depth, "text": model.text.depth,
            "decoder": model.decoder.depth}  # fmt: skip


def _shallow(config: Config, run: int) -> Config:
    if config.model.conv is not None:
        return config
    towers = {name: getattr(config.model, name) for name in ("trunk", "text", "decoder")}
    fewer = {name: tower.model_copy(update={"depth": min(tower.depth, run)}) for name, tower in towers.items()}
    return config.model_copy(update={"model": config.model.model_copy(update=fewer)})


@contextmanager
def _dtype(config: Config) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.optim.precision])
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """The prototype losses take chunks as large as on `device`."""
    sizes = (prototypes.CHUNK_BYTES, prototypes.KEEP_BYTES)
    before = [size["cpu"] for size in sizes]
    try:
        for size in sizes:
            size["cpu"] = size[device]
        yield
    finally:
        for size, own in zip(sizes, before, strict=True):
            size["cpu"] = own
