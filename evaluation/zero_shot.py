"""Zero-shot classification: predict the class whose prompts' mean embedding is nearest to the image's.

    weights_KE = class_embeddings(tokenizer, encoder, [["a red circle", "a crimson disc"], ["a blue square"]])
    predicted_B = (tokenizer.embed_images(images) @ weights_KE.T).argmax(dim=1)

CLIP's recipe: embed every prompt of a class, average, normalise again. Logits are not scaled (by 100 in the paper),
since this does not change the argmax.

Classes come from classes.json, in the order of their labels. A corpus may bring its own prompts:

    {"classes": [{"name": "red circle", "prompts": ["a red circle", "a crimson disc"]}, ...]}

Names alone, as there are for ImageNet, are put into CLIP's 80 templates:

    {"classes": [{"name": "tench"}, {"name": "goldfish"}, ...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from data.annotations import read_classes
from data.captions import CaptionEncoder
from evaluation.plots import draw_confusion_matrix
from evaluation.results import TaskResult
from evaluation.tokenizer_source import TokenizerOutputs
from model.losses.comm import Comm
from model.tokenizer import VisualTokenizer

# The 80 templates that CLIP's authors used for ImageNet: 38 with "a" and with "the", and four as they stand. Source:
# the prompt-engineering notebook of github.com/openai/CLIP (arXiv 2103.00020, section 3.1.4). Their order does not
# matter, because prompts are averaged.
_WITH_BOTH_ARTICLES = (
    "a bad photo of {article} {name}.", "a sculpture of {article} {name}.", "a photo of {article} hard to see {name}.",
    "a low resolution photo of {article} {name}.", "a rendering of {article} {name}.", "graffiti of {article} {name}.",
    "a cropped photo of {article} {name}.", "a tattoo of {article} {name}.", "{article} embroidered {name}.",
    "a bright photo of {article} {name}.", "a photo of {article} clean {name}.", "a photo of {article} dirty {name}.",
    "a dark photo of {article} {name}.", "a drawing of {article} {name}.", "{article} plastic {name}.",
    "a photo of {article} cool {name}.", "a close-up photo of {article} {name}.",
    "a black and white photo of {article} {name}.", "a painting of {article} {name}.",
    "a pixelated photo of {article} {name}.", "a jpeg corrupted photo of {article} {name}.",
    "a blurry photo of {article} {name}.", "a photo of {article} {name}.", "a good photo of {article} {name}.",
    "{article} {name} in a video game.", "a doodle of {article} {name}.", "{article} origami {name}.",
    "a sketch of {article} {name}.", "{article} toy {name}.", "a rendition of {article} {name}.",
    "a photo of {article} large {name}.", "a photo of {article} nice {name}.", "a photo of {article} weird {name}.",
    "a photo of {article} small {name}.", "{article} cartoon {name}.", "art of {article} {name}.",
    "itap of {article} {name}.", "{article} plushie {name}.",
)  # fmt: skip
_ALONE = ("a photo of many {name}.", "a photo of my {name}.", "a photo of one {name}.", "itap of my {name}.")


def imagenet_prompts(name: str) -> tuple[str, ...]:
    """Return CLIP's 80 prompts for a class: "a bad photo of a goldfish.", "a bad photo of the goldfish.", ..."""
    both = [text.format(article=article, name=name) for text in _WITH_BOTH_ARTICLES for article in ("a", "the")]
    return (*both, *(text.format(name=name) for text in _ALONE))


CLIP_TEMPLATES, OWN_PROMPTS = "80 CLIP templates", "the corpus's own"


@dataclass(frozen=True)
class ClassTable:
    """Class names in the order of their labels, the prompts of each, and the source of the prompts."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    prompt_source: str = OWN_PROMPTS

    @classmethod
    def read(cls, path: Path) -> ClassTable:
        """Read classes.json. Raises UserError if it is missing, malformed, or has prompts for some classes only."""
        rows = read_classes(path)
        names = tuple(name for name, _ in rows)
        bare = [name for name, prompts in rows if not prompts]
        if len(bare) == len(rows):
            return cls(names, tuple(map(imagenet_prompts, names)), CLIP_TEMPLATES)
        if bare:
            raise UserError(
                f"{path}: {len(bare)} of {len(rows)} classes have no prompts (first: {bare[0]!r}): either every class "
                "has its own, or none has and the 80 CLIP templates are used; complete or remove them"
            )
        return cls(names, tuple(prompts for _, prompts in rows))


MAX_CONFUSION_CLASSES = 128  # of a confusion matrix that is still readable


def class_embeddings(
    tokenizer: VisualTokenizer,
    encoder: CaptionEncoder,
    prompts: Sequence[Sequence[str]],
    device: torch.device,
) -> Tensor:
    """Compute one L2-normed text embedding for each class, the mean over its prompts: (K, clip_width)."""
    rows = []
    for class_prompts in prompts:
        text_XE = tokenizer.embed_captions(encoder.encode(list(class_prompts)).to(device))
        rows.append(F.normalize(text_XE.mean(dim=0), dim=0))
    return torch.stack(rows)


class ZeroShot:
    """Zero-shot top-1 and top-5 accuracy over labelled images, chance accuracy and the confusion matrix."""

    def __init__(self, weights_KE: Tensor, table: ClassTable, comm: Comm) -> None:
        self._weights_KE, self._table, self._comm = weights_KE, table, comm
        num_classes = len(weights_KE)
        self._confusion_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # label, prediction
        self._five = 0

    def add(self, batch: TokenizerOutputs) -> None:
        """Count a batch; images without a label (-1) are left out. Raises UserError for a label outside the table."""
        self.count(batch.embedding, batch.labels)

    def count(self, image_BE: Tensor, labels_B: Tensor) -> None:
        """Count embeddings, as `add`."""
        num_classes = len(self._weights_KE)
        is_labelled = labels_B != -1
        labels_B = labels_B[is_labelled]
        if (wrong := labels_B[(labels_B < 0) | (labels_B >= num_classes)]).numel():
            raise UserError(
                f"a sample has label {int(wrong[0])}, the class table {num_classes} classes: labels are indices into "
                "the table, from 0 on; give the table of this corpus with --classes"
            )
        scores_BK = image_BE[is_labelled] @ self._weights_KE.T
        best = scores_BK.topk(min(5, num_classes), dim=1).indices
        self._five += int((best == labels_B.unsqueeze(1)).any(dim=1).sum())
        pairs = (labels_B * num_classes + best[:, 0]).cpu()
        self._confusion_KK += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def result(self) -> TaskResult:
        """Return accuracies over the labelled images of all ranks. Raises UserError if there are none."""
        confusion_KK = self._comm.all_sum(self._confusion_KK)
        five, count = int(self._comm.all_sum(torch.tensor(self._five))), int(confusion_KK.sum())
        if not count:
            raise UserError(
                "no held-out sample has a label: zero_shot compares with the class number or name in field `label` "
                "of the .json member, or in the .cls member; give labelled shards"
            )
        top1, chance = int(confusion_KK.diagonal().sum()) / count, 1 / len(confusion_KK)
        metrics: dict[str, float | int | str] = {
            "top1": top1,
            "top5": five / count,
            "chance": chance,
            "times_chance": top1 / chance,
            "classes": len(confusion_KK),
            "images": count,
            "prompts": self._table.prompt_source,
        }
        is_readable = len(confusion_KK) <= MAX_CONFUSION_CLASSES
        plot = partial(draw_confusion_matrix, confusion_KK, self._table.names)
        return TaskResult(metrics, plots={"zero_shot_confusion": plot} if is_readable else {})
