"""system.linear on the whole engine: which layers change, that they do, and that a run stays the same run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from configs import UserError
from engine import block_transforms
from engine.block_transforms import checkpoint_activations
from engine.checkpoint import reading
from engine.step import model_inputs
from kernels.fp8 import E4M3, E5M2
from model.block import Block
from model.initialise import initialise
from model.losses.comm import Comm
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.text import TextBlock
from tests.engine import ranks
from tests.float8_count import float8_products
from tests.harness import run_ranks
from tests.tiny import random_batch, tiny_config

STEPS, HALF = 12, 6
BF16 = ("optim.precision=bf16", f"optim.steps={STEPS}")
FP8 = (*BF16, "system.linear=fp8_torchao")
CPU = torch.device("cpu")


def _converted(*overrides: str) -> tuple[Pretrainer, str]:
    config = tiny_config(*FP8, *overrides)
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    return model, block_transforms.convert_to_fp8(model, config, CPU)


@pytest.mark.L0
def test_the_students_blocks_change_and_nothing_else() -> None:
    model, said = _converted("model.trunk.mlp_ratio=3")
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    products = {f"trunk.blocks.{n}.{part}" for n in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")}
    # The decoder's hidden width is 88: no side of w12 (176, 32), but one of w3.
    products |= {f"decoder.blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.w12")}
    products |= {f"text.resblocks.0.{part}" for part in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")}
    assert changed == products
    assert said.endswith("15 of 16 linears; 1 with a side that is no multiple of 16")  # in_proj is the fifteenth
    assert model.text is not None
    assert model.text.resblocks[0].attn.in_product is not torch.nn.functional.linear


@pytest.mark.L0
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_blocks_computed_again_in_backward_multiply_in_float8_again(mode: Literal["selective", "full"]) -> None:
    config = tiny_config(*FP8)
    inputs = model_inputs(random_batch(config, 0), CPU)
    gradients, products = [], []
    for each in ("off", mode):
        model, _ = _converted("model.trunk.depth=1", "batch.ssl=0", "objectives.ssl.weight=0")
        checkpoint_activations(model, each, (Block, TextBlock))
        with float8_products() as counted:
            outputs = model(**inputs)
            assert outputs.rec is not None
            outputs.rec.recon.square().mean().backward()
        gradients.append([p.grad for p in model.trunk.parameters() if p.grad is not None])
        products.append(len(counted))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    # 3 products in the trunk's block, 3 in the decoder's, 4 in the text tower's, which has no gradient here.
    assert products == [3 * 6 + 4, 3 * 6 + 4 + (6 if mode == "full" else 0)]


@pytest.mark.L0
def test_what_has_no_effect_or_no_hardware_is_refused_by_its_key() -> None:
    tiny = ("model.trunk.width=24", "model.decoder.width=24", "model.text.width=24")
    with pytest.raises(
        UserError, match=r"^system\.linear=fp8_torchao would change nothing here \(0 of 16 linears; 16 "
    ):
        _converted(*tiny)
    with pytest.raises(
        UserError, match=r"^system\.linear=fp8_te: fp8_te on cpu: Transformer Engine needs an NVIDIA GPU"
    ):
        _converted("system.linear=fp8_te")


@pytest.mark.L0
def test_without_fp8_the_choice_is_the_precision() -> None:
    config = tiny_config()
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    assert block_transforms.convert_to_fp8(model, config, CPU) == "fp32 (optim.precision)"
    assert not [module for module in model.modules() if type(module).__name__ == "Float8Linear"]


def train_both_ways(comm: Comm, root: str) -> dict[str, Any]:
    """STEPS in bf16 and in FP8, a checkpoint of each at HALF, and from each of them the rest the other way."""
    kinds = {"bf16": tiny_config(*BF16), "fp8": tiny_config(*FP8)}
    found: dict[str, Any] = {}
    for kind, config in kinds.items():
        parts = ranks.build(config, comm, "zero3")
        with float8_products() as products:
            first, centres = ranks.run_steps(parts, config, comm, 0, HALF)
        ranks.save_steps(Path(root) / kind, HALF, parts, centres, config)
        half = ranks.outcome(parts, first)
        rest, _ = ranks.run_steps(parts, config, comm, HALF, STEPS, centres)
        found[kind] = {"losses": first + rest, "half": half, "products": products, "choice": parts.choices["linear"]}
    for kind, other in (("bf16", "fp8"), ("fp8", "bf16")):
        config = kinds[kind]
        parts = ranks.build(config, comm, "zero3")
        reading.check_science(reading.latest_readable(Path(root) / other), config)
        step, centres = ranks.load_newest(Path(root) / other, parts)
        loaded = ranks.outcome(parts, [])
        rest, _ = ranks.run_steps(parts, config, comm, step, STEPS, centres)
        found[kind] |= {"loaded": loaded, "resumed": rest}
    return found


@pytest.mark.L1
def test_fp8_trains_like_bf16_under_zero3_and_each_goes_on_from_the_others_checkpoint(tmp_path: Path) -> None:
    found = run_ranks(train_both_ways, 2, str(tmp_path), timeout=300.0)[0]
    bf16, fp8 = found["bf16"], found["fp8"]
    assert bf16["choice"] == "bf16 (optim.precision)"
    assert fp8["choice"].startswith("fp8_torchao (named in the config; emulated on cpu")
    assert bf16["products"] == []
    # 13 linears, an output and two gradients each, HALF the steps; the teacher's forward adds none.
    assert fp8["products"].count((E4M3, E4M3)) == 13 * HALF
    assert fp8["products"].count((E5M2, E4M3)) == 2 * 13 * HALF
    # Worst seen 0.8 %, on both sides of bf16's curve, which itself falls by 29 %.
    assert fp8["losses"] == pytest.approx(bf16["losses"], rel=0.015)
    assert fp8["losses"] != pytest.approx(bf16["losses"], rel=1e-4)
    for mine, other in ((bf16, fp8), (fp8, bf16)):
        for part in ("weights", "teacher"):
            saved, loaded = getattr(other["half"], part), getattr(mine["loaded"], part)
            assert saved.keys() == loaded.keys()
            assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
        assert mine["resumed"] == pytest.approx(other["losses"][HALF:], rel=0.015)


def trace(comm: Comm, steps: int) -> dict[str, Any]:
    """The engine with compiled blocks, up to where graphs are made into kernels: those take minutes on a CPU."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters

    float8_nodes: list[int] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        float8_nodes.append(sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    found: dict[str, Any] = {}
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        for mode in ("on", "off"):
            config = tiny_config(*FP8, f"system.compile={mode}")
            found[mode], _ = ranks.run_steps(ranks.build(config, comm, "zero3"), config, comm, 0, steps)
    breaks = sum(counters["graph_break"].values())
    return found | {"graphs": counters["stats"]["unique_graphs"], "breaks": breaks, "float8": sorted(float8_nodes)}


@pytest.mark.L2
def test_fp8_blocks_trace_to_one_graph_per_layout_without_breaks() -> None:
    found = run_ranks(trace, 2, 2, timeout=300.0)[0]
    assert (found["graphs"], found["breaks"]) == (6, 0)  # as in bf16: two of student, two of teacher, decoder, captions
    # Forward graphs of teacher and trunk, two each, decoder and text; then two gradients for each of their products.
    assert found["float8"] == sorted([0, 0, 3, 3, 3, 4, 6, 6, 6, 8])
    assert found["on"] == found["off"]
