"""The latent between encoder and decoder: a point or a Gaussian, and the noise and masks that rec trains it with.

A Gaussian latent (Kingma and Welling, arXiv 1312.6114; the KL autoencoder of latent diffusion, arXiv 2112.10752) is two
halves of one tensor: mean, then log-variance, 2L channels where a deterministic latent has L.

    latent = DiagonalGaussian.of(moments_RPM, dim=-1)   # (R, P, 2L) -> mean (R, P, L), log_variance (R, P, L) float32
    latent.sample(normals_RPL)                  # mean + std * e, in training
    latent.kl()                                 # (R,) KL(N(mean, std^2) || N(0, 1)) in nats, summed over the image
    latent.mean                                 # its mode, everywhere else

A convolution has its channels in axis 1: DiagonalGaussian.of(moments, dim=1).

Noise and masks for rec (l-DeTok, arXiv 2507.15856):

    objectives.rec.mask    hides a random fraction m of the patches of every rec image; the encoder sees the others, the
                           decoder gets a learned token for the hidden ones
    model.latent           a Gaussian one is sampled: z = mean + std * e
    objectives.rec.noise   interpolative (1 - t) z + t e, or additive z + t e, t of each image, e ~ N(0, scale^2)

All random numbers are inputs, drawn on the host by engine/random_draws.py; nothing here draws any.

The hidden fraction is one of eight, 0, 1/8 ... 7/8, for all images of a step: a compiled block has one graph for each
length of the packed sequence, and m itself would give as many lengths as an image has patches. An m between two
fractions becomes one of both, at random and so that its mean stays:

    hidden_patch_probabilities((-0.1, 0.7), num_patches=256)
        {0: 0.203, 32: 0.156, 64: 0.156, 96: 0.156, 128: 0.156, 160: 0.144, 192: 0.028}

where max(0, U(-0.1, 0.7)) is 0 with probability 0.125; the mean is 0.306 for both. Seven lengths, two graphs of a block
each.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from configs import Config
from configs.model import Model
from configs.schema import LatentNoise
from configs.section import MaskRange

# exp of both ends is still a float32; what latent diffusion's code clamps to.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


class DiagonalGaussian(NamedTuple):
    """Gaussian with diagonal covariance. The log-variance is float32 and bounded; both have the latent's shape."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor, dim: int) -> DiagonalGaussian:
        """Split 2L channels in axis `dim` into mean and log-variance."""
        mean, log_variance = moments.chunk(2, dim)
        return cls(mean, log_variance.float().clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, float32."""
        return (0.5 * self.log_variance).exp()

    def sample(self, normals: Tensor) -> Tensor:
        """Sample mean + std * e from standard normals e of the same shape; in float32, rounded to the mean's dtype."""
        return (self.mean.float() + self.std * normals).to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL to the standard normal, (R,) float32: 1/2 sum (mean^2 + var - 1 - log var) over all axes but the first."""
        terms = self.mean.float().square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(dim=1)


def mode(moments: Tensor, model: Model, dim: int = -1) -> Tensor:
    """The most probable latent: (..., L or 2L, ...) -> (..., L, ...), channels in axis `dim`."""
    return moments.narrow(dim, 0, model.latent_channels)


def build_bottleneck(model: Model) -> nn.Linear:
    """Build the bottleneck: normed patch tokens -> latents, or their moments; a linear map without bias [C]."""
    return nn.Linear(feature_width(model), moment_channels(model), bias=False)


def moment_channels(model: Model) -> int:
    """Output channels of the bottleneck: L, or 2L of a Gaussian latent."""
    return model.latent_channels * (2 if model.latent == "gaussian" else 1)


def feature_width(model: Model) -> int:
    """Input channels of the bottleneck: the trunk's width; of a convolutional encoder as many as the bottleneck's
    output."""
    return model.trunk.width if model.conv is None else moment_channels(model)


def head_width(model: Model) -> int:
    """Input width of the heads: of trunk features, or of latents with bottleneck_ae_only off."""
    return feature_width(model) if model.bottleneck_ae_only else model.latent_channels


NUM_HIDDEN_FRACTIONS = (
    8  # fractions of a grid that can be hidden; more would be more graphs (engine/build.py has a limit)
)


class RecNoise(NamedTuple):
    """One step's noise and masks for R rec images with V visible patches each; None where there is none."""

    visible_idx_RV: Tensor | None = None  # int64, ascending; with masking, even in a step that hides nothing
    sample_RVL: Tensor | None = None  # float32 standard normals, to sample a Gaussian latent
    level_R: Tensor | None = None  # t, float32 in [0, 1)
    noise_RVL: Tensor | None = None  # float32 standard normals: the noise e before scaling


def add_rec_noise(latent: Tensor | DiagonalGaussian, rec_noise: RecNoise, noise: LatentNoise) -> Tensor:
    """Add the step's noise to the latent: the decoder's input (R, V, L). Computed in float32, in the latent's dtype."""
    if isinstance(latent, DiagonalGaussian):
        latent = latent.mean if rec_noise.sample_RVL is None else latent.sample(rec_noise.sample_RVL)
    if rec_noise.level_R is None or rec_noise.noise_RVL is None:
        return latent
    level_R11, e_RVL = rec_noise.level_R[:, None, None], noise.scale * rec_noise.noise_RVL
    kept = latent.float() * (1 - level_R11 if noise.kind == "interpolative" else 1)
    return (kept + level_R11 * e_RVL).to(latent.dtype)


def has_rec_noise(config: Config) -> bool:
    """Whether a step draws random numbers for rec."""
    rec = config.objectives.rec
    return rec.weight > 0 and (rec.mask is not None or rec.noise.kind != "none" or config.model.latent == "gaussian")


def num_patches(config: Config) -> int:
    """Number of patches of a rec image."""
    return int((config.views.image_size // config.model.patch_size) ** 2)


def hidden_patch_probabilities(mask: MaskRange | None, num_patches: int) -> dict[int, float]:
    """Number of hidden patches of an image -> probability that a step hides so many; in ascending order."""
    if mask is None:
        return {0: 1.0}
    probabilities: dict[int, float] = {}
    for step, probability in enumerate(_probabilities(mask)):
        count = num_hidden_patches(step, num_patches)
        if probability > 0:
            probabilities[count] = probabilities.get(count, 0) + probability
    return probabilities


def num_hidden_patches(eighths: float, num_patches: int) -> int:
    """Number of hidden patches at the fraction `eighths` / 8, halves rounded up."""
    return int(eighths * num_patches / NUM_HIDDEN_FRACTIONS + 0.5)


def _probabilities(mask: MaskRange) -> list[float]:
    """Probabilities of 0, 1 ... 7 eighths; hiding the whole image counts as the last."""
    low, high = (max(0.0, bound) * NUM_HIDDEN_FRACTIONS for bound in mask)
    below = max(0.0, -mask[0]) / (mask[1] - mask[0]) if mask[0] < 0 else 0.0
    found = [_mean_of_tent(low - step, high - step) * (1 - below) for step in range(NUM_HIDDEN_FRACTIONS + 1)]
    found[0] += below
    return [*found[: NUM_HIDDEN_FRACTIONS - 1], found[NUM_HIDDEN_FRACTIONS - 1] + found[NUM_HIDDEN_FRACTIONS]]


def _mean_of_tent(low: float, high: float) -> float:
    """Mean of max(0, 1 - |x|) over [low, high]."""
    if high - low < 1e-9:
        return max(0.0, 1 - abs(low))
    return (_under_tent(high) - _under_tent(low)) / (high - low)


def _under_tent(x: float) -> float:
    """Integral of max(0, 1 - |x|) from -1."""
    x = min(1.0, max(-1.0, x))
    return (1 + x) ** 2 / 2 if x < 0 else 1 - (1 - x) ** 2 / 2
