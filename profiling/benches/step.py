"""Benches of one shared, packed step against three passes, and of the packed trunk against a pass for each kind of
crop.

`step`: VTP-L with 64 pairs on a GPU, the step of profiling/benches/workload.py on a CPU, forward to EMA, eager and
compiled. Both sides train the same weights on the same batch, in bf16 where the machine has it, without ZeRO (one
process). `packed`: clip images and the global and local crops of a quarter of them at the presets' sizes, with
backward: ViT-B on a GPU, a ViT-S with few images on a CPU.

The reference, ThreePass, is what one writes around the public model class: same modules, same weights. Images pass the
trunk once for each purpose (clip; ssl, where global and local crops are two calls, because the class takes one size a
call; rec), captions keep their padding, attention is torch's fused kernel, and losses are computed as formulas are
written, with every matrix of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import Config
from configs.schema import Objectives
from data.batch import Batch
from engine import optim
from engine.build import compile_blocks
from engine.ema import TeacherEma
from engine.process_settings import keep_freed_blocks
from engine.step import model_inputs
from kernels.attention import resolve_attention
from kernels.contrastive import softmax_reference
from model.initialise import initialise
from model.latent import RecNoise
from model.losses.comm import Solo
from model.losses.koleo import koleo_loss
from model.losses.pixels import l1_loss
from model.losses.targets import dense_cross_entropy, dense_sinkhorn
from model.losses.total import compute_losses
from model.outputs import Outputs, RecOutputs, SslOutputs
from model.packing import PackedLayout, RankBatchSizes
from model.pretrainer import Pretrainer, student_teacher_pairs
from model.text import one_caption_per_row, pack_captions
from model.trunk import Trunk
from profiling.benches.blocks import trunk_step, trunk_value
from profiling.benches.recorder import BenchRecorder, print_now
from profiling.benches.workload import preset_config, random_batch, small_step
from profiling.cost.step_flops import step_flops
from profiling.instruments.machine import by_device, device, matmul_peak, precision_label, training_dtype
from profiling.instruments.profiler import new_profiler


class SeparateTrunk(Trunk):
    """A trunk that runs a pass for each kind of crop, with results where a packed pass puts them."""

    def forward(self, crops: dict[str, Tensor], masks: dict[str, Tensor], **chosen: Any) -> Tensor:
        """All tokens of all crops."""
        assert chosen.get("kept_idx") is None, "the reference has no stochastic depth"
        assert not chosen.get("visible"), "nor patches that only rec does not see"
        parts = [
            self._pass(name, pixels, {name: masks[name]} if name in masks else {}) for name, pixels in crops.items()
        ]
        return torch.cat((*parts, parts[0].new_zeros(self.layout(crops).pad, parts[0].shape[1])))

    def _pass(self, name: str, pixels: Tensor, masks: dict[str, Tensor]) -> Tensor:
        crops = {name: pixels}
        return super().forward(crops, masks)[self.layout(crops).slice(name)]


class ThreePass(Pretrainer):
    """A Pretrainer with separate trunk passes for clip, ssl and rec images."""

    def __init__(self, config: Config, rows: RankBatchSizes) -> None:
        super().__init__(config, rows, "sdpa")
        self.trunk = SeparateTrunk(config.model, "sdpa")
        assert self.teacher is not None, "the reference computes all three objectives"
        self.teacher.trunk = SeparateTrunk(config.model, "sdpa").requires_grad_(False)
        assert rows.rec_start == 0, "rec rows lead the clip rows: batch.layout=nested"

    def _rec(
        self, layout: PackedLayout, x_TD: Tensor, y_TD: Tensor, crops: dict[str, Tensor], corruption: RecNoise
    ) -> RecOutputs | None:
        """Reconstruct from a pass of its own."""
        own = {"clip": crops["clip"][self._rec_rows()]}
        own_TD = self.trunk(own, {})
        latent_TD = own_TD if self.bottleneck_ae_only else self._through_bottleneck(own_TD)
        return super()._rec(self.trunk.layout(own), own_TD, latent_TD, own, corruption)


def padded_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """As engine.step.model_inputs, with every caption padded in a row of its own."""
    return model_inputs(batch, device) | {"captions": one_caption_per_row(batch.captions).to(device)}


def reference_loss(outputs: Outputs, objectives: Objectives, teacher_temp: float) -> Tensor:
    """The total of model.losses.total.compute_losses: softmax contrast, Sinkhorn targets, no perceptual term."""
    assert outputs.clip is not None
    assert outputs.ssl is not None
    assert outputs.rec is not None
    clip, _ = softmax_reference(outputs.clip.image_BE, outputs.clip.text_BE, outputs.clip.logit_scale)
    ssl = _reference_ssl(outputs.ssl, objectives.ssl.student_temp, teacher_temp)
    ssl = ssl + objectives.ssl.koleo * koleo_loss(outputs.ssl.student_cls_GD, Solo())
    rec = objectives.rec.l1 * l1_loss(outputs.rec.recon, outputs.rec.target)
    return objectives.clip.weight * clip + objectives.ssl.weight * ssl + objectives.rec.weight * rec


def _reference_ssl(ssl: SslOutputs, student_temp: float, teacher_temp: float) -> Tensor:
    """DINO and iBOT."""
    num_crops = len(ssl.student_global_GE)
    num_images, num_locals = num_crops // 2, 2 * len(ssl.student_local_LE) // num_crops
    cls_GK, patch_MK = (
        dense_sinkhorn(rows @ ssl.teacher_KE.T, teacher_temp, Solo())
        for rows in (ssl.teacher_global_GE, ssl.teacher_patch_ME)
    )
    global_GK, local_LK, hidden_MK = (
        rows @ ssl.student_KE.T for rows in (ssl.student_global_GE, ssl.student_local_LE, ssl.student_patch_ME)
    )
    both_views_LK = cls_GK.unflatten(0, (2, num_images)).sum(dim=0).repeat(num_locals, 1)
    local = dense_cross_entropy(local_LK, both_views_LK, student_temp).sum()
    across = dense_cross_entropy(global_GK, cls_GK.roll(num_images, dims=0), student_temp).sum()
    hidden = (ssl.patch_weight_M * dense_cross_entropy(hidden_MK, patch_MK, student_temp)).sum()
    return (local + across) / (num_images * (2 + 2 * num_locals)) + hidden / num_crops


TEMPERATURE, MOMENTUM = 0.07, 0.999
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
REFERENCE = "three passes, eager"
DRY = ("study_mini", 8)  # the tokenizer of the scaling study, clip images


def bench_step(recorder: BenchRecorder) -> None:
    """A shared pass against three, eager and then compiled. On a CPU malloc is set as in a run, for all variants."""
    keep_freed_blocks(device())
    config = _config(recorder.is_dry)
    batch, rows = random_batch(config), RankBatchSizes.per_rank(config, 1)
    attention = resolve_attention("auto", device(), training_dtype()).name
    losses: dict[str, float] = {}

    def build(name: str) -> BenchStep:
        """Here and not before: eager steps are measured before anything is compiled."""
        is_shared, is_compiled = name.startswith("shared"), name.endswith("compiled")
        print_now(f"step: {name}: building the model and computing its loss in {precision_label()}")
        with device():
            model = Pretrainer(config, rows, attention) if is_shared else ThreePass(config, rows)
        inputs, total = (model_inputs, shared_loss) if is_shared else (padded_inputs, reference_loss)
        step = BenchStep(model, config, batch, inputs, total, is_compiled=is_compiled)
        losses[name] = step.loss().item()
        print_now(f"step: {name}: loss {losses[name]:.3f}")
        assert max(losses.values()) - min(losses.values()) < 0.01 * losses[REFERENCE], losses  # bf16
        return step

    names = [f"{passes}, {mode}" for mode in ("eager", "compiled") for passes in ("three passes", "shared")]
    steps = {name: LazyStep(partial(build, name)) for name in names}
    slots = float(pack_captions(batch.captions).tokens_RC.numel())
    result = recorder.measure(
        "step",
        f"{config.name}: {rows.clip} pairs, {rows.ssl} ssl, {rows.rec} rec, {precision_label()}, attention {attention}",
        steps,
        REFERENCE,
        flops=step_flops(config, rows, slots, backend=attention, device=device().type).model_flops,
        peak=matmul_peak(training_dtype()),
    )
    notes = tuple(products_note(name, steps[name]) for name in ("shared, eager", "shared, compiled"))
    recorder.add(replace(result, notes=notes))


def _config(is_dry: bool) -> Config:
    if device().type == "cuda":
        return preset_config("vtp_l", 64)
    return preset_config(*DRY) if is_dry else small_step()


class LazyStep:
    """A step that is built at its first call."""

    def __init__(self, build: Callable[[], BenchStep]) -> None:
        self._build = build
        self._step: BenchStep | None = None

    def __call__(self) -> None:
        """Run the step."""
        if self._step is None:
            self._step = self._build()
        self._step()


def products_note(name: str, step: Callable[[], object]) -> str:
    """A note on how much of a step on a CPU is matrix products: a lower bound of its time."""
    if device().type != "cpu":
        return f"{name}: products are not distinguished on {device().type}"
    step()
    with new_profiler() as seen:
        step()
    events = seen.key_averages()
    products, whole = (
        sum(event.self_cpu_time_total for event in events if wanted is None or event.key in wanted) / 1e6
        for wanted in (PRODUCTS, None)
    )
    return f"{name}: {products:.2f} s of {whole:.2f} s are matrix products (torch.profiler, one step)"


def shared_loss(outputs: Outputs, objectives: Objectives, teacher_temp: float) -> Tensor:
    """The total loss as the engine computes it."""
    return compute_losses(outputs, objectives, teacher_temp, Solo()).total


class BenchStep:
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
        self.teacher = TeacherEma(student_teacher_pairs(self.model))

    def loss(self) -> Tensor:
        """The total loss of the batch."""
        outputs = self.model(**self.inputs(self.batch, device()))
        return self.total(outputs, self.config.objectives, TEMPERATURE)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.teacher.update(MOMENTUM)


PACKED_DRY = ("study_mini", 8)
PRESET, IMAGES = by_device(cuda=("vtp_b", 128), cpu=("vtp_s", 8))


def bench_packed(recorder: BenchRecorder) -> None:
    """The packed trunk against a pass for each kind of crop, eager and compiled."""
    config = preset_config(*(PACKED_DRY if recorder.is_dry else (PRESET, IMAGES)))
    crops = _crops(config)
    backend = resolve_attention("auto", device(), training_dtype()).name
    towers = {}
    for name, kind in (("a pass each", SeparateTrunk), ("packed", Trunk)):
        for mode in ("eager", "compiled"):
            with device():
                tower = kind(config.model, backend)
            initialise(tower, config, device())
            towers[f"{name}, {mode}"] = tower.to(device(), training_dtype())
            if mode == "compiled":
                compile_blocks(tower)
    values = {name: float(trunk_value(tower, crops)) for name, tower in towers.items()}
    assert max(values.values()) - min(values.values()) < 0.02 * abs(values["packed, eager"]), values  # bf16
    layout = towers["packed, eager"].layout(crops)
    sizes = " + ".join(f"{group.segments} x {group.length}" for group in layout.groups)
    workload = f"trunk of {config.name}, {sizes} tokens, {precision_label()}, attention {backend}, forward and backward"
    variants = {name: trunk_step(tower, crops) for name, tower in towers.items()}
    result = recorder.measure("packed", workload, variants, "a pass each, eager")
    times = {row.variant: row.median_ms for row in result.rows}
    gains = ", ".join(
        f"{times[f'a pass each, {mode}'] / times[f'packed, {mode}']:.2f} x {mode}" for mode in ("eager", "compiled")
    )
    recorder.add(replace(result, notes=(f"packed is {gains}",)))


def _crops(config: Config) -> dict[str, Tensor]:
    """(B, 3, H, W) by kind, as a step has them."""
    batch, views = config.batch, config.views
    sizes = {
        "clip": (batch.clip, views.image_size),
        "ssl_global": (2 * batch.ssl, views.global_size),
        "ssl_local": (views.num_locals * batch.ssl, views.local_size),
    }
    return {name: torch.randn(count, 3, size, size, device=device()) for name, (count, size) in sizes.items()}
