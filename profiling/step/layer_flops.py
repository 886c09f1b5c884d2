"""Forward FLOPs of the model's parts, each at its own width: blocks, patches, heads, VGG-16, a whole tokenizer.

    vit_block(Vit(width=1024, depth=24, heads=16), *tokens_and_squares(64, 257), 64 * 257).forward
    forward_flops_of_tokenizer(config, 256)       # ViT-L: 324.1e9; without attention products 311.1e9

How many tokens they meet in a step is profiling/step/flops.py's matter; conventions are in profiling/flops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs import Config
from configs.architecture import Model, Prototypes, Text, Vit
from model.block import swiglu_hidden
from model.latent import feature_width, moment_channels
from model.objectives.perceptual import GROUPS
from profiling.flops import attention, convolution, linear
from profiling.step.conv_flops import conv_decoder, conv_encoder

VGG_CHANNELS = (64, 128, 256, 512, 512)  # of each tap: VGG-16


@dataclass(frozen=True)
class Block:
    """Forward of one transformer block, in the order of its products."""

    first: float  # all linear layers but the last
    scores: float  # the two products between tokens
    last: float  # the one whose result only the residual sum reads

    @property
    def forward(self) -> float:
        """FLOPs of one pass."""
        return self.first + self.scores + self.last

    def again(self, checkpointing: str, backend: str, last_is_kept: bool) -> float:
        """What backward computes a second time. Recomputation ends with the last number that backward needs: the
        result of the last product is not one, unless a scale or an index comes behind it."""
        if checkpointing == "full":
            return self.first + self.scores + (0 if last_is_kept else self.last)
        return self.scores if checkpointing == "selective" and backend == "matmul" else 0


def vit_block(vit: Vit, tokens: float, squares: float, mlp_tokens: float) -> Block:
    """Of trunk or decoder. `squares`: sum over the segments of length^2."""
    hidden = swiglu_hidden(vit.width, vit.mlp_ratio)
    return Block(
        first=linear(tokens, vit.width, 4 * vit.width) + linear(mlp_tokens, vit.width, 2 * hidden),
        scores=attention(squares, vit.width),
        last=linear(mlp_tokens, hidden, vit.width),
    )


def text_block(text: Text, tokens: float, squares: float) -> Block:
    """Of the text tower; `squares`: sum over the rows of width^2, what a mask hides included."""
    hidden = int(text.width * text.mlp_ratio)
    return Block(
        first=linear(tokens, text.width, 4 * text.width + hidden),
        scores=attention(squares, text.width),
        last=linear(tokens, hidden, text.width),
    )


def forward_flops_of_tokenizer(config: Config, image_size: int, with_attention_products: bool = True) -> float:
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


def perceptual_parameters() -> int:
    """Numbers in VGG-16's convolutions and LPIPS's heads, all float32: 14.7 million."""
    count, channels_in = sum(VGG_CHANNELS), 3
    for convolutions, channels in zip(GROUPS, VGG_CHANNELS, strict=True):
        for _ in range(convolutions):
            count += (9 * channels_in + 1) * channels
            channels_in = channels
    return count


def perceptual_forward(size: int) -> tuple[float, float]:
    """VGG-16's convolutions on one image of `size` px, and LPIPS's heads on one pair."""
    vgg, heads, channels_in = 0.0, 0.0, 3
    for tap, (count, channels) in enumerate(zip(GROUPS, VGG_CHANNELS, strict=True)):
        positions = (size // 2**tap) ** 2
        vgg += convolution(positions, channels_in, channels, 3)
        vgg += (count - 1) * convolution(positions, channels, channels, 3)
        heads += convolution(positions, channels, 1, 1)
        channels_in = channels
    return vgg, heads


def patch_edge(model: Model, width: int, patches: float) -> float:
    """Between the pixels of a patch and `width`, either way."""
    return linear(patches, 3 * model.patch_size**2, width)


def prototype_mlp(head: Prototypes, width: int, rows: int) -> float:
    """The prototype head but for its prototypes, on `rows` features of `width`."""
    inner = (head.layers - 2) * linear(rows, head.hidden, head.hidden)
    return linear(rows, width, head.hidden) + inner + linear(rows, head.hidden, head.bottleneck)


def tokens_and_squares(segments: float, length: int) -> tuple[float, float]:
    """Of equally long segments: their tokens, and the sum of length^2."""
    return segments * length, segments * length**2
