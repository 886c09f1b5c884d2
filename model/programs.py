"""Export encode and decode as `torch.export` programs, which torch alone runs without this code, and as ONNX.

    write_programs(tokenizer, Path("DIR"))
    write_onnx(tokenizer, Path("DIR"))      # encode.onnx, decode.onnx for onnxruntime and others; float32

    DIR/encode.pt2          images (B, 3, H, W) float32 in [0, 1] -> latent (B, L, H/p, W/p)
    DIR/decode.pt2          latent (B, L, h, w) -> pixels (B, 3, h*p, w*p) float32 in [0, 1]
    DIR/conventions.json    shapes and value ranges of inputs and outputs; also an extra file inside each .pt2
    DIR/*.onnx              the same functions; inputs `images` and `latent`, outputs `latent` and `pixels`

    program = torch.export.load("DIR/encode.pt2").module()
    latent = program(images)

Batch, height and width are free. Only sides of a single patch are not: torch.export takes a size of one for a constant.

Outputs are contiguous, and inputs must be. Programs compiled further by AOTInductor read inputs as contiguous without a
check, unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the environment.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from configs import UserError
from model.factory import Decoder
from model.tokenizer import VisualTokenizer, decode_pixels

CONVENTIONS = "conventions.json"
ONNX_PACKAGES = ("onnx", "onnxscript")
# Operators that only copy bf16 values: their results need no rounding.
COPY_OPERATORS = frozenset(
    ("cat", "chunk", "expand", "flatten", "getitem", "ones", "repeat", "select", "stack", "unbind", "unflatten",
     "unsqueeze", "zeros", "zeros_like")
)  # fmt: skip
MIN_SIDE = 2  # patches
MAX_SIDE, MAX_IMAGES = 4096, 65_536  # torch.export requires bounds; larger sizes are not known to fail


class _Encode(nn.Module):
    """encode as a module with only the weights that it uses: a program stores every weight of its module."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        super().__init__()
        read = {k: t for k, t in tokenizer.state_dict().items() if k.split(".")[0] in ("trunk", "bottleneck")}
        self.tokenizer = VisualTokenizer.from_state(tokenizer.model, read)

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)


class _Decode(nn.Module):
    """decode as a module."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        return decode_pixels(self.decoder, latent)


class _Bf16Emulation(fx.Interpreter):
    """Run a program with float32 operators only: bf16 results are computed in float32 and rounded to bf16.

    The values are the same, because bf16 operators compute so too. ONNX runtimes lack many bf16 operators (Sin, Cos),
    but have the conversions.
    """

    def run_node(self, node: fx.Node) -> Any:
        """Run one node; round its result where the program has it in bf16."""
        if node.op != "call_function" or node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None if node.op == "call_function" else super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        result = self.call_function(node.target, _bf16_to_float32(args), _bf16_to_float32(kwargs))
        value = node.meta.get("val")
        is_rounded = (
            isinstance(value, Tensor) and value.dtype == torch.bfloat16 and _operator_name(node) not in COPY_OPERATORS
        )
        return result.to(torch.bfloat16).to(torch.float32) if is_rounded else result


class _EmulatedProgram(nn.Module):
    """A program of one argument with emulated bf16, as a module that can be exported again."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def forward(self, x: Tensor) -> Any:
        return _Bf16Emulation(self.program).run(x)


def write_onnx(tokenizer: VisualTokenizer, directory: Path) -> None:
    """Write encode.onnx, decode.onnx and conventions.json into `directory`; no decode.onnx without a decoder.

    Raises UserError where the weights hold no bottleneck or are not float32, or a package is missing.
    """
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"{' and '.join(missing)} not installed: torch needs them to write ONNX; pip install onnx onnxscript"
        )
    if tokenizer.dtype != torch.float32:
        raise UserError(f"the weights are {tokenizer.dtype}, ONNX programs need float32: call tokenizer.float() first")
    patch = tokenizer.model.patch_size
    signatures = {"encode": (patch, "images", "latent"), "decode": (1, "latent", "pixels")}
    for name, program in _programs(tokenizer).items():
        step, input_name, output_name = signatures[name]
        [example] = program.example_inputs[0]
        emulated = _export(_EmulatedProgram(program), example, step)
        with _without_exporter_noise():
            onnx = torch.onnx.export(
                emulated, (example,), dynamo=True, verbose=False, input_names=[input_name], output_names=[output_name]
            )
        assert onnx is not None, "dynamo=True returns the program"
        directory.mkdir(parents=True, exist_ok=True)
        onnx.save(directory / f"{name}.onnx")
    _write_conventions(tokenizer, directory)


