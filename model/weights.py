"""A file of trained weights: safetensors under our names, with the model's half of the config inside.

    write_weights("runs/demo/weights.safetensors", state, config.model)
    state, model = read_weights("runs/demo/weights.safetensors")

A file written without that half is read with the `config.yaml` beside it, as in a run directory.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError, load_config
from configs.architecture import Model


def write_weights(path: str | Path, state: dict[str, Tensor], model: Model) -> None:
    """`state` under our names (trunk.blocks.0.attn.qkv.weight, ...) to `path`."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"model": model.model_dump_json()})


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Model]:
    """The weights at `path` and the model they fit.

    Raises UserError where there is no such file, where it is not safetensors, or where nothing describes the
    model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: a run has weights once training wrote them; check the path")
    try:
        with safe_open(path, "pt") as stored:
            described = (stored.metadata() or {}).get("model")
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); only that format is read") from None
    model = Model.model_validate_json(described) if described else load_config(path.parent / "config.yaml").model
    return state, model
