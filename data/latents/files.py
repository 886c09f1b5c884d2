"""The files of a latent store, one by one: names, tensors, statistics, and what can be wrong with each.

    shard_name(rank=0, number=12)                  # "latents_rank00_shard012.safetensors"
    read_shard(path).shape                         # (64, 16, 16)
    mean_L, std_L = read_statistics(directory, channels=64)

Source: extract_features.py and its data set class in github.com/hustvl/LightningDiT (arXiv 2501.01423).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs import UserError

LATENTS, FLIPPED, LABELS, POSITIONS = "latents", "latents_flip", "labels", "positions"
STATISTICS = "latents_stats.pt"
REMEDY = "write the store anew with `python -m evaluation.latents`"


@dataclass(frozen=True)
class Shard:
    """One file as its header, labels and positions tell it; the latents stay on the disk."""

    path: Path
    shape: tuple[int, ...]  # (L, h, w)
    dtype: torch.dtype
    has_flips: bool
    labels: Tensor  # (n,) int64
    positions: Tensor | None  # (n,) int64


def shard_name(rank: int, number: int) -> str:
    """What the public extraction calls the file `number` of a rank."""
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def shard_files(directory: Path) -> list[Path]:
    """The latent files of a store, by rank and number. Raises UserError where there is none."""
    found = sorted(directory.glob("*.safetensors"), key=lambda path: _numbers(path.stem))
    if not found:
        raise UserError(
            f"{directory} holds no latents (no *.safetensors): write them with "
            f"`python -m evaluation.latents RUN --data SHARDS --out {directory}`"
        )
    return found


def read_statistics(directory: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (L,) float32 each. Raises UserError where they are missing or fit other latents."""
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
    except Exception:  # torch.load raises whatever the unpickler met, with advice to unpickle what it should not
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
    check_statistics(mean, std, str(path))
    return mean, std


def check_statistics(mean: Tensor, std: Tensor, where: str) -> None:
    """(L,) each. Raises UserError where a channel cannot be normalised."""
    is_usable = mean.isfinite() & std.isfinite() & (std > 0)
    if not is_usable.all():
        channel = int((~is_usable).nonzero()[0])
        raise UserError(
            f"{where}: channel {channel} has mean {float(mean[channel]):g} and deviation {float(std[channel]):g}, by "
            "which training divides: the tokenizer does not use the channel, or its values do not fit the type; train "
            "it longer or with fewer channels, or store them as bfloat16 or float32"
        )


def write_statistics(directory: Path, mean: Tensor, std: Tensor) -> None:
    """(L,) each, as the public layout has them: (1, L, 1, 1) float32."""
    torch.save({"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}, directory / STATISTICS)


def read_shard(path: Path) -> Shard:
    """Raises UserError for a file that is cut off, lacks a tensor, or whose labels do not fit."""
    try:
        with safe_open(path, "pt") as stored:
            names = set(stored.keys())
            if missing := [key for key in (LATENTS, LABELS) if key not in names]:
                raise UserError(
                    f"{path} has no {' and no '.join(missing)} (it has {', '.join(sorted(names)[:5])}): a latent file "
                    f"holds {LATENTS}, {FLIPPED} and {LABELS}; {REMEDY}"
                )
            latents = stored.get_tensor(LATENTS)
            flips = stored.get_tensor(FLIPPED) if FLIPPED in names else None
            labels = stored.get_tensor(LABELS).long().clone()
            positions = stored.get_tensor(POSITIONS).clone() if POSITIONS in names else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or is cut off ({error}); {REMEDY}") from None
    same = latents.ndim == 4 and (flips is None or flips.shape == latents.shape) and labels.shape == latents.shape[:1]
    if not same or (labels < 0).any():
        raise UserError(
            f"{path}: {LATENTS} {tuple(latents.shape)}, {FLIPPED} {None if flips is None else tuple(flips.shape)}, "
            f"{LABELS} {tuple(labels.shape)} from {int(labels.min())} on: latents are (n, L, h, w), both alike, with a "
            f"label from 0 on for each; {REMEDY}"
        )
    return Shard(path, tuple(latents.shape[1:]), latents.dtype, flips is not None, labels, positions)


def _numbers(stem: str) -> list[int | str]:
    """Sorts shard 2 before shard 10, and rank 99 before rank 100."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", stem)]
