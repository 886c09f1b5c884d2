"""MAR's transformer, forward and backward: what it costs that the encoder's shape does not change.

Each sample hides a share of its tokens of its own. Variants of the encoder's length, all with the same result:

    exact       as many tokens as are known on average: another shape every step, and one number for all samples
    filled      the most that may be known, 30 %, what is not known in a span of its own (model/generator)
    full        all tokens, what is not known in a span of its own
"""

from __future__ import annotations

from functools import partial

import torch

from configs.autoregressive import Autoregressive
from kernels.attention import resolve
from model.generator.masked_backbone import MaskedBackbone
from model.generator.token_order import mean_mask_ratio, most_visible
from profiling.machine import compared_dtypes, device
from profiling.measurement import Recorder

SECTION = Autoregressive(width=384, depth=4, heads=6)
TOKENS, CHANNELS, SAMPLES = 256, 16, 8


def run(recorder: Recorder) -> None:
    """One measurement a dtype."""
    for dtype in compared_dtypes():
        _measure(dtype, recorder)


def _measure(dtype: torch.dtype, recorder: Recorder) -> None:
    backbone = MaskedBackbone(SECTION, CHANNELS, TOKENS, 1, resolve("auto", device(), dtype).name).to(device(), dtype)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens_BNC = torch.randn(SAMPLES, TOKENS, CHANNELS, device=device())
    order_BN = torch.rand(SAMPLES, TOKENS, device=device()).argsort(dim=1)
    known = round(TOKENS * (1 - mean_mask_ratio(SECTION.mask_ratio)))
    known_B, labels_B = (torch.full((SAMPLES,), value, device=device()) for value in (known, 0))

    def conditions(length: int) -> torch.Tensor:
        return backbone(tokens_BNC[:, :length], order_BN, known_B, labels_B)

    def step(length: int) -> None:
        conditions(length).float().square().mean().backward()

    lengths = {"exact": known, "filled": most_visible(TOKENS, SECTION.mask_ratio), "full": TOKENS}
    _check([conditions(length).detach() for length in lengths.values()])
    words = ", ".join(f"{SECTION.buffer} + {length} ({name})" for name, length in lengths.items())
    workload = (
        f"{SAMPLES} samples of {TOKENS} tokens, {SECTION.depth} blocks of width {SECTION.width}, {dtype}: {words}"
    )
    variants = {name: partial(step, length) for name, length in lengths.items()}
    recorder.add(recorder.measure("masked", workload, variants, "full"))


def _check(found: list[torch.Tensor]) -> None:
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0.05)
