"""The reference values our code is compared with, where they lie beside the checkout.

They were computed once with the public reference implementations and are too large for this repository, so a
test that needs them is skipped, with the path it looked for, on a machine without them.

    values = reference("losses")              # {"clip_image": Tensor, ...}
    config = reference_metadata("tokenizer_default")["config"]     # JSON text
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

DIRECTORY = Path(__file__).resolve().parents[2] / "shared" / "parity"


def reference(name: str) -> dict[str, Tensor]:
    """Every tensor of `NAME.safetensors`; skips the calling test, with a reason, where it is absent."""
    with safe_open(_path(name), "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)


def reference_metadata(name: str) -> dict[str, str]:
    """The free-text metadata of `NAME.safetensors`; skips like `reference`."""
    with safe_open(_path(name), "pt") as stored:
        return dict(stored.metadata() or {})


def _path(name: str) -> Path:
    path = DIRECTORY / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference values: {path} is not beside this checkout")
    return path