def write_programs(tokenizer: VisualTokenizer, directory: Path) -> None:
    """Write encode.pt2, decode.pt2 and conventions.json into `directory`; no decode.pt2 without a decoder.

    Raises UserError where the weights hold no bottleneck.
    """
    programs = _programs(tokenizer)
    text = _write_conventions(tokenizer, directory)
    for name, program in programs.items():
        torch.export.save(program, directory / f"{name}.pt2", extra_files={CONVENTIONS: text})


def encode_program(tokenizer: VisualTokenizer) -> ExportedProgram:
    """Export encode: images (B, 3, H, W) float32 in [0, 1] -> latent (B, L, H/p, W/p), sides multiples of p from 2p."""
    patch = tokenizer.model.patch_size
    example = torch.rand(2, 3, 3 * patch, 5 * patch, device=tokenizer.device)
    tokenizer.encode(example)  # raises UserError where a module is missing; export would wrap it
    return _export(_Encode(tokenizer), example, patch)


def decode_program(decoder: Decoder) -> ExportedProgram:
    """Export decode: latent (B, L, h, w) in the weights' dtype -> pixels (B, 3, h*p, w*p) in [0, 1]; h and w from 2."""
    return _export(_Decode(decoder), decoder.proj_in.weight.new_zeros(2, decoder.proj_in.in_features, 3, 5), 1)


def conventions(tokenizer: VisualTokenizer) -> dict[str, Any]:
    """Describe inputs and outputs of the programs, for JSON."""
    model, origin = tokenizer.model, tokenizer.origin
    image = {"shape": ["batch", 3, "height", "width"], "dtype": "float32", "range": [0, 1], "colour": "RGB"}
    latent = {
        "shape": ["batch", model.latent_channels, f"height / {model.patch_size}", f"width / {model.patch_size}"],
        "dtype": str(tokenizer.dtype).removeprefix("torch."),
    }
    return {
        "encode": {"images": image, "returns": latent},
        "decode": None if tokenizer.decoder is None else {"latent": latent, "returns": image},
        "strides": "contiguous, of inputs and outputs",
        "sides": f"multiples of {model.patch_size}, from {MIN_SIDE * model.patch_size} pixels on",
        "origin": None if origin is None else asdict(origin),
        "torch": torch.__version__,
    }


def _programs(tokenizer: VisualTokenizer) -> dict[str, ExportedProgram]:
    """Export encode and, where there is a decoder, decode."""
    programs = {"encode": encode_program(tokenizer)}
    if tokenizer.decoder is not None:
        programs["decode"] = decode_program(tokenizer.decoder)
    return programs


@contextmanager
def _without_exporter_noise() -> Iterator[None]:
    """Hide what torch's ONNX exporter reports about itself: that torchvision is absent, and its deprecated calls."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.*", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _write_conventions(tokenizer: VisualTokenizer, directory: Path) -> str:
    """Write conventions.json into `directory`; return its text."""
    text = json.dumps(conventions(tokenizer), indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONVENTIONS).write_text(text)
    return text


def _bf16_to_float32(arguments: Any) -> Any:
    """Replace the dtype bf16 in the arguments of an operator by float32."""
    if isinstance(arguments, Mapping):
        return {key: _bf16_to_float32(value) for key, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_bf16_to_float32(value) for value in arguments)
    return torch.float32 if arguments is torch.bfloat16 else arguments


def _operator_name(node: fx.Node) -> str:
    """Return the name of a node's operator: aten.cat.default -> "cat"."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _export(module: nn.Module, example: Tensor, step: int) -> ExportedProgram:
    """Export a module of one argument, whose sides are multiples of `step`."""
    batch, down, across = (
        Dim("batch", max=MAX_IMAGES),
        Dim("down", min=MIN_SIDE, max=MAX_SIDE),
        Dim("across", min=MIN_SIDE, max=MAX_SIDE),
    )
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: batch, 2: step * down, 3: step * across},))
