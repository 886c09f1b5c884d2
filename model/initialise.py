"""Initial values of all parameters: of the Pretrainer and of the generators.

A parameter's values depend on the seed and on its own name only: not on the order of construction, nor on the rank that
draws them, nor on what else the model holds. So 1 rank and 256 start alike, and so do two configs that share a trunk. A
teacher's parameter is drawn under its student's name: step 0 of the EMA without a copy, partitioned or not.

    initialise(Pretrainer(config, rows), config)                      # whole parameters
    initialise_parameter("trunk.norm.weight", tensor, config)    # one at a time, while ZeRO-3 has it gathered

The Pretrainer's table, first match wins. w is the width, n the depth of the text tower; tags as in docs/recipe.md.

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

    initialise_generator(generator, section, seed)                                        # whole parameters
    initialise_generator_parameter("backbone.embed.linear.weight", tensor, section, seed)      # one, while gathered

The generators' table, first match wins; as of DiT, LightningDiT and MAR [C], except for one line.

    *.bias                                            0
    norms' weight                                     1
    *.modulation, backbone.final.linear,
    head.end.linear                                   0: blocks begin as the identity, the output as zeros
    label.table, time.*                               normal 0.02
    *positions, mask_token                            normal 0.2: with MAR's 0.02 positions are learned late [D]
    every other                                       uniform within sqrt(6 / (inputs + outputs)) (Glorot)
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from configs import Config
from configs.generator import Generator

Device = str | torch.device
_CONSTANTS = {
    r"logit_scale$": math.log(1 / 0.07),
    r"logit_bias$": -10.0,
    r"(trunk\.mask_token|bias)$": 0.0,
    r"(norm\d?|ln_\w+)\.weight$|weight_g$": 1.0,
}
_GENERATOR_CONSTANTS = {
    r"\.bias$": 0.0,
    r"norm\d?\.weight$": 1.0,
    r"\.modulation\.weight$|^(backbone\.final|head\.end)\.linear\.weight$": 0.0,
}
_GENERATOR_STDS = {r"\.(label\.table|time\.linear\d)\.weight$": 0.02, r"positions$|mask_token$": 0.2}


@torch.no_grad()
def initialise(model: nn.Module, config: Config, device: Device = "cpu") -> None:
    """Initialise every parameter of `model`, a Pretrainer with whole (not yet partitioned) parameters."""
    for name, parameter in model.named_parameters():
        initialise_parameter(name, parameter, config, device)


@torch.no_grad()
def initialise_parameter(name: str, tensor: Tensor, config: Config, device: Device = "cpu") -> None:
    """Initialise `tensor`, the whole parameter `name` of a Pretrainer; drawn in float32 on `device`, then rounded."""
    name = name.removeprefix("teacher.")
    if ".w12." in name:
        for half, part in zip(tensor.chunk(2), ("w1", "w2"), strict=True):
            initialise_parameter(name.replace("w12", part), half, config, device)
        return
    constant = _init_constant(name, config)
    if constant is not None:
        tensor.fill_(constant)
        return
    generator = parameter_rng(config.seed, name, device)
    std = _init_std(name, tensor.shape, config)
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=device)
    if std is None:
        _truncated_normal(drawn, 0.02, generator)
    else:
        drawn.normal_(0.0, std, generator=generator)
    tensor.copy_(drawn)


@torch.no_grad()
def initialise_generator(generator: nn.Module, section: Generator, seed: int) -> None:
    """Initialise every parameter of `generator`, whole and not yet partitioned."""
    for name, parameter in generator.named_parameters():
        initialise_generator_parameter(name, parameter, section, seed)


@torch.no_grad()
def initialise_generator_parameter(name: str, tensor: Tensor, section: Generator, seed: int) -> None:
    """Initialise `tensor`, the whole parameter `name` of a generator of `section`; drawn in float32, then rounded."""
    constant = next((value for pattern, value in _GENERATOR_CONSTANTS.items() if re.search(pattern, name)), None)
    if constant is not None:
        tensor.fill_(constant)
        return
    random = parameter_rng(seed, f"generator.{name}")
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    std = next((value for pattern, value in _GENERATOR_STDS.items() if re.search(pattern, name)), None)
    if std is None:
        bound = math.sqrt(6 / (drawn.shape[0] + drawn[0].numel()))
        drawn.uniform_(-bound, bound, generator=random)
    else:
        drawn.normal_(0.0, std, generator=random)
    tensor.copy_(drawn)


def parameter_rng(seed: int, name: str, device: Device = "cpu") -> torch.Generator:
    """Random generator of one parameter. Runs use the CPU's; a GPU's numbers differ and are drawn faster."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _init_constant(name: str, config: Config) -> float | None:
    if name.endswith("gamma"):
        return (config.model.decoder if name.startswith("decoder.") else config.model.trunk).layer_scale
    return next((value for pattern, value in _CONSTANTS.items() if re.search(pattern, name)), None)


def _init_std(name: str, shape: torch.Size, config: Config) -> float | None:
    """Standard deviation of the normal distribution; None for the truncated one of all other parameters."""
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
