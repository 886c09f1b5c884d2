"""What each phase of a step computes and moves: the work that a report puts beside the phase's milliseconds.

    work = phase_work(config, Rows.per_rank(config, 2), world_size=2, attention="sdpa", caption_slots=14_336)
    work["trunk"]                          # Work(flops=1.2e10, product_bytes=2.2e8, bytes=8.2e8)
    logits_work(config, rows, 2, "sdpa")   # {"contrastive logits": Work(...), "prototype logits": Work(...)}
    update_work(config, ds_config, 2)      # {"optimizer": Work(...), "ema": Work(...)}

Counted, not modelled: one step of the real model, its objectives and their backward runs on tensors without memory
(torch's FakeTensorMode), and every operator is counted by the phase it runs in, the phases being those that a run times
(engine/report/timing.py). One rank's, collectives and the copies of ZeRO left out. Losses are counted as they run on a
CPU, FP8 products as those of the run's precision. With objectives.rec.mask it is the mean over the steps of a run.
The optimizer and the EMA are counted by hand.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import Config
from configs.ds import offloads_optimizer, zero_stage
from data.batch import Batch
from engine.assemble import CHILDREN, LEAVES
from engine.drop_path import drop_path
from engine.grad_cache import GradientCache
from engine.recompute import recompute_blocks
from engine.zero import DTYPES
from model.captions import PackedCaptions, pack_captions, row_width
from model.describe import step_layouts
from model.objectives.perceptual import Perceptual
from model.objectives.total import Centres, compute
from model.outputs import ClipOutputs
from model.pretrainer import Pretrainer
from model.rows import Rows
from profiling.step.communication import DTYPE_BYTES, FP32_BYTES, meta_model
from profiling.step.pretend import Pretend, corruption, frozen_encoder, perceptual_network
from profiling.step.roofline import Counted, Work
from profiling.workload import imagined_batch

# Whose products they are, by the file that asks for them, forward and backward.
LOGITS = {
    "kernels/contrastive": "contrastive logits",
    "kernels/contrastive_tiles": "contrastive logits",
    "kernels/prototypes": "prototype logits",
}
ADAMW_FLOPS = 15  # a weight: decay, two averages, their corrections, root, quotient, sum
EMA_FLOPS = 3


def phase_work(
    config: Config, rows: Rows, world_size: int, attention: str, caption_slots: float | None = None
) -> dict[str, Work]:
    """The work of a step's phases; "backward" is that of all parts, with what they compute again.

    `attention` is a backend of the CPU, "matmul" or "sdpa" (which stands for every fused one); `caption_slots` those
    that packed captions take on a rank, without it as many as their contexts have.
    """
    return _mean(config, rows, world_size, attention, caption_slots)[0]


def logits_work(
    config: Config, rows: Rows, world_size: int, attention: str, caption_slots: float | None = None
) -> dict[str, Work]:
    """Of what the losses compute and keep no matrix of, all passes over it together: a part of the phases above."""
    return _mean(config, rows, world_size, attention, caption_slots)[1]


@cache
def _mean(
    config: Config, rows: Rows, world_size: int, attention: str, caption_slots: float | None
) -> tuple[dict[str, Work], dict[str, Work]]:
    """Over steps that hide more and fewer patches from rec: by phase, and what the losses keep no matrix of."""
    work, within = defaultdict[str, Work](Work), defaultdict[str, Work](Work)
    for hidden, (_, share) in step_layouts(config, rows).items():
        counted = _counted(config, rows, world_size, attention, hidden, caption_slots)
        for sums, found in ((work, counted.work), (within, counted.within)):
            for name, each in found.items():
                sums[name] += each * share
    return dict(work), dict(within)


def _counted(
    config: Config, rows: Rows, world_size: int, attention: str, hidden: int, caption_slots: float | None
) -> Counted:
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.optim.precision])
    try:
        captions = pack_captions(_captions(config, rows, caption_slots))
        kept = drop_path(config, 0, world_size)
        kept_idx = None if kept is None else kept.draw(0, hidden)
        batch = imagined_batch(config, rows)
        with FakeTensorMode():
            faked = {name: _fake(value) for name, value in vars(batch).items()}
            drawn = {"kept_idx": _fake(kept_idx), "corruption": corruption(config, rows, hidden)}
            return _Step(config, world_size, attention, Batch(**faked), _fake(captions), drawn).count(rows)
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class _Step:
    """On tensors without memory, as engine/step.py takes it."""

    config: Config
    world_size: int
    attention: str
    batch: Batch
    captions: PackedCaptions  # of each micro-batch
    drawn: dict[str, Any]  # by chance, for the micro-batch with ssl and rec

    def count(self, rows: Rows) -> Counted:
        model = Pretrainer(self.config, rows, self.attention)
        recompute_blocks(model, self.config.system.activation_checkpointing, tuple(LEAVES))
        perceptual, centres = self._perceptual(), self._centres()
        frozen = frozen_encoder(self.config, self.attention)
        counted = Counted(LOGITS)
        _tell_phases(model, counted)
        with counted:
            cache = GradientCache(self.batch, rows, lambda part: self._clip(model, part))
            outputs = cache.complete(model(**self._inputs(cache.shared), **self.drawn))
            with counted("objectives"):
                comm = Pretend(self.world_size)
                total = compute(outputs, self.config.objectives, 0.07, comm, centres, perceptual, frozen).total
            with counted("backward"):
                total.backward()
            cache.replay(lambda loss: self._replayed(counted, loss))
        return counted

    def _replayed(self, counted: Counted, loss: Tensor) -> None:
        with counted("backward"):
            loss.backward()

    def _clip(self, model: nn.Module, part: Batch) -> ClipOutputs:
        clip: ClipOutputs = model(**self._inputs(part), clip_only=True).clip
        return clip

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        names = ("images", "global_crops", "local_crops", "masks", "masked_idx")
        return {"captions": self.captions, **{name: getattr(batch, name) for name in names}}

    def _centres(self) -> Centres | None:
        ssl = self.config.objectives.ssl
        needs_them = ssl.weight and ssl.targets == "centering"
        return Centres.zeros(self.config.model.prototypes.num) if needs_them else None

    def _perceptual(self) -> Perceptual | None:
        rec = self.config.objectives.rec
        return perceptual_network() if rec.weight and rec.perceptual else None


def _tell_phases(model: nn.Module, counted: Counted) -> None:
    for name, phase in CHILDREN.items():
        child = getattr(model, name)
        if child is not None:
            child.register_forward_pre_hook(lambda *_, phase=phase: counted.begin(phase))
            child.register_forward_hook(counted.end)


def _captions(config: Config, rows: Rows, slots: float | None) -> Tensor:
    """Of one micro-batch, of such lengths that they fill as many rows as a run's captions that take `slots`."""
    context, count = config.model.text.context, rows.part
    width = row_width(context)
    wanted = count if slots is None else min(count, max(1, round(slots / rows.micro_batches / width)))
    each, more = divmod(count, wanted) if wanted else (0, 0)
    lengths = [width // (each + 1)] * ((each + 1) * more) + [width // max(each, 1)] * (each * (wanted - more))
    captions = torch.zeros(count, context, dtype=torch.int64)
    for caption, length in enumerate(lengths):
        captions[caption, min(length, context) - 1] = config.model.text.vocab - 1
    return captions


def _fake(value: Any) -> Any:
    """Every tensor, alone or in a named tuple, without its memory and on the CPU."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    return type(value)(*map(_fake, value)) if hasattr(value, "_fields") else value


def update_work(config: Config, ds_config: dict[str, Any], world_size: int) -> dict[str, Work]:
    """Of "optimizer" and "ema" on this rank's shards, each number read and written once a step.

    AdamW reads weight, gradient and two moments and writes all but the gradient, in float32, and the weight once more
    in the run's precision; it is left out where the host takes that step. The EMA reads student and average, writes the
    average and the teacher's weight; the average of all trained weights (`ema`) has no such weight. Products they have
    none: counted are 15 and 3 operations a weight.
    """
    each, model = DTYPE_BYTES[config.optim.precision], meta_model(config, world_size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / world_size
    all_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen = all_frozen / world_size if zero_stage(ds_config) == 3 else all_frozen
    found = {}
    if not offloads_optimizer(ds_config):
        moved = trained * (7 * FP32_BYTES + each)
        found["optimizer"] = Work(ADAMW_FLOPS * trained, moved, moved)
    averaged = trained if config.ema is not None and not offloads_optimizer(ds_config) else 0
    if frozen or averaged:
        moved = frozen * (3 * FP32_BYTES + each) + averaged * 3 * FP32_BYTES
        found["ema"] = Work(EMA_FLOPS * (frozen + averaged), moved, moved)
    return found
