"""Files of trained weights: safetensors under our names, with the model section of the config and their origin inside.

    write_weights("runs/demo/weights.safetensors", state, config.model, WeightsOrigin.of(config, steps=400))
    state, model = read_weights("runs/demo/weights.safetensors")
    read_origin("runs/demo/weights.safetensors").steps      # 400

What the metadata of a file lacks is read from the `config.yaml` beside it, as in a run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import Config, UserError, fingerprint, load_config
from configs.command_line import apply_umask
from configs.model import Model

ORIGIN_KEY = "vtp_engine.origin"  # key in the metadata of a safetensors file
RUN_WEIGHTS = "weights.safetensors"  # in a run's directory


@dataclass(frozen=True)
class WeightsOrigin:
    """Where weights come from, as far as known; stored in the metadata of every safetensors file written here.

        WeightsOrigin(image_size=256, name="vtp_b", steps=100_000, fingerprint="3f0c5a1be0d2f9a7")
        WeightsOrigin(image_size=256)       # a public directory: its config.json has the image size alone

    `image_size` in pixels is that of clip and rec in training; `fingerprint` is that of the science settings.
    """

    image_size: int
    name: str | None = None
    steps: int | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, config: Config, steps: int | None = None) -> WeightsOrigin:
        """From a run's config, and its number of steps if known."""
        return cls(config.views.image_size, config.name, steps, fingerprint(config))

    @classmethod
    def from_json(cls, text: str) -> WeightsOrigin:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """As JSON in one line."""
        return json.dumps(asdict(self))


def write_weights(
    path: str | Path, state: dict[str, Tensor], model: Model, origin: WeightsOrigin | None = None
) -> None:
    """Write `state`, under our names (trunk.blocks.0.attn.qkv.weight, ...), to `path`."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"model": model.model_dump_json()} | ({} if origin is None else {ORIGIN_KEY: origin.to_json()})
    save_file(tensors, path, metadata)
    apply_umask(path)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Model]:
    """Read the weights at `path` and the model section that describes them.

    Raises UserError where there is no such file, where it is not safetensors, or where nothing describes the
    model.
    """
    path = Path(path)
    with open_weights(path) as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        return state, read_model_section(stored, path)


def read_origin(path: str | Path) -> WeightsOrigin | None:
    """Read where the weights at `path` come from, as far as known. Raises like `read_weights`."""
    path = Path(path)
    with open_weights(path) as stored:
        text = (stored.metadata() or {}).get(ORIGIN_KEY)
    if text is not None:
        return WeightsOrigin.from_json(text)
    config = path.parent / "config.yaml"
    return WeightsOrigin.of(load_config(config)) if config.is_file() else None


def read_model_section(stored: Any, path: Path) -> Model:
    """Return the model section in an open weights file, or in the config beside it. Raises UserError."""
    metadata = stored.metadata() or {}
    described = metadata.get("model")
    if described is None:
        config = path.parent / "config.yaml"
        if "generator" in metadata or not config.is_file():
            found = "a generator, not a tokenizer" if "generator" in metadata else "tensors without a model description"
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


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a weights file; tensors are read on demand. Raises like `read_weights`."""
    if not path.is_file():
        run = path.parent
        remedy = (
            f"this one has checkpoints: `python -m engine.consolidate {run} --out {path}` writes the weights of the "
            "latest"
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


def weights_of_run(run: Path) -> Path:
    """Return the weights file of a run directory.

    Raises UserError where it is of another step than the run's latest checkpoint: a resumed run writes its weights file
    only at its end.
    """
    path, latest = run / RUN_WEIGHTS, run / "checkpoints" / "latest"
    if not latest.is_file() or not path.is_file():
        return path
    with open_weights(path) as stored:
        metadata = stored.metadata() or {}
    described = (json.loads(metadata[key]) for key in (ORIGIN_KEY, "generator") if key in metadata)
    steps = next((found["steps"] for found in described if found.get("steps") is not None), None)
    named = latest.read_text(errors="replace").strip()
    if steps is not None and named != f"step-{steps:08d}":
        raise UserError(
            f"{path} holds the weights of step {steps}, but the run's latest checkpoint is {named[:80]}: the run was "
            f"resumed after they were written; write those of the checkpoint with `python -m engine.consolidate {run} "
            f"--out {path}`, or give the path of the file itself to use it as it is"
        )
    return path


def digest(path: Path) -> str:
    """Return the sha256 of the tensors at `path`, their names, types and shapes. Raises like `read_weights`.

    Not of the file: the order of metadata in it is arbitrary.
    """
    with open_weights(path):  # raises where the file is cut off
        pass
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()


def read_torch_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a public torch file's state dict onto the host: tensors only, never code.

    Raises UserError where it is missing, cut off or another kind of file.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many types
        reason = " ".join(str(error).split())[:200]
        if "weights_only" in reason:  # torch's own message advises to load it with code
            reason = "it is no torch file, or holds more than tensors"
        raise UserError(f"{path} is not a readable torch state dict ({reason}); fetch it anew") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}, not a state dict")
    return stored
