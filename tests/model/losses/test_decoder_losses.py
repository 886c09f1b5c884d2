"""Stage 2's total: its gradient at the pixels is autograd's of the sum that is reported."""

from __future__ import annotations

import pytest
import torch

from configs.decoder_gan import DecoderObjectives, Discriminator, Gan, PixelLosses
from model.decoder import DecoderStageOutputs
from model.losses.comm import Solo
from model.losses.gan import PatchGan, decoder_losses, generator_loss, initialise_discriminator
from model.losses.perceptual import LpipsDistance, convert_public_weights
from model.losses.pixels import l1_loss, to_signed
from tests.model.losses.test_reconstruction_losses import public_weights

pytestmark = pytest.mark.L0
PIXELS = PixelLosses(l1=0.7, perceptual=0.4, lpips_weights="lpips.safetensors")


def outputs() -> DecoderStageOutputs:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 3, 32, 32), (3, 3, 32, 32), (3, 8, 4, 4), (48, 16)  # of recon, target, latent, tokens
    return DecoderStageOutputs(*(torch.randn(size, generator=generator) for size in sizes))


def judge() -> PatchGan:
    network = PatchGan(Discriminator(width=8, layers=2))
    for name, parameter in network.named_parameters():
        initialise_discriminator(name, parameter, seed=0)
    return network


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
@pytest.mark.parametrize("balance", ["fixed", "adaptive"])
def test_the_gradient_is_that_of_the_total(balance: str, kind: str) -> None:
    given, network, perceptual = outputs(), judge(), LpipsDistance(convert_public_weights(*public_weights()))
    gan = Gan.model_validate({"balance": balance, "kind": kind, "weight": 0.3})
    found = decoder_losses(given, DecoderObjectives(rec=PIXELS, gan=gan), Solo(), perceptual, network)
    recon = given.recon.clone().requires_grad_()
    l1, lpips = l1_loss(recon, given.target), perceptual(to_signed(recon), to_signed(given.target)).mean()
    term = generator_loss(network(to_signed(recon)), gan.kind)
    total = 0.7 * l1 + 0.4 * lpips + found.named["gan_weight"] * term
    [gradient] = torch.autograd.grad(total, recon)
    torch.testing.assert_close(found.gradient, gradient)
    expected = {"l1": l1, "lpips": lpips, "rec": 0.7 * l1 + 0.4 * lpips, "gan": term, "total": total}
    for name, value in expected.items():
        torch.testing.assert_close(found.named[name], value.detach())
    assert (found.named["gan_weight"].item() == pytest.approx(0.3)) == (balance == "fixed")
    assert all(parameter.grad is None for parameter in network.parameters())


def test_without_a_judge_there_are_pixels_alone_and_the_term_is_reported_as_nothing() -> None:
    given = outputs()
    found = decoder_losses(given, DecoderObjectives(rec=PixelLosses(perceptual=0)), Solo())
    recon = given.recon.clone().requires_grad_()
    [gradient] = torch.autograd.grad(l1_loss(recon, given.target), recon)
    torch.testing.assert_close(found.gradient, gradient)
    assert found.named["gan"] == found.named["gan_weight"] == 0
    assert "lpips" not in found.named
