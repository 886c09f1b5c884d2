"""The contrastive losses, forward and backward: in tiles against the formula with its whole matrix.

Vectors of 768, the joint space of the presets. The whole matrix is the reference wherever it fits, on a GPU up to
32,768 pairs; peak memory beside it shows what grows with the pairs and what with their square.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contrastive import sigmoid_contrast, sigmoid_reference, softmax_contrast, softmax_reference
from profiling.machine import device, sized
from profiling.measurement import Recorder

Loss = Callable[..., tuple[Tensor, Tensor]]
PAIRS = sized(cpu=(512, 2048, 8192), cuda=(8192, 32_768, 131_072))
MOST_WHOLE = 32_768  # pairs: the matrix, its exponentials and both gradients take 16 GiB
WIDTH = 768
KINDS: dict[str, tuple[Loss, Loss]] = {
    "softmax": (softmax_reference, softmax_contrast),
    "sigmoid": (sigmoid_reference, sigmoid_contrast),
}


def run(recorder: Recorder) -> None:
    """One measurement a kind of loss and number of pairs."""
    for kind in KINDS:
        for pairs in PAIRS[:1] if recorder.is_dry else PAIRS:
            _measure(kind, pairs, recorder)


def _measure(kind: str, pairs: int, recorder: Recorder) -> None:
    inputs = _inputs(kind, pairs)
    dense, tiled = KINDS[kind]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs)

    workload = f"{kind}, {pairs} pairs of {WIDTH}, float32, forward and backward"
    variants: dict[str, Callable[[], object]] = {"tiles": lambda: gradients(tiled(*inputs)[0])}
    if pairs > MOST_WHOLE:
        recorder.add(recorder.measure("contrastive", workload, variants, "tiles"))
        return
    for ours, theirs in zip(gradients(tiled(*inputs)[0]), gradients(dense(*inputs)[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    variants = {"whole matrix": lambda: gradients(dense(*inputs)[0]), **variants}
    recorder.add(recorder.measure("contrastive", workload, variants, "whole matrix"))


def _inputs(kind: str, pairs: int) -> tuple[Tensor, ...]:
    """Captions somewhat like their images; temperature and bias as at the start of a run."""
    image = torch.randn(pairs, WIDTH, device=device())
    text = image + torch.randn(pairs, WIDTH, device=device())
    scale, bias = (torch.tensor([value], device=device()) for value in (14.3, -10.0))
    inputs = (F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)
    return tuple(x.requires_grad_() for x in (inputs if kind == "sigmoid" else inputs[:3]))
