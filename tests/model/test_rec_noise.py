"""Latent noise, hidden patches, Gaussian latents: rec learns from what it should, and clip and ssl do not notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import LatentNoise
from model.imagenet import normalise
from model.latent import NUM_HIDDEN_FRACTIONS, DiagonalGaussian, RecNoise, add_rec_noise, hidden_patch_probabilities
from model.losses.comm import Solo
from model.losses.total import compute_losses
from model.outputs import Outputs
from model.pretrainer import Pretrainer
from model.trunk import gather_patches
from tests.model.tiny_weights import build, tokenizer_of
from tests.tiny import corruption, model_inputs, random_batch, step_that_hides, tiny_config

pytestmark = pytest.mark.L0
MASK, NOISE, GAUSSIAN = (
    "objectives.rec.mask=[-0.1,0.7]",
    "objectives.rec.noise.kind=interpolative",
    "model.latent=gaussian",
)
NO_CLIP = ("objectives.clip.weight=0",)
HALF = 8  # of 16 patches


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_noise_is_mixed_in_or_added_by_the_level_of_its_image() -> None:
    latent, level_R = torch.tensor([[[2.0, -4.0]], [[1.0, 1.0]]]), torch.tensor([0.25, 0.5])
    draws = RecNoise(level_R=level_R, noise_RVL=torch.tensor([[[1.0, 2.0]], [[-1.0, 0.0]]]))
    # t = 1/4, x = (2, -4), e = 3 * (1, 2): 3/4 x + 1/4 e; t = 1/2, x = (1, 1), e = (-3, 0).
    mixed = add_rec_noise(latent, draws, LatentNoise(kind="interpolative", scale=3))
    assert mixed.tolist() == [[[2.25, -1.5]], [[-1.0, 0.5]]]
    added = add_rec_noise(latent, draws, LatentNoise(kind="additive", scale=3))
    assert added.tolist() == [[[2.75, -2.5]], [[-0.5, 1.0]]]
    assert add_rec_noise(latent.bfloat16(), draws, LatentNoise(kind="additive")).dtype == torch.bfloat16


def test_a_gaussian_latent_is_drawn_before_its_noise() -> None:
    latent, sample, noise = DiagonalGaussian(randn(2, 3, 4), randn(2, 3, 4)), randn(2, 3, 4) + 1, randn(2, 3, 4) - 1
    level_R = torch.tensor([0.1, 0.9])
    given = add_rec_noise(latent, RecNoise(None, sample, level_R, noise), LatentNoise(kind="interpolative", scale=2))
    drawn, t = latent.mean + (latent.log_variance / 2).exp() * sample, level_R[:, None, None]
    torch.testing.assert_close(given, (1 - t) * drawn + t * 2 * noise)
    assert torch.equal(add_rec_noise(latent, RecNoise(), LatentNoise()), latent.mean)


def test_shares_are_those_of_the_docstring() -> None:
    found = {hidden: round(share, 3) for hidden, share in hidden_patch_probabilities((-0.1, 0.7), 256).items()}
    assert found == {0: 0.203, 32: 0.156, 64: 0.156, 96: 0.156, 128: 0.156, 160: 0.144, 192: 0.028}
    assert hidden_patch_probabilities(None, 256) == {0: 1.0}
    assert hidden_patch_probabilities((0.5, 0.5), 16) == {8: 1.0}
    assert max(hidden_patch_probabilities((0.2, 0.99), 16)) == 14, "something stays visible"


@given(low=st.floats(-1, 0.87), span=st.floats(0, 1.8))
def test_eighths_keep_the_mean_of_what_is_hidden(low: float, span: float) -> None:
    high = min(max(low + span, 0.01), (NUM_HIDDEN_FRACTIONS - 1) / NUM_HIDDEN_FRACTIONS)
    low = min(low, high)
    shares = hidden_patch_probabilities((low, high), 64 * NUM_HIDDEN_FRACTIONS)
    assert sum(shares.values()) == pytest.approx(1)
    mean = sum(hidden * share for hidden, share in shares.items()) / (64 * NUM_HIDDEN_FRACTIONS)
    wanted = high if high - low < 1e-9 else (high**2 - max(low, 0) ** 2) / (2 * (high - low))
    assert mean == pytest.approx(wanted, abs=1e-6)


def outputs_of(model: Pretrainer, draws: RecNoise | None, images: Tensor | None = None) -> Outputs:
    batch = random_batch(tiny_config(), step=0)
    inputs = model_inputs(batch) | ({} if images is None else {"images": images})
    outputs: Outputs = model(**inputs, rec_noise=draws)
    return outputs


@pytest.mark.parametrize("overrides", [(), NO_CLIP])
def test_hidden_pixels_do_not_reach_rec_and_clip_sees_them(overrides: tuple[str, ...]) -> None:
    config = tiny_config(MASK, *overrides)
    model, draws = build(config), corruption(config, step_that_hides(config, HALF))
    assert draws is not None
    assert draws.visible_idx_RV is not None
    images = random_batch(config, 0).images.clone()
    patches = images[:6].unfold(2, 8, 8).unfold(3, 8, 8)  # (R, 3, 4, 4, 8, 8), a view
    is_hidden_RP = torch.ones(6, 16, dtype=torch.bool).scatter(1, draws.visible_idx_RV, False)
    assert is_hidden_RP.sum(1).tolist() == [HALF] * 6
    patches[is_hidden_RP.view(6, 1, 4, 4, 1, 1).expand_as(patches)] ^= 255
    before, after = outputs_of(model, draws), outputs_of(model, draws, images)
    assert before.rec is not None
    assert after.rec is not None
    assert torch.equal(before.rec.recon, after.rec.recon)
    assert not torch.equal(before.rec.target, after.rec.target), "they are what is to be filled in"
    if before.clip is not None and after.clip is not None:
        changed_B = (before.clip.image_BE != after.clip.image_BE).any(dim=1)
        assert changed_B.tolist() == [True] * 6 + [False] * 6
    patches[~is_hidden_RP.view(6, 1, 4, 4, 1, 1).expand_as(patches)] ^= 255
    assert not torch.equal(before.rec.recon, outputs_of(model, draws, images).rec.recon)


def one_by_one(model: Pretrainer, images: Tensor, visible_idx_RV: Tensor) -> Tensor:
    """(R, V, D): CLS and visible patches of each image alone through the blocks, at their own places."""
    trunk, rows = model.trunk, []
    [patches_RPD], table_2PE = trunk.patch_embed(normalise(images)), trunk.rope.table((4, 4))
    for patches_PD, idx_V in zip(patches_RPD, visible_idx_RV, strict=True):
        x_TD = torch.cat((trunk.cls_token[0], patches_PD[idx_V]))
        identity = torch.stack((torch.ones(1, 16), torch.zeros(1, 16))).to(table_2PE.dtype)
        rope_2TE = torch.cat((identity, table_2PE[:, idx_V]), dim=1)
        for block in trunk.blocks:
            x_TD = block(x_TD, rope_2TE, ((1, len(x_TD)),))
        rows.append(trunk.norm(x_TD)[1:])
    return torch.stack(rows)


@pytest.mark.parametrize("overrides", [(), NO_CLIP, ("model.image_feature=patch_mean",)])
def test_rec_of_visible_patches_is_that_of_each_image_alone(overrides: tuple[str, ...]) -> None:
    config = tiny_config(MASK, GAUSSIAN, NOISE, *overrides)
    model, draws = build(config), corruption(config, step_that_hides(config, HALF))
    images = random_batch(config, 0).images[:6]
    found = outputs_of(model, draws).rec
    assert found is not None
    assert found.posterior is not None
    posterior = DiagonalGaussian.of(model.bottleneck(one_by_one(model, images, draws.visible_idx_RV)), -1)
    # Worst seen 3e-7: one pass rounds in another order.
    torch.testing.assert_close(found.posterior.mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.posterior.log_variance, posterior.log_variance, rtol=0, atol=1e-5)
    latent_RVL = add_rec_noise(posterior, draws, config.objectives.rec.noise)
    recon = model.decoder(latent_RVL, (4, 4), draws.visible_idx_RV)
    torch.testing.assert_close(found.recon, recon, rtol=0, atol=1e-5)
    is_zero = (found.latent == 0).all(dim=1).flatten(1)
    assert is_zero.sum(dim=1).tolist() == [HALF] * 6
    shown_RPL = found.latent.flatten(2).transpose(1, 2)
    assert torch.equal(gather_patches(shown_RPL, draws.visible_idx_RV), found.posterior.mean)


def test_the_decoder_reads_latents_at_their_places_and_its_token_elsewhere() -> None:
    decoder = build(tiny_config(MASK)).decoder
    visible_idx_RV = torch.tensor([[0, 2], [1, 3]])
    x_RVD, token_D = randn(2, 2, 32), decoder.mask_token[0]
    filled = decoder._with_mask_tokens(x_RVD, visible_idx_RV, 4)
    wanted = [[x_RVD[0, 0], token_D, x_RVD[0, 1], token_D], [token_D, x_RVD[1, 0], token_D, x_RVD[1, 1]]]
    assert torch.equal(filled, torch.stack([torch.stack(row) for row in wanted]))
    assert token_D.std() > 0.01, "all zeros would be the same at every place in the first attention"


def test_a_masked_step_that_hides_nothing_is_a_step_without_masks() -> None:
    masked, plain = tiny_config(MASK), tiny_config()
    draws = corruption(masked, step_that_hides(masked, 0))
    found, wanted = outputs_of(build(masked), draws), outputs_of(build(plain), None)
    assert torch.equal(found.rec.recon, wanted.rec.recon)
    assert torch.equal(found.rec.latent, wanted.rec.latent)
    assert torch.equal(found.clip.image_BE, wanted.clip.image_BE)


def test_clip_and_ssl_are_the_same_whatever_happens_to_rec() -> None:
    """To rounding: the rec group is packed behind theirs."""
    disturbed, plain = tiny_config(MASK, NOISE, GAUSSIAN), tiny_config()
    draws = corruption(disturbed, step_that_hides(disturbed, HALF))
    found, wanted = outputs_of(build(disturbed), draws), outputs_of(build(plain), None)
    for part, names in (
        ("clip", ("image_BE",)),
        ("ssl", ("student_global_GE", "student_patch_ME", "teacher_patch_ME")),
    ):
        for name in names:
            one, other = getattr(getattr(found, part), name), getattr(getattr(wanted, part), name)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)  # worst seen 2e-7


def test_every_parameter_of_rec_learns_and_an_unread_one_has_a_gradient_of_zero() -> None:
    """ZeRO-3 keeps the gradient of the step before for a parameter that gets none: so all always get one."""
    config = tiny_config(MASK, NOISE, GAUSSIAN, "objectives.rec.kl=1e-3", "objectives.rec.l2=1")
    for hidden in (0, HALF):
        model = build(config)
        outputs = outputs_of(model, corruption(config, step_that_hides(config, hidden)))
        compute_losses(outputs, config.objectives, 0.05, Solo()).total.backward()
        grads = {
            name: p.grad for name, p in model.named_parameters() if name.split(".")[0] in ("bottleneck", "decoder")
        }
        assert [name for name, grad in grads.items() if grad is None] == []
        assert bool(grads["decoder.mask_token"].any()) == (hidden > 0)
        assert grads["bottleneck.weight"][8:].abs().sum() > 0, "the log-variance's half"


def test_terms_of_rec_are_named_and_sum_up() -> None:
    config = tiny_config(GAUSSIAN, "objectives.rec.kl=1e-2", "objectives.rec.l2=2", "objectives.rec.l1=0")
    outputs = outputs_of(build(config), corruption(config, 0))
    named = compute_losses(outputs, config.objectives, 0.05, Solo()).named()
    posterior = outputs.rec.posterior
    assert "l1" not in named
    assert named["kl"] == posterior.kl().mean()
    assert named["latent_std"] == posterior.std.mean()
    torch.testing.assert_close(named["rec"], 2 * named["l2"] + 1e-2 * named["kl"])
    square = (outputs.rec.recon - outputs.rec.target) * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) * 2
    torch.testing.assert_close(named["l2"], square.square().mean())


def test_heads_read_the_mode_of_a_gaussian_latent() -> None:
    config = tiny_config(GAUSSIAN, "model.bottleneck_ae_only=false")
    model, tokenizer = build(config), tokenizer_of(config)
    images = random_batch(config, 0).images
    one, other = (outputs_of(model, corruption(config, step)).clip for step in (0, 1))
    assert torch.equal(one.image_BE, other.image_BE)
    torch.testing.assert_close(tokenizer.embed_images(images), one.image_BE, rtol=0, atol=1e-5)
    without = outputs_of(model, None).rec
    torch.testing.assert_close(tokenizer.encode(images[:6]), without.latent, rtol=0, atol=1e-5)
