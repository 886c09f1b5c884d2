"""SSIM and the Fréchet distance through `torchmetrics`: its one door.

    ssim(target, recon)                                     # (B,), 1 for equal pictures
    fid = Fid(open_network("inception.pth"), device)
    fid.add(target, recon); fid.result()                    # under fid.name, which says whose features these are

The Fréchet distance depends on the network whose features it compares and on the number of images: figures of two
networks have nothing to do with each other, and few images give a larger distance than many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from configs import UserError
from engine import world
from evaluation.feature_network import FeatureNetwork

WINDOW = 11  # pixels


class Fid:
    """Fréchet distance between Gaussians fitted to the features of two sets of images (arXiv 1706.08500), float64."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self.name = network.name
        self._metric = FrechetInceptionDistance(feature=network, normalize=True, reset_real_features=False).to(device)

    def add(self, real: Tensor, fake: Tensor) -> None:
        """(B, 3, H, W) in [0, 1] each, seen as 8-bit pictures."""
        self.add_real(real)
        self.add_fake(fake)

    def add_real(self, images: Tensor) -> None:
        """(B, 3, H, W) in [0, 1], of the set that the other is compared with."""
        self._metric.update(quantised(images), real=True)

    def add_fake(self, images: Tensor) -> None:
        """(B, 3, H, W) in [0, 1], of the set that is judged."""
        self._metric.update(quantised(images), real=False)

    def forget_fake(self) -> None:
        """Makes room for another set to be judged by the same real one."""
        self._metric.reset()

    def result(self) -> float:
        """Over the images of all ranks: a collective. NaN where features are no numbers, on which some builds of LAPACK
        end the process. Raises UserError below two images."""
        if not all(world.gather_objects(all(bool(sums.isfinite().all()) for sums in self._sums()))):
            return math.nan
        try:
            return float(self._metric.compute())
        except RuntimeError as error:
            if "More than one sample" not in str(error):
                raise
            raise UserError(
                "FID compares the spread of features and needs two images at least; raise --limit or --num-samples"
            ) from None

    def _sums(self) -> Iterator[Tensor]:
        """Of this rank's features and of their products."""
        for kind in ("real", "fake"):
            yield getattr(self._metric, f"{kind}_features_sum")
            yield getattr(self._metric, f"{kind}_features_cov_sum")


def ssim(target: Tensor, recon: Tensor) -> Tensor:
    """(B, 3, H, W) twice, in [0, 1] -> (B,): the mean over channels and over the windows that lie in the picture.

    Windows are 11 x 11 Gaussians of deviation 1.5 (Wang et al. 2004; scikit-image gives the same). torchmetrics' own
    mean counts windows over mirrored borders too. Sides of 11 pixels or more.
    """
    _, map_BCHW = structural_similarity_index_measure(
        recon, target, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return map_BCHW[:, :, inside, inside].mean(dim=(1, 2, 3))


def quantised(images: Tensor) -> Tensor:
    """[0, 1] floats as an 8-bit file would give them back."""
    return (images * 255).round() / 255
