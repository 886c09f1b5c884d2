"""A labelled corpus of a few images, and a run directory with untrained weights that fits it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from configs import Config, to_yaml
from data.captions import train_bpe
from model.initialise import initialise
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from model.tokenizer import VisualTokenizer
from model.weights import write_weights
from tests.data.tar_shards import write_corpus
from tests.tiny import tiny_config

CLASSES = 5  # of tests.data.tar_shards.write_corpus


def write_labelled_corpus(folder: Path) -> Path:
    """train/ with 30 images, held_out/ with 11, classes.json beside the latter, tokenizer.json."""
    for name, num_shards, per_shard in (("train", 2, 15), ("held_out", 1, 11)):
        (folder / name).mkdir(parents=True)
        write_corpus(folder / name, num_shards, per_shard)
    rows = [{"name": f"kind {i}", "prompts": [f"sample {i}", f"a sample {i}"]} for i in range(CLASSES)]
    (folder / "held_out" / "classes.json").write_text(json.dumps({"classes": rows}))
    train_bpe(["sample one two three"] * 4, 300).save(str(folder / "tokenizer.json"))
    return folder


def run_config(corpus: Path, *overrides: str) -> Config:
    return tiny_config(
        f"data.train=['{corpus}/train/*.tar']", f"data.held_out=['{corpus}/held_out/*.tar']",
        f"data.tokenizer={corpus}/tokenizer.json", "model.text.vocab=300", *overrides,
    )  # fmt: skip


def write_run(run: Path, corpus: Path) -> Path:
    """A run directory as training leaves one, as far as evaluation reads it."""
    config = run_config(corpus)
    run.mkdir()
    write_weights(run / "weights.safetensors", untrained(config).state_dict(), config.model)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


def untrained(config: Config) -> VisualTokenizer:
    """The tokenizer of a Pretrainer with seeded weights."""
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    with torch.no_grad():
        return VisualTokenizer.from_state(config.model, model.state_dict())
