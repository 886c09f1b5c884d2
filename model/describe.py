"""What a config builds: parameters by component, the packed sequence, the latent; without any weights.

    print(describe(config, Rows.per_rank(config, world_size=2)))

    component    parameters  width  depth  heads
    trunk             21.6M    384     12      6
    ...
    one rank, one step: 4416 tokens = clip 8 x 257 + ssl_global 8 x 257 + ssl_local 8 x 37 + 8 padding
    latent of a 256 px image: 64 x 16 x 16

Parameters are counted on the meta device, so the 7-billion preset takes no more memory than the smallest.
"""

from __future__ import annotations

import torch

from configs import Config
from configs.architecture import Text, Vit
from model.pack import Layout, pack
from model.pretrainer import Pretrainer
from model.rows import Rows


def count_parameters(config: Config, rows: Rows) -> dict[str, int]:
    """Parameters of each component of the Pretrainer, in its order; those of "teacher" are not trained."""
    with torch.device("meta"):
        model = Pretrainer(config, rows)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def step_layout(config: Config, rows: Rows) -> Layout:
    """The packed sequence that the student's trunk sees on one rank, in every step."""
    views, model = config.views, config.model
    num_images = rows.clip if config.objectives.clip.weight else rows.rec
    sizes = {
        "clip": (num_images, views.image_size),
        "ssl_global": (2 * rows.ssl, views.global_size),
        "ssl_local": (views.num_locals * rows.ssl, views.local_size),
    }
    crops = {name: (count, size, size) for name, (count, size) in sizes.items() if count}
    return pack(crops, model.patch_size, prefix=1 + model.registers)


def describe(config: Config, rows: Rows) -> str:
    """A table for people: what is built, how long the sequence of one rank is, what the latent looks like."""
    model, counts, layout = config.model, count_parameters(config, rows), step_layout(config, rows)
    shapes: dict[str, Vit | Text] = {
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
    trained = sum(count for name, count in counts.items() if name != "teacher")
    lines.append(f"{'trained':<12}{_short(trained):>12}")
    groups = " + ".join(f"{group.name} {group.segments} x {group.length}" for group in layout.groups)
    side = config.views.image_size // model.patch_size
    lines.append(f"one rank, one step: {layout.tokens} tokens = {groups} + {layout.pad} padding")
    lines.append(f"latent of a {config.views.image_size} px image: {model.latent_channels} x {side} x {side}")
    return "\n".join(lines)


def _short(count: int) -> str:
    """21623808 -> 21.6M"""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
