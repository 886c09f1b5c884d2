"""The engine on one GPU: the same training as on the CPU, compiled as there, and resumed to the same bits.

What several ranks do is shown on the CPU; here is what a device changes: kernels, precisions, events, graphs.
"""

from pathlib import Path

import pytest
import torch

from tests.engine import golden_variants, ranks, test_compile, test_golden
from tests.engine.golden_variants import VARIANTS
from tests.engine.test_deterministic import ASKED
from tests.harness import run_ranks
from tests.tiny import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 20


@pytest.mark.parametrize(("stage", "compiled"), [("zero1", "off"), ("zero3", "on")])
def test_twenty_steps_are_those_of_plain_adamw_on_the_cpu(stage: str, compiled: str) -> None:
    # Noise stays noise by this eps: tests/engine/test_zero_training.
    config = tiny_config(f"optim.steps={STEPS}", "optim.eps=1e-4", f"system.compile={compiled}")
    plain = ranks.train_plainly(config, STEPS)
    [found] = run_ranks(ranks.train, 1, config, stage, STEPS, timeout=300.0)
    # Another device sums in another order [D]: 50 times what another processor may differ by after ten steps.
    assert found.losses == pytest.approx(plain.losses, rel=5e-4)
    for name, weight in (plain.weights | plain.teacher).items():
        assert ((found.weights | found.teacher)[name] - weight).abs().max().item() < 1e-3, name  # wrong steps: 2e-2


def test_bf16_follows_fp32() -> None:
    losses = {
        precision: run_ranks(
            ranks.train,
            1,
            tiny_config(f"optim.steps={STEPS}", f"optim.precision={precision}", f"system.compile={compiled}"),
            "zero1",
            STEPS,
            timeout=300.0,
        )[0].losses
        for precision, compiled in (("fp32", "off"), ("bf16", "on"))
    }
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)  # a step of rate 1e-3 changes them by up to 0.05


def test_blocks_compile_without_breaks_and_only_at_first() -> None:
    [seen] = run_ranks(test_compile.count, 1, 4, timeout=500.0)
    assert [step["breaks"] for step in seen] == [0, 0, 0, 0]
    assert seen[-1]["graphs"] == seen[1]["graphs"]


def test_a_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    [(whole, resumed)] = run_ranks(ranks.save_and_go_on, 1, tiny_config(*ASKED, "system.compile=off"), tmp_path)
    assert resumed == whole


def test_ten_steps_are_those_of_the_golden_run(tmp_path: Path) -> None:
    name, variant = "zero3_1rank", VARIANTS["zero3_1rank"]
    [found] = run_ranks(golden_variants.run, 1, {name: variant}, tmp_path)
    losses, golden = (
        [step["loss"] for step in steps] for steps in (found[name], test_golden.golden(variant.kind)[1][name])
    )
    # 1e-5 between processors; another device has other exponentials too [D].
    assert losses == pytest.approx(golden, rel=5e-4)
