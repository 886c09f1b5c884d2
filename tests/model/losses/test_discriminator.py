"""The PatchGAN: which patch a logit sees, what it depends on, and what it starts from."""

from __future__ import annotations

import pytest
import torch

from configs.decoder_gan import Discriminator
from model.losses.gan import PatchGan, initialise_discriminator

pytestmark = pytest.mark.L0


def tiny(layers: int = 3) -> PatchGan:
    model = PatchGan(Discriminator(width=8, layers=layers))
    for name, parameter in model.named_parameters():
        initialise_discriminator(name, parameter, seed=3)
    return model


def noise(count: int, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_default_is_the_published_one_and_judges_70_pixel_patches() -> None:
    """2.8M parameters, as pix2pix's for three channels: its batch norms have as many scales and shifts."""
    model = PatchGan(Discriminator())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633
    with torch.device("meta"):
        logits = PatchGan(Discriminator())(torch.empty(2, 3, 256, 256))
    assert logits.shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "reach"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_when_norms_are_left_aside(layers: int, reach: int) -> None:
    model = tiny(layers)
    for norm in model.norms:
        norm.forward = lambda x: x
    images = noise(1, 128).requires_grad_()
    logits = model(images)
    middle = logits.shape[-1] // 2
    [grad] = torch.autograd.grad(logits[0, 0, middle, middle], images)
    seen = grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [reach, reach]


def test_a_pictures_logits_do_not_depend_on_its_neighbours() -> None:
    """So real and fake share a pass and 1 rank is 2; batch norm would fail here. Worst seen 2e-8."""
    model, images = tiny(), noise(5)
    together = model(images)
    alone = torch.cat([model(image) for image in images.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_it_holds_nothing_that_zero_cannot_partition_or_a_checkpoint_would_lose() -> None:
    model = PatchGan(Discriminator())
    assert all(parameter.dim() > 0 for parameter in model.parameters())
    assert list(model.buffers()) == []


def test_first_values_are_of_the_seed_and_the_name_alone() -> None:
    first, again, other = tiny().state_dict(), tiny().state_dict(), torch.empty(16, 8, 4, 4)
    assert all(first[name].equal(again[name]) for name in first)
    initialise_discriminator("convs.0.weight", other, seed=4)
    assert not other.equal(first["convs.0.weight"])
    assert not first["convs.1.weight"].flatten()[:100].equal(first["convs.0.weight"].flatten()[:100])
    assert first["convs.2.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert {first[name].unique().item() for name in ("norms.0.weight", "norms.2.weight")} == {1.0}
    assert {first[name].unique().item() for name in ("first.bias", "norms.0.bias", "last.bias")} == {0.0}
