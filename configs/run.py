"""Settings that every kind of run has: optimizer, policy for bad steps, system and profile.

    System(compile="off").report_every                  # 10
    AnomalyPolicy(spike="skip").spike_factor            # 5: a spike is a norm above 5 times the running median

`system` and `profile` must not change results and are left out of the fingerprint, so a checkpoint may be resumed
under others. `optim` and `health` are *science*: they change results. A kind of run adds sections of its own
(configs/schema.py, decoder_gan.py, generator.py); `kind:` in the YAML selects it (configs/load.py). The training loop
knows only what is here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from configs.section import (
    AmountRange,
    Betas,
    ClipNorm,
    Count,
    Directory,
    Fraction,
    FractionRange,
    LearningRate,
    NotBool,
    Number,
    Positive,
    Seconds,
    Section,
    Seed,
    SmallPositive,
    StepRange,
    WeightDecay,
)


class Optim(Section):
    """AdamW with linear warm-up and cosine decay [D of OpenCLIP]. *Science*."""

    kind: Literal["adamw", "lamb"] = "adamw"  # LAMB: a trust ratio for each matrix, or each rank's shard of it
    steps: Positive
    lr: LearningRate = 5e-4  # peak, at lr_batch images a step; scaled by sqrt(samples a step / lr_batch)
    lr_batch: Positive = 16_384
    final_lr: Fraction = 0.0  # as a fraction of the peak
    warmup: Fraction = 0.03  # as a fraction of steps
    betas: Betas = (0.9, 0.98)
    eps: Number = Field(1e-6, ge=1e-16, le=1)  # below, float32 divides 0 by 0
    weight_decay: WeightDecay = 0.1  # none on vectors
    clip_norm: ClipNorm = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"


class AnomalyPolicy(Section):
    """What to do about a non-finite or spiking step. *Science*: where it acts, results change; by default nothing acts.

    skip: the optimizer, moments included, leaves the step out; schedules and data advance. rollback: the run returns
    to its last checkpoint and continues with the data after the bad step.

    A spike is detected in the global gradient norm, which is the same on every rank and known before the optimizer
    steps. OLMo-core's SkipStep optimizers skip such steps (above mean + 6 deviations of the last 128), ZClip clips
    them (arXiv 2504.02507, by a z-score); PaLM goes back (arXiv 2204.02311, section 5.1: to a checkpoint about 100
    steps before the spike, leaving out 200 to 500 batches). Comparing with a median is ours: a spike does not move it.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # a loss or a gradient that is not finite
    spike: Literal["off", "skip", "rollback"] = "off"
    # Steps that the median is taken over; before so many steps nothing counts as a spike
    spike_window: Annotated[int, Field(ge=4, le=100_000), NotBool] = 128
    spike_factor: Number = Field(5.0, gt=1, le=1e6)  # times the median [D]
    most_rollbacks: Positive = 3  # to one checkpoint; then the run stops [D]

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> AnomalyPolicy:
        spike_keys, rollback_keys = ("spike_window", "spike_factor"), ("most_rollbacks",)
        unused: tuple[str, ...] = spike_keys if self.spike == "off" else ()
        unused += rollback_keys if "rollback" not in (self.nonfinite, self.spike) else ()
        for key in unused:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                switch = "health.spike" if key in spike_keys else "health.nonfinite or health.spike to rollback"
                raise ValueError(f"{key}={value:g} but nothing uses it: set {switch}, or remove health.{key}")
        return self


class LoaderSettings(Section):
    """How each rank reads and decodes shards ahead of the step."""

    threads: SmallPositive = 2  # decoding threads a rank
    prefetch: SmallPositive = 2  # batches decoded ahead of the step
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cache_dir: str | None = None  # where remote shards are kept; required for remote URLs
    # Attempts at a read that storage fails, after 1, 2, 4, 8, 16 s; then the sample is skipped (data/storage.py)
    tries: Annotated[int, Field(ge=1, le=64), NotBool] = 6


class ContrastiveBatch(Section):
    """Gradient caching of the clip batch (engine/grad_cache.py): the gradient is that of the whole batch."""

    # Micro-batches, one after the other: activation memory is that of one, and all but one run forward twice.
    micro_batches: Positive = 1


class Checkpoint(Section):
    """When checkpoints are saved, which are kept, and whether training continues meanwhile (engine/checkpoint/)."""

    every: Count = 0  # steps; 0: only at the end
    keep_last: Positive = 3
    keep_every: Count = 0  # steps: the first checkpoint at or after each multiple is kept for good; 0: none
    background: bool = True  # steps wait only for a copy in host memory, as large as this rank's shards


class WatchdogTimeouts(Section):
    """When a rank counts as lost (engine/watchdog/): every rank then reports which one and where it was, and exits."""

    silent_seconds: Seconds = 60  # without a heartbeat: stopped, or cut off. A process that died is noticed at once
    # No rank has finished a step or a phase. Must exceed the longest phase: assembling (the model, the corpus's index
    # if it has to be written), loading a checkpoint, the first step with its compilation, the last save.
    stuck_seconds: Seconds = 1800


