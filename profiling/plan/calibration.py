"""How fast this machine is at what a step does, measured in seconds at the step's own shapes: rates for the planner.

    rates = measured_rates(config, rows, "matmul", torch.device("cpu"))

Products of a trunk block, attention over the packed crops, and a block's norms, RoPE and gate are timed, each forward
and backward, and divided into what they compute or move.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import Config
from kernels.attention import attend
from model.block import norm, swiglu_hidden
from model.describe import step_layout
from model.rope import turn
from model.rows import Rows
from profiling.clock import alternate
from profiling.flops import attention, linear
from profiling.plan.rates import Rates
from profiling.step.elementwise import DTYPES, Counting
from profiling.step.layer_flops import tokens_and_squares

ROUNDS = 5
MOST_TOKENS = 16_384  # of a timed run
FEW = 16  # tokens whose operations take no time but the host's


def measured_rates(config: Config, rows: Rows, backend: str, device: torch.device) -> Rates:
    """Of one device, for blocks of the trunk's width in the run's precision."""
    probe = _Probe(config, rows, backend, device)
    products, scores, moved, host = probe.products(), probe.attention(), probe.passes(), probe.operation()
    precision = config.optim.precision
    rates = {"bf16": products, "fp32": products, "tf32": products, "fp8": products} | {precision: products}
    if precision == "bf16":
        rates["fp32"] = rates["tf32"] = probe.products(torch.float32)
    is_cuda = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if is_cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Rates(device.type, rates, scores, moved, host, 0.0, is_cuda, float(memory), None)


class _Probe:
    def __init__(self, config: Config, rows: Rows, backend: str, device: torch.device) -> None:
        self.vit, self.backend, self.device = config.model.trunk, backend, device
        self.layout, self.dtype = step_layout(config, rows), DTYPES[config.optim.precision]
        self.tokens = min(self.layout.tokens, MOST_TOKENS)

    def products(self, dtype: torch.dtype | None = None) -> float:
        """FLOP/s of a block's linear layers."""
        width, hidden = self.vit.width, swiglu_hidden(self.vit.width, self.vit.mlp_ratio)
        shapes = [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]
        weights = [self._random(n, k, dtype=dtype) for k, n in shapes]
        inputs = [self._random(self.tokens, k, dtype=dtype) for k, _ in shapes]
        flops = 3 * sum(linear(self.tokens, k, n) for k, n in shapes)
        runs = [_both_ways(lambda x, w=w: F.linear(x, w), x, w) for x, w in zip(inputs, weights, strict=True)]
        return flops / _seconds(lambda: [run() for run in runs])

    def attention(self) -> float:
        """FLOP/s of the products between tokens, over the crops of a step."""
        heads, each = self.vit.heads, self.vit.width // self.vit.heads
        q, k, v = (self._random(self.layout.tokens, heads, each) for _ in range(3))
        squares = sum(tokens_and_squares(count, length)[1] for count, length in self.layout.segments)
        run = _both_ways(lambda q, k, v: attend(q, k, v, self.layout.segments, backend=self.backend), q, k, v)
        return 3 * attention(squares, self.vit.width) / _seconds(run)

    def passes(self) -> float:
        """Bytes/s of norm, RoPE and gate."""
        run = self._chain(self.tokens)
        with Counting() as counting:
            run()
        return counting.moved.bytes / _seconds(run)

    def operation(self) -> float:
        """Seconds of an operation on next to nothing."""
        run = self._chain(FEW)
        with Counting() as counting:
            run()
        return _seconds(run) / counting.moved.operations

    def _chain(self, tokens: int) -> Callable[[], object]:
        width, heads = self.vit.width, self.vit.heads
        normed = norm(self.vit).to(self.device, self.dtype)
        for parameter in normed.parameters():
            torch.nn.init.ones_(parameter)
        rope = self._random(2, tokens, width // heads)

        def chain(x_TD: Tensor, gate_TF: Tensor) -> Tensor:
            y_TD = x_TD + turn(normed(x_TD).unflatten(1, (heads, -1)), rope).flatten(1)
            left_TF, right_TF = gate_TF.chunk(2, dim=-1)
            return y_TD + (F.silu(left_TF) * right_TF)[:, :width]

        hidden = swiglu_hidden(width, self.vit.mlp_ratio)
        return _both_ways(chain, self._random(tokens, width), self._random(tokens, 2 * hidden))

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype).requires_grad_()


def _both_ways(forward: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward, which leaves no gradients behind."""
    seed = torch.ones_like(forward(*inputs))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, seed)


def _seconds(run: Callable[[], object]) -> float:
    return alternate({"run": run}, ROUNDS)["run"].median
