"""The schema: every setting of a run, its default (here and nowhere else) and its rule.

Two halves. *Science* (`seed`, `data`, `batch`, `views`, `masks`, `model`, `objectives`, `optim`, `teacher`)
changes results and is fingerprinted; *system* (`system`, `profile`) must not change them. All batch sizes are global:
what one rank gets is a division by the world size, so a preset means the same run on 2 CPU ranks and on 256 GPUs.

    load_config("configs/demo.yaml").batch.clip        # 64 images a step, over all ranks

Tags beside defaults, as in docs/recipe.md: [P] paper, [C] official inference code, [A] author, [I] inferred,
[D] chosen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.architecture import Model
from configs.section import Amount, AreaRange, Count, Paths, PixelRange, Positive, Section, Share, ShareRange, StepSpan


class Data(Section):
    """Where samples come from and in which order they arrive (data/order.py)."""

    train: Paths  # shard paths or URLs; globs and brace ranges allowed
    held_out: Paths = ()  # read by evaluation only
    tokenizer: str  # a tokenizer.json file, or a Hugging Face hub name (CLIP's for the real presets)
    caption: str = "txt"  # member extension holding the caption; "json:KEY" reads a field of the .json member
    streams: Positive  # C canonical streams; every world size must divide it
    block_shards: Positive = 4  # samples are shuffled inside blocks of this many shards of one stream
    max_bad_share: Share = 0.02  # above this share of bad samples the run stops
    max_pixels: Positive = 50_000_000  # larger images are bad samples: they would stall a whole step


class Batch(Section):
    """The asymmetric split, in images over all ranks. Recipe ratio 1 : 1/4 : 1/8 [P]."""

    clip: Positive
    ssl: Count
    rec: Count
    layout: Literal["nested", "disjoint"] = "nested"  # ssl and rec both lead, or rec follows ssl

    @model_validator(mode="after")
    def _fits(self) -> Batch:
        used = max(self.ssl, self.rec) if self.layout == "nested" else self.ssl + self.rec
        if used > self.clip:
            raise ValueError(
                f"ssl={self.ssl} and rec={self.rec} ({self.layout}) need {used} rows but clip={self.clip}: "
                "ssl and rec images are rows of the clip batch; lower batch.ssl or batch.rec, or raise "
                "batch.clip"
            )
        return self


class Views(Section):
    """Crops and colours. Sizes in pixels, scales as shares of the image area. [D] of DINOv2."""

    image_size: Positive = 256  # clip and rec [P]
    image_scale: AreaRange = (0.9, 1.0)
    global_size: Positive = 256
    global_scale: AreaRange = (0.32, 1.0)
    local_size: Positive = 96
    local_scale: AreaRange = (0.05, 0.32)
    num_locals: Count = 8
    flip: Share = 0.5  # ssl crops only: captions speak of left and right
    jitter: Share = 0.8  # probability of the colour jitter
    brightness: Amount = 0.4
    contrast: Amount = 0.4
    saturation: Amount = 0.2
    hue: float = Field(0.1, ge=0, le=0.5)  # in turns of the colour circle
    grey: Share = 0.2
    blur: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)  # probability on global view 0, on 1, on local ones
    blur_sigma: PixelRange = (0.1, 2.0)  # in pixels at the crop's own size
    solarise: Share = 0.2  # global view 1 only


class Masks(Section):
    """Which patches of the global crops the student does not see. iBOT block-wise masking [D]."""

    share_of_crops: Share = 0.5
    ratio: ShareRange = (0.1, 0.5)


class Clip(Section):
    weight: float = Field(1.0, ge=0)
    kind: Literal["softmax", "sigmoid"] = "softmax"


class Ssl(Section):
    weight: float = Field(1.0, ge=0)
    koleo: float = Field(0.1, ge=0)  # [I]
    student_temp: float = Field(0.1, gt=0)
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    centre_momentum: Share = 0.9  # with targets=centering


class Rec(Section):
    weight: float = Field(0.1, ge=0)  # [P]
    l1: float = Field(1.0, ge=0)
    perceptual: float = Field(1.0, ge=0)  # L1 : LPIPS = 1 : 1 [P]; needs lpips_weights
    lpips_weights: str | None = None  # safetensors with VGG-16 features and LPIPS heads

    @model_validator(mode="after")
    def _perceptual_is_explicit(self) -> Rec:
        if self.weight and self.perceptual and self.lpips_weights is None:
            raise ValueError(
                f"perceptual={self.perceptual:g} but lpips_weights is not set: the perceptual term is never "
                "dropped silently; give objectives.rec.lpips_weights=FILE, or switch it off with "
                "objectives.rec.perceptual=0"
            )
        return self


class Objectives(Section):
    """total = clip.weight * clip + ssl.weight * ssl + rec.weight * rec, the paper's joint objective."""

    clip: Clip = Clip()
    ssl: Ssl = Ssl()
    rec: Rec  # no default: the perceptual term wants a decision


