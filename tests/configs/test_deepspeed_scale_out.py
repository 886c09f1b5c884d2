"""Scale-out keys of a DeepSpeed JSON: impossible sizes and company are one clear error each."""

from __future__ import annotations

from typing import Any

import pytest

from configs import Config, UserError, load_run
from configs.deepspeed import complete_ds_config, is_enabled, scale_out_summary, uses_deepcompile
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

# data.streams is not asked here, so any number of ranks that divides the batch will do.
CONFIG = tiny_config("system.compile=off")


def ds(zero: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **(zero or {})}, **top}


@pytest.mark.parametrize(
    ("zero", "world_size", "message"),
    [
        ({"zero_hpz_partition_size": 4}, 6, "zero_hpz_partition_size=4 on 6 ranks"),
        ({"zero_hpz_partition_size": 12}, 6, "zero_hpz_partition_size=12 on 6 ranks"),
        ({"zero_hpz_partition_size": 0}, 6, "zero_hpz_partition_size=0 on 6 ranks"),
        ({"zero_hpz_partition_size": "3"}, 6, 'zero_hpz_partition_size="3" on 6 ranks'),
        ({"zero_hpz_partition_size": True}, 6, "zero_hpz_partition_size=true"),
        ({"zero_hpz_partition_size": 3, "stage": 2}, 6, "zero_hpz_partition_size=3 with stage=2"),
        ({"zero_quantized_weights": True, "stage": 1}, 6, "zero_quantized_weights=true with stage=1"),
        ({"zero_quantized_gradients": True, "stage": 2}, 6, "zero_quantized_gradients=true with stage=2"),
        (
            {"zero_quantized_gradients": True},
            6,
            'communication_data_type=null: .*set "communication_data_type": "fp16"',
        ),
        ({"zero_quantized_nontrainable_weights": True}, 6, "frozen weights here are a teacher's"),
        ({"mics_shard_size": 2}, 6, "mics_shard_size=2: DeepSpeed has no MiCS any more .*zero_hpz_partition_size"),
        ({"mics_shard_size": 2, "zero_hpz_partition_size": 2}, 6, "mics_shard_size=2: .*remove this key"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_the_way_out(
    zero: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        complete_ds_config(ds(zero), CONFIG, world_size)
    assert "\n" not in str(caught.value)


def test_what_does_nothing_is_let_pass_at_any_stage() -> None:
    nothing = {"stage": 1, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    found = complete_ds_config(ds(nothing), CONFIG, 6)
    assert not any(is_enabled(found["zero_optimization"], key) for key in nothing)
    assert scale_out_summary(found) == ""


def test_a_run_is_told_what_its_json_asks_for() -> None:
    asked = {"zero_hpz_partition_size": 2, "zero_quantized_weights": True}
    assert (
        scale_out_summary(complete_ds_config(ds(asked), CONFIG, 6))
        == ", zero_hpz_partition_size=2, zero_quantized_weights=true"
    )


DEEP = {"deepcompile": True}


@pytest.mark.parametrize(
    ("zero", "overrides", "message"),
    [
        ({}, [], r"stage=3 and objectives.ssl.weight=1: .*set stage to 1 or 2"),
        ({"stage": 2}, ["system.compile=on"], "system.compile=on: .*set system.compile=auto"),
        ({"stage": 1}, ["system.clip.micro_batches=2"], "system.clip.micro_batches=2: .*set it to 1"),
        ({"zero_hpz_partition_size": 2}, [], "zero_optimization.zero_hpz_partition_size=2: .*remove one"),
        ({"zero_quantized_weights": True}, [], "zero_optimization.zero_quantized_weights=true"),
    ],
)
def test_deepcompile_says_what_it_cannot_be_with(zero: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"compile.deepcompile=true with {message}"):
        complete_ds_config(ds(zero, compile=DEEP), tiny_config(*overrides), 6)


def test_deepcompile_is_refused_where_two_models_take_turns() -> None:
    config = load_run("configs/decoder_gan.yaml", ["objectives.rec.lpips_weights=none"])
    with pytest.raises(UserError, match="kind=decoder_gan"):
        complete_ds_config(ds({"stage": 2}, compile=DEEP), config, 1)


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2}, {"stage": 3}])
def test_deepcompile_passes_with_whole_parameters_or_without_a_teacher(zero: dict[str, Any]) -> None:
    config: Config = CONFIG if zero["stage"] < 3 else tiny_config("objectives.ssl.weight=0", "batch.ssl=0")
    assert uses_deepcompile(complete_ds_config(ds(zero, compile=DEEP), config, 6))
    assert not uses_deepcompile(complete_ds_config(ds(zero), config, 6))


def test_a_typo_below_compile_has_its_neighbour_named() -> None:
    with pytest.raises(UserError, match=r"unknown key compile.deepcompiled, did you mean compile.deepcompile\?"):
        complete_ds_config(ds(compile={"deepcompiled": True}), CONFIG, 1)
