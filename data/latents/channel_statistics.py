"""Channel statistics of latents: mean and deviation of each channel, by which training normalises.

    python -m data.latents.channel_statistics DIR...     # measure public latents that lack latents_stats.pt

    mean_L, std_L = read_channel_statistics(directory, channels=64)

Our own stores have them from the start. Public latents are often published without `latents_stats.pt`, and
LightningDiT writes it when it first reads them, from 10,000 images; here it comes from every value, mirrored or not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from configs import UserError
from configs.command_line import CommandParser
from data.latents.files import FLIPPED, LATENTS, REMEDY, list_latent_files, read_latent_file

STATISTICS = "latents_stats.pt"
_ROWS = 256  # read at once


@dataclass
class ChannelSums:
    """Sums over every stored value, mirrored latents included, and the number of samples in each file written."""

    samples: dict[str, int] = field(default_factory=dict)  # file name -> images
    num_values: int = 0  # of one channel
    total_L: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares_L: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            self.samples | other.samples,
            self.num_values + other.num_values,
            self.total_L + other.total_L,
            self.squares_L + other.squares_L,
        )

    def count(self, latents: Tensor) -> None:
        """Add (b, L, h, w) latents to the sums."""
        values = latents.double()
        self.num_values += values.numel() // values.shape[1]
        self.total_L = self.total_L + values.sum(dim=(0, 2, 3))
        self.squares_L = self.squares_L + values.square().sum(dim=(0, 2, 3))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and (unbiased) standard deviation, (L,) float64.

        Over both orientations of every image, as training draws them. LightningDiT's own come from 10,000 images
        without mirroring.
        """
        mean_L = self.total_L / self.num_values
        variance_L = (self.squares_L - self.num_values * mean_L.square()) / (self.num_values - 1)
        return mean_L, variance_L.clamp_min(0).sqrt()


def read_channel_statistics(directory: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read mean and deviation, (L,) float32 each. Raises UserError where they are missing or of other latents."""
    path = directory / STATISTICS
    form = f"it is a dictionary of the tensors mean and std, as torch.save writes one; {REMEDY}"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: training normalises latents by it; measure them with "
            f"`python -m data.latents.channel_statistics {directory}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): training normalises latents by it") from None
    except Exception:  # torch.load raises many types, with advice to unpickle what must not be
        raise UserError(f"{path} holds no statistics, is cut off, or holds more than tensors: {form}") from None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), Tensor) for name in ("mean", "std")):
        found = f"the keys {list(stored)[:5]}" if isinstance(stored, dict) else f"a {type(stored).__name__}"
        raise UserError(f"{path} holds no statistics but {found}: {form}")
    mean, std = (stored[name].float().flatten() for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"{path} is for {len(mean)} channels, the latents beside it have {channels}: statistics and latents come "
            f"from one tokenizer; {REMEDY}"
        )
    check_channel_statistics(mean, std, str(path))
    return mean, std


def check_channel_statistics(mean: Tensor, std: Tensor, where: str) -> None:
    """Raise UserError where a channel, by (L,) means and deviations, cannot be normalised."""
    is_normalisable = mean.isfinite() & std.isfinite() & (std > 0)
    if not is_normalisable.all():
        channel = int((~is_normalisable).nonzero()[0])
        raise UserError(
            f"{where}: channel {channel} has mean {float(mean[channel]):g} and deviation {float(std[channel]):g}, by "
            "which training divides: the tokenizer does not use the channel, or its values do not fit the type; train "
            "it longer or with fewer channels, or store them as bfloat16 or float32"
        )


def write_channel_statistics(directory: Path, mean: Tensor, std: Tensor) -> None:
    """Write (L,) mean and deviation in the public layout: (1, L, 1, 1) float32."""
    torch.save({"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}, directory / STATISTICS)


def measure_channel_statistics(directory: Path) -> None:
    """Measure and write DIR/latents_stats.pt. Raises UserError where it exists, or a file is damaged."""
    if (directory / STATISTICS).exists():
        raise UserError(f"{directory / STATISTICS} exists already: remove it first, if it is wrong")
    sums = ChannelSums()
    for path in track(list_latent_files(directory), "measuring", disable=not sys.stdout.isatty()):
        read_latent_file(path)  # raises UserError for a bad file
        with safe_open(path, "pt") as stored:
            for key in (LATENTS, FLIPPED):
                if key in stored.keys():  # noqa: SIM118 (not a mapping)
                    for rows in stored.get_tensor(key).split(_ROWS):
                        sums.count(rows)
    mean, std = sums.statistics()
    check_channel_statistics(mean, std, str(directory))
    write_channel_statistics(directory, mean, std)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code: 0, or 2 on an error."""
    parser = CommandParser(prog="python -m data.latents.channel_statistics", description="Measure public latents.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="directories of *.safetensors")
    try:
        for directory in parser.parse_args(arguments).dirs:
            measure_channel_statistics(directory)
            print(f"wrote {directory / STATISTICS}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
