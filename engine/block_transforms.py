"""What is done to the transformer blocks before ZeRO: FP8 products, then activation checkpointing.

    convert_to_fp8(model, config, device)     # "fp8_torchao (named in the config; ...): 48 of 60 linears; 12 too small"
    checkpoint_activations(model, "selective", kinds=(Block, TextBlock))

    system.linear      what multiplies                                 blocks compiled
    bf16               nn.Linear in optim.precision                    yes
    fp8_torchao        torchao's float8, one scale per tensor          yes, one graph as before
    fp8_te             Transformer Engine, norm and product fused      no: it cannot be traced

Only the blocks of trunk, decoder and text tower change; of them only the products that pay (kernels.fp8). Embeddings,
norms, bottleneck, heads and the decoder's ends stay as they are, and so does the whole teacher: its outputs are
targets, divided by a temperature of 0.04 to 0.07, and a forward pass alone gains little.

    system.activation_checkpointing
    off        every intermediate is kept for backward
    selective  products and attention are kept; norms, RoPE, gates and activations between them, which are most of the
               bytes and few of the FLOPs, are computed again
    full       a block's input is kept and the whole block computed again: a third more FLOPs in the blocks

Checkpointing is exact: the same operations on the same numbers; blocks draw no random numbers, so no generator's state
is kept. Inside the compiled function (compile(checkpoint(forward))) torch's partitioner sees which intermediates to
keep and it stays one graph; the other way round a compiled block is one opaque call, and `selective` would keep nothing
of it. ZeRO-3 gathers a leaf block before its backward begins, hence before anything is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configs import Config, UserError
from engine import distributed, zero
from kernels import fp8
from kernels.fp8 import LinearBackend, LinearParameters
from model.block import Block
from model.describe import step_layout
from model.pretrainer import Pretrainer
from model.text import TextAttention, TextBlock

Mode = Literal["off", "selective", "full"]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::convolution")
# Fused kernels of any library are named so. Attention by batched products is not: its scores are the largest
# intermediate of a block, and computed again in a fraction of its FLOPs.
ATTENTION = ("attention", "attn", "flash", "fmha")


@dataclass
class Fp8Report:
    """How many products became FP8, and why the others did not."""

    converted: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    def admits(self, linears: LinearBackend, tokens: int, *layers: LinearParameters) -> bool:
        """Count the `layers` of one module; return whether they become FP8: all must fit, the first must pay."""
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


def convert_to_fp8(model: Pretrainer, config: Config, device: torch.device) -> str:
    """Convert the student's blocks to system.linear in place, before they are compiled; return a summary.

    Raises UserError where system.linear is not available here, or would change nothing.
    """
    if config.system.linear == "bf16":
        return f"{config.optim.precision} (optim.precision)"
    return convert_blocks_to_fp8(
        list(_blocks(model, config)), config.system.linear, device, zero.DTYPES[config.optim.precision]
    )


def convert_blocks_to_fp8(
    blocks: list[tuple[nn.Module, int]], name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Convert blocks, each given with the tokens that one rank sends through it at once; as `convert_to_fp8`."""
    try:
        linears = fp8.resolve_linears(name, device, dtype, _widths(block for block, _ in blocks))
    except (ValueError, ImportError) as error:
        raise UserError(f"system.linear={name}: {error}") from None
    report = Fp8Report()
    for block, tokens in blocks:
        if name == "fp8_torchao":
            _with_torchao(block, tokens, linears, report)
        elif isinstance(block, Block):
            _with_te(block, tokens, linears, report)
        elif isinstance(block, TextBlock):
            _text_with_te(block, tokens, linears, report)
    if not report.converted:
        raise UserError(f"system.linear={name} would change nothing here ({report}): set system.linear=bf16")
    if name == "fp8_te":
        for block, _ in blocks:  # not around the whole model: a block computed again in backward needs its region too
            _set_forward(block, fp8.te_autocast(block.forward, linears, distributed.group()))
    return f"{name} ({linears.reason}): {report}"


