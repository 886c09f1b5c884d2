"""Stands in for pynvml where there is no GPU: the same functions and errors, answers set by the test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

FUNCTIONS = (
    "nvmlInit",
    "nvmlShutdown",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)
ERRORS = ("NVMLError_NotFound", "NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVMLError_NoPermission",
          "NVMLError_GpuIsLost", "NVMLError_DriverNotLoaded")  # fmt: skip
UUID = "7d1c2f5e-0000-1111-2222-333344445555"


class FakeNvml(ModuleType):
    """One GPU. `answers` maps a function's name to what it returns or raises; `calls` counts."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.NVMLError = type("NVMLError", (Exception,), {})
        for name in ERRORS:
            setattr(self, name, type(name, (self.NVMLError,), {}))
        self.NVML_TEMPERATURE_GPU = 0
        self.calls: dict[str, int] = dict.fromkeys(FUNCTIONS, 0)
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,  # millijoules since the driver was loaded
            "nvmlDeviceGetPowerUsage": 300_000,  # milliwatts
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=80, memory=40),  # percent
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 10**9, free=30 * 10**9, used=50 * 10**9),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
        }

    def nvmlInit(self) -> None:
        self._answer("nvmlInit")

    def nvmlShutdown(self) -> None:
        self._answer("nvmlShutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise self.NVMLError_NotFound("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetTotalEnergyConsumption", handle)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetPowerUsage", handle)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self._answer("nvmlDeviceGetUtilizationRates", handle)

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        return self._answer("nvmlDeviceGetMemoryInfo", handle)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self._answer("nvmlDeviceGetTemperature", handle)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksEventReasons", handle)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", handle)

    def fail(self, name: str, error: str) -> None:
        self.answers[name] = getattr(self, error)(error.removeprefix("NVMLError_"))

    def _answer(self, name: str, handle: str = "handle") -> Any:
        assert handle == "handle"
        self.calls[name] += 1
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer() if isinstance(answer, Callable) else answer


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
