"""What a step asks of a device: FLOPs by precision, bytes moved beside products, operations; component by component.

    for each in step_work(config, rows, Build(attention="flash", is_compiled=True), shards=256):
        each.name, each.products["bf16"], each.scores, each.bytes, each.operations

FLOPs are profiling/step/flops.py's, exact. Bytes are counted for the blocks (profiling/step/elementwise.py), for the
perceptual network, and for optimizer and EMA; edges, heads and losses move few beside them and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from configs import Config
from configs.architecture import Text, Vit
from configs.system import System
from kernels.fp8 import Linears
from model.block import swiglu_hidden
from model.describe import count_parameters, step_layout
from model.rows import Rows
from profiling.flops import Component
from profiling.step.elementwise import BlockTraffic, block_traffic
from profiling.step.flops import step_flops
from profiling.step.layer_flops import text_block, vit_block

FP8_GATE = Linears("fp8_torchao", "planned", is_gated_by_speed=True)
CAST_BYTES = 6  # an element of an FP8 product's operands: find the maximum, read, write (kernels/fp8.py's rule)
# Elements of VGG-16's feature maps for each pixel of the image, and how often forward and backward touch one.
VGG_MAPS, VGG_FORWARD, VGG_BACKWARD = 270, 4, 6
# A trained parameter: AdamW reads and writes three float32, reads the gradient, writes bf16; its norm, twice cast.
OPTIMIZER_BYTES, EMA_BYTES, AVERAGE_BYTES = 40, 14, 12


@dataclass(frozen=True)
class Build:
    """What the engine makes of the blocks."""

    attention: str
    is_compiled: bool
    device: str = "cuda"


@dataclass(frozen=True)
class Work:
    """One component of one rank's step."""

    name: str
    products: Mapping[str, float] = field(default_factory=dict)  # FLOPs by "bf16", "fp8", "tf32", "fp32"
    scores: float = 0  # FLOPs between tokens
    bytes: float = 0
    operations: float = 0
    blocks: float = 0  # passes through a block: each is one round of ZeRO-3's hooks


def step_work(
    config: Config, rows: Rows, build: Build, caption_tokens: float | None = None, shards: int = 1
) -> list[Work]:
    """Of one rank; optimizer and EMA work on one of `shards` parts of the parameters."""
    flops = step_flops(config, rows, caption_tokens, backend=build.attention, device=build.device)
    step, kinds = _Step(config, rows, build, caption_tokens), set[str]()
    found = []
    for component in flops.components:
        kind = component.name.partition(",")[0]
        found.append(step.work(component, is_first=kind not in kinds))  # groups of the trunk share its operations
        kinds.add(kind)
    return [*found, *_updates(config, rows, shards)]


def fp8_pays(config: Config, rows: Rows) -> bool:
    """Whether any product of the trunk's blocks is large enough."""
    tokens = step_layout(config, rows).tokens
    return any(FP8_GATE.obstacle(k, n, tokens) is None for k, n in _products(config.model.trunk))


