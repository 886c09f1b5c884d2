"""The convolutional autoencoder: latent diffusion's shapes and sizes, behind the faces of trunk and decoder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import Config, UserError, load_config, to_yaml
from engine.initial_weights import initial_weights
from engine.random_draws import rec_noise_draws
from model.conv import ConvDecoder, ConvEncoder, PositionAttention
from model.describe import count_parameters, describe
from model.frozen import FrozenTrunk
from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.programs import write_programs
from model.tokenizer import VisualTokenizer
from profiling.plan import __main__ as plan
from tests.model.tiny_weights import build, tokenizer_of, write_run
from tests.tiny import CONV, model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0

PRESET = Path(__file__).resolve().parents[2] / "configs" / "ldm_kl.yaml"
F8 = "model.conv={channels: 8, multipliers: [1, 2, 2, 4], groups: 4, num_res_blocks: 1}"
F16 = "model.conv={channels: 8, multipliers: [1, 1, 2, 2, 4], groups: 4, num_res_blocks: 1}"
ATTENDING = "model.conv.attention_levels=2"


@pytest.mark.parametrize(("conv", "patch"), [(F8, 8), (F16, 16)])
@pytest.mark.parametrize("latent", ["deterministic", "gaussian"])
def test_pixels_become_latents_of_an_eighth_or_a_sixteenth_and_come_back(conv: str, patch: int, latent: str) -> None:
    config = tiny_config(*CONV, conv, f"model.patch_size={patch}", f"model.latent={latent}")
    tokenizer = tokenizer_of(config)
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    found = tokenizer.encode(images)
    assert found.shape == (2, 8, 64 // patch, 32 // patch)
    assert tokenizer.decode(found).shape == images.shape


def test_it_has_latent_diffusions_number_of_parameters() -> None:
    """34.2 and 49.5 million are those of the released f8 KL autoencoder's encoder and decoder with 4 channels."""
    conv = "model.conv={channels: 128, multipliers: [1, 2, 4, 4]}"
    config = tiny_config(*CONV, conv, "model.latent=gaussian", "model.latent_channels=4")
    with torch.device("meta"):
        model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["trunk"] == 34_163_592
    assert counts["bottleneck"] == 8 * 8  # its quant_conv has 8 biases besides
    assert counts["decoder"] == 49_490_179 + 4 * 4 + 4  # with post_quant_conv


def test_the_preset_has_the_number_of_parameters_of_latent_diffusions_f16() -> None:
    """Its autoencoder_kl_16x16x16: 28.3 and 41.3 million, of which attention on the level of 16 x 16 is 2.1 and 3.2."""

    def conv(before: int, after: int, side: int = 3) -> int:
        return before * after * side**2 + after

    def res(before: int, after: int) -> int:
        way_past = conv(before, after, 1) if before != after else 0
        return 2 * before + conv(before, after) + 2 * after + conv(after, after) + way_past

    attention = 2 * 512 + 4 * conv(512, 512, 1)  # norm; q, k, v, out
    middle = 2 * res(512, 512) + attention
    encoder = (
        conv(3, 128)
        + 4 * res(128, 128) + 2 * conv(128, 128)  # 256 and 128 px, each with its step down
        + res(128, 256) + 3 * res(256, 256) + 2 * conv(256, 256)  # 64 and 32
        + res(256, 512) + res(512, 512) + 2 * attention  # 16
        + middle + 2 * 512 + conv(512, 2 * 16)
    )  # fmt: skip
    decoder = (
        conv(16, 512) + middle
        + 3 * res(512, 512) + 3 * attention + conv(512, 512)  # 16, with its step up
        + res(512, 256) + 5 * res(256, 256) + 2 * conv(256, 256)  # 32 and 64
        + res(256, 128) + 5 * res(128, 128) + conv(128, 128)  # 128 and 256
        + 2 * 128 + conv(128, 3)
    )  # fmt: skip
    assert (encoder, decoder) == (28_265_760, 41_343_875)
    config = load_config(PRESET, ["model.latent_channels=16"])
    counts = count_parameters(config, RankBatchSizes.per_rank(config, 32))
    assert counts["trunk"] == encoder
    assert counts["bottleneck"] == 32 * 32  # its quant_conv has 32 biases besides
    assert counts["decoder"] == decoder + conv(16, 16, 1)  # with post_quant_conv


def test_the_coarsest_levels_attend_behind_every_block_and_no_other_does() -> None:
    model = build(tiny_config(*CONV, ATTENDING))
    found = {
        name: [[isinstance(attn, PositionAttention) for attn in level.attns] for level in tower.levels]
        for name, tower in (("encoder", model.trunk), ("decoder", model.decoder))
    }
    assert found["encoder"] == [[False], [False], [True], [True]]
    assert found["decoder"] == [[True, True], [True, True], [False, False], [False, False]]
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    level = model.trunk.levels[-1]
    expected = level.attns[0](level.blocks[0](x[:, :16]))
    assert torch.equal(level(x[:, :16]), expected)
    assert not torch.allclose(expected, level.blocks[0](x[:, :16])), "attention adds something"


