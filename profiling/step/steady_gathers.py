"""What a step gathers under ZeRO-3 once it knows its order: the model's modules, played by profiling/step/gathers.py.

    gathers = steady_gathers(config, ds_config, model)       # model: built on the meta device
    gathers.parameters["backward", "trunk.blocks.0.attn.qkv.weight"]     # so often in a step
    gathers.messages["forward"], gathers.most_live                       # messages; elements

The order is Pretrainer.forward's, micro-batches before and behind the shared one; DeepSpeed's hooks hang on every
module that is called, and backward meets them the other way round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from configs import Config
from engine.assemble import LEAVES
from model.pretrainer import Pretrainer
from profiling.step.gathers import Gathers, Settings, Visit

STEADY = 3  # steps after which the trace of ZeRO-3 no longer changes
# What enters these has no gradient, so DeepSpeed does not see their backward end.
ENDS_UNSEEN = ("trunk", "trunk.patch_embed", "trunk.patch_embed.proj", "text", "text.token_embedding")


@dataclass(frozen=True)
class StepGathers:
    """What a step gathers under ZeRO-3."""

    parameters: Counter[tuple[str, str]]  # how often (purpose, parameter)
    messages: Counter[str]  # by purpose
    most_live: int  # elements that are whole at once, at most


def steady_gathers(
    config: Config, ds_config: dict[str, Any], model: Pretrainer, is_separate: bool = False
) -> StepGathers:
    """Of a step whose order ZeRO-3 knows."""
    gathers = Gathers({name: p.numel() for name, p in model.named_parameters()}, Settings.of(ds_config))
    teacher = {name for name in gathers.persistent if name.startswith("teacher.")}
    whole, clip_only = _forward(config, model, is_separate), _clip_forward(config, model)
    others = config.system.clip.micro_batches - 1
    for _ in range(STEADY):
        gathers.take()
        for _ in range(others):
            gathers.run(clip_only)
        gathers.run([*whole, *_backward(whole)])
        for _ in range(others):
            gathers.run([*clip_only, *_backward(clip_only)])
        gathers.end_step()
        gathers.drop(teacher)
    return StepGathers(*gathers.take(), gathers.most_live)


def _forward(config: Config, model: Pretrainer, is_separate: bool) -> list[Visit]:
    """The order of Pretrainer.forward."""
    passes = 1
    if is_separate:
        ssl = 1 + bool(config.views.num_locals) if model.teacher is not None else 0
        passes = max(1, (model.clip is not None) + ssl + (model.decoder is not None))
    is_early = not config.model.bottleneck_ae_only
    parts = ["teacher", *["trunk"] * passes, "bottleneck" if is_early else "", "text", "clip", "prototypes"]
    parts += ["" if is_early else "bottleneck", "align", "decoder"]
    return _visits(model, parts)


def _clip_forward(config: Config, model: Pretrainer) -> list[Visit]:
    return _visits(model, ["trunk", "" if config.model.bottleneck_ae_only else "bottleneck", "text", "clip"])


def _visits(model: Pretrainer, parts: list[str]) -> list[Visit]:
    """The engine's module and in it `parts`, where they are built."""
    root = Visit("forward", "", True, False, (), tuple(name for name, _ in model.named_parameters()))
    present = [(name, getattr(model, name)) for name in parts if name]
    inside = (visit for name, part in present if part is not None for visit in _walk(part, name))
    return [root, *inside, root._replace(enters=False)]


def _walk(module: nn.Module, name: str) -> Iterator[Visit]:
    """Hooks hang on every module that is called, but for those inside a leaf."""
    is_leaf = isinstance(module, tuple(LEAVES))
    own, below = (
        tuple(f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=recurse))
        for recurse in (False, True)
    )
    visit = Visit("teacher" if name.startswith("teacher") else "forward", name, True, is_leaf, own, below)
    is_called = not isinstance(module, nn.ModuleList)
    if is_called:
        yield visit
    for child, part in () if is_leaf else module.named_children():
        yield from _walk(part, f"{name}.{child}")
    if is_called:
        yield visit._replace(enters=False)


def _backward(forward: list[Visit]) -> list[Visit]:
    """The other way round, without what has no gradient and without the whole, whose outputs are no tensors: its hooks
    do not see them."""
    return [
        visit._replace(purpose="backward", enters=not visit.enters, ends_unseen=visit.module in ENDS_UNSEEN)
        for visit in reversed(forward)
        if visit.purpose != "teacher" and visit.module
    ]
