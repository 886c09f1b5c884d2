"""How long a step takes, from what it computes, moves and sends, and how fast the device is: the planner's time model.

    work = step_work(config, rows, ExecutionMode("flash3", is_compiled=True), flops, shards=256)
    time = step_time(work, rates_of("h100"), collectives, links, world_size=256)
    time.seconds, time.compute, time.exposed, time.host

    compute   = sum over components of  FLOPs / products  +  scores / attention  +  bytes / memory
    host      = operations * operation + passes through blocks * block_hooks
    exposed   = what waits  +  max(0, what does not wait - 0.8 compute)      (collectives)
    step      = max(compute, host) + exposed        on a GPU, where the host goes ahead
              = compute + operations * operation + all collectives               on a CPU

FLOPs are those of profiling/cost/step_flops.py, collectives of profiling/cost/communication.py. Bytes are counted for
the blocks (profiling/cost/block_traffic.py), the perceptual network, optimizer and EMA; edges, heads and losses move
few beside them. Kernels of a component run one after the other. Left out: waiting for data, decoding on the GPU,
stragglers, collectives that slow the products beside them, reports and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from configs import Config
from configs.model import Text, Vit
from configs.run import System
from kernels.fp8 import LinearBackend
from model.block import swiglu_hidden
from model.describe import count_parameters, step_layout
from model.packing import RankBatchSizes
from profiling.cost.block_traffic import block_traffic
from profiling.cost.communication import Collective
from profiling.cost.flops import FlopsComponent, StepFlops, text_block, vit_block
from profiling.plan.rates import DeviceRates, NetworkLinks

HIDDEN_BY = 0.8  # fraction of compute beside which collectives can run [assumed]
FP8_GATE = LinearBackend("fp8_torchao", "planned", is_gated_by_speed=True)
CAST_BYTES = 6  # an element of an FP8 product's operands: find the maximum, read, write (kernels/fp8.py's rule)
# Elements of VGG-16's feature maps for each pixel of the image, and how often forward and backward touch one.
VGG_MAPS, VGG_FORWARD, VGG_BACKWARD = 270, 4, 6
# A trained parameter: AdamW reads and writes three float32, reads the gradient, writes bf16; its norm, twice cast.
OPTIMIZER_BYTES, EMA_BYTES, AVERAGE_BYTES = 40, 14, 12


@dataclass(frozen=True)
class ExecutionMode:
    """How the engine runs the blocks."""

    attention: str
    is_compiled: bool
    device: str = "cuda"


@dataclass(frozen=True)
class ComponentWork:
    """FLOPs, bytes and operations of one component of one rank's step."""

    name: str
    products: Mapping[str, float] = field(default_factory=dict)  # FLOPs by "bf16", "fp8", "tf32", "fp32"
    scores: float = 0  # FLOPs of attention's two products
    bytes: float = 0
    operations: float = 0
    blocks: float = 0  # passes through a block: each is one round of ZeRO-3's hooks


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `communication` is all of it, `exposed` what the device waits for."""

    compute: float
    host: float
    communication: float
    exposed: float
    seconds: float

    @property
    def limit(self) -> str:
        """What a faster step would have to shorten."""
        if self.exposed > max(self.compute, self.host):
            return "communication"
        return "host" if self.host > self.compute else "compute"


def step_time(
    work: Sequence[ComponentWork],
    rates: DeviceRates,
    collectives: Sequence[Collective],
    links: NetworkLinks | None,
    world_size: int,
) -> StepTime:
    """Predict the time of one rank's step. Without `links` nothing is sent."""
    compute = sum(component_seconds(each, rates) for each in work)
    host = sum(each.operations for each in work) * rates.operation
    host += sum(each.blocks for each in work) * rates.block_hooks
    sent = {False: 0.0, True: 0.0}  # by whether computing waits for it
    for each in collectives if links is not None else ():
        assert links is not None
        sent[each.waits] += links.seconds(each.wire_bytes(world_size), each.num_messages, each.ranks(world_size))
    everything = sent[False] + sent[True]
    if not rates.is_asynchronous:
        return StepTime(compute, host, everything, everything, compute + host + everything)
    exposed = sent[True] + max(0.0, sent[False] - HIDDEN_BY * compute)
    return StepTime(compute, host, everything, exposed, max(compute, host) + exposed)


def component_seconds(work: ComponentWork, rates: DeviceRates) -> float:
    """Seconds of one component on the device."""
    products = sum(flops / rates.products[precision] for precision, flops in work.products.items() if flops)
    return products + work.scores / rates.attention + work.bytes / rates.memory


def step_work(
    config: Config, rows: RankBatchSizes, mode: ExecutionMode, flops: StepFlops, caption_tokens: float | None = None,
    shards: int = 1,
) -> list[ComponentWork]:  # fmt: skip
    """Work of one rank, whose step computes `flops`; optimizer and EMA work on one of `shards` parts of the
    parameters."""
    step, kinds, work = _StepWork(config, rows, mode, caption_tokens), set[str](), []
    for component in flops.components:
        kind = component.name.partition(",")[0]
        work.append(step.of(component, is_first=kind not in kinds))  # groups of the trunk share its operations
        kinds.add(kind)
    return [*work, *_updates(config, rows, shards)]


