"""A directory in the public VTP layout: config.json and model.safetensors (or the parts of one).

`tokenizer.json`, the captions' vocabulary, may be saved with them: the layout does not need it, zero-shot does.

write_public(directory, state, config.model, Origin(image_size=256))
state, model, origin = read_public(directory)       # ours, or one that public code wrote
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.architecture import Model
from configs.permissions import follow_umask
from model.origin import METADATA, Origin
from model.public_config import image_size_of
from model.public_layout import from_public, to_public
from model.public_weights import LAYOUT, WEIGHTS, read_tensors

CONFIG = "config.json"
VOCABULARY = "tokenizer.json"


def read_public(directory: Path) -> tuple[dict[str, Tensor], Model, Origin]:
    """Weights under our names, the model they fit and what is known of them.

    Raises UserError for a missing or damaged file, and for all that `from_public` refuses.
    """
    described = read_config(directory)
    public, metadata = read_tensors(directory)
    try:
        state, model = from_public(public, described)
        text = metadata.get(METADATA)
        return state, model, Origin.from_json(text) if text else Origin(image_size_of(described))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """DIR/config.json. Raises UserError where it is missing or holds no keys and values."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{path} does not exist: {LAYOUT}")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} holds {type(described).__name__}, not keys and values")
    return described


def write_public(directory: Path, state: dict[str, Tensor], model: Model, origin: Origin) -> None:
    """Weights under our names -> both files. Raises UserError for a model that the layout cannot describe."""
    public, described = to_public(state, model, origin.image_size)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in public.items()}
    save_file(tensors, directory / WEIGHTS, {"format": "pt", METADATA: origin.to_json()})
    follow_umask(directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
