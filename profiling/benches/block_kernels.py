"""Kernels that torch.compile generates for a block of VTP-L's trunk, and the bytes that each moves for a token.

Counted on the packed sequence of a training step, forward and backward, for this CPU's backend and for a Hopper GPU,
which need not be there: Inductor writes the code and nothing runs, so the number of rounds changes nothing. *generated*
kernels are what lies between products and attention; bytes over the bandwidth of a device are the least time that they
take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from configs.architecture import Vit
from model import block_backward
from model.block import Block
from model.describe import step_layout
from model.pack import Layout
from model.rows import Rows
from profiling.benches.one_rank import configured
from profiling.measurement import Recorder
from profiling.step.generated_code import Generated, Pass, Target, generated

PRESET, IMAGES = "vtp_l", 128
TARGETS: dict[Target, str] = {"cpu": "sdpa", "sm_90": "varlen"}  # target: attention


@dataclass(frozen=True)
class BlockKernels:
    """What is generated for one target."""

    workload: str
    target: Target
    tokens: int
    found: Generated

    @property
    def notes(self) -> tuple[str, ...]:
        """Totals."""
        passes = {"forward": self.found.forward, "backward": self.found.backward}
        lines = [f"{name}: {self._total(each)}" for name, each in passes.items()]
        both = (self.found.forward.elementwise_bytes + self.found.backward.elementwise_bytes) / self.tokens
        kept = self.found.kept_bytes / self.tokens
        return *lines, f"generated kernels move {both:,.0f} bytes a token; {kept:,.0f} are kept for the backward"

    def _total(self, each: Pass) -> str:
        own = [kernel for kernel in each.kernels if not kernel.is_library]
        moved = each.elementwise_bytes / self.tokens
        return f"{len(own)} generated kernels, {moved:,.0f} bytes a token; {len(each.kernels) - len(own)} library calls"

    def as_table(self) -> Table:
        """One row a kernel, in the order of the program."""
        table = Table(title=f"block_kernels: {self.workload}", title_justify="left")
        table.add_column("pass")
        table.add_column("kernel", overflow="fold")
        for column in ("read", "written"):
            table.add_column(f"{column}, bytes a token", justify="right")
        for row in self._rows():
            name = row["kernel"].removeprefix("torch.ops.").removesuffix(".default")
            table.add_row(row["pass"], name, f"{row['read']:,.0f}", f"{row['written']:,.0f}")
        return table

    def as_dict(self) -> dict[str, Any]:
        """With the generated programs."""
        source = {"forward": self.found.forward.source, "backward": self.found.backward.source}
        about = {"name": "block_kernels", "workload": self.workload, "target": self.target, "torch": torch.__version__}
        return about | {"rows": self._rows(), "notes": list(self.notes), "source": source}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "pass": name,
                "kernel": kernel.name,
                "is_library": kernel.is_library,
                "read": kernel.read_bytes / self.tokens,
                "written": kernel.written_bytes / self.tokens,
            }
            for name, each in (("forward", self.found.forward), ("backward", self.found.backward))
            for kernel in each.kernels
        ]


def run(recorder: Recorder) -> None:
    """One table a target."""
    config = configured(PRESET, IMAGES, "optim.precision=bf16")
    layout = step_layout(config, Rows.per_rank(config, 1))
    for target in TARGETS:
        recorder.add(block_kernels(config.model.trunk, layout, target))


def block_kernels(vit: Vit, layout: Layout, target: Target) -> BlockKernels:
    """Those of one of `vit`'s blocks, with parameters in bf16."""
    backend = TARGETS[target]

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        block = Block(vit.model_copy(update={"drop_path": 0.0}), backend)
        rope_2TE = torch.empty(2, layout.tokens, vit.width // vit.heads)
        x_TD = torch.empty(layout.tokens, vit.width, requires_grad=True)
        return lambda x: block(x, rope_2TE, layout.segments), x_TD

    segments = " + ".join(f"{count} x {length}" for count, length in layout.segments)
    workload = f"a block of width {vit.width}, {segments} tokens, bf16, {target}, attention {backend}"
    # By what the block is traced for: it is traced on the CPU for either.
    used: dict[str, Any] = {"is_used": lambda _: target != "cpu"}
    with mock.patch.multiple(block_backward, **used):
        return BlockKernels(workload, target, layout.tokens, generated(make, target))
