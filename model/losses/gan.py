"""Stage 2: reconstruction and adversarial losses of the decoder, and the PatchGAN discriminator with its loss.

    losses = decoder_losses(outputs, config.objectives, Solo(), perceptual, discriminator)
    outputs.recon.backward(losses.gradient)
    losses.named                            # {"l1": 0.07, "rec": 0.07, "gan": 0.4, "gan_weight": 0.2, "total": 0.15}

The total is differentiated down to the pixels here and no further: the adaptive weight needs the two gradients
separately, and from the pixels on one backward through the decoder serves their weighted sum. The discriminator's own
parameters get no gradient, since none is requested.

    disc = discriminator_loss(real_logits, fake_logits, "hinge")       # 1 where all logits are 0
    gan = generator_loss(fake_logits, "hinge")                         # added to the decoder's pixel losses

The weight of `gan` is the ratio of model/losses/alignment.py, summed over ranks before norms are taken. A norm per
rank, as in published code, grows with fewer images a rank, because noise does not cancel in it, and a mean of such
norms is the norm of no gradient; the all-reduce is twice the size of the decoder's last layer, 6 MB a step for VTP-L.

    network = PatchGan(Discriminator(width=64, layers=3))
    network(images_BCHW)          # (B, 3, 256, 256) in [-1, 1] -> (B, 1, 30, 30) logits, each of a 70 x 70 patch
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from configs.decoder_gan import DecoderObjectives, Discriminator, Gan, PixelLosses
from model.decoder import DecoderStageOutputs
from model.initialise import parameter_rng
from model.losses.alignment import adaptive_weight
from model.losses.comm import Comm
from model.losses.perceptual import LpipsDistance
from model.losses.pixels import l1_loss, to_signed
from model.trunk import unfold

AdversarialLoss = Literal["hinge", "vanilla"]
DiscriminatorFn = Callable[[Tensor], Tensor]
GROUP_CHANNELS = 16  # channels normed together: 32 groups of 512 channels, as is usual
SLOPE = 0.2  # slope of the leaky ReLU below zero
NORM_EPS = 1e-6


@dataclass(frozen=True)
class DecoderLosses:
    """The decoder's losses of one step on this rank."""

    gradient: Tensor  # (R, 3, H, W) d total / d recon
    named: dict[str, Tensor]  # detached scalars: terms unweighted, rec and total as summed


def decoder_losses(
    outputs: DecoderStageOutputs,
    objectives: DecoderObjectives,
    comm: Comm,
    perceptual: LpipsDistance | None = None,
    discriminator: DiscriminatorFn | None = None,
) -> DecoderLosses:
    """rec + gan.weight * ratio * gan. Without a `discriminator` the adversarial term is left out and reported as 0.

    `discriminator` maps images in [-1, 1] to logits; `perceptual` is needed with rec.perceptual > 0. A collective with
    gan.balance=adaptive and a discriminator.
    """
    recon = outputs.recon.detach().requires_grad_()
    terms = _pixel_terms(recon, outputs.target, objectives.rec, perceptual)
    rec = torch.stack([weight * value for weight, value in terms.values()]).sum()
    [gradient] = torch.autograd.grad(rec, recon)
    gan = weight = rec.new_zeros(())
    if discriminator is not None:
        gan = generator_loss(discriminator(to_signed(recon)), objectives.gan.kind)
        [of_gan] = torch.autograd.grad(gan, recon)
        weight = _adversarial_weight(gradient, of_gan, outputs, objectives.gan, comm)
        gradient = gradient + weight * of_gan
    named = {name: value for name, (_, value) in terms.items()} | {"rec": rec, "gan": gan, "gan_weight": weight}
    named["total"] = rec + weight * gan
    return DecoderLosses(gradient, {name: value.detach() for name, value in named.items()})