def _blocks(model: Pretrainer, config: Config) -> Iterator[tuple[nn.Module, int]]:
    """Iterate over the student's blocks, each with the number of tokens that one rank sends through it at once."""
    rows, views = model.rows, config.views
    yield from ((block, step_layout(config, rows).tokens) for block in _of_kind(model.trunk, Block))
    if model.decoder is not None:
        patches = (views.image_size // config.model.patch_size) ** 2
        yield from ((block, rows.rec * patches) for block in _of_kind(model.decoder, Block))
    if model.text is not None:
        yield from ((block, rows.clip * config.model.text.context) for block in model.text.resblocks)


def _of_kind(tower: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """Iterate over the blocks of a tower, in order; a tower of convolutions has none."""
    return (module for module in tower.modules() if isinstance(module, kind))


def _linears_of(block: nn.Module) -> tuple[list[nn.Linear], list[TextAttention]]:
    """Return a block's linear layers, and its attentions that hold a bare in_proj_weight."""
    modules = list(block.modules())
    return [m for m in modules if isinstance(m, nn.Linear)], [m for m in modules if isinstance(m, TextAttention)]


def _with_torchao(block: nn.Module, tokens: int, linears: LinearBackend, report: Fp8Report) -> None:
    layers, attentions = _linears_of(block)
    fp8.to_torchao(block, [layer for layer in layers if report.admits(linears, tokens, _affine(layer))])
    for attention in attentions:
        if report.admits(linears, tokens, _in_proj(attention)):
            attention.in_product = fp8.torchao_linear()


def _widths(blocks: Iterable[nn.Module]) -> set[int]:
    """Return every K and N of the blocks' products."""
    layers, attentions = zip(*(_linears_of(block) for block in blocks), strict=True)
    found = [_affine(layer) for part in layers for layer in part] + [_in_proj(a) for part in attentions for a in part]
    return {side for affine in found for side in (affine.n, affine.k)}


def _with_te(block: Block, tokens: int, linears: LinearBackend, report: Fp8Report) -> None:
    """Fuse norm1 + qkv, proj, norm2 + SwiGLU."""
    qkv, proj, w12, w3 = (_affine(m) for m in (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3))
    if report.admits(linears, tokens, qkv):
        _set_forward(block.attn.qkv, fp8.te_norm_linear(block.norm1, qkv, linears))
        _set_forward(block.norm1, _identity)
    if report.admits(linears, tokens, proj):
        _set_forward(block.attn.proj, fp8.te_linear(proj, linears))
    if report.admits(linears, tokens, w12, w3):
        _set_forward(block.mlp, fp8.te_norm_swiglu(block.norm2, w12, w3, linears))
        _set_forward(block.norm2, _identity)


def _text_with_te(block: TextBlock, tokens: int, linears: LinearBackend, report: Fp8Report) -> None:
    """Fuse ln_1 + in_proj, out_proj, ln_2 + c_fc, c_proj. Not the MLP in one: TE's GELU is the tanh approximation."""
    attn, mlp = block.attn, block.mlp
    in_proj, out_proj, c_fc, c_proj = _in_proj(attn), _affine(attn.out_proj), _affine(mlp.c_fc), _affine(mlp.c_proj)
    if report.admits(linears, tokens, in_proj):
        product = fp8.te_norm_linear(block.ln_1, in_proj, linears)
        attn.in_product = lambda x_TD, weight, bias: product(x_TD)  # which holds the same weight and bias
        _set_forward(block.ln_1, _identity)
    if report.admits(linears, tokens, out_proj):
        _set_forward(attn.out_proj, fp8.te_linear(out_proj, linears))
    if report.admits(linears, tokens, c_fc):
        _set_forward(mlp.c_fc, fp8.te_norm_linear(block.ln_2, c_fc, linears))
        _set_forward(block.ln_2, _identity)
    if report.admits(linears, tokens, c_proj):
        _set_forward(mlp.c_proj, fp8.te_linear(c_proj, linears))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of `module`; its parameters and their names stay. Not for blocks to be compiled."""
    module.forward = forward


def _identity(x_TD: Tensor) -> Tensor:
    return x_TD  # the norm is part of the product that follows


def _affine(linear: nn.Linear) -> LinearParameters:
    return LinearParameters(linear.weight, linear.bias, n=linear.out_features, k=linear.in_features)


def _in_proj(attention: TextAttention) -> LinearParameters:
    n, k = zero.full_shape(attention.in_proj_weight)
    return LinearParameters(attention.in_proj_weight, attention.in_proj_bias, n, k)


def checkpoint_activations(model: nn.Module, mode: Mode, kinds: tuple[type[nn.Module], ...]) -> None:
    """Checkpoint the activations of every module of these classes: `mode` is full or selective recomputation."""
    if mode == "off":
        return
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = with_activation_checkpointing(module.forward, mode)


def with_activation_checkpointing(forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """Wrap `forward` in activation checkpointing; mode "selective" or "full"."""
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator._schema.name
    is_kept = name in PRODUCTS or any(word in name for word in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
