"""What a user can get wrong: one clear line, no traceback, exit code 2, within seconds.

All commands run beforehand, two at a time; each test looks at one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from data import order
from data.captions import train_bpe
from data.order import CorpusRecord
from tests.data.tar_shards import write_corpus
from tests.engine.small_runs import write_checkpoint
from tests.harness import free_port
from tests.tiny import TINY, tiny_config

pytestmark = pytest.mark.L1

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "engine" / "launch.py"
STAGE_2 = str(ROOT / "configs" / "decoder_gan_demo.yaml")
HANG_SECONDS = 60  # a guard, far above what any of these takes
STREAMS = "data.streams=2"


@dataclass(frozen=True)
class Case:
    """A command line and what it must say; `{here}` is the folder that `place` fills, the working directory."""

    arguments: tuple[str, ...]
    says: tuple[str, ...]
    config: str = str(TINY)
    environment: tuple[tuple[str, str], ...] = ()
    launcher: bool = False  # through `deepspeed`, on two ranks
    is_alone: bool = True  # on stderr; libraries that are loaded by then may have talked too


GOOD = (STREAMS, "data.train=shards", "data.tokenizer=tokenizer.json", "model.text.vocab=512")
RANK_0_OF_4 = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "4"))
RANK_1_OF_2 = (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"))

CASES = {
    "wrong key": Case((*GOOD, "batch.clp=3"), ("unknown key batch.clp, did you mean batch.clip?",)),
    "wrong value": Case((*GOOD, "batch.clip=many"), ("batch.clip='many': input should be a valid integer",)),
    "broken rule": Case((*GOOD, "batch.ssl=24"), ("ssl=24", "clip=12", "lower batch.ssl")),
    "override without value": Case((*GOOD, "seed"), ("override 'seed' has no value",)),
    "unknown flag": Case((*GOOD, "--reusme"), ("unrecognized arguments: --reusme, did you mean --resume?",)),
    "no config": Case((), ("--config nowhere.yaml cannot be read", "vtp_l"), config="nowhere.yaml"),
    "unreadable config": Case((), ("broken.yaml is not valid YAML: line 2, column 1: expected",), config="broken.yaml"),
    "binary config": Case((), ("shards/00000.tar is not valid YAML",), config="shards/00000.tar"),
    "missing shard": Case(
        (*GOOD, "data.train=shards/{00002..00005}.tar"),
        ("2 of 4 shards are missing", "shards/00004.tar, shards/00005.tar"),
    ),
    "empty directory": Case((*GOOD, "data.train=empty"), ("data.train='empty' matches no file",)),
    "conflicting ds_config": Case(
        (*GOOD, "--ds_config", "conflict.json"),
        ("--ds_config conflict.json: train_batch_size=64 conflicts with 12 from --config",),
    ),
    "typo in ds_config": Case(
        (*GOOD, "--ds_config", "typo.json"), ("unknown key zero_optimization.overlapcomm, did you mean",)
    ),
    "missing ds_config": Case((*GOOD, "--ds_config", "none.json"), ("none.json: cannot be read", "zero3.json")),
    "world size": Case(GOOD, ("4 ranks do not divide data.streams=2", "run on 1, 2 ranks"), environment=RANK_0_OF_4),
    "world size under the launcher": Case(
        ("data.streams=3", "data.train=shards"),
        ("2 ranks do not divide data.streams=3", "run on 1, 3 ranks"),
        launcher=True,
        is_alone=False,
    ),
    "a mistake that one rank alone has met": Case(  # told after a while, in which rank 0 said nothing
        (*GOOD, "data.train=shards/00009.tar"), ("1 of 1 shards are missing",), environment=RANK_1_OF_2
    ),
    "missing lpips weights": Case(
        (*GOOD, "objectives.rec.perceptual=1", "objectives.rec.lpips_weights=none.safetensors"),
        ("objectives.rec.lpips_weights=none.safetensors is not a file", "objectives.rec.perceptual=0"),
    ),
    "weights to start from that are missing": Case(
        (*GOOD, "init.weights=none.safetensors"), ("init.weights=none.safetensors is not a file", "interchange import")
    ),
    "weights to start from that are none": Case(
        (*GOOD, "init.weights=shards/00000.tar"), ("shards/00000.tar is not a safetensors file",)
    ),
    "profiled rank that does not exist": Case(
        (*GOOD, "profile.steps=1:2", "profile.ranks=[0,1]"),
        ("profile.ranks=[0, 1] but the ranks of this run are 0 to 0: there is no rank 1",),
    ),
    "run directory that is a file": Case(
        (*GOOD, "system.run_dir=tokenizer.json/run"), ("tokenizer.json is not a directory that can be written",)
    ),
    "existing run": Case((*GOOD, "name=trained"), ("runs/trained already holds a run (step-00000003)", "--resume")),
    "nothing to resume": Case((*GOOD, "name=fresh", "--resume"), ("--resume: ", "has no complete checkpoint")),
    "half a checkpoint": Case(
        (*GOOD, "name=half", "--resume"),
        ("half/checkpoints/step-00000003/state.json cannot be read", "the checkpoint is damaged"),
    ),
    "changed science": Case(
        (*GOOD, "name=trained", "--resume", "optim.lr=2e-3", "batch.rec=12"),
        ("optim.lr: 0.001 -> 0.002; batch.rec: 6 -> 12", "--allow-change optim.lr,batch.rec"),
    ),
    "no shard at a resume": Case(  # as from another directory than the one it was started from
        (*GOOD, "name=moved", "--resume"),
        ("none of the run's 2 shards in data.train exists (the first is gone/0.tar, the working directory ",),
    ),
    "missing tokenizer": Case((*GOOD, "data.tokenizer=none.json"), ("data.tokenizer=none.json is no file",)),
    "large vocabulary": Case(  # torch's CUDA build without a GPU logs a line when it is imported beside nvcc
        (*GOOD, "model.text.vocab=64"), ("tokenizer.json has 2", "model.text.vocab=64"), is_alone=False
    ),
    "stage 2 without a tokenizer": Case(
        ("data.train=shards", "tokenizer.weights=none.safetensors"),
        ("tokenizer.weights=none.safetensors is not a file: stage 2 trains the decoder of a tokenizer that exists",),
        config=STAGE_2,
    ),
    "stage 2 without perceptual weights": Case(
        ("data.train=shards", "objectives.rec.perceptual=1", "objectives.rec.lpips_weights=none.safetensors"),
        ("objectives.rec.lpips_weights=none.safetensors is not a file",),
        config=STAGE_2,
    ),
    "no tar": Case(
        (*GOOD, "data.train=garbage"),
        ("garbage/0.tar is not an uncompressed tar file",),
        is_alone=False,
    ),
    "fewer shards than streams": Case(
        (*GOOD, "data.streams=6"), ("4 of 4 shards hold usable samples but data.streams=6",), is_alone=False
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with good data beside every kind of bad."""
    here = tmp_path_factory.mktemp("launch")
    (here / "shards").mkdir()
    (here / "empty").mkdir()
    (here / "garbage").mkdir()
    write_corpus(here / "shards", num_shards=4, per_shard=6)
    for number in range(2):
        (here / "garbage" / f"{number}.tar").write_text("<html>404</html>\n")
    train_bpe([f"sample {number}" for number in range(24)], 300).save(str(here / "tokenizer.json"))
    (here / "broken.yaml").write_text("name: [a\n")
    zero = {"stage": 3}
    (here / "conflict.json").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": 64}))
    (here / "typo.json").write_text(json.dumps({"zero_optimization": zero | {"overlapcomm": True}}))
    write_checkpoint(here / "runs" / "trained" / "checkpoints", tiny_config(*GOOD, "name=trained"))
    shutil.copytree(here / "runs" / "trained", here / "runs" / "half")
    (here / "runs" / "half" / "checkpoints" / "step-00000003" / "state.json").unlink()
    shutil.copytree(here / "runs" / "trained", here / "runs" / "moved")
    found = CorpusRecord({"gone/0.tar": 6, "gone/1.tar": 6}, Counter())
    order.write_corpus_record(here / "runs" / "moved" / "corpus.json", ("shards",), "txt", found)
    return here


