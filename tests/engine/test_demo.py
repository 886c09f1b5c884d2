"""The demo learns: the whole of `make demo`'s training, for the seed that ships and two others.

Half an hour on two cores, so it is no part of `make test`: run `make demo-seeds`. What it last gave stands
in docs/benchmarks/demo.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import run, summary

pytestmark = [pytest.mark.demo, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo_data"
    asked = ["synthetic", "--out", str(out), "--samples", "6000", "--held-out", "1024"]
    subprocess.run([sys.executable, "-m", "data.corpus", *asked], cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(corpus: Path, tmp_path: Path, seed: int) -> None:
    run_dir = tmp_path / "run"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "engine/launch.py"]
    overrides = (
        f"data.train=[{corpus}/train-*.tar]",
        f"data.held_out=[{corpus}/held_out-*.tar]",
        f"data.tokenizer={corpus}/tokenizer.json",
        f"system.run_dir={run_dir}",
        f"seed={seed}",
    )
    subprocess.run([*launcher, "--config", "configs/demo.yaml", *overrides], cwd=ROOT, check=True)
    assert run.main([str(run_dir)]) == 0
    assert summary.main([str(run_dir)]) == 0
    results = json.loads((run_dir / "evaluation.json").read_text())
    assert results["zero_shot"]["times_chance"] >= 5
    assert results["reconstruction"]["psnr_db"] > 20
    first, *_, last = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    for name in ("clip", "ssl", "rec", "total"):
        assert last[f"loss/{name}"] < first[f"loss/{name}"], name