class Optim(Section):
    """AdamW with linear warm-up and cosine decay [D of OpenCLIP]."""

    kind: Literal["adamw", "lamb"] = "adamw"  # LAMB: a trust ratio per matrix, and per rank's share of it
    steps: Positive
    lr: float = Field(5e-4, gt=0)  # peak, at lr_batch images a step; scaled by sqrt(batch.clip / lr_batch)
    lr_batch: Positive = 16_384
    final_lr: Share = 0.0  # as a share of the peak
    warmup: Share = 0.03  # as a share of steps
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)  # none on vectors
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"


class Teacher(Section):
    momentum: Share = 0.994
    final_momentum: Share = 1.0  # reached by a cosine; equal to momentum for a fixed one
    temp: float = Field(0.04, gt=0)
    final_temp: float = Field(0.07, gt=0)
    temp_warmup: Share = 0.3  # share of steps from temp to final_temp


class Loader(Section):
    threads: Positive = 2  # decoding threads a rank
    prefetch: Positive = 2  # batches decoded ahead of the step
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cache_dir: str | None = None  # where remote shards are kept; required for remote URLs


class ContrastiveBatch(Section):
    """How the clip batch goes through the model (engine/grad_cache.py); the gradient is that of the whole batch."""

    # Parts, one after the other: memory for activations falls to one part, and all parts but one run forward twice.
    micro_batches: Positive = 1


class System(Section):
    run_dir: str | None = None  # runs/NAME when not given
    report_every: Positive = 10  # steps between two host syncs
    images_every: Count = 0  # steps between two picture reports; 0: only at the end
    checkpoint_every: Count = 0  # steps; 0: only at the end
    phases: bool = True  # reports say where a step's time goes (engine/timing.py)
    compile: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "flash3", "varlen", "flash2", "xformers", "sdpa", "matmul"] = "auto"
    activation_checkpointing: Literal["off", "selective", "full"] = "off"  # engine/recompute.py
    optimizer: Literal["auto", "torch", "torch_fused", "deepspeed", "deepspeed_cpu", "apex"] = "auto"
    linear: Literal["bf16", "fp8_torchao", "fp8_te"] = "bf16"  # of the blocks; FP8 rounds more, the run is the same
    timeout_minutes: Positive = 60  # of a collective, before a rank counts as lost
    loader: Loader = Loader()
    clip: ContrastiveBatch = ContrastiveBatch()

    @model_validator(mode="after")
    def _te_is_not_compiled(self) -> System:
        if self.linear == "fp8_te" and self.compile == "on":
            raise ValueError(
                "linear=fp8_te but compile=on: Transformer Engine's modules cannot be traced into a block's graph; set "
                "system.compile=off, or system.linear=fp8_torchao"
            )
        return self


