"""Gradient cache: a clip batch larger than memory, in micro-batches, with the gradient of the whole batch.

The contrastive loss couples all pairs, but through their features alone. So (GradCache, arXiv 2101.06983):

    1. every micro-batch but one runs forward without gradient; its image and text features are kept, as leaves
    2. the shared micro-batch, which brings the ssl and rec rows along, runs forward with gradient; the loss is that of
       all features together; its backward goes through the shared one and leaves d loss / d feature in the leaves
    3. every other micro-batch runs again, with gradient, and takes its slice of d loss / d feature through the model

    cache = GradientCache.forward(batch, rows, run)     # 1.  32 rows in 4 parts: run(part) -> ClipOutputs of 8 rows
    outputs = cache.complete(engine(cache.shared))      # 2.  outputs.clip has 32 rows again, in the batch's order
    engine.backward(compute(outputs, ...).total)
    cache.replay(engine.backward)                       # 3.

The logit scale and bias come out of the shared micro-batch alone, so their gradient is counted once. With one
micro-batch nothing is kept and nothing runs twice: the plain step. Step 3 must compute what step 1 did, and does: the
model draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Batch
from model.outputs import ClipOutputs, Outputs
from model.packing import RankBatchSizes

ClipForward = Callable[[Batch], ClipOutputs]  # the clip features of a micro-batch's rows alone


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Equal parts of the clip rows, in order; views, no copies. Each still names all ssl rows."""
    size = len(batch.images) // num_parts
    spans = [slice(number * size, (number + 1) * size) for number in range(num_parts)]
    return [
        replace(batch, images=batch.images[rows], captions=batch.captions[rows], keys=batch.keys[rows])
        for rows in spans
    ]


@dataclass(frozen=True)
class CachedFeatures:
    """A micro-batch without ssl rows, and its features: leaves, which hold the loss's gradient after its backward."""

    batch: Batch
    image_BE: Tensor
    text_BE: Tensor

    @classmethod
    def forward(cls, batch: Batch, run: ClipForward) -> CachedFeatures:
        """Run the clip rows of `batch` without a graph and keep the features."""
        names = ("global_crops", "local_crops", "masks", "masked_idx")
        batch = replace(batch, **{name: getattr(batch, name)[:0] for name in names})
        with torch.no_grad():
            clip = run(batch)
        return cls(batch, clip.image_BE.requires_grad_(), clip.text_BE.requires_grad_())

    def surrogate_loss(self, clip: ClipOutputs) -> Tensor:
        """Return a scalar whose gradient by `clip`, these features computed anew, is the loss's by the cached ones."""
        assert self.image_BE.grad is not None, "the loss's backward comes first"
        assert self.text_BE.grad is not None
        return (clip.image_BE * self.image_BE.grad).sum() + (clip.text_BE * self.text_BE.grad).sum()


@dataclass(frozen=True)
class GradientCache:
    """One step's batch in `rows.micro_batches` parts; `shared` is the part to run with the ssl and rec rows."""

    shared: Batch
    shared_idx: int  # which part it is
    cached: list[CachedFeatures]  # of the other parts, in order
    run: ClipForward

    @classmethod
    def forward(cls, batch: Batch, rows: RankBatchSizes, run: ClipForward) -> GradientCache:
        """Run every part but the shared one without gradient."""
        parts = split(batch, rows.micro_batches)
        shared = parts.pop(rows.shared_micro_batch)
        return cls(shared, rows.shared_micro_batch, [CachedFeatures.forward(part, run) for part in parts], run)

    def complete(self, outputs: Outputs) -> Outputs:
        """Return the shared part's outputs with the clip features of the whole batch."""
        if not self.cached:
            return outputs
        assert outputs.clip is not None, "micro-batches are parts of the clip batch"
        features = [(part.image_BE, part.text_BE) for part in self.cached]
        features.insert(self.shared_idx, (outputs.clip.image_BE, outputs.clip.text_BE))
        image_BE, text_BE = (torch.cat(parts) for parts in zip(*features, strict=True))
        return replace(outputs, clip=replace(outputs.clip, image_BE=image_BE, text_BE=text_BE))

    def replay(self, backward: Callable[[Tensor], object]) -> None:
        """Run the other parts again, with gradient, and take the gradient of their features through the model."""
        for part in self.cached:
            backward(part.surrogate_loss(self.run(part.batch)))
