"""Bench of the kernels that torch.compile generates for a block of VTP-L's trunk, and the bytes that each moves.

Counted on the packed sequence of a training step, forward and backward, for this CPU's backend and for a Hopper GPU,
which need not be present: Inductor writes the code and nothing runs, so the number of rounds changes nothing.
*generated* kernels are all but products and attention; their bytes over a device's bandwidth are the least time that
they take.

    code = generated(lambda: (block_of_tokens, x_TD), "sm_90") code.forward.kernels       #
    (GeneratedKernel("fused_add_mean_mul_rsqrt", 110788608, 111005312, is_library=False), ...) code.forward.source
    # the Python and Triton code that would run code.kept_bytes            # from forward to backward

Nothing is compiled to machine code: tensors have no memory. Autograd cannot trace CUDA tensors without a driver, so the
function is traced on the CPU, and the two graphs that come out of it are moved to the GPU just before Inductor lowers
them. A CPU build of torch cannot follow writes into slices there, as of blocks with stochastic depth; a CUDA build can.
Written against torch 2.11 to 2.13; non-public torch is used in this file only.

Bytes are Inductor's own estimate: every buffer that a kernel reads or writes counts once, as far as it is used, and
those of a slice as the whole buffer where a kernel reads it twice. Registers and caches are taken to be perfect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from configs.model import Vit
from model import block
from model.block import Block
from model.describe import step_layout
from model.packing import PackedLayout, RankBatchSizes
from profiling.benches.recorder import BenchRecorder
from profiling.benches.workload import preset_config

Target = Literal["cpu", "sm_90"]
Make = Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]
GPU = torch.device("cuda:0")
H100 = {  # the properties that Inductor reads; an H200's differ in memory only
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 * 2**20,
    "total_memory": 80 * 2**30,
    "gcnArchName": "",
}


@dataclass(frozen=True)
class GeneratedKernel:
    """One launch: a generated kernel named after its operations, or a library call."""

    name: str
    read_bytes: int
    written_bytes: int
    is_library: bool  # a product or attention

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class GeneratedPass:
    """One generated program."""

    kernels: tuple[GeneratedKernel, ...]
    source: str

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of the generated kernels: everything but products and attention."""
        return sum(kernel.bytes for kernel in self.kernels if not kernel.is_library)


@dataclass(frozen=True)
class GeneratedCode:
    """Both passes of a function."""

    forward: GeneratedPass
    backward: GeneratedPass
    kept_bytes: int  # held from forward to backward, the input with it, parameters without


def generated(make: Make, target: Target, dtype: torch.dtype = torch.bfloat16) -> GeneratedCode:
    """Generate what Inductor would run for the function and its one tensor argument that `make` returns.

    `make` is called under FakeTensorMode, `dtype` being the default: its tensors and modules have no memory.
    """
    lowering, before = _RecordedLowering(target), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _compiling(lowering):
            function, x = make()
            compiled = torch.compile(function, backend=lowering.compile, fullgraph=True, dynamic=False)
            with suppress(_NotRun):
                compiled(x)
        forward, backward = lowering.passes
        kept = lowering.kept_bytes + x.untyped_storage().nbytes()
    finally:
        torch.set_default_dtype(before)
        torch._dynamo.reset()
    return GeneratedCode(forward, backward, kept)


class _NotRun(Exception):
    """Raised where a compiled function would run."""


def _refuse_to_run(*arguments: Any) -> None:
    raise _NotRun


class _RecordedLowering:
    """Replaces Inductor's last step, and records what it would have compiled and loaded."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.passes: list[GeneratedPass] = []
        self.kept_bytes = 0

    def compile(self, graph: GraphModule, inputs: list[Any]) -> Any:
        """Backend of torch.compile: Inductor without its last step; the result cannot be called."""
        from torch._inductor.compile_fx import compile_fx

        compile_fx(graph, inputs, inner_compile=self._lower)
        return _refuse_to_run

    def _lower(self, graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        is_on_gpu = self.target != "cpu"
        with _fake_gpu() if is_on_gpu and not torch.cuda.is_available() else nullcontext():
            inputs = _propagated(graph, inputs, GPU if is_on_gpu else torch.device("cpu"))
            if not options.get("is_backward"):
                self.kept_bytes = _kept_bytes(graph)
            return compile_fx_inner(graph, inputs, **options)

    def load(self, graph: Any) -> Any:
        """Replace GraphLowering.compile_to_module: record the generated program, return an empty module."""
        source, _ = graph.codegen()
        kernels = (_kernel(node) for node in graph.scheduler.nodes)
        self.passes.append(GeneratedPass(tuple(kernel for kernel in kernels if kernel.bytes), source.value))
        return SimpleNamespace(__file__="", call=_refuse_to_run)


def _kernel(node: Any) -> GeneratedKernel:
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.utils import get_fused_kernel_name

    read, written = (
        sum(node.get_read_write_buffer_accesses(include_reads=reads, include_writes=not reads).values())
        for reads in (True, False)
    )
    is_library = isinstance(node, ExternKernelSchedulerNode)
    name = node.node.python_kernel_name if is_library else get_fused_kernel_name(node.get_nodes(), "original_aten")
    return GeneratedKernel(str(name or ""), read, written, is_library)


def _propagated(graph: GraphModule, inputs: Sequence[Any], device: torch.device) -> list[Any]:
    """Move the inputs to `device`, and infer shape, storage and device of every value of `graph` anew."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with mode:
        moved = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, Tensor)
            else value
            for value in inputs
        ]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def _kept_bytes(graph: GraphModule) -> int:
    """Storages that a forward graph gives to its backward; inputs are not among them."""
    _, *saved = next(iter(graph.graph.find_nodes(op="output"))).args[0]
    inputs = set(_storages(graph.graph.find_nodes(op="placeholder")))
    return sum(size for storage, size in _storages(saved).items() if storage not in inputs)


