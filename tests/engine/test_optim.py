"""Whose code takes a step changes the time, not the step; what cannot be had is said with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import _get_build_directory

from configs import UserError
from configs.deepspeed import load_ds_config
from configs.run import Optim
from engine import optim, zero
from model.losses.comm import Comm
from tests.engine import ranks
from tests.harness import run_ranks
from tests.tiny import tiny_config

L0, L1 = pytest.mark.L0, pytest.mark.L1
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTINGS = Optim(steps=10, lr=1e-2, weight_decay=0.3)


class StubAdam(torch.optim.Optimizer):
    """The contract of apex.optimizers.FusedAdam: steps counted by group, the first parameter of each looked at."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        weight_decay: float = 0.0,
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["params"][0].device.type == "cpu"  # raises for an empty group, as apex does
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                self.move(p, state, group)

    def move(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """AdamW's step, eq. of Loshchilov and Hutter."""
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * self.direction(p, state, group))

    def direction(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Bias-corrected first moment over the root of the second."""
        (one, two), mean, square, step = group["betas"], state["exp_avg"], state["exp_avg_sq"], group["step"]
        mean.lerp_(p.grad, 1 - one)
        square.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
        return mean / (1 - one**step) / ((square / (1 - two**step)).sqrt() + group["eps"])


class StubLamb(StubAdam):
    """The contract of apex.optimizers.FusedLAMB."""

    def __init__(self, params: Any, max_grad_norm: float = 1.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.max_grad_norm = max_grad_norm

    def move(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """LAMB's step (arXiv 1904.00962, algorithm 2); no trust ratio where there is no decay."""
        update = self.direction(p, state, group) + group["weight_decay"] * p
        trust = p.norm() / update.norm() if group["weight_decay"] else 1.0
        p.sub_(group["lr"] * trust * update)


def put_apex_in_place() -> None:
    module = ModuleType("apex.optimizers")
    module.FusedAdam, module.FusedLAMB = StubAdam, StubLamb  # type: ignore[attr-defined]
    sys.modules["apex"], sys.modules["apex.optimizers"] = ModuleType("apex"), module


@pytest.fixture
def apex() -> Iterator[None]:
    put_apex_in_place()
    yield
    del sys.modules["apex"], sys.modules["apex.optimizers"]


def ten_steps(name: str, settings: Optim = SETTINGS) -> dict[str, Tensor]:
    """Weights of a small model after ten steps on gradients that depend on the step alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 5))
    optimizer = optim.build(model, settings, name)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def is_built(name: str) -> bool:
    """Whether DeepSpeed has compiled the extension on this machine already: it takes minutes."""
    library = {"deepspeed": "fused_adam", "deepspeed_cpu": "cpu_adam"}[name]
    return (Path(_get_build_directory(library, verbose=False)) / f"{library}.so").is_file()


@L0
@pytest.mark.parametrize("name", ["torch_fused", "deepspeed", "deepspeed_cpu", "apex"])
@pytest.mark.usefixtures("apex")
def test_ten_steps_of_every_adamw_equal_torchs(name: str) -> None:
    if name.startswith("deepspeed") and not is_built(name):
        pytest.skip(f"DeepSpeed's {name} is not compiled on this machine: its first use does it, in minutes")
    theirs = ten_steps("torch")
    for key, ours in ten_steps(name).items():
        # Measured worst 1.2e-7 of weights up to 1. Without bias correction, or with L2 instead of decay: 1e-2.
        torch.testing.assert_close(ours, theirs[key], rtol=0, atol=2e-6)


@L0
@pytest.mark.usefixtures("apex")
def test_lamb_has_a_trust_ratio_per_matrix_and_none_for_vectors() -> None:
    settings = SETTINGS.model_copy(update={"kind": "lamb"})
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    optimizer = optim.build(model, settings, "apex")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    assert optimizer.max_grad_norm == float("inf"), "ZeRO clips"  # type: ignore[attr-defined]
    lamb, adamw = ten_steps("apex", settings), ten_steps("torch")
    assert not torch.allclose(lamb["0.weight"], adamw["0.weight"], atol=1e-3)
    torch.testing.assert_close(lamb["0.bias"], adamw["0.bias"], rtol=0, atol=2e-6)


def train_with_apex(comm: Comm, *overrides: str) -> ranks.Trained:
    put_apex_in_place()
    return ranks.train(comm, tiny_config(*overrides), "zero3", 4)


@L1
def test_under_zero_3_apex_takes_torchs_steps_and_lamb_others() -> None:
    torchs = run_ranks(ranks.train, 2, tiny_config("system.optimizer=torch"), "zero3", 4)[0]
    apexs = run_ranks(train_with_apex, 2, "system.optimizer=apex")[0]
    # Measured worst 1e-7. An optimizer that counts its steps once a group and not once a step is off in the second.
    assert apexs.losses == pytest.approx(torchs.losses, rel=1e-5)
    lambs = run_ranks(train_with_apex, 2, "optim.kind=lamb")[0]
    assert lambs.losses != pytest.approx(torchs.losses, rel=1e-3)
    assert lambs.losses[-1] < lambs.losses[0]


@L0
def test_auto_names_its_reason_and_every_dead_end_its_remedy() -> None:
    def resolve(stage: str, device: torch.device, *overrides: str) -> optim.OptimizerChoice:
        config = tiny_config(*overrides)
        return optim.resolve(config, load_ds_config(ranks.DEEPSPEED / f"{stage}.json", config, 1), device)

    assert resolve("zero3", GPU) == optim.OptimizerChoice(
        "torch_fused", "auto: one pass over weights, gradients and moments on cuda"
    )
    assert resolve("zero3_offload", GPU).reason.endswith("on cpu")
    assert resolve("zero3", GPU, "optim.kind=lamb").name == "apex"
    assert resolve("zero3_offload", GPU, "system.optimizer=deepspeed_cpu").name == "deepspeed_cpu"
    with pytest.raises(UserError, match=r"torch_fused has no optim.kind=lamb: .* choose apex or optim.kind=adamw"):
        resolve("zero3", GPU, "optim.kind=lamb", "system.optimizer=torch_fused")
    with pytest.raises(UserError, match=r"apex steps on the GPU, offload_optimizer keeps its states on the host"):
        resolve("zero3_offload", GPU, "system.optimizer=apex")
    with pytest.raises(UserError, match=r"deepspeed_cpu steps on the host, the states are on the GPU"):
        resolve("zero3", GPU, "system.optimizer=deepspeed_cpu")


@L0
def test_what_is_not_installed_or_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"system.optimizer=apex: No module named 'apex'.* NVIDIA's apex .*: APEX_CPP"):
        ten_steps("apex")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op") from OSError("no compiler:\n g++ not found")

    monkeypatch.setattr(zero, "deepspeed_adamw", fail)
    with pytest.raises(
        UserError, match=r"deepspeed_cpu: .* failed \(OSError: no compiler: g\+\+ not found\); it wants"
    ):
        ten_steps("deepspeed_cpu")


@L0
def test_the_lock_of_a_killed_build_is_an_error_and_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, times=(0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"cpu_adam/lock is \d+ minutes old .* remove the file"):
        optim.build(torch.nn.Linear(2, 2), tiny_config().optim, "deepspeed_cpu")
