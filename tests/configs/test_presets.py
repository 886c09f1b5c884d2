"""The shipped presets: they load, they build what their headers say, and the headers' arithmetic is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import Config, DecoderGan, RunConfig, load_config, load_run
from configs.generator import DIT, SIT, Diffusion, GeneratorConfig
from model.describe import count_parameters, step_layout
from model.generator.factory import build_generator
from model.generator.tokens import LatentShape
from model.packing import RankBatchSizes
from profiling.cost.flops import generator_flops
from profiling.cost.step_flops import decoder_gan_flops, step_flops

pytestmark = pytest.mark.L0

FOLDER = Path(__file__).resolve().parents[2] / "configs"
BASELINES = ("ae_only", "va_vae", "ldm_kl")
REC_ALONE = (*BASELINES, "ldetok_b")
LARGE = ("vtp_s", "vtp_b", "vtp_l", "vtp_1b", "vtp_7b", *REC_ALONE)
GENERATORS = ("lightningdit_b", "lightningdit_xl", "sit_b", "dit_b", "mar_b")
ALL = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def kind(name: str) -> RunConfig:
    return load_run(FOLDER / f"{name}.yaml")


def header(name: str) -> str:
    """The comment above the first key, on one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().split("\nname:")[0].splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def test_the_presets_are_these() -> None:
    assert {"demo", *LARGE, *GENERATORS, "generator_demo"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_preset_is_called_like_its_file_and_says_how_to_run_it(name: str) -> None:
    assert kind(name).name == name
    assert header(name).startswith(f"{name}: ")
    assert f"--config configs/{name}.yaml" in header(name)


# Parameters of the trunk in millions: released sizes as published, the others as 12 x width^2 x depth.
TRUNKS = {
    "vtp_s": 21.6,
    "vtp_b": 85.7,
    "vtp_l": 303.5,
    "ae_only": 303.5,
    "va_vae": 303.5,
    "ldm_kl": 28.7,
    "vtp_1b": 1132,
    "vtp_7b": 8053,
    "ldetok_b": 85.7,
}


SIZES = {"vtp_s": (384, 12, 6), "vtp_b": (768, 12, 12), "vtp_l": (1024, 24, 16)}  # width, depth, heads: published


@pytest.mark.parametrize("name", SIZES)
def test_encoder_and_decoder_have_the_released_size(name: str) -> None:
    trunk, decoder = preset(name).model.trunk, preset(name).model.decoder
    assert (trunk.width, trunk.depth, trunk.heads, trunk.norm) == (*SIZES[name], "rmsnorm")
    assert (decoder.width, decoder.depth, decoder.heads, decoder.norm) == (*SIZES[name], "layernorm")


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_builds_with_the_published_number_of_parameters(name: str) -> None:
    """On the meta device. Within 1 %; the largest difference is 0.2 %, of vtp_1b: norms, biases, patches."""
    config = preset(name)
    counts = count_parameters(config, RankBatchSizes.per_rank(config, world_size=64))
    assert counts["trunk"] / 1e6 == pytest.approx(TRUNKS[name], rel=0.01)
    is_joint = name not in REC_ALONE
    assert ("text" in counts, "teacher" in counts, "prototypes" in counts) == (is_joint,) * 3
    if is_joint:
        assert counts["text"] / 1e6 == pytest.approx(123.7, rel=0.01), "CLIP's text tower, 12 x 768"


# LightningDiT-XL is published with 675 million; the B models of the three papers with 130, MAR-B with 208.
SIZES_OF_GENERATORS = {"lightningdit_b": 130, "lightningdit_xl": 675, "sit_b": 130, "dit_b": 130, "mar_b": 208}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_has_the_published_number_of_parameters(name: str) -> None:
    config = kind(name)
    assert isinstance(config, GeneratorConfig)
    with torch.device("meta"):
        generator = build_generator(config.generator, LatentShape(16, 16, 16), num_classes=1000)
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert count / 1e6 == pytest.approx(SIZES_OF_GENERATORS[name], abs=0.6)


@pytest.mark.parametrize(
    ("name", "differs"), [("lightningdit_b", {"positions": "both"}), ("sit_b", SIT), ("dit_b", DIT)]
)
def test_the_kinds_of_diffusion_differ_as_their_papers_say(name: str, differs: dict[str, Any]) -> None:
    config = kind(name)
    assert isinstance(config, GeneratorConfig)
    expected = Diffusion(**{"width": 768, "depth": 12, "heads": 12, **differs})
    found = config.generator
    assert isinstance(found, Diffusion)
    if name == "lightningdit_b":  # whose times VTP chose by tokenizer
        found = found.model_copy(update={"times": expected.times})
    assert found == expected


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_runs_on_every_power_of_two_of_ranks(name: str) -> None:
    config = preset(name)
    assert config.data.streams >= 512
    for exponent in range(10):
        RankBatchSizes.per_rank(config, 2**exponent)
    assert config.data.streams % 512 == 0


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_has_the_papers_batch_and_samples(name: str) -> None:
    batch, steps = preset(name).batch, preset(name).optim.steps
    if name in BASELINES:
        assert (batch.clip, batch.ssl, batch.rec) == (2048, 0, 2048)
    elif name == "ldetok_b":
        assert (batch.clip, batch.ssl, batch.rec) == (1024, 0, 1024)
        assert batch.rec * steps == pytest.approx(200 * 1_281_167, rel=0.01), "epochs of ImageNet-1k"
    else:
        assert (batch.clip, batch.ssl, batch.rec) == (16_384, 4096, 2048)
        assert batch.clip * steps == pytest.approx(1.1e9, rel=0.01)


def test_the_baseline_differs_from_vtp_l_in_objectives_and_batch_alone() -> None:
    ours, baseline = preset("vtp_l"), preset("ae_only")
    assert ours.model == baseline.model
    assert (ours.views, ours.data, ours.seed) == (baseline.views, baseline.data, baseline.seed)
    assert ours.optim == baseline.optim.model_copy(update={"lr_batch": ours.optim.lr_batch})
    assert ours.batch.clip / ours.optim.lr_batch == baseline.batch.clip / baseline.optim.lr_batch


def test_the_aligned_baseline_differs_from_the_plain_one_in_the_alignment_alone() -> None:
    plain, aligned = preset("ae_only"), preset("va_vae")
    rec = aligned.objectives.rec.model_copy(update={"align": None})
    same = {"name": plain.name, "objectives": aligned.objectives.model_copy(update={"rec": rec})}
    assert aligned.model_copy(update=same) == plain
    encoder = aligned.objectives.rec.align
    assert encoder is not None
    assert (encoder.kind, encoder.patch_size) == ("dinov2", 14), "what VA-VAE aligned with"
    assert encoder.encoder == preset("vtp_l").model.trunk, "the sizes of DINOv2-L too"


def test_the_convolutional_baseline_differs_from_the_plain_one_in_architecture_and_kl_alone() -> None:
    plain, convolutional = preset("ae_only"), preset("ldm_kl")
    rec = convolutional.objectives.rec.model_copy(update={"kl": 0.0})
    objectives = convolutional.objectives.model_copy(update={"rec": rec})
    model = convolutional.model.model_copy(
        update={"trunk": plain.model.trunk, "decoder": plain.model.decoder, "conv": None, "latent": "deterministic"}
    )
    assert convolutional.model_copy(update={"name": plain.name, "objectives": objectives, "model": model}) == plain
    f8 = load_config(
        FOLDER / "ldm_kl.yaml",
        [
            "model.patch_size=8", "model.latent_channels=4", "model.conv.multipliers=[1,2,4,4]",
            "model.conv.attention_levels=0",
        ],
    )  # fmt: skip
    assert count_parameters(f8, RankBatchSizes.per_rank(f8, 32))["trunk"] == 34_163_592, "Stable Diffusion's encoder"


@pytest.mark.parametrize("name", LARGE)
def test_the_overrides_in_a_header_load(name: str) -> None:
    lines = re.findall(r"batch\.clip=\d+ batch\.ssl=\d+ batch\.rec=\d+(?: \w+\.\w+=\d+)*", header(name))
    streams = re.findall(r"take (data\.streams=\d+)", header(name))
    assert len(lines) == (0 if name in REC_ALONE else 2)
    for line in lines:
        more = [] if "streams" in line else streams
        config = load_config(FOLDER / f"{name}.yaml", [*line.split(), *more])
        assert config.batch.clip > config.batch.ssl > config.batch.rec > 0
        if "optim.steps" in line:
            full = preset(name)
            assert config.batch.clip * config.optim.steps == full.batch.clip * full.optim.steps
            assert full.batch.clip // config.batch.clip == full.batch.ssl // config.batch.ssl


def test_the_denoising_tokenizer_has_the_published_numbers() -> None:
    config = preset("ldetok_b")
    rec, optim = config.objectives.rec, config.optim
    assert (rec.l1, rec.l2, rec.perceptual, rec.kl) == (0, 1, 1, 1e-6)
    assert (rec.noise.kind, rec.noise.scale, rec.mask) == ("interpolative", 3.0, (-0.1, 0.7))
    assert (optim.lr, optim.lr_batch, optim.warmup, optim.clip_norm) == (4e-4, 1024, 0.25, 3.0)
    assert (optim.betas, optim.weight_decay, config.model.latent_channels) == ((0.9, 0.95), 1e-4, 16)


def sample_flops(config: Config) -> float:
    """Of one step over its number of samples, nothing left out: docs/recipe.md, "Counting FLOPs"."""
    rows = RankBatchSizes.per_rank(config, 1)
    return step_flops(config, rows).full_flops / rows.clip


def training_flops(name: str) -> float:
    """Of one sample: of a generator three times the forward pass, over the latents its header speaks of."""
    config = kind(name)
    if isinstance(config, Config):
        return sample_flops(config)
    assert isinstance(config, GeneratorConfig)
    shape = LatentShape(16 if name == "mar_b" else 64, 16, 16)
    return 3 * generator_flops(config.generator, shape, num_classes=1000, batch=1)


@pytest.mark.parametrize("name", [*LARGE, *GENERATORS])
def test_the_cost_in_a_header_is_the_product_of_its_factors(name: str) -> None:
    pattern = (
        r"Cost ([\d,.]+) GFLOP a sample x ([\d,]+) steps x ([\d,]+) samples / \(([\d,]+) H100 x 989e12 x MFU "
        r"([\d.]+) \[assumed\]\) = ([\d.]+) hours, ([\d,]+) GPU-hours"
    )
    found = re.search(pattern, header(name))
    assert found is not None
    gflop, steps, samples, gpus, mfu, hours, gpu_hours = (float(n.replace(",", "")) for n in found.groups())
    config = kind(name)
    assert (steps, samples) == (config.optim.steps, config.samples_per_step)
    assert gflop == pytest.approx(training_flops(name) / 1e9, rel=0.01)
    assert gpu_hours == pytest.approx(gflop * 1e9 * steps * samples / (989e12 * mfu) / 3600, rel=0.01)
    assert hours == pytest.approx(gpu_hours / gpus, abs=0.051)


def test_the_cost_of_stage_2_is_the_product_of_its_factors() -> None:
    found = re.search(
        r"Cost ([\d,]+) GFLOP a sample x ([\d,]+) steps x ([\d,]+) samples / \(8 H100 x 989e12 x MFU 0.40 "
        r"\[assumed\]\) = ([\d.]+) hours, (\d+) GPU-hours",
        header("decoder_gan"),
    )
    config = load_run(FOLDER / "decoder_gan.yaml")
    assert found is not None
    assert isinstance(config, DecoderGan)
    gflop, steps, samples, hours, gpu_hours = (float(n.replace(",", "")) for n in found.groups())
    gan = config.objectives.gan
    flops = decoder_gan_flops(config, preset("vtp_l").model, 1, 1 - gan.start, 1 - gan.discriminator_start).model_flops
    assert (steps, samples) == (config.optim.steps, config.batch.images)
    assert gflop == pytest.approx(flops / samples / 1e9, rel=0.01)
    assert gpu_hours == pytest.approx(gflop * 1e9 * steps * samples / (989e12 * 0.4) / 3600, abs=0.51)
    assert hours == pytest.approx(gpu_hours / 8, abs=0.051)


@pytest.mark.parametrize("name", [name for name in LARGE if name not in REC_ALONE])
def test_the_memory_in_a_header_is_the_product_of_its_factors(name: str) -> None:
    found = re.search(r"about (\d+) GB of trunk activations on each of ([\d,]+) GPUs", header(name))
    assert found is not None
    config = preset(name)
    layout = step_layout(config, RankBatchSizes.per_rank(config, int(found[2].replace(",", ""))))
    assert int(found[1]) == pytest.approx(
        36e-9 * layout.tokens * config.model.trunk.width * config.model.trunk.depth, rel=0.03
    )