def _storages(nodes: Iterable[Any]) -> dict[int, int]:
    values = (node.meta.get("val") for node in nodes if hasattr(node, "meta"))
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


@contextmanager
def _compiling(lowering: _RecordedLowering) -> Iterator[None]:
    """Inductor without its caches and without worker processes, lowering the backward with the forward."""
    import torch._functorch.config
    import torch._inductor.config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own modules, as they are imported
        import torch._inductor.compile_fx
    from torch._inductor.graph import GraphLowering

    no_caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}
    with (
        mock.patch.object(GraphLowering, "compile_to_module", lambda graph: lowering.load(graph)),
        torch._inductor.config.patch(no_caches),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
    ):
        yield


@contextmanager
def _fake_gpu() -> Iterator[None]:
    """Answer Inductor's queries of CUDA and of Triton's driver, where neither exists, as an H100 would."""
    import torch._inductor.scheduler
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime.hints import DeviceProperties

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: SimpleNamespace(**H100),
        "get_device_capability": lambda *_: (H100["major"], H100["minor"]),
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    copied: dict[str, Any] = {
        name: staticmethod(answers[name]) for name in ("get_device_properties", "current_device", "device_count")
    }
    try:
        with (
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch.multiple(device_interface.CudaInterface, **copied),
            mock.patch.object(torch._subclasses.fake_tensor, "init_gpu_context"),
            mock.patch.object(torch._inductor.scheduler, "has_triton", return_value=True),
            mock.patch.object(torch.utils._triton, "triton_hash_with_backend", return_value=""),
        ):
            yield
    finally:  # both remember the device
        DeviceProperties.create.cache_clear()
        device_interface.caching_worker_device_properties.clear()


PRESET, IMAGES = "vtp_l", 128
TARGETS: dict[Target, str] = {"cpu": "sdpa", "sm_90": "varlen"}  # target: attention


@dataclass(frozen=True)
class BlockKernels:
    """Kernels generated for one target."""

    workload: str
    target: Target
    tokens: int
    found: GeneratedCode

    @property
    def notes(self) -> tuple[str, ...]:
        """Totals of each pass."""
        passes = {"forward": self.found.forward, "backward": self.found.backward}
        lines = [f"{name}: {self._total(each)}" for name, each in passes.items()]
        both = (self.found.forward.elementwise_bytes + self.found.backward.elementwise_bytes) / self.tokens
        kept = self.found.kept_bytes / self.tokens
        return *lines, f"generated kernels move {both:,.0f} bytes a token; {kept:,.0f} are kept for the backward"

    def _total(self, each: GeneratedPass) -> str:
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


def bench_block_kernels(recorder: BenchRecorder) -> None:
    """Kernels of a block of VTP-L, one table for each target."""
    config = preset_config(PRESET, IMAGES, "optim.precision=bf16")
    layout = step_layout(config, RankBatchSizes.per_rank(config, 1))
    for target in TARGETS:
        recorder.add(block_kernels(config.model.trunk, layout, target))


def block_kernels(vit: Vit, layout: PackedLayout, target: Target) -> BlockKernels:
    """Generate the kernels of one of `vit`'s blocks, with parameters in bf16."""
    backend = TARGETS[target]

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        block = Block(vit.model_copy(update={"drop_path": 0.0}), backend)
        rope_2TE = torch.empty(2, layout.tokens, vit.width // vit.heads)
        x_TD = torch.empty(layout.tokens, vit.width, requires_grad=True)
        return lambda x: block(x, rope_2TE, layout.segments), x_TD

    segments = " + ".join(f"{count} x {length}" for count, length in layout.segments)
    workload = f"a block of width {vit.width}, {segments} tokens, bf16, {target}, attention {backend}"
    # By what the block is traced for: it is traced on the CPU for either.
    used: dict[str, Any] = {"uses_custom_backward": lambda _: target != "cpu"}
    with mock.patch.multiple(block, **used):
        return BlockKernels(workload, target, layout.tokens, generated(make, target))
