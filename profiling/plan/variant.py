"""One way to lay a run over its ranks, as the settings that ask for it.

variant = Variant(stage=3, persistence=0, micro_batches=2, checkpointing="full", linear="bf16")
variant.overrides                   # ["system.clip.micro_batches=2", ...], for the command line
variant.ds_json()                   # what --ds_config reads
variant.apply(config)               # the config with them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import configs
from configs import Config, UserError
from configs.ds import complete
from configs.scale_out import HPZ

DEEPSPEED = Path(configs.__file__).parent / "deepspeed"


@dataclass(frozen=True)
class Variant:
    """A layout: keys of --ds_config, then of --config. `persistence`: stage3_param_persistence_threshold; None as the
    JSON has it."""

    stage: int
    persistence: int | None
    micro_batches: int
    checkpointing: str
    linear: str
    hpz: int = 1  # zero_hpz_partition_size: the GPUs of a host, or none

    @property
    def overrides(self) -> list[str]:
        """For the command line of a run."""
        return [
            f"system.clip.micro_batches={self.micro_batches}",
            f"system.activation_checkpointing={self.checkpointing}",
            f"system.linear={self.linear}",
        ]

    @property
    def name(self) -> str:
        """The ZeRO part in words: "ZeRO-3 all sharded, a copy a host of 8"."""
        second = "" if self.hpz == 1 else f", a copy a host of {self.hpz}"
        return f"ZeRO-{self.stage}" + ("" if self.persistence is None else " all sharded") + second

    @property
    def is_shipped(self) -> bool:
        """Whether configs/deepspeed has it."""
        return self.persistence is None and self.hpz == 1

    def ds_json(self) -> dict[str, Any]:
        """What --ds_config reads: the shipped file of the stage, changed."""
        found: dict[str, Any] = json.loads((DEEPSPEED / f"zero{self.stage}.json").read_text())
        if self.persistence is not None:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = self.persistence
        if self.hpz > 1:
            found["zero_optimization"][HPZ] = self.hpz
        return found

    def ds_config(self, config: Config, world_size: int) -> dict[str, Any]:
        """What DeepSpeed gets: the JSON with the config's science in it."""
        return complete(self.ds_json(), config, world_size)

    def apply(self, config: Config) -> Config:
        """The config with these settings. Raises UserError where its rules refuse them."""
        given = config.model_dump()
        given["system"]["clip"]["micro_batches"] = self.micro_batches
        given["system"]["activation_checkpointing"] = self.checkpointing
        given["system"]["linear"] = self.linear
        try:
            return Config.model_validate(given)
        except ValidationError as error:
            raise UserError(str(error)) from None
