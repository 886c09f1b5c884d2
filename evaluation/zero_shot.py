"""Zero-shot classification: an image belongs to the class whose prompts lie nearest in the joint space.

    weights_KE = classifier(tokenizer, encoder, [["a red circle", "a crimson disc"], ["a blue square"]])
    predicted_B = (tokenizer.embed_images(images) @ weights_KE.T).argmax(dim=1)

CLIP's recipe: embed every prompt of a class, average, normalise again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from data.captions import CaptionEncoder
from model.tokenizer import VisualTokenizer


@dataclass(frozen=True)
class ClassTable:
    """Names of the classes in the order of their labels, and the prompts that stand for each."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, path: Path) -> ClassTable:
        """From a corpus's classes.json. Raises UserError where it is missing or of another form."""
        try:
            rows = json.loads(path.read_text())["classes"]
            return cls(tuple(row["name"] for row in rows), tuple(tuple(row["prompts"]) for row in rows))
        except OSError:
            raise UserError(
                f"{path} cannot be read: zero-shot needs the classes' prompts; give --classes FILE"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no class table ({error!r}): it holds classes, each with name and prompts"
            ) from None


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


class Accuracy:
    """Top-1 and top-5 accuracy over labelled images, and what guessing would reach."""

    def __init__(self, weights_KE: Tensor) -> None:
        self._weights_KE = weights_KE
        self._first = self._five = self._count = 0

    def add(self, image_BE: Tensor, labels_B: Tensor) -> None:
        """Counts a batch; rows labelled -1 are left out."""
        is_labelled = labels_B >= 0
        scores_BK = image_BE[is_labelled] @ self._weights_KE.T
        best = scores_BK.topk(min(5, scores_BK.shape[1]), dim=1).indices == labels_B[is_labelled].unsqueeze(1)
        self._first += int(best[:, 0].sum())
        self._five += int(best.any(dim=1).sum())
        self._count += int(is_labelled.sum())

    def result(self) -> dict[str, float]:
        """Shares of the labelled images. Raises UserError where there were none."""
        if not self._count:
            raise UserError("no held-out sample has a label: zero-shot compares with field `label` of the .json member")
        chance = 1 / len(self._weights_KE)
        top1 = self._first / self._count
        return {
            "top1": top1,
            "top5": self._five / self._count,
            "chance": chance,
            "times_chance": top1 / chance,
            "classes": len(self._weights_KE),
            "images": self._count,
        }
