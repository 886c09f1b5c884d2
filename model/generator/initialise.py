"""First values of a generator's parameters: a pure function of (seed, name), as in model/initialise.py.

    initialise(generator, section, seed)                                        # whole parameters
    initialise_parameter("backbone.embed.linear.weight", tensor, section, seed)     # one, while ZeRO-3 has it gathered

The table, first match wins; as DiT, LightningDiT and MAR start [C], but for one line.

    *.bias                                            0
    norms' weight                                     1
    *.modulation, backbone.final.linear,
    head.end.linear                                   0: blocks begin as the identity, the output as zeros
    label.table, time.*                               normal 0.02
    *positions, mask_token                            normal 0.2: with MAR's 0.02 places are learnt late [D]
    every other                                       uniform within sqrt(6 / (inputs + outputs)) (Glorot)
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor, nn

from configs.generator import Generator

_CONSTANTS = {
    r"\.bias$": 0.0,
    r"norm\d?\.weight$": 1.0,
    r"\.modulation\.weight$|^(backbone\.final|head\.end)\.linear\.weight$": 0.0,
}
_STDS = {r"\.(label\.table|time\.linear\d)\.weight$": 0.02, r"positions$|mask_token$": 0.2}


@torch.no_grad()
def initialise(generator: nn.Module, section: Generator, seed: int) -> None:
    """Fills every parameter of `generator`, whole and not yet partitioned."""
    for name, parameter in generator.named_parameters():
        initialise_parameter(name, parameter, section, seed)


@torch.no_grad()
def initialise_parameter(name: str, tensor: Tensor, section: Generator, seed: int) -> None:
    """Fills `tensor`, the whole parameter `name` of a generator of `section`; drawn in float32, then rounded."""
    constant = next((value for pattern, value in _CONSTANTS.items() if re.search(pattern, name)), None)
    if constant is not None:
        tensor.fill_(constant)
        return
    digest = hashlib.sha256(f"{seed}/generator.{name}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    std = next((value for pattern, value in _STDS.items() if re.search(pattern, name)), None)
    if std is None:
        bound = math.sqrt(6 / (drawn.shape[0] + drawn[0].numel()))
        drawn.uniform_(-bound, bound, generator=random)
    else:
        drawn.normal_(0.0, std, generator=random)
    tensor.copy_(drawn)