def fp8_pays(config: Config, rows: RankBatchSizes) -> bool:
    """Whether any product of the trunk's blocks is large enough for FP8 to be faster."""
    tokens = step_layout(config, rows).tokens
    return any(FP8_GATE.why_not_fp8(k, n, tokens) is None for k, n in _linear_shapes(config.model.trunk))


@dataclass(frozen=True)
class _StepWork:
    config: Config
    rows: RankBatchSizes
    mode: ExecutionMode
    caption_tokens: float | None

    def of(self, component: FlopsComponent, is_first: bool) -> ComponentWork:
        model, rows, image_size = self.config.model, self.rows, self.config.views.image_size
        captions = rows.clip * model.text.context if self.caption_tokens is None else self.caption_tokens
        towers: dict[str, tuple[Vit | Text, float]] = {  # with the tokens of one pass
            "trunk": (model.trunk, step_layout(self.config, rows).tokens),
            "teacher": (model.trunk, 0),
            "decoder": (model.decoder, rows.rec * (image_size // model.patch_size) ** 2),
            "text": (model.text, captions),
        }
        kind = component.name.partition(",")[0]
        if kind in towers:
            return self._blocks(component, *towers[kind], is_first)
        is_cuda = self.mode.device == "cuda"
        precision = {"perceptual": "tf32" if is_cuda else "fp32", "patch cosines": "fp32"}
        precision["contrastive logits"] = "bf16" if is_cuda else "fp32"
        flops = component.forward + component.backward + component.recompute
        if is_cuda and component.name == "contrastive logits":
            flops *= 3  # three bf16 products stand for one of float32 (kernels/contrastive_triton.py)
        # VGG in float32: both images forward, the reconstruction's backward.
        elements = rows.rec * VGG_MAPS * image_size**2 if component.name == "perceptual" else 0
        moved = 4 * elements * (2 * VGG_FORWARD + VGG_BACKWARD)
        name = component.name
        return ComponentWork(name, {precision.get(name, self.config.optim.precision): flops}, bytes=moved)

    def _blocks(self, component: FlopsComponent, part: Vit | Text, tokens: float, is_first: bool) -> ComponentWork:
        """`tokens` of one pass decide which products FP8 makes faster; 0 keeps it off, as in the teacher."""
        precision = self.config.optim.precision
        traffic = block_traffic(part, precision, self.mode.device if self.mode.is_compiled else None)
        forwards, backwards = self._passes(component)
        fp8, cast = self._fp8(part, tokens)
        scores = component.scores * (forwards + 2 * backwards)
        linear = component.forward + component.backward + component.recompute - scores
        one_token = (vit_block(part, 1, 0, 1) if isinstance(part, Vit) else text_block(part, 1, 0)).forward
        moved = forwards * traffic.forward.bytes + backwards * traffic.backward.bytes
        operations = forwards * traffic.forward.operations + backwards * traffic.backward.operations
        return ComponentWork(
            component.name,
            {precision: (1 - fp8) * linear, "fp8": fp8 * linear},
            scores=scores,
            bytes=(component.forward - component.scores) / one_token * (moved + cast),
            operations=part.depth * operations if is_first else 0,
            blocks=part.depth * (forwards + backwards) if is_first else 0,
        )

    def _passes(self, component: FlopsComponent) -> tuple[float, float]:
        """Forward and backward passes through each block."""
        if not component.backward:
            return 1, 0
        again = self.config.system.activation_checkpointing != "off"
        is_cached = component.name in ("trunk, clip", "text")
        cached = (self.rows.micro_batches - 1) / self.rows.micro_batches if is_cached else 0
        return 1 + again + cached, 1

    def _fp8(self, part: Vit | Text, tokens: float) -> tuple[float, float]:
        """Fraction of the linear FLOPs in FP8, and the bytes of the casts for a token and block."""
        if self.config.system.linear == "bf16" or not tokens:
            return 0.0, 0.0
        shapes = _linear_shapes(part)
        chosen = [(k, n) for k, n in shapes if FP8_GATE.why_not_fp8(k, n, int(tokens)) is None]
        fraction = sum(k * n for k, n in chosen) / sum(k * n for k, n in shapes)
        return fraction, CAST_BYTES * sum(k + n + k * n / tokens for k, n in chosen)


def _linear_shapes(part: Vit | Text) -> list[tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a block."""
    width, is_vit = part.width, isinstance(part, Vit)
    hidden = swiglu_hidden(width, part.mlp_ratio) if is_vit else int(width * part.mlp_ratio)
    return [(width, 3 * width), (width, width), (width, 2 * hidden if is_vit else hidden), (hidden, width)]


def _updates(config: Config, rows: RankBatchSizes, shards: int) -> Iterator[ComponentWork]:
    trained, frozen = _parameters(config.model_copy(update={"system": System()}), rows)
    yield ComponentWork("optimizer", bytes=trained / shards * OPTIMIZER_BYTES)
    averaged = 0 if config.ema is None else trained * AVERAGE_BYTES
    yield ComponentWork("EMA", bytes=(frozen * EMA_BYTES + averaged) / shards)


@lru_cache(maxsize=4)
def _parameters(config: Config, rows: RankBatchSizes) -> tuple[int, int]:
    counts = count_parameters(config, rows)
    frozen = counts.get("teacher", 0)
    return sum(counts.values()) - frozen, frozen
