"""Trace one training step on tensors without memory: bytes allocated, freed and moved, operator by operator.

    events = trace_step(config, world_size=8, attention="sdpa")
    peak(events)                             # bytes that forward, losses and backward need beside parameters and batch
    events = trace_step(config, 8, "sdpa", with_traffic=True)
    sum(event.moved for event in events if event.phase == "trunk")

The real model, losses, activation checkpointing and gradient cache run under torch's FakeTensorMode, so no formula can
fall behind them. Of a tower of equal blocks three are run, and the events of the middle one, forward and backward, are
repeated for the tower's depth: exact, and vtp_7b takes as long as vtp_s.

Phases are those that a run times. A parameter's gradient leaves when ZeRO takes it: at once, in a leaf of ZeRO-3 when
the leaf is done, with micro-batches at the end. Blocks are not compiled here, and a compiled block keeps less; FP8
products are taken for bf16; collectives and ZeRO's own copies are not traced. Kernels are the CPU's, because torch
cannot pretend to have a CUDA device unless it was built for one: fused attention keeps the same on both (output and
log-sum-exp), and the chunks of the prototype losses are taken as large as on `device`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from configs import Config
from data.batch import Batch
from data.masking import num_masked_patches
from engine.block_transforms import checkpoint_activations
from engine.build import BLOCK_CLASSES, PHASE_OF_CHILD
from engine.grad_cache import GradientCache
from engine.step import model_inputs
from engine.zero import DTYPES
from kernels import prototypes
from model.describe import longest_step, step_layout
from model.frozen import FrozenNetwork, build_frozen_without_weights
from model.latent import RecNoise, has_rec_noise, num_patches
from model.losses.perceptual import CONVS_PER_TAP, LpipsDistance
from model.losses.total import TeacherCentres, compute_losses
from model.outputs import ClipOutputs, Outputs
from model.packing import RankBatchSizes, kept_segments
from model.pretrainer import Pretrainer
from profiling.cost.flops import VGG_CHANNELS
from profiling.cost.operator_trace import OTHER, OperatorTrace, TraceEvent, default_dtype

NUM_BLOCKS = 3  # of a tower that are run: the first, one for all in the middle, the last
TOWERS = {"trunk": "trunk.blocks", "teacher": "teacher.trunk.blocks", "text": "text.resblocks",
          "decoder": "decoder.blocks"}  # fmt: skip
OBJECTIVES, BACKWARD, GRADIENTS = "objectives", "backward", "kept gradients"
TEMPERATURE = 0.05  # of the teacher; no shape depends on it
MEAN_CAPTION, CAPTION_SIGMA = 20, 0.5  # tokens; log-normal, an assumption about web captions


@lru_cache(maxsize=64)
def trace_step(
    config: Config,
    world_size: int,
    attention: str,
    device: str = "cpu",
    by_leaf: bool = True,
    batch: Batch | None = None,
    num_blocks: int = NUM_BLOCKS,
    keeps_gradients: bool = False,
    num_unseen: int | None = None,
    with_traffic: bool = False,
) -> tuple[TraceEvent, ...]:
    """Events of one rank's step, in order, up to the optimizer. Cached for the last few configs.

    `attention`: "sdpa", for every fused backend, or "matmul", which keeps its scores. `batch`: the rank's own, of which
    only shapes and caption lengths matter (default: made up). `by_leaf`: gradients leave as under ZeRO-3;
    `keeps_gradients`: they stay to the end of backward, as with micro-batches. `num_blocks` of a tower are run, all if
    it has no more. `num_unseen`: patches of a rec image that the encoder does not see (default: those of the longest
    sequence). `with_traffic`: with the bytes that operators move.
    """
    rows, depths = RankBatchSizes.per_rank(config, world_size), _depths(config)
    batch = meta_batch(config, rows) if batch is None else batch
    num_unseen = longest_step(config, rows) if num_unseen is None else num_unseen
    is_collecting = gc.isenabled()
    gc.disable()  # what is in a cycle stays, as in a run (engine/process_settings.py)
    try:
        with _chunks_of(device):
            step = _TracedStep(_shallow(config, num_blocks), rows, attention, FakeComm(world_size), num_unseen,
                               OperatorTrace(with_traffic))  # fmt: skip
            step.record_blocks_and_gradients(by_leaf, keeps_gradients or rows.micro_batches > 1)
            events = step.run(batch, are_parts_alike=not with_traffic)
    finally:
        if is_collecting:
            gc.enable()
    return tuple(_unrolled(events, {tower: max(1, depth - num_blocks + 1) for tower, depth in depths.items()}))


class _TracedStep:
    """One training step on fake tensors: engine.step.train_step without an engine."""

    def __init__(
        self,
        config: Config,
        rows: RankBatchSizes,
        attention: str,
        comm: FakeComm,
        num_unseen: int,
        trace: OperatorTrace,
    ) -> None:
        self.config, self.comm, self.trace, self.mode = config, comm, trace, FakeTensorMode()
        objectives, ssl = config.objectives, config.objectives.ssl
        with default_dtype(DTYPES[config.optim.precision]), self.mode:
            self.model = Pretrainer(config, rows, attention)
            self.perceptual = perceptual_network() if objectives.rec.weight and objectives.rec.perceptual else None
            self.frozen = frozen_encoder(config, attention)
            is_centred = ssl.weight > 0 and ssl.targets == "centering"
            self.centres = TeacherCentres.zeros(config.model.prototypes.num) if is_centred else None
            self.kept_idx = _kept_idx(config, rows, num_unseen)
        self.corruption = _corruption(config, rows, num_unseen)
        self.replaced: dict[bool, tuple[torch.Size, torch.Size]] = {}
        self.waiting = list[Tensor]()  # gradients of the leaf whose backward runs
        checkpoint_activations(self.model, config.system.activation_checkpointing, tuple(BLOCK_CLASSES))
        networks = [network for network in (self.model, self.perceptual, self.frozen) if network is not None]
        trace.ignore(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))

    def run(self, batch: Batch, are_parts_alike: bool) -> list[TraceEvent]:
        """Everything but the optimizer; the outputs are still alive at the end, as in a run.

        `are_parts_alike`: the first micro-batch of each kind stands for all of its kind.
        """
        self.are_parts_alike = are_parts_alike
        inputs = {name: fake(value, self.mode) for name, value in vars(batch).items() if name != "captions"}
        cache = GradientCache.forward(Batch(**inputs, captions=batch.captions), self.model.rows, self._clip_alone)
        outputs = self._forward(cache.shared, kept_idx=self.kept_idx, rec_noise=fake(self.corruption, self.mode))
        with self.mode, self.trace.phase(OBJECTIVES):
            outputs = cache.complete(outputs)
            networks = (self.perceptual, self.frozen)
            losses = compute_losses(outputs, self.config.objectives, TEMPERATURE, self.comm, self.centres, *networks)
        self._backward(losses.total)
        cache.replay(self._backward)
        self._release()
        return list(self.trace.events)

    def _clip_alone(self, part: Batch) -> ClipOutputs:
        kind = torch.is_grad_enabled()
        if self.are_parts_alike and kind in self.replaced:
            with self.mode, self.trace.phase(OTHER):
                image_BE, text_BE = (torch.empty(shape, requires_grad=True) for shape in self.replaced[kind])
                return ClipOutputs(image_BE, text_BE, torch.empty(1), None)
        clip = self._forward(part, clip_only=True).clip
        assert clip is not None, "micro-batches are parts of the clip batch"
        self.replaced[kind] = (clip.image_BE.shape, clip.text_BE.shape)
        return clip

    def _forward(self, part: Batch, **options: Any) -> Outputs:
        inputs = {name: fake(value, self.mode) for name, value in model_inputs(part, torch.device("cpu")).items()}
        with self.mode, self.trace.phase(OTHER):
            outputs: Outputs = self.model(**inputs, **options)
        return outputs

    def _backward(self, total: Tensor) -> None:
        with self.mode, self.trace.phase(BACKWARD):
            total.backward()

    def record_blocks_and_gradients(self, by_leaf: bool, keeps_gradients: bool) -> None:
        """Hook the model: phases of its children, where blocks begin, and gradients, which ZeRO takes or keeps."""
        for name, phase in PHASE_OF_CHILD.items():
            child = getattr(self.model, name)
            if child is not None:
                child.register_forward_pre_hook(lambda *_, phase=phase: self.trace.begin(phase))
                child.register_forward_hook(self.trace.end)
                for number, block in self._blocks(name) if name in TOWERS else ():
                    block.register_forward_pre_hook(partial(self._begins, "forward", name, number))
                    block.register_forward_hook(partial(self._leaves, name, number))
        leaves = [module for module in self.model.modules() if isinstance(module, tuple(BLOCK_CLASSES))]
        in_leaf = {parameter for leaf in leaves for parameter in leaf.parameters()} if by_leaf else set()
        kept: set[Tensor] = set()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                take = partial(self._keep, kept) if keeps_gradients else partial(self._take, parameter in in_leaf)
                parameter.register_post_accumulate_grad_hook(take)

    def _blocks(self, tower: str) -> list[tuple[int, nn.Module]]:
        """Blocks and their numbers. Convolutional blocks differ in shape: all get number 0, which is never repeated."""
        if self.config.model.conv is not None:
            inside: nn.Module = getattr(self.model, tower)
            return [(0, leaf) for leaf in inside.modules() if isinstance(leaf, tuple(BLOCK_CLASSES))]
        blocks = self.model.get_submodule(TOWERS[tower])
        assert isinstance(blocks, nn.ModuleList)
        return list(enumerate(blocks))

    def _begins(self, kind: str, tower: str, number: int, *_: Any) -> None:
        self.trace.events.append(TraceEvent(self.trace.current, block=(kind, tower, number)))
        if kind == BACKWARD:
            self._release()

    def _leaves(self, tower: str, number: int, _module: Any, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._begins, BACKWARD, tower, number))

    def _take(self, waits: bool, parameter: Tensor) -> None:
        self.trace.events.append(TraceEvent(self.trace.current, gradient=parameter.numel()))
        if waits:
            self.waiting.append(parameter)
        else:
            parameter.grad = None

    def _release(self) -> None:
        for parameter in self.waiting:
            parameter.grad = None
        self.waiting.clear()

    def _keep(self, kept: set[Tensor], parameter: Tensor) -> None:
        """The first gradient of a parameter stays, and accumulates the others."""
        if parameter not in kept:
            kept.add(parameter)
            size = parameter.numel() * parameter.element_size()
            self.trace.events += [TraceEvent(self.trace.current, -size), TraceEvent(GRADIENTS, size)]


def _unrolled(events: list[TraceEvent], repeats: dict[str, int]) -> Iterator[TraceEvent]:
    """Repeat the events of every middle block as often as there are middle blocks."""
    at = 0
    while at < len(events):
        end = at + 1
        kind, tower, number = events[at].block or ("", "", 0)
        if number == 1 and repeats[tower] > 1:
            last = (kind, tower, 2 if kind == "forward" else 0)
            end = next(idx for idx in range(at, len(events)) if events[idx].block == last)
            yield from events[at:end] * (repeats[tower] - 1)
        yield from events[at:end]
        at = end


def _depths(config: Config) -> dict[str, int]:
    model = config.model
    if model.conv is not None:
        return {}
    return {"trunk": model.trunk.depth, "teacher": model.trunk.depth, "text": model.text.depth,
            "decoder": model.decoder.depth}  # fmt: skip


def _shallow(config: Config, num_blocks: int) -> Config:
    if config.model.conv is not None:
        return config
    towers = {name: getattr(config.model, name) for name in ("trunk", "text", "decoder")}
    fewer = {name: tower.model_copy(update={"depth": min(tower.depth, num_blocks)}) for name, tower in towers.items()}
    return config.model_copy(update={"model": config.model.model_copy(update=fewer)})


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


# --- stand-ins for the rest of a run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeComm:
    """A Comm (model/losses/comm.py) of `world_size` ranks of which only the first exists: right in its shapes."""

    world_size: int
    rank: int = 0

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """Without other ranks' gradients; memory is the same."""
        gathered: Tensor = x if self.world_size == 1 else _FakeGather.apply(x, self)
        return gathered

    def all_sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def all_max(self, x: Tensor) -> Tensor:
        return x.detach().clone()


