"""The tokenizer with the interface of diffusers' AutoencoderKL, for pipelines that expect it. Needs no diffusers.

    vae = Autoencoder.from_pretrained("DIR", stats="latents/NAME/latents_stats.pt")    # from evaluation.latents
    z = vae.encode(images).latent_dist.sample()                          # images in [-1, 1]
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor        # about zero mean, unit deviation
    images = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample

A deterministic latent's `sample` is its `mode`, with a standard deviation of 0; a Gaussian one is sampled.
`scaling_factor` and `shift_factor` pool the channels' statistics into one number each, as in diffusers; `latents_mean`
and `latents_std` are by channel. Without statistics they are 1, 0 and None: nothing is guessed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs import UserError
from model.latent import DiagonalGaussian, feature_width
from model.tokenizer import VisualTokenizer


@dataclass(frozen=True)
class AutoencoderConfig:
    """The config keys of a diffusers VAE that pipelines read, as attributes, by key or by `get`."""

    latent_channels: int
    block_out_channels: tuple[int, ...]  # pipelines take 2 ** (its length - 1) for pixels per latent
    sample_size: int | None
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    force_upcast: bool = False

    def __getitem__(self, key: str) -> Any:
        return asdict(self)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary: some pipelines read keys that only other VAEs have."""
        return asdict(self).get(key, default)


@dataclass(frozen=True)
class LatentDistribution:
    """Distribution of latents: Gaussian with a log-variance, else the point `mean`."""

    mean: Tensor
    log_variance: Tensor | None = None

    def mode(self) -> Tensor:
        """The most probable latent, (B, L, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, L, h, w) with `generator`, which may be on the host; of a deterministic latent return the mode."""
        if self.log_variance is None:
            return self.mean
        device = self.mean.device if generator is None else generator.device
        normals = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean.device)
        return DiagonalGaussian(self.mean, self.log_variance).sample(normals)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, L, h, w); zeros of a deterministic latent."""
        if self.log_variance is None:
            return torch.zeros_like(self.mean)
        return DiagonalGaussian(self.mean, self.log_variance).std.to(self.mean.dtype)


class EncoderOutput(NamedTuple):
    """Result of `encode`; also a tuple, as diffusers returns with return_dict=False."""

    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    """Result of `decode`: (B, 3, height, width) in [-1, 1]."""

    sample: Tensor


class Autoencoder(nn.Module):
    """`encode`, `decode` and `config` as pipelines expect them, around a VisualTokenizer."""

    def __init__(self, tokenizer: VisualTokenizer, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """`mean` and `std` of the latents by channel: L numbers each, in any shape."""
        super().__init__()
        self.tokenizer, self.config = tokenizer, _config(tokenizer, mean, std)

    @classmethod
    def from_pretrained(cls, name: str | Path, stats: str | Path | None = None, **options: Any) -> Autoencoder:
        """VisualTokenizer.from_pretrained(name, **options), with a latents_stats.pt ({"mean", "std"}) if there is one.

        Raises UserError for what cannot be read.
        """
        tokenizer = VisualTokenizer.from_pretrained(name, **options)
        return cls(tokenizer, *(_read_stats(Path(stats)) if stats is not None else (None, None)))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, of latents and of decoded pixels."""
        return self.tokenizer.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.tokenizer.device

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode images (B, 3, height, width) in [-1, 1]; `latent_dist` is of (B, L, height/p, width/p)."""
        images = x.float() / 2 + 0.5
        if self.tokenizer.model.latent == "gaussian":
            return EncoderOutput(LatentDistribution(*self.tokenizer.moments(images)))
        return EncoderOutput(LatentDistribution(self.tokenizer.encode(images)))

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput:
        """Decode latents (B, L, h, w); `sample` is (B, 3, h*p, w*p) in [-1, 1], clamped. `generator` is ignored."""
        return DecoderOutput((self.tokenizer.decode(z.to(self.dtype)) * 2 - 1).to(self.dtype))

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput:
        """Encode, take the mode, decode."""
        return self.decode(self.encode(sample).latent_dist.mode())


def _config(tokenizer: VisualTokenizer, mean: Tensor | None, std: Tensor | None) -> AutoencoderConfig:
    model, origin = tokenizer.model, tokenizer.origin
    halvings = int(math.log2(model.patch_size))
    if 2**halvings != model.patch_size:
        raise UserError(
            f"a patch of {model.patch_size} pixels: pipelines take the scale of a VAE for a power of two; use "
            "VisualTokenizer itself"
        )
    shape = AutoencoderConfig(
        latent_channels=model.latent_channels,
        block_out_channels=(feature_width(model),) * (halvings + 1),
        sample_size=origin.image_size if origin is not None else None,
    )
    return shape if mean is None or std is None else _normalised(shape, mean.flatten(), std.flatten())


def _normalised(shape: AutoencoderConfig, mean_L: Tensor, std_L: Tensor) -> AutoencoderConfig:
    """Add the statistics by channel, and pooled over channels, which have equally many values."""
    for name, values_L in (("mean", mean_L), ("std", std_L)):
        if values_L.numel() != shape.latent_channels:
            raise UserError(
                f"the statistics hold {values_L.numel()} {name}s, the latents have {shape.latent_channels} channels: "
                "they are of another tokenizer"
            )
    mean_L, std_L = mean_L.double(), std_L.double()
    shift = mean_L.mean()
    pooled = (std_L.square() + (mean_L - shift).square()).mean().sqrt()
    return replace(
        shape,
        scaling_factor=1 / pooled.item(),
        shift_factor=shift.item(),
        latents_mean=tuple(mean_L.tolist()),
        latents_std=tuple(std_L.tolist()),
    )


def _read_stats(path: Path) -> tuple[Tensor, Tensor]:
    form = "they are a dictionary of the tensors mean and std, L numbers each, as torch.save writes one"
    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): stats names a file of latent statistics, the "
            "latents_stats.pt that `python -m evaluation.latents` writes into --out"
        ) from None
    except Exception:  # torch.load raises errors of many types, with advice to unpickle code
        raise UserError(f"{path} holds no latent statistics, is cut off, or holds more than tensors: {form}") from None
    if not isinstance(stats, dict) or not all(isinstance(stats.get(name), Tensor) for name in ("mean", "std")):
        found = f"the keys {list(stats)[:5]}" if isinstance(stats, dict) else f"a {type(stats).__name__}"
        raise UserError(f"{path} holds no latent statistics but {found}: {form}")
    return stats["mean"], stats["std"]
