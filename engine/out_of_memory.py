"""Explain a lack of memory: what was in use, what had been predicted, and which setting lowers it by how much.

    memory = MemoryAdvisor(config, ds_config, run_dir, comm.rank, comm.world_size, device)
    with memory.explained(f"in step {step}"):
        train_step(...)

A run that asks for more than there is ends with one error instead of a traceback into a kernel: every change that would
lower the peak and leave the results alone, the largest saving first, predicted (profiling/cost/peak_memory.py). Beside
the run

    runs/NAME/out_of_memory/rank3.json       what was held, predicted, advised
    runs/NAME/out_of_memory/rank3.pickle     on CUDA, the allocator's segments, for https://pytorch.org/memory_viz
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs import Config, RunConfig, UserError
from configs.load import one_line
from engine.zero import DTYPES
from kernels.attention import DENSE_KERNELS, resolve_attention
from profiling.cost.peak_memory import MemoryFootprint, Saving, largest_parts, predict_peak, savings
from profiling.instruments.memory import memory_in_use

# torch's allocator on the host, the kernel, CUDA and NCCL outside torch's allocator, cuBLAS.
MESSAGES = ("can't allocate memory", "Cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, is a lack of memory."""
    if error is None:
        return False
    has_text = isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in MESSAGES)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or has_text or is_out_of_memory(error.__cause__)


@dataclass(frozen=True)
class MemoryAdvisor:
    """Write a report of a rank's memory, with advice, where there is not enough."""

    config: RunConfig
    ds_config: dict[str, Any]
    run_dir: Path
    rank: int
    world_size: int
    device: torch.device

    @contextmanager
    def explained(self, moment: str) -> Iterator[None]:
        """Turn a lack of memory inside the `with` into a UserError with advice. `moment` names what was being done."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(self._explain(moment, error)) from error

    def _explain(self, moment: str, error: Exception) -> str:
        found = memory_in_use()
        text = f"memory ran out on rank {self.rank} of {self.world_size}, {moment}: {one_line(error)}"
        try:
            predicted, advice = self._predict()
        except Exception as failure:  # a prediction that fails must not hide what happened
            details = self._write(moment, error, found, None, [])
            return f"{text}. Nothing could be predicted ({one_line(failure)}); {details}"
        details = self._write(moment, error, found, predicted, advice)
        lines = [text, f"predicted peak {predicted.device_bytes / 2**30:.1f} GiB (blocks not compiled): "
                       f"{largest_parts(predicted)}; held: {_describe(found)}"]  # fmt: skip
        if advice:
            lines += ["what lowers it and leaves the results alone, predicted:", *(f"  {each}" for each in advice)]
        else:
            lines.append("no system setting lowers it: a smaller batch or model is another run")
        return "\n".join([*lines, details])

    def _predict(self) -> tuple[MemoryFootprint, list[Saving]]:
        if not isinstance(self.config, Config):
            raise UserError(f"memory is predicted for pre-training, this run is of kind {self.config.kind}")
        system, dtype = self.config.system, DTYPES[self.config.optim.precision]
        backend = resolve_attention(system.attention, self.device, dtype, system.deterministic).name
        attention = backend if backend in DENSE_KERNELS else "sdpa"
        case = (self.config, self.ds_config, self.world_size, attention, self.device.type)
        return predict_peak(*case), savings(*case)

    def _write(
        self,
        moment: str,
        error: Exception,
        found: dict[str, int],
        predicted: MemoryFootprint | None,
        advice: list[Saving],
    ) -> str:
        """Write the details; return where they are, or why they could not be written."""
        components = [] if predicted is None else [asdict(part) for part in predicted.components]
        report = {
            "moment": moment,
            "error": str(error),
            "held": found,
            "predicted": components,
            "predicted_peak_bytes": None if predicted is None else predicted.device_bytes,
            "advice": [asdict(each) for each in advice],
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(report, indent=2) + "\n")
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._path.with_suffix(".pickle")))
        except OSError as trouble:
            return f"details could not be written: {one_line(trouble)}"
        return f"details: {self._path}"

    @property
    def _path(self) -> Path:
        return self.run_dir / "out_of_memory" / f"rank{self.rank}.json"


def _describe(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in found.items())