def test_attention_in_the_middle_is_softmax_of_all_positions_with_all() -> None:
    attention = PositionAttention(8, 4, "matmul")
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = []
    for image in x:
        tokens_PC = F.group_norm(image[None], 4, attention.norm.weight, attention.norm.bias, 1e-6)[0].flatten(1).T
        q, k, v = attention.qkv(tokens_PC).chunk(3, dim=1)
        y_PC = attention.proj(torch.softmax(q @ k.T / 8**0.5, dim=1) @ v)
        expected.append(image + y_PC.T.unflatten(1, (3, 5)))
    torch.testing.assert_close(attention(x), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_picture_does_not_see_its_neighbours_in_the_batch() -> None:
    """With other neighbours in a batch of the same size, for which the same kernels run, it is the same to the bit."""
    tokenizer = tokenizer_of(tiny_config(*CONV))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    elsewhere = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    elsewhere[1] = images[1]
    here, there = tokenizer.encode(images), tokenizer.encode(elsewhere)
    assert torch.equal(here[1], there[1])
    assert not torch.allclose(here[0], there[0])


def test_positions_keep_their_place_on_the_way_through_tokens() -> None:
    """A change in one corner of the image moves the latents there, and not those of the far end."""
    config = tiny_config(*CONV, "model.conv={channels: 8, multipliers: [1, 1, 1, 1], groups: 4, num_res_blocks: 1}")
    model = build(config)
    encoder, decoder = model.trunk, model.decoder
    assert isinstance(encoder, ConvEncoder)
    assert isinstance(decoder, ConvDecoder)
    for block in (encoder.middle, decoder.middle):  # attention sees everything
        block.attn.proj.weight.data.zero_()
    images = torch.zeros(1, 3, 32, 256)
    changed = images.clone()
    changed[:, :, :8, :8] = 1
    moved_TD = (encoder({"clip": changed}, {}) - encoder({"clip": images}, {})).abs().sum(dim=1)
    moved = moved_TD.unflatten(0, (4, 32))
    assert moved[:, 0].max() > 10 * moved[:, -1].max()
    latent_RPL = torch.zeros(1, 4 * 32, 8)
    latent_RPL[:, 0] = 1
    recon = (decoder(latent_RPL, (4, 32)) - decoder(torch.zeros_like(latent_RPL), (4, 32))).abs().sum(dim=1)
    assert recon[0, :8, :8].mean() > 10 * recon[0, -8:, -8:].mean()


class Trained:
    """A forward of training: the step's draws, and what came of them."""

    def __init__(self, step: int, *overrides: str) -> None:
        config = tiny_config(*CONV, *overrides)
        draws = rec_noise_draws(config, 0, 1)
        self.model = build(config)
        self.inputs = model_inputs(random_batch(config, 0))
        outputs = self.model(**self.inputs, rec_noise=draws and draws.draw(step)).rec
        assert outputs is not None
        self.rec = outputs


def test_training_draws_from_the_distribution_and_encode_gives_its_mode() -> None:
    first, second = (Trained(step, "model.latent=gaussian", "objectives.rec.kl=1e-6") for step in (0, 1))
    assert not torch.equal(first.rec.recon, second.rec.recon), "other steps draw other numbers"
    assert torch.equal(first.rec.latent, second.rec.latent), "images show the mode"
    state = {name: parameter.detach() for name, parameter in first.model.named_parameters()}
    tokenizer = VisualTokenizer.from_state(first.model.model, state)
    images = first.inputs["images"][:6]
    torch.testing.assert_close(tokenizer.encode(images), first.rec.latent, rtol=1e-5, atol=1e-6)
    moments = tokenizer.moments(images)
    assert moments.mean.shape == moments.log_variance.shape == (6, 8, 4, 4)
    assert first.rec.posterior is not None
    divergence = first.rec.posterior.kl()
    assert divergence.shape == (6,)
    assert (divergence > 0).all()


@pytest.mark.parametrize("overrides", [(), ("model.conv.attention_levels=2",)])
def test_every_parameter_gets_a_gradient(overrides: tuple[str, ...]) -> None:
    trained = Trained(0, "model.latent=gaussian", *overrides)
    trained.rec.recon.square().mean().backward()
    assert [name for name, p in trained.model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_first_values_keep_the_size_of_what_passes_through() -> None:
    def spread(x: Tensor) -> float:
        return x.float().std().item()

    rec = Trained(0).rec
    assert 0.05 < spread(rec.latent) < 2
    assert 0.05 < spread(rec.recon) < 2


def test_first_values_follow_from_seed_and_name_alone() -> None:
    one, other = build(tiny_config(*CONV)), build(tiny_config(*CONV, "model.latent=gaussian"))
    theirs = dict(other.named_parameters())
    assert torch.equal(one.trunk.conv_in.weight, theirs["trunk.conv_in.weight"])
    again = build(tiny_config(*CONV, "seed=1"))
    initialise(again, tiny_config(*CONV))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("overrides", [(), ("model.conv.attention_levels=1",)])
def test_its_config_reads_itself_back_and_its_weights_open(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = tiny_config(*CONV, "model.latent=gaussian", *overrides)
    run = write_run(tmp_path / "run", config)
    assert load_config(run / "config.yaml") == config
    assert "trunk: null" in to_yaml(config)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(VisualTokenizer.from_run(run).encode(images), tokenizer_of(config).encode(images))
    with pytest.raises(UserError, match=r"model\.conv has no place in the public layout"):
        VisualTokenizer.from_run(run).save_pretrained(tmp_path / "public")


def test_the_table_says_its_levels(tmp_path: Path) -> None:
    config = tiny_config(*CONV, "model.latent=gaussian")
    said = describe(config, RankBatchSizes.per_rank(config, 2))
    assert "convolutions of 8 16 16 32 channels, 1 residual blocks a level of the encoder\n" in said
    attending = tiny_config(*CONV, ATTENDING)
    assert "encoder, attention on 2 of them\n" in describe(attending, RankBatchSizes.per_rank(attending, 2))
    assert "one rank, one step: 48 tokens = clip 3 x 16 + 0 padding" in said
    assert "latent of a 32 px image: 8 x 4 x 4, gaussian" in said


def refused(*overrides: str) -> Config:
    return tiny_config(*CONV, *overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.conv=null",), "trunk is missing and has no default: give model.trunk, or model.conv for both"),
        (("model.trunk={width: 32, depth: 1, heads: 2}",), "conv and trunk are both set"),
        (("model.patch_size=16",), r"patch_size=16 but conv.multipliers=\[1, 2, 2, 4\]: .* patches of 8"),
        (("model.conv.groups=3",), "channels=8 over groups=3"),
        (("model.conv.attention_levels=5",), r"attention_levels=5 but multipliers=\[1, 2, 2, 4\] make 4 levels"),
        (("model.registers=1",), "registers=1 but conv is set"),
        (("objectives.clip.weight=1",), "objectives.clip.weight=1: it has no CLS token"),
        (("objectives.ssl.weight=1", "batch.ssl=6"), "objectives.ssl.weight=1: it has no CLS token"),
        (("objectives.rec.mask=[0.1,0.5]",), "a convolution sees whole images"),
        (("system.linear=fp8_torchao", "optim.precision=bf16"), "FP8 is for the blocks of transformers"),
    ],
)
def test_what_convolutions_cannot_do_is_one_clear_error(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        refused(*overrides)


def test_the_planner_says_that_it_knows_no_times_of_convolutions(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", str(PRESET), "--gpus", "32"]) == 2
    assert "the planner's times are of transformers, and model.conv is set" in capsys.readouterr().err


def test_weights_of_convolutions_are_no_start_for_a_transformer_nor_its_frozen_encoder(tmp_path: Path) -> None:
    weights = write_run(tmp_path / "run", tiny_config(*CONV)) / "weights.safetensors"
    other = "model.conv={channels: 8, multipliers: [1, 2, 2, 4], groups: 2, num_res_blocks: 1}"
    for overrides, says in ((CONV, None), ((*CONV, other), "trained with model.conv="), ((), "has no place|not there")):
        config = tiny_config(*overrides, f"init.weights={weights}")
        shapes = {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}
        with (
            pytest.raises(UserError, match=says) if says else nullcontext(),
            initial_weights(config, shapes) as initial,
        ):
            assert initial.summary.endswith("trunk, bottleneck, decoder")
    encoder = "objectives.rec.align.encoder={width: 32, depth: 2, heads: 2}"
    align = tiny_config(f"objectives.rec.align.weights={weights}", encoder).objectives.rec.align
    assert align is not None
    with pytest.raises(UserError, match="has no transformer trunk"):
        FrozenTrunk.load(align, "sdpa", torch.float32)


@pytest.mark.parametrize("latent", [pytest.param("deterministic", marks=pytest.mark.L2), "gaussian"])
def test_its_programs_run_without_this_code(latent: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_config(*CONV, f"model.latent={latent}"))
    write_programs(tokenizer, tmp_path)
    encode, decode = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("encode", "decode"))
    images = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encode(images), tokenizer.encode(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decode(encode(images)), tokenizer.decode(tokenizer.encode(images)), rtol=1e-5, atol=1e-5)
