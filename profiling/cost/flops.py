"""FLOPs of matrix products: the table of a step, and formulas for each layer the models are built of.

    flops = step_flops(config, rows)      # profiling/cost/step_flops.py: which layers see how many tokens
    flops.model_flops                     # forward + backward, each product once: the numerator of MFU
    flops.hardware_flops                  # with recomputation: the numerator of HFU
    vit_block(Vit(width=1024, depth=24, heads=16), *tokens_and_squares(64, 257), 64 * 257).forward
    tokenizer_flops(config, 256)          # ViT-L: 324.1e9; without attention products 311.1e9

Conventions of torch.utils.flop_counter, the oracle of every test: a multiply-add is two FLOPs; matrix products and
convolutions count, elementwise work (norms, RoPE, gates, softmax, optimizer, EMA) and matrix-vector products do not.
Attention counts all scores, masked ones included. What a fused kernel recomputes internally is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.table import Table

from configs import Config
from configs.generator import Autoregressive, Diffusion, Generator
from configs.model import Conv, Model, Prototypes, Text, Vit
from configs.schema import AlignmentConfig
from model.block import swiglu_hidden
from model.conv import conv_section, level_channels
from model.frozen import DINOV2_MLP_RATIO
from model.generator.autoregressive import num_head_rows
from model.generator.blocks import TIME_FREQUENCIES
from model.generator.ddpm import outputs_per_number
from model.generator.tokens import LatentShape, max_visible
from model.latent import feature_width, moment_channels
from model.losses.perceptual import CONVS_PER_TAP
from model.packing import ALIGN

PASSES = ("forward", "backward", "recompute", "saved")
VGG_CHANNELS = (64, 128, 256, 512, 512)  # of each LPIPS tap: VGG-16


@dataclass(frozen=True)
class FlopsComponent:
    """FLOPs of one part of the step on one rank."""

    name: str
    objective: str  # clip, ssl, rec, or "shared"
    forward: float
    backward: float = 0
    recompute: float = 0  # computed a second time: checkpointing, first passes of micro-batches, logits not kept
    saved: float = 0  # what forward and backward would take more if nothing were left out; padding can make it negative
    scores: float = 0  # the part of `forward` that is attention's two products
    before_backward: float = 0  # the part of `backward` and `recompute` that runs before the backward pass begins

    def __add__(self, other: FlopsComponent) -> FlopsComponent:
        assert (self.name, self.objective) == (other.name, other.objective)
        return replace(self, **{key: getattr(self, key) + getattr(other, key) for key in _NUMBERS})

    def __mul__(self, factor: float) -> FlopsComponent:
        return replace(self, **{key: factor * getattr(self, key) for key in _NUMBERS})


_NUMBERS = tuple(field.name for field in fields(FlopsComponent))[2:]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step of one rank; `savings` splits what was saved by its cause."""

    components: tuple[FlopsComponent, ...]
    savings: dict[str, float]

    @classmethod
    def of(cls, parts: Iterable[FlopsComponent], savings: dict[str, float]) -> StepFlops:
        """Sum parts of the same name, in the order of their first; drop those without FLOPs."""
        by_name: dict[str, FlopsComponent] = {}
        for part in parts:
            by_name[part.name] = by_name[part.name] + part if part.name in by_name else part
        present = tuple(c for c in by_name.values() if any(getattr(c, key) for key in PASSES))
        return cls(present, {cause: saved for cause, saved in savings.items() if saved})

    def total(self, key: str) -> float:
        """Sum of one column over all components; `key` is one of PASSES."""
        return math.fsum(getattr(component, key) for component in self.components)

    @property
    def model_flops(self) -> float:
        """Forward and backward, each product once."""
        return self.total("forward") + self.total("backward")

    @property
    def hardware_flops(self) -> float:
        """What the device computes: model FLOPs and recomputation."""
        return self.model_flops + self.total("recompute")

    @property
    def full_flops(self) -> float:
        """What the step would take if nothing were left out."""
        return self.model_flops + self.total("saved")

    def __getitem__(self, name: str) -> FlopsComponent:
        return next(component for component in self.components if component.name == name)

    def by_objective(self) -> dict[str, float]:
        """Model FLOPs of clip, ssl, rec, and of what they share."""
        sums = dict.fromkeys((component.objective for component in self.components), 0.0)
        for component in self.components:
            sums[component.objective] += component.forward + component.backward
        return sums

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        components = [asdict(component) for component in self.components]
        return {
            "components": [{k: v for k, v in each.items() if k != "before_backward"} for each in components],
            "savings": self.savings,
            "by_objective": self.by_objective(),
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "full_flops": self.full_flops,
        }

    def as_table(self) -> Table:
        """In GFLOP; the last column is the fraction of the model FLOPs."""
        table = Table(title="GFLOP of one step of one rank", title_justify="left", show_footer=True)
        table.add_column("component", footer="sum", no_wrap=True)
        table.add_column("objective")
        for key in PASSES:
            table.add_column(key, footer=_giga(self.total(key)), justify="right")
        table.add_column("share", justify="right")
        for component in self.components:
            numbers = [_giga(getattr(component, key)) for key in PASSES]
            share = (component.forward + component.backward) / self.model_flops
            table.add_row(component.name, component.objective, *numbers, f"{share:.1%}")
        return table


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops else ""


