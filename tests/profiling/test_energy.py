"""Joules are counted where hardware tells them, and nothing is told where it does not."""

from __future__ import annotations

import itertools
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.reporting.instruments
from engine.reporting.instruments import EnergyReport, measure_energy
from model.losses.comm import Comm
from profiling.instruments import energy as module
from profiling.instruments.energy import EnergyMeter, EnergyUnavailable, RaplPackages, combine_ranks
from tests.harness import run_ranks
from tests.profiling import fake_nvml
from tests.profiling.fake_nvml import FakeNvml

pytestmark = pytest.mark.L0
GPU = torch.device("cuda", 0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=fake_nvml.UUID))
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes between any two looks at the clock."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def still(device: torch.device = GPU) -> EnergyMeter:
    """A meter that samples when it is read and at no other time."""
    return EnergyMeter(device, interval=1000.0)


def zone(root: Path, name: str, label: str, microjoules: int, span: int = 10_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_the_fake_has_the_signatures_of_the_real_library() -> None:
    real = pytest.importorskip("pynvml")
    for name in fake_nvml.FUNCTIONS:
        assert fake_nvml.parameters(getattr(FakeNvml(), name)) == fake_nvml.parameters(getattr(real, name)), name
    for name in fake_nvml.ERRORS:
        assert issubclass(getattr(real, name), real.NVMLError)
    assert real.NVML_TEMPERATURE_GPU == FakeNvml().NVML_TEMPERATURE_GPU
    named = {
        "power_cap": real.nvmlClocksEventReasonSwPowerCap,
        "hardware_slowdown": real.nvmlClocksEventReasonHwSlowdown,
        "software_thermal": real.nvmlClocksEventReasonSwThermalSlowdown,
        "hardware_thermal": real.nvmlClocksEventReasonHwThermalSlowdown,
        "power_brake": real.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    assert {name: bit for bit, name in module.THROTTLE_REASONS.items()} == named


def test_joules_are_the_difference_of_the_gpus_counter(nvml: FakeNvml) -> None:
    with still() as meter:
        assert meter.description.startswith("NVML's energy counter of the GPU; the host is not counted, sampled every")
        nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 5_700_000
        values = meter.read().values
        assert values["energy/joules"] == pytest.approx(700)
        assert values["energy/gpu_utilisation"] == pytest.approx(0.8)
        assert values["energy/memory_gb"] == pytest.approx(50)
        assert values["energy/temperature_c"] == 61
        assert values["energy/throttled_share"] == 0
        assert values["energy/watts"] > 0
        assert meter.read().values["energy/joules"] == 0, "a joule is told once"
    assert nvml.calls["nvmlShutdown"] == 1


def test_power_is_summed_by_trapezes_where_no_counter_is(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.fail("nvmlDeviceGetTotalEnergyConsumption", "NVMLError_NotSupported")
    source = module.NvmlGpu(GPU)
    assert "summed over time" in source.description
    moments = iter((0.0, 2.0, 3.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    joules = []
    for watts in (100, 300, 200):
        nvml.answers["nvmlDeviceGetPowerUsage"] = 1000 * watts
        joules.append(source.sample()["joules"])
    assert joules == [0, (100 + 300) / 2 * 2, 400 + (300 + 200) / 2 * 1]


def test_watts_are_joules_over_the_time_they_took(nvml: FakeNvml, clock: None) -> None:
    with still() as meter:
        nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 5_600_000
        values = meter.read().values
    assert values["energy/watts"] == pytest.approx(600.0)  # one tick of the clock between the two samples


def test_what_slows_the_gpu_down_is_named_and_idleness_is_not(nvml: FakeNvml) -> None:
    nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = 0x01 | 0x04
    with still() as meter:
        values = meter.read().values
        assert values["energy/throttled_share"] == 1
        assert values["energy/throttled/power_cap"] == 1
        assert values["energy/throttled/hardware_thermal"] == 0
        nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = 0x01
        assert meter.read().values["energy/throttled_share"] == 0


def test_an_old_driver_is_asked_by_the_old_name(nvml: FakeNvml) -> None:
    nvml.fail("nvmlDeviceGetCurrentClocksEventReasons", "NVMLError_FunctionNotFound")
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40
    with still() as meter:
        assert meter.read().values["energy/throttled/hardware_thermal"] == 1


def test_what_a_gpu_does_not_tell_is_left_out(nvml: FakeNvml) -> None:
    for name in ("TotalEnergyConsumption", "PowerUsage", "UtilizationRates"):
        nvml.fail(f"nvmlDeviceGet{name}", "NVMLError_NotSupported")
    with still() as meter:
        assert "neither energy nor power" in meter.description
        values = meter.read().values
    assert "energy/temperature_c" in values
    assert not {"energy/joules", "energy/watts", "energy/gpu_utilisation"} & values.keys()


def test_the_thread_samples_by_itself_and_ends_with_the_context(nvml: FakeNvml) -> None:
    sampled = threading.Event()

    def count() -> int:
        if nvml.calls["nvmlDeviceGetTotalEnergyConsumption"] > 5:
            sampled.set()
        return 5_000_000

    nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = count
    with EnergyMeter(GPU, interval=0.001):
        assert sampled.wait(10)
        assert "energy" in [thread.name for thread in threading.enumerate()]
    assert "energy" not in [thread.name for thread in threading.enumerate()]


def test_a_failure_in_the_midst_is_told_once_and_ends_the_sampling(nvml: FakeNvml) -> None:
    with still() as meter:
        assert meter.read().values
        nvml.fail("nvmlDeviceGetTotalEnergyConsumption", "NVMLError_GpuIsLost")
        first, second = meter.read(), meter.read()
        calls = nvml.calls["nvmlDeviceGetTotalEnergyConsumption"]
        meter.read()
    assert first.values == second.values == {}
    assert first.error == "energy is no longer measured: NVMLError_GpuIsLost: GpuIsLost"
    assert second.error == ""
    assert nvml.calls["nvmlDeviceGetTotalEnergyConsumption"] == calls


def test_a_driver_that_hangs_holds_nobody_up(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.05)
    release = threading.Event()
    with still() as meter:
        nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda: release.wait(60)
        reading = meter.read()
        assert reading.values == {}
        assert "did not answer within" in reading.error
        release.set()


def test_without_driver_or_library_there_are_no_values_and_a_reason(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.fail("nvmlInit", "NVMLError_DriverNotLoaded")
    with still() as meter:
        assert meter.description == "not measured: NVMLError_DriverNotLoaded: DriverNotLoaded"
        assert meter.read().values == {}
        assert not meter.is_measuring
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with still() as meter:
        assert "pip install nvidia-ml-py" in meter.description
        assert meter.read() == module.EnergyReading({})


def test_packages_alone_are_counted(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    packages = RaplPackages(tmp_path)
    for other in others:
        (other / "energy_uj").write_text("9000000")
    (first / "energy_uj").write_text("3500000")
    (second / "energy_uj").write_text("5500000")
    assert packages.joules() == pytest.approx(3.0)
    assert packages.joules() == pytest.approx(3.0)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, span=10_000_000)
    packages = RaplPackages(tmp_path)
    for now, total in ((9_500_000, 0.5), (1_000_000, 2.0), (500_000, 11.5)):
        (folder / "energy_uj").write_text(str(now))
        assert packages.joules() == pytest.approx(total)


def test_a_run_without_gpu_reads_the_packages(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(torch.device("cpu"), interval=1000.0, powercap=tmp_path) as meter:
        assert meter.description.startswith("RAPL of 1 processor package(s)")
        (folder / "energy_uj").write_text("2000000")
        values = meter.read().values
    assert values["energy/joules"] == pytest.approx(2.0)
    assert values.keys() == {"energy/joules", "energy/watts"}


def test_a_tree_that_is_missing_or_closed_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EnergyMeter(torch.device("cpu"), powercap=tmp_path / "none") as meter:
        assert "shows no processor package" in meter.description
        assert meter.read().values == {}

    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read_text = Path.read_text

    def closed(self: Path) -> str:  # a chmod would not keep root out
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self)

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(EnergyUnavailable, match="sudo chmod a\\+r"):
        RaplPackages(tmp_path)
    with EnergyMeter(torch.device("cpu"), powercap=tmp_path) as meter:
        assert "may be read by root alone" in meter.description
        assert meter.read().values == {}


def test_joules_of_ranks_add_up_and_the_worst_is_shown() -> None:
    one = {"energy/joules": 10.0, "energy/watts": 5.0, "energy/gpu_utilisation": 0.5, "energy/temperature_c": 40.0}
    two = {"energy/joules": 20.0, "energy/watts": 6.0, "energy/gpu_utilisation": 1.0, "energy/temperature_c": 70.0}
    assert combine_ranks([one, two]) == {
        "energy/joules": 30.0,
        "energy/watts": 11.0,
        "energy/gpu_utilisation": 0.75,
        "energy/temperature_c": 70.0,
    }
    assert combine_ranks([one, {}]).keys() == {"energy/gpu_utilisation", "energy/temperature_c"}, (
        "part of a sum is no sum"
    )
    assert combine_ranks([]) == {}


def test_joules_per_sample_are_of_the_steps_since_the_last_report(nvml: FakeNvml) -> None:
    said: list[str] = []
    with still() as meter:
        energy = EnergyReport(meter, samples_per_step=8, log=said.append)
        nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 5_800_000
        assert energy.read(10)["energy/joules_per_sample"] == pytest.approx(800 / 80)
        nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 6_000_000
        assert energy.read(5)["energy/joules_per_sample"] == pytest.approx(200 / 40)
        nvml.fail("nvmlDeviceGetPowerUsage", "NVMLError_GpuIsLost")  # not asked: there is a counter
        nvml.fail("nvmlDeviceGetTemperature", "NVMLError_GpuIsLost")
        assert energy.read(5) == energy.read(5) == {}
    assert len(said) == 1


def report_of(comm: Comm, powercap: Path) -> tuple[dict[str, float], list[str]]:
    vars(engine.reporting.instruments)["EnergyMeter"] = partial(EnergyMeter, interval=1000.0, powercap=powercap)
    said: list[str] = []
    with measure_energy(torch.device("cpu"), samples_per_step=4, log=said.append) as energy:
        if comm.rank == 0:
            (powercap / "intel-rapl:0" / "energy_uj").write_text("8000000")
        return energy.read(1), said


@pytest.mark.L1
@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks on CPU")
def test_ranks_that_share_a_processor_count_it_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (first, said), (second, said_too) = run_ranks(report_of, 2, tmp_path)
    assert first == second
    assert first["energy/joules"] == pytest.approx(8.0)
    assert first["energy/joules_per_sample"] == pytest.approx(2.0)
    assert said == said_too
    assert len(said) == 1
    assert said[0].startswith("energy: RAPL of 1 processor package(s)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and its driver")
def test_a_busy_gpu_uses_more_than_nothing_and_its_memory_is_seen() -> None:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with EnergyMeter(torch.device("cuda"), interval=0.1) as meter:
        assert meter.is_measuring, meter.description
        begin = module.time.monotonic()
        while module.time.monotonic() - begin < 2:
            x @ x
            torch.cuda.synchronize()
        values = meter.read().values
    assert 20 < values["energy/watts"] < 2000
    assert values["energy/joules"] == pytest.approx(2 * values["energy/watts"], rel=0.2)
    assert values["energy/gpu_utilisation"] > 0.3
    assert values["energy/memory_gb"] >= x.nbytes / 1e9
    assert 10 < values["energy/temperature_c"] < 110
