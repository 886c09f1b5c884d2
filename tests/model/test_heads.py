"""Heads, norms and the MLP: their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configs.model import Prototypes
from model.block import LayerNorm, RmsNorm, SwiGlu
from model.heads import PrototypeHead
from tests.parity import reference

pytestmark = pytest.mark.L0


def test_prototype_head_equals_the_reference() -> None:
    values = reference("losses")
    head = PrototypeHead(64, Prototypes(num=96, hidden=128, bottleneck=32, layers=3))
    state = {key.removeprefix("head."): value for key, value in values.items() if key.startswith("head.")}
    head.load_state_dict(state)
    # Measured worst 2.4e-7, of 0.6.
    rows_XE, prototypes_KE = head(values["head_in"])
    torch.testing.assert_close(rows_XE @ prototypes_KE.T, values["head_out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (32, 88)])
def test_swiglu_hidden_width_is_two_thirds_of_the_ratio_aligned_to_8(width: int, hidden: int) -> None:
    assert SwiGlu(width, 4.0).w12.out_features == 2 * hidden


def test_the_fused_swiglu_is_its_formula_in_values_and_gradients() -> None:
    mlp, x_TD = SwiGlu(32, 4.0), torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gate, value, (gate_bias, value_bias) = *mlp.w12.weight.chunk(2), mlp.w12.bias.chunk(2)
    formula = F.linear(
        F.silu(F.linear(x_TD, gate, gate_bias)) * F.linear(x_TD, value, value_bias), mlp.w3.weight, mlp.w3.bias
    )
    ours, theirs = (
        (y, *torch.autograd.grad(y.square().sum(), [x_TD, *mlp.parameters()])) for y in (mlp(x_TD), formula)
    )
    for one, other in zip(ours, theirs, strict=True):
        # Measured worst 2e-7 of the largest: the gradient of x sums over 2F numbers at once. Halves swapped: 0.5.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * other.abs().max().item())


@pytest.mark.parametrize("kind", [RmsNorm, LayerNorm])
def test_norms_of_bf16_numbers_round_once(kind: type[RmsNorm] | type[LayerNorm]) -> None:
    norm = kind(64)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.fill_(1.0 if name == "weight" else 0.0)
    x_TD = (torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 8).bfloat16()
    exact_TD = norm(x_TD.double().float())
    assert torch.equal(norm.bfloat16()(x_TD), exact_TD.bfloat16())
