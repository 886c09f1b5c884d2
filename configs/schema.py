"""The schema of pre-training: every setting, its default (here and nowhere else) and its rule.

Two halves. *Science* (`seed`, `data`, `batch`, `views`, `masks`, `model`, `init`, `objectives`, `optim`, `teacher`,
`health`) changes results and is fingerprinted; *system* (`system`, `profile`) must not change them. All batch sizes are
global: what one rank gets is a division by the world size, so a preset means the same run on 2 CPU ranks and on 256
GPUs.

    load_config("configs/demo.yaml").batch.clip        # 64 images a step, over all ranks

A section and its own rules are in a file of its kind (architecture.py, data.py, learning.py, system.py); here they are
put together, with the rules that hold between them.

Tags beside defaults, as in docs/recipe.md: [P] paper, [C] official inference code, [A] author, [I] inferred,
[D] chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from configs.architecture import Model
from configs.data import Batch, Data, Masks, Views
from configs.learning import Objectives, Teacher
from configs.run import Run
from configs.section import Momentum, Section


class Init(Section):
    """Weights to start from (engine/initial.py); without a file all are drawn (model/initialise.py)."""

    weights: str | None = None  # a weights file of ours; where it lies is not science, what it holds is
    sha256: str | None = None  # of its tensors; filled in at the start, and one that is given must be the file's

    @model_validator(mode="after")
    def _digest_has_a_file(self) -> Init:
        if self.sha256 and self.weights is None:
            raise ValueError(f"sha256={self.sha256} of no file: give init.weights too, or remove init.sha256")
        return self


class Config(Run):
    """Pre-training a tokenizer; configs/run.py has what it shares with other kinds of runs."""

    places: ClassVar[dict[str, Any]] = {"init": {"weights"}, "objectives": {"rec": {"align": {"weights"}}}}
    digest_keys: ClassVar[dict[str, str]] = {
        "data.tokenizer": "data.tokenizer_sha256",
        "objectives.rec.lpips_weights": "objectives.rec.lpips_sha256",
    }

    kind: Literal["pretraining"] = "pretraining"
    data: Data
    batch: Batch
    views: Views = Views()
    masks: Masks = Masks()
    model: Model
    init: Init = Init()
    objectives: Objectives
    teacher: Teacher = Teacher()
    ema: Momentum | None = None  # momentum of an average of the trained weights, which the run gives then; none in VTP

    @property
    def samples_per_step(self) -> int:
        """The image-text pairs; the rows of ssl and rec are among them."""
        return self.batch.clip

    @property
    def streams(self) -> int:
        """Number of sample streams: data.streams."""
        return self.data.streams

    def check_world(self, world_size: int) -> None:
        """Raises UserError where so many ranks cannot share the corpus."""
        self.data.check_world(world_size)

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
    def _the_frozen_encoder_sees_whole_patches(self) -> Config:
        align, size = self.objectives.rec.align, self.views.image_size
        if align is not None and align.kind == "trunk" and size % align.patch_size:
            raise ValueError(
                f"views.image_size={size} is not a multiple of objectives.rec.align.patch_size={align.patch_size}: the "
                "frozen encoder sees the pictures that are reconstructed; change either"
            )
        return self

    @model_validator(mode="after")
    def _convolutions_reconstruct_and_nothing_else(self) -> Config:
        if self.model.conv is None:
            return self
        rec, said = self.objectives.rec, "model.conv is set, a convolutional autoencoder, but "
        for key in ("clip", "ssl"):
            if getattr(self.objectives, key).weight:
                raise ValueError(
                    f"{said}objectives.{key}.weight={getattr(self.objectives, key).weight:g}: it has no CLS token, and "
                    f"learns to reconstruct alone; set objectives.{key}.weight=0"
                )
        if rec.mask is not None:
            raise ValueError(
                f"{said}objectives.rec.mask={list(rec.mask)}: a convolution sees whole images; remove the mask"
            )
        if self.system.linear != "bf16":
            raise ValueError(
                f"{said}system.linear={self.system.linear}: FP8 is for the blocks of transformers, and there are none; "
                "set system.linear=bf16"
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
    def _gaussian_latents_are_drawn_and_weighed(self) -> Config:
        rec, latent = self.objectives.rec, self.model.latent
        if latent == "gaussian" and not rec.weight:
            raise ValueError(
                "model.latent=gaussian but objectives.rec.weight=0: only rec reads a variance; set model.latent="
                "deterministic, or train rec"
            )
        if rec.kl and latent != "gaussian":
            raise ValueError(
                f"objectives.rec.kl={rec.kl:g} but model.latent={latent}: a point has no divergence; set model.latent="
                "gaussian, or remove objectives.rec.kl"
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
        if self.model.conv is None and self.model.trunk.drop_path:
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
    def _batches_of_one_have_an_objective(self) -> Config:
        objectives, batch = self.objectives, self.batch
        if objectives.clip.weight and objectives.clip.kind == "softmax" and batch.clip == 1:
            raise ValueError(
                "batch.clip=1 with objectives.clip.kind=softmax: the one caption is always right, and nothing is "
                "learnt; raise batch.clip, set objectives.clip.kind=sigmoid, or objectives.clip.weight=0"
            )
        if objectives.ssl.weight and objectives.ssl.koleo and batch.ssl == 1:
            raise ValueError(
                f"batch.ssl=1 with objectives.ssl.koleo={objectives.ssl.koleo:g}: KoLeo pushes an image away from its "
                "nearest neighbour, and one image has none; raise batch.ssl or set objectives.ssl.koleo=0"
            )
        return self

    @model_validator(mode="after")
    def _teacher_momentum_lets_it_learn(self) -> Config:
        teacher = self.teacher
        is_still = teacher.momentum == teacher.final_momentum == 1
        if is_still and self.objectives.ssl.weight and self.init.weights is None:
            raise ValueError(
                "teacher.momentum=1 and teacher.final_momentum=1: the teacher would stay at its random first weights; "
                "lower teacher.momentum, or give init.weights"
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
