"""The backward passes that compiled blocks take on a GPU: gradients of the plain expressions, in fewer kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from configs.model import Vit
from model.block import Block, fused_swiglu, linear_with_detached_bias, rotated_qkv
from model.packing import CropGroup, PackedLayout
from model.rope import Rope, apply_rope
from profiling.benches.block_kernels import block_kernels

pytestmark = pytest.mark.L0

HEADS, WIDTH = 2, 16
LAYOUT = PackedLayout(
    (CropGroup("clip", 4, 17, (4, 4)), CropGroup("ssl_local", 5, 5, (2, 2))), pad=3
)  # 96 tokens: groups of 32
Parts = tuple[Tensor, ...]


def gradients(function: Callable[[Tensor, Tensor], Parts], columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Of an input of `columns` columns and of the bias added to it, after weighting all that comes out."""
    draw = torch.Generator().manual_seed(0)
    y_TN, bias_N = torch.randn(96, columns, generator=draw), torch.randn(columns, generator=draw)
    y_TN, bias_N = y_TN.to(dtype).requires_grad_(), bias_N.to(dtype).requires_grad_()
    outputs = function(y_TN, bias_N)
    seeds = [torch.randn(out.shape, generator=draw).to(dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [y_TN, bias_N], seeds)]


def plain_swiglu(y_TN: Tensor, bias_N: Tensor) -> Parts:
    gate_TF, value_TF = (y_TN + bias_N).chunk(2, dim=-1)
    return (F.silu(gate_TF) * value_TF,)


def swiglu(y_TN: Tensor, bias_N: Tensor) -> Parts:
    return (fused_swiglu(y_TN + bias_N.detach(), bias_N),)


def plain_turned(y_TN: Tensor, bias_N: Tensor, rope_2TE: Tensor) -> Parts:
    q_THE, k_THE, v_THE = (y_TN + bias_N).unflatten(1, (3, HEADS, -1)).unbind(1)
    return apply_rope(q_THE, rope_2TE), apply_rope(k_THE, rope_2TE), v_THE


def turned(y_TN: Tensor, bias_N: Tensor, rope_2TE: Tensor) -> Parts:
    return rotated_qkv(y_TN + bias_N.detach(), bias_N, rope_2TE, HEADS)


