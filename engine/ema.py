"""Running averages that evolve beside the optimizer: the EMA teacher, the average of the weights, the teacher's centre.

    teacher <- momentum * teacher + (1 - momentum) * student          (DINO's momentum encoder)
    average <- momentum * average + (1 - momentum) * weights          (generators: 0.9999 [P]; decoders after a GAN)

    teacher = TeacherEma(teacher_pairs(engine.module))
    average = WeightEma(engine, name=MAIN)
    teacher.update(0.994); average.update(0.9999)     # after every optimizer step, no communication
    full_weights(checkpoint, AVERAGE)                 # by name, when the run is over

Averages are fp32 on each rank's own shard: at momentum 0.9996 a bf16 teacher would round every update away. All three
are `Stateful` (engine/checkpoint/contents.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed, zero
from engine.checkpoint.contents import replicated_ranges
from engine.checkpoint.tensor_ranges import AVERAGE, MASTER, TEACHER, WHOLE, RangeReader, TensorRange, qualified_name
from model.losses.total import TeacherCentres


@dataclass(frozen=True)
class TeacherShard:
    """A student parameter, the frozen teacher parameter that follows it, and this rank's part of the fp32 average."""

    name: str
    student: nn.Parameter
    teacher: nn.Parameter
    start: int
    average: Tensor  # (numel,) float32


class TeacherEma:
    """The EMA teacher of self-distillation, this rank's shards.

    `pairs` are (name, student, teacher) parameters with equal values at the start. The frozen teacher module inside the
    engine holds the rounded average. Under ZeRO-3 a student parameter and its teacher are cut alike, so a rank's fp32
    master shard is all it needs; under ZeRO-1 and 2 the teacher is whole on every rank and follows the student's own
    (bf16-rounded) weights, which every rank has.
    """

    def __init__(self, pairs: list[tuple[str, nn.Parameter, nn.Parameter]]) -> None:
        self.shards = []
        for name, student, teacher in pairs:
            start, numel = zero.local_range(teacher)
            average = zero.shard(teacher)[:numel].float().clone()
            self.shards.append(TeacherShard(name, student, teacher, start, average))

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the averages one EMA step toward the student, after the optimizer's step."""
        averages, students = [shard.average for shard in self.shards], [_student_values(shard) for shard in self.shards]
        if all(student.dtype == torch.float32 for student in students):
            torch._foreach_lerp_(averages, students, 1.0 - momentum)
        else:  # ZeRO-1 and 2 in bf16: one at a time, so that only one of them is held in float32 at any moment
            for average, student in zip(averages, students, strict=True):
                average.lerp_(student.float(), 1.0 - momentum)
        self._write_to_module()

    def state_ranges(self) -> list[TensorRange]:
        """Return this rank's averages; under ZeRO-1 and 2, where all ranks hold them whole, the first rank's."""
        own = [shard for shard in self.shards if zero.is_partitioned(shard.teacher) or distributed.is_first()]
        return [TensorRange(TEACHER, shard.name, shard.start, shard.average) for shard in own]

    @torch.no_grad()
    def load_ranges(self, reader: RangeReader) -> None:
        """Load this rank's averages from a checkpoint."""
        for shard in self.shards:
            shard.average.copy_(reader.read(TEACHER, shard.name, shard.start, shard.average.numel()))
        self._write_to_module()

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """List the averages under ZeRO-1 and 2, where every rank computes all of them."""
        whole = [shard for shard in self.shards if not zero.is_partitioned(shard.teacher)]
        return [(f"average of teacher.{shard.name}", shard.average) for shard in whole]

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """List the teacher module's values, which are the averages rounded."""
        values = [zero.shard(shard.teacher)[: shard.average.numel()] for shard in self.shards]
        return [(f"teacher.{shard.name}", own, shard.average) for shard, own in zip(self.shards, values, strict=True)]

    def _write_to_module(self) -> None:
        values = [zero.shard(shard.teacher)[: shard.average.numel()] for shard in self.shards]
        torch._foreach_copy_(values, [shard.average for shard in self.shards])
        zero.drop_gathered(shard.teacher for shard in self.shards)


def _student_values(shard: TeacherShard) -> Tensor:
    if zero.is_partitioned(shard.student):
        return zero.Fragment(shard.name, shard.student, shard.start, shard.average.numel()).read(MASTER)
    return zero.shard(shard.student)


class WeightEma:
    """Running average of all weights that an engine trains, this rank's shards; starts at the weights' present values.

    `name` is the engine's in a checkpoint. Sampling and evaluation use the average in place of the weights. Training
    never reads it, so unlike the teacher it is no module of the model.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self._name = name
        self._fragments = zero.fragments(engine)
        self._averages = [fragment.read(MASTER).float().clone() for fragment in self._fragments]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the average one step toward the weights, after the optimizer's step."""
        weights = [fragment.read(MASTER) for fragment in self._fragments]
        if weights:
            torch._foreach_lerp_(self._averages, weights, 1.0 - momentum)

    def state_ranges(self) -> list[TensorRange]:
        """Return this rank's shards of the average."""
        return [
            TensorRange(AVERAGE, qualified_name(self._name, fragment.name), fragment.start, values)
            for fragment, values in zip(self._fragments, self._averages, strict=True)
        ]

    @torch.no_grad()
    def load_ranges(self, reader: RangeReader) -> None:
        """Load this rank's shards from a checkpoint."""
        for fragment, values in zip(self._fragments, self._averages, strict=True):
            name = qualified_name(self._name, fragment.name)
            values.copy_(reader.read(AVERAGE, name, fragment.start, fragment.numel))

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """Empty: each rank has its own shard."""
        return []

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """Empty: the average is no module of the model."""
        return []


class CentreState:
    """The running centre of the teacher's logits (objectives.ssl.targets=centering); `value` is None without it.

    Each step computes the next centre (engine/step.py), the same on every rank.
    """

    def __init__(self, value: TeacherCentres | None) -> None:
        self.value = value

    def state_ranges(self) -> list[TensorRange]:
        """Return the centre, whole, on the first rank."""
        return replicated_ranges(self._tensors())

    def load_ranges(self, reader: RangeReader) -> None:
        """Load the centre; it stays as it is where the checkpoint has none."""
        if self.value is not None and reader.names(WHOLE):
            device = self.value.cls_K.device
            self.value = TeacherCentres(**{name: reader.read(WHOLE, name).to(device) for name in self._tensors()})

    def replicated_tensors(self) -> list[tuple[str, Tensor]]:
        """List the centre's tensors."""
        return list(self._tensors().items())

    def rounded_copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """Empty: it is fp32 only."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        return {} if self.value is None else dict(vars(self.value))
