"""FLOPs of a training step: which layers see how many tokens, for pre-training and for decoder fine-tuning (stage 2).

    rows = Rows.per_rank(config, world_size=64)
    step_flops(config, rows).as_table()
    step_flops(config, rows, caption_tokens=5_200).model_flops        # captions packed into so many slots
    flops_by_phase(step_flops(config, rows))                          # {"trunk": 8.8e6, ..., "backward": 2.2e7}
    decoder_gan_flops(config, model, 8, gan_fraction=1.0, discriminator_fraction=1.0).as_table()

The formulas are those of profiling/cost/flops.py; layouts, kept segments and masked patches come from the modules that
decide them. Tests compare each pass with torch's FlopCounterMode, for every option and every preset.

Recomputation (`recompute`, in HFU only): activation checkpointing (eager; when compiled, torch's partitioner may keep
more); the first forward of all micro-batches but one; contrastive scores and teacher logits, which the losses compute
several times because they keep no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from configs import Config, DecoderGan
from configs.decoder_gan import Discriminator
from configs.model import Model
from data.masking import num_masked_patches
from kernels.prototypes import KEEP_BYTES
from model.describe import step_layout, step_layouts
from model.latent import feature_width, head_width, moment_channels
from model.losses.gan import PatchGan
from model.losses.targets import SINKHORN_ITERATIONS
from model.packing import ALIGN, CropGroup, PackedLayout, RankBatchSizes, kept_segments, packed_layout
from model.text import packed_row_width
from profiling.cost.flops import (
    BlockFlops,
    ConvFlops,
    FlopsComponent,
    StepFlops,
    conv_decoder,
    conv_encoder,
    convolution,
    frozen_encoder_flops,
    linear,
    patch_edge,
    perceptual_forward,
    prototype_mlp,
    text_block,
    tokens_and_squares,
    vit_block,
)

HEADS = ("bottleneck", "clip head", "prototype head", "align")
TEACHER = ("teacher", "prototype head, teacher")


def step_flops(
    config: Config,
    rows: RankBatchSizes,
    caption_tokens: float | None = None,
    num_masked: int | None = None,
    backend: str = "sdpa",
    device: str = "cpu",
    num_unseen: int | None = None,
) -> StepFlops:
    """FLOPs of one pre-training step of one rank with `rows`.

    With objectives.rec.mask: the mean over the steps of a run, or a step that hides `num_unseen` patches of each rec
    image from the encoder. `caption_tokens` are the slots that packed captions take, empty ones included (default:
    every caption has a row as long as the context). `num_masked` patches are masked for iBOT (default: as many as
    data/masking.py masks). `backend` is the resolved attention, which decides what checkpointing keeps; `device`, cpu
    or cuda, how often the losses compute their logits.
    """
    if num_masked is None:
        num_masked = num_masked_patches(config, rows.ssl)
    layouts = step_layouts(config, rows).items()
    fractions = {each: fraction for each, (_, fraction) in layouts} if num_unseen is None else {num_unseen: 1}
    parts: list[FlopsComponent] = []
    for each, fraction in fractions.items():
        step = _PretrainingFlops(config, rows, num_masked, backend, device, each)
        parts += [part * fraction for part in step.components(caption_tokens)]
    return StepFlops.of(parts, _savings(parts, config))


def flops_by_phase(flops: StepFlops) -> dict[str, float]:
    """Hardware FLOPs of the phases that a run times (profiling/instruments/phases.py)."""
    phases: dict[str, float] = {}
    for each in flops.components:
        name = each.name.partition(",")[0]
        phase = name if name in ("trunk", "text", "decoder") else "heads" if each.name in HEADS else "objectives"
        phase = "teacher" if each.name in TEACHER else phase
        phases[phase] = phases.get(phase, 0) + each.forward + each.before_backward
        backward = each.backward + each.recompute - each.before_backward
        phases["backward"] = phases.get("backward", 0) + backward
    return phases


def logits_flops(flops: StepFlops) -> dict[str, float]:
    """Hardware FLOPs, over all phases, of the logits that the losses compute without keeping a matrix."""
    sums: dict[str, float] = {}
    for each in (each for each in flops.components if "logits" in each.name):
        name = each.name.removesuffix(", teacher")
        sums[name] = sums.get(name, 0) + each.forward + each.backward + each.recompute
    return sums


def _savings(parts: list[FlopsComponent], config: Config) -> dict[str, float]:
    """FLOPs that were saved, by cause."""
    saved: dict[str, float] = {}
    for part in parts:
        is_drop_path = config.model.conv is None and config.model.trunk.drop_path and part.name.startswith("trunk")
        cause = "captions packed" if part.name == "text" else "stochastic depth" if is_drop_path else "last MLP"
        saved[cause] = saved.get(cause, 0) + part.saved
    return saved


@dataclass(frozen=True)
class _PretrainingFlops:
    """Components of one pre-training step of one rank."""

    config: Config
    rows: RankBatchSizes
    num_masked: int  # M
    backend: str
    device: str
    num_unseen: int  # patches of a rec image that the encoder does not see

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def has_clip(self) -> bool:
        return self.config.objectives.clip.weight > 0

    @property
    def checkpointing(self) -> str:
        return self.config.system.activation_checkpointing

    def components(self, caption_tokens: float | None) -> Iterator[FlopsComponent]:
        if self.model.conv is None:
            yield from self._student()
        else:
            tower = conv_encoder(self.model, self.config.views.image_size)
            yield self._convolutions("trunk, rec", tower, has_pixels=True)
        if self.rows.ssl:
            yield from self._teacher()
        if self.has_clip:
            yield self._text(caption_tokens)
            yield from self._clip_head()
        if self.rows.ssl:
            yield from self._prototypes()
        if self.rows.rec:
            yield from self._pixels()
        if self.config.objectives.rec.align is not None:
            yield from self._alignment()

    # --- the trunk ---

    def _student(self) -> Iterator[FlopsComponent]:
        """One pass over the shared micro-batch, two over every other."""
        rows = self.rows
        shared = step_layout(self.config, replace(rows, clip=rows.clip_per_micro_batch), self.num_unseen)
        yield from self._pass(shared, 0 if self.num_unseen else rows.rec)
        others = replace(rows, clip=rows.clip_per_micro_batch, ssl=0, rec=0)
        for _ in range(rows.micro_batches - 1):
            for part in self._pass(step_layout(self.config, others), 0):
                yield replace(part, recompute=part.recompute + part.forward, before_backward=part.forward)

    def _teacher(self) -> Iterator[FlopsComponent]:
        """Whole global crops, forward only; the last MLP sees the tokens that are read."""
        model, size = self.model, self.config.views.global_size
        layout = packed_layout(
            {"ssl_global": (2 * self.rows.ssl, size, size)}, model.patch_size, prefix=1 + model.registers
        )
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
        yield FlopsComponent("teacher", "ssl", forward, saved=seen.forward - last.forward, scores=scores)
        head = prototype_mlp(model.prototypes, head_width(model), reads)
        yield FlopsComponent("prototype head, teacher", "ssl", head)

    def _pass(self, layout: PackedLayout, num_rec: int) -> Iterator[FlopsComponent]:
        """One packed pass: its groups, what rec adds, its padding.

        A group costs what its tokens cost; the tokens that are read behind the last attention decide the last MLP,
        those that stochastic depth keeps decide every block.
        """
        vit, rate = self.model.trunk, self.model.trunk.drop_path
        read = {group.name: self._read(group) for group in layout.groups}
        rec_reads = self._rec_reads(layout, num_rec)
        read_pad = -(sum(read.values()) + rec_reads) % ALIGN
        names = {"clip": "trunk, clip" if self.has_clip else "trunk, rec"}
        for group, kept in zip(layout.groups, _kept_fractions(layout, rate), strict=True):
            tokens, squares = tokens_and_squares(group.segments, group.length)
            full = vit_block(vit, tokens, squares, tokens)
            seen = vit_block(vit, tokens * kept, squares * kept, tokens * kept)
            last = seen if rate else vit_block(vit, tokens, squares, read[group.name])
            also_read = 0 if group.name != "clip" or rate else vit_block(vit, 0, 0, rec_reads).forward
            name = names.get(group.name, f"trunk, {group.name}")
            yield self._blocks(name, full, seen, last, also_read)
            edge = patch_edge(self.model, vit.width, group.segments * group.patches)
            yield FlopsComponent(name, _objective(name), edge, edge)  # pixels have no gradient: the weight's alone
            yield self._early_bottleneck(tokens)
        padding = kept_segments(layout.segments, rate).pad if rate else layout.pad
        full, seen = (vit_block(vit, pad, 0, pad) for pad in (layout.pad, padding))
        yield self._blocks("trunk, padding", full, seen, seen if rate else vit_block(vit, padding, 0, read_pad))
        yield self._early_bottleneck(layout.pad)
        if not rate:
            none = vit_block(vit, 0, 0, 0)
            yield self._blocks("trunk, rec", none, none, vit_block(vit, 0, 0, rec_reads), is_extra=True)

    def _blocks(
        self, name: str, full: BlockFlops, seen: BlockFlops, last: BlockFlops, also_read: float = 0,
        is_extra: bool = False,
    ) -> FlopsComponent:  # fmt: skip
        """All blocks: `seen` in each but the last; `full` if nothing were left out. `also_read` is what rec reads of
        the same tokens, so not saved; `is_extra` marks rec's side of it."""
        trunk = self.model.trunk
        ends_there = trunk.layer_scale is None and trunk.drop_path == 0
        forward = (trunk.depth - 1) * seen.forward + last.forward
        again = (trunk.depth - 1) * seen.again(self.checkpointing, self.backend, ends_there)
        again += last.again(self.checkpointing, self.backend, False)
        saved = 0 if is_extra else trunk.depth * full.forward - forward - also_read
        scores = (trunk.depth - 1) * seen.scores + last.scores
        return FlopsComponent(name, _objective(name), forward, 2 * forward, again, 3 * saved, scores)

    def _early_bottleneck(self, tokens: float) -> FlopsComponent:
        """The bottleneck where all heads read it; with bottleneck_ae_only it is counted with the pixels."""
        is_late = self.model.bottleneck_ae_only
        forward = linear(tokens, 0 if is_late else self.model.trunk.width, moment_channels(self.model))
        return FlopsComponent("bottleneck", "rec" if is_late else "shared", forward, 2 * forward)

    def _read(self, group: CropGroup) -> int:
        """Tokens of a group that its own objective reads behind the last block."""
        if group.name == "ssl_global":
            return group.segments + self.num_masked
        if group.name == "ssl_local":
            return group.segments
        patches = group.segments * group.patches
        if group.name == "rec":
            return patches
        return group.segments if self.has_clip and self.model.image_feature == "cls" else patches

    def _rec_reads(self, layout: PackedLayout, num_rec: int) -> int:
        """Tokens that rec reads and clip does not."""
        if not num_rec or not self.has_clip or self.model.image_feature == "patch_mean":
            return 0
        grid = layout.group("clip").grid
        return num_rec * grid[0] * grid[1]

    # --- text, heads and losses ---

    def _text(self, caption_tokens: float | None) -> FlopsComponent:
        """The text tower; micro-batches but the shared one pass it twice."""
        text, rows = self.model.text, self.rows
        unpacked = rows.clip * text.context
        tokens, width = (
            (unpacked, text.context) if caption_tokens is None else (caption_tokens, packed_row_width(text.context))
        )
        block, full = text_block(text, tokens, tokens * width), text_block(text, unpacked, unpacked * text.context)
        forward = text.depth * block.forward + linear(rows.clip, text.width, self.model.clip_width)
        again = text.depth * block.again(self.checkpointing, self.backend, True)
        twice, saved = self._first_pass(forward), 3 * text.depth * (full.forward - block.forward)
        scores = text.depth * block.scores
        return FlopsComponent("text", "clip", forward, 2 * forward, again + twice, saved, scores, twice)

    def _first_pass(self, forward: float) -> float:
        """Of what micro-batches cost: the passes without gradient of all but the shared one."""
        return forward * (self.rows.micro_batches - 1) / self.rows.micro_batches

    def _clip_head(self) -> Iterator[FlopsComponent]:
        model, rows = self.model, self.rows
        forward = linear(rows.clip, head_width(model), model.clip_width)
        twice = self._first_pass(forward)
        yield FlopsComponent("clip head", "clip", forward, 2 * forward, twice, before_backward=twice)
        # In float32; every rank scores its images against the captions of all.
        scores = linear(rows.clip, model.clip_width, self.config.batch.clip)
        is_softmax = self.config.objectives.clip.kind == "softmax"  # the sigmoid loss makes its gradients at once
        again, at_once = (scores, 0.0) if is_softmax else (0.0, 2 * scores)
        yield FlopsComponent("contrastive logits", "clip", scores, 2 * scores, again, before_backward=at_once)

    def _prototypes(self) -> Iterator[FlopsComponent]:
        """The student's head, either side's logits (with the gradients that the chunked losses compute at once),
        KoLeo."""
        model, num_global, masked = self.model, 2 * self.rows.ssl, self.num_masked
        num_local = self.config.views.num_locals * self.rows.ssl
        students, taught = num_global + num_local + masked, num_global + masked
        forward = prototype_mlp(model.prototypes, head_width(model), students)
        yield FlopsComponent("prototype head", "ssl", forward, 2 * forward)

        def logits(rows: float) -> float:
            return linear(rows, model.prototypes.bottleneck, model.prototypes.num)

        # A GPU's kernels compute either side's logits again for each pair, a local crop having two targets.
        pairs = 2 * num_local + num_global + masked if self.device == "cuda" else 0
        once, again = logits(students), logits(pairs)
        yield FlopsComponent("prototype logits", "ssl", once, 2 * once, again, before_backward=2 * once + again)
        # The teacher's: for the targets' columns, for each loss that reads them, for the entropy that is reported.
        made = self._column_rows(num_global) + self._column_rows(masked) + pairs
        made += (num_global if num_local else 0) + num_global + masked + num_global
        again = logits(made) - logits(taught)
        yield FlopsComponent("prototype logits, teacher", "ssl", logits(taught), recompute=again, before_backward=again)
        if self.config.objectives.ssl.koleo:
            koleo = 2 * linear(self.rows.ssl, head_width(model), self.config.batch.ssl)
            yield FlopsComponent("koleo", "ssl", koleo)

    def _column_rows(self, num_rows: int) -> int:
        """Rows of teacher logits that Sinkhorn-Knopp computes: once where they can be kept, else in each iteration; on
        a GPU, after the first one, for the sums of the rows and once more for those of the columns."""
        if self.config.objectives.ssl.targets == "centering":
            return 0
        if self.device == "cuda":
            return (2 * SINKHORN_ITERATIONS - 1) * num_rows
        is_kept = 4 * num_rows * self.model.prototypes.num <= KEEP_BYTES[self.device]
        return num_rows if is_kept else SINKHORN_ITERATIONS * num_rows

    # --- reconstruction ---

    def _pixels(self) -> Iterator[FlopsComponent]:
        """Bottleneck, decoder, and the perceptual network: two forwards, a backward to the pixels of one."""
        model, rows, size = self.model, self.rows, self.config.views.image_size
        visible = rows.rec * ((size // model.patch_size) ** 2 - self.num_unseen)
        if model.bottleneck_ae_only or model.conv is not None:
            forward = linear(visible, feature_width(model), moment_channels(model))
            yield FlopsComponent("bottleneck", "rec", forward, 2 * forward)
        if model.conv is None:
            yield _decoder(self.config, model, rows.rec, self.backend, visible)
        else:
            yield self._convolutions("decoder", conv_decoder(model, size), has_pixels=False)
        if self.config.objectives.rec.perceptual:
            yield _perceptual(rows.rec, size)

    def _convolutions(self, name: str, tower: ConvFlops, has_pixels: bool) -> FlopsComponent:
        """A convolutional tower on the rec images. Pixels have no gradient; residual blocks are recomputed."""
        forward, again = self.rows.rec * tower.forward, self.rows.rec * tower.again
        backward = 2 * forward - (self.rows.rec * tower.edge if has_pixels else 0)
        again = again if self.checkpointing == "full" else 0
        return FlopsComponent(name, "rec", forward, backward, again, scores=self.rows.rec * tower.scores)

    def _alignment(self) -> Iterator[FlopsComponent]:
        """The frozen encoder, the linear map onto its width, and cosines between patches on both sides."""
        align, model, rows = self.config.objectives.rec.align, self.model, self.rows
        assert align is not None
        patches = (self.config.views.image_size // model.patch_size) ** 2
        yield frozen_encoder_flops(align, rows.rec, self.config.views.image_size, patches)
        projected = linear(rows.rec * patches, model.latent_channels, align.encoder.width)
        yield FlopsComponent("align", "rec", projected, 2 * projected)
        widths = (model.latent_channels, align.encoder.width)
        latents, features = (linear(rows.rec * patches, width, patches) for width in widths)
        # With balanced gradients the bottleneck's weight gradient is computed for either loss, besides that of the sum.
        apart = 2 * linear(rows.rec * patches, feature_width(model), moment_channels(model)) if align.adaptive else 0
        yield FlopsComponent("patch cosines", "rec", latents + features, 2 * latents, recompute=apart)


def _decoder(
    config: Config | DecoderGan, model: Model, rows: int, backend: str, visible: float, has_gradient: bool = True
) -> FlopsComponent:
    """The transformer decoder: latents of `visible` patches in, pixels of all patches out."""
    vit = model.decoder
    tokens, squares = tokens_and_squares(rows, (config.views.image_size // model.patch_size) ** 2)
    block = vit_block(vit, tokens, squares, tokens)
    again = vit.depth * block.again(config.system.activation_checkpointing, backend, vit.layer_scale is None)
    first = linear(visible, model.latent_channels, vit.width)
    forward = vit.depth * block.forward + first + patch_edge(model, vit.width, tokens)
    backward = 2 * forward - (0 if has_gradient else first)
    return FlopsComponent("decoder", "rec", forward, backward, again, scores=vit.depth * block.scores)


def _perceptual(rows: int, size: int) -> FlopsComponent:
    vgg, compared = perceptual_forward(size)
    return FlopsComponent("perceptual", "rec", rows * (2 * vgg + compared), rows * (vgg + compared))


def _kept_fractions(layout: PackedLayout, rate: float) -> list[float]:
    """Fraction of each group's segments that stochastic depth keeps: that of equally long groups together."""
    runs = [list(run) for _, run in groupby(layout.groups, key=lambda group: group.length)]
    scales = kept_segments(layout.segments, rate).scales
    return [1 / scale for run, scale in zip(runs, scales, strict=True) for _ in run]


def _objective(name: str) -> str:
    return {"trunk, clip": "clip", "trunk, rec": "rec", "trunk, padding": "shared"}.get(name, "ssl")


# --- decoder fine-tuning with a discriminator (stage 2) ---------------------------------------------------------------


def decoder_gan_flops(
    config: DecoderGan,
    model: Model,
    world_size: int,
    gan_fraction: float,
    discriminator_fraction: float,
    backend: str = "sdpa",
) -> StepFlops:
    """FLOPs of one step of one rank. The decoder has an adversarial loss in `gan_fraction` of the steps, the
    discriminator steps in `discriminator_fraction` of them. `backend` is the resolved attention."""
    rows, size, trunk = config.batch.images // world_size, config.views.image_size, model.trunk
    layout = packed_layout({"clip": (rows, size, size)}, model.patch_size, prefix=1 + model.registers)
    [group] = layout.groups
    block = vit_block(trunk, layout.tokens, tokens_and_squares(group.segments, group.length)[1], layout.tokens)
    patches = rows * group.grid[0] * group.grid[1]
    encoder = trunk.depth * block.forward + patch_edge(model, trunk.width, patches)
    parts = [  # encoder and bottleneck are frozen: forward only
        FlopsComponent("trunk", "rec", encoder, scores=trunk.depth * block.scores),
        FlopsComponent("bottleneck", "rec", linear(patches, trunk.width, model.latent_channels)),
        _decoder(config, model, rows, backend, patches, has_gradient=False),
    ]
    if config.objectives.rec.perceptual:
        parts.append(_perceptual(rows, size))
    forward, first = discriminator_forward(config.discriminator, size)
    judged = gan_fraction * rows * forward
    parts.append(FlopsComponent("discriminator, of the decoder", "gan", judged, judged))
    if config.objectives.gan.balance == "adaptive":
        weights = gan_fraction * 2 * patch_edge(model, model.decoder.width, patches)
        parts.append(FlopsComponent("adaptive weight", "gan", weights))
    both = discriminator_fraction * 2 * rows  # real and reconstructed images
    parts.append(FlopsComponent("discriminator", "gan", both * forward, both * (2 * forward - first)))
    return StepFlops.of(parts, {})


def discriminator_forward(config: Discriminator, size: int) -> tuple[float, float]:
    """All convolutions of PatchGAN on one image of `size` px, and of these the first."""
    with torch.device("meta"):
        network = PatchGan(config)
    flops = []
    for conv in (network.first, *network.convs, network.last):
        size = (size + 2 - 4) // conv.stride[0] + 1
        flops.append(convolution(size**2, conv.in_channels, conv.out_channels, side=4))
    return sum(flops), flops[0]
