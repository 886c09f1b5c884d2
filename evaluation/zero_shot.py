"""Zero-shot classification: an image belongs to the class whose prompts lie nearest in the joint space.

    weights_KE = classifier(tokenizer, encoder, [["a red circle", "a crimson disc"], ["a blue square"]])
    predicted_B = (tokenizer.embed_images(images) @ weights_KE.T).argmax(dim=1)

CLIP's recipe: embed every prompt of a class, average, normalise again. The scale of the logits (100 in the paper) moves
no maximum, so there is none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from data.captions import CaptionEncoder
from evaluation.classes import ClassTable
from evaluation.figures import confusion_matrix
from evaluation.outcome import Outcome
from evaluation.products import Products
from model.losses.comm import Comm
from model.tokenizer import VisualTokenizer

MOST_DRAWN = 128  # classes of a confusion matrix that can still be read


def classifier(
    tokenizer: VisualTokenizer,
    encoder: CaptionEncoder,
    prompts: Sequence[Sequence[str]],
    device: torch.device,
) -> Tensor:
    """(K, clip_width) L2-normed: one direction a class."""
    rows = []
    for of_class in prompts:
        text_XE = tokenizer.embed_captions(encoder.encode(list(of_class)).to(device))
        rows.append(F.normalize(text_XE.mean(dim=0), dim=0))
    return torch.stack(rows)


class ZeroShot:
    """Top-1 and top-5 accuracy over labelled images, what guessing would reach, and which class is taken for which."""

    def __init__(self, weights_KE: Tensor, table: ClassTable, comm: Comm) -> None:
        self._weights_KE, self._table, self._comm = weights_KE, table, comm
        num_classes = len(weights_KE)
        self._confusion_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # label, prediction
        self._five = 0

    def add(self, batch: Products) -> None:
        """Counts a batch; rows labelled -1 are left out. Raises UserError for a label that the table does not have."""
        self.count(batch.embedding, batch.labels)

    def count(self, image_BE: Tensor, labels_B: Tensor) -> None:
        """`add` on embeddings."""
        num_classes = len(self._weights_KE)
        is_labelled = labels_B != -1
        labels_B = labels_B[is_labelled]
        if (wrong := labels_B[(labels_B < 0) | (labels_B >= num_classes)]).numel():
            raise UserError(
                f"a sample has label {int(wrong[0])}, the class table {num_classes} classes: labels are places in the "
                "table, from 0 on; give the table of this corpus with --classes"
            )
        scores_BK = image_BE[is_labelled] @ self._weights_KE.T
        best = scores_BK.topk(min(5, num_classes), dim=1).indices
        self._five += int((best == labels_B.unsqueeze(1)).any(dim=1).sum())
        pairs = (labels_B * num_classes + best[:, 0]).cpu()
        self._confusion_KK += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def result(self) -> Outcome:
        """Shares of the labelled images. Raises UserError where there were none."""
        confusion_KK = self._comm.all_sum(self._confusion_KK)
        five, count = int(self._comm.all_sum(torch.tensor(self._five))), int(confusion_KK.sum())
        if not count:
            raise UserError(
                "no held-out sample has a label: zero_shot compares with the class number or name in field `label` "
                "of the .json member, or in the .cls member; give labelled shards"
            )
        top1, chance = int(confusion_KK.diagonal().sum()) / count, 1 / len(confusion_KK)
        figures: dict[str, float | int | str] = {
            "top1": top1,
            "top5": five / count,
            "chance": chance,
            "times_chance": top1 / chance,
            "classes": len(confusion_KK),
            "images": count,
            "prompts": self._table.prompt_source,
        }
        drawable = len(confusion_KK) <= MOST_DRAWN
        picture = partial(confusion_matrix, confusion_KK, self._table.names)
        return Outcome(figures, pictures={"zero_shot_confusion": picture} if drawable else {})
