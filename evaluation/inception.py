"""Inception-v3 of the Fréchet inception distance: the 2015-12-05 TensorFlow graph up to its last pooling.

    network = read_inception("pt_inception-2015-12-05-6726825d.pth")
    network(images).shape                # (B, 3, H, W) in [0, 1] -> (B, 2048)

Where it differs from torchvision's Inception, it follows that graph: average pools leave padding out of the count, the
last block pools by maximum, as in pytorch-fid and torch-fidelity. Images are resized to 299 x 299 by TensorFlow 1's
bilinear filter (pixel corners at integers, no antialiasing) and scaled to (x - 128) / 128 on 0 .. 255, as the graph
itself, ADM's evaluator and torch-fidelity do. pytorch-fid resizes by torch's bilinear filter (pixel centres at halves)
and scales to 2 x - 1 on 0 .. 1: it gives other FIDs for images that are not 299 pixels wide.

Layers are rows of tables, `name: (in, out, kernel, stride, padding)`; names are those of the published state dict.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from model.weights import read_torch_tensors

PUBLISHED_SHA256 = "6726825d"  # beginning of the published file's sha256, as in its name
SIDE = 299
KernelSize = int | tuple[int, int]
Layers = dict[str, tuple[int, int, KernelSize, int, KernelSize]]

K1X7, K7X1 = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))  # kernel, stride, padding
K1X1 = (1, 1, 0)
STEM: Layers = {
    "Conv2d_1a_3x3": (3, 32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 32, 3, 1, 0),
    "Conv2d_2b_3x3": (32, 64, 3, 1, 1),
    "Conv2d_3b_1x1": (64, 80, 1, 1, 0),
    "Conv2d_4a_3x3": (80, 192, 3, 1, 0),
}


class ConvNormRelu(nn.Module):
    """Convolution, batch norm with frozen statistics, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: KernelSize, stride: int, padding: KernelSize) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class ConvTable(nn.Module):
    """Base of the blocks: convolutions by name, run in parallel chains whose outputs are concatenated."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        for name, sizes in layers.items():
            self.add_module(name, ConvNormRelu(*sizes))

    def chain(self, x: Tensor, *names: str) -> Tensor:
        """Apply the layers of these names one after the other to (B, C, H, W)."""
        for name in names:
            x = self.get_submodule(name)(x)
        return x


class MixedA(ConvTable):
    """Inception block at 35 x 35."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__({
            "branch1x1": (width, 64, *K1X1), "branch5x5_1": (width, 48, *K1X1), "branch5x5_2": (48, 64, 5, 1, 2),
            "branch3x3dbl_1": (width, 64, *K1X1), "branch3x3dbl_2": (64, 96, 3, 1, 1),
            "branch3x3dbl_3": (96, 96, 3, 1, 1), "branch_pool": (width, pool, *K1X1),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, 35, 35) -> (B, 224 + pool, 35, 35)."""
        doubled = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        fives = self.chain(x, "branch5x5_1", "branch5x5_2")
        return torch.cat([self.chain(x, "branch1x1"), fives, doubled, self.chain(_avg_pool(x), "branch_pool")], dim=1)


class MixedB(ConvTable):
    """Inception block that reduces 35 x 35 to 17 x 17."""

    def __init__(self) -> None:
        super().__init__({
            "branch3x3": (288, 384, 3, 2, 0), "branch3x3dbl_1": (288, 64, *K1X1),
            "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 2, 0),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, 288, 35, 35) -> (B, 768, 17, 17)."""
        doubled = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.chain(x, "branch3x3"), doubled, F.max_pool2d(x, 3, 2)], dim=1)


