"""Weights as int8 on their way between ranks: DeepSpeed's `zero_quantized_weights` in plain PyTorch.

    values, scales = quantise(torch.tensor([0.5, -1.0, 0.25]))      # int8 [64, -127, 32], one scale: 1/127
    dequantise(values, scales)                                      # [0.504, -1.0, 0.252]

Each run of about 64 values travels with the float32 scale that makes its largest 127, so a value is off by at most
1/254 of the largest in its run. DeepSpeed's own quantizer is a CUDA extension that is compiled at the first start and
takes sizes that are multiples of 8; a model has parameters of one number, and shards of them have any size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor

# Values a scale, where that divides. DeepSpeed quantises the shards of a whole block at once, norms (1) beside matrices
# (0.02): what shares a run with a norm's weight is lost, so runs are short. A scale's 4 bytes are 6 % of what is sent.
RUN = 64
SHORTEST = 16  # below it scales cost more than they help
LARGEST = 127


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """(numel,) floats -> (numel,) int8 and (scales,) float32, `scales` dividing numel."""
    runs = values.reshape(num_scales(values.numel()), -1).float()
    scales = runs.abs().amax(dim=1) / LARGEST
    steps = runs / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().to(torch.int8).flatten(), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """int8 of any shape and the scales of all ranks -> float32 of that shape.

    The last rank's padding may be cut off: padding is less than a value a rank, so rounding up finds the runs' length.
    """
    length = -(-values.numel() // scales.numel())
    whole = torch.nn.functional.pad(values.flatten(), (0, length * scales.numel() - values.numel()))
    return (whole.view(scales.numel(), length) * scales[:, None]).flatten()[: values.numel()].view(values.shape)


@lru_cache(maxsize=4096)
def num_scales(numel: int) -> int:
    """Return the fewest scales that divide `numel` into runs of SHORTEST to RUN values, else the most."""
    fewest, most = max(1, -(-numel // RUN)), numel // SHORTEST
    shorter = next((count for count in range(fewest, most + 1) if numel % count == 0), None)
    return shorter or next(count for count in range(fewest, 0, -1) if numel % count == 0)


class Int8Quantizer:
    """The interface of DeepSpeed's quantizer, which a gather calls before and after."""

    def quantize(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Any shape -> (numel,) int8 and (scales,) float32."""
        return quantise(param)

    def dequantize(self, quantized_param: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """int8 of any shape and its scales -> that shape, in `dtype` or float32."""
        found = dequantise(quantized_param, scale)
        return found if dtype is None else found.to(dtype)


def install_quantizer() -> None:
    """Make ZeRO-3 quantise with `Int8Quantizer` from here on; call it before construction."""
    partition_parameters.CUDAQuantizer = Int8Quantizer
