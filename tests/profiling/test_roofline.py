"""Bytes and FLOPs of operators, by hand; and the roof over them."""

from __future__ import annotations

import math

import pytest
import torch

from model.block import Block, swiglu_hidden
from profiling.step.layer_flops import vit_block
from profiling.step.roofline import Counted, Roof, Work
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def work_of(call: object) -> Work:
    assert callable(call)
    with Counted() as counted, counted("here"):
        call()
    return counted.work["here"]


def test_a_product_moves_its_operands_and_its_result() -> None:
    x, w, bias = torch.ones(4, 8), torch.ones(8, 2), torch.ones(2)
    assert work_of(lambda: x @ w) == Work(128, 4 * (32 + 16 + 8), 4 * (32 + 16 + 8))
    assert work_of(lambda: torch.addmm(bias, x, w)) == Work(128, 4 * (2 + 32 + 16 + 8), 4 * (2 + 32 + 16 + 8))
    out = torch.zeros(4, 2, dtype=torch.bfloat16)
    assert work_of(lambda: out.addmm_(x.bfloat16(), w.bfloat16())).flops == 128
    assert work_of(lambda: torch.mm(x, w, out=torch.empty(4, 2))).bytes == 4 * (32 + 16 + 8)
    half = x.bfloat16(), w.bfloat16()
    assert work_of(lambda: half[0] @ half[1]).bytes == 2 * (32 + 16 + 8)


def test_what_is_no_product_moves_bytes_and_has_no_flops() -> None:
    x = torch.ones(6, 8)
    assert work_of(lambda: x + x) == Work(0, 0, 3 * 192)
    assert work_of(lambda: x.mul_(2)) == Work(0, 0, 2 * 192)
    assert work_of(lambda: x.t()[:3].reshape(-1, 2)[0]) == Work(0, 0, 2 * 3 * 6 * 4)  # reshape must copy
    assert work_of(lambda: x.view(-1).unsqueeze(0).expand(4, -1)) == Work()
    assert work_of(lambda: torch.empty(5)) == Work()
    row = torch.ones(1, 8).expand(6, 8)
    assert work_of(lambda: row * x).bytes == 32 + 2 * 192  # of an expanded row there is one in memory


def test_picking_rows_reads_those_rows() -> None:
    table, rows = torch.ones(1000, 8), torch.tensor([3, 5])
    assert work_of(lambda: table.index_select(0, rows)).bytes == 2 * 2 * 32 + 16
    assert work_of(lambda: torch.nn.functional.embedding(rows, table)).bytes == 2 * 2 * 32 + 16


def test_fused_and_batched_attention_compute_alike_and_move_other_bytes() -> None:
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    fused = work_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    plain = work_of(lambda: ((q @ k.mT).softmax(-1) @ v).sum().backward())
    assert fused.flops == plain.flops == 3 * 4 * 2 * 3 * 16 * 16 * 8
    assert fused.product_bytes < plain.product_bytes


def test_a_blocks_products_move_what_its_widths_say() -> None:
    """One segment of T tokens, width D, hidden F, H heads: every matrix with its bias, every score."""
    vit, count = tiny_config().model.trunk, 64
    width, hidden, heads = vit.width, swiglu_hidden(vit.width, vit.mlp_ratio), vit.heads
    block, rope_2TE = Block(vit, "matmul"), torch.zeros(2, count, width // heads)
    work = work_of(lambda: block(torch.randn(count, width), rope_2TE, segments=((1, count),)))
    matrices = ((width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width))
    numbers = sum(count * (fan_in + fan_out) + (fan_in + 1) * fan_out for fan_in, fan_out in matrices)
    numbers += 2 * (2 * count * width + heads * count * count)
    assert work.product_bytes == 4 * numbers
    assert work.flops == vit_block(vit, count, count**2, count).forward
    assert work.bytes > 2 * work.product_bytes


def test_the_innermost_phase_has_the_work() -> None:
    x = torch.ones(4, 4)
    with Counted() as counted:
        with counted("outer"):
            with counted("inner"):
                x @ x
            x + x
        x @ x
    assert {name: work.flops for name, work in counted.work.items()} == {"inner": 128, "outer": 0, "other": 128}


def test_below_the_ridge_memory_is_the_roof() -> None:
    roof = Roof(flops_per_second=100.0, bytes_per_second=10.0)
    assert roof.ridge == 10.0
    assert [roof.at(intensity) for intensity in (1.0, 10.0, 50.0)] == [10.0, 100.0, 100.0]
    assert Work(60, 10, 20).intensity(is_fused=True) == 6
    assert Work(60, 10, 20).intensity(is_fused=False) == 3
    assert Work(1, 0, 0).intensity(is_fused=True) == math.inf


def test_what_a_file_asks_for_is_counted_under_its_name_as_well() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with Counted({"profiling/test_roofline": "here"}) as counted:
        y = x @ torch.randn(8, 2)
        y.sum().backward()
    assert counted.within["here"] == counted.work["other"]
    with Counted({"profiling/no_such_file": "nowhere"}) as counted:
        x.detach() @ torch.randn(8, 2)
    assert counted.within == {}
    assert counted.work["other"].flops == 128
