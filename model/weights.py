"""A file of trained weights: safetensors under our names, with the model's half of the config inside.

    write_weights("runs/demo/weights.safetensors", state, config.model, Origin.of(config, steps=400))
    state, model = read_weights("runs/demo/weights.safetensors")
    read_origin("runs/demo/weights.safetensors").steps      # 400

What a file does not say of itself is read from the `config.yaml` beside it, as in a run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError, load_config
from configs.architecture import Model
from configs.permissions import follow_umask
from model.origin import METADATA, Origin

RUN_WEIGHTS = "weights.safetensors"  # in a run's directory


def write_weights(path: str | Path, state: dict[str, Tensor], model: Model, origin: Origin | None = None) -> None:
    """`state` under our names (trunk.blocks.0.attn.qkv.weight, ...) to `path`."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"model": model.model_dump_json()} | ({} if origin is None else {METADATA: origin.to_json()})
    save_file(tensors, path, metadata)
    follow_umask(path)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Model]:
    """The weights at `path` and the model they fit.

    Raises UserError where there is no such file, where it is not safetensors, or where nothing describes the
    model.
    """
    path = Path(path)
    with opened(path) as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        return state, described_model(stored, path)


def read_origin(path: str | Path) -> Origin | None:
    """Where the weights at `path` come from, as far as it is known. Raises like `read_weights`."""
    path = Path(path)
    with opened(path) as stored:
        text = (stored.metadata() or {}).get(METADATA)
    if text is not None:
        return Origin.from_json(text)
    config = path.parent / "config.yaml"
    return Origin.of(load_config(config)) if config.is_file() else None


def weights_of_run(run: Path) -> Path:
    """Return the weights file of a run directory.

    Raises UserError where it is of another step than the run's latest checkpoint: a resumed run writes its weights file
    only at its end.
    """
    path, latest = run / RUN_WEIGHTS, run / "checkpoints" / "latest"
    if not latest.is_file() or not path.is_file():
        return path
    with opened(path) as stored:
        metadata = stored.metadata() or {}
    described = (json.loads(metadata[key]) for key in (METADATA, "generator") if key in metadata)
    steps = next((found["steps"] for found in described if found.get("steps") is not None), None)
    named = latest.read_text(errors="replace").strip()
    if steps is not None and named != f"step-{steps:08d}":
        raise UserError(
            f"{path} holds the weights of step {steps}, but the run's latest checkpoint is {named[:80]}: the run was "
            f"resumed after they were written; write those of the checkpoint with `python -m engine.archive {run} "
            f"--out {path}`, or give the path of the file itself to use it as it is"
        )
    return path


def digest(path: Path) -> str:
    """sha256 of the tensors at `path`, their names, types and shapes. Raises like `read_weights`.

    Not of the file: in which order a writer lays out the words beside the tensors is chance.
    """
    with opened(path):  # is it whole?
        pass
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The weights file, its tensors read when asked for. Raises like `read_weights`."""
    if not path.is_file():
        run = path.parent
        remedy = (
            f"this one has checkpoints: `python -m engine.archive {run} --out {path}` writes the weights of the latest"
            if any((run / "checkpoints").glob("step-*"))
            else "check the path"
        )
        raise UserError(f"{path} does not exist: a run has weights once training wrote them; {remedy}")
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file, or is cut off ({error}); only that format is read"
        ) from None


def described_model(stored: Any, path: Path) -> Model:
    """The model that an opened weights file fits, by its own words or the config's beside it. Raises UserError."""
    metadata = stored.metadata() or {}
    described = metadata.get("model")
    if described is None:
        config = path.parent / "config.yaml"
        if "generator" in metadata or not config.is_file():
            found = "a generator, not a tokenizer" if "generator" in metadata else "tensors that nothing describes"
            raise UserError(
                f"{path} holds {found}: give weights.safetensors of a run that trained a tokenizer, the file that "
                "`python -m model.interchange import` wrote, or, to evaluate, the directory of a public one"
            )
        return load_config(config).model
    try:
        return Model.model_validate_json(described)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} describes a model of another version ({'.'.join(map(str, first['loc']))}: {first['msg']}); import "
            "its public directory again, or read it with the version that wrote it"
        ) from None
