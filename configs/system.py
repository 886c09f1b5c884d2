"""How a run is carried out, and what is recorded of it: the half that must not change results.

    System(compile="off").report_every         # 10

A checkpoint may be resumed under another `system` and `profile`: the fingerprint leaves them out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import (
    AmountRange,
    Count,
    Directory,
    NotBool,
    Positive,
    Seconds,
    Section,
    Share,
    ShareRange,
    SmallPositive,
    StepSpan,
)


class Loader(Section):
    """How each rank reads and decodes shards, ahead of the step."""

    threads: SmallPositive = 2  # decoding threads a rank
    prefetch: SmallPositive = 2  # batches decoded ahead of the step
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cache_dir: str | None = None  # where remote shards are kept; required for remote URLs
    tries: Annotated[int, Field(ge=1, le=64), NotBool] = (
        6  # of what storage fails, after 1, 2, 4, 8, 16 s; then the sample is skipped (data/storage.py)
    )


class ContrastiveBatch(Section):
    """How the clip batch goes through the model (engine/grad_cache.py); the gradient is that of the whole batch."""

    # Parts, one after the other: memory for activations falls to one part, and all parts but one run forward twice.
    micro_batches: Positive = 1


class Checkpoint(Section):
    """When a run is saved, what is kept, and whether the steps go on meanwhile (engine/checkpoint/)."""

    every: Count = 0  # steps; 0: only at the end
    keep_last: Positive = 3
    keep_every: Count = 0  # steps: the first at or after each multiple is kept for good; 0: none
    background: bool = True  # a copy in host memory, as large as this rank's share, is what the steps wait for


class Watch(Section):
    """When a rank counts as lost (engine/watch/): every rank then says which one, and where it was, and ends."""

    silent_seconds: Seconds = 60  # not a word from a rank: stopped, or cut off. A dead one is known at once
    # No rank has ended a step or a phase. Longer than any of them may take: assembling (the model, the corpus's index
    # where it has to be written), loading a checkpoint, the first step with its compiling, the last save.
    stuck_seconds: Seconds = 1800


class Alarms(Section):
    """Where a report's figure raises an alarm (engine/health/alarms.py): a line in the log, and no more. All [D]."""

    # As a share of ln K: below, the teacher is sure of everything, as it is after a collapse; above, of nothing.
    teacher_entropy: ShareRange = (0.02, 0.98)
    prototype_share: Share = 0.5  # of the teacher's word on a rank's crops, on one prototype; above, it has collapsed
    latent_std: AmountRange = (0.01, 100.0)  # of each latent channel, over images and places


class Checks(Section):
    """What is looked at beside the losses: none of it changes a step."""

    # Steps between two comparisons of what ranks should hold alike (engine/health/replicas.py); 0: none. [D]
    replicas_every: Count = 1000
    # Steps of which the last is asked for objectives' shares of the gradient (engine/health/shares.py); 0: none. [D]
    shares_every: Count = 100
    alarms: Alarms = Alarms()

    def refuse_pretraining(self) -> None:
        """Raises ValueError for what looks at the objectives of pre-training, where a run of another kind sets it."""
        for key in ("shares_every", "alarms"):
            if getattr(self, key) != getattr(Checks(), key):
                raise ValueError(
                    f"system.checks.{key} is set, which looks at what pre-training alone has: here it does nothing; "
                    "remove it"
                )


class System(Section):
    """Device, ranks, records and safety of a run. What every "auto" became, its choices.json says."""

    run_dir: Directory | None = None  # runs/NAME when not given
    report_every: Positive = 10  # steps between two host syncs
    images_every: Count = 0  # steps between two picture reports; 0: only at the end
    phases: bool = True  # reports say where a step's time goes (engine/report/timing.py)
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "flash3", "varlen", "flash2", "xformers", "sdpa", "matmul"] = "auto"
    activation_checkpointing: Literal["off", "selective", "full"] = "off"  # engine/recompute.py
    optimizer: Literal["auto", "torch", "torch_fused", "deepspeed", "deepspeed_cpu", "apex"] = "auto"
    linear: Literal["bf16", "fp8_torchao", "fp8_te"] = "bf16"  # of the blocks; FP8 rounds more, the run is the same
    gather: Literal["flat", "by_host"] = "flat"  # the objectives' features between ranks (engine/hosts.py)
    # Two runs are the same bits; a few per cent slower on GPUs (engine/deterministic.py). Rounds otherwise, no more.
    deterministic: bool = False
    timeout_minutes: Annotated[int, Field(ge=1, le=365 * 24 * 60), NotBool] = (
        60  # of a collective, before a rank counts as lost
    )
    loader: Loader = Loader()
    checks: Checks = Checks()
    clip: ContrastiveBatch = ContrastiveBatch()
    checkpoint: Checkpoint = Checkpoint()
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _te_is_not_compiled(self) -> System:
        if self.linear == "fp8_te" and self.compile == "on":
            raise ValueError(
                "linear=fp8_te but compile=on: Transformer Engine's modules cannot be traced into a block's graph; set "
                "system.compile=off, or system.linear=fp8_torchao"
            )
        return self

    @model_validator(mode="after")
    def _the_same_pictures_twice(self) -> System:
        if self.deterministic and self.loader.device == "gpu":
            raise ValueError(
                "deterministic=true but loader.device=gpu: nobody promises that decoding on a GPU gives the same bits "
                "twice; set system.loader.device=cpu"
            )
        if self.deterministic and self.linear == "fp8_te":
            raise ValueError(
                "deterministic=true but linear=fp8_te: Transformer Engine makes no such promise; set "
                "system.linear=bf16 or fp8_torchao"
            )
        return self


class Profile(Section):
    """A window of steps under torch's profiler (profiling/instruments/profiler.py)."""

    steps: StepSpan | None = None  # FIRST:END, counted from 0 over the whole run: 10:13 are the steps 10, 11 and 12
    ranks: tuple[Count, ...] = (0,)  # which ranks record

    @model_validator(mode="after")
    def _ranks_have_steps_to_record(self) -> Profile:
        if self.steps is None and self.ranks != Profile.model_fields["ranks"].default:
            raise ValueError(
                f"ranks={list(self.ranks)} but steps is not set: without a window of steps no rank records; give "
                "profile.steps=FIRST:END, or leave profile.ranks out"
            )
        return self

    @property
    def span(self) -> tuple[int, int]:
        """(first, end) of a window that is given."""
        assert self.steps is not None
        first, end = self.steps.split(":")
        return int(first), int(end)
