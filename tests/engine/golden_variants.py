"""Ways to train whose losses are written down in tests/golden: a table of variants, and what runs them on a rank.

    VARIANTS["zero2_2ranks"]                   # Variant(kind="pretraining", ranks=2, stage="zero2", ...)
    run_ranks(run, 2, {"zero2_2ranks": VARIANTS["zero2_2ranks"].overrides_with(files)})

Every variant is a preset, made small by overrides, that takes STEPS steps on data that depends on the step alone. Each
is independent of the others: any number of them may run in one process, in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs import Config, DecoderGan, RunConfig
from configs.deepspeed import load_ds_config
from configs.generator import GeneratorConfig
from configs.load import load_run
from engine import trainer
from engine.build import build_pretraining
from engine.step import train_step
from model.losses.comm import Comm
from tests.data.latents.stores import write_public_store
from tests.engine import ranks
from tests.engine.tasks import decoder_gan_runs
from tests.model.dinov2_files import write_transformers
from tests.model.tiny_weights import write_run
from tests.tiny import CONV, random_batch, tiny_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
Steps = list[dict[str, float]]  # of each step: "loss", "grad_norm", and of stage 2 "disc"


@dataclass(frozen=True)
class Variant:
    """A preset with overrides, on so many ranks; "{files}" in an override is the directory of `write_files`."""

    preset: str
    overrides: tuple[str, ...]
    ranks: int = 2
    stage: str = "zero2"  # a file of configs/deepspeed
    ds: dict[str, Any] = field(default_factory=dict)  # keys of its zero_optimization that differ
    is_slow: bool = False  # minutes, or what a compiler of C++ takes: tier L2
    is_coarse: bool = False  # rounding grows: fewer bits than fp32, or gradients near 0

    @property
    def kind(self) -> str:
        """Whose golden file it is in; what g++ makes has a file of its own."""
        if {COMPILED, DEEPSPEED, DEEPSPEED_CPU} & set(self.overrides):
            return "compiled"
        return "generators" if self.preset in GENERATORS else DECODER if self.preset == DECODER else "pretraining"

    @property
    def tier(self) -> str:
        return "L2" if self.is_slow else "L1"

    def filled(self, files: Path) -> Variant:
        """The variant with its files in place."""
        return replace(self, overrides=tuple(each.replace("{files}", str(files)) for each in self.overrides))

    def config(self) -> RunConfig:
        """Its settings, validated."""
        return load_run(ROOT / self.preset_path, self.overrides)

    @property
    def preset_path(self) -> str:
        return "tests/tiny.yaml" if self.preset == TINY else f"configs/{self.preset}.yaml"


TINY, DECODER = "tiny", "decoder_gan"
GENERATORS = ("lightningdit_b", "sit_b", "dit_b", "mar_b", "generator_mini")
EAGER, COMPILED = "system.compile=off", "system.compile=on"
DEEPSPEED, DEEPSPEED_CPU = "system.optimizer=deepspeed", "system.optimizer=deepspeed_cpu"
BF16, FP32 = "optim.precision=bf16", "optim.precision=fp32"
TEN = (f"optim.steps={STEPS}",)
NO_CLIP = ("objectives.clip.weight=0",)
NO_SSL = ("objectives.ssl.weight=0", "batch.ssl=0")
NO_REC = ("objectives.rec.weight=0", "batch.rec=0")
PARTS = ("data.streams=2", "batch.rec=4", "system.clip.micro_batches=3")
LPIPS = ("objectives.rec.perceptual=1", "objectives.rec.lpips_weights={files}/lpips.safetensors")
ALIGN = (
    "objectives.rec.align.weights={files}/encoder/weights.safetensors",
    "objectives.rec.align.encoder={width: 48, depth: 1, heads: 2}",
)
DINOV2 = (
    "objectives.rec.align={kind: dinov2, weights: '{files}/dinov2.safetensors', patch_size: 4, "
    "encoder: {width: 32, depth: 2, heads: 2}}",
)
# Of a published preset: what makes it small, and nothing that it is about.
SMALL = (
    *TEN, FP32, EAGER, "optim.lr_batch=12", "data.train=[unused.tar]", "data.tokenizer=unused.json", "data.streams=6",
    "batch.clip=12", "views.image_size=32", "views.global_size=32", "views.local_size=16", "views.num_locals=2",
    "model.patch_size=8", "model.latent_channels=8", "model.clip_width=32",
    "model.text={width: 32, depth: 1, heads: 2, context: 12, vocab: 64}",
    "model.prototypes={num: 48, hidden: 32, bottleneck: 16}", "objectives.rec.lpips_weights={files}/lpips.safetensors",
)  # fmt: skip
SMALL_TRANSFORMERS = (
    "model.trunk={width: 32, depth: 2, heads: 2}",
    "model.decoder={width: 32, depth: 1, heads: 2, norm: layernorm}",
)
BASELINE = (*SMALL, *SMALL_TRANSFORMERS, "batch.rec=6")
ATTENDS = "model.conv={channels: 8, multipliers: [1, 2, 2, 4], groups: 4, num_res_blocks: 1, attention_levels: 1}"
SMALL_CONV = (*SMALL, "batch.rec=6", ATTENDS)
SMALL_DECODER = (
    *TEN, FP32, EAGER, "optim.lr_batch=4", "optim.lr=3e-3", "tokenizer.weights={files}/tokenizer/weights.safetensors",
    "data.train=[unused.tar]", "data.streams=4", "batch.images=4", "views.image_size=32", "discriminator.width=8",
    "discriminator.layers=2", "discriminator.lr=3e-3", "objectives.rec.lpips_weights={files}/lpips.safetensors",
    "objectives.gan.discriminator_start=0.2", "objectives.gan.start=0.4",
)  # fmt: skip
SMALL_GENERATOR = (
    *TEN, FP32, EAGER, "optim.lr_batch=12", "latents.train={files}/store", "batch.samples=12", "generator.width=32",
    "generator.depth=2", "generator.heads=2",
)  # fmt: skip
SMALL_HEAD = ("generator.buffer=4", "generator.head={width: 32, depth: 2}")


def tiny(*overrides: str, **other: Any) -> Variant:
    """tests/tiny.yaml in fp32, eager, unless an override says otherwise; ZeRO-2 on two ranks."""
    return Variant(TINY, (*TEN, EAGER, *overrides), **other)


def alone(*overrides: str, **other: Any) -> Variant:
    """As `tiny`, on one rank: where ranks exchange nothing that the variant is about."""
    return tiny(*overrides, **{"ranks": 1} | other)


def baseline(preset: str, *overrides: str, **other: Any) -> Variant:
    return Variant(preset, (*BASELINE, *overrides), **other)


def decoder(*overrides: str, **other: Any) -> Variant:
    return Variant(DECODER, (*SMALL_DECODER, *overrides), **other)


def generator(preset: str, *overrides: str, **other: Any) -> Variant:
    return Variant(preset, (*SMALL_GENERATOR, *overrides), **other)


ON_RANKS = [(stage, ranks_) for stage in ("zero1", "zero2", "zero3") for ranks_ in (1, 2)]
LAYOUTS = {f"{stage}_{n}rank{'s' if n > 1 else ''}": {"stage": stage, "ranks": n} for stage, n in ON_RANKS}
# As two hosts of two ranks; blocks are freed after their forward, so that they are gathered twice.
HOSTS: dict[str, Any] = {"ranks": 4, "is_slow": True}
FREED = {"stage3_param_persistence_threshold": 600, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
FOUR = ("batch.clip=16", "batch.ssl=8", "batch.rec=8", "data.streams=8")

VARIANTS: dict[str, Variant] = {
    # Pre-training: ZeRO stages, ranks, precision.
    **{name: tiny(**layout) for name, layout in LAYOUTS.items()},
    **{f"{name}_bf16": tiny(BF16, is_coarse=True, **layout) for name, layout in LAYOUTS.items()},
    "zero3_no_persistent_weights": tiny(ds={"stage3_param_persistence_threshold": 0}, stage="zero3"),
    "zero3_3ranks": tiny(ranks=3, stage="zero3"),
    "zero3_hpz": tiny(*FOUR, ds={**FREED, "zero_hpz_partition_size": 2}, **HOSTS, stage="zero3"),
    "zero3_qwz": tiny(*FOUR, ds={**FREED, "zero_quantized_weights": True}, is_coarse=True, **HOSTS, stage="zero3"),
    "zero3_offload": alone(stage="zero3_offload"),
    "gather_by_host": tiny(*FOUR, "system.gather=by_host", **HOSTS, stage="zero3"),
    # Which objectives there are, and how each is computed.
    "clip_only": tiny(*NO_SSL, *NO_REC),
    "ssl_only": tiny(*NO_CLIP, *NO_REC),
    "rec_only": alone(*NO_CLIP, *NO_SSL),
    "clip_and_ssl": alone(*NO_REC),
    "clip_and_rec": alone(*NO_SSL),
    "ssl_and_rec": alone(*NO_CLIP),
    "sigmoid": tiny("objectives.clip.kind=sigmoid"),
    "centering": tiny("objectives.ssl.targets=centering", "objectives.ssl.centre_momentum=0.8"),
    "centering_bf16": alone("objectives.ssl.targets=centering", BF16, is_coarse=True),
    "koleo_off": alone("objectives.ssl.koleo=0"),
    "koleo_and_temperatures": tiny("objectives.ssl.koleo=1", "objectives.ssl.student_temp=0.2", "teacher.temp=0.05"),
    "objective_weights": alone("objectives.clip.weight=0.3", "objectives.ssl.weight=2", "objectives.rec.weight=4"),
    "l2": alone("objectives.rec.l1=0.5", "objectives.rec.l2=2"),
    "lpips": alone(*LPIPS, stage="zero3"),
    "gaussian": alone("model.latent=gaussian", "objectives.rec.kl=1e-4"),
    "noise_additive": alone("objectives.rec.noise={kind: additive, scale: 2}"),
    "noise_interpolative": tiny("objectives.rec.noise.kind=interpolative"),
    "rec_mask": alone("objectives.rec.mask=[0.1, 0.6]"),
    "rec_mask_and_drop_path": tiny("objectives.rec.mask=[-0.1, 0.7]", "model.trunk.drop_path=0.4"),
    "align_trunk": tiny(*ALIGN, stage="zero3"),
    "align_fixed_weight": alone(*ALIGN, "objectives.rec.align={adaptive: false, weight: 0.5, cosine_margin: 0, "
                               "distance_margin: 0, weights: '{files}/encoder/weights.safetensors', "
                               "encoder: {width: 48, depth: 1, heads: 2}}"),
    "align_dinov2": tiny(*DINOV2),
    # What the step is given.
    "disjoint": tiny("batch.layout=disjoint"),
    "no_local_crops": alone("views.num_locals=0"),
    "crop_sizes": alone("views.image_size=48", "views.global_size=40", "views.local_size=24", "views.num_locals=3"),
    # What the model is.
    "drop_path": tiny("model.trunk.drop_path=0.4", stage="zero3"),
    "patch_mean_after_the_bottleneck": alone("model.image_feature=patch_mean", "model.bottleneck_ae_only=false"),
    "registers_and_rope": alone("model.registers=3", "model.rope_dtype=fp32", "model.rope_base=30"),
    "block_options": alone("model.trunk={width: 32, depth: 2, heads: 2, norm: layernorm, qk_norm: true, layer_scale: "
                          "0.1, mlp_ratio: 3}",
                          "model.decoder={width: 32, depth: 1, heads: 2, norm: rmsnorm, qk_norm: true}",
                          "model.prototypes={num: 48, hidden: 32, bottleneck: 16, layers: 2}"),
    "conv": alone(*CONV),
    "conv_attends": alone(*CONV, ATTENDS, "model.latent=gaussian", "objectives.rec.kl=1e-6", *DINOV2, stage="zero3"),
    # How it is learnt.
    "seed": alone("seed=11"),
    "schedules": alone("optim.warmup=0.3", "optim.final_lr=0.1", "optim.betas=[0.8, 0.9]", "optim.eps=1e-4",
                      "optim.weight_decay=0.5", "optim.clip_norm=0.1", "teacher.momentum=0.5",
                      "teacher.final_momentum=0.9", "teacher.final_temp=0.1", "teacher.temp_warmup=0.6"),
    "initial_weights": alone("init.weights={files}/tokenizer/weights.safetensors", "seed=11", stage="zero3"),
    "spikes_are_skipped": tiny("health={spike: skip, spike_window: 4, spike_factor: 1.02, nonfinite: skip}",
                               "objectives.ssl.koleo=1", "objectives.ssl.student_temp=0.2", "teacher.temp=0.05"),
    "spikes_are_skipped_zero3": alone("health={spike: skip, spike_window: 4, spike_factor: 1.02}",
                                      "objectives.ssl.koleo=1", "objectives.ssl.student_temp=0.2", "teacher.temp=0.05",
                                      stage="zero3"),
    # How it is carried out: none of it may change more than rounding.
    "micro_batches": tiny(*PARTS, stage="zero3"),
    "micro_batches_zero2": tiny(*PARTS),
    "micro_batches_sigmoid": alone(*PARTS, "objectives.clip.kind=sigmoid"),
    "checkpointing_selective": alone("system.activation_checkpointing=selective", "model.trunk.drop_path=0.4",
                                    stage="zero3"),
    "checkpointing_full": alone("system.activation_checkpointing=full", "model.trunk.drop_path=0.4", stage="zero3"),
    "attention_matmul": alone("system.attention=matmul"),
    "attention_sdpa": alone("system.attention=sdpa"),
    "optimizer_torch": alone("system.optimizer=torch"),
    "optimizer_deepspeed": alone(DEEPSPEED, is_slow=True),
    "optimizer_deepspeed_cpu": alone(DEEPSPEED_CPU, is_slow=True),
    "looked_at_nothing": alone("system.phases=false", "system.checks={shares_every: 0, replicas_every: 0}"),
    "fp8_torchao": alone(BF16, "system.linear=fp8_torchao", is_coarse=True, stage="zero3"),
    "fp8_torchao_checkpointing": alone(BF16, "system.linear=fp8_torchao", "system.activation_checkpointing=full",
                                      is_coarse=True),
    "compiled": tiny(COMPILED, "model.trunk.drop_path=0.4", is_slow=True, stage="zero3"),
    "compiled_bf16": alone(COMPILED, BF16, is_slow=True, is_coarse=True),
    "compiled_fp8_torchao": alone(COMPILED, BF16, "system.linear=fp8_torchao", is_slow=True, is_coarse=True),
    # Published presets, made small.
    "vtp_s": baseline("vtp_s", "batch.ssl=6"),
    "vtp_l_bf16": baseline("vtp_l", "batch.ssl=6", BF16, is_coarse=True, stage="zero3", ranks=1),
    "ae_only": baseline("ae_only"),
    "ldetok_b": baseline("ldetok_b"),
    "ldetok_b_bf16": baseline("ldetok_b", BF16, is_coarse=True, ranks=1),
    "va_vae": baseline("va_vae", *DINOV2, stage="zero3", ranks=1),
    "ldm_kl": Variant("ldm_kl", SMALL_CONV, ranks=1, stage="zero3", is_coarse=True),
    "ldm_kl_compiled": Variant("ldm_kl", (*SMALL_CONV, COMPILED), ranks=1, is_slow=True, is_coarse=True),
    # Stage 2: the decoder against a discriminator.
    **{f"stage2_{name}": decoder(**layout) for name, layout in LAYOUTS.items() if name != "zero2_1rank"},
    "stage2_bf16": decoder(BF16, is_coarse=True, stage="zero3", ranks=1),
    "stage2_vanilla_fixed": decoder("objectives.gan.kind=vanilla", "objectives.gan.balance=fixed",
                                    "objectives.gan.weight=0.1", ranks=1),
    "stage2_limit": decoder("objectives.gan.limit=0.01", ranks=1),
    "stage2_l1_alone": decoder("objectives.rec={perceptual: 0}", ranks=1),
    "stage2_never_adversarial": decoder("objectives.gan.discriminator_start=1", "objectives.gan.start=1", ranks=1),
    "stage2_compiled": decoder(COMPILED, ranks=1, is_slow=True),
    # Generators.
    **{f"lightningdit_{name}": generator("lightningdit_b", **layout) for name, layout in LAYOUTS.items()},
    "lightningdit_bf16": generator("lightningdit_b", BF16, is_coarse=True),
    "lightningdit_options": generator("lightningdit_b", "generator.positions=rope", "generator.qk_norm=true",
                                      "generator.patch=2", "generator.time_scale=1000", "generator.direction=0.5",
                                      "latents.flip=false", "generator.class_dropout=0.5", ranks=1),
    "lightningdit_checkpointing": generator("lightningdit_b", "system.activation_checkpointing=full", ranks=1),
    "lightningdit_compiled": generator("lightningdit_b", COMPILED, ranks=1, is_slow=True),
    "sit": generator("sit_b", ranks=1),
    "dit": generator("dit_b"),
    "dit_fixed_variance": generator("dit_b", "generator.variance=fixed", ranks=1),
    "generator_mini_bf16": generator("generator_mini", BF16, is_coarse=True),
    "mar": generator("mar_b", *SMALL_HEAD),
    "mar_zero3_1rank": generator("mar_b", *SMALL_HEAD, stage="zero3", ranks=1),
    "mar_bf16": generator("mar_b", *SMALL_HEAD, BF16, is_coarse=True, ranks=1),
    "mar_options": generator("mar_b", "generator.buffer=4", "generator.patch=2", "generator.mask_ratio={low: 0.5, std: "
                             "0.5}", "generator.head={width: 32, depth: 2, objective: velocity, repeats: 2}", ranks=1),
    "random_ar": generator("mar_b", *SMALL_HEAD, "generator.order=random"),
    "raster_ar": generator("mar_b", *SMALL_HEAD, "generator.order=raster"),
    "raster_ar_velocity": generator("mar_b", "generator.buffer=4", "generator.order=raster",
                                    "generator.head={width: 32, depth: 2, objective: velocity}", ranks=1),
    "mar_compiled": generator("mar_b", *SMALL_HEAD, COMPILED, ranks=1, is_slow=True),
}  # fmt: skip


def write_files(folder: Path) -> Path:
    """What variants start from: a tokenizer, frozen encoders, LPIPS weights, latents. Numbers depend on nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder / "tokenizer", tiny_config())
    encoder = ("model.trunk={width: 48, depth: 1, heads: 2}", "model.patch_size=16", "seed=5")
    write_run(folder / "encoder", tiny_config(*encoder))
    write_transformers(folder / "dinov2.safetensors")
    save_file(_narrow_lpips(), folder / "lpips.safetensors")
    write_public_store(folder / "store", [40, 24], (8, 4, 4))
    return folder


