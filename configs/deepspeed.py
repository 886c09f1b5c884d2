"""Load a DeepSpeed JSON and complete it with the config's batch, precision and clipping.

    given = load_ds_config("configs/deepspeed/zero3.json", config, world_size=2)
    given["train_batch_size"]          # config.samples_per_step

The JSON is *system*: it lays a run out over devices and must not change its results. Science keys (batch, optimizer,
clipping, schedule, precision) belong to the YAML; in the JSON they are absent, "auto", or equal to the YAML's value,
and anything else is refused with both values named.

Scale-out keys, for runs on many hosts (docs/scaling.md says when each pays):

    zero_hpz_partition_size   a second copy of the weights, partitioned over the ranks of one host: what is gathered
                              twice in a step is gathered the second time inside the host
    zero_quantized_weights    weights travel as int8, about every 64 with a scale (engine/zero/int8_weights.py)
    zero_quantized_gradients  gradients travel as int4, between ranks of a host, then between hosts
    compile.deepcompile       DeepSpeed compiles the whole model and puts its collectives into the graph

Rules are those of deepspeed 0.19.8; docs/decisions/zero.md has the source of each. What needs the device is checked by
engine/zero/build.py.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.decoder_gan import DecoderGan
from configs.load import one_line
from configs.run import RunConfig
from configs.schema import Config
from configs.section import UserError

# Top-level keys that a JSON may set. DeepSpeed's own parser ignores an unknown one: a typo would do nothing.
SYSTEM_KEYS = frozenset({
    "aio", "checkpoint", "comms_logger", "communication_data_type", "compile", "dump_state",
    "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "steps_per_print", "timeout",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_optimization",
})  # fmt: skip
# Keys below zero_optimization, where DeepSpeed refuses an unknown one, but with a traceback.
ZERO_KEYS = frozenset({
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "offload_optimizer",
    "offload_param", "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage",
    "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
})  # fmt: skip
# Keys below compile; all but the first are its options.
COMPILE_KEYS = frozenset({"deepcompile", "debug_log", "double_buffer", "symmetric_memory"})
# Science that DeepSpeed has its own settings for, and that this engine controls without DeepSpeed.
REFUSED_KEYS = frozenset({"optimizer", "scheduler", "amp", "fp16", "torch_autocast"})
OVERLAP = "overlap_comm"
STAGES = (1, 2, 3)  # checkpoints and the teacher work on a rank's shards, which stage 0 does not have
HPZ_SIZE = "zero_hpz_partition_size"
QUANTIZED_WEIGHTS = "zero_quantized_weights"
QUANTIZED_GRADIENTS = "zero_quantized_gradients"
ONLY_STAGE_3 = (HPZ_SIZE, QUANTIZED_WEIGHTS, QUANTIZED_GRADIENTS)
REMOVED_KEYS = ("mics_shard_size", "mics_hierarchical_params_gather")  # that earlier releases of DeepSpeed had
ZERO_3 = 3  # the stage that partitions weights


def load_ds_config(path: str | Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """Read the JSON at `path` and complete it with the science of `config`, for `deepspeed.initialize`.

    Raises UserError for an unreadable file, an unknown key, a science key in conflict with the YAML, scale-out keys
    that cannot work together, or a world size that does not divide data.streams.
    """
    try:
        completed = complete_ds_config(_read(Path(path)), config, world_size)
    except UserError as error:
        raise UserError(f"--ds_config {path}: {error}") from None
    config.check_world(world_size)
    return completed


def complete_ds_config(given: dict[str, Any], config: RunConfig, world_size: int) -> dict[str, Any]:
    """Complete `given`, the content of a JSON, with the science of `config`. Raises as load_ds_config does."""
    science = _science(config, world_size)
    _refuse_unknown(given, SYSTEM_KEYS | REFUSED_KEYS | science.keys())
    _check_zero(given.get("zero_optimization"))
    _refuse_unknown(given.get("compile") or {}, COMPILE_KEYS, "compile.")
    check_scale_out(given, config, world_size)
    _refuse_conflicts(given, science)
    zero = {**given["zero_optimization"], OVERLAP: resolve_overlap(given["zero_optimization"], world_size)}
    # DeepSpeed's throughput timer waits for the device twice in every step, unless it is off.
    ours: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    ours |= {"zero_optimization": zero, "timers": {"throughput": {"enabled": False}}}
    return {**{key: given[key] for key in given if key not in REFUSED_KEYS}, **science, **ours}


def resolve_overlap(zero: dict[str, Any], world_size: int) -> bool:
    """Resolve `overlap_comm`: whether gradients are reduced on their own stream during backward.

    Where it is "auto" or absent they are, unless one rank under ZeRO-1 or 2 has nobody to exchange them with.

    Under ZeRO-3 also on one rank: without streams of their own for gathers, the host would stay within three modules of
    the device.
    """
    given = zero.get(OVERLAP, "auto")
    return zero["stage"] == 3 or world_size > 1 if given == "auto" else bool(given)


def overlap_summary(ds_config: dict[str, Any], world_size: int) -> str:
    """Return one line on whether gradient reduction overlaps backward, and why; takes complete_ds_config's result."""
    stage, is_on = zero_stage(ds_config), ds_config["zero_optimization"][OVERLAP]
    reason = f"zero_optimization.{OVERLAP}={json.dumps(is_on)}"
    if is_on == resolve_overlap({"stage": stage}, world_size):
        ranks = "one rank" if world_size == 1 else f"{world_size} ranks"
        reason += f', as "auto" is with ZeRO-{stage} on {ranks}'
    return f"{'reduced while backward goes on' if is_on else 'reduced after backward'} ({reason})"


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config."""
    return int(ds_config["zero_optimization"]["stage"])


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed config keeps the optimizer state on the host, or on its disk."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _science(config: RunConfig, world_size: int) -> dict[str, Any]:
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
    refuse_removed(zero)
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
                f"is set in one place; remove it from the JSON, or change {home}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        shipped = ", ".join(sorted(p.name for p in (Path(__file__).parent / "deepspeed").glob("*.json")))
        raise UserError(f"cannot be read ({error.strerror}); configs/deepspeed/ has {shipped}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: {one_line(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"it holds {type(given).__name__}, not keys and values")
    return given


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key {key} is given twice: a key has one value; remove one")
    return dict(pairs)


def check_scale_out(given: dict[str, Any], config: RunConfig, world_size: int) -> None:
    """Raise UserError if a scale-out key of `given`, the content of a JSON, does not work with the other settings."""
    zero = given["zero_optimization"]
    for key in ONLY_STAGE_3:
        if is_enabled(zero, key) and zero["stage"] != ZERO_3:
            raise UserError(
                f"zero_optimization.{key}={json.dumps(zero[key])} with stage={zero['stage']}: it changes how ZeRO-3 "
                "gathers and reduces; set stage=3, or remove it"
            )
    _check_hpz(zero, world_size)
    _check_quantised(zero, given.get("communication_data_type"))
    if uses_deepcompile(given):
        _check_deepcompile(zero, config)


def is_enabled(zero: dict[str, Any], key: str) -> bool:
    """Return whether a key of `zero_optimization` is set to a value with an effect."""
    value = zero.get(key, False)
    return value is True or (isinstance(value, int) and value > 1)


def uses_deepcompile(ds_config: dict[str, Any]) -> bool:
    """Return whether a DeepSpeed config compiles the whole model with DeepCompile."""
    return bool((ds_config.get("compile") or {}).get("deepcompile", False))


def scale_out_summary(ds_config: dict[str, Any]) -> str:
    """Format the scale-out keys in effect for a log line: ", zero_hpz_partition_size=8"; "" without any."""
    zero = ds_config["zero_optimization"]
    return "".join(f", {key}={json.dumps(zero[key])}" for key in ONLY_STAGE_3 if is_enabled(zero, key))


def refuse_removed(zero: dict[str, Any]) -> None:
    """Raise UserError for a key that DeepSpeed has removed."""
    for key in REMOVED_KEYS:
        if key in zero:
            raise UserError(
                f"zero_optimization.{key}={json.dumps(zero[key])}: DeepSpeed has no MiCS any more (removed in 0.19); "
                "gathers inside a host are zero_hpz_partition_size=RANKS_OF_A_HOST; remove this key"
            )


def _check_hpz(zero: dict[str, Any], world_size: int) -> None:
    size = zero.get(HPZ_SIZE, 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or world_size % size:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size={json.dumps(size)} on {world_size} ranks: the ranks of a host "
            "share a copy of the weights, so it is a whole number that divides the ranks; set it to the ranks of a "
            "host, or to 1 for none"
        )


def _check_quantised(zero: dict[str, Any], sent_as: object) -> None:
    if zero.get("zero_quantized_nontrainable_weights"):
        raise UserError(
            "zero_optimization.zero_quantized_nontrainable_weights=true: frozen weights here are a teacher's, which "
            "follows its student after every step in full precision; remove it (zero_quantized_weights sends both as "
            "int8)"
        )
    if zero.get(QUANTIZED_GRADIENTS) and sent_as != "fp16":
        raise UserError(
            f"zero_optimization.zero_quantized_gradients=true with communication_data_type={json.dumps(sent_as)}: "
            "DeepSpeed's kernel takes the bits of a gradient for fp16 whatever it is, and bf16 or fp32 would come out "
            'as other numbers; set "communication_data_type": "fp16", or remove it'
        )


def _check_deepcompile(zero: dict[str, Any], config: RunConfig) -> None:
    for key in (key for key in ONLY_STAGE_3 if is_enabled(zero, key)):
        raise UserError(
            f"compile.deepcompile=true with zero_optimization.{key}={json.dumps(zero[key])}: a compiled model gathers "
            "by itself, without it; remove one"
        )
    if config.system.compile == "on":
        raise UserError(
            "compile.deepcompile=true with system.compile=on: a model is compiled block by block by us, or whole by "
            "DeepSpeed; set system.compile=auto, or remove compile.deepcompile"
        )
    if isinstance(config, DecoderGan):
        raise UserError(
            "compile.deepcompile=true with kind=decoder_gan: two models take turns in its step, past the engines that "
            "would compile them; remove compile.deepcompile"
        )
    if isinstance(config, Config):
        _check_deepcompile_pretraining(zero, config)


def _check_deepcompile_pretraining(zero: dict[str, Any], config: Config) -> None:
    if config.system.clip.micro_batches > 1:
        raise UserError(
            f"compile.deepcompile=true with system.clip.micro_batches={config.system.clip.micro_batches}: the one "
            "reduction of many backwards hangs on hooks that a compiled model has not; set it to 1, or remove "
            "compile.deepcompile"
        )
    if zero["stage"] == ZERO_3 and config.objectives.ssl.weight:
        raise UserError(
            f"compile.deepcompile=true with stage=3 and objectives.ssl.weight={config.objectives.ssl.weight:g}: from "
            "its sixth step on DeepCompile keeps some weights gathered and renews only those that had a gradient, so "
            "the teacher would stay behind; set stage to 1 or 2, or remove compile.deepcompile"
        )
