"""A file of a trained generator: safetensors, with all that sampling needs written beside the tensors.

    write_generator("runs/dit/generator.safetensors", state, section, shape, num_classes=1000, mean_L, std_L, tokenizer)
    loaded = read_generator("runs/dit/generator.safetensors")
    latents = loaded.denormalised(loaded.module.sample(labels_B, sampling, draws))      # what the tokenizer decodes

`tokenizer` is the digest (model/weights.py) of the weights whose latents were learnt; None where it is not known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.generator import Generator
from configs.permissions import follow_umask
from model.generator.build import AnyGenerator, build
from model.generator.shape import LatentShape
from model.weights import opened

METADATA = "generator"  # the key of a safetensors file under which ours lies, as JSON
_SECTION: TypeAdapter[Generator] = TypeAdapter(Generator)


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator as trained, and the latents it was trained on; `tokenizer` is the digest of what made them."""

    module: AnyGenerator
    section: Generator
    shape: LatentShape
    num_classes: int
    mean_L: Tensor  # float32, of each channel over the corpus
    std_L: Tensor
    tokenizer: str | None

    def denormalised(self, latents_BLhw: Tensor) -> Tensor:
        """(B, L, h, w) as the generator gives them -> as the tokenizer made them."""
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
    """Write `state`, the state_dict of the generator that `build` makes of the other arguments, to `path`.

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
    save_file(tensors, path, {METADATA: json.dumps(described)})
    follow_umask(path)


def read_generator(path: str | Path, attention: str = "sdpa") -> LoadedGenerator:
    """The generator at `path`, on the host and in evaluation mode; `attention` is a resolved backend.

    Raises UserError for a file that is missing, damaged, of another kind, of another version or incomplete.
    """
    path = Path(path)
    with opened(path) as stored:
        described = _described(stored.metadata() or {}, path)
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
        module = build(section, shape, num_classes, attention)
    _check(state, module.state_dict(), path)
    module.load_state_dict(state, assign=True)
    return LoadedGenerator(module.eval(), section, shape, num_classes, mean_L, std_L, tokenizer)


def _described(metadata: dict[str, str], path: Path) -> Any:
    if METADATA in metadata:
        return json.loads(metadata[METADATA])
    found = "the weights of a tokenizer" if "model" in metadata else "tensors that nothing describes"
    raise UserError(f"{path} holds {found}, not a generator: give what a run of kind generator wrote")


def _check(state: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Refuses tensors that are not those of the generator the file describes."""
    for name, tensor in wanted.items():
        found = "missing" if name not in state else str(tuple(state[name].shape))
        if found != str(tuple(tensor.shape)):
            raise UserError(
                f"{path}: {name} is {found}, the generator it describes has {tuple(tensor.shape)} there: the file is "
                "not as it was written; export it again"
            )
    if surplus := sorted(state.keys() - wanted.keys()):
        raise UserError(f"{path}: {surplus[0]} has no place in the generator it describes; export it again")
