"""One packed pass over all crops is what separate passes would be, and it is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs import Config
from model.block import Block
from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.text import TextBlock
from model.trunk import Trunk
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
# In float32 queries and keys; a bf16 table rounds them, and a last-bit difference before it can become 2^-9.
EXACT = ("model.rope_dtype=fp32", "model.registers=2")
CROPS = ("clip", "ssl_global", "ssl_local")


def build(config: Config, attention: str = "sdpa") -> Pretrainer:
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1), attention)
    initialise(model, config)
    return model


def lively(trunk: Trunk) -> Trunk:
    """Weights ten times as large: at their first values blocks hardly change what passes them."""
    with torch.no_grad():
        for parameter in trunk.blocks.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
        trunk.mask_token.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return trunk


def random_crops() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sizes = {"clip": (3, 3, 32, 48), "ssl_global": (4, 3, 32, 32), "ssl_local": (6, 3, 16, 16)}
    generator = torch.Generator().manual_seed(7)
    crops = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return crops, {"ssl_global": torch.rand(4, 16, generator=generator) < 0.3}


def weighted_sum(trunk: Trunk, crops: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each crop's rows, and a scalar that weighs every number of every row differently."""
    x_TD, layout = trunk(crops, masks), trunk.layout(crops)
    rows = [layout.rows(x_TD, name) for name in crops]
    return rows, torch.stack([(r * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in rows]).sum()


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_packed_pass_equals_separate_passes_in_values_and_gradients(attention: str) -> None:
    trunk = lively(build(tiny_config(*EXACT), attention).trunk)
    crops, masks = random_crops()
    rows, total = weighted_sum(trunk, crops, masks)
    packed_grads = torch.autograd.grad(total, list(trunk.parameters()))
    separate = [weighted_sum(trunk, {n: crops[n]}, {n: masks[n]} if n in masks else {}) for n in CROPS]
    for ours, (expected, _) in zip(rows, separate, strict=True):
        # Measured worst 0 of 4: rows of a product do not know their neighbours. Attention across crops: 2.9.
        torch.testing.assert_close(ours, expected[0], rtol=0, atol=1e-5)
    separate_grads = torch.autograd.grad(torch.stack([t for _, t in separate]).sum(), list(trunk.parameters()))
    for (name, _), ours, theirs in zip(trunk.named_parameters(), packed_grads, separate_grads, strict=True):
        # Measured worst 5e-7 of the largest entry of the same parameter's gradient.
        worst = (ours - theirs).abs().max() / theirs.abs().max()
        assert worst < 1e-5, f"{name}: {worst:.1e}"


def test_blocks_run_once_a_step_besides_the_teachers() -> None:
    config = tiny_config()
    model = build(config)
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Block, TextBlock)):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(**model_inputs(random_batch(config, step=0)))
    assert set(calls.values()) == {1}
    parts = [name.split(".blocks")[0] for name in calls]
    assert sorted(set(parts)) == ["decoder", "teacher.trunk", "text.resblocks.0", "trunk"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks, and ignores it itself
def test_compiled_blocks_are_one_graph_per_layout_without_breaks() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = tiny_config("model.trunk.width=64", "model.trunk.heads=2", *EXACT)
    trunk = lively(build(config).trunk)
    crops, masks = random_crops()
    expected, _ = weighted_sum(trunk, crops, masks)
    for block in trunk.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(3):
        rows, total = weighted_sum(trunk, crops, masks)
        total.backward()
    assert counters["stats"]["unique_graphs"] == 1  # two blocks, three steps, one layout
    with torch.no_grad():
        trunk({"ssl_global": crops["ssl_global"]}, {})
    assert counters["stats"]["unique_graphs"] == 2  # the teacher's layout
    assert not counters["graph_break"]
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_bf16_parameters_give_finite_gradients_and_nearly_the_same_features(attention: str) -> None:
    trunk, half = (lively(build(tiny_config("model.rope_dtype=fp32"), attention).trunk) for _ in range(2))
    half.bfloat16()
    crops, masks = random_crops()
    (rows, _), (half_rows, total) = weighted_sum(trunk, crops, masks), weighted_sum(half, crops, masks)
    total.backward()
    for ours, theirs in zip(half_rows, rows, strict=True):
        # Final-normed features of up to 4 and a bf16 step of 2^-8 in two lively blocks: measured worst 0.08.
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
