"""Which training a config asks for.

training = assemble(load_run("configs/demo.yaml"), ds_config, comm, run_dir, is_resumed=False)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import Config, DecoderGan, RunConfig
from configs.generator import GeneratorConfig
from engine.training import Training
from engine.trainings.decoder_gan import decoder_gan
from engine.trainings.generation import generation
from engine.trainings.pretraining import pretraining
from model.losses.comm import Comm


def assemble(config: RunConfig, ds_config: dict[str, Any], comm: Comm, run_dir: Path, is_resumed: bool) -> Training:
    """The training on this rank; a collective. With `is_resumed` the caller loads a checkpoint next."""
    if isinstance(config, GeneratorConfig):
        return generation(config, ds_config, comm)
    if isinstance(config, DecoderGan):
        return decoder_gan(config, ds_config, comm, run_dir, is_resumed)
    assert isinstance(config, Config), "there is no other kind"
    return pretraining(config, ds_config, comm, run_dir, is_resumed)