def _narrow_lpips() -> dict[str, torch.Tensor]:
    """LPIPS over a VGG-16 of 4 to 10 channels, drawn."""
    draw, widths = torch.Generator().manual_seed(0), (4, 4, 6, 6, 8, 8, 8, 10, 10, 10, 10, 10, 10)
    weights = {}
    for i, (into, out) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
        weights[f"convs.{i}.weight"] = torch.randn(out, into, 3, 3, generator=draw) / (9 * into) ** 0.5
        weights[f"convs.{i}.bias"] = 0.1 * torch.randn(out, generator=draw)
    for j, tap in enumerate((1, 3, 6, 9, 12)):
        weights[f"heads.{j}.weight"] = torch.rand(1, widths[tap], 1, 1, generator=draw)
    return weights


def run(comm: Comm, variants: dict[str, Variant], run_dir: Path) -> dict[str, Steps]:
    """STEPS steps of each variant, one after the other; four ranks are two hosts of two."""
    if comm.world_size == 4:
        os.environ["LOCAL_SIZE"] = "2"
    return {name: steps_of(comm, variant, run_dir / name) for name, variant in variants.items()}


def steps_of(comm: Comm, variant: Variant, run_dir: Path) -> Steps:
    """STEPS steps of one variant, each loss as the mean over ranks."""
    torch._dynamo.reset()
    config, found = variant.config(), []
    for record in _records(config, variant, comm, run_dir):
        losses = {"loss": record.losses["total"]} | {k: record.losses[k] for k in ("disc",) if k in record.losses}
        means = {name: float(comm.all_sum(loss)) / comm.world_size for name, loss in losses.items()}
        found.append(means | {"grad_norm": float(record.grad_norm)})
    return found


def _records(config: RunConfig, variant: Variant, comm: Comm, run_dir: Path) -> Iterator[Any]:
    path = ranks.DEEPSPEED / f"{variant.stage}.json"
    ds_config = load_ds_config(path, config, comm.world_size)
    ds_config["zero_optimization"] |= variant.ds
    if isinstance(config, Config):
        yield from _of_pretraining(config, ds_config, comm)
    elif isinstance(config, DecoderGan):
        training = decoder_gan_runs.build(config, comm, variant.stage)
        for step in range(STEPS):
            yield training.step(decoder_gan_runs.pictures(config, step, comm))
    else:
        assert isinstance(config, GeneratorConfig)
        training = trainer.build_task(config, ds_config, comm, run_dir, False)
        batches = training.data.batches(0)
        for _ in range(STEPS):
            yield training.step(next(batches))
        training.data.close()


def _of_pretraining(config: Config, ds_config: dict[str, Any], comm: Comm) -> Iterator[Any]:
    parts = build_pretraining(config, ds_config, comm)
    centres = parts.centres
    for step in range(STEPS):
        record = train_step(parts, random_batch(config, step, comm.rank, comm.world_size), centres, config)
        centres = record.centres
        yield record
