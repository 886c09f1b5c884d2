"""What the engine writes is as readable as the umask says, whatever mode a library chose."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.command_line import apply_umask
from engine.checkpoint.tensor_ranges import TensorRange, write_ranges
from model.weights import write_weights
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_has_the_mode_that_open_would_have_given_it(umask: int, tmp_path: Path) -> None:
    ours, plain = tmp_path / "ours", tmp_path / "plain"
    ours.touch(0o600)
    apply_umask(ours)
    plain.write_text("")
    assert mode(ours) == mode(plain) == 0o666 & ~umask
    assert os.umask(umask) == umask, "and the umask is as it was"


def test_weights_and_checkpoints_can_be_read_by_whom_the_umask_lets(umask: int, tmp_path: Path) -> None:
    write_weights(tmp_path / "weights.safetensors", {"a": torch.ones(2)}, tiny_config().model)
    write_ranges(tmp_path / "rank-00000.safetensors", [TensorRange("fp32", "a", 0, torch.ones(2))])
    for name in ("weights.safetensors", "rank-00000.safetensors"):
        assert mode(tmp_path / name) == 0o666 & ~umask
