"""python -m profiling.plan, from a config to a ranking and a DeepSpeed JSON that a run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs import load_config
from configs.deepspeed import load_ds_config
from profiling import scaling
from profiling.benches import predictions as bench
from profiling.benches.recorder import BenchRecorder
from profiling.cost.peak_memory import predict_peak
from profiling.instruments.machine import PairedTimes, VariantTimes
from profiling.plan import __main__ as plan
from profiling.plan import rates
from profiling.plan import search as plan_search
from profiling.plan.rates import ClusterGpu, NetworkLinks, parse_links, rates_of
from profiling.plan.search import Cluster, LayoutPlan, LayoutVariant, search
from profiling.plan.step_time import ExecutionMode
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's sizes, as a file."""
    path = tmp_path_factory.mktemp("plan") / "demo.yaml"
    path.write_text(Path("configs/demo.yaml").read_text())
    return str(path)


def test_the_best_plan_is_a_command_that_a_run_takes(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "ds.json", tmp_path / "plans.json"
    arguments = ["--config", preset, "--gpu", "h100", "--gpus", "2", "--ds_config-out", str(out), "--json", str(table)]
    assert plan.main([*arguments, "optim.precision=bf16"]) == 0
    said = capsys.readouterr().out
    assert "ZeRO-1" in said
    assert "Assumed, not measured" in said
    command = said.strip().splitlines()[-1].split()
    assert command[:2] == ["deepspeed", "--hostfile"]
    overrides = [word for word in command if "=" in word]
    config = load_config(preset, overrides)
    assert load_ds_config(command[command.index("--ds_config") + 1], config, 2)["train_batch_size"] == 64
    plans = json.loads(table.read_text())
    speeds = [each["samples_per_second"] for each in plans if each["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    assert {each["variant"]["stage"] for each in plans} == {1, 2, 3}


def test_a_small_gpu_pushes_the_search_to_checkpointing_and_parts_and_then_refuses(
    preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_search, "STAGES", ((3, None),))
    monkeypatch.setattr(plan_search, "MICRO_BATCHES", (1, 2))
    config = tiny_config("optim.precision=bf16", "batch.clip=48")
    cluster = Cluster(
        1, rates_of("h100"), parse_links("nvlink,ib400", "h100"), ExecutionMode("flash3", is_compiled=True)
    )
    roomy = search(config, cluster, samples=1e6)
    assert {each.variant.checkpointing for each in roomy} == {"off"}, "nothing else was needed"
    monkeypatch.setitem(rates.GPUS, "h100", tight(min(each.memory for each in roomy)))
    tightened = Cluster(1, rates_of("h100"), cluster.links, cluster.mode)
    plans = search(config, tightened, samples=1e6)
    assert any(each.fits for each in plans)
    assert any(each.variant.checkpointing == "selective" for each in plans)
    assert any(each.variant.micro_batches > 1 for each in plans)
    fits = [each.fits for each in plans]
    assert fits == sorted(fits, reverse=True), "those that fit come first"
    monkeypatch.setattr(plan_search, "STAGES", ((1, None),))
    monkeypatch.setitem(rates.GPUS, "h100", tight(1))
    assert plan.main(["--config", preset, "--gpus", "2"]) == 1
    printed = capsys.readouterr()
    assert "Refused: " in printed.out
    assert "nothing fits" in printed.err


def tight(num_bytes: int) -> ClusterGpu:
    """An H100 on which what needs a byte less than `num_bytes` fits."""
    return ClusterGpu("NVIDIA H100 80GB HBM3", (num_bytes - 1) / (1 - rates.RESERVED) / 1e9, 450e9, 700)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "k80", "--gpus", "2"), "--gpu k80: no data sheet"),
        (("--gpus", "2", "--link", "string"), "--link string"),
        (("--gpus", "3"), "3 ranks do not divide data.streams=2"),
        (("--gpus", "2", "optim.stepz=3"), "stepz"),
    ],
)
def test_a_mistake_is_one_line(
    preset: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config", preset, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_copy_a_host_is_advised_where_weights_are_gathered_twice_and_the_link_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_search, "STAGES", ((3, 0),))
    freed = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    ds_json = LayoutVariant.ds_json
    config = tiny_config("optim.precision=bf16", "batch.clip=16", "batch.ssl=16", "batch.rec=16", "data.streams=16")

    def plans(gpus: int) -> dict[int, LayoutPlan]:
        slow = NetworkLinks(intra=450e9, inter=1e6)
        cluster = Cluster(gpus, rates_of("h100"), slow, ExecutionMode("flash3", is_compiled=True))
        return {each.variant.hpz: each for each in search(config, cluster, samples=1e6)}

    assert set(plans(16)) == {1}, "the tiny student stays whole from forward to backward"
    monkeypatch.setattr(
        LayoutVariant,
        "ds_json",
        lambda self: {**ds_json(self), "zero_optimization": ds_json(self)["zero_optimization"] | freed},
    )
    found = plans(16)
    assert found[8].time.seconds < found[1].time.seconds
    assert found[8].memory > found[1].memory
    assert found[8].variant.ds_json()["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "a copy a host of 8" in found[8].variant.name
    assert not found[8].variant.is_shipped
    assert set(plans(8)) == {1}, "one host has all of it anyway"


def test_no_gpus_are_no_plan(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        plan.main(["--config", preset, "--gpus", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith("--gpus 0: a plan needs a GPU; give at least 1; see --help")


def test_a_dry_run_builds_the_largest_preset_on_1024_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_search, "STAGES", ((3, None),))
    arguments = ["--config", "configs/vtp_7b.yaml", "--gpus", "1024", "objectives.rec.lpips_weights=none"]
    assert plan.main(arguments) == 0
    said = capsys.readouterr().out
    assert "16," in said, "parameters of student and teacher"
    assert "ZeRO-3" in said


def test_compiled_blocks_keep_less_than_eager_ones_of_the_same_components() -> None:
    config = tiny_config("optim.precision=bf16")
    ds_config = LayoutVariant(3, None, 1, "off", "bf16").ds_config(config, 1)
    eager = predict_peak(config, ds_config, 1)
    compiled = eager.as_compiled(config)
    assert [each.name for each in compiled.components] == [each.name for each in eager.components]
    trunk = {each.name: each.bytes for each in eager.components}["activations: trunk"]
    assert compiled.device_bytes < eager.device_bytes
    assert eager.device_bytes - compiled.device_bytes < trunk


def test_this_machine_is_measured(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", preset, "--gpu", "this", "--gpus", "2"]) == 0
    assert "Rates were measured on this machine" in capsys.readouterr().out


def test_strong_scaling_ends_where_a_gpu_would_have_no_row() -> None:
    assert scaling.config_at("vtp_l", 2048, is_weak=False) is not None
    assert scaling.config_at("vtp_l", 4096, is_weak=False) is None
    weak = scaling.config_at("vtp_l", 256, is_weak=True)
    assert weak is not None
    assert weak.batch.clip == 32_768


@pytest.mark.L2
def test_the_scaling_tables_end_with_the_rows_and_name_what_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "SIZES", (128, 4096))
    monkeypatch.setattr(plan_search, "STAGES", ((3, 0),))
    assert scaling.main(["--preset", "vtp_l"]) == 0
    weak, strong = capsys.readouterr().out.split("strong scaling")
    assert "| 128 | 16,384 |" in weak
    assert "| 4,096 | 524,288 |" in weak
    assert "communication hides behind computing" in weak
    assert "| 4,096 |  | fewer rows than GPUs |" in strong


def test_the_bench_puts_a_prediction_over_a_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.PlanCase("tiny", tiny_config("data.streams=1"))
    monkeypatch.setattr(bench, "cases", lambda: [case])
    monkeypatch.setattr(bench, "published_notes", lambda: ["as published"])
    recorder = BenchRecorder(rounds=1)
    bench.bench_plan(recorder)
    [found] = recorder.results
    assert found.rows[0].median_ms > 0
    assert found.notes[0].startswith("tiny: predicted over measured ")
    assert found.notes[1] == "as published"
    monkeypatch.setattr(
        bench, "time_variants", lambda steps, **_: PairedTimes(dict.fromkeys(steps, VariantTimes((4.0,))))
    )
    monkeypatch.setattr(bench.PlanCase, "predicted", lambda self, captions: 3.0)
    row, note = bench.compare(case, rounds=2)
    assert row.median_ms == 4000
    assert note == "tiny: predicted over measured 0.75 (rounds: 0.75, 0.75)"
