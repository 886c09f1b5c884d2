"""The EMA teacher: fp32 shards, each rank follows its own share, no communication.

    teacher <- momentum * teacher + (1 - momentum) * student          (DINO, eq. of the momentum encoder)

The average lives in fp32 beside the model: at momentum 0.9996 a bf16 teacher would round every update away. The frozen
teacher inside the engine holds only its rounded image. Under ZeRO-3 a student parameter and its teacher are cut alike,
so a rank's fp32 master shard is all it needs; under ZeRO-1 and 2 the teacher is whole on every rank and follows the
student's own (bf16-rounded) weights, which every rank has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import world, zero
from engine.checkpoint.pieces import MASTER, TEACHER, Piece, Pieces


@dataclass(frozen=True)
class Pair:
    """A student parameter, the frozen teacher parameter that follows it, and this rank's fp32 average."""

    name: str
    student: nn.Parameter
    teacher: nn.Parameter
    start: int
    average: Tensor  # (numel,) float32


class Teacher:
    """This rank's share of the EMA teacher. `pairs` are (name, student, teacher) with equal values at the start."""

    def __init__(self, pairs: list[tuple[str, nn.Parameter, nn.Parameter]]) -> None:
        self.pairs = []
        for name, student, teacher in pairs:
            start, numel = zero.local_range(teacher)
            average = zero.shard(teacher)[:numel].float().clone()
            self.pairs.append(Pair(name, student, teacher, start, average))

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """One EMA step toward the student, after the optimizer's step."""
        averages, students = [pair.average for pair in self.pairs], [self._student(pair) for pair in self.pairs]
        if all(student.dtype == torch.float32 for student in students):
            torch._foreach_lerp_(averages, students, 1.0 - momentum)
        else:  # ZeRO-1 and 2 in bf16: one at a time, so that only one of them is held in float32 at any moment
            for average, student in zip(averages, students, strict=True):
                average.lerp_(student.float(), 1.0 - momentum)
        self._publish()

    def pieces(self) -> list[Piece]:
        """This rank's averages, to be written; under ZeRO-1 and 2, whole on every rank, the first rank's."""
        own = [pair for pair in self.pairs if zero.is_partitioned(pair.teacher) or world.is_first()]
        return [Piece(TEACHER, pair.name, pair.start, pair.average) for pair in own]

    @torch.no_grad()
    def restore(self, pieces: Pieces) -> None:
        """Sets this rank's averages, as a checkpoint has them."""
        for pair in self.pairs:
            pair.average.copy_(pieces.read(TEACHER, pair.name, pair.start, pair.average.numel()))
        self._publish()

    def replicas(self) -> list[tuple[str, Tensor]]:
        """Under ZeRO-1 and 2 the averages, which every rank makes for itself."""
        whole = [pair for pair in self.pairs if not zero.is_partitioned(pair.teacher)]
        return [(f"average of teacher.{pair.name}", pair.average) for pair in whole]

    def copies(self) -> list[tuple[str, Tensor, Tensor]]:
        """The model's teacher, which is the averages rounded."""
        values = [zero.shard(pair.teacher)[: pair.average.numel()] for pair in self.pairs]
        return [(f"teacher.{pair.name}", own, pair.average) for pair, own in zip(self.pairs, values, strict=True)]

    def _student(self, pair: Pair) -> Tensor:
        if zero.is_partitioned(pair.student):
            return zero.Fragment(pair.name, pair.student, pair.start, pair.average.numel()).read(MASTER)
        return zero.shard(pair.student)

    def _publish(self) -> None:
        shards = [zero.shard(pair.teacher)[: pair.average.numel()] for pair in self.pairs]
        torch._foreach_copy_(shards, [pair.average for pair in self.pairs])
        zero.release(pair.teacher for pair in self.pairs)
