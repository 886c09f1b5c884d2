"""`torch.export` programs: encode and decode as files that torch alone runs, without any of this code.

    write_programs(tokenizer, Path("DIR"))

    DIR/encode.pt2          images (B, 3, H, W) float32 in [0, 1] -> latent (B, L, H/p, W/p)
    DIR/decode.pt2          latent (B, L, h, w) -> pixels (B, 3, h*p, w*p) float32 in [0, 1]
    DIR/conventions.json    what goes in and comes out; also inside each .pt2, as its extra file of that name

    program = torch.export.load("DIR/encode.pt2").module()
    latent = program(images)

Batch, height and width are free. Only sides of a single patch are not: torch.export takes a size of one for a constant.

Inputs are contiguous, outputs are. It matters to programs that AOTInductor compiled further, which read their inputs as
if they were and do not look; with AOTI_RUNTIME_CHECK_INPUTS=1 in the environment they do.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.tokenizer import VisualTokenizer, pixels_of
from model.towers import Decoder

CONVENTIONS = "conventions.json"
LEAST_SIDE = 2  # patches
MOST_SIDE, MOST_IMAGES = 4096, 65_536  # bounds that torch.export asks for; nothing is known to end there


class _Encode(nn.Module):
    """Holds what encode reads and no more: a program stores every weight of its module."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        read = {k: t for k, t in tokenizer.state_dict().items() if k.split(".")[0] in ("trunk", "bottleneck")}
        self.tokenizer = VisualTokenizer.from_state(tokenizer.model, read)

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)


class _Decode(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        return pixels_of(self.decoder, latent)


def write_programs(tokenizer: VisualTokenizer, directory: Path) -> None:
    """encode.pt2, decode.pt2 and conventions.json into `directory`; without a decoder there is no decode.pt2.

    Raises UserError where the weights hold no bottleneck.
    """
    programs = {"encode": encode_program(tokenizer)}
    if tokenizer.decoder is not None:
        programs["decode"] = decode_program(tokenizer.decoder)
    said = json.dumps(conventions(tokenizer), indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        torch.export.save(program, directory / f"{name}.pt2", extra_files={CONVENTIONS: said})
    (directory / CONVENTIONS).write_text(said)


def encode_program(tokenizer: VisualTokenizer) -> ExportedProgram:
    """images (B, 3, H, W) float32 in [0, 1] -> latent (B, L, H/p, W/p), for any B and any multiples of p from 2p on."""
    patch = tokenizer.model.patch_size
    example = torch.rand(2, 3, 3 * patch, 5 * patch, device=tokenizer.device)
    tokenizer.encode(example)  # says what is missing, if anything is; export would wrap it into words of its own
    return _export(_Encode(tokenizer), example, patch)


def decode_program(decoder: Decoder) -> ExportedProgram:
    """latent (B, L, h, w) in the weights' dtype -> pixels (B, 3, h*p, w*p) float32 in [0, 1]; h and w from 2 on."""
    return _export(_Decode(decoder), decoder.proj_in.weight.new_zeros(2, decoder.proj_in.in_features, 3, 5), 1)


def conventions(tokenizer: VisualTokenizer) -> dict[str, Any]:
    """What goes into the programs and comes out, as JSON."""
    model, origin = tokenizer.model, tokenizer.origin
    image = {"shape": ["batch", 3, "height", "width"], "dtype": "float32", "range": [0, 1], "colour": "RGB"}
    latent = {
        "shape": ["batch", model.latent_channels, f"height / {model.patch_size}", f"width / {model.patch_size}"],
        "dtype": str(tokenizer.dtype).removeprefix("torch."),
    }
    return {
        "encode": {"images": image, "returns": latent},
        "decode": None if tokenizer.decoder is None else {"latent": latent, "returns": image},
        "sides": f"multiples of {model.patch_size}, from {LEAST_SIDE * model.patch_size} pixels on",
        "origin": None if origin is None else asdict(origin),
        "torch": torch.__version__,
    }


def _export(module: nn.Module, example: Tensor, step: int) -> ExportedProgram:
    """The program of a module of one argument, whose sides are multiples of `step`."""
    batch, down, across = (
        Dim("batch", max=MOST_IMAGES),
        Dim("down", min=LEAST_SIDE, max=MOST_SIDE),
        Dim("across", min=LEAST_SIDE, max=MOST_SIDE),
    )
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch, 2: step * down, 3: step * across},))