# --- products ---------------------------------------------------------------------------------------------------------


def linear(rows: float, fan_in: int, fan_out: int) -> float:
    """(rows, fan_in) @ (fan_in, fan_out)."""
    return 2 * rows * fan_in * fan_out


def attention(squares: float, width: int) -> float:
    """q k^T and p v of all heads; `squares` is the sum of length^2 over segments, `width` that of all heads."""
    return 4 * squares * width


def convolution(positions: float, channels_in: int, channels_out: int, side: int) -> float:
    """A side x side kernel at so many output positions."""
    return linear(positions, channels_in * side**2, channels_out)


def tokens_and_squares(segments: float, length: int) -> tuple[float, float]:
    """Tokens of equally long segments, and the sum of length^2."""
    return segments * length, segments * length**2


# --- transformers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one transformer block, in the order of its products."""

    first: float  # all linear layers but the last
    scores: float  # attention's two products
    last: float  # the layer whose result only the residual sum reads

    @property
    def forward(self) -> float:
        """FLOPs of one pass."""
        return self.first + self.scores + self.last

    def again(self, checkpointing: str, backend: str, last_is_kept: bool) -> float:
        """FLOPs that backward recomputes. Recomputation stops at the last value that backward needs: the result of
        the last product is none, unless a layer scale or an index follows it."""
        if checkpointing == "full":
            return self.first + self.scores + (0 if last_is_kept else self.last)
        return self.scores if checkpointing == "selective" and backend == "matmul" else 0


def vit_block(vit: Vit, tokens: float, squares: float, mlp_tokens: float) -> BlockFlops:
    """A block of trunk or decoder over `tokens`, of which `mlp_tokens` pass its MLP."""
    hidden = swiglu_hidden(vit.width, vit.mlp_ratio)
    first = linear(tokens, vit.width, 4 * vit.width) + linear(mlp_tokens, vit.width, 2 * hidden)
    return BlockFlops(first, attention(squares, vit.width), linear(mlp_tokens, hidden, vit.width))


def text_block(text: Text, tokens: float, squares: float) -> BlockFlops:
    """A block of the text tower; `squares` is the sum of width^2 over rows, masked scores included."""
    hidden = int(text.width * text.mlp_ratio)
    first = linear(tokens, text.width, 4 * text.width + hidden)
    return BlockFlops(first, attention(squares, text.width), linear(tokens, hidden, text.width))


def patch_edge(model: Model, width: int, patches: float) -> float:
    """The layer between the pixels of a patch and `width`, in either direction."""
    return linear(patches, 3 * model.patch_size**2, width)


def prototype_mlp(head: Prototypes, width: int, rows: int) -> float:
    """The prototype head's MLP on `rows` features of `width`; logits are not in it."""
    inner = (head.layers - 2) * linear(rows, head.hidden, head.hidden)
    return linear(rows, width, head.hidden) + inner + linear(rows, head.hidden, head.bottleneck)


