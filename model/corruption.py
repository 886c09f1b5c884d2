"""What rec is made to cope with: patches that the encoder does not see, chance in its latents (l-DeTok, 2507.15856).

    objectives.rec.mask    a step hides a share m of the patches of every rec image, at random; the encoder sees the
                           others, the decoder fills in a learned token
    model.latent           a Gaussian one is drawn from: z = mean + std * e
    objectives.rec.noise   interpolative (1 - t) z + t e, or additive z + t e, t of each image, e ~ N(0, scale^2)

A step's random numbers come into the forward as tensors, made on the host by engine/corruption.py.

How much is hidden is one of eight shares, 0, 1/8 ... 7/8, for every image of a step: a compiled block is one graph for
each length of the packed sequence, and m as it is drawn would give as many lengths as an image has patches. An m
between two shares becomes either, by chance and so that its mean stays:

    hidden_shares((-0.1, 0.7), num_patches=256)
        {0: 0.203, 32: 0.156, 64: 0.156, 96: 0.156, 128: 0.156, 160: 0.144, 192: 0.028}

where m of max(0, U(-0.1, 0.7)) is 0 with 0.125; the mean is 0.306 for both. Seven lengths, two graphs of a block each.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from configs import Config
from configs.learning import Noise
from configs.section import MaskRange
from model.latent import Gaussian

STEPS = 8  # shares of a grid that can be hidden; more would be more graphs (engine/assemble.py has a limit)


class Corruption(NamedTuple):
    """One step's draws for R rec images with V visible patches each; None where nothing is drawn."""

    visible_idx_RV: Tensor | None = None  # int64, ascending; with masking, also where nothing is hidden
    sample_RVL: Tensor | None = None  # float32 standard normals, to draw a Gaussian latent with
    level_R: Tensor | None = None  # t, float32 in [0, 1)
    noise_RVL: Tensor | None = None  # float32 standard normals, of the noise


def corrupted(latent: Tensor | Gaussian, corruption: Corruption, noise: Noise) -> Tensor:
    """(R, V, L): what the decoder is given. Computed in float32, in the latent's dtype."""
    if isinstance(latent, Gaussian):
        latent = latent.mean if corruption.sample_RVL is None else latent.at(corruption.sample_RVL)
    if corruption.level_R is None or corruption.noise_RVL is None:
        return latent
    level_R11, e_RVL = corruption.level_R[:, None, None], noise.scale * corruption.noise_RVL
    kept = latent.float() * (1 - level_R11 if noise.kind == "interpolative" else 1)
    return (kept + level_R11 * e_RVL).to(latent.dtype)


def is_corrupted(config: Config) -> bool:
    """Whether a step draws anything for rec."""
    rec = config.objectives.rec
    return rec.weight > 0 and (rec.mask is not None or rec.noise.kind != "none" or config.model.latent == "gaussian")


def num_patches(config: Config) -> int:
    """Patches of a rec image."""
    return int((config.views.image_size // config.model.patch_size) ** 2)


def hidden_count(share: float, num_patches: int) -> int:
    """Patches that are hidden at `share` STEPS-ths, halves up."""
    return int(share * num_patches / STEPS + 0.5)


def hidden_shares(mask: MaskRange | None, num_patches: int) -> dict[int, float]:
    """Hidden patches of an image -> how probable it is that a step hides so many; in ascending order."""
    if mask is None:
        return {0: 1.0}
    found: dict[int, float] = {}
    for step, probability in enumerate(_probabilities(mask)):
        count = hidden_count(step, num_patches)
        if probability > 0:
            found[count] = found.get(count, 0) + probability
    return found


def _probabilities(mask: MaskRange) -> list[float]:
    """Of 0, 1 ... STEPS - 1 eighths; what would be all of an image counts for the last."""
    low, high = (max(0.0, bound) * STEPS for bound in mask)
    below = max(0.0, -mask[0]) / (mask[1] - mask[0]) if mask[0] < 0 else 0.0
    found = [_share_of_tent(low - step, high - step) * (1 - below) for step in range(STEPS + 1)]
    found[0] += below
    return [*found[: STEPS - 1], found[STEPS - 1] + found[STEPS]]


def _share_of_tent(low: float, high: float) -> float:
    """Mean of max(0, 1 - |x|) over [low, high]."""
    if high - low < 1e-9:
        return max(0.0, 1 - abs(low))
    return (_under_tent(high) - _under_tent(low)) / (high - low)


def _under_tent(x: float) -> float:
    """Integral of max(0, 1 - |x|) from -1."""
    x = min(1.0, max(-1.0, x))
    return (1 + x) ** 2 / 2 if x < 0 else 1 - (1 - x) ** 2 / 2
