"""The two corpora of a task that learns: it is trained on one and asked about the other.

    corpora = Corpora(held_out=Bank(...), training=lambda: bank_of(training_pictures), device=device)
    corpora.learn(lambda train, held_out, num_classes: Outcome(...))

Training features are read when the first task asks for them, after the held-out pass, and once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from configs import UserError
from engine.agreement import on_first
from evaluation.bank import Bank, Features
from evaluation.outcome import Figure, Outcome


class Corpora:
    """`held_out` is filled by the tasks; `training` makes the training bank, filled. The first rank learns for all."""

    def __init__(self, held_out: Bank, training: Callable[[], Bank], device: torch.device) -> None:
        self.held_out, self._training, self.device = held_out, training, device

    def learn(self, work: Callable[[Features, Features, int], Outcome]) -> Outcome:
        """`work`(training features, held-out features, number of classes) of the first rank, on every rank."""
        train, held_out = self._gathered
        return on_first(lambda: work(train, held_out, _classes(train, held_out)))  # type: ignore[arg-type]

    @staticmethod
    def counts(train: Features, held_out: Features, num_classes: int) -> dict[str, Figure]:
        """How much was learned from and asked, and what guessing would reach."""
        return {
            "chance": 1 / num_classes,
            "classes": num_classes,
            "images": len(held_out.labels_N),
            "train_images": len(train.labels_N),
        }

    @cached_property
    def _gathered(self) -> tuple[Features | None, Features | None]:
        held_out = self.held_out.gathered("held-out")  # first: a corpus without labels shows before the longer pass
        return self._training().gathered("training"), held_out


def _classes(train: Features | None, held_out: Features | None) -> int:
    assert train is not None
    assert held_out is not None
    num_classes = int(train.labels_N.max()) + 1
    if (unseen := held_out.labels_N[~torch.isin(held_out.labels_N, train.labels_N)]).numel():
        raise UserError(
            f"held-out label {int(unseen[0])} occurs in no training sample ({num_classes - 1} is the highest there): "
            "both corpora must have the same classes; correct --data or --train-data, or raise --limit"
        )
    return num_classes