def _pixel_terms(
    recon: Tensor, target: Tensor, config: PixelLosses, perceptual: LpipsDistance | None
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (weight, value) of the pixel losses with a weight."""
    terms = {}
    if config.l1:
        terms["l1"] = (config.l1, l1_loss(recon, target))
    if config.perceptual:
        assert perceptual is not None, "rec.perceptual has a weight but no LPIPS network was given"
        terms["lpips"] = (config.perceptual, perceptual(to_signed(recon), to_signed(target)).mean())
    return terms


def _adversarial_weight(
    of_rec: Tensor, of_gan: Tensor, outputs: DecoderStageOutputs, config: Gan, comm: Comm
) -> Tensor:
    """Weight of the adversarial gradient; the output of the decoder's last layer is the image, patch by patch."""
    if config.balance == "fixed":
        return of_rec.new_full((), config.weight)  # filled on the device: a new_tensor would be copied there
    patch = outputs.recon.shape[-1] // outputs.latent.shape[-1]
    rec_TF, gan_TF = (unfold(grad, patch).flatten(0, 1) for grad in (of_rec, of_gan))
    return config.weight * adaptive_weight(rec_TF, gan_TF, outputs.tokens_TD, comm, config.limit)


def discriminator_loss(
    real: Float[Tensor, "R 1 h w"], fake: Float[Tensor, "R 1 h w"], kind: AdversarialLoss
) -> Float[Tensor, ""]:
    """Discriminator loss of the logits of real images and of reconstructions.

        hinge:    L = 1/2 mean max(0, 1 - real) + 1/2 mean max(0, 1 + fake)
        vanilla:  L = 1/2 mean -log sigmoid(real) + 1/2 mean -log sigmoid(-fake)

    for each patch of a real image: push the logit above 1 (hinge), or up without bound (vanilla)
    for each patch of a reconstruction: push it below -1, or down without bound
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Float[Tensor, "R 1 h w"], kind: AdversarialLoss) -> Float[Tensor, ""]:
    """Adversarial loss of the decoder, from the logits of reconstructions.

    hinge:    L = mean -fake
    vanilla:  L = mean -log sigmoid(fake)      the non-saturating form (arXiv 1406.2661, section 3)
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


class PatchGan(nn.Module):
    """PatchGAN: one logit for every overlapping patch of an image, high where the patch looks real (arXiv 1611.07004).

    4x4 convolutions, of stride 2 except for the last two, and leaky ReLU. Channels double with every layer, up to 8
    times the first layer's. Norms are over groups of 16 channels of one image. Batch norm, as published, would couple
    an image's logits with the rest of the batch: 1 rank and 2 would train different discriminators, real and fake
    images could not share a pass, and running means are buffers, which ZeRO neither partitions nor reduces and no
    checkpoint piece holds.

    No module is a ZeRO-3 leaf: a step runs this network twice, for the decoder's term and for its own, and a leaf may
    run once.
    """

    def __init__(self, config: Discriminator) -> None:
        super().__init__()
        channels = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        strides = [2] * (config.layers - 1) + [1]
        self.first = nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, kernel_size=4, stride=stride, padding=1, bias=False)  # the norm has a shift
            for (fan_in, fan_out), stride in zip(itertools.pairwise(channels), strides, strict=True)
        )
        self.norms = nn.ModuleList(ChannelGroupNorm(width) for width in channels[1:])
        self.last = nn.Conv2d(channels[-1], 1, kernel_size=4, stride=1, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) from -1, black, to 1, white -> (B, 1, h, w) float32 logits, h = H / 2^layers - 2."""
        x = F.leaky_relu(self.first(images.to(self.first.weight.dtype)), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        logits: Tensor = self.last(x).float()
        return logits


class ChannelGroupNorm(nn.Module):
    """Zero mean and unit variance over 16 channels of one image, then a scale and a shift per channel; float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.groups = channels // GROUP_CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape and dtype."""
        return F.group_norm(x.float(), self.groups, self.weight.float(), self.bias.float(), NORM_EPS).to(x.dtype)


@torch.no_grad()
def initialise_discriminator(name: str, tensor: Tensor, seed: int) -> None:
    """Fill `tensor`, the whole parameter `name` of a PatchGan, from the seed and the name alone.

    Convolutions normal 0.02 (pix2pix), biases 0, norms 1.
    """
    if tensor.dim() == 1:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    tensor.copy_(drawn.normal_(0.0, 0.02, generator=parameter_rng(seed, f"discriminator.{name}")))
