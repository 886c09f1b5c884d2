"""What a step without memory computes and moves is what a real one does, product by product."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config
from configs.ds import load_ds_config
from model.initialise import initialise
from model.objectives.comm import Solo
from model.objectives.total import Centres, compute
from model.pretrainer import Pretrainer
from model.rows import Rows
from profiling.step.flops import step_flops
from profiling.step.phase_work import logits_work, phase_work, update_work
from profiling.step.roofline import Work
from tests.engine.ranks import DEEPSPEED
from tests.tiny import CONV, model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0

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
    rows = Rows.per_rank(config, 3)
    work = phase_work(config, rows, 3, "matmul")
    expected = step_flops(config, rows, rows.clip * 16, backend="matmul")
    assert sum(each.flops for each in work.values()) == pytest.approx(expected.hardware_flops, rel=1e-12)

    of_logits: Counter[str] = Counter()
    for each in expected.components:
        if "logits" in each.name:
            of_logits[each.name.removesuffix(", teacher")] += each.forward + each.backward + each.recompute
    found = {name: each.flops for name, each in logits_work(config, rows, 3, "matmul").items() if each.flops}
    assert found == pytest.approx(dict(of_logits), rel=1e-12)


def test_captions_take_as_many_slots_as_they_are_given() -> None:
    config = tiny_config("model.text.context=64", "batch.clip=24")
    rows = Rows.per_rank(config, 1)
    for slots in (5 * 64, 7 * 64):
        work, expected = phase_work(config, rows, 1, "matmul", slots), step_flops(config, rows, slots)["text"].forward
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
    rows, batch = Rows.per_rank(config, 1), random_batch(config, 0)
    model = Pretrainer(config, rows, "matmul")
    initialise(model, config)
    inputs = model_inputs(batch)
    with Products() as products:
        total = compute(model(**inputs), config.objectives, 0.07, Solo(), Centres.zeros(48)).total
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
    work = phase_work(config, Rows.per_rank(config, 1), 1, "matmul", slots)
    assert sum(each.product_bytes for each in work.values()) == real


def test_more_layers_add_work_to_their_own_phase() -> None:
    def of(*overrides: str) -> dict[str, Work]:
        config = tiny_config(*overrides)
        return phase_work(config, Rows.per_rank(config, 1), 1, "sdpa")

    small, deep = of(), of("model.decoder.depth=2")
    assert deep["decoder"].bytes > 1.5 * small["decoder"].bytes
    assert deep["backward"].bytes > small["backward"].bytes
    assert {name: work for name, work in deep.items() if name not in ("decoder", "backward")} == {
        name: work for name, work in small.items() if name not in ("decoder", "backward")
    }


def test_the_optimizer_moves_thirty_bytes_a_weight_of_its_shard() -> None:
    config = tiny_config("optim.precision=bf16")
    trained = sum(p.numel() for p in Pretrainer(config, Rows.per_rank(config, 2)).parameters() if p.requires_grad)
    zero3, zero2 = (
        update_work(config, load_ds_config(DEEPSPEED / f"{stage}.json", config, 2), 2) for stage in ("zero3", "zero2")
    )
    assert zero3["optimizer"].bytes == zero2["optimizer"].bytes == 30 * trained / 2
    assert zero2["ema"].bytes == 2 * zero3["ema"].bytes
    assert zero3["ema"].intensity(is_fused=True) == 3 / 14
