"""One whole step, shared and packed, against the same step in three passes: eager and compiled, forward to EMA.

VTP-L with 64 pairs on a GPU, the step of profiling/workload.py on a CPU. Both sides train the same weights on the same
batch, in bf16 where the machine has it, without ZeRO (one process). The reference computes what the public model class
would (profiling/step/three_pass.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import Config
from configs.learning import Objectives
from data.batch import Batch
from engine import optim
from engine.assemble import compile_blocks
from engine.host_memory import keep_freed_blocks
from engine.step import model_inputs
from engine.teacher import Teacher
from kernels.attention import resolve
from model.captions import pack_captions
from model.initialise import initialise
from model.objectives.comm import Solo
from model.objectives.total import compute
from model.outputs import Outputs
from model.pretrainer import Pretrainer, teacher_pairs
from model.rows import Rows
from profiling.benches.one_rank import configured
from profiling.machine import device, matmul_peak, precision_label, training_dtype
from profiling.measurement import Recorder, print_now
from profiling.step.flops import step_flops
from profiling.step.three_pass import ThreePass, padded_inputs, written_out_loss
from profiling.torch_profiler import recording
from profiling.workload import random_batch, small_step

TEMPERATURE, MOMENTUM = 0.07, 0.999
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
REFERENCE = "three passes, eager"
DRY = ("study_mini", 8)  # the tokenizer of the scaling study, clip images


def run(recorder: Recorder) -> None:
    """One measurement of four variants, the eager ones first. On a CPU malloc is set as in a run, for all four."""
    keep_freed_blocks(device())
    config = _config(recorder.is_dry)
    batch, rows = random_batch(config), Rows.per_rank(config, 1)
    attention = resolve("auto", device(), training_dtype()).name
    losses: dict[str, float] = {}

    def build(name: str) -> Step:
        """Here and not before: eager steps are measured before anything is compiled."""
        is_shared, is_compiled = name.startswith("shared"), name.endswith("compiled")
        print_now(f"step: {name}: building the model and computing its loss in {precision_label()}")
        with device():
            model = Pretrainer(config, rows, attention) if is_shared else ThreePass(config, rows)
        inputs, total = (model_inputs, shared_loss) if is_shared else (padded_inputs, written_out_loss)
        made = Step(model, config, batch, inputs, total, is_compiled=is_compiled)
        losses[name] = made.loss().item()
        print_now(f"step: {name}: loss {losses[name]:.3f}")
        assert max(losses.values()) - min(losses.values()) < 0.01 * losses[REFERENCE], losses  # bf16
        return made

    names = [f"{passes}, {mode}" for mode in ("eager", "compiled") for passes in ("three passes", "shared")]
    steps = {name: Built(partial(build, name)) for name in names}
    slots = float(pack_captions(batch.captions).tokens_RC.numel())
    found = recorder.measure(
        "step",
        f"{config.name}: {rows.clip} pairs, {rows.ssl} ssl, {rows.rec} rec, {precision_label()}, attention {attention}",
        steps,
        REFERENCE,
        flops=step_flops(config, rows, slots, backend=attention, device=device().type).model_flops,
        peak=matmul_peak(training_dtype()),
    )
    notes = tuple(in_products(name, steps[name]) for name in ("shared, eager", "shared, compiled"))
    recorder.add(replace(found, notes=notes))


def _config(is_dry: bool) -> Config:
    if device().type == "cuda":
        return configured("vtp_l", 64)
    return configured(*DRY) if is_dry else small_step()


class Built:
    """A step that is built when it is first taken."""

    def __init__(self, build: Callable[[], Step]) -> None:
        self._build = build
        self._step: Step | None = None

    def __call__(self) -> None:
        """Take it."""
        if self._step is None:
            self._step = self._build()
        self._step()


def in_products(name: str, step: Callable[[], object]) -> str:
    """How much of a step on a CPU is matrix products: what no rewriting of the rest can go below."""
    if device().type != "cpu":
        return f"{name}: products are not told apart on {device().type}"
    step()
    with recording() as seen:
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
        initialise(model, config, device())
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
