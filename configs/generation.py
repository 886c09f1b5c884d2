"""The schema of a generator's training: latents in, a model of them out (engine/trainings/generation.py).

    load_run("configs/lightningdit_b.yaml", ["latents.train=latents/vtp_b"]).batch.samples      # 1024

The tokenizer is not there: its latents were written beforehand (`python -m evaluation.latents`), so that one tokenizer
serves many generators, and any tokenizer this one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from configs.generator import Generator
from configs.run import Run
from configs.section import Momentum, Positive, Section, UserError


class Latents(Section):
    """A directory of latents (data/latents/store.py)."""

    train: str
    flip: bool = True  # half of the samples are those of mirrored pictures [P of LightningDiT]
    tokenizer: str | None = None  # digest of what made them; filled in at the start, and one that is given must be it


class LatentBatch(Section):
    """Over all ranks."""

    samples: Positive = 1024  # [P]


class Generation(Run):
    """Training a generator on a tokenizer's latents."""

    kind: Literal["generator"] = "generator"
    latents: Latents
    batch: LatentBatch = LatentBatch()
    generator: Generator
    ema: Momentum = 0.9999  # momentum of the average that is sampled from [P]

    @property
    def samples_per_step(self) -> int:
        """Latents."""
        return self.batch.samples

    def check_world(self, world_size: int) -> None:
        """Raises UserError where so many ranks cannot share the batch."""
        if self.batch.samples % world_size:
            raise UserError(
                f"batch.samples={self.batch.samples} over {world_size} ranks: every rank takes as many; give a "
                "multiple of the ranks"
            )

    @model_validator(mode="after")
    def _no_setting_of_tokenizers(self) -> Generation:
        found = {
            "system.linear": (self.system.linear, "bf16"),
            "system.clip.micro_batches": (self.system.clip.micro_batches, 1),
        }
        for key, (value, only) in found.items():
            if value != only:
                raise ValueError(f"{key}={value} is for pre-training tokenizers, generators know {only}; remove it")
        self.system.checks.refuse_pretraining()
        return self
