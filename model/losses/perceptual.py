"""LPIPS: the perceptual distance between two images in VGG-16 features (arXiv 1801.03924).

Plain torch: 13 convolutions, 5 taps, 5 linear heads. The weights come from one safetensors file; there is no
distance without it. They are those of the published metric (torchvision's ImageNet VGG-16 and the LPIPS v0.1
heads), converted once:

    python -m model.losses.perceptual vgg16-397923af.pth weights/v0.1/vgg.pth --out lpips_vgg.safetensors

    lpips = LpipsDistance.load("lpips_vgg.safetensors")         # objectives.rec.lpips_weights
    lpips(to_signed(recon), to_signed(target)).shape         # (R,), 0 for equal images

The file's keys, i = 0..12 in depth order and j = 0..4: `convs.i.weight` (out, in, 3, 3), `convs.i.bias`
(out), `heads.j.weight` (1, C_j, 1, 1) with C_j the channels of tap j: 64, 128, 256, 512, 512.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import UserError
from configs.command_line import CommandParser, apply_umask, output_file
from model.weights import read_torch_tensors

# Convolutions before each tap; a 2x2 max pool follows every tap but the last.
CONVS_PER_TAP = (2, 2, 3, 3, 3)
# Indices of the 13 convolutions in torchvision's `vgg16().features`.
TORCHVISION_CONV_IDX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# The published metric's input scaling: ImageNet statistics carried over to [-1, 1] and rounded.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10  # added to a feature vector's norm
WEIGHT_KEYS = tuple(
    [f"convs.{i}.{part}" for i in range(len(TORCHVISION_CONV_IDX)) for part in ("weight", "bias")]
    + [f"heads.{j}.weight" for j in range(len(CONVS_PER_TAP))]
)


class LpipsDistance(nn.Module):
    """The frozen LPIPS network; its state dict is the content of the file. Build it outside DeepSpeed's `zero.Init`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor], source: str = "weights") -> None:
        """`weights` under the keys above, any float dtype; errors call them `source`."""
        super().__init__()
        _require_keys(weights, source)
        _require_shapes(weights, source)
        convs = [weights[f"convs.{i}.weight"] for i in range(len(TORCHVISION_CONV_IDX))]
        heads = [weights[f"heads.{j}.weight"] for j in range(len(CONVS_PER_TAP))]
        with torch.device("meta"):  # no initialisation: every number is given
            self.convs = nn.ModuleList(nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1) for w in convs)
            self.heads = nn.ModuleList(nn.Conv2d(w.shape[1], 1, 1, bias=False) for w in heads)
        self.load_state_dict({key: weights[key].float() for key in WEIGHT_KEYS}, assign=True)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path, key: str = "objectives.rec.lpips_weights") -> LpipsDistance:
        """Read a converted file.

        Raises UserError, naming the setting `key`, where the file is missing, damaged, or has other keys or shapes.
        """
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{key}={path} cannot be read as safetensors ({error}); make the file with "
                "`python -m model.losses.perceptual --help`, or leave it out (in training: "
                "objectives.rec.perceptual=0)"
            ) from None
        return cls(weights, source=str(path))

    def forward(self, recon: Float[Tensor, "R 3 H W"], target: Float[Tensor, "R 3 H W"]) -> Float[Tensor, " R"]:
        """LPIPS of two batches in [-1, 1] space, (R,); only `recon` gets a gradient.

            d_r = sum_{tap j} mean_{position p} sum_{channel c}  head_jc * (a_rjpc - b_rjpc)^2
            a, b = features of recon and of target, each position's vector scaled to length 1

        for each tap of the network:
            scale both feature vectors of each position to length 1, square their difference
            weight channels by the head, take the mean over positions, add it to the image's distance
        """
        with torch.no_grad():
            target_taps = self.taps(target)
        distance_R = torch.zeros(len(recon), device=recon.device)
        for head, a_RCHW, b_RCHW in zip(self.heads, self.taps(recon), target_taps, strict=True):
            distance_R = distance_R + head((_unit(a_RCHW) - _unit(b_RCHW)) ** 2).mean(dim=(1, 2, 3))
        return distance_R

    def taps(self, x: Float[Tensor, "R 3 H W"]) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: (R, C_j, H / 2^j, W / 2^j)."""
        features, taps = (x.float() - self.shift) / self.scale, []
        convs = iter(self.convs)
        for tap, num_convs in enumerate(CONVS_PER_TAP):
            features = F.max_pool2d(features, 2) if tap else features
            for _ in range(num_convs):
                features = F.relu(next(convs)(features))
            taps.append(features)
        return taps


def convert_public_weights(vgg16: Mapping[str, Tensor], lpips: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename public weights: torchvision's `features.N.weight|bias` and LPIPS's `linJ.model.1.weight`."""
    names = {
        f"convs.{i}.{part}": f"features.{n}.{part}"
        for i, n in enumerate(TORCHVISION_CONV_IDX)
        for part in ("weight", "bias")
    }
    names |= {f"heads.{j}.weight": f"lin{j}.model.1.weight" for j in range(len(CONVS_PER_TAP))}
    public = {**vgg16, **lpips}
    missing = [theirs for theirs in names.values() if theirs not in public]
    if missing:
        raise UserError(
            f"not torchvision's vgg16 and LPIPS's vgg heads: {_shortened(missing)} missing, found "
            f"{_shortened(sorted(public))}; give vgg16's state dict first and lpips/weights/v0.1/vgg.pth second"
        )
    return {ours: public[theirs].float().contiguous() for ours, theirs in names.items()}


