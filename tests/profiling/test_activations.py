"""What a forward without memory keeps is what the real one keeps."""

from __future__ import annotations

import pytest
import torch

from engine.zero import DTYPES
from model.initialise import initialise
from model.pretrainer import Pretrainer, Rows
from profiling.activations import of_forward, saved
from profiling.memory import peak_bytes
from profiling.workload import random_batch as small_batch
from profiling.workload import small_step
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0


@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forward_without_memory_keeps_what_the_real_one_keeps(precision: str, attention: str) -> None:
    config = tiny_config(f"optim.precision={precision}")
    rows, batch = Rows.per_rank(config, 1), random_batch(config, 0)
    torch.set_default_dtype(DTYPES[precision])
    try:
        model = Pretrainer(config, rows, attention)
        initialise(model, config)
        real = of_forward(model, model_inputs(batch))
    finally:
        torch.set_default_dtype(torch.float32)
    predicted = saved(config, rows, batch, attention)
    assert predicted == real
    assert "teacher" not in predicted
    assert predicted["trunk"] > predicted["decoder"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's counter")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_is_nearly_all_that_a_forward_needs(precision: str) -> None:
    small = ("batch.clip=4", "batch.ssl=2", "batch.rec=1", "views.num_locals=2", "model.prototypes.num=1024")
    shallow = [f"model.{part}.depth={depth}" for part, depth in (("trunk", 4), ("text", 2), ("decoder", 2))]
    config = small_step(*small, *shallow, f"optim.precision={precision}")
    rows, batch = Rows.per_rank(config, 1), small_batch(config)
    torch.set_default_dtype(DTYPES[precision])
    try:
        model = Pretrainer(config, rows, "sdpa")
        initialise(model, config)
    finally:
        torch.set_default_dtype(torch.float32)
    inputs, outputs = model_inputs(batch), []
    peak = peak_bytes(lambda: outputs.append(model(**inputs)))
    assert sum(saved(config, rows, batch, "sdpa").values()) == pytest.approx(peak, rel=0.1)


def test_two_layers_keep_twice_as_much_as_one() -> None:
    def trunk(depth: int) -> int:
        config = tiny_config(f"model.trunk.depth={depth}")
        return saved(config, Rows.per_rank(config, 1), random_batch(config, 0), "matmul")["trunk"]

    assert trunk(5) - trunk(4) == trunk(4) - trunk(3) > 0
