"""The DeepSpeed JSON: system keys pass, science is said once, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs import UserError
from configs.deepspeed import STAGES, ZERO_KEYS, load_ds_config, overlap_summary, zero_stage
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "deepspeed").glob("*.json"))
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}
CONFIG = tiny_config()  # clip 12, streams 6, clip_norm 1.0, fp32


def load(tmp_path: Path, given: Any, world_size: int = 2) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return load_ds_config(path, CONFIG, world_size)


def refusal(tmp_path: Path, given: Any, world_size: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, given, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_loads_and_carries_the_science(path: Path) -> None:
    config = tiny_config("batch.clip=48", "batch.ssl=16", "batch.rec=16", "data.streams=16")
    given = load_ds_config(path, config, world_size=16)  # two hosts of eight
    assert zero_stage(given) == int(path.stem[4])
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (48, 3)
    assert given["gradient_accumulation_steps"] == 1
    assert given["gradient_clipping"] == 1.0
    assert given["bf16"] == {"enabled": False}


def test_the_files_that_are_shipped() -> None:
    plain, scale_out = ["zero1", "zero2", "zero3"], ["zero3_hpz", "zero3_offload", "zero3_plus", "zero3_qwz"]
    assert [path.stem for path in SHIPPED] == plain + scale_out


def test_precision_follows_the_config(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO))
    given = load_ds_config(tmp_path / "ds.json", tiny_config("optim.precision=bf16"), 1)
    assert given["bf16"] == {"enabled": True}


SCIENCE = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 6,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
}


@pytest.mark.parametrize("key", SCIENCE)
def test_a_science_key_may_be_absent_auto_or_equal(key: str, tmp_path: Path) -> None:
    auto: Any = {"enabled": "auto"} if key == "bf16" else "auto"
    absent, said, equal = (load(tmp_path, ZERO | more) for more in ({}, {key: auto}, {key: SCIENCE[key]}))
    assert absent == said == equal
    assert absent[key] == SCIENCE[key]


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("train_batch_size", 64, "train_batch_size=64 conflicts with 12 from --config"),
        ("train_micro_batch_size_per_gpu", 4, "train_micro_batch_size_per_gpu=4 conflicts with 6"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps=2 conflicts with 1"),
        ("gradient_clipping", 3.0, "gradient_clipping=3.0 conflicts with 1.0"),
        ("bf16", {"enabled": True}, 'bf16={"enabled": true} conflicts with {"enabled": false}'),
    ],
)
def test_a_conflict_names_both_values_and_the_yaml_key(key: str, value: Any, both: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, ZERO | {key: value})
    assert message.startswith(f"--ds_config {tmp_path / 'ds.json'}: ")
    assert both in message
    home = {"gradient_clipping": "optim.clip_norm", "bf16": "optim.precision"}.get(key, "batch.clip")
    assert f"change {home}" in message


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "amp", "fp16", "torch_autocast"])
def test_what_the_yaml_decides_alone_is_refused_or_auto(key: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, ZERO | {key: {"type": "Adam"}})
    assert f'{key}={{"type": "Adam"}} is science and belongs to --config' in message
    assert key not in load(tmp_path, ZERO | {key: "auto"}), "DeepSpeed knows no such auto"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "unknown key zero_optimisation, did you mean zero_optimization?",
        ),
        (ZERO | {"train_batchsize": 12}, "unknown key train_batchsize, did you mean train_batch_size?"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucketsize": 1}},
            "unknown key zero_optimization.reduce_bucketsize, did you mean zero_optimization.reduce_bucket_size?",
        ),
        (ZERO | {"qqq": 1}, "unknown key qqq"),
        ({}, "zero_optimization.stage=null: this engine runs on ZeRO 1, 2 or 3; choose one"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0: this engine runs on"),
        ({"zero_optimization": {"stage": "three"}}, 'zero_optimization.stage="three"'),
        ({"zero_optimization": 3}, "zero_optimization.stage=3"),
        ("{", "not valid JSON: Expecting property name"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "key steps_per_print is given twice"),
        ("[1]", "holds list, not keys and values"),
    ],
)
def test_a_mistake_is_one_line(given: Any, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, given)


def test_a_missing_file_names_what_is_shipped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*zero1.json, zero2.json, zero3.json, zero3_hpz.json"):
        load_ds_config(tmp_path / "no.json", CONFIG, 1)


def test_a_world_that_does_not_divide_the_streams_is_told_which_do(tmp_path: Path) -> None:
    message = refusal(tmp_path, ZERO, world_size=4)
    assert "4 ranks do not divide data.streams=6" in message
    assert "run on 1, 2, 3, 6 ranks" in message


def test_every_allowed_zero_key_is_one_deepspeed_takes() -> None:
    """DeepSpeed's own model forbids others, with a traceback at the start of a run."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    known = {field.alias or name for name, field in zero.model_fields.items()}
    assert known >= ZERO_KEYS
    assert all(zero(stage=stage).stage == stage for stage in STAGES)


@pytest.mark.parametrize(
    ("stage", "world_size", "given", "expected"),
    [
        (1, 1, "auto", False),
        (2, 1, "auto", False),
        (2, 1, None, False),
        (3, 1, "auto", True),  # its gathers' stream too
        (1, 2, "auto", True),
        (1, 2, None, True),
        (1, 1, True, True),
        (3, 2, False, False),
    ],
)
def test_gradients_are_reduced_beside_backward_where_there_is_somebody_to_reduce_with(
    stage: int, world_size: int, given: Any, expected: bool, tmp_path: Path
) -> None:
    zero = {"stage": stage} | ({} if given is None else {"overlap_comm": given})
    found = load(tmp_path, {"zero_optimization": zero}, world_size)
    assert found["zero_optimization"]["overlap_comm"] is expected
    said = overlap_summary(found, world_size)
    assert said.startswith("reduced while backward" if expected else "reduced after backward")
    assert ('"auto"' in said) == (given is not True and given is not False)


def test_overlap_that_is_neither_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 1, "overlap_comm": "on"}})
    assert 'zero_optimization.overlap_comm="on": it is true, false or "auto"; choose one' in message


def test_deepspeeds_throughput_timer_is_off() -> None:
    """It waits for the device twice a step, and nobody reads it."""
    given = load_ds_config(SHIPPED[0], CONFIG, 2)
    assert pytest.importorskip("deepspeed.utils.config").get_timers_config(given).enabled is False
