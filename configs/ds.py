"""The DeepSpeed JSON is system: it says how a run is laid over devices, never what the run is.

Keys that are science (batch, optimizer, clipping, schedule, precision) belong to the YAML. In the JSON they
are absent, "auto", or equal to the YAML's value; anything else is refused with both values named.

    given = load_ds_config("configs/deepspeed/zero3.json", config, world_size=2)
    given["train_batch_size"]          # config.samples_per_step
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs import scale_out
from configs.load import one_line
from configs.run import Run
from configs.section import UserError

# What DeepSpeed may be told here. Its own parser ignores an unknown top-level key: a typo would do nothing.
SYSTEM_KEYS = frozenset({
    "aio", "checkpoint", "comms_logger", "communication_data_type", "compile", "dump_state",
    "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "steps_per_print", "timeout",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_optimization",
})  # fmt: skip
# What it may be told below zero_optimization: there it refuses an unknown key, but with a traceback.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "offload_optimizer",
    "offload_param", "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage",
    "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})  # fmt: skip
# And below compile, of which all but the first say how.
COMPILE_KEYS = frozenset({"deepcompile", "debug_log", "double_buffer", "symmetric_memory"})
# Science DeepSpeed has an own switch for, which this engine decides without it.
REFUSED_KEYS = frozenset({"optimizer", "scheduler", "amp", "fp16", "torch_autocast"})
OVERLAP = "overlap_comm"
STAGES = (1, 2, 3)  # checkpoints and the teacher speak of a rank's shards, which stage 0 does not have


def load_ds_config(path: str | Path, config: Run, world_size: int) -> dict[str, Any]:
    """The dictionary `deepspeed.initialize` gets: the JSON at `path` with the science of `config` filled in.

    Raises UserError for an unreadable file, an unknown key, a science key in conflict with the YAML, scale-out keys
    that cannot work together (configs/scale_out.py), or a world size that does not divide data.streams.
    """
    try:
        found = complete(_read(Path(path)), config, world_size)
    except UserError as error:
        raise UserError(f"--ds_config {path}: {error}") from None
    config.check_world(world_size)
    return found


def complete(given: dict[str, Any], config: Run, world_size: int) -> dict[str, Any]:
    """`given`, what a JSON holds, with the science of `config` filled in. Raises UserError as load_ds_config does."""
    science = _science(config, world_size)
    _refuse_unknown(given, SYSTEM_KEYS | REFUSED_KEYS | science.keys())
    _check_zero(given.get("zero_optimization"))
    _refuse_unknown(given.get("compile") or {}, COMPILE_KEYS, "compile.")
    scale_out.check(given, config, world_size)
    _refuse_conflicts(given, science)
    zero = {**given["zero_optimization"], OVERLAP: overlaps(given["zero_optimization"], world_size)}
    # DeepSpeed's throughput timer waits for the device twice in every step, unless it is off.
    ours: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    ours |= {"zero_optimization": zero, "timers": {"throughput": {"enabled": False}}}
    return {**{key: given[key] for key in given if key not in REFUSED_KEYS}, **science, **ours}


def overlaps(zero: dict[str, Any], world_size: int) -> bool:
    """Resolve `overlap_comm`: whether gradients are reduced on their own stream during backward.

    Where it is "auto" or absent they are, unless one rank under ZeRO-1 or 2 has nobody to exchange them with.

    Under ZeRO-3 also on one rank: without streams of their own for gathers, the host would stay within three modules of
    the device.
    """
    given = zero.get(OVERLAP, "auto")
    return zero["stage"] == 3 or world_size > 1 if given == "auto" else bool(given)


def overlap_summary(ds_config: dict[str, Any], world_size: int) -> str:
    """Return one line on whether gradient reduction overlaps backward, and why; takes what `complete` returns."""
    stage, is_on = zero_stage(ds_config), ds_config["zero_optimization"][OVERLAP]
    reason = f"zero_optimization.{OVERLAP}={json.dumps(is_on)}"
    if is_on == overlaps({"stage": stage}, world_size):
        ranks = "one rank" if world_size == 1 else f"{world_size} ranks"
        reason += f', as "auto" is with ZeRO-{stage} on {ranks}'
    return f"{'reduced while backward goes on' if is_on else 'reduced after backward'} ({reason})"


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed dictionary."""
    return int(ds_config["zero_optimization"]["stage"])


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed dictionary keeps the optimizer's states on the host, or on its disk."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _science(config: Run, world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": config.samples_per_step,
        "train_micro_batch_size_per_gpu": config.samples_per_step // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.optim.precision == "bf16"},
    }


def _refuse_unknown(given: Iterable[str], known: Iterable[str], section: str = "") -> None:
    for key in set(given) - set(known):
        near = difflib.get_close_matches(key, sorted(known), n=1)
        raise UserError(f"unknown key {section}{key}{f', did you mean {section}{near[0]}?' if near else ''}")


def _check_zero(zero: object) -> None:
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES:
        found = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(f"zero_optimization.stage={json.dumps(found)}: this engine runs on ZeRO 1, 2 or 3; choose one")
    scale_out.refuse_removed(zero)
    _refuse_unknown(zero, ZERO_KEYS, "zero_optimization.")
    if (overlap := zero.get(OVERLAP, "auto")) != "auto" and not isinstance(overlap, bool):
        raise UserError(f'zero_optimization.{OVERLAP}={json.dumps(overlap)}: it is true, false or "auto"; choose one')


def _refuse_conflicts(given: dict[str, Any], science: dict[str, Any]) -> None:
    homes = {"gradient_clipping": "optim.clip_norm", "bf16": "optim.precision"}
    for key, value in given.items():
        if key in REFUSED_KEYS and value != "auto":
            raise UserError(
                f'{key}={json.dumps(value)} is science and belongs to --config (optim.*); remove it or say "auto"'
            )
        if key in science and value not in ("auto", science[key]) and value != {"enabled": "auto"}:
            home = homes.get(key, "batch.clip or the number of ranks")
            raise UserError(
                f"{key}={json.dumps(value)} conflicts with {json.dumps(science[key])} from --config: science "
                f"is said once; remove it from the JSON, or change {home}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except OSError as error:
        shipped = ", ".join(sorted(p.name for p in (Path(__file__).parent / "deepspeed").glob("*.json")))
        raise UserError(f"cannot be read ({error.strerror}); configs/deepspeed/ has {shipped}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: {one_line(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"it holds {type(given).__name__}, not keys and values")
    return given


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key {key} is given twice: a key has one value; remove one")
    return dict(pairs)
