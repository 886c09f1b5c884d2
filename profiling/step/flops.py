"""Which layers meet how many tokens in a step: the analytic count that fills the table of profiling/flops.py.

    rows = Rows.per_rank(config, world_size=64)
    step_flops(config, rows).as_table()
    step_flops(config, rows, caption_tokens=5_200).model_flops        # captions packed into so many slots

Beside profiling/flops.py and not in it, because instruments know configs alone, and here layout, kept segments and
hidden patches are asked of the modules that decide them. Held against torch's FlopCounterMode, pass by pass, for every
option and every preset (tests/profiling/test_flops.py).

Recomputation, under `recompute` and so in HFU alone: what activation checkpointing computes again (eager; compiled,
torch's partitioner may keep more); the first forward of all micro-batches but one; contrastive scores and the
teacher's logits, which the losses make several times because they keep no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs import Config
from configs.architecture import Model
from data.masking import hidden_patches
from kernels.prototypes import KEEP_BYTES
from model.captions import row_width
from model.describe import step_layouts
from model.latent import feature_width, head_width, moment_channels
from model.objectives.targets import ITERATIONS
from model.rows import Rows
from profiling.flops import Component, StepFlops, linear
from profiling.step.conv_flops import ConvFlops, conv_decoder, conv_encoder
from profiling.step.frozen_flops import frozen_encoder
from profiling.step.layer_flops import (
    patch_edge,
    perceptual_forward,
    prototype_mlp,
    text_block,
    tokens_and_squares,
    vit_block,
)
from profiling.step.trunk_flops import TrunkFlops


def step_flops(
    config: Config,
    rows: Rows,
    caption_tokens: float | None = None,
    num_hidden: int | None = None,
    backend: str = "sdpa",
    device: str = "cpu",
    hidden: int | None = None,
) -> StepFlops:
    """One step of one rank with `rows`.

    With objectives.rec.mask the mean over the steps of a run, or a step that hides `hidden` patches of a rec image.

    `caption_tokens` are the slots that packed captions take, empty ones included; without it every caption has a row
    of its own, as long as the context. `num_hidden` patches are masked, by default as many as data/masking.py hides.
    `backend` is the resolved attention (what checkpointing keeps depends on it), `device` cpu or cuda (how
    often the losses make their logits does).
    """
    if num_hidden is None:
        num_hidden = hidden_patches(config, rows.ssl)
    shares = {each: share for each, (_, share) in step_layouts(config, rows).items()} if hidden is None else {hidden: 1}
    parts = []
    for each, share in shares.items():
        step = _Step(config, rows, num_hidden, backend, device, each)
        found = [*step.encoders(), *step.text(caption_tokens), *step.heads(), *step.pixels(), *step.alignment()]
        parts += [part * share for part in found]
    return StepFlops.of(parts, _causes(parts, config))


@dataclass(frozen=True)
class _Step:
    config: Config
    rows: Rows
    num_hidden: int  # M
    backend: str
    device: str
    hidden: int  # patches of a rec image that the encoder does not see

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def has_clip(self) -> bool:
        return self.config.objectives.clip.weight > 0

    def encoders(self) -> Iterator[Component]:
        """The student's and the teacher's: the trunk, or convolutions in its place."""
        trunk = TrunkFlops(self.config, self.rows, self.num_hidden, self.backend, self.hidden)
        if self.model.conv is None:
            yield from trunk.student()
        else:
            tower = conv_encoder(self.model, self.config.views.image_size)
            yield self._convolutions("trunk, rec", tower, has_pixels=True)
        yield from trunk.teacher()

    def _convolutions(self, name: str, tower: ConvFlops, has_pixels: bool) -> Component:
        """Of the rec images. Pixels have no gradient; what is recomputed are the residual blocks."""
        forward, again = self.rows.rec * tower.forward, self.rows.rec * tower.again
        backward = 2 * forward - (self.rows.rec * tower.edge if has_pixels else 0)
        is_full = self.config.system.activation_checkpointing == "full"
        scores = self.rows.rec * tower.scores
        return Component(name, "rec", forward, backward, again if is_full else 0, scores=scores)

    def text(self, caption_tokens: float | None) -> Iterator[Component]:
        """The tower; of all micro-batches but the shared one twice forward."""
        if not self.has_clip:
            return
        text, rows = self.model.text, self.rows
        unpacked = rows.clip * text.context
        tokens, width = (
            (unpacked, text.context) if caption_tokens is None else (caption_tokens, row_width(text.context))
        )
        block, full = text_block(text, tokens, tokens * width), text_block(text, unpacked, unpacked * text.context)
        forward = text.depth * block.forward + linear(rows.clip, text.width, self.model.clip_width)
        again = text.depth * block.again(self.config.system.activation_checkpointing, self.backend, True)
        twice = forward * (rows.micro_batches - 1) / rows.micro_batches
        saved = 3 * text.depth * (full.forward - block.forward)
        yield Component("text", "clip", forward, 2 * forward, again + twice, saved, text.depth * block.scores)

    def heads(self) -> Iterator[Component]:
        """What lies between features and losses, and the products of the losses themselves."""
        model, rows, objectives = self.model, self.rows, self.config.objectives
        if self.has_clip:
            forward = linear(rows.clip, head_width(model), model.clip_width)
            twice = forward * (rows.micro_batches - 1) / rows.micro_batches
            yield Component("clip head", "clip", forward, 2 * forward, twice)
            # In float32; every rank scores its images against the captions of all.
            scores = linear(rows.clip, model.clip_width, self.config.batch.clip)
            again = scores if objectives.clip.kind == "softmax" else 0
            yield Component("contrastive logits", "clip", scores, 2 * scores, again)
        if rows.ssl:
            yield from self._prototypes()
            if objectives.ssl.koleo:
                yield Component("koleo", "ssl", 2 * linear(rows.ssl, head_width(model), self.config.batch.ssl))

    def _prototypes(self) -> Iterator[Component]:
        model, num_global, hidden = self.model, 2 * self.rows.ssl, self.num_hidden
        num_local = self.config.views.num_locals * self.rows.ssl
        students, taught = num_global + num_local + hidden, num_global + hidden
        forward = prototype_mlp(model.prototypes, head_width(model), students)
        yield Component("prototype head", "ssl", forward, 2 * forward)
        logits = linear(students, model.prototypes.bottleneck, model.prototypes.num)
        # A GPU's kernels make either side's logits again for each pair, a local crop having two targets.
        pairs = 2 * num_local + num_global + hidden if self.device == "cuda" else 0
        again = linear(pairs, model.prototypes.bottleneck, model.prototypes.num)
        yield Component("prototype logits", "ssl", logits, 2 * logits, again)
        # Of the teacher: for its targets' columns, for each loss that reads them, for the entropy that is reported.
        made = self._column_rows(num_global) + self._column_rows(hidden) + pairs
        made += (num_global if num_local else 0) + num_global + hidden + num_global
        once, all_made = (linear(n, model.prototypes.bottleneck, model.prototypes.num) for n in (taught, made))
        yield Component("prototype logits, teacher", "ssl", once, recompute=all_made - once)

    def _column_rows(self, num_rows: int) -> int:
        """Rows of teacher logits that Sinkhorn-Knopp makes: once where they can be kept, else in each iteration; on a
        GPU, after the first one, for the sums of the rows and once more for those of the columns."""
        if self.config.objectives.ssl.targets == "centering":
            return 0
        if self.device == "cuda":
            return (2 * ITERATIONS - 1) * num_rows
        is_kept = 4 * num_rows * self.model.prototypes.num <= KEEP_BYTES[self.device]
        return num_rows if is_kept else ITERATIONS * num_rows

    def pixels(self) -> Iterator[Component]:
        """Bottleneck, decoder, and the perceptual network's two passes of which one has a gradient, of pixels only."""
        model, rows = self.model, self.rows
        if not rows.rec:
            return
        size = self.config.views.image_size
        visible = rows.rec * ((size // model.patch_size) ** 2 - self.hidden)
        if model.bottleneck_ae_only or model.conv is not None:
            forward = linear(visible, feature_width(model), moment_channels(model))
            yield Component("bottleneck", "rec", forward, 2 * forward)
        if model.conv is None:
            yield self._decoder(visible)
        else:
            yield self._convolutions("decoder", conv_decoder(model, size), has_pixels=False)
        if self.config.objectives.rec.perceptual:
            vgg, compared = perceptual_forward(size)
            yield Component("perceptual", "rec", rows.rec * (2 * vgg + compared), rows.rec * (vgg + compared))

    def _decoder(self, visible: float) -> Component:
        """PixelDecoder: latents of `visible` patches, pixels of all."""
        model, vit = self.model, self.model.decoder
        side = self.config.views.image_size // model.patch_size
        tokens, squares = tokens_and_squares(self.rows.rec, side * side)
        block = vit_block(vit, tokens, squares, tokens)
        again = block.again(self.config.system.activation_checkpointing, self.backend, vit.layer_scale is None)
        edges = linear(visible, model.latent_channels, vit.width) + patch_edge(model, vit.width, tokens)
        forward = vit.depth * block.forward + edges
        return Component("decoder", "rec", forward, 2 * forward, vit.depth * again, scores=vit.depth * block.scores)

    def alignment(self) -> Iterator[Component]:
        """The frozen encoder, the linear map onto its width, the cosines between patches of either side."""
        align, model, rows = self.config.objectives.rec.align, self.model, self.rows
        if align is None:
            return
        patches = (self.config.views.image_size // model.patch_size) ** 2
        yield frozen_encoder(align, rows.rec, self.config.views.image_size, patches)
        projected = linear(rows.rec * patches, model.latent_channels, align.encoder.width)
        yield Component("align", "rec", projected, 2 * projected)
        latents, features = (
            linear(rows.rec * patches, width, patches) for width in (model.latent_channels, align.encoder.width)
        )
        # With balanced gradients the bottleneck's weight gradient is taken of either loss by itself, besides the sum's.
        apart = 2 * linear(rows.rec * patches, feature_width(model), moment_channels(model)) if align.adaptive else 0
        yield Component("patch cosines", "rec", latents + features, 2 * latents, recompute=apart)


def _causes(parts: list[Component], config: Config) -> dict[str, float]:
    """What was saved, by what saved it."""
    saved: dict[str, float] = {}
    for part in parts:
        is_drop_path = config.model.conv is None and config.model.trunk.drop_path and part.name.startswith("trunk")
        cause = "captions packed" if part.name == "text" else "stochastic depth" if is_drop_path else "last MLP"
        saved[cause] = saved.get(cause, 0) + part.saved
    return saved
