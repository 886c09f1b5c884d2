"""python -m evaluation.features --data DIR --out FILE: train a feature network for FID on a corpus's labels.

Trains a small convolutional classifier on DIR/train-*.tar, prints its accuracy on DIR/held_out-*.tar, and writes it
with that accuracy. About a minute on two cores for the demo's 6,000 images of 64 px. For corpora whose images are
nothing like ImageNet's, or where there are no Inception weights: a network that classifies the corpus knows what
matters in its images. Its FIDs compare tokenizers on that corpus only, and its name in the result says so.

    network = CorpusNetwork(num_classes=64, size=64)
    network(images).shape, network.logits(images).shape       # (B, 3, H, W) in [0, 1] -> (B, 64), (B, num_classes)

Recipe: AdamW, one-cycle learning rate, cross-entropy, crops shifted by up to a sixteenth of the side. The same corpus
and seed give the same network on the same CPU.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import UserError
from configs.command_line import CommandParser, apply_umask, output_file, seed
from configs.data import ImageTextData
from configs.run import System
from data.held_out import HeldOutImages, check_number_of_classes

WIDTHS = (16, 32, 64, 64)  # channels after each halving; the last is the width of the features
METADATA_KEY = "feature_network"


class CorpusNetwork(nn.Module):
    """Convolutional classifier: four stages that halve the resolution, global average pooling, a linear layer."""

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
        """Compute features: (B, 3, H, W) in [0, 1] -> (B, 64); images of another size are resized to `size` first."""
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        features: Tensor = self.layers(2 * images - 1).mean(dim=(2, 3))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Classify: (B, 3, H, W) in [0, 1] -> (B, num_classes)."""
        logits: Tensor = self.classify(self(images))
        return logits


def write_corpus_network(path: Path, network: CorpusNetwork, accuracy: float, corpus: str) -> None:
    """Write the network as safetensors; its metadata holds sizes, corpus and held-out accuracy."""
    description = {
        "num_classes": network.num_classes, "size": network.size, "held_out_accuracy": accuracy, "corpus": corpus,
    }  # fmt: skip
    save_file(network.state_dict(), path, metadata={METADATA_KEY: json.dumps(description)})
    apply_umask(path)


def read_corpus_network(path: str | Path) -> tuple[CorpusNetwork, float]:
    """Read a network and its held-out accuracy. Raises UserError for a damaged file or one of another kind."""
    try:
        with safe_open(path, "pt") as stored:
            description = json.loads((stored.metadata() or {})[METADATA_KEY])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        with torch.device("meta"):
            network = CorpusNetwork(description["num_classes"], description["size"])
        network.load_state_dict(state, assign=True)
        return network, float(description["held_out_accuracy"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"--fid {path} is no feature network ({reason}); write one with `python -m evaluation.features`"
        ) from None


EPOCHS, BATCH, LR, WEIGHT_DECAY = 14, 64, 4e-3, 0.02
MAX_TRAINING_BYTES = 16 << 30  # of training images, which are held in memory


def main(arguments: list[str]) -> int:
    """Run the command line of this module and return the exit code."""
    parser = CommandParser(prog="python -m evaluation.features", description="Train a feature network for FID.")
    parser.add_argument("--data", type=Path, required=True, help="a corpus: train-*.tar and held_out-*.tar with labels")
    parser.add_argument("--out", type=output_file, required=True, help="safetensors file to write")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the training images (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)
    given = parser.parse_args(arguments)
    try:
        accuracy = train_feature_network(given.data, given.out, given.size, given.epochs, given.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}: {accuracy:.1%} of the held-out images classified correctly")
    return 0


def train_feature_network(data: Path, out: Path, size: int, epochs: int, seed: int) -> float:
    """Train, test and write a network; return its held-out accuracy.

    Raises UserError for a corpus without labels or with a single class.
    """
    if size < 16 or epochs < 1:
        raise UserError(
            f"--size {size} --epochs {epochs}: the network halves images four times; give 16 pixels and 1 epoch or more"
        )
    _check_output_file(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = (load_labelled(f"{data}/{split}-*.tar", size) for split in ("train", "held_out"))
    num_classes = int(torch.cat([train[1], held_out[1]]).max()) + 1
    if num_classes < 2:
        raise UserError(f"{data} has one class: telling it apart teaches nothing; give a corpus with two or more")
    torch.manual_seed(seed)
    network = CorpusNetwork(num_classes, size).to(device)
    fit_classifier(network, *train, epochs, seed)
    accuracy = measure_accuracy(network, *held_out)
    write_corpus_network(out, network.to("cpu"), accuracy, data.resolve().name)  # no path: the file travels
    return accuracy


def _check_output_file(out: Path) -> None:
    """Raise UserError, before training, for a directory or a file name that --fid would not recognise."""
    if out.suffix != ".safetensors":
        raise UserError(
            f"--out {out}: --fid tells these networks by their ending; name it {out.with_suffix('.safetensors')}"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name a file in it")


def load_labelled(pattern: str, size: int) -> tuple[Tensor, Tensor]:
    """Load all labelled images: (N, 3, size, size) uint8, and labels (N,).

    Raises UserError if there are none, or too many for memory.
    """
    corpus = HeldOutImages([pattern], size, System(), ImageTextData.model_fields["max_pixels"].default, key="--data")
    if len(corpus) * 3 * size**2 > MAX_TRAINING_BYTES:
        raise UserError(
            f"--data: {len(corpus)} images of {size} px do not fit the {MAX_TRAINING_BYTES >> 30} GiB of memory "
            "that training may hold; lower --size, or use Inception's weights"
        )
    batches = [(batch.images.cpu(), batch.labels) for batch in corpus.batches(256)]
    corpus.close()
    corpus.classes.require_known()
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    check_number_of_classes(labels)
    if not (labels >= 0).any():
        raise UserError(f"--data: no sample of {pattern} has a label, which is what the network learns from")
    return images[labels >= 0], labels[labels >= 0]


def fit_classifier(network: CorpusNetwork, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train the network in place on uint8 images and their labels."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    for _ in track(range(epochs), "learning features", disable=not sys.stdout.isatty()):
        for idx in torch.randperm(len(images), generator=generator).split(BATCH):
            pixels = _shift(images[idx], generator).to(device) / 255
            loss = F.cross_entropy(network.logits(pixels), labels[idx].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def measure_accuracy(network: CorpusNetwork, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose label has the largest logit."""
    device = next(network.parameters()).device
    num_right = 0
    for images_B, labels_B in zip(images.split(256), labels.split(256), strict=True):
        predicted_B = network.logits(images_B.to(device).float() / 255).argmax(dim=1).cpu()
        num_right += int((predicted_B == labels_B).sum())
    return num_right / len(images)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift all images of a batch alike, by up to a sixteenth of their side, repeating edges."""
    max_shift = images.shape[-1] // 16
    down, across = torch.randint(0, 2 * max_shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(images.float(), (max_shift,) * 4, mode="replicate")
    return padded[:, :, down : down + images.shape[2], across : across + images.shape[3]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
