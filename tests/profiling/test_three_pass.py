"""The reference that benches compare with computes the same step: same losses, same gradients, more passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from profiling.benches.step import ThreePass, padded_inputs, reference_loss, shared_loss
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0


@pytest.mark.parametrize("ae_only", ["true", "false"])
def test_three_passes_give_the_losses_and_gradients_of_the_shared_one(ae_only: str) -> None:
    # In float32 rotations: a bf16 table rounds, and a last-bit difference before it can become 2^-9.
    config = tiny_config("model.rope_dtype=fp32", f"model.bottleneck_ae_only={ae_only}")
    batch, rows = random_batch(config, step=0), RankBatchSizes.per_rank(config, 1)
    found = []
    for model, inputs, total in (
        (Pretrainer(config, rows), model_inputs(batch), shared_loss),
        (ThreePass(config, rows), padded_inputs(batch, torch.device("cpu")), reference_loss),
    ):
        initialise(model, config)
        passes = count_calls(model)
        loss = total(model(**inputs), config.objectives, 0.07)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}, passes))
    (expected, expected_grads, shared_passes), (loss, grads, passes) = found
    assert (len(shared_passes), len(passes)) == (1, 4), "packed; clip, global crops, local crops, rec"
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, grad in expected_grads.items():
        if grad is not None:
            # Worst seen 4e-6 of the largest: sums in another order.
            assert (grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, name


def count_calls(model: Pretrainer) -> list[int]:
    """A list that grows by one at every pass of the student's first block."""
    calls: list[int] = []

    def count(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(len(inputs[0]))

    model.trunk.blocks[0].register_forward_pre_hook(count)
    return calls
