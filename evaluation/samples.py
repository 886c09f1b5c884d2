"""Samples of a generator: sample n has class n mod K and the random numbers of (seed, n), on any rank.

    pipeline = SamplingPipeline.open("runs/dit", "runs/vtp_l", device)      # generator and tokenizer
    for batch in pipeline.samples(np.arange(10_000), Sampling(guidance=4.0), seed=0, batch_size=64):
        batch.images                                            # (64, 3, 256, 256) float32 in [0, 1]

    grid = SampleGrid(num_classes=1000, num_samples=10_000)     # a plot: rows are classes, panels guidance scales
    for batch in pipeline.samples(...): grid.add("guidance 4", batch)
    grid.draw(names, Path("samples.png"))                       # after grid.gather(), a collective

All classes come equally often, whatever their frequency in the corpus, as in the field's class-balanced FIDs. Every
guidance scale starts from the same noise. An image does not depend on its batch, except with dopri5, whose step sizes
a batch shares: there it does, within the solver's tolerance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import UserError
from engine import distributed
from evaluation.plots import draw_sample_grid
from evaluation.tokenizer_source import TokenizerSource, check_finite, open_tokenizer
from model.generator.draws import draw
from model.generator.factory import LoadedGenerator, read_generator
from model.generator.sampling import Sampling
from model.weights import digest, weights_of_run

PRECISION_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOISE_STEP = 1 << 40  # step of the samples' random numbers; beyond any run's, so noise differs from training's


@dataclass(frozen=True)
class SampleBatch:
    """One batch of samples."""

    numbers: NDArray[np.int64]  # (B,), indices of the samples
    labels: Tensor  # (B,) int64
    images: Tensor  # (B, 3, H, W) float32 in [0, 1]


class SamplingPipeline:
    """A generator and the tokenizer that decodes its latents, on `device`.

    `calls` counts forward passes of each part; `weights` is the sha256 of the generator's tensors, if from a file.
    """

    def __init__(
        self, generator: LoadedGenerator, source: TokenizerSource, device: torch.device, weights: str | None = None
    ) -> None:
        check_same_latents(generator, source)
        self.generator, self.device, self.weights = generator, device, weights
        self.generator.module.to(device)
        side = generator.shape.height * source.tokenizer.model.patch_size
        self.source = replace(source, crop=side)  # not the resolution that the tokenizer was trained at
        self.calls: Counter[str] = Counter()

    @classmethod
    def open(cls, generator: Path, tokenizer: str | Path, device: torch.device) -> SamplingPipeline:
        """Load a generator from its run directory or weights file, and a tokenizer.

        Raises UserError if either cannot be read, or if they do not belong together.
        """
        file = weights_of_run(generator) if generator.is_dir() else generator
        loaded = read_generator(file)
        check_finite(loaded.module, file)
        return cls(loaded, open_tokenizer(tokenizer, device), device, digest(file))

    @torch.no_grad()
    def samples(
        self, numbers: NDArray[np.int64], sampling: Sampling, seed: int, batch_size: int, precision: str = "float32"
    ) -> Iterator[SampleBatch]:
        """Yield the samples of these indices, in order. The generator computes in `precision` (PRECISION_DTYPES), the
        sampler's sums are float32. Raises UserError for a sampler that this generator does not have."""
        module = self.generator.module
        needs = module.sampling_draw_counts(sampling)
        for start in range(0, len(numbers), batch_size):
            own = numbers[start : start + batch_size]
            labels_B = torch.from_numpy(own % self.generator.num_classes).to(self.device)
            draws = draw(needs, seed, NOISE_STEP, own).to(self.device)
            with self._count_calls(), self._autocast(PRECISION_DTYPES[precision]):
                latents_BLhw = module.sample(labels_B, sampling, draws).float()
            yield SampleBatch(own, labels_B, self.source.tokenizer.decode(self.generator.denormalised(latents_BLhw)))

    def _autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @contextmanager
    def _count_calls(self) -> Iterator[None]:
        """Count the batch, and every forward pass of a part inside the context."""
        self.calls["batches"] += 1
        hooks = [
            part.register_forward_hook(lambda *_, name=name: self.calls.update([name]))
            for name, part in self.generator.module.named_children()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def check_same_latents(generator: LoadedGenerator, source: TokenizerSource) -> None:
    """Raise UserError if the generator was trained on the latents of another tokenizer."""
    channels = source.tokenizer.model.latent_channels
    if generator.shape.channels != channels:
        raise UserError(
            f"--tokenizer: the generator makes latents of {generator.shape.channels} channels, this tokenizer decodes "
            f"{channels}: give the one whose latents the generator was trained on"
        )
    digest = source.latent_digest()
    if generator.tokenizer not in (None, digest):
        raise UserError(
            f"--tokenizer: the generator was trained on the latents of {generator.tokenizer[:16]}, this tokenizer's "
            f"are {digest[:16]}: give the one whose encoder made them; its decoder may have been trained further"
        )


MAX_ROWS, MAX_COLUMNS = 8, 4  # at most: classes, samples of each


class SampleGrid:
    """Plot of samples: rows are classes spread evenly over all, columns the first samples of each, panels settings."""

    def __init__(self, num_classes: int, num_samples: int) -> None:
        present = min(num_classes, num_samples)
        rows = min(MAX_ROWS, present)
        self.classes = [row * present // rows + row % (present // rows) for row in range(rows)]  # not all of one column
        columns = min(MAX_COLUMNS, (num_samples - 1 - self.classes[-1]) // num_classes + 1)
        self._cell_of_sample = {
            label + column * num_classes: (row, column)
            for row, label in enumerate(self.classes)
            for column in range(columns)
        }
        self._shape = (rows, columns)
        self._images: dict[str, dict[int, Tensor]] = {}  # panel -> sample number -> (H, W, 3) uint8

    def add(self, panel: str, batch: SampleBatch) -> None:
        """Keep the images of a batch that are drawn in `panel`."""
        kept = self._images.setdefault(panel, {})
        for row, number in enumerate(batch.numbers.tolist()):
            if number in self._cell_of_sample:
                kept[number] = (batch.images[row] * 255).round().byte().permute(1, 2, 0).cpu()

    def gather(self) -> None:
        """Collect the images of all ranks on each. A collective."""
        merged: dict[str, dict[int, Tensor]] = {}
        for part in distributed.gather_objects(self._images):
            for panel, kept in part.items():
                merged.setdefault(panel, {}).update(kept)
        self._images = merged

    def draw(self, names: Sequence[str] | None, path: Path) -> None:
        """Write the plot; `names` are those of all classes, if known."""
        panels = {}
        for panel, kept in self._images.items():
            images = torch.full((*self._shape, *next(iter(kept.values())).shape), 255, dtype=torch.uint8)
            for number, image in kept.items():
                images[self._cell_of_sample[number]] = image
            panels[panel] = images
        draw_sample_grid(panels, [names[label] if names else f"class {label}" for label in self.classes], path)