def launch(case: Case, here: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCH)]
    if case.launcher:
        script = str(Path(sys.executable).with_name("deepspeed"))
        command = [sys.executable, script, "--num_accelerators", "2", "--master_port", str(free_port()), str(LAUNCH)]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = clean | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **dict(case.environment)}
    return subprocess.run(
        [*command, "--config", case.config, *case.arguments],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda case: launch(case, place), CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    name: str, finished: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    case, process = CASES[name], finished[name]
    everything = process.stdout + process.stderr
    assert process.returncode == 2, everything
    assert "Traceback" not in everything
    errors = [line for line in everything.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, everything
    for part in case.says:
        assert part in errors[0]
    if case.is_alone:
        assert process.stderr == f"{errors[0]}\n"
        assert process.stdout == ""


def test_no_mistake_leaves_a_checkpoint_or_touches_one(
    place: Path, finished: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    found = sorted(str(path.relative_to(place / "runs")) for path in (place / "runs").glob("*/checkpoints/*"))
    assert len(finished) == len(CASES)
    assert found == [
        f"{run}/checkpoints/{name}" for run in ("half", "moved", "trained") for name in ("latest", "step-00000003")
    ]


def test_help_says_what_there_is() -> None:
    process = subprocess.run(
        [sys.executable, str(LAUNCH), "--help"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert process.returncode == 0
    assert process.stderr == ""
    for flag in ("--config", "--ds_config", "--resume", "--allow-change", "key.sub=value"):
        assert flag in process.stdout
    assert "--local_rank" not in process.stdout, "the launcher's, not the user's"