class MixedC(ConvTable):
    """Inception block at 17 x 17."""

    def __init__(self, inner: int) -> None:
        super().__init__({
            "branch1x1": (768, 192, *K1X1), "branch7x7_1": (768, inner, *K1X1), "branch7x7_2": (inner, inner, *K1X7),
            "branch7x7_3": (inner, 192, *K7X1), "branch7x7dbl_1": (768, inner, *K1X1),
            "branch7x7dbl_2": (inner, inner, *K7X1), "branch7x7dbl_3": (inner, inner, *K1X7),
            "branch7x7dbl_4": (inner, inner, *K7X1), "branch7x7dbl_5": (inner, 192, *K1X7),
            "branch_pool": (768, 192, *K1X1),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> (B, 768, 17, 17)."""
        sevens = self.chain(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        doubled = self.chain(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat([self.chain(x, "branch1x1"), sevens, doubled, self.chain(_avg_pool(x), "branch_pool")], dim=1)


class MixedD(ConvTable):
    """Inception block that reduces 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__({
            "branch3x3_1": (768, 192, *K1X1), "branch3x3_2": (192, 320, 3, 2, 0), "branch7x7x3_1": (768, 192, *K1X1),
            "branch7x7x3_2": (192, 192, *K1X7), "branch7x7x3_3": (192, 192, *K7X1),
            "branch7x7x3_4": (192, 192, 3, 2, 0),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""
        sevens = self.chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([self.chain(x, "branch3x3_1", "branch3x3_2"), sevens, F.max_pool2d(x, 3, 2)], dim=1)


class MixedE(ConvTable):
    """Inception block at 8 x 8; the last of the two pools by maximum."""

    def __init__(self, width: int, is_last: bool) -> None:
        super().__init__({
            "branch1x1": (width, 320, *K1X1), "branch3x3_1": (width, 384, *K1X1),
            "branch3x3_2a": (384, 384, (1, 3), 1, (0, 1)), "branch3x3_2b": (384, 384, (3, 1), 1, (1, 0)),
            "branch3x3dbl_1": (width, 448, *K1X1), "branch3x3dbl_2": (448, 384, 3, 1, 1),
            "branch3x3dbl_3a": (384, 384, (1, 3), 1, (0, 1)), "branch3x3dbl_3b": (384, 384, (3, 1), 1, (1, 0)),
            "branch_pool": (width, 192, *K1X1),
        })  # fmt: skip
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, 8, 8) -> (B, 2048, 8, 8)."""
        threes, doubled = self.chain(x, "branch3x3_1"), self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = F.max_pool2d(x, 3, 1, 1) if self.is_last else _avg_pool(x)
        parts = [
            self.chain(x, "branch1x1"),
            self.chain(threes, "branch3x3_2a"),
            self.chain(threes, "branch3x3_2b"),
            self.chain(doubled, "branch3x3dbl_3a"),
            self.chain(doubled, "branch3x3dbl_3b"),
            self.chain(pooled, "branch_pool"),
        ]
        return torch.cat(parts, dim=1)


class Inception(ConvTable):
    """Inception-v3 without its classifier: the 2,048 pooled features that FID compares."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__(STEM)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (MixedC(inner) for inner in (128, 160, 160, 192))
        self.Mixed_7a = MixedD()
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, is_last=False), MixedE(2048, is_last=True)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 2048)."""
        x = (resize_as_tensorflow(images.float() * 255, SIDE) - 128) / 128
        x = F.max_pool2d(self.chain(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), 3, 2)
        x = F.max_pool2d(self.chain(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), 3, 2)
        x = self.chain(
            x, *(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))
        )
        return x.mean(dim=(2, 3))


def read_inception(path: str | Path) -> Inception:
    """Load the published state dict, without its classifier and other tensors that are not used.

    Raises UserError for a file that is truncated, no state dict, or of another network.
    """
    stored = read_torch_tensors(path)
    with torch.device("meta"):
        network = Inception()
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    _check_tensors(stored, wanted, path)
    state = {name: stored[name].float() for name in wanted}
    counters = {name: torch.tensor(0) for name in network.state_dict() if name not in wanted}
    network.load_state_dict(state | counters, assign=True)
    return network


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resize (B, 3, H, W) to (B, 3, side, side) as TensorFlow 1 did: output pixel i lies at input i * H / side."""
    down, across = (_interpolation_matrix(length, side).to(images) for length in images.shape[2:])
    return down @ images @ across.T


def _interpolation_matrix(length: int, side: int) -> Tensor:
    """Build the (side, length) matrix whose rows interpolate between two neighbours, the last pixel with itself."""
    where = torch.arange(side, dtype=torch.float64) * length / side
    low = where.floor().long()
    high = (low + 1).clamp_max(length - 1)
    weights = torch.zeros(side, length, dtype=torch.float64)
    rows = torch.arange(side)
    weights.index_put_((rows, low), 1 - (where - low), accumulate=True)
    weights.index_put_((rows, high), where - low, accumulate=True)
    return weights


def _avg_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _check_tensors(stored: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> None:
    if missing := [name for name in wanted if name not in stored]:
        raise UserError(
            f"--fid {path} is not FID's Inception: {len(missing)} of {len(wanted)} tensors are missing, {missing[0]} "
            "first; give pt_inception-2015-12-05-6726825d.pth"
        )
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"--fid {path}: {name} is {tuple(stored[name].shape)} and must be {tuple(tensor.shape)}; give "
                "pt_inception-2015-12-05-6726825d.pth"
            )