class _FakeGather(torch.autograd.Function):
    """engine.distributed's gather, with nothing to wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: FakeComm) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty((comm.world_size * len(x), *x.shape[1:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_empty((ctx.rows, *grad.shape[1:])), None


def perceptual_network() -> LpipsDistance:
    """LPIPS in the published shapes, its weights empty."""
    channels = [width for width, count in zip(VGG_CHANNELS, CONVS_PER_TAP, strict=True) for _ in range(count)]
    weights: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip([3, *channels], channels, strict=False)):
        weights |= {f"convs.{i}.weight": torch.empty(after, before, 3, 3), f"convs.{i}.bias": torch.empty(after)}
    heads = {f"heads.{j}.weight": torch.empty(1, width, 1, 1) for j, width in enumerate(VGG_CHANNELS)}
    return LpipsDistance({key: value.float() for key, value in (weights | heads).items()})


def frozen_encoder(config: Config, attention: str) -> FrozenNetwork | None:
    """The encoder of objectives.rec.align without its weights file; None without the section."""
    align = config.objectives.rec.align
    return None if align is None else build_frozen_without_weights(align, attention)


def _kept_idx(config: Config, rows: RankBatchSizes, num_unseen: int) -> Tensor | None:
    """The draw of stochastic depth, (depth, 2, kept segments); None without."""
    trunk = config.model.trunk
    if config.model.conv is not None or not trunk.drop_path:
        return None
    kept = kept_segments(step_layout(config, rows, num_unseen).segments, trunk.drop_path).segments
    return torch.zeros(trunk.depth, 2, sum(count for count, _ in kept), dtype=torch.int64)


def _corruption(config: Config, rows: RankBatchSizes, num_unseen: int) -> RecNoise | None:
    """A step's mask and noise for rec; None without."""
    if not has_rec_noise(config):
        return None
    num_visible, rec = num_patches(config) - num_unseen, config.objectives.rec
    normals = torch.zeros(rows.rec, num_visible, config.model.latent_channels, dtype=torch.float32)
    is_noisy = rec.noise.kind != "none"
    return RecNoise(
        None if rec.mask is None else torch.zeros(rows.rec, num_visible, dtype=torch.int64),
        normals if config.model.latent == "gaussian" else None,
        normals[:, 0, 0].clone() if is_noisy else None,
        normals.clone() if is_noisy else None,
    )


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Every tensor, alone or in a named tuple, as a fake one on the CPU."""
    if isinstance(value, FakeTensor):
        return value
    if isinstance(value, Tensor):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype)
    return type(value)(*(fake(part, mode) for part in value)) if hasattr(value, "_fields") else value


def meta_batch(config: Config, rows: RankBatchSizes, captions: Tensor | None = None) -> Batch:
    """A batch of `rows` with pixels on the meta device, and captions as long as the web's unless given."""
    views, context = config.views, config.model.text.context
    patches = (views.global_size // config.model.patch_size) ** 2

    def pixels(count: int, size: int) -> Tensor:
        return torch.empty(count, 3, size, size, dtype=torch.uint8, device="meta")

    generator = torch.Generator().manual_seed(0)
    if captions is None:
        captions = random_captions(rows.clip, context, config.model.text.vocab, generator)
    return Batch(
        images=pixels(rows.clip, views.image_size),
        captions=captions,
        global_crops=pixels(2 * rows.ssl, views.global_size),
        local_crops=pixels(views.num_locals * rows.ssl, views.local_size),
        masks=torch.empty(2 * rows.ssl, patches, dtype=torch.bool, device="meta"),
        masked_idx=torch.empty(num_masked_patches(config, rows.ssl), dtype=torch.int64, device="meta"),
        step=0,
        keys=(),
    )


def random_captions(count: int, context: int, vocab: int, generator: torch.Generator) -> Tensor:
    """(count, context) int64: random words, as many as captions of the web have; end-of-text is vocab - 1."""
    mean_of_log = math.log(MEAN_CAPTION) - CAPTION_SIGMA**2 / 2
    drawn = torch.empty(count).log_normal_(mean_of_log, CAPTION_SIGMA, generator=generator)
    lengths = drawn.round().clamp(3, context).long().unsqueeze(1)
    slot_C = torch.arange(context)
    words = torch.randint(1, vocab - 1, (count, context), generator=generator)
    captions = torch.where(slot_C < lengths - 1, words, 0)
    return captions.masked_fill(slot_C == lengths - 1, vocab - 1)
