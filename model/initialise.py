"""The one place where weights get their first values.

A parameter's values depend on the seed and on its own name only: not on the order of construction, nor on the
rank that draws them, nor on what else the model holds. So 1 rank and 256 start alike, and so do two configs
that share a trunk. A teacher's parameter is drawn under its student's name: step 0 of the EMA without a copy,
partitioned or not.

    initialise(Pretrainer(config, rows), config)                      # whole parameters
    initialise_parameter("trunk.norm.weight", tensor, config)    # one at a time, while ZeRO-3 has it gathered

The table, first match wins. w is the width, n the depth of the text tower; tags as in docs/recipe.md.

    *.logit_scale                                log(1/0.07)                                [C]
    *.logit_bias                                 -10                                        [D] SigLIP
    trunk.mask_token, *.bias, *_bias             0                                          [C]
    *.gamma                                      the config's layer_scale                   [D]
    norms' weight, last_layer.weight_g           1                                          [C]
    text.token_embedding                         normal 0.02                                [D] CLIP
    text.positional_embedding                    normal 0.01                                [D] CLIP
    text.*.in_proj_weight                        normal w^-1/2                              [D] CLIP
    text.*.out_proj, text.*.c_proj               normal w^-1/2 * (2n)^-1/2                  [D] CLIP
    text.*.c_fc                                  normal (2w)^-1/2                           [D] CLIP
    text.text_projection                         normal w^-1/2                              [D] CLIP
    clip.visual_proj                             normal of its input width^-1/2             [D] CLIP
    bottleneck, align, decoder.proj_in, .proj_out  normal of its input width^-1/2            [D] docs/decisions/model.md
    trunk.*, decoder.* with model.conv           normal (3 x fan-in)^-1/2                   [C] LDM: torch's
    *.w12                                        its halves as *.w1 and *.w2, however products are fused
    every other                                  normal 0.02, cut at 2 standard deviations  [D] DINOv2
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from configs import Config

Device = str | torch.device
_CONSTANTS = {
    r"logit_scale$": math.log(1 / 0.07),
    r"logit_bias$": -10.0,
    r"(trunk\.mask_token|bias)$": 0.0,
    r"(norm\d?|ln_\w+)\.weight$|weight_g$": 1.0,
}


@torch.no_grad()
def initialise(model: nn.Module, config: Config, device: Device = "cpu") -> None:
    """Fills every parameter of `model`, a Pretrainer with whole (not yet partitioned) parameters."""
    for name, parameter in model.named_parameters():
        initialise_parameter(name, parameter, config, device)


@torch.no_grad()
def initialise_parameter(name: str, tensor: Tensor, config: Config, device: Device = "cpu") -> None:
    """Fills `tensor`, the whole parameter `name` of a Pretrainer; drawn in float32 on `device`, then rounded."""
    name = name.removeprefix("teacher.")
    if ".w12." in name:
        for half, part in zip(tensor.chunk(2), ("w1", "w2"), strict=True):
            initialise_parameter(name.replace("w12", part), half, config, device)
        return
    constant = _constant(name, config)
    if constant is not None:
        tensor.fill_(constant)
        return
    generator = generator_of(config.seed, name, device)
    std = _std(name, tensor.shape, config)
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=device)
    if std is None:
        _truncated_normal(drawn, 0.02, generator)
    else:
        drawn.normal_(0.0, std, generator=generator)
    tensor.copy_(drawn)


def generator_of(seed: int, name: str, device: Device = "cpu") -> torch.Generator:
    """The random numbers of one parameter: those of a run on the CPU; a GPU's are others, for who needs them soon."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _constant(name: str, config: Config) -> float | None:
    if name.endswith("gamma"):
        return (config.model.decoder if name.startswith("decoder.") else config.model.trunk).layer_scale
    return next((value for pattern, value in _CONSTANTS.items() if re.search(pattern, name)), None)


def _std(name: str, shape: torch.Size, config: Config) -> float | None:
    """Standard deviation of a plain normal; None for the truncated one of all the rest."""
    text, fan_in = config.model.text, math.prod(shape[1:])
    stds = {
        r"^text\.token_embedding": 0.02,
        r"^text\.positional_embedding$": 0.01,
        r"^text\..*in_proj_weight$": text.width**-0.5,
        r"^text\..*(out_proj|c_proj)\.weight$": (text.width * 2 * text.depth) ** -0.5,
        r"^text\..*c_fc\.weight$": (2 * text.width) ** -0.5,
        r"^text\.text_projection$": text.width**-0.5,
        r"^clip\.visual_proj": shape[-1] ** -0.5,
        r"^(bottleneck|align|decoder\.proj_(in|out))\.": shape[-1] ** -0.5,
    }
    if config.model.conv is not None:
        stds[r"^(trunk|decoder)\."] = (3 * fan_in) ** -0.5
    return next((std for pattern, std in stds.items() if re.search(pattern, name)), None)


def _truncated_normal(drawn: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers, drawn again until none is beyond two standard deviations.

    As nn.init.trunc_normal_ does from torch 2.13 on; older versions invert the distribution and give other weights.
    """
    bound = drawn.new_tensor(2 * std).item()
    drawn.normal_(0.0, std, generator=generator)
    while (is_beyond := drawn.abs() > bound).any():
        drawn.copy_(torch.where(is_beyond, torch.empty_like(drawn).normal_(0.0, std, generator=generator), drawn))
