"""Which linear layers of the student multiply in FP8, and how they are told to.

    system.linear      what multiplies                                 blocks compiled
    bf16               nn.Linear in optim.precision                    yes
    fp8_torchao        torchao's float8, one scale per tensor          yes, one graph as before
    fp8_te             Transformer Engine, norm and product fused      no: it cannot be traced

Only the blocks of trunk, decoder and text tower change; of them only the products that pay (kernels.fp8). Embeddings,
norms, bottleneck, heads and the decoder's ends stay as they are, and so does the whole teacher: its outputs are
targets, divided by a temperature of 0.04 to 0.07, and a forward pass alone gains little.

    convert(model, config, device)     # "fp8_torchao (named in the config; ...): 48 of 60 linears; 12 too small to pay"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config, UserError
from engine import world, zero
from kernels import fp8
from kernels.fp8 import LinearBackend, LinearParameters
from model.block import Block
from model.describe import step_layout
from model.pretrainer import Pretrainer
from model.text import TextAttention, TextBlock


@dataclass
class Census:
    """How many products became FP8, and what kept the others."""

    converted: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def admits(self, linears: LinearBackend, tokens: int, *layers: LinearParameters) -> bool:
        """Whether `layers`, which one module computes, become FP8: all must fit, and the first must pay."""
        misfits = [why for layer in layers if (why := linears.why_not_aligned(layer.k, layer.n))]
        obstacle = misfits[0] if misfits else linears.why_not_fp8(layers[0].k, layers[0].n, tokens)
        if obstacle is None:
            self.converted += len(layers)
        else:
            self.kept[obstacle] += len(layers)
        return obstacle is None

    def __str__(self) -> str:
        total = self.converted + self.kept.total()
        return "; ".join([f"{self.converted} of {total} linears", *(f"{n} {why}" for why, n in self.kept.items())])


def convert(model: Pretrainer, config: Config, device: torch.device) -> str:
    """Converts the student's blocks in place, before they are compiled and before ZeRO; says what was done.

    Raises UserError where the choice cannot be had here, or would change nothing.
    """
    if config.system.linear == "bf16":
        return f"{config.optim.precision} (optim.precision)"
    return convert_blocks(
        list(_blocks(model, config)), config.system.linear, device, zero.DTYPES[config.optim.precision]
    )


def convert_blocks(
    blocks: list[tuple[nn.Module, int]], name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Converts blocks, each given with the tokens one rank sends through it at once; as `convert`."""
    try:
        linears = fp8.resolve_linears(name, device, dtype, _widths(block for block, _ in blocks))
    except (ValueError, ImportError) as error:
        raise UserError(f"system.linear={name}: {error}") from None
    census = Census()
    for block, tokens in blocks:
        if name == "fp8_torchao":
            _with_torchao(block, tokens, linears, census)
        elif isinstance(block, Block):
            _with_te(block, tokens, linears, census)
        elif isinstance(block, TextBlock):
            _text_with_te(block, tokens, linears, census)
    if not census.converted:
        raise UserError(f"system.linear={name} would change nothing here ({census}): set system.linear=bf16")
    if name == "fp8_te":
        for block, _ in blocks:  # not around the whole model: a block computed again in backward needs its region too
            _compute(block, fp8.te_autocast(block.forward, linears, world.group()))
    return f"{name} ({linears.reason}): {census}"


