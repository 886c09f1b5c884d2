"""Stage 2's total: pixel losses and, once the discriminator has learnt something, what it says of the reconstruction.

    found = decoder_losses(outputs, config.objectives, Solo(), perceptual, judge=discriminator)
    outputs.recon.backward(found.gradient)
    found.named                             # {"l1": 0.07, "rec": 0.07, "gan": 0.4, "gan_weight": 0.2, "total": 0.15}

The total is differentiated down to the pixels here and no further: the adaptive weight needs the two gradients apart
anyway, and from the pixels on one backward through the decoder serves their weighted sum. The discriminator's own
parameters get no gradient, since none is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.decoder_gan import DecoderObjectives, Gan, PixelLosses
from model.decoder_stage import StageOutputs
from model.objectives.adversarial import generator_loss
from model.objectives.balance import adaptive_weight
from model.objectives.comm import Comm
from model.objectives.perceptual import Perceptual
from model.objectives.pixels import l1_loss, to_signed
from model.trunk import unfold

Judge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecoderLosses:
    """What one step found on this rank."""

    gradient: Tensor  # (R, 3, H, W) d total / d recon
    named: dict[str, Tensor]  # detached scalars: terms unweighted, rec and total as summed


def decoder_losses(
    outputs: StageOutputs,
    objectives: DecoderObjectives,
    comm: Comm,
    perceptual: Perceptual | None = None,
    judge: Judge | None = None,
) -> DecoderLosses:
    """rec + gan.weight * ratio * gan. Without a `judge` the adversarial term is not there yet; it is reported as 0.

    `judge` maps pictures in [-1, 1] to logits; `perceptual` is needed with rec.perceptual > 0. A collective with
    gan.balance=adaptive and a judge.
    """
    recon = outputs.recon.detach().requires_grad_()
    terms = _pixel_terms(recon, outputs.target, objectives.rec, perceptual)
    rec = torch.stack([weight * value for weight, value in terms.values()]).sum()
    [gradient] = torch.autograd.grad(rec, recon)
    gan = weight = rec.new_zeros(())
    if judge is not None:
        gan = generator_loss(judge(to_signed(recon)), objectives.gan.kind)
        [of_gan] = torch.autograd.grad(gan, recon)
        weight = _weight(gradient, of_gan, outputs, objectives.gan, comm)
        gradient = gradient + weight * of_gan
    named = {name: value for name, (_, value) in terms.items()} | {"rec": rec, "gan": gan, "gan_weight": weight}
    named["total"] = rec + weight * gan
    return DecoderLosses(gradient, {name: value.detach() for name, value in named.items()})


def _pixel_terms(
    recon: Tensor, target: Tensor, config: PixelLosses, perceptual: Perceptual | None
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (weight, value), of the terms that have a weight."""
    terms = {}
    if config.l1:
        terms["l1"] = (config.l1, l1_loss(recon, target))
    if config.perceptual:
        assert perceptual is not None, "rec.perceptual has a weight but no LPIPS network was given"
        terms["lpips"] = (config.perceptual, perceptual(to_signed(recon), to_signed(target)).mean())
    return terms


def _weight(of_rec: Tensor, of_gan: Tensor, outputs: StageOutputs, config: Gan, comm: Comm) -> Tensor:
    """What the adversarial gradient is multiplied with; the last layer's output is the picture, patch by patch."""
    if config.balance == "fixed":
        return of_rec.new_full((), config.weight)  # filled on the device: a new_tensor would be copied there
    patch = outputs.recon.shape[-1] // outputs.latent.shape[-1]
    rec_TF, gan_TF = (unfold(grad, patch).flatten(0, 1) for grad in (of_rec, of_gan))
    return config.weight * adaptive_weight(rec_TF, gan_TF, outputs.tokens_TD, comm, config.limit)
