"""Activation checkpointing: what backward needs of a block is computed again instead of kept.

    recompute_blocks(model, "selective", kinds=(Block, TextBlock))       # before the blocks are compiled

    off        every intermediate is kept
    selective  products and attention are kept; norms, RoPE, gates and activations between them, which are most of the
               bytes and few of the FLOPs, are computed again
    full       a block's input is kept and the whole block computed again: a third more FLOPs in the blocks

Exact: the same operations on the same numbers; blocks draw no random numbers, so no generator's state is kept. Inside
the compiled function (compile(recompute(forward))) torch's partitioner sees which intermediates to keep and it stays
one graph; the other way round a compiled block is one opaque call, and `selective` would keep nothing of it. ZeRO-3
gathers a leaf block before its backward begins, hence before anything is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["off", "selective", "full"]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::convolution")
# Fused kernels of any library are named so. Attention by batched products is not: its scores are the largest
# intermediate of a block, and computed again in a fraction of its FLOPs.
ATTENTION = ("attention", "attn", "flash", "fmha")


def recompute_blocks(model: nn.Module, mode: Mode, kinds: tuple[type[nn.Module], ...]) -> None:
    """Replaces the forward of every module of these kinds by one that keeps what `mode` says."""
    if mode == "off":
        return
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = recomputed(module.forward, mode)


def recomputed(forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """`forward` with activation checkpointing; mode "selective" or "full"."""
    keeping: dict[str, Any] = {}
    if mode == "selective":
        keeping["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **keeping)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator._schema.name
    is_kept = name in PRODUCTS or any(word in name for word in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
