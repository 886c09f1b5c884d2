"""The same run twice is the same bits, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import UserError
from engine import process_settings
from kernels.attention import resolve_attention
from model.losses.comm import Comm
from tests.engine.health import runs
from tests.engine.health.runs import Spoilt, difference
from tests.harness import run_ranks
from tests.tiny import tiny_config

ASKED = ("system.deterministic=true", "system.loader.device=cpu")


def train_twice(comm: Comm, root: Path) -> tuple[list[str], bool, str]:
    config = tiny_config(*ASKED, "optim.steps=3", "model.trunk.drop_path=0.4", "optim.precision=bf16")
    first, again = (runs.train(comm, config, root / name, Spoilt()) for name in ("first", "again"))
    asked, index = torch.zeros(4), torch.tensor([0, 0])
    told = ""
    try:
        asked.put_(index, torch.ones(2), accumulate=False)  # of two writes to one place, either may win
    except RuntimeError as error:
        told = str(error)
    return difference(first, again), torch.are_deterministic_algorithms_enabled(), told


@pytest.mark.L1
def test_two_runs_are_the_same_bits_and_torch_was_told(tmp_path: Path) -> None:
    for differs, is_on, told in run_ranks(train_twice, 2, tmp_path):
        assert differs == []
        assert is_on
        assert "put_" in told, "an operator without a fixed order raises"
    said = (tmp_path / "first" / "log.txt").read_text()
    assert "deterministic: on (system.deterministic)" in said


@pytest.mark.L0
def test_what_cannot_be_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"deterministic=true but loader\.device=gpu"):
        tiny_config("system.deterministic=true", "system.loader.device=gpu")
    with pytest.raises(UserError, match="deterministic=true but linear=fp8_te"):
        tiny_config("system.deterministic=true", "system.linear=fp8_te", "optim.precision=bf16")
    with pytest.raises(UserError, match=r"system\.loader\.device=auto: images would be decoded on the GPU"):
        process_settings.enforce_determinism(tiny_config("system.deterministic=true"), torch.device("cuda"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"):
        process_settings.enforce_determinism(tiny_config(*ASKED), torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    for backend in ("flash3", "xformers"):
        with pytest.raises(ValueError, match="not deterministic"):
            resolve_attention(backend, "cuda", is_deterministic=True)
    assert process_settings.enforce_determinism(tiny_config(), torch.device("cpu")).startswith("no more")


def steps_twice(comm: Comm) -> list[str]:
    from tests.engine import ranks

    config = tiny_config(*ASKED, "optim.steps=6", "optim.precision=bf16", "model.trunk.drop_path=0.4")
    found = []
    for _ in range(2):
        parts = ranks.build(config, comm, "zero3")
        losses, _ = ranks.run_steps(parts, config, comm, 0, 4)
        found.append(ranks.outcome(parts, losses))
    assert found[0].losses == found[1].losses
    return difference(found[0].weights, found[1].weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_are_the_same_bits_twice() -> None:
    assert run_ranks(steps_twice, 1, timeout=300.0) == [[]]  # it compiles
