"""Linear layers in FP8 against bf16, forward and backward, with the error of each against float32.

The shapes are products of VTP's blocks: M tokens, K inputs, N outputs. A note says what the rule of kernels.fp8 makes
of each on a GPU, so that a run there checks the rule. On a GPU the variants are compiled, as blocks are; without that
torchao's casts are many small kernels. On a CPU float8 products are emulated: the times say what trying FP8 there
costs, not what it gains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fp8
from kernels.fp8 import Affine, Linears
from profiling.machine import device, matmul_peak, require_bf16
from profiling.measurement import Recorder

SHAPES = {  # M, K, N
    "cpu": {"S qkv": (2056, 384, 1152), "S mlp.w12": (2056, 384, 2048), "L qkv": (2056, 1024, 3072)},
    "cuda": {
        "B qkv": (16_448, 768, 2304),
        "L qkv": (16_448, 1024, 3072),
        "L proj": (16_448, 1024, 1024),
        "L mlp.w12": (16_448, 1024, 5472),
        "7B mlp.w12": (8224, 4096, 21_856),
    },
}
RULE = Linears("fp8_torchao", "", is_gated_by_speed=True)


def run(recorder: Recorder) -> None:
    """One measurement a shape."""
    require_bf16()
    for name, shape in SHAPES[device().type].items():
        _measure(name, *shape, recorder)


def _measure(name: str, m: int, k: int, n: int, recorder: Recorder) -> None:
    x_MK, grad_MN = (torch.randn(m, side, device=device()).bfloat16() for side in (k, n))
    layer = nn.Linear(k, n, device=device(), dtype=torch.bfloat16)
    leaves = [x_MK.requires_grad_(), layer.weight, layer.bias]

    def step(linear: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y_MN = linear(*leaves)
        return (y_MN.detach(), *torch.autograd.grad(y_MN, leaves, grad_MN))

    linears, notes = _linears(layer)
    exact = _exact(leaves, grad_MN)
    errors = {variant: _errors(step(linear), exact) for variant, linear in linears.items()}
    assert errors["fp8_torchao"][0] < 0.1, f"no float8 error: {errors}"
    notes += [f"{variant}: off float32 by {out:.1%} (output), {max(rest):.1%} (gradients)"
              for variant, (out, *rest) in errors.items()]  # fmt: skip
    notes.append(
        f"on a GPU the rule {'leaves this in bf16: ' + why if (why := RULE.obstacle(k, n, m)) else 'takes FP8'}"
    )
    where = "emulated on the CPU: slow, not a gain" if device().type == "cpu" else "compiled"
    workload = f"{name}: {m} x {k} by {k} x {n}, forward and backward; float8 {where}"
    variants = {variant: lambda linear=linear: step(linear) for variant, linear in linears.items()}
    peak = matmul_peak(torch.bfloat16)
    flops = 6.0 * m * k * n
    recorder.add(recorder.measure("fp8", workload, variants, "bf16", flops=flops, peak=peak, notes=tuple(notes)))


def _linears(layer: nn.Linear) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    """Every variant that runs here, and why another does not."""
    kinds: dict[str, Callable[..., Tensor]] = {"bf16": F.linear, "fp8_torchao": fp8.torchao_linear()}
    if device().type == "cuda":
        kinds = {kind: torch.compile(linear, fullgraph=True, dynamic=False) for kind, linear in kinds.items()}
    try:
        choice = fp8.resolve("fp8_te", device(), torch.bfloat16, (layer.in_features, layer.out_features))
    except (ValueError, ImportError) as reason:
        return kinds, [f"without fp8_te: {reason}"]
    product = fp8.te_linear(Affine(layer.weight, layer.bias, layer.out_features, layer.in_features), choice)
    in_fp8 = fp8.te_autocast(product, choice, None)
    return kinds | {"fp8_te": lambda x_MK, *_: in_fp8(x_MK)}, [f"fp8_te: {choice.recipe}"]


def _exact(leaves: list[Tensor], grad_MN: Tensor) -> list[Tensor]:
    x_MK, weight_NK, bias_N = (leaf.detach().float().requires_grad_() for leaf in leaves)
    y_MN = F.linear(x_MK, weight_NK, bias_N)
    return [y_MN.detach(), *torch.autograd.grad(y_MN, [x_MK, weight_NK, bias_N], grad_MN.float())]


def _errors(found: tuple[Tensor, ...], exact: list[Tensor]) -> list[float]:
    """Of the output, the input's gradient and the weight's: the norm of the difference over that of the truth."""
    pairs = list(zip(found, exact, strict=True))[:3]
    return [((ours.float() - truth).norm() / truth.norm()).item() for ours, truth in pairs]