class Profile(Section):
    """A window of steps under torch's profiler (profiling/window.py)."""

    steps: StepSpan | None = None  # FIRST:END, counted from 0 over the whole run: 10:13 are the steps 10, 11 and 12
    ranks: tuple[Count, ...] = (0,)  # which ranks record

    @property
    def span(self) -> tuple[int, int]:
        """(first, end) of a window that is given."""
        assert self.steps is not None
        first, end = self.steps.split(":")
        return int(first), int(end)


class Config(Section):
    """A whole run. `system` and `profile` are the half that must not change results."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: Count = 0
    data: Data
    batch: Batch
    views: Views = Views()
    masks: Masks = Masks()
    model: Model
    objectives: Objectives
    optim: Optim
    teacher: Teacher = Teacher()
    system: System = System()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _profiled_steps_are_taken(self) -> Config:
        if self.profile.steps is not None and self.profile.span[1] > self.optim.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} but optim.steps={self.optim.steps}: the run ends before the "
                "window does; lower profile.steps"
            )
        return self

    @model_validator(mode="after")
    def _crops_hold_whole_patches(self) -> Config:
        patch = self.model.patch_size
        for key in ("image_size", "global_size", "local_size"):
            size = getattr(self.views, key)
            if size % patch:
                raise ValueError(
                    f"views.{key}={size} is not a multiple of model.patch_size={patch}: a crop holds whole "
                    f"patches; change views.{key}"
                )
        return self

    @model_validator(mode="after")
    def _rows_come_with_weights(self) -> Config:
        for key in ("ssl", "rec"):
            rows, weight = getattr(self.batch, key), getattr(self.objectives, key).weight
            if (rows > 0) != (weight > 0):
                raise ValueError(
                    f"batch.{key}={rows} but objectives.{key}.weight={weight:g}: an objective has both rows "
                    "and weight or neither; set both or neither to 0"
                )
        return self

    @model_validator(mode="after")
    def _streams_share_rows(self) -> Config:
        streams = self.data.streams
        for key in ("clip", "ssl", "rec"):
            rows = getattr(self.batch, key)
            if rows % streams:
                raise ValueError(
                    f"batch.{key}={rows} is not a multiple of data.streams={streams}: every step takes the "
                    f"same number of rows from each stream; change batch.{key} or data.streams"
                )
        return self

    @model_validator(mode="after")
    def _fp8_needs_bf16(self) -> Config:
        if self.system.linear != "bf16" and self.optim.precision != "bf16":
            raise ValueError(
                f"system.linear={self.system.linear} but optim.precision={self.optim.precision}: FP8 products take and "
                "give bf16; set optim.precision=bf16, or system.linear=bf16"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Config:
        parts, batch = self.system.clip.micro_batches, self.batch
        if parts == 1:
            return self
        said = f"system.clip.micro_batches={parts}"
        if self.model.trunk.drop_path:
            raise ValueError(
                f"{said} but model.trunk.drop_path={self.model.trunk.drop_path}: each part would drop segments of its "
                "own, and the gradient would not be that of the whole batch; set one of them off"
            )
        if not self.objectives.clip.weight:
            raise ValueError(f"{said} but objectives.clip.weight=0: there is no clip batch to cut; leave it at 1")
        if batch.clip % parts:
            raise ValueError(
                f"{said} does not divide batch.clip={batch.clip}: parts are equal, so that they share one compiled "
                "graph; change either"
            )
        first, size = (batch.ssl if batch.layout == "disjoint" else 0), batch.clip // parts
        if batch.rec and first // size != (first + batch.rec - 1) // size:
            raise ValueError(
                f"{said} cuts batch.clip={batch.clip} into parts of {size} rows, and the rec rows {first} to "
                f"{first + batch.rec - 1} lie in more than one: rec reads the features of one part; lower "
                "system.clip.micro_batches or batch.rec"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Config:
        weights = self.objectives
        if not (weights.clip.weight or weights.ssl.weight or weights.rec.weight):
            raise ValueError(
                "all three objective weights are 0: there is nothing to learn; set one of objectives.*.weight"
            )
        return self