@dataclass(frozen=True)
class _Step:
    config: Config
    rows: Rows
    build: Build
    caption_tokens: float | None

    def work(self, component: Component, is_first: bool) -> Work:
        parts: dict[str, tuple[Vit | Text, float]] = {
            "trunk": (self.config.model.trunk, step_layout(self.config, self.rows).tokens),
            "teacher": (self.config.model.trunk, 0),
            "decoder": (self.config.model.decoder, self._patches),
            "text": (self.config.model.text, self._caption_tokens),
        }
        kind = component.name.partition(",")[0]
        if kind in parts:
            return self._blocks(component, *parts[kind], is_first)
        is_cuda = self.build.device == "cuda"
        precision = {"perceptual": "tf32" if is_cuda else "fp32", "patch cosines": "fp32"}
        precision["contrastive logits"] = "bf16" if is_cuda else "fp32"
        flops = component.forward + component.backward + component.recompute
        if is_cuda and component.name == "contrastive logits":
            flops *= 3  # three bf16 products stand for one of float32 (kernels/contrastive_triton.py)
        moved = self._vgg_bytes if component.name == "perceptual" else 0
        return Work(component.name, {precision.get(component.name, self._precision): flops}, bytes=moved)

    def _blocks(self, component: Component, part: Vit | Text, tokens: float, is_first: bool) -> Work:
        """`tokens` of one pass decide what FP8 pays for; 0 keeps it off, as in the teacher."""
        linear = component.forward - component.scores
        traffic = block_traffic(part, self._precision, self.build.device if self.build.is_compiled else None)
        passes = self._passes(component)
        share, cast = self._fp8(part, tokens)
        all_scores = component.scores * (passes.forward + 2 * passes.backward)
        all_linear = component.forward + component.backward + component.recompute - all_scores
        token_blocks = linear / _linear_flops(part)
        blocks = part.depth * (passes.forward + passes.backward) if is_first else 0
        return Work(
            component.name,
            {self._precision: (1 - share) * all_linear, "fp8": share * all_linear},
            scores=all_scores,
            bytes=token_blocks * (_moved(traffic, passes) + cast),
            operations=part.depth * _operations(traffic, passes) if is_first else 0,
            blocks=blocks,
        )

    def _passes(self, component: Component) -> _Passes:
        if not component.backward:
            return _Passes(1, 0)
        again = self.config.system.activation_checkpointing != "off"
        is_cached = component.name in ("trunk, clip", "text")
        cached = (self.rows.micro_batches - 1) / self.rows.micro_batches if is_cached else 0
        return _Passes(1 + again + cached, 1)

    def _fp8(self, part: Vit | Text, tokens: float) -> tuple[float, float]:
        """Share of the linear FLOPs in FP8, and the bytes of the casts that go with a token and block."""
        if self.config.system.linear == "bf16" or not tokens:
            return 0.0, 0.0
        products = _products(part)
        chosen = [(k, n) for k, n in products if FP8_GATE.obstacle(k, n, int(tokens)) is None]
        share = sum(k * n for k, n in chosen) / sum(k * n for k, n in products)
        return share, CAST_BYTES * sum(k + n + k * n / tokens for k, n in chosen)

    @property
    def _precision(self) -> str:
        return self.config.optim.precision

    @property
    def _patches(self) -> float:
        return self.rows.rec * (self.config.views.image_size // self.config.model.patch_size) ** 2

    @property
    def _caption_tokens(self) -> float:
        return self.rows.clip * self.config.model.text.context if self.caption_tokens is None else self.caption_tokens

    @property
    def _vgg_bytes(self) -> float:
        """Both images forward, the reconstruction's backward, in float32."""
        elements = self.rows.rec * VGG_MAPS * self.config.views.image_size**2
        return 4 * elements * (2 * VGG_FORWARD + VGG_BACKWARD)


@dataclass(frozen=True)
class _Passes:
    forward: float
    backward: float


def _moved(traffic: BlockTraffic, passes: _Passes) -> float:
    return passes.forward * traffic.forward.bytes + passes.backward * traffic.backward.bytes


def _operations(traffic: BlockTraffic, passes: _Passes) -> float:
    return passes.forward * traffic.forward.operations + passes.backward * traffic.backward.operations


def _linear_flops(part: Vit | Text) -> float:
    """Of one token in one block."""
    return (vit_block(part, 1, 0, 1) if isinstance(part, Vit) else text_block(part, 1, 0)).forward


def _products(part: Vit | Text) -> list[tuple[int, int]]:
    """Inputs and outputs of each."""
    width = part.width
    if isinstance(part, Vit):
        hidden = swiglu_hidden(width, part.mlp_ratio)
        return [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]
    hidden = int(width * part.mlp_ratio)
    return [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]


def _updates(config: Config, rows: Rows, shards: int) -> Iterator[Work]:
    trained, frozen = _parameters(config.model_copy(update={"system": System()}), rows)
    yield Work("optimizer", bytes=trained / shards * OPTIMIZER_BYTES)
    averaged = 0 if config.ema is None else trained * AVERAGE_BYTES
    yield Work("EMA", bytes=(frozen * EMA_BYTES + averaged) / shards)


@lru_cache(maxsize=4)
def _parameters(config: Config, rows: Rows) -> tuple[int, int]:
    counts = count_parameters(config, rows)
    frozen = counts.get("teacher", 0)
    return sum(counts.values()) - frozen, frozen
