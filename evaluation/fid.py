"""Fréchet distance (FID) and SSIM through `torchmetrics`, and the networks of FID and LPIPS, loaded from files.

    network = open_network("pt_inception-2015-12-05-6726825d.pth")    # .name: "inception-2015-12-05"
    network = open_network("demo_features.safetensors")               # .name: "corpus:ab12cd, 64-d, 96 % acc"
    network = open_perceptual("lpips_vgg.safetensors", "--lpips")     # .name: "vgg16:454617"
    fid = Fid(network, device)
    fid.add(target, recon); fid.result()                    # a metric that carries fid.name
    ssim(target, recon)                                     # (B,), 1 for equal images

FID depends on the network and on the number of images: FIDs measured with different networks are not comparable, and
few images give a larger distance than many. A network's name identifies it in every result: it holds the file's hash,
unless it is the published Inception itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from configs import UserError
from engine import distributed
from evaluation.features import read_corpus_network
from evaluation.inception import PUBLISHED_SHA256, read_inception
from model.losses.perceptual import LpipsDistance


class FeatureNetwork(nn.Module):
    """Frozen network of FID with a name for results: (B, 3, H, W) float in [0, 1] -> (B, num_features) float32."""

    def __init__(self, network: nn.Module, name: str, num_features: int) -> None:
        super().__init__()
        self.network, self.name, self.num_features = network.requires_grad_(False).eval(), name, num_features

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


class PerceptualNetwork(nn.Module):
    """LPIPS network with a name for results: (recon, target), (B, 3, H, W) in [-1, 1] each, -> (B,)."""

    def __init__(self, network: LpipsDistance, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        distance_B: Tensor = self.network(recon, target)
        return distance_B


def open_perceptual(path: str | Path, key: str) -> PerceptualNetwork:
    """Load LPIPS weights from a converted file (model/losses/perceptual.py).

    Raises UserError, in which `key` names the setting, if it cannot be read.
    """
    network = LpipsDistance.load(path, key)
    return PerceptualNetwork(network, f"vgg16:{_digest(Path(path))[:6]}")


def open_network(path: str | Path) -> FeatureNetwork:
    """Load a feature network: .safetensors is one of `evaluation.features`, any other file Inception's state dict.

    Raises UserError for a file that is missing, truncated or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"--fid {path} does not exist: FID needs a feature network; give the weights of Inception "
            "(pt_inception-2015-12-05-6726825d.pth), or train one with `python -m evaluation.features`"
        )
    digest = _digest(path)
    if path.suffix == ".safetensors":
        network, accuracy = read_corpus_network(path)
        width = network.num_features
        return FeatureNetwork(network, f"corpus:{digest[:6]}, {width}-d, {100 * accuracy:.0f} % acc", width)
    inception = read_inception(path)
    known = digest.startswith(PUBLISHED_SHA256)
    name = "inception-2015-12-05" if known else f"inception:{digest[:6]}, not the published file"
    return FeatureNetwork(inception, name, inception.num_features)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


SSIM_WINDOW = 11  # pixels


class Fid:
    """Fréchet distance of Gaussians fitted to the features of two image sets (arXiv 1706.08500), in float64."""

    def __init__(self, network: FeatureNetwork, device: torch.device) -> None:
        self.name = network.name
        self._metric = FrechetInceptionDistance(feature=network, normalize=True, reset_real_features=False).to(device)

    def add(self, real: Tensor, fake: Tensor) -> None:
        """Add images to both sets: (B, 3, H, W) in [0, 1] each, quantised to 8 bits."""
        self.add_real(real)
        self.add_fake(fake)

    def add_real(self, images: Tensor) -> None:
        """Add images to the reference set: (B, 3, H, W) in [0, 1]."""
        self._metric.update(quantise(images), real=True)

    def add_fake(self, images: Tensor) -> None:
        """Add images to the evaluated set: (B, 3, H, W) in [0, 1]."""
        self._metric.update(quantise(images), real=False)

    def reset_fake(self) -> None:
        """Empty the evaluated set and keep the reference set."""
        self._metric.reset()

    def result(self) -> float:
        """Return the distance over the images of all ranks. A collective.

        NaN if features are not finite, on which some builds of LAPACK end the process. Raises UserError for fewer than
        two images.
        """
        if not all(distributed.gather_objects(all(bool(sums.isfinite().all()) for sums in self._sums()))):
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
        """Yield this rank's sums of features and of their products."""
        for kind in ("real", "fake"):
            yield getattr(self._metric, f"{kind}_features_sum")
            yield getattr(self._metric, f"{kind}_features_cov_sum")


def ssim(target: Tensor, recon: Tensor) -> Tensor:
    """Structural similarity of (B, 3, H, W) images in [0, 1]: (B,), the mean over channels and windows.

    Windows are 11 x 11 Gaussians of deviation 1.5 that lie inside the image (Wang et al. 2004; scikit-image gives the
    same); torchmetrics' own mean counts windows over mirrored borders too. Sides must have 11 pixels or more.
    """
    _, map_BCHW = structural_similarity_index_measure(
        recon, target, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))
    return map_BCHW[:, :, inside, inside].mean(dim=(1, 2, 3))


def quantise(images: Tensor) -> Tensor:
    """Round floats in [0, 1] to what an 8-bit image file would give back."""
    return (images * 255).round() / 255
