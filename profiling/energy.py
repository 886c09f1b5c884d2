"""Energy, and what else the device says of itself, sampled by a thread beside the run: the one door to NVML (pynvml).

    with EnergyMeter(torch.device("cuda", 0), interval=1.0) as meter:
        meter.said                 # "NVML's energy counter of the GPU, sampled every 1 s; the host is not counted"
        ...                        # steps
        meter.read().values        # {"energy/joules": 6.2e3, "energy/watts": 655.1, "energy/gpu_utilisation": 0.98,
                                   #  "energy/memory_gb": 71.4, "energy/temperature_c": 61.0,
                                   #  "energy/throttled_share": 0.0}: since the last read

A GPU is read through NVML, found by its UUID, so that CUDA_VISIBLE_DEVICES may say what it likes. Without a GPU the
processor packages are read (profiling/powercap.py). What cannot be read is left out, never zero: without hardware or
permission there are no values at all, and `said` is the sentence why. An error in the midst ends the sampling and is
told once; the run goes on. NVML is asked by the thread alone: neither the run nor the GPU's queue ever waits for it,
but for `read`, which waits for one last sample, two seconds at most.
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

from profiling.powercap import POWERCAP, NotMeasured, Packages

PATIENCE_SECONDS = 2.0  # how long a read waits for a sampler that hangs in a driver
Sample = dict[str, float]  # "joules" counts from the source's beginning; the rest is of the moment
# Bits of NVML's clock event reasons that slow a GPU down; idleness and clocks that a user chose do not count.
# nvml.h, nvmlClocksEventReasons.
SLOWED_BY = {
    0x04: "power_cap",
    0x08: "hardware_slowdown",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
}


class Source(Protocol):
    """Something with an energy counter."""

    said: str

    def sample(self) -> Sample:
        """What its counters say now."""
        ...

    def close(self) -> None:
        """Gives the driver back."""
        ...


@dataclass(frozen=True)
class Reading:
    """What was used since the last read: no values where it was not measured throughout. `trouble` is told once."""

    values: dict[str, float]
    trouble: str = ""


class EnergyMeter:
    """Samples `device` every `interval` seconds while its context is open; see the module's text."""

    def __init__(self, device: torch.device, interval: float = 1.0, powercap: Path = POWERCAP) -> None:
        self.said = ""
        self._device, self._interval, self._powercap = device, interval, powercap
        self._source: Source | None = None
        self._window, self._trouble = _Window(), ""
        self._lock, self._wake, self._answered = threading.Lock(), threading.Event(), threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)  # no exit waits for a driver

    @property
    def is_measuring(self) -> bool:
        """Whether a source was found on entering."""
        return self._source is not None

    def __enter__(self) -> EnergyMeter:
        try:
            self._source = Gpu(self._device) if self._device.type == "cuda" else Cpu(self._powercap)
            self._window.add(time.monotonic(), self._source.sample())
        except Exception as error:  # NotMeasured with its reason, or whatever a driver makes a library raise
            source, self._source, self.said = self._source, None, f"not measured: {_reason(error)}"
            if source is not None:
                with suppress(Exception):
                    source.close()
            return self
        self.said = f"{self._source.said}, sampled every {self._interval:g} s"
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE_SECONDS)

    def read(self) -> Reading:
        """What was used since the last read, or since the context was opened."""
        if self.is_measuring:
            self._answered.clear()
            self._wake.set()
            if not self._answered.wait(PATIENCE_SECONDS):
                self._fail(f"the device did not answer within {PATIENCE_SECONDS:g} s")
        with self._lock:
            if self._source is None:
                trouble, self._trouble = self._trouble, ""
                return Reading({}, trouble)
            values, self._window = self._window.values(), self._window.rest()
        return Reading({f"energy/{name}": value for name, value in values.items()})

    def _watch(self) -> None:
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
            self._answered.set()
        with suppress(Exception):  # of a GPU that was lost
            source.close()

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._source is not None:
                self._source, self._trouble = None, f"energy is no longer measured: {reason}"


@dataclass
class _Window:
    """The samples between two reads; the first is the last of the window before, so that no joule is lost."""

    moments: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def add(self, moment: float, sample: Sample) -> None:
        self.moments.append(moment)
        self.samples.append(sample)

    def rest(self) -> _Window:
        return _Window(self.moments[-1:], self.samples[-1:])

    def values(self) -> dict[str, float]:
        if len(self.samples) < 2:
            return {}
        samples = self.samples[1:]
        values = {name: _over_time(name, [sample[name] for sample in samples]) for name in samples[0]}
        if "joules" in values:
            values["joules"] = self.samples[-1]["joules"] - self.samples[0]["joules"]
            values["watts"] = values["joules"] / (self.moments[-1] - self.moments[0])
        return values


def over_ranks(readings: Sequence[dict[str, float]]) -> dict[str, float]:
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


class Cpu:
    """The processor packages of this machine, whoever uses them."""

    def __init__(self, powercap: Path) -> None:
        self._packages = Packages(powercap)
        self.said = f"RAPL of {len(self._packages)} processor package(s), all programs of the machine together"

    def sample(self) -> Sample:
        """Joules since this object was made. Raises NotMeasured where a counter cannot be read any more."""
        return {"joules": self._packages.joules()}

    def close(self) -> None:
        pass


class Gpu:
    """One GPU through NVML. Energy by its own counter (Volta and newer), else power summed over time."""

    def __init__(self, device: torch.device) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise NotMeasured(f"NVML is read through nvidia-ml-py ({error}): pip install nvidia-ml-py") from None
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
            how = "NVML tells neither energy nor power of this GPU, the rest"
        self.said = f"{how}; the host is not counted"
        self._joules = 0.0
        self._last: tuple[float, float] | None = None  # when power was read, and what it was

    def sample(self) -> Sample:
        """What this GPU answers of joules, gpu_utilisation (a share), memory_gb, temperature_c and throttled_share, and
        of the reasons for that as throttled/NAME (SLOWED_BY): 1 where it holds now, else 0. Raises NVML's errors."""
        sample = {name: probe() for name, probe in self._probes.items()}
        if "power" in sample:
            sample["joules"] = self._summed(time.monotonic(), sample.pop("power"))
        if "reasons" in sample:
            reasons = int(sample.pop("reasons"))
            slowed = {f"throttled/{name}": float(bool(reasons & bit)) for bit, name in SLOWED_BY.items()}
            sample |= {"throttled_share": max(slowed.values()), **slowed}
        return sample

    def close(self) -> None:
        """Ends this object's use of NVML."""
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
        """What this GPU and its driver answer, in units of ours."""
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
        found = {name: probe for name, probe in probes.items() if self._is_answered(probe)}
        older = found.pop("old_reasons", None)
        if "reasons" not in found and older is not None:
            found["reasons"] = older
        if "joules" in found:
            found.pop("power", None)
        return found

    def _is_answered(self, probe: Callable[[], float]) -> bool:
        nvml = self._nvml
        try:
            probe()
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return False
        return True


def _over_time(name: str, found: list[float]) -> float:
    is_share = name == "gpu_utilisation" or name.startswith("throttled")
    return sum(found) / len(found) if is_share else max(found)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, NotMeasured) else f"{type(error).__name__}: {error}"
