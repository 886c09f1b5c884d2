"""Describe the model of a config: parameters by component, the packed sequence, the latent; no weights needed.

    print(describe(config, RankBatchSizes.per_rank(config, world_size=2)))

    component    parameters  width  depth  heads
    trunk             21.6M    384     12      6
    ...
    one rank, one step: 4416 tokens = clip 8 x 257 + ssl_global 8 x 257 + ssl_local 8 x 37 + 8 padding
    (with objectives.rec.mask: a line for every number of patches that a step may hide)
    latent of a 256 px image: 64 x 16 x 16

Parameters are counted on the meta device, so the 7-billion preset takes no more memory than the smallest.
"""

from __future__ import annotations

import torch

from configs import Config, DecoderGan
from configs.model import Model, Text, Vit
from model.conv import level_channels
from model.decoder import DecoderStage
from model.latent import hidden_patch_probabilities, num_patches
from model.losses.gan import PatchGan
from model.packing import PackedLayout, RankBatchSizes, packed_layout
from model.pretrainer import Pretrainer


def count_parameters(config: Config, rows: RankBatchSizes) -> dict[str, int]:
    """Count the parameters of each component of the Pretrainer, in its order; those of "teacher" are not trained."""
    with torch.device("meta"):
        model = Pretrainer(config, rows)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def step_layout(config: Config, rows: RankBatchSizes, hidden: int = 0) -> PackedLayout:
    """Return the layout of the packed sequence that the student's trunk sees on one rank.

    In steps that hide `hidden` patches of each rec image (objectives.rec.mask) rec has a group of its own, at the end
    of the sequence.
    """
    views, model = config.views, config.model
    num_own = rows.rec if hidden else 0
    num_images = rows.clip if config.objectives.clip.weight else rows.rec - num_own
    sizes = {
        "clip": (num_images, views.image_size),
        "ssl_global": (2 * rows.ssl, views.global_size),
        "ssl_local": (views.num_locals * rows.ssl, views.local_size),
        "rec": (num_own, views.image_size),
    }
    crops = {name: (count, size, size) for name, (count, size) in sizes.items() if count}
    if model.conv is not None:
        return packed_layout(crops, model.patch_size, prefix=0, align=1)
    return packed_layout(crops, model.patch_size, prefix=1 + model.registers, hidden={"rec": hidden})


def step_layouts(config: Config, rows: RankBatchSizes) -> dict[int, tuple[PackedLayout, float]]:
    """Map numbers of hidden patches to the layout of steps that hide so many, and the fraction of such steps."""
    shares = hidden_patch_probabilities(config.objectives.rec.mask if rows.rec else None, num_patches(config))
    return {hidden: (step_layout(config, rows, hidden), share) for hidden, share in shares.items()}


def longest_step(config: Config, rows: RankBatchSizes) -> int:
    """Return the number of hidden patches in steps with the longest sequence, which need the most memory."""
    layouts = step_layouts(config, rows)
    return max(layouts, key=lambda hidden: layouts[hidden][0].tokens)


def describe(config: Config, rows: RankBatchSizes) -> str:
    """Return a table: components with parameters, the sequence of one rank, the shape of the latent."""
    model, counts = config.model, count_parameters(config, rows)
    shapes: dict[str, Vit | Text | None] = {
        "trunk": model.trunk,
        "teacher": model.trunk,
        "decoder": model.decoder,
        "text": model.text,
    }
    lines = [f"{'component':<12}{'parameters':>12}{'width':>7}{'depth':>7}{'heads':>7}"]
    for name, count in counts.items():
        vit = shapes.get(name)
        columns = "" if vit is None else f"{vit.width:>7}{vit.depth:>7}{vit.heads:>7}"
        lines.append(f"{name:<12}{_short(count):>12}{columns}")
    if model.conv is not None:
        conv, levels = model.conv, " ".join(map(str, level_channels(model.conv)))
        lines.append(f"convolutions of {levels} channels, {conv.num_res_blocks} residual blocks a level of the encoder")
        lines[-1] += f", attention on {conv.attention_levels} of them" if conv.attention_levels else ""
    trained = sum(count for name, count in counts.items() if name != "teacher")
    lines.append(f"{'trained':<12}{_short(trained):>12}")
    layouts = step_layouts(config, rows)
    for layout, share in layouts.values():
        groups = " + ".join(f"{group.name} {group.segments} x {group.length}" for group in layout.groups)
        which = "one step" if len(layouts) == 1 else f"{share:.1%} of the steps"
        lines.append(f"one rank, {which}: {layout.tokens} tokens = {groups} + {layout.pad} padding")
    side = config.views.image_size // model.patch_size
    kind = "" if model.latent == "deterministic" else f", {model.latent}"
    lines.append(f"latent of a {config.views.image_size} px image: {model.latent_channels} x {side} x {side}{kind}")
    return "\n".join(lines)


def describe_decoder_gan(config: DecoderGan, model: Model) -> str:
    """Return the table of stage 2 for a tokenizer of this model."""
    with torch.device("meta"):
        parts = dict(DecoderStage(model).named_children()) | {"discriminator": PatchGan(config.discriminator)}
    lines = [f"{'component':<14}{'parameters':>12}"]
    for name, part in parts.items():
        count = sum(parameter.numel() for parameter in part.parameters())
        is_frozen = not any(parameter.requires_grad for parameter in part.parameters())
        lines.append(f"{name:<14}{_short(count):>12}{'  frozen' if is_frozen else ''}")
    return "\n".join(lines)


def _short(count: int) -> str:
    """Abbreviate a count: 21623808 -> 21.6M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
