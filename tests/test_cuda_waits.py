"""The sync debug mode of a test is that test's alone; torch's CUDA calls are stood in for, so no GPU is needed."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.cuda_waits import sync_debug_mode, waits_of_host

pytestmark = pytest.mark.L0


class Modes:
    """torch's mode, which warns that it is a prototype whenever it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode: int | str = 0
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: int | str) -> None:
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )
        self.mode = mode


def test_the_mode_is_put_back_and_torchs_warning_of_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = Modes(monkeypatch)

    def fail() -> None:
        with sync_debug_mode("error"):
            assert modes.mode == "error"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert modes.mode == 0


def test_other_warnings_inside_are_still_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    Modes(monkeypatch)
    with pytest.raises(UserWarning, match="called a synchronizing"), sync_debug_mode("warn"):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_who_waits_is_collected_by_warning_and_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = Modes(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with waits_of_host() as waits:
        assert modes.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        torch.cuda.synchronize()
        warnings.warn("something else", stacklevel=1)
    assert sorted(wait.rpartition(":")[0] for wait in waits) == [
        "called a synchronizing CUDA operation in tests/test_cuda_waits.py",
        "torch.cuda in tests/test_cuda_waits.py",
    ]
    assert modes.mode == 0
