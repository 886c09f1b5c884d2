"""Weights of the tiny config without training: a model with its first values, a run directory as training leaves it."""

from __future__ import annotations

from pathlib import Path

from configs import Config, to_yaml
from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.tokenizer import VisualTokenizer
from model.weights import write_weights

NO_REC = ("batch.rec=0", "objectives.rec.weight=0")


def build(config: Config) -> Pretrainer:
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    return model


def write_run(run: Path, config: Config) -> Path:
    run.mkdir()
    write_weights(run / "weights.safetensors", build(config).state_dict(), config.model)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def tokenizer_of(config: Config) -> VisualTokenizer:
    return VisualTokenizer.from_state(config.model, build(config).state_dict())
