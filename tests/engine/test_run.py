"""A whole run as a user starts it: shards in, run directory out; stopped by a signal and taken up again."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import corpus
from model.tokenizer import VisualTokenizer
from model.weights import read_weights
from profiling.report.page import write_report

pytestmark = pytest.mark.L1

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
TRAINING = (f"optim.steps={STEPS}", "optim.warmup=0.0")
REPORTED = ("loss/total", "loss/clip", "loss/ssl", "loss/dino_local", "loss/dino_global", "loss/mim", "loss/koleo")
REPORTED += ("loss/rec", "loss/l1", "optim/grad_norm", "optim/learning_rate", "speed/samples_per_second")
REPORTED += ("phase/data_ms", "phase/trunk_ms", "phase/report_ms", "straggler/rank", "straggler/excess_share")
REPORTED += ("speed/tflops_per_rank", "speed/mfu", "speed/hfu")
REPORTED += ("memory/peak_min_gib", "memory/peak_mean_gib", "memory/peak_max_gib", "memory/peak_rank")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 small scenes in twelve shards, with their vocabulary."""
    out = tmp_path_factory.mktemp("corpus") / "data"
    asked = ["synthetic", "--out", str(out), "--samples", "240", "--held-out", "24", "--size", "32"]
    assert corpus.main([*asked, "--shard-size", "20"]) == 0
    _spoil(out / "train-000003.tar")
    return out


def _spoil(shard: Path) -> None:
    """Cuts the first image of the shard in half, and takes the caption from the second sample."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(info.name.split(".")[0] for info, _ in members))
    with tarfile.open(shard, "w") as tar:
        for info, content in members:
            key, _, extension = info.name.partition(".")
            if key == keys[0] and extension in ("jpg", "png", "webp"):
                content = content[: len(content) // 2]
            if key != keys[1] or extension != "txt":
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def command(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """The launcher's own command line, two ranks."""
    overrides = (
        f"data.train=[{shards}/train-*.tar]", f"data.held_out=[{shards}/held_out-*.tar]",
        f"data.tokenizer={shards}/tokenizer.json", "model.text.vocab=2048", "model.text.context=32",
        f"system.run_dir={run_dir}", "system.report_every=2", "data.max_bad_share=0.05",
    )  # fmt: skip
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port"]
    launcher += [str(29600 + os.getpid() % 1000), str(ROOT / "engine/launch.py")]
    return [*launcher, "--config", str(ROOT / "tests/tiny.yaml"), *overrides, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def reports(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was let finish, with a window under the profiler."""
    here = tmp_path_factory.mktemp("whole")
    asked = command(shards, here / "run", *TRAINING, "profile.steps=3:5")
    done = subprocess.run(asked, cwd=here, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return here / "run"


def test_a_run_leaves_reports_pictures_checkpoint_and_usable_weights(whole: Path) -> None:
    run_dir, reported = whole, list(range(2, STEPS + 1, 2))
    assert [report["step"] for report in reports(run_dir)] == reported
    assert set(REPORTED) <= reports(run_dir)[-1].keys()
    lines = (run_dir / "log.txt").read_text().splitlines()
    assert sum(line.startswith("step ") for line in lines) == len(reported)
    assert any(line.startswith("attention: sdpa (auto") for line in lines)
    assert "corpus: 12 shards, 239 samples; 1 left out: 1 missing caption" in lines
    measured = [line for line in lines if line.startswith("energy: ")]
    assert len(measured) == 1
    assert ("energy/joules_per_sample" in reports(run_dir)[-1]) != measured[0].startswith("energy: not measured")

    with gzip.open(run_dir / "profile" / "rank0-steps3-5.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {name: ranges[name] for name in ("data", "trunk", "ema", "report")} == dict.fromkeys(
        ("data", "trunk", "ema"), 2
    ) | {"report": 1}
    assert any(line.startswith("compute: ") and "MFU against" in line for line in lines)
    assert 0 < reports(run_dir)[-1]["speed/mfu"] < reports(run_dir)[-1]["speed/hfu"] < 1

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(REPORTED) <= set(board.Tags()["scalars"])
    assert {"reconstructions", "latents"} <= set(board.Tags()["images"])
    assert [event.step for event in board.Scalars("loss/clip")] == reported

    with Image.open(run_dir / "pictures" / f"reconstructions-{STEPS:08d}.png") as picture:
        assert picture.size == (3 * 32, 2 * 32)  # three rec rows a rank; originals above reconstructions
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}"

    tokenizer = VisualTokenizer.from_run(run_dir)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    latent = tokenizer.encode(images)
    assert latent.shape == (2, 8, 4, 6)
    assert tokenizer.decode(latent).shape == images.shape

    choices = json.loads((run_dir / "choices.json").read_text())
    assert {"attention", "zero"} <= choices.keys()
    assert {f"{name}: {choice}" for name, choice in choices.items()} <= set(lines)
    page = write_report(run_dir).read_text()
    assert all(word in page for word in ("finished", "loss/clip", "data:image/png", "bound by", "predicted peak"))


def test_a_stopped_run_saves_and_goes_on_to_the_same_weights(shards: Path, whole: Path, tmp_path: Path) -> None:
    """SIGTERM to every rank between two reports: checkpoint, exit 143; --resume ends where the whole run ends."""
    stopped = tmp_path / "stopped"
    with (tmp_path / "launcher.log").open("w") as log:
        launcher = subprocess.Popen(
            command(shards, stopped, *TRAINING), env=environment(), stdout=log, stderr=log, cwd=tmp_path
        )
        try:
            while not (stopped / "log.jsonl").exists() or len(reports(stopped)) < 2:
                assert launcher.poll() is None, (tmp_path / "launcher.log").read_text()[-4000:]
                time.sleep(0.05)
            for pid in ranks_of(stopped):
                os.kill(pid, signal.SIGTERM)
            assert launcher.wait(timeout=120) == 143
        finally:
            launcher.kill()
            launcher.wait()
    reached = reports(stopped)[-1]["step"]
    assert reached < STEPS
    assert (stopped / "checkpoints" / "latest").read_text() == f"step-{reached:08d}"
    assert "go on with --resume" in (stopped / "log.txt").read_text()

    # So many steps of 12 rows are an epoch and a bit. The index left one sample out; a rank, or two, met the other.
    health = {name: value for name, value in reports(whole)[-1].items() if name.startswith("data/bad/")}
    assert len(health) == 2
    assert health.pop("data/bad/missing caption") == 1
    assert list(health.values()) in ([1], [2])
    logged = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in logged}) == len(logged) == 2

    resumed = command(shards, stopped, *TRAINING, "--resume")
    subprocess.run(resumed, env=environment(), check=True, capture_output=True, cwd=tmp_path)
    assert [report["step"] for report in reports(stopped)] == list(range(2, STEPS + 1, 2))
    expected, _ = read_weights(whole / "weights.safetensors")
    found, _ = read_weights(stopped / "weights.safetensors")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def ranks_of(run_dir: Path) -> list[int]:
    """The process ids of the ranks that train into `run_dir`: those of its launcher's children that run launch.py."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (proc / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it ended meanwhile
        if f"system.run_dir={run_dir}" in arguments and any(a.startswith("--local_rank") for a in arguments):
            found.append(int(proc.name))
    return found
