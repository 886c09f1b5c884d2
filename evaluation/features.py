"""python -m evaluation.features --data DIR --out FILE: a feature network for FID, from a corpus's labels.

Trains evaluation/corpus_network.py on DIR/train-*.tar, says how well it tells the classes of DIR/held_out-*.tar apart,
and writes it with that accuracy. About a minute on two cores for the demo's 6,000 pictures of 64 px.

Recipe: AdamW, one-cycle learning rate, cross-entropy, crops shifted by up to a sixteenth of the side. The same corpus
and seed give the same network on the same CPU.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from configs import UserError
from configs.command_line import CommandParser, output_file, seed
from configs.data import Data
from configs.system import System
from data.held_out import HeldOutImages, check_number_of_classes
from evaluation.corpus_network import CorpusNetwork, write_corpus_network

EPOCHS, BATCH, LR, WEIGHT_DECAY = 14, 64, 4e-3, 0.02
MOST_BYTES = 16 << 30  # of training pictures, which are held in memory


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = CommandParser(prog="python -m evaluation.features", description="Train a feature network for FID.")
    parser.add_argument("--data", type=Path, required=True, help="a corpus: train-*.tar and held_out-*.tar with labels")
    parser.add_argument("--out", type=output_file, required=True, help="safetensors file to write")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the training pictures (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0)
    given = parser.parse_args(arguments)
    try:
        accuracy = make(given.data, given.out, given.size, given.epochs, given.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}: {accuracy:.1%} of the held-out pictures classified rightly")
    return 0


def make(data: Path, out: Path, size: int, epochs: int, seed: int) -> float:
    """Trains, tests and writes; the held-out accuracy. Raises UserError for a corpus without labels or two classes."""
    if size < 16 or epochs < 1:
        raise UserError(
            f"--size {size} --epochs {epochs}: the network halves pictures four times; give 16 pixels or more"
        )
    _check_out(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = (labelled(f"{data}/{split}-*.tar", size) for split in ("train", "held_out"))
    num_classes = int(torch.cat([train[1], held_out[1]]).max()) + 1
    if num_classes < 2:
        raise UserError(f"{data} has one class: telling it apart teaches nothing; give a corpus with two or more")
    torch.manual_seed(seed)
    network = CorpusNetwork(num_classes, size).to(device)
    learn(network, *train, epochs, seed)
    accuracy = accuracy_of(network, *held_out)
    write_corpus_network(out, network.to("cpu"), accuracy, data.resolve().name)  # no path: the file travels
    return accuracy


def _check_out(out: Path) -> None:
    """Raises UserError, before anything is learnt, for a file that cannot be written or that --fid would not know."""
    if out.suffix != ".safetensors":
        raise UserError(
            f"--out {out}: --fid tells these networks by their ending; name it {out.with_suffix('.safetensors')}"
        )
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name a file in it")


def labelled(pattern: str, size: int) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) uint8 and (N,) of the labelled pictures. Raises UserError for none, or too many for memory."""
    pictures = HeldOutImages([pattern], size, System(), Data.model_fields["max_pixels"].default, key="--data")
    if len(pictures) * 3 * size**2 > MOST_BYTES:
        raise UserError(
            f"--data: {len(pictures)} pictures of {size} px do not fit the {MOST_BYTES >> 30} GiB of memory "
            "that training may hold; lower --size, or use Inception's weights"
        )
    batches = [(batch.images.cpu(), batch.labels) for batch in pictures.batches(256)]
    pictures.close()
    pictures.classes.require_known()
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    check_number_of_classes(labels)
    if not (labels >= 0).any():
        raise UserError(f"--data: no sample of {pattern} has a label, which is what the network learns from")
    return images[labels >= 0], labels[labels >= 0]


def learn(network: CorpusNetwork, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Trains in place."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    for _ in track(range(epochs), "learning features", disable=not sys.stdout.isatty()):
        for idx in torch.randperm(len(images), generator=generator).split(BATCH):
            pixels = _shifted(images[idx], generator).to(device) / 255
            loss = F.cross_entropy(network.logits(pixels), labels[idx].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def accuracy_of(network: CorpusNetwork, images: Tensor, labels: Tensor) -> float:
    """The share of pictures whose label has the largest logit."""
    device = next(network.parameters()).device
    right = 0
    for some, of_some in zip(images.split(256), labels.split(256), strict=True):
        right += int((network.logits(some.to(device).float() / 255).argmax(dim=1).cpu() == of_some).sum())
    return right / len(images)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """All pictures of a batch moved alike, by up to a sixteenth of their side, edges repeated."""
    most = images.shape[-1] // 16
    down, across = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = F.pad(images.float(), (most,) * 4, mode="replicate")
    return padded[:, :, down : down + images.shape[2], across : across + images.shape[3]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
