"""What the trunk computes in a step: the student's packed passes, and the teacher's over whole global crops.

    trunk = TrunkFlops(config, rows, num_hidden=96, backend="sdpa", hidden=0)
    [part.name for part in trunk.student()]     # "trunk, clip" (blocks, then patch embedding), "bottleneck", ...
    [part.name for part in trunk.teacher()]     # "teacher", "prototype head, teacher"

A group's share of a pass is what its tokens cost; what is read of them behind the last attention decides the last MLP,
what stochastic depth keeps decides every block. Of transformers alone; profiling/step/conv_flops.py has convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from configs import Config
from configs.architecture import Model
from model.describe import step_layout
from model.drop_path import subset
from model.latent import head_width, moment_channels
from model.pack import ALIGN, Group, Layout, pack
from model.rows import Rows
from profiling.flops import Component, linear
from profiling.step.layer_flops import Block, patch_edge, prototype_mlp, tokens_and_squares, vit_block


@dataclass(frozen=True)
class TrunkFlops:
    """Of one rank with `rows`. `backend` is the resolved attention: what checkpointing keeps depends on it."""

    config: Config
    rows: Rows
    num_hidden: int  # M
    backend: str
    hidden: int  # patches of a rec image that the encoder does not see

    @property
    def _model(self) -> Model:
        return self.config.model

    @property
    def _has_clip(self) -> bool:
        return self.config.objectives.clip.weight > 0

    def student(self) -> Iterator[Component]:
        """One pass of the shared micro-batch, and two of every other."""
        rows = self.rows
        shared = step_layout(self.config, replace(rows, clip=rows.part), self.hidden)
        yield from self._pass(shared, 0 if self.hidden else rows.rec)
        others = replace(rows, clip=rows.part, ssl=0, rec=0)
        for _ in range(rows.micro_batches - 1):
            for part in self._pass(step_layout(self.config, others), 0):
                yield replace(part, recompute=part.recompute + part.forward)

    def teacher(self) -> Iterator[Component]:
        """Whole global crops, forward alone; its last MLP sees what it is read for."""
        if not self.rows.ssl:
            return
        model, size = self._model, self.config.views.global_size
        layout = pack({"ssl_global": (2 * self.rows.ssl, size, size)}, model.patch_size, prefix=1 + model.registers)
        [group] = layout.groups
        reads = self._read(group)
        squares = tokens_and_squares(group.segments, group.length)[1]
        seen = vit_block(model.trunk, layout.tokens, squares, layout.tokens)
        last = vit_block(model.trunk, layout.tokens, squares, reads + -reads % ALIGN)
        forward = (model.trunk.depth - 1) * seen.forward + last.forward
        forward += patch_edge(model, model.trunk.width, group.segments * group.grid[0] * group.grid[1])
        if not model.bottleneck_ae_only:
            forward += linear(layout.tokens, model.trunk.width, moment_channels(model))
        scores = model.trunk.depth * seen.scores
        yield Component("teacher", "ssl", forward, saved=seen.forward - last.forward, scores=scores)
        yield Component("prototype head, teacher", "ssl", prototype_mlp(model.prototypes, head_width(model), reads))

    def _pass(self, layout: Layout, num_rec: int) -> Iterator[Component]:
        """One pass: its groups, what rec adds, its padding."""
        model, rate = self._model, self._model.trunk.drop_path
        read = {group.name: self._read(group) for group in layout.groups}
        rec_reads = self._rec_reads(layout, num_rec)
        read_pad = -(sum(read.values()) + rec_reads) % ALIGN
        names = {"clip": "trunk, clip" if self._has_clip else "trunk, rec"}
        for group, share in zip(layout.groups, _kept_shares(layout, rate), strict=True):
            tokens, squares = tokens_and_squares(group.segments, group.length)
            full = vit_block(model.trunk, tokens, squares, tokens)
            seen = vit_block(model.trunk, tokens * share, squares * share, tokens * share)
            last = seen if rate else vit_block(model.trunk, tokens, squares, read[group.name])
            also_read = 0 if group.name != "clip" or rate else vit_block(model.trunk, 0, 0, rec_reads).forward
            name = names.get(group.name, f"trunk, {group.name}")
            yield self._blocks(name, full, seen, last, also_read)
            yield self._embed(name, group)
            yield self._latents(tokens)
        padding = subset(layout.segments, rate).pad if rate else layout.pad
        full, seen = (vit_block(model.trunk, pad, 0, pad) for pad in (layout.pad, padding))
        yield self._blocks("trunk, padding", full, seen, seen if rate else vit_block(model.trunk, padding, 0, read_pad))
        yield self._latents(layout.pad)
        if not rate:
            none = vit_block(model.trunk, 0, 0, 0)
            yield self._blocks("trunk, rec", none, none, vit_block(model.trunk, 0, 0, rec_reads), is_beside=True)

    def _blocks(
        self, name: str, full: Block, seen: Block, last: Block, also_read: float = 0, is_beside: bool = False
    ) -> Component:
        """All blocks: `seen` in each but the last; `full` where nothing is left out. What others read of the same
        tokens (`also_read`) is theirs and not saved; `is_beside` is their side of it."""
        trunk, mode = self._model.trunk, self.config.system.activation_checkpointing
        ends_there = trunk.layer_scale is None and trunk.drop_path == 0
        forward = (trunk.depth - 1) * seen.forward + last.forward
        again = (trunk.depth - 1) * seen.again(mode, self.backend, ends_there) + last.again(mode, self.backend, False)
        saved = 0 if is_beside else trunk.depth * full.forward - forward - also_read
        scores = (trunk.depth - 1) * seen.scores + last.scores
        return Component(name, _objective(name), forward, 2 * forward, again, 3 * saved, scores)

    def _embed(self, name: str, group: Group) -> Component:
        """Pixels have no gradient: backward is the weight's alone."""
        forward = patch_edge(self._model, self._model.trunk.width, group.segments * group.patches)
        return Component(name, _objective(name), forward, forward)

    def _latents(self, tokens: float) -> Component:
        """The bottleneck where all heads read it; with bottleneck_ae_only flops.py counts it with rec's pixels."""
        width = 0 if self._model.bottleneck_ae_only else self._model.trunk.width
        forward = linear(tokens, width, moment_channels(self._model))
        return Component("bottleneck", "rec" if self._model.bottleneck_ae_only else "shared", forward, 2 * forward)

    def _read(self, group: Group) -> int:
        """Tokens of a group that its own objective reads behind the last block."""
        if group.name == "ssl_global":
            return group.segments + self.num_hidden
        if group.name == "ssl_local":
            return group.segments
        patches = group.segments * group.patches
        if group.name == "rec":
            return patches
        return group.segments if self._has_clip and self._model.image_feature == "cls" else patches

    def _rec_reads(self, layout: Layout, num_rec: int) -> int:
        """Tokens that rec reads and clip does not."""
        if not num_rec or not self._has_clip or self._model.image_feature == "patch_mean":
            return 0
        grid = layout.group("clip").grid
        return num_rec * grid[0] * grid[1]


def _kept_shares(layout: Layout, rate: float) -> list[float]:
    """Share of each group's segments that a branch sees: that of its run, since draws do not look at groups."""
    runs = [list(run) for _, run in groupby(layout.groups, key=lambda group: group.length)]
    scales = subset(layout.segments, rate).scales
    return [1 / scale for run, scale in zip(runs, scales, strict=True) for _ in run]


def _objective(name: str) -> str:
    return {"trunk, clip": "clip", "trunk, rec": "rec", "trunk, padding": "shared"}.get(name, "ssl")
