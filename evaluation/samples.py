"""Pictures from a generator: sample n is of class n mod K, from the random numbers of (seed, n), on any rank.

    pair = Pair.open("runs/dit", "runs/vtp_l", device)          # a generator, and the tokenizer that decodes
    for batch in pair.samples(np.arange(10_000), Sampling(guidance=4.0), seed=0, batch_size=64):
        batch.images                                            # (64, 3, 256, 256) float32 in [0, 1]

Classes come equally often, as the field's balanced figures have them, however often they come in the corpus. Every
guidance scale starts from the same noise. A picture does not depend on its batch, but with dopri5, whose steps a batch
shares: there it does within the solver's tolerance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import UserError
from evaluation.source import Source, check_finite, open_source
from model.generator.draws import draw
from model.generator.factory import LoadedGenerator, read_generator
from model.generator.sampling import Sampling
from model.weights import digest, weights_of_run

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING_STEP = 1 << 40  # where training has its step: no run comes so far, so samples start from noise of their own


@dataclass(frozen=True)
class Samples:
    """One batch of pictures; `numbers` say which of all samples they are."""

    numbers: NDArray[np.int64]  # (B,)
    labels: Tensor  # (B,) int64
    images: Tensor  # (B, 3, H, W) float32 in [0, 1]


class Pair:
    """A generator and the tokenizer of its latents, on `device`.

    `calls` counts how often each part was asked; `weights` is the sha256 of the generator's tensors, if from a file.
    """

    def __init__(
        self, generator: LoadedGenerator, source: Source, device: torch.device, weights: str | None = None
    ) -> None:
        check_fit(generator, source)
        self.generator, self.device, self.weights = generator, device, weights
        self.generator.module.to(device)
        side = generator.shape.height * source.tokenizer.model.patch_size
        self.source = replace(source, crop=side)  # whatever the tokenizer was trained at
        self.calls: Counter[str] = Counter()

    @classmethod
    def open(cls, generator: Path, tokenizer: str | Path, device: torch.device) -> Pair:
        """From a generator's run directory or weights file, and a tokenizer's.

        Raises UserError where either cannot be read, or they do not belong together.
        """
        file = weights_of_run(generator) if generator.is_dir() else generator
        loaded = read_generator(file)
        check_finite(loaded.module, file)
        return cls(loaded, open_source(tokenizer, device), device, digest(file))

    @torch.no_grad()
    def samples(
        self, numbers: NDArray[np.int64], sampling: Sampling, seed: int, batch_size: int, precision: str = "float32"
    ) -> Iterator[Samples]:
        """The samples of these numbers, in order; the generator's products in `precision` (PRECISIONS), its sampler's
        sums in float32. Raises UserError for a sampler that is not this generator's."""
        module = self.generator.module
        needs = module.sampling_draw_counts(sampling)
        for start in range(0, len(numbers), batch_size):
            own = numbers[start : start + batch_size]
            labels_B = torch.from_numpy(own % self.generator.num_classes).to(self.device)
            draws = draw(needs, seed, SAMPLING_STEP, own).to(self.device)
            with self._counted(), self._products_in(PRECISIONS[precision]):
                latents_BLhw = module.sample(labels_B, sampling, draws).float()
            yield Samples(own, labels_B, self.source.tokenizer.decode(self.generator.denormalised(latents_BLhw)))

    def _products_in(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Inside, every forward pass of a part is counted, and the batch."""
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


def check_fit(generator: LoadedGenerator, source: Source) -> None:
    """Raises UserError where the generator's latents are not those of the tokenizer."""
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
