"""What a DeepSpeed JSON may ask for beyond plain ZeRO, for runs on many hosts (docs/scaling.md says when each pays).

    zero_hpz_partition_size   a second copy of the weights, cut over the ranks of one host: what is gathered twice in a
                              step is gathered the second time inside the host
    zero_quantized_weights    weights travel as int8, every 64 or so with a scale (engine/zero/quantise.py)
    zero_quantized_gradients  gradients travel as int4, between ranks of a host, then between hosts
    compile.deepcompile       DeepSpeed compiles the whole model and puts its collectives into the graph

    check(given, config, world_size=256)      # UserError for a size or a company that cannot be

Rules are those of deepspeed 0.19.8; docs/decisions/zero.md has the source of each. What needs the device is refused by
engine/zero/scale_out.py.
"""

from __future__ import annotations

import json
from typing import Any

from configs.decoder_gan import DecoderGan
from configs.run import Run
from configs.schema import Config
from configs.section import UserError

HPZ, WEIGHTS, GRADIENTS = "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"
ONLY_STAGE_3 = (HPZ, WEIGHTS, GRADIENTS)
REMOVED = ("mics_shard_size", "mics_hierarchical_params_gather")
SHARDED = 3  # the stage that gathers weights


def check(given: dict[str, Any], config: Run, world_size: int) -> None:
    """Raises UserError where a scale-out key of `given`, what a JSON holds, cannot work with the others."""
    zero = given["zero_optimization"]
    for key in ONLY_STAGE_3:
        if is_asked(zero, key) and zero["stage"] != SHARDED:
            raise UserError(
                f"zero_optimization.{key}={json.dumps(zero[key])} with stage={zero['stage']}: it changes how ZeRO-3 "
                "gathers and reduces; set stage=3, or remove it"
            )
    _check_hpz(zero, world_size)
    _check_quantised(zero, given.get("communication_data_type"))
    if asks_deepcompile(given):
        _check_deepcompile(zero, config)


def is_asked(zero: dict[str, Any], key: str) -> bool:
    """Whether a key of `zero_optimization` is there with a value that does something."""
    value = zero.get(key, False)
    return value is True or (isinstance(value, int) and value > 1)


def asks_deepcompile(ds_config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed dictionary wants the whole model compiled."""
    return bool((ds_config.get("compile") or {}).get("deepcompile", False))


def said_of(ds_config: dict[str, Any]) -> str:
    """The scale-out keys of a DeepSpeed dictionary that do something, for a person: ", zero_hpz_partition_size=8"."""
    zero = ds_config["zero_optimization"]
    return "".join(f", {key}={json.dumps(zero[key])}" for key in ONLY_STAGE_3 if is_asked(zero, key))


def refuse_removed(zero: dict[str, Any]) -> None:
    """Raises UserError for a key that DeepSpeed once had."""
    for key in REMOVED:
        if key in zero:
            raise UserError(
                f"zero_optimization.{key}={json.dumps(zero[key])}: DeepSpeed has no MiCS any more (removed in 0.19); "
                "gathers inside a host are zero_hpz_partition_size=RANKS_OF_A_HOST; remove this key"
            )


def _check_hpz(zero: dict[str, Any], world_size: int) -> None:
    size = zero.get(HPZ, 1)
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
    if zero.get(GRADIENTS) and sent_as != "fp16":
        raise UserError(
            f"zero_optimization.zero_quantized_gradients=true with communication_data_type={json.dumps(sent_as)}: "
            "DeepSpeed's kernel takes the bits of a gradient for fp16 whatever it is, and bf16 or fp32 would come out "
            'as other numbers; set "communication_data_type": "fp16", or remove it'
        )


def _check_deepcompile(zero: dict[str, Any], config: Run) -> None:
    for key in (key for key in ONLY_STAGE_3 if is_asked(zero, key)):
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
        _check_pretraining(zero, config)


def _check_pretraining(zero: dict[str, Any], config: Config) -> None:
    if config.system.clip.micro_batches > 1:
        raise UserError(
            f"compile.deepcompile=true with system.clip.micro_batches={config.system.clip.micro_batches}: the one "
            "reduction of many backwards hangs on hooks that a compiled model has not; set it to 1, or remove "
            "compile.deepcompile"
        )
    if zero["stage"] == SHARDED and config.objectives.ssl.weight:
        raise UserError(
            f"compile.deepcompile=true with stage=3 and objectives.ssl.weight={config.objectives.ssl.weight:g}: from "
            "its sixth step on DeepCompile keeps some weights gathered and renews only those that had a gradient, so "
            "the teacher would stay behind; set stage to 1 or 2, or remove compile.deepcompile"
        )