def _blocks(model: Pretrainer, config: Config) -> Iterator[tuple[nn.Module, int]]:
    """Every block of the student with the number of tokens one rank sends through it at once."""
    rows, views = model.rows, config.views
    yield from ((block, step_layout(config, rows).tokens) for block in _of_kind(model.trunk, Block))
    if model.decoder is not None:
        patches = (views.image_size // config.model.patch_size) ** 2
        yield from ((block, rows.rec * patches) for block in _of_kind(model.decoder, Block))
    if model.text is not None:
        yield from ((block, rows.clip * config.model.text.context) for block in model.text.resblocks)


def _of_kind(tower: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """The blocks of a tower, in its order; of convolutions none."""
    return (module for module in tower.modules() if isinstance(module, kind))


def _linears_of(block: nn.Module) -> tuple[list[nn.Linear], list[TextAttention]]:
    """Where a block multiplies with weights: its linear layers, and attentions that hold a bare in_proj_weight."""
    modules = list(block.modules())
    return [m for m in modules if isinstance(m, nn.Linear)], [m for m in modules if isinstance(m, TextAttention)]


def _with_torchao(block: nn.Module, tokens: int, linears: LinearBackend, census: Census) -> None:
    layers, attentions = _linears_of(block)
    fp8.to_torchao(block, [layer for layer in layers if census.admits(linears, tokens, _affine(layer))])
    for attention in attentions:
        if census.admits(linears, tokens, _in_proj(attention)):
            attention.in_product = fp8.torchao_linear()


def _widths(blocks: Iterable[nn.Module]) -> set[int]:
    """Every K and N of the blocks."""
    layers, attentions = zip(*(_linears_of(block) for block in blocks), strict=True)
    found = [_affine(layer) for part in layers for layer in part] + [_in_proj(a) for part in attentions for a in part]
    return {side for affine in found for side in (affine.n, affine.k)}


def _with_te(block: Block, tokens: int, linears: LinearBackend, census: Census) -> None:
    """norm1 + qkv, proj, norm2 + SwiGLU."""
    qkv, proj, w12, w3 = (_affine(m) for m in (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3))
    if census.admits(linears, tokens, qkv):
        _compute(block.attn.qkv, fp8.te_norm_linear(block.norm1, qkv, linears))
        _compute(block.norm1, _identity)
    if census.admits(linears, tokens, proj):
        _compute(block.attn.proj, fp8.te_linear(proj, linears))
    if census.admits(linears, tokens, w12, w3):
        _compute(block.mlp, fp8.te_norm_swiglu(block.norm2, w12, w3, linears))
        _compute(block.norm2, _identity)


def _text_with_te(block: TextBlock, tokens: int, linears: LinearBackend, census: Census) -> None:
    """ln_1 + in_proj, out_proj, ln_2 + c_fc, c_proj. Not the MLP in one: TE's GELU is the tanh approximation."""
    attn, mlp = block.attn, block.mlp
    in_proj, out_proj, c_fc, c_proj = _in_proj(attn), _affine(attn.out_proj), _affine(mlp.c_fc), _affine(mlp.c_proj)
    if census.admits(linears, tokens, in_proj):
        product = fp8.te_norm_linear(block.ln_1, in_proj, linears)
        attn.in_product = lambda x_TD, weight, bias: product(x_TD)  # which holds the same weight and bias
        _compute(block.ln_1, _identity)
    if census.admits(linears, tokens, out_proj):
        _compute(attn.out_proj, fp8.te_linear(out_proj, linears))
    if census.admits(linears, tokens, c_fc):
        _compute(mlp.c_fc, fp8.te_norm_linear(block.ln_2, c_fc, linears))
        _compute(block.ln_2, _identity)
    if census.admits(linears, tokens, c_proj):
        _compute(mlp.c_proj, fp8.te_linear(c_proj, linears))


def _compute(module: nn.Module, forward: Callable[..., Any]) -> None:
    """From now on `module` computes `forward`; its parameters and their names stay. Not for blocks to be compiled."""
    module.forward = forward


def _identity(x_TD: Tensor) -> Tensor:
    return x_TD  # the norm is part of the product that follows


def _affine(linear: nn.Linear) -> LinearParameters:
    return LinearParameters(linear.weight, linear.bias, n=linear.out_features, k=linear.in_features)


def _in_proj(attention: TextAttention) -> LinearParameters:
    n, k = zero.full_shape(attention.in_proj_weight)
    return LinearParameters(attention.in_proj_weight, attention.in_proj_bias, n, k)
