"""Measure energy, power, temperature and throttling, sampled by a thread beside the run; the one door to NVML (pynvml).

    with EnergyMeter(torch.device("cuda", 0), interval=1.0) as meter:
        meter.description          # "NVML's energy counter of the GPU, sampled every 1 s; the host is not counted"
        ...                        # steps
        meter.read().values        # {"energy/joules": 6.2e3, "energy/watts": 655.1, "energy/gpu_utilisation": 0.98,
                                   #  "energy/memory_gb": 71.4, "energy/temperature_c": 61.0,
                                   #  "energy/throttled_share": 0.0}: since the last read

A GPU is read through NVML, found by its UUID, whatever CUDA_VISIBLE_DEVICES says. Without a GPU the processor packages
are read from the kernel's powercap tree (RAPL; Intel's name, AMD's too):

    /sys/class/powercap/intel-rapl:0/name                       package-0
                                     energy_uj                  microjoules, wraps round after
                                     max_energy_range_uj        this many
    /sys/class/powercap/intel-rapl:0:0                          its cores: counted in the package already
    /sys/class/powercap/intel-rapl:1  (psys)                    the whole board: holds the packages
    /sys/class/powercap/intel-rapl-mmio:0                       package-0 again, by another interface
    Source: Linux, Documentation/power/powercap/powercap.rst.

What cannot be read is left out, never zero: without hardware or permission there are no values, and `description` says
why. An error while sampling ends it and is reported once; the run goes on. Only the thread calls NVML: neither the run
nor the GPU's queue waits for it, except `read`, which waits for one last sample, two seconds at most.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
TIMEOUT_SECONDS = 2.0  # how long a read waits for a sampler that hangs in a driver
Sample = dict[str, float]  # "joules" counts from the source's beginning; the rest is of the moment
# Bits of NVML's clock event reasons that slow a GPU down; idleness and clocks that a user chose do not count.
# nvml.h, nvmlClocksEventReasons.
THROTTLE_REASONS = {
    0x04: "power_cap",
    0x08: "hardware_slowdown",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
}


class EnergyUnavailable(Exception):
    """Energy cannot be read here; the message says why, and what would help."""


class EnergySource(Protocol):
    """Something with an energy counter."""

    description: str

    def sample(self) -> Sample:
        """Read the counters."""
        ...

    def close(self) -> None:
        """Release the driver."""
        ...


@dataclass(frozen=True)
class EnergyReading:
    """Values since the last read; none where it was not measured throughout. `error` is given once."""

    values: dict[str, float]
    error: str = ""


class EnergyMeter:
    """Sample `device` every `interval` seconds while the context is open."""

    def __init__(self, device: torch.device, interval: float = 1.0, powercap: Path = POWERCAP) -> None:
        self.description = ""
        self._device, self._interval, self._powercap = device, interval, powercap
        self._source: EnergySource | None = None
        self._window, self._error = _EnergyWindow(), ""
        self._lock, self._wake, self._sampled = threading.Lock(), threading.Event(), threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)  # no exit waits for a driver

    @property
    def is_measuring(self) -> bool:
        """Whether there is a source."""
        return self._source is not None

    def __enter__(self) -> EnergyMeter:
        try:
            self._source = NvmlGpu(self._device) if self._device.type == "cuda" else RaplCpu(self._powercap)
            self._window.add(time.monotonic(), self._source.sample())
        except Exception as error:  # EnergyUnavailable with its reason, or whatever a driver makes a library raise
            source, self._source, self.description = self._source, None, f"not measured: {_reason(error)}"
            if source is not None:
                with suppress(Exception):
                    source.close()
            return self
        self.description = f"{self._source.description}, sampled every {self._interval:g} s"
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_SECONDS)

    def read(self) -> EnergyReading:
        """Values since the last read, or since the context was opened."""
        if self.is_measuring:
            self._sampled.clear()
            self._wake.set()
            if not self._sampled.wait(TIMEOUT_SECONDS):
                self._fail(f"the device did not answer within {TIMEOUT_SECONDS:g} s")
        with self._lock:
            if self._source is None:
                error, self._error = self._error, ""
                return EnergyReading({}, error)
            values, self._window = self._window.values(), self._window.rest()
        return EnergyReading({f"energy/{name}": value for name, value in values.items()})

    def _run(self) -> None:
        source = self._source
        assert source is not None, "the thread starts once there is a source"
        while not self._is_stopping and self._source is not None:
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                moment, sample = time.monotonic(), source.sample()
            except Exception as error:  # the run must not end because a driver does
                self._fail(_reason(error))
            else:
                with self._lock:
                    self._window.add(moment, sample)
            self._sampled.set()
        with suppress(Exception):  # of a GPU that was lost
            source.close()

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._source is not None:
                self._source, self._error = None, f"energy is no longer measured: {reason}"


@dataclass
class _EnergyWindow:
    """The samples between two reads; the first is the last of the window before, so that no joule is lost."""

    moments: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def add(self, moment: float, sample: Sample) -> None:
        self.moments.append(moment)
        self.samples.append(sample)

    def rest(self) -> _EnergyWindow:
        return _EnergyWindow(self.moments[-1:], self.samples[-1:])

    def values(self) -> dict[str, float]:
        if len(self.samples) < 2:
            return {}
        samples = self.samples[1:]
        values = {name: _over_time(name, [sample[name] for sample in samples]) for name in samples[0]}
        if "joules" in values:
            values["joules"] = self.samples[-1]["joules"] - self.samples[0]["joules"]
            values["watts"] = values["joules"] / (self.moments[-1] - self.moments[0])
        return values


def _over_time(name: str, values: list[float]) -> float:
    is_fraction = name == "gpu_utilisation" or name.startswith("throttled")
    return sum(values) / len(values) if is_fraction else max(values)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, EnergyUnavailable) else f"{type(error).__name__}: {error}"


def combine_ranks(readings: Sequence[dict[str, float]]) -> dict[str, float]:
    """One report from the values of every rank that measures a device of its own.

    Joules and watts add up, and are left out where a rank's are missing: part of a sum is no sum. Utilisation is the
    mean; memory, temperature and throttling are those of the worst.
    """
    values = {}
    for name in sorted({name for reading in readings for name in reading}):
        found = [reading[name] for reading in readings if name in reading]
        if name in ("energy/joules", "energy/watts"):
            if len(found) == len(readings):
                values[name] = sum(found)
        else:
            values[name] = sum(found) / len(found) if name == "energy/gpu_utilisation" else max(found)
    return values


class NvmlGpu:
    """One GPU through NVML. Energy by its own counter (Volta and newer), else power summed over time."""

    def __init__(self, device: torch.device) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise EnergyUnavailable(f"NVML is read through nvidia-ml-py ({error}): pip install nvidia-ml-py") from None
        self._nvml.nvmlInit()
        try:
            self._probes = self._supported(self._handle(device))
        except Exception:
            self._nvml.nvmlShutdown()
            raise
        if "joules" in self._probes:
            how = "NVML's energy counter of the GPU"
        elif "power" in self._probes:
            how = "NVML's power of the GPU, summed over time (it has no energy counter)"
        else:
            how = "NVML reports neither energy nor power of this GPU, the rest"
        self.description = f"{how}; the host is not counted"
        self._joules = 0.0
        self._last: tuple[float, float] | None = None  # when power was read, and what it was

    def sample(self) -> Sample:
        """Read what this GPU supports of joules, gpu_utilisation (a fraction), memory_gb, temperature_c and
        throttled_share, and of the reasons for that as throttled/NAME (THROTTLE_REASONS): 1 where it holds now, else 0.
        Raises NVML's errors."""
        sample = {name: probe() for name, probe in self._probes.items()}
        if "power" in sample:
            sample["joules"] = self._summed(time.monotonic(), sample.pop("power"))
        if "reasons" in sample:
            reasons = int(sample.pop("reasons"))
            throttled = {f"throttled/{name}": float(bool(reasons & bit)) for bit, name in THROTTLE_REASONS.items()}
            sample |= {"throttled_share": max(throttled.values()), **throttled}
        return sample

    def close(self) -> None:
        """End this object's use of NVML."""
        self._nvml.nvmlShutdown()

    def _summed(self, moment: float, watts: float) -> float:
        if self._last is not None:
            before, watts_before = self._last
            self._joules += (watts + watts_before) / 2 * (moment - before)
        self._last = moment, watts
        return self._joules

    def _handle(self, device: torch.device) -> Any:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError_NotFound:  # a slice of a GPU has a name of its own
            return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _supported(self, handle: Any) -> dict[str, Callable[[], float]]:
        """The probes that this GPU and its driver support."""
        nvml = self._nvml
        probes: dict[str, Callable[[], float]] = {
            "joules": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu_utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "memory_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
            "temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            "old_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),  # drivers before 535
        }
        supported = {name: probe for name, probe in probes.items() if self._is_supported(probe)}
        older = supported.pop("old_reasons", None)
        if "reasons" not in supported and older is not None:
            supported["reasons"] = older
        if "joules" in supported:
            supported.pop("power", None)
        return supported

    def _is_supported(self, probe: Callable[[], float]) -> bool:
        nvml = self._nvml
        try:
            probe()
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return False
        return True


