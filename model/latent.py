"""What stands between encoder and decoder: a point, or a Gaussian to draw one from (`model.latent`).

A Gaussian latent (Kingma and Welling, arXiv 1312.6114; the KL autoencoder of latent diffusion, arXiv 2112.10752) is two
halves of one tensor: mean above log-variance, 2L channels where a deterministic latent has L.

    latent = Gaussian.of(moments_RPM, dim=-1)   # (R, P, 2L) -> mean (R, P, L), log_variance (R, P, L) float32
    latent.at(normals_RPL)                      # mean + std * e, training
    latent.kl()                                 # (R,) KL(N(mean, std^2) || N(0, 1)) in nats, summed over the image
    latent.mean                                 # its mode, everywhere else

A convolution has its channels in axis 1: Gaussian.of(moments, dim=1). Random numbers come in as tensors; nothing here
draws any.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from configs.architecture import Model

# exp of both ends is still a float32; what latent diffusion's code clamps to.
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -30.0, 20.0


class Gaussian(NamedTuple):
    """Independent in every number. The log-variance is float32 and bounded; both have the latent's shape."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor, dim: int) -> Gaussian:
        """From 2L channels in axis `dim`."""
        mean, log_variance = moments.chunk(2, dim)
        return cls(mean, log_variance.float().clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE))

    @property
    def std(self) -> Tensor:
        """float32."""
        return (0.5 * self.log_variance).exp()

    def at(self, normals: Tensor) -> Tensor:
        """mean + std * e for standard normals e of the same shape; in float32, rounded to the mean's dtype."""
        return (self.mean.float() + self.std * normals).to(self.mean.dtype)

    def kl(self) -> Tensor:
        """(R,) float32:  1/2 sum (mean^2 + var - 1 - log var), over all axes but the first."""
        terms = self.mean.float().square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(dim=1)


def moment_channels(model: Model) -> int:
    """Channels that an encoder ends in: L, or 2L."""
    return model.latent_channels * (2 if model.latent == "gaussian" else 1)


def feature_width(model: Model) -> int:
    """Channels that the bottleneck reads: of the trunk, or of a convolutional encoder, which ends in as many as the
    bottleneck gives."""
    return model.trunk.width if model.conv is None else moment_channels(model)


def mode(moments: Tensor, model: Model, dim: int = -1) -> Tensor:
    """The latent without chance: (..., L or 2L, ...) -> (..., L, ...), channels in axis `dim`."""
    return moments.narrow(dim, 0, model.latent_channels)


def bottleneck(model: Model) -> nn.Linear:
    """Trunk features -> latents, or their moments, of normed patch tokens, without bias [C]."""
    return nn.Linear(feature_width(model), moment_channels(model), bias=False)


def head_width(model: Model) -> int:
    """What the heads read: trunk features, or latents with bottleneck_ae_only off."""
    return feature_width(model) if model.bottleneck_ae_only else model.latent_channels