class AlarmThresholds(Section):
    """Bounds of reported metrics; outside them a warning is logged (engine/reporting/reporter.py). All [D]."""

    # As a fraction of ln K. Below: one-hot targets, as after a collapse; above: uniform targets.
    teacher_entropy: FractionRange = (0.02, 0.98)
    prototype_share: Fraction = (
        0.5  # of the teacher's probability on one prototype, over a rank's crops; above: collapse
    )
    latent_std: AmountRange = (0.01, 100.0)  # of each latent channel, over images and positions


class Checks(Section):
    """Diagnostics beside the losses; none of them changes a step."""

    # Steps between two checks that replicated values agree across ranks (engine/health/replicas.py); 0: none. [D]
    replicas_every: Count = 1000
    # Steps between two measurements of each objective's gradient fraction (engine/reporting/step_meter.py); 0: none [D]
    shares_every: Count = 100
    alarms: AlarmThresholds = AlarmThresholds()

    def refuse_pretraining(self) -> None:
        """Raise ValueError for checks of pre-training's objectives that a run of another kind has set."""
        for key in ("shares_every", "alarms"):
            if getattr(self, key) != getattr(Checks(), key):
                raise ValueError(
                    f"system.checks.{key} is set, which looks at what pre-training alone has: here it does nothing; "
                    "remove it"
                )


class System(Section):
    """Devices, ranks, reports, checkpoints and safety of a run. choices.json records what each "auto" became."""

    run_dir: Directory | None = None  # runs/NAME when not given
    report_every: Positive = 10  # steps between two host syncs
    images_every: Count = 0  # steps between two image reports; 0: only at the end
    phases: bool = True  # report the time of each phase of a step (engine/reporting/phase_timing.py)
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "flash3", "varlen", "flash2", "xformers", "sdpa", "matmul"] = "auto"
    activation_checkpointing: Literal["off", "selective", "full"] = "off"  # engine/block_transforms.py
    optimizer: Literal["auto", "torch", "torch_fused", "deepspeed", "deepspeed_cpu", "apex"] = "auto"
    linear: Literal["bf16", "fp8_torchao", "fp8_te"] = "bf16"  # linear layers of the blocks; FP8 differs in rounding
    gather: Literal["flat", "by_host"] = "flat"  # how features are gathered across ranks (engine/distributed.py)
    # Two runs agree bit for bit; a few per cent slower on GPUs (engine/process_settings.py). Differs in rounding only.
    deterministic: bool = False
    # Of a collective, before a rank counts as lost
    timeout_minutes: Annotated[int, Field(ge=1, le=365 * 24 * 60), NotBool] = 60
    loader: LoaderSettings = LoaderSettings()
    checks: Checks = Checks()
    clip: ContrastiveBatch = ContrastiveBatch()
    checkpoint: Checkpoint = Checkpoint()
    watch: WatchdogTimeouts = WatchdogTimeouts()

    @model_validator(mode="after")
    def _transformer_engine_is_not_compiled(self) -> System:
        if self.linear == "fp8_te" and self.compile == "on":
            raise ValueError(
                "linear=fp8_te but compile=on: Transformer Engine's modules cannot be traced into a block's graph; set "
                "system.compile=off, or system.linear=fp8_torchao"
            )
        return self

    @model_validator(mode="after")
    def _decoding_is_deterministic(self) -> System:
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
    """Steps recorded with torch's profiler (profiling/instruments/profiler.py)."""

    steps: StepRange | None = None  # FIRST:END, counted from 0 over the whole run: 10:13 are the steps 10, 11 and 12
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


class RunConfig(Section):
    """Base class of every kind of run. `system` and `profile` must not change results; everything else is science."""

    # Paths left out of the fingerprint, because a digest beside each identifies the file; as pydantic's `exclude`.
    unhashed_paths: ClassVar[dict[str, Any]] = {}
    # Key of a file's path -> key of its digest. The digest is fingerprinted, so that the file may be moved; without a
    # digest, as in runs of earlier versions, the path is.
    digest_keys: ClassVar[dict[str, str]] = {}

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)]
    seed: Seed = 0
    optim: Optim
    health: AnomalyPolicy = AnomalyPolicy()
    system: System = System()
    profile: Profile = Profile()

    @property
    def samples_per_step(self) -> int:
        """Samples a step over all ranks: DeepSpeed's train_batch_size; the learning rate scales with it."""
        raise NotImplementedError

    @property
    def streams(self) -> int:
        """Number of sample streams (data.streams); the first position of every step is a multiple of it."""
        return 1

    def check_world(self, world_size: int) -> None:
        """Raise UserError if this number of ranks cannot share the batch."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _profiled_steps_are_taken(self) -> RunConfig:
        if self.profile.steps is not None and self.profile.span[1] > self.optim.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} but optim.steps={self.optim.steps}: the run ends before the "
                "window does; lower profile.steps"
            )
        return self