class RaplCpu:
    """The processor packages of this machine, all programs together."""

    def __init__(self, powercap: Path) -> None:
        self._packages = RaplPackages(powercap)
        count = len(self._packages)
        self.description = f"RAPL of {count} processor package(s), all programs of the machine together"

    def sample(self) -> Sample:
        """Joules since this object was made. Raises EnergyUnavailable where a counter cannot be read any more."""
        return {"joules": self._packages.joules()}

    def close(self) -> None:
        pass


class RaplPackages:
    """The energy counters of all processor packages. Read more often than they wrap: minutes apart at most.

    Raises EnergyUnavailable where there are none, or where only root may read them.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        self._zones = [zone for zone in zones if _zone_name(zone).startswith("package")]
        if not self._zones:
            raise EnergyUnavailable(
                f"{root} shows no processor package (RAPL): virtual machines and containers often hide it"
            )
        self._ranges = [_microjoules(zone / "max_energy_range_uj") for zone in self._zones]
        self._before = self._read()
        self._total = 0

    def __len__(self) -> int:
        return len(self._zones)

    def joules(self) -> float:
        """Used by all packages since this object was made, other programs included."""
        now = self._read()
        for before, after, span in zip(self._before, now, self._ranges, strict=True):
            self._total += after - before if after >= before else after - before + span
        self._before = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [_microjoules(zone / "energy_uj") for zone in self._zones]


def _zone_name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _microjoules(file: Path) -> int:
    try:
        return int(file.read_text())
    except PermissionError:
        raise EnergyUnavailable(
            f"{file} may be read by root alone (as kernels since 5.10 have it): `sudo chmod a+r {file.parent}/*_uj` "
            "opens it until the next start of the machine"
        ) from None
    except (OSError, ValueError) as error:
        raise EnergyUnavailable(f"{file} cannot be read: {error}") from None
