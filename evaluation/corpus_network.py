"""A small convolutional classifier of a corpus's own labels: its last means serve as features for FID.

Where there are no Inception weights, or where pictures are nothing like ImageNet's, a network that tells the corpus's
classes apart knows what matters in its pictures. Its figures compare tokenizers on that corpus and nothing else, and
the network's name in the result says so.

    network = CorpusNetwork(num_classes=64, size=64)
    network(images).shape, network.logits(images).shape       # (B, 3, H, W) in [0, 1] -> (B, 64), (B, num_classes)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import UserError
from configs.permissions import follow_umask

WIDTHS = (16, 32, 64, 64)  # channels after each halving; the last is the width of the features
KEY = "feature_network"


class CorpusNetwork(nn.Module):
    """Four halvings by convolution, batch norm and ReLU; means over the picture; a linear classifier."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.num_classes, self.size, self.num_features = num_classes, size, WIDTHS[-1]
        layers: list[nn.Module] = []
        for width_in, width_out in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(width_in, width_out, 3, 2, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
            layers += [nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 64); pictures of another size are resized to the training size first."""
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        features: Tensor = self.layers(2 * images - 1).mean(dim=(2, 3))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, num_classes)."""
        logits: Tensor = self.classify(self(images))
        return logits


def write_corpus_network(path: Path, network: CorpusNetwork, accuracy: float, corpus: str) -> None:
    """As safetensors, with what it is and how well it classifies held-out pictures written inside."""
    described = {
        "num_classes": network.num_classes, "size": network.size, "held_out_accuracy": accuracy, "corpus": corpus,
    }  # fmt: skip
    save_file(network.state_dict(), path, metadata={KEY: json.dumps(described)})
    follow_umask(path)


def read_corpus_network(path: str | Path) -> tuple[CorpusNetwork, float]:
    """The network and its held-out accuracy. Raises UserError for a damaged file or another one."""
    try:
        with safe_open(path, "pt") as stored:
            described = json.loads((stored.metadata() or {})[KEY])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        with torch.device("meta"):
            network = CorpusNetwork(described["num_classes"], described["size"])
        network.load_state_dict(state, assign=True)
        return network, float(described["held_out_accuracy"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"--fid {path} is no feature network ({reason}); write one with `python -m evaluation.features`"
        ) from None
