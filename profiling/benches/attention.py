"""Attention over packed segments, forward and backward: every backend that runs on this device.

The workload is a share of a step at 256 px: segments of 257 tokens (clip, ssl global) and of 37 (ssl local), and the
heads of 64 of a ViT-S (on a GPU of a ViT-L).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import NEEDS, activated, attend, missing
from kernels.dense_attention import DENSE, reference
from profiling.machine import compared_dtypes, device, sized
from profiling.measurement import Recorder

SEGMENTS = sized(cpu=((12, 257), (16, 37)), cuda=((192, 257), (256, 37)))
HEADS, HEAD_WIDTH = sized(cpu=6, cuda=16), 64


def run(recorder: Recorder) -> None:
    """One measurement a dtype; where FlashAttention 3 is installed another, with it in place of torch's kernel."""
    for dtype in compared_dtypes():
        _measure(dtype, "varlen", recorder)
        if missing("flash3", device(), dtype) is None:
            _measure(dtype, "flash3", recorder)


def _measure(dtype: torch.dtype, kernel: str, recorder: Recorder) -> None:
    tokens = sum(count * length for count, length in SEGMENTS)
    q, k, v = (torch.randn(tokens, HEADS, HEAD_WIDTH, device=device()).to(dtype).requires_grad_() for _ in range(3))

    def step(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, SEGMENTS, backend=backend).float().sum(), (q, k, v))

    obstacles = {name: missing(name, device(), dtype) for name in NEEDS}
    named = ("flash3",) if kernel == "flash3" else tuple(name for name in NEEDS if name != "flash3")
    backends = [*DENSE, *(name for name in named if obstacles[name] is None)]
    want = reference(q.detach().float(), k.detach().float(), v.detach().float(), SEGMENTS)
    words = " + ".join(f"{count} segments of {length}" for count, length in SEGMENTS)
    workload = f"{words} tokens, {HEADS} heads of {HEAD_WIDTH}, {dtype}, forward and backward"
    workload += "; FlashAttention 3 under torch's flash operators" * (kernel == "flash3")
    variants = {backend: lambda backend=backend: step(backend) for backend in backends}
    notes = tuple(f"not here: {name}, {reason}" for name, reason in obstacles.items() if reason is not None)
    with activated(kernel):  # under sdpa, too, and outside of what is timed
        for backend in backends:
            torch.testing.assert_close(attend(q, k, v, SEGMENTS, backend=backend).float(), want, atol=2e-2, rtol=2e-2)
        recorder.add(recorder.measure("attention", workload, variants, "sdpa", notes=notes))