def assert_same(found: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> None:
    """What comes out is the same bit by bit. Gradients differ by the order of their roundings: worst seen, of the
    largest element, 2e-7 in float32, and in bf16 0.5 % where the plain expression rounds after every operation."""
    *outputs, grad_TN, grad_N = zip(found, plain, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in outputs)
    for ours, theirs in (grad_TN, grad_N):
        assert ours.dtype == theirs.dtype == dtype
        within = {torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype] * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=within, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_values_and_gradients_of_the_plain_expression(dtype: torch.dtype) -> None:
    assert_same(gradients(swiglu, 2 * WIDTH, dtype), gradients(plain_swiglu, 2 * WIDTH, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_queries_and_keys_have_the_values_and_gradients_of_the_plain_expression(dtype: torch.dtype) -> None:
    rope_2TE = Rope(WIDTH // HEADS, 100.0, dtype).packed(LAYOUT, "cpu")
    found, plain = (
        gradients(lambda y, bias, form=form: form(y, bias, rope_2TE), 3 * WIDTH, dtype)
        for form in (turned, plain_turned)
    )
    assert_same(found, plain, dtype)


def test_a_layer_of_another_kind_keeps_its_product_and_its_bias() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x_TD = Doubled(4, 8), torch.randn(3, 4)
    y_TN, bias_N = linear_with_detached_bias(layer, x_TD)
    assert bias_N is None
    assert torch.equal(y_TN, layer(x_TD))
    assert fused_swiglu(y_TN, None).shape == (3, 4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_compiled_block_takes_them_in_one_graph(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(Vit(width=WIDTH, depth=1, heads=HEADS, qk_norm=qk_norm), "sdpa")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    rope_2TE = Rope(WIDTH // HEADS, 100.0, torch.float32).packed(LAYOUT, "cpu")
    x_TD = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    graphs: list[GraphModule] = []

    def step(forward: Callable[..., Tensor]) -> Parts:
        return torch.autograd.grad(forward(x_TD, rope_2TE, LAYOUT.segments).square().sum(), [x_TD, *block.parameters()])

    def noting(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    plain = step(block.forward)
    monkeypatch.setattr("model.block.uses_custom_backward", lambda _: True)
    torch._dynamo.reset()
    found = step(torch.compile(block.forward, backend=noting, fullgraph=True, dynamic=False))
    [graph] = graphs
    own = [node for node in graph.graph.nodes if "autograd_function_apply" in str(node.target)]
    assert len(own) == (1 if qk_norm else 2)
    for ours, theirs in zip(found, plain, strict=True):  # worst seen: 3e-7 of the largest
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_on_hopper_each_bias_is_summed_by_the_kernel_that_makes_its_gradient() -> None:
    """Inductor's own code for sm_90, at VTP-L's width: kernels beside products, with the bytes that a token needs."""
    layout = PackedLayout((CropGroup("clip", 64, 257, (16, 16)),), pad=0)
    table = block_kernels(Vit(width=1024, depth=1, heads=16), layout, "sm_90")
    found = table.found
    assert table.as_table().row_count == len(found.forward.kernels) + len(found.backward.kernels)
    assert table.as_dict()["source"]["backward"].count("@triton.jit") > 5
    assert f"{found.kept_bytes / layout.tokens:,.0f} are kept" in table.notes[-1]
    hidden, per_token = 2736, layout.tokens * 2  # bf16
    backward = {kernel.name: kernel for kernel in found.backward.kernels if not kernel.is_library}
    [gates] = [kernel for name, kernel in backward.items() if "sigmoid" in name]
    [heads] = [kernel for name, kernel in backward.items() if "flip" in name]
    # Gate, value and the gradient of their product once each; two gradients and the sums of 32 tokens in float32. A sum
    # by itself would read 2 x 2736 more, a product of halves computed apart write and read them again.
    assert gates.read_bytes == 3 * hidden * per_token
    assert gates.written_bytes == pytest.approx((2 + 4 / 32) * hidden * per_token, rel=0.001)
    assert heads.written_bytes == pytest.approx(3 * 1024 * (1 + 2 / 32) * per_token, rel=0.001)
    assert found.forward.elementwise_bytes + found.backward.elementwise_bytes < 113_000 * layout.tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_compiled_block_is_as_near_to_float32_as_an_eager_one() -> None:
    """Gradients in bf16 of the input and of every parameter; nothing is rounded more often than in eager mode."""
    exact = block_gradients("cuda", torch.float32, is_compiled=False)
    eager, compiled = (block_gradients("cuda", torch.bfloat16, is_compiled) for is_compiled in (False, True))
    for name, value in exact.items():
        errors = [float((found[name] - value).norm() / value.norm()) for found in (eager, compiled)]
        assert errors[1] < 1.2 * errors[0] + 1e-3, (name, errors)


def block_gradients(device: str, dtype: torch.dtype, is_compiled: bool) -> dict[str, Tensor]:
    """In float32, by name, of a block of the same weights and tokens for every dtype."""
    block = Block(Vit(width=128, depth=1, heads=2), "sdpa")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    block.to(device, dtype)
    rope_2TE = Rope(64, 100.0, dtype).packed(LAYOUT, device)
    x_TD = torch.randn(96, 128, generator=torch.Generator().manual_seed(2)).to(device, dtype).requires_grad_()
    forward = torch.compile(block.forward, fullgraph=True, dynamic=False) if is_compiled else block.forward
    forward(x_TD, rope_2TE, LAYOUT.segments).float().square().sum().backward()
    assert x_TD.grad is not None
    grads = {name: p.grad.float() for name, p in block.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(block.parameters()))
    return grads | {"x": x_TD.grad.float()}
