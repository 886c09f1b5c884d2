"""Bytes of operators by hand, work of phases against a real step, and the roof over them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config
from configs.deepspeed import load_ds_config
from model.block import Block, swiglu_hidden
from model.initialise import initialise
from model.losses.comm import Solo
from model.losses.total import TeacherCentres, compute_losses
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from profiling.cost import operator_trace
from profiling.cost.operator_trace import OperatorTrace
from profiling.cost.roofline import PhaseWork, Roof, logits_work, phase_work, update_work
from profiling.cost.step_flops import step_flops
from tests.engine.ranks import DEEPSPEED
from tests.tiny import CONV, model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0


def moved(call: Callable[[], object]) -> tuple[int, int]:
    """(bytes of products, all bytes)."""
    trace = OperatorTrace(with_traffic=True)
    with trace.phase("here"):
        call()
    return sum(event.product for event in trace.events), sum(event.moved for event in trace.events)


def test_a_product_moves_its_operands_and_its_result() -> None:
    x, w, bias = torch.ones(4, 8), torch.ones(8, 2), torch.ones(2)
    assert moved(lambda: x @ w) == (4 * (32 + 16 + 8),) * 2
    assert moved(lambda: torch.addmm(bias, x, w)) == (4 * (2 + 32 + 16 + 8),) * 2
    half, out = (x.bfloat16(), w.bfloat16()), torch.zeros(4, 2, dtype=torch.bfloat16)
    assert moved(lambda: out.addmm_(*half)) == (2 * (32 + 16 + 8 + 8),) * 2
    assert moved(lambda: torch.mm(x, w, out=torch.empty(4, 2))) == (4 * (32 + 16 + 8),) * 2
    assert moved(lambda: half[0] @ half[1]) == (2 * (32 + 16 + 8),) * 2


def test_what_is_no_product_moves_bytes_and_has_no_products() -> None:
    x = torch.ones(6, 8)
    assert moved(lambda: x + x) == (0, 3 * 192)
    assert moved(lambda: x.mul_(2)) == (0, 2 * 192)
    assert moved(lambda: x.t()[:3].reshape(-1, 2)[0]) == (0, 2 * 3 * 6 * 4)  # reshape must copy
    assert moved(lambda: x.view(-1).unsqueeze(0).expand(4, -1)) == (0, 0)
    assert moved(lambda: torch.empty(5)) == (0, 0)
    row = torch.ones(1, 8).expand(6, 8)
    assert moved(lambda: row * x) == (0, 32 + 2 * 192)  # of an expanded row there is one in memory


def test_picking_rows_reads_those_rows() -> None:
    table, rows = torch.ones(1000, 8), torch.tensor([3, 5])
    assert moved(lambda: table.index_select(0, rows)) == (0, 2 * 2 * 32 + 16)
    assert moved(lambda: torch.nn.functional.embedding(rows, table)) == (0, 2 * 2 * 32 + 16)


def test_fused_attention_is_a_product_and_moves_less_than_a_batched_one() -> None:
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    fused = moved(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    plain = moved(lambda: ((q @ k.mT).softmax(-1) @ v).sum().backward())
    assert 0 < fused[0] < plain[0]


def test_a_blocks_products_move_what_its_widths_say() -> None:
    """One segment of T tokens, width D, hidden F, H heads: every matrix with its bias, every score."""
    vit, count = tiny_config().model.trunk, 64
    width, hidden, heads = vit.width, swiglu_hidden(vit.width, vit.mlp_ratio), vit.heads
    block, rope_2TE = Block(vit, "matmul"), torch.zeros(2, count, width // heads)
    products, everything = moved(lambda: block(torch.randn(count, width), rope_2TE, segments=((1, count),)))
    matrices = ((width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width))
    numbers = sum(count * (fan_in + fan_out) + (fan_in + 1) * fan_out for fan_in, fan_out in matrices)
    numbers += 2 * (2 * count * width + heads * count * count)
    assert products == 4 * numbers
    assert everything > 2 * products


def test_an_operator_counts_for_the_innermost_phase() -> None:
    x, trace = torch.ones(4, 4), OperatorTrace(with_traffic=True)
    with trace.phase("outer"):
        with trace.phase("inner"):
            x @ x
        x + x
    assert [(event.phase, event.product) for event in trace.events if event.moved] == [("inner", 192), ("outer", 0)]


def test_below_the_ridge_memory_is_the_roof() -> None:
    roof = Roof(flops_per_second=100.0, bytes_per_second=10.0)
    assert roof.ridge == 10.0
    assert [roof.at(intensity) for intensity in (1.0, 10.0, 50.0)] == [10.0, 100.0, 100.0]
    assert PhaseWork(60, 10, 20).intensity(is_fused=True) == 6
    assert PhaseWork(60, 10, 20).intensity(is_fused=False) == 3
    assert PhaseWork(1, 0, 0).intensity(is_fused=True) == math.inf


def test_operators_are_named_after_the_loss_whose_code_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_trace, "LOGITS", {"profiling/test_roofline": "here"})
    x, trace = torch.randn(4, 8, requires_grad=True), OperatorTrace(with_traffic=True)
    with trace.phase("all"):
        (x @ torch.randn(8, 2)).sum().backward()
    assert {event.source for event in trace.events if event.moved} == {"here"}
    monkeypatch.setattr(operator_trace, "LOGITS", {"profiling/no_such_file": "nowhere"})
    with (trace := OperatorTrace(with_traffic=True)).phase("all"):
        x.detach() @ torch.randn(8, 2)
    assert [event.source for event in trace.events if event.moved] == [None, None]


VARIANTS = {
    "all": (),
    "bf16, centering, sigmoid": (
        "optim.precision=bf16", "objectives.ssl.targets=centering", "objectives.clip.kind=sigmoid",
    ),
    "rec alone": ("objectives.clip.weight=0", "objectives.ssl.weight=0", "batch.ssl=0"),
    "clip alone": ("objectives.ssl.weight=0", "batch.ssl=0", "objectives.rec.weight=0", "batch.rec=0"),
    "gradient cache": ("batch.rec=3", "data.streams=3", "system.clip.micro_batches=4"),
    "full, drop path": ("system.activation_checkpointing=full", "model.trunk.drop_path=0.3"),
    "perceptual": ("objectives.rec.perceptual=1", "objectives.rec.lpips_weights=never_opened.safetensors"),
    "disturbed": (
        "objectives.rec.mask=[-0.1,0.7]", "model.latent=gaussian", "objectives.rec.noise.kind=interpolative",
    ),
    "convolutions": (*CONV, "model.latent=gaussian", "system.activation_checkpointing=full"),
    "aligned": ("objectives.rec.align={weights: unread, encoder: {width: 48, depth: 1, heads: 2}, patch_size: 8}",),
    "selective": ("system.activation_checkpointing=selective",),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_of_all_phases_are_those_of_the_table(variant: str) -> None:
    config = tiny_config(*VARIANTS[variant], "model.text.context=16")
    rows = RankBatchSizes.per_rank(config, 3)
    work = phase_work(config, 3, "matmul")
    expected = step_flops(config, rows, rows.clip * 16, backend="matmul")
    assert sum(each.flops for each in work.values()) == pytest.approx(expected.hardware_flops, rel=1e-12)
    assert all(each.product_bytes for each in work.values() if each.flops), "products move bytes where they are counted"

    of_logits: Counter[str] = Counter()
    for each in expected.components:
        if "logits" in each.name:
            of_logits[each.name.removesuffix(", teacher")] += each.forward + each.backward + each.recompute
    found = {name: each.flops for name, each in logits_work(config, 3, "matmul").items() if each.flops}
    assert found == pytest.approx(dict(of_logits), rel=1e-12)


def test_captions_take_as_many_slots_as_they_are_given() -> None:
    config = tiny_config("model.text.context=64", "batch.clip=24")
    rows = RankBatchSizes.per_rank(config, 1)
    for slots in (5 * 64, 7 * 64):
        work, expected = phase_work(config, 1, "matmul", slots), step_flops(config, rows, slots)["text"].forward
        assert work["text"].flops == pytest.approx(expected, rel=1e-12), slots


class Products(TorchDispatchMode):
    """Operand and result bytes of mm, addmm and bmm, as they are called, with memory behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        if operator._schema.name.removeprefix("aten::") in ("mm", "addmm", "addmm_", "bmm", "convolution"):
            tensors = [each for each in (*arguments, result) if isinstance(each, Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return result


def bytes_of_a_real_step(config: Config) -> int:
    rows, batch = RankBatchSizes.per_rank(config, 1), random_batch(config, 0)
    model = Pretrainer(config, rows, "matmul")
    initialise(model, config)
    inputs = model_inputs(batch)
    with Products() as products:
        total = compute_losses(model(**inputs), config.objectives, 0.07, Solo(), TeacherCentres.zeros(48)).total
        total.backward()
    return products.bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_products_are_those_of_a_real_step(precision: str) -> None:
    same = ("model.text.context=16", "masks.ratio=[0.25,0.25]")  # what random_batch hides
    config = tiny_config(*same, f"optim.precision={precision}")
    slots = model_inputs(random_batch(config, 0))["captions"].tokens_RC.numel()
    torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    try:
        real = bytes_of_a_real_step(config)
    finally:
        torch.set_default_dtype(torch.float32)
    work = phase_work(config, 1, "matmul", slots)
    assert sum(each.product_bytes for each in work.values()) == real


def test_more_layers_add_work_to_their_own_phase() -> None:
    def of(*overrides: str) -> dict[str, PhaseWork]:
        config = tiny_config(*overrides)
        return phase_work(config, 1, "sdpa")

    small, deep = of(), of("model.decoder.depth=2")
    assert deep["decoder"].bytes > 1.5 * small["decoder"].bytes
    assert deep["backward"].bytes > small["backward"].bytes
    assert {name: work for name, work in deep.items() if name not in ("decoder", "backward")} == {
        name: work for name, work in small.items() if name not in ("decoder", "backward")
    }


def test_the_optimizer_moves_thirty_bytes_a_weight_of_its_shard() -> None:
    config = tiny_config("optim.precision=bf16")
    trained = sum(
        p.numel() for p in Pretrainer(config, RankBatchSizes.per_rank(config, 2)).parameters() if p.requires_grad
    )
    zero3, zero2 = (
        update_work(config, load_ds_config(DEEPSPEED / f"{stage}.json", config, 2), 2) for stage in ("zero3", "zero2")
    )
    assert zero3["optimizer"].bytes == zero2["optimizer"].bytes == 30 * trained / 2
    assert zero2["ema"].bytes == 2 * zero3["ema"].bytes
    assert zero3["ema"].intensity(is_fused=True) == 3 / 14
