"""Build generators from their config section; write and read trained ones.

    generator = build_generator(Diffusion(width=192, depth=6, heads=3), LatentShape(16, 8, 8), num_classes=10)
    block_classes(generator)    # [ModulatedBlock]: ZeRO-3 leaves, compiled and recomputed as one

    write_generator("runs/dit/generator.safetensors", state, section, shape, num_classes=1000, mean_L, std_L, tokenizer)
    loaded = read_generator("runs/dit/generator.safetensors")
    latents = loaded.denormalised(loaded.module.sample(labels_B, sampling, draws))      # what the tokenizer decodes

A file is safetensors with all settings that sampling needs in its metadata. `tokenizer` is the digest
(model/weights.py) of the weights whose latents were learned; None where it is not known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import UserError
from configs.command_line import apply_umask
from configs.generator import Autoregressive, Generator
from model.generator.autoregressive import AutoregressiveGenerator
from model.generator.autoregressive_networks import HeadBlock
from model.generator.blocks import ModulatedBlock, TokenBlock
from model.generator.diffusion import DiffusionGenerator
from model.generator.tokens import LatentShape
from model.weights import open_weights

AnyGenerator: TypeAlias = DiffusionGenerator | AutoregressiveGenerator
BLOCK_CLASSES = (ModulatedBlock, TokenBlock, HeadBlock)
GENERATOR_KEY = "generator"  # key of the settings, as JSON, in the metadata of a safetensors file
_SECTION: TypeAdapter[Generator] = TypeAdapter(Generator)


def build_generator(section: Generator, shape: LatentShape, num_classes: int, attention: str = "sdpa") -> AnyGenerator:
    """Build the module, its parameters not yet initialised (model/initialise.py). `attention` is a resolved backend."""
    if isinstance(section, Autoregressive):
        return AutoregressiveGenerator(section, shape, num_classes, attention)
    return DiffusionGenerator(section, shape, num_classes, attention)


def block_classes(generator: nn.Module) -> list[type[nn.Module]]:
    """Return the block classes in `generator`."""
    return [kind for kind in BLOCK_CLASSES if any(isinstance(module, kind) for module in generator.modules())]


@dataclass(frozen=True)
class LoadedGenerator:
    """A trained generator and the statistics of its latents; `tokenizer` is the digest of their tokenizer."""

    module: AnyGenerator
    section: Generator
    shape: LatentShape
    num_classes: int
    mean_L: Tensor  # float32, by channel over the corpus
    std_L: Tensor
    tokenizer: str | None

    def denormalised(self, latents_BLhw: Tensor) -> Tensor:
        """Generated latents (B, L, h, w) -> latents of the tokenizer's scale."""
        mean_L11, std_L11 = (t.to(latents_BLhw.device).view(-1, 1, 1) for t in (self.mean_L, self.std_L))
        return latents_BLhw * std_L11 + mean_L11


def write_generator(
    path: str | Path,
    state: dict[str, Tensor],
    section: Generator,
    shape: LatentShape,
    num_classes: int,
    mean_L: Tensor,
    std_L: Tensor,
    tokenizer: str | None,
    steps: int | None = None,
) -> None:
    """Write `state`, the state_dict of the generator that `build_generator` makes of the other arguments, to `path`.

    `mean_L` and `std_L` (L,) are those of the latents; `steps` is the number of training steps, None where unknown.
    """
    assert mean_L.shape == std_L.shape == (shape.channels,), (mean_L.shape, std_L.shape, shape)
    described = {
        "section": section.model_dump(mode="json"),
        "shape": [shape.channels, shape.height, shape.width],
        "num_classes": num_classes,
        "mean": mean_L.tolist(),
        "std": std_L.tolist(),
        "tokenizer": tokenizer,
        "steps": steps,
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, path, {GENERATOR_KEY: json.dumps(described)})
    apply_umask(path)


def read_generator(path: str | Path, attention: str = "sdpa") -> LoadedGenerator:
    """Read the generator at `path`, on the host and in evaluation mode; `attention` is a resolved backend.

    Raises UserError for a file that is missing, damaged, of another kind, of another version or incomplete.
    """
    path = Path(path)
    with open_weights(path) as stored:
        described = _read_description(stored.metadata() or {}, path)
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    try:
        section = _SECTION.validate_python(described["section"])
        shape, num_classes = LatentShape(*described["shape"]), int(described["num_classes"])
        mean_L, std_L = (torch.tensor(described[key], dtype=torch.float32) for key in ("mean", "std"))
        tokenizer = described["tokenizer"]
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else repr(error)
        raise UserError(
            f"{path} describes a generator of another version ({reason}); read it with the version that wrote it"
        ) from None
    with torch.device("meta"):
        module = build_generator(section, shape, num_classes, attention)
    _check_tensors(state, module.state_dict(), path)
    module.load_state_dict(state, assign=True)
    return LoadedGenerator(module.eval(), section, shape, num_classes, mean_L, std_L, tokenizer)


def _read_description(metadata: dict[str, str], path: Path) -> Any:
    if GENERATOR_KEY in metadata:
        return json.loads(metadata[GENERATOR_KEY])
    found = "the weights of a tokenizer" if "model" in metadata else "tensors without a description"
    raise UserError(f"{path} holds {found}, not a generator: give what a run of kind generator wrote")


def _check_tensors(state: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Raise UserError for tensors that the described generator does not have, or has in another shape."""
    for name, tensor in wanted.items():
        found = "missing" if name not in state else str(tuple(state[name].shape))
        if found != str(tuple(tensor.shape)):
            raise UserError(
                f"{path}: {name} is {found}, the generator it describes has {tuple(tensor.shape)} there: the file is "
                "not as it was written; export it again"
            )
    if surplus := sorted(state.keys() - wanted.keys()):
        raise UserError(f"{path}: {surplus[0]} has no place in the generator it describes; export it again")
