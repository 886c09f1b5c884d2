"""Reconstruction quality: PSNR, SSIM, LPIPS and rFID over held-out images.

    task = Reconstruction(networks=[open_network("inception.pth")], perceptual=None, device=device)
    task.add(batch)
    task.result().metrics["psnr_db"]     # mean over images of 10 log10(1 / mean squared error), pixels in [0, 1]

PSNR, SSIM and LPIPS are means over images of the pair (image, reconstruction), as floats; FID compares the two sets,
quantised to 8 bits as saved images are. LPIPS and FID depend on a network, which is part of the metric's name. In place
of a metric that was not computed stands the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError
from engine import distributed
from engine.distributed import gather_sorted
from engine.reporting.images import latent_colours, png, reconstructions
from evaluation.fid import SSIM_WINDOW, FeatureNetwork, Fid, PerceptualNetwork, ssim
from evaluation.results import MetricValue, TaskResult
from evaluation.tokenizer_source import TokenizerOutputs

NUM_SHOWN = 8  # best and worst reconstructions
FID_NOT_COMPUTED = "not computed: no feature network (--fid FILE)"
LPIPS_NOT_COMPUTED = "not computed: no weights (--lpips FILE)"


class Reconstruction:
    """Reconstruction metrics, and the PSNR of each image's mean colour as a baseline."""

    def __init__(
        self, networks: Sequence[FeatureNetwork], perceptual: PerceptualNetwork | None, device: torch.device
    ) -> None:
        self._fids = [Fid(network, device) for network in networks]
        self._perceptual = perceptual.to(device) if perceptual is not None else None
        self._values: list[Tensor] = []  # (n, 3 or 4) float64: PSNR, PSNR of the mean colour, SSIM and LPIPS
        self._positions: list[Tensor] = []
        self._first: tuple[Tensor, Tensor, Tensor] | None = None  # image, reconstruction, latent
        self._extremes = {
            "worst": ExtremePairs(NUM_SHOWN, is_largest=False),
            "best": ExtremePairs(NUM_SHOWN, is_largest=True),
        }

    def add(self, batch: TokenizerOutputs) -> None:
        """Compare a batch; images of the first are drawn. Raises UserError if they are smaller than SSIM's window."""
        self.compare(batch.images, batch.recon, batch.positions)
        if self._first is None:
            images, recon, latent = (x[:NUM_SHOWN].cpu() for x in (batch.images, batch.recon, batch.latent))
            self._first = (images, recon, latent)

    @torch.no_grad()
    def compare(self, target: Tensor, recon: Tensor, positions: Tensor) -> None:
        """Compare images, as `add`: target, recon (B, 3, H, W) in [0, 1]."""
        if min(target.shape[2:]) < SSIM_WINDOW:
            raise UserError(
                f"images of {target.shape[3]} x {target.shape[2]}: SSIM compares windows of {SSIM_WINDOW} x "
                f"{SSIM_WINDOW} pixels; raise --crop, or leave reconstruction out"
            )
        mean_colour = target.mean(dim=(2, 3), keepdim=True).expand_as(target)
        values = [psnr(target, recon), psnr(target, mean_colour), ssim(target, recon)]
        if self._perceptual is not None:
            values.append(self._perceptual(2 * recon - 1, 2 * target - 1))
        self._values.append(torch.stack(values, dim=1).double().cpu())
        self._positions.append(positions)
        for fid in self._fids:
            fid.add(target, recon)
        for extremes in self._extremes.values():
            extremes.add(values[0], target, recon)

    def result(self) -> TaskResult:
        """Return means and distances over the images of all ranks. Raises UserError if there are none."""
        width = 3 if self._perceptual is None else 4
        own = torch.cat([torch.empty(0, width, dtype=torch.float64), *self._values])
        values = gather_sorted(own, torch.cat([torch.empty(0, dtype=torch.int64), *self._positions]))
        if not len(values):
            raise UserError("no held-out image could be decoded: there is nothing to reconstruct; repair the shards")
        means = values.mean(dim=0).tolist()
        metrics: dict[str, MetricValue] = {
            "psnr_db": means[0],
            "psnr_db_of_mean_colour": means[1],
            "ssim": means[2],
            "images": len(values),
        }
        perceptual = self._perceptual
        metrics |= {"lpips": LPIPS_NOT_COMPUTED} if perceptual is None else {f"lpips[{perceptual.name}]": means[3]}
        metrics |= {f"rfid[{fid.name}]": fid.result() for fid in self._fids}
        metrics |= {} if self._fids else {"rfid": FID_NOT_COMPUTED}
        plots = {
            f"reconstructions_{name}": partial(_draw_pairs, pairs.gather()) for name, pairs in self._extremes.items()
        }
        if self._first is not None:
            plots["held_out"] = partial(_draw_first, *self._first)
        return TaskResult(metrics, plots=plots)


class ExtremePairs:
    """The `count` pairs (image, reconstruction) with the largest or smallest value, kept as 8-bit images."""

    def __init__(self, count: int, is_largest: bool) -> None:
        self._count, self._is_largest = count, is_largest
        self._values = torch.empty(0)
        self._pairs: Tensor | None = None  # (n, 2, 3, H, W) uint8: image, reconstruction

    def add(self, values: Tensor, target: Tensor, recon: Tensor) -> None:
        """values (B,); target, recon (B, 3, H, W) in [0, 1]."""
        chosen = values.topk(min(self._count, len(values)), largest=self._is_largest).indices
        pairs = (torch.stack([target[chosen], recon[chosen]], dim=1) * 255).round().byte().cpu()
        self._keep(values[chosen].float().cpu(), pairs)

    def gather(self) -> Tensor:
        """Return those of all ranks, (n, 2, 3, H, W), the most extreme first. A collective."""
        merged = ExtremePairs(self._count, self._is_largest)
        for values, pairs in distributed.gather_objects((self._values, self._pairs)):
            if pairs is not None:
                merged._keep(values, pairs)
        assert merged._pairs is not None
        return merged._pairs

    def _keep(self, values: Tensor, pairs: Tensor) -> None:
        values = torch.cat([self._values, values])
        pairs = pairs if self._pairs is None else torch.cat([self._pairs, pairs])
        self._values, kept = values.topk(min(self._count, len(values)), largest=self._is_largest)
        self._pairs = pairs[kept]


def _draw_first(target: Tensor, recon: Tensor, latent: Tensor, path: Path) -> None:
    """Draw three rows: originals, reconstructions, latents as colours."""
    latents = latent_colours(latent, scale=target.shape[-1] // latent.shape[-1])
    path.write_bytes(png(torch.cat([reconstructions(target, recon), latents], dim=1)))


def _draw_pairs(pairs: Tensor, path: Path) -> None:
    target, recon = (pairs.float() / 255).unbind(1)
    path.write_bytes(png(reconstructions(target, recon)))


def psnr(target: Tensor, recon: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of (B, 3, H, W) images in [0, 1]: (B,) decibels, at most 100."""
    error_B = (target - recon).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error_B.clamp_min(1e-10))
