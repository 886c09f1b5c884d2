"""Networks whose features the Fréchet distance and LPIPS compare, opened from a file that the user gives.

    network = open_network("pt_inception-2015-12-05-6726825d.pth")    # .name: "inception-2015-12-05"
    network = open_network("demo_features.safetensors")               # .name: "corpus:ab12cd, 64-d, 96 % acc"
    network = open_perceptual("lpips_vgg.safetensors", "--lpips")     # .name: "vgg16:454617"

A name holds what tells two networks apart: the file's hash, unless it is the published Inception itself. It stands
in every result.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

from configs import UserError
from evaluation.corpus_network import read_corpus_network
from evaluation.inception import PUBLISHED_SHA256, read_inception
from model.losses.perceptual import LpipsDistance


class FeatureNetwork(nn.Module):
    """(B, 3, H, W) float in [0, 1] -> (B, num_features) float32, frozen, with a name for results."""

    def __init__(self, network: nn.Module, name: str, num_features: int) -> None:
        super().__init__()
        self.network, self.name, self.num_features = network.requires_grad_(False).eval(), name, num_features

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


class PerceptualNetwork(nn.Module):
    """LPIPS of (recon, target), (B, 3, H, W) in [-1, 1] each, -> (B,), with a name for results."""

    def __init__(self, network: LpipsDistance, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        distance_B: Tensor = self.network(recon, target)
        return distance_B


def open_perceptual(path: str | Path, key: str) -> PerceptualNetwork:
    """Of a converted file (model/losses/perceptual.py).

    Raises UserError, in which `key` names the setting, where it cannot be read.
    """
    network = LpipsDistance.load(path, key)
    return PerceptualNetwork(network, f"vgg16:{_digest(Path(path))[:6]}")


def open_network(path: str | Path) -> FeatureNetwork:
    """By the file's ending: .safetensors is one of `evaluation.features`, all else a state dict of Inception's.

    Raises UserError for a missing, truncated or foreign file.
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
