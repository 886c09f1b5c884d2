"""The weights of a public directory: one file, or several with an index, as Hugging Face's libraries cut large models.

DIR/model.safetensors                       one file
DIR/model.safetensors.index.json            {"weight_map": {"head.weight": "model-00002-of-00002.safetensors", ...}}
DIR/model-00001-of-00002.safetensors ...    the files that it names

tensors, metadata = read_tensors(directory)
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs import UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LAYOUT = f"the public layout is config.json and {WEIGHTS}, or {INDEX} and the files it names"


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by name, and the words beside them. Raises UserError for what is missing, damaged, or does not fit
    the index."""
    if (directory / WEIGHTS).is_file() or not (directory / INDEX).is_file():
        return _read(directory / WEIGHTS)
    where = read_index(directory / INDEX)
    files = {file: _read(directory / file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in files[file][0]:
            raise UserError(f"{directory / file} holds no {name}, though {INDEX} says so; fetch both again")
    words = {key: value for _, metadata in files.values() for key, value in metadata.items()}
    return {name: files[file][0][name] for name, file in where.items()}, words


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it. Raises UserError for an index that is damaged or leaves its
    directory."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path} has no weight_map from names of tensors to files; fetch it again")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} puts {name} into {file!r}: only *.safetensors beside it are read")
    return where


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: {LAYOUT}")
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is cut off or no safetensors file ({error}); fetch it again") from None