def frozen_encoder_flops(align: AlignmentConfig, rows: int, image_size: int, patches: int) -> FlopsComponent:
    """The frozen encoder of objectives.rec.align, forward only, on `rows` images whose latents have `patches` cells.

    DINOv2 sees as many patches, a trunk those of its own patch size, in a padded sequence.
    """
    is_trunk, vit = align.kind == "trunk", align.encoder
    own = (image_size // align.patch_size) ** 2 if is_trunk else patches
    tokens, squares = tokens_and_squares(rows, 1 + align.registers + own)
    tokens += -tokens % ALIGN if is_trunk else 0
    block = vit_block(vit, tokens, squares, tokens if is_trunk else 0)
    forward = block.forward if is_trunk else block.forward + 2 * linear(tokens, vit.width, DINOV2_MLP_RATIO * vit.width)
    edge = linear(rows * own, 3 * align.patch_size**2, vit.width)
    return FlopsComponent("frozen encoder", "rec", vit.depth * forward + edge, scores=vit.depth * block.scores)


# --- convolutions: model/conv.py, VGG-16 and LPIPS --------------------------------------------------------------------


@dataclass(frozen=True)
class ConvFlops:
    """Forward FLOPs of one convolutional tower on one image, and the parts that matter to backward."""

    forward: float
    edge: float  # the first convolution; the encoder's is of pixels, which have no gradient
    again: float  # what backward recomputes if it keeps nothing of a residual block
    scores: float  # attention's two products


@dataclass(frozen=True)
class _ResBlockFlops:
    shortcut: float
    conv1: float
    conv2: float

    @property
    def forward(self) -> float:
        return self.shortcut + self.conv1 + self.conv2


def conv_encoder(model: Model, size: int) -> ConvFlops:
    """The encoder on an image of `size` px; f16 with 128 channels and 64 Gaussian latent channels at 256 px: 269e9."""
    widths = level_channels(conv_section(model))
    edge = convolution(size**2, 3, widths[0], 3)
    last = convolution((size // model.patch_size) ** 2, widths[-1], feature_width(model), 3)
    levels = list(zip([widths[0], *widths], widths, strict=False))
    return _conv_tower(model, size, levels, extra_blocks=0, ends=(edge, last))


def conv_decoder(model: Model, size: int) -> ConvFlops:
    """The decoder to an image of `size` px."""
    widths, positions = level_channels(conv_section(model))[::-1], (size // model.patch_size) ** 2
    latents = model.latent_channels
    edge = linear(positions, latents, latents) + convolution(positions, latents, widths[0], 3)
    levels = list(zip([widths[0], *widths], widths, strict=False))[::-1]
    return _conv_tower(model, size, levels, extra_blocks=1, ends=(edge, convolution(size**2, widths[-1], 3, 3)))


def _conv_tower(
    model: Model, size: int, levels: list[tuple[int, int]], extra_blocks: int, ends: tuple[float, float]
) -> ConvFlops:
    """`levels` are (channels in, channels) from the highest resolution down; between two levels is a resampling, a
    convolution at half the upper resolution in the encoder, at the upper one in the decoder (extra_blocks=1)."""
    conv, lowest = conv_section(model), level_channels(conv_section(model))[-1]
    num_blocks, positions = conv.num_res_blocks + extra_blocks, (size // model.patch_size) ** 2
    blocks = [*_res_blocks(levels, size, num_blocks), *[_res_block(positions, lowest, lowest)] * 2]
    attending = [(positions, lowest), *_attending(levels, size, num_blocks, conv)]
    scores = sum(attention(length**2, channels) for length, channels in attending)
    attended = scores + sum(linear(length, channels, 4 * channels) for length, channels in attending)
    resamplings = 0.0
    for depth in range(len(levels) - 1):
        channels = levels[depth + extra_blocks][1]
        resamplings += convolution((size // 2 ** (depth + 1 - extra_blocks)) ** 2, channels, channels, 3)
    return ConvFlops(
        forward=sum(block.forward for block in blocks) + attended + resamplings + sum(ends),
        edge=ends[0],
        again=sum(block.shortcut + block.conv1 for block in blocks),
        scores=scores,
    )


def _res_blocks(levels: list[tuple[int, int]], size: int, num_blocks: int) -> Iterator[_ResBlockFlops]:
    for depth, (before, channels) in enumerate(levels):
        positions = (size // 2**depth) ** 2
        yield _res_block(positions, before, channels)
        yield from [_res_block(positions, channels, channels)] * (num_blocks - 1)


def _attending(levels: list[tuple[int, int]], size: int, num_blocks: int, conv: Conv) -> Iterator[tuple[int, int]]:
    """(positions, channels) of the attention behind every block of the lowest levels."""
    for depth in range(len(levels) - conv.attention_levels, len(levels)):
        yield from [((size // 2**depth) ** 2, levels[depth][1])] * num_blocks


def _res_block(positions: int, before: int, channels: int) -> _ResBlockFlops:
    return _ResBlockFlops(
        shortcut=convolution(positions, before, channels, 1) if before != channels else 0,
        conv1=convolution(positions, before, channels, 3),
        conv2=convolution(positions, channels, channels, 3),
    )


def perceptual_parameters() -> int:
    """Parameters of VGG-16's convolutions and LPIPS's heads, all float32: 14.7 million."""
    count, channels_in = sum(VGG_CHANNELS), 3
    for convolutions, channels in zip(CONVS_PER_TAP, VGG_CHANNELS, strict=True):
        for _ in range(convolutions):
            count += (9 * channels_in + 1) * channels
            channels_in = channels
    return count


def perceptual_forward(size: int) -> tuple[float, float]:
    """VGG-16's convolutions on one image of `size` px, and LPIPS's heads on one pair."""
    vgg, heads, channels_in = 0.0, 0.0, 3
    for tap, (count, channels) in enumerate(zip(CONVS_PER_TAP, VGG_CHANNELS, strict=True)):
        positions = (size // 2**tap) ** 2
        vgg += convolution(positions, channels_in, channels, 3)
        vgg += (count - 1) * convolution(positions, channels, channels, 3)
        heads += convolution(positions, channels, 1, 1)
        channels_in = channels
    return vgg, heads


# --- whole models -----------------------------------------------------------------------------------------------------


def tokenizer_flops(config: Config, image_size: int, with_attention_products: bool = True) -> float:
    """Encoder, bottleneck and decoder on one image of `image_size` px: what a user of the weights computes.

    Published figures leave the two attention products out (docs/recipe.md, "Counting FLOPs").
    """
    model, patches = config.model, (image_size // config.model.patch_size) ** 2
    if model.conv is not None:
        towers = conv_encoder(model, image_size), conv_decoder(model, image_size)
        between = linear(patches, feature_width(model), moment_channels(model))
        return between + sum(each.forward - (0 if with_attention_products else each.scores) for each in towers)
    total = 0.0
    ends = ((model.trunk, 1 + model.registers + patches, moment_channels(model)),
            (model.decoder, patches, model.latent_channels))  # fmt: skip
    for vit, length, channels in ends:
        block = vit_block(vit, length, length**2, length)
        total += vit.depth * (block.forward - (0 if with_attention_products else block.scores))
        total += patch_edge(model, vit.width, patches) + linear(patches, vit.width, channels)
    return total


def generator_flops(section: Generator, shape: LatentShape, num_classes: int, batch: int) -> float:
    """Forward FLOPs of a generator over `batch` latents; a training step takes three times as many.

    LightningDiT-XL/1 on (32, 16, 16): 237.3e9. MAR-B on (16, 16, 16): 145.2e9, 43 % of them in the diffusion head,
    which sees each hidden token at four noise levels. Classes are looked up, not multiplied: `num_classes` costs
    nothing.
    """
    if not isinstance(section, Autoregressive):
        return _diffusion(section, shape, batch)
    rows, columns = shape.grid(section.patch)
    tokens, numbers = rows * columns, shape.channels * section.patch**2
    backbone = _masked if section.order == "masked" else _causal
    return batch * (backbone(section, numbers, tokens) + _diffusion_head(section, numbers, tokens))


def _diffusion(section: Diffusion, shape: LatentShape, batch: int) -> float:
    rows, columns = shape.grid(section.patch)
    tokens, width, numbers = batch * rows * columns, section.width, shape.channels * section.patch**2
    if section.mlp == "swiglu":
        mlp = 3 * linear(tokens, width, swiglu_hidden(width, section.mlp_ratio))
    else:
        mlp = 2 * linear(tokens, width, int(width * section.mlp_ratio))
    modulation, projections = linear(batch, width, 6 * width), linear(tokens, width, 4 * width)
    block = modulation + projections + attention(batch * (rows * columns) ** 2, width) + mlp
    ends = linear(tokens, numbers, width) + linear(batch, width, 2 * width)
    ends += linear(tokens, width, outputs_per_number(section) * numbers)
    time = linear(batch, TIME_FREQUENCIES, width) + linear(batch, width, width)
    return section.depth * block + ends + time


def _masked(section: Autoregressive, numbers: int, tokens: int) -> float:
    """MAR's backbone on one sample: the encoder over known tokens, the decoder over all."""
    known, half = max_visible(tokens, section.mask_ratio), section.depth // 2
    encoder, decoder = (_backbone_block(section, section.buffer + held) for held in (known, tokens))
    embeddings = linear(known, numbers, section.width) + linear(section.buffer + known, section.width, section.width)
    return embeddings + half * (encoder + decoder)


def _causal(section: Autoregressive, numbers: int, tokens: int) -> float:
    block = _backbone_block(section, section.buffer + tokens - 1)
    return linear(tokens - 1, numbers, section.width) + section.depth * block


def _backbone_block(section: Autoregressive, length: int) -> float:
    """Of one sample; scores that a causal mask hides are counted."""
    width, hidden = section.width, int(section.width * section.mlp_ratio)
    return linear(length, width, 4 * width + 2 * hidden) + attention(length**2, width)


def _diffusion_head(section: Autoregressive, numbers: int, tokens: int) -> float:
    """Of one sample: all tokens are conditions, and noisy copies of the predicted ones are denoised."""
    width, rows = section.head.width, num_head_rows(section, tokens)
    condition = linear(tokens, section.width, width)
    time = linear(rows, TIME_FREQUENCIES, width) + linear(rows, width, width)
    blocks = section.head.depth * linear(rows, width, 5 * width)  # two of the MLP, three of the modulation
    return condition + time + blocks + linear(rows, width, 2 * width) + 2 * linear(rows, numbers, width)
