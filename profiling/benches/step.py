"""One whole step, shared and packed, against the same step in three passes: eager and compiled, forward to EMA.

Both sides train the same weights on the same batch, in bf16 where the machine has it, without ZeRO (one process). The
reference computes what the public model class would (profiling/step/three_pass.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from configs import Config
from configs.learning import Objectives
from data.batch import Batch
from engine import optim
from engine.assemble import compile_blocks
from engine.host_memory import keep_freed_blocks
from engine.step import model_inputs
from engine.teacher import Teacher
from kernels.attention import resolve
from model.initialise import initialise
from model.objectives.comm import Solo
from model.objectives.total import compute
from model.outputs import Outputs
from model.pretrainer import Pretrainer, teacher_pairs
from model.rows import Rows
from profiling.machine import device, matmul_peak, precision_label, training_dtype
from profiling.measurement import Measurement, measure, print_now
from profiling.step.three_pass import ThreePass, padded_inputs, written_out_loss
from profiling.workload import random_batch, small_step

TEMPERATURE, MOMENTUM = 0.07, 0.999
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def run(rounds: int) -> list[Measurement]:
    """One measurement of four variants. On a CPU malloc is set as in a run, for all four."""
    keep_freed_blocks(device())
    config = small_step()
    batch, rows = random_batch(config), Rows.per_rank(config, 1)
    attention = resolve("auto", device(), training_dtype()).name

    def shared() -> Pretrainer:
        return Pretrainer(config, rows, attention)

    def apart() -> Pretrainer:
        return ThreePass(config, rows)

    losses, steps = {}, {}
    for mode in ("eager", "compiled"):
        for name, model, inputs, total in (
            (f"three passes, {mode}", apart, padded_inputs, written_out_loss),
            (f"shared, {mode}", shared, model_inputs, shared_loss),
        ):
            print_now(f"step: {name}: building the model and computing its loss in {precision_label()}")
            steps[name] = Step(model(), config, batch, inputs, total, is_compiled=mode == "compiled")
            losses[name] = steps[name].loss().item()
            print_now(f"step: {name}: loss {losses[name]:.3f}")
    assert max(losses.values()) - min(losses.values()) < 0.01 * losses["shared, eager"], losses  # bf16
    with FlopCounterMode(display=False) as counter:
        steps["shared, eager"].loss().backward()
    return [
        measure(
            "step",
            f"{config.batch.clip} pairs, {config.batch.ssl} ssl, {config.batch.rec} rec, {precision_label()}, "
            f"attention {attention}",
            steps,
            "three passes, eager",
            rounds,
            flops=counter.get_total_flops(),
            peak=matmul_peak(training_dtype()),
            warmups=1,
            notes=tuple(in_products(name, steps[name]) for name in ("shared, eager", "shared, compiled")),
        )
    ]


def in_products(name: str, step: Step) -> str:
    """How much of a step on a CPU is matrix products: what no rewriting of the rest can go below."""
    if device().type != "cpu":
        return f"{name}: products are not told apart on {device().type}"
    step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        step()
    events = seen.key_averages()
    products, whole = (
        sum(event.self_cpu_time_total for event in events if wanted is None or event.key in wanted) / 1e6
        for wanted in (PRODUCTS, None)
    )
    return f"{name}: {products:.2f} s of {whole:.2f} s are matrix products (torch.profiler, one step)"


def shared_loss(outputs: Outputs, objectives: Objectives, teacher_temp: float) -> Tensor:
    """As the engine computes it."""
    return compute(outputs, objectives, teacher_temp, Solo()).total


class Step:
    """Forward, losses, backward, AdamW and the teacher's EMA of one variant."""

    def __init__(
        self,
        model: Pretrainer,
        config: Config,
        batch: Batch,
        inputs: Callable[[Batch, torch.device], dict[str, Any]],
        total: Callable[[Outputs, Objectives, float], Tensor],
        is_compiled: bool = False,
    ) -> None:
        initialise(model, config)
        self.model = model.to(device(), training_dtype())
        if is_compiled:
            compile_blocks(self.model)
        self.config, self.batch, self.inputs, self.total = config, batch, inputs, total
        self.optimizer = optim.build(self.model, config.optim, "torch_fused")
        self.teacher = Teacher(teacher_pairs(self.model))

    def loss(self) -> Tensor:
        """The total loss of the batch."""
        outputs = self.model(**self.inputs(self.batch, device()))
        return self.total(outputs, self.config.objectives, TEMPERATURE)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.teacher.follow(MOMENTUM)
