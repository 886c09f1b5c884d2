"""The planner's time of a step follows from what it asks for, the device's rates and the links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs import Config, UserError, load_config
from model.packing import RankBatchSizes
from profiling.cost.communication import Collective
from profiling.cost.step_flops import step_flops
from profiling.plan.rates import LAUNCH, OF_BF16, DeviceRates, NetworkLinks, parse_links, rates_of
from profiling.plan.step_time import HIDDEN_BY, ComponentWork, ExecutionMode, component_seconds, step_time, step_work
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

MODE = ExecutionMode("flash3", is_compiled=True)
UNIT = DeviceRates("unit", {"bf16": 4.0, "fp8": 8.0}, attention=2.0, memory=1.0, operation=1.0, block_hooks=10.0,
             is_asynchronous=True, memory_bytes=1.0, watts=None)  # fmt: skip
WORK = ComponentWork("one", {"bf16": 8.0, "fp8": 8.0}, scores=2.0, bytes=3.0, operations=2.0, blocks=0.1)
RING = NetworkLinks(intra=10.0, inter=1.0, per_node=2, base=1.0, hop=0.1, node_hop=0.5)


def large(*overrides: str) -> Config:
    return load_config("configs/vtp_l.yaml", ["objectives.rec.lpips_weights=none", *overrides])


def work_of(
    config: Config, world_size: int, captions: float | None = None, shards: int = 1, mode: ExecutionMode = MODE
) -> list[ComponentWork]:
    rows = RankBatchSizes.per_rank(config, world_size)
    flops = step_flops(config, rows, captions, backend=mode.attention, device=mode.device)
    return step_work(config, rows, mode, flops, captions, shards)


def test_products_attention_and_memory_add_up() -> None:
    assert component_seconds(WORK, UNIT) == pytest.approx(8 / 4 + 8 / 8 + 2 / 2 + 3 / 1)
    time = step_time([WORK, WORK], UNIT, [], None, 1)
    assert (time.compute, time.host, time.seconds) == pytest.approx((14, 6, 14))


def test_a_host_that_goes_ahead_shows_only_where_it_is_slower() -> None:
    slow_host = replace(UNIT, operation=100.0)
    assert step_time([WORK], slow_host, [], None, 1).seconds == pytest.approx(201)
    assert step_time([WORK], slow_host, [], None, 1).limit == "host"
    in_turn = replace(slow_host, is_asynchronous=False)
    assert step_time([WORK], in_turn, [], None, 1).seconds == pytest.approx(7 + 201)


def test_a_ring_sends_through_every_card_of_a_node_and_waits_at_every_hop() -> None:
    assert RING.seconds(800, 3, 1) == 0
    assert RING.seconds(800, 3, 2) == pytest.approx(800 / (0.8 * 10) + 3 * (1 + 1 * 0.1))  # one node; one GPU but one
    assert RING.seconds(800, 3, 4) == pytest.approx(800 / (0.8 * 2) + 3 * (1 + 2 * 0.1 + 2 * 0.5))


def test_computing_hides_what_does_not_wait() -> None:
    beside = Collective("all_gather", "x", 1600, waits=False)  # 1,200 on the wire of 4: 750 s and a latency of 2.2
    waiting = Collective("all_gather", "y", 16)
    compute = 1000.0
    work = [ComponentWork("all", {"bf16": 4 * compute})]
    time = step_time(work, UNIT, [beside, waiting], RING, 4)
    assert time.exposed == pytest.approx(RING.seconds(12, 1, 4)), "the large one fits behind 800 s of computing"
    short = step_time([ComponentWork("all", {"bf16": 4.0})], UNIT, [beside, waiting], RING, 4)
    assert short.exposed == pytest.approx(RING.seconds(1200, 1, 4) - HIDDEN_BY + RING.seconds(12, 1, 4))
    assert short.limit == "communication"


@pytest.mark.parametrize("overrides", [(), ("system.activation_checkpointing=full",), ("system.clip.micro_batches=2",)])
def test_all_flops_of_a_step_are_worked_off(overrides: tuple[str, ...]) -> None:
    config = large(*overrides)
    rows = RankBatchSizes.per_rank(config, 128)
    flops = step_flops(config, rows, 3000, backend="flash3", device="cuda")
    work = step_work(config, rows, MODE, flops, 3000, shards=128)
    done = sum(sum(each.products.values()) + each.scores for each in work)
    contrastive = flops["contrastive logits"]  # three bf16 products on a GPU for each of float32
    more = 2 * (contrastive.forward + contrastive.backward + contrastive.recompute)
    assert done == pytest.approx(flops.hardware_flops + more, rel=1e-9)


def test_twice_the_rows_take_twice_the_time_and_keep_the_updates() -> None:
    config = large()
    once, twice = (work_of(config, n, shards=128) for n in (128, 64))
    rates = rates_of("h100")
    of = lambda work, name: sum(component_seconds(each, rates) for each in work if each.name.startswith(name))  # noqa: E731
    for name in ("trunk", "teacher", "decoder", "perceptual"):
        assert of(twice, name) == pytest.approx(2 * of(once, name), rel=0.01), name  # padding differs
    assert of(twice, "optimizer") == of(once, "optimizer") > 0


def test_checkpointing_costs_a_forward_and_fp8_saves_where_products_are_large() -> None:
    rates = rates_of("h100")

    def compute(preset: str, *overrides: str) -> float:
        config = load_config(f"configs/{preset}.yaml", ["objectives.rec.lpips_weights=none", *overrides])
        work = work_of(config, 256, 1000, shards=256)
        return sum(component_seconds(each, rates) for each in work)

    assert 1.2 < compute("vtp_l", "system.activation_checkpointing=full") / compute("vtp_l") < 1.35
    assert 1 < compute("vtp_l", "system.activation_checkpointing=selective") / compute("vtp_l") < 1.2
    gain = {preset: compute(preset) / compute(preset, "system.linear=fp8_torchao") for preset in ("vtp_l", "vtp_7b")}
    assert 1.2 < gain["vtp_7b"] < 1.6
    assert 1.0 < gain["vtp_l"] < gain["vtp_7b"]


def test_a_gpu_is_its_data_sheet_and_one_share_of_it() -> None:
    h100 = rates_of("h100")
    assert h100.products["bf16"] == pytest.approx(OF_BF16 * 989.4e12)
    assert h100.operation == LAUNCH
    assert "fp8" not in rates_of("a100").products
    assert parse_links("pcie,eth100", "h100").inter == 12.5e9
    with pytest.raises(UserError, match=r"--gpu v100: no data sheet"):
        rates_of("v100")
    for wrong in ("nvlink", "ib400", "nvlink,400", "nvlink,ib"):
        with pytest.raises(UserError, match=r"--link .*for example --link nvlink,ib400"):
            parse_links(wrong, "h100")


def test_a_model_without_clip_is_worked_off_too() -> None:
    config = tiny_config("objectives.clip.weight=0", "objectives.rec.weight=0", "batch.rec=0")
    work = work_of(config, 1, mode=ExecutionMode("sdpa", False, "cpu"))
    names = [each.name for each in work]
    assert not any("clip" in name or name in ("text", "decoder") for name in names)
    assert sum(each.operations for each in work) > 0
