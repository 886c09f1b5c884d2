"""Latent stores small enough for a test, in the public layout or with our positions.

store = LatentStore(write_public_store(tmp_path, counts=[4, 3]))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.latents.channel_statistics import write_channel_statistics
from data.latents.files import latent_file_name


def random_latents(count: int, shape: tuple[int, int, int] = (3, 2, 2), seed: int = 0) -> dict[str, Tensor]:
    """latents, latents_flip and labels (0 1 2 3 0 1 ...) of `count` images; channels of unlike means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, shape[0] + 1).view(1, -1, 1, 1)
    latents = torch.randn(count, *shape, generator=generator) * spread + spread
    return {"latents": latents, "latents_flip": latents.flip(-1) + 0.25, "labels": torch.arange(count) % 4}


def write_public_store(directory: Path, counts: Sequence[int], shape: tuple[int, int, int] = (3, 2, 2)) -> Path:
    """Files of so many images each with exactly the public keys, and statistics; no manifest."""
    directory.mkdir(exist_ok=True)
    whole = random_latents(sum(counts), shape)
    start = 0
    for number, count in enumerate(counts):
        save_file(
            {key: rows[start : start + count].clone() for key, rows in whole.items()},
            directory / latent_file_name(0, number),
            {"total_size": str(count)},
        )
        start += count
    channels_first = torch.cat([whole["latents"], whole["latents_flip"]]).transpose(0, 1).flatten(1)
    write_channel_statistics(directory, channels_first.mean(1), channels_first.std(1))
    return directory