def main(arguments: list[str] | None = None) -> int:
    """Convert two public .pth files into the file that objectives.rec.lpips_weights names."""
    parser = CommandParser(prog="python -m model.losses.perceptual", description=main.__doc__)
    parser.add_argument("vgg16", type=Path, help="torchvision's vgg16 state dict (vgg16-397923af.pth)")
    parser.add_argument("lpips", type=Path, help="the LPIPS v0.1 heads for vgg (lpips/weights/v0.1/vgg.pth)")
    parser.add_argument("--out", type=output_file, required=True, help="safetensors file to write")
    given = parser.parse_args(arguments)
    try:
        weights = convert_public_weights(read_torch_tensors(given.vgg16), read_torch_tensors(given.lpips))
        LpipsDistance(weights, source=f"{given.vgg16} and {given.lpips}")
        save_file(weights, given.out)
        apply_umask(given.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.out}")
    return 0


def _unit(x_RCHW: Tensor) -> Tensor:
    return x_RCHW / (torch.linalg.vector_norm(x_RCHW, dim=1, keepdim=True) + EPS)


def _require_keys(weights: Mapping[str, Tensor], source: str) -> None:
    missing = [key for key in WEIGHT_KEYS if key not in weights]
    unknown = [key for key in weights if key not in WEIGHT_KEYS]
    if missing or unknown:
        raise UserError(
            f"{source} does not hold LPIPS weights: expected {_shortened(list(WEIGHT_KEYS))}; missing "
            f"{_shortened(missing)}; unknown {_shortened(unknown)}; make the file with "
            "`python -m model.losses.perceptual --help`"
        )


def _require_shapes(weights: Mapping[str, Tensor], source: str) -> None:
    """Input channels of each convolution must equal the output channels before it, those of each head its tap's."""
    channels = 3
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(len(TORCHVISION_CONV_IDX)):
        out = weights[f"convs.{i}.weight"].shape[0]
        shapes |= {f"convs.{i}.weight": (out, channels, 3, 3), f"convs.{i}.bias": (out,)}
        channels = out
    for j in range(len(CONVS_PER_TAP)):
        last_conv = sum(CONVS_PER_TAP[: j + 1]) - 1
        shapes[f"heads.{j}.weight"] = (1, weights[f"convs.{last_conv}.weight"].shape[0], 1, 1)
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != shape:
            raise UserError(
                f"{source}: {key} is {tuple(weights[key].shape)} and must be {shape} to fit the layer before "
                "it; make the file with `python -m model.losses.perceptual --help`"
            )


def _shortened(keys: list[str]) -> str:
    """Join at most four keys, for an error message."""
    return (", ".join(keys[:4]) + (f", ... ({len(keys)})" if len(keys) > 4 else "")) or "none"


if __name__ == "__main__":
    raise SystemExit(main())
