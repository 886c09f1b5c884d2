"""Kernels that Inductor generates for a compiled function, forward and backward, and the bytes that each of them moves.

    found = generated(lambda: (block_of_tokens, x_TD), "sm_90")
    found.forward.kernels       # (Kernel("fused_add_mean_mul_rsqrt", 110788608, 111005312, is_library=False), ...)
    found.forward.source        # the Python and Triton code that would run
    found.kept_bytes            # from forward to backward

Nothing is compiled to machine code and nothing runs: tensors have no memory, and the GPU need not be there. Autograd
cannot trace CUDA tensors without a driver, so the function is traced on the CPU, and the two graphs that come out of it
are moved to the GPU just before Inductor lowers them. A CPU build of torch cannot follow writes into slices there, as
of blocks with stochastic depth; a CUDA build can. Written against torch 2.11 to 2.13; what is not public there is used
in this file only.

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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

Target = Literal["cpu", "sm_90"]
Make = Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]
GPU = torch.device("cuda:0")
H100 = {  # what Inductor asks of a device; an H200's are the same but for its memory
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
class Kernel:
    """One launch: a generated kernel under the names of its operations, or a call of a library."""

    name: str
    read_bytes: int
    written_bytes: int
    is_library: bool  # a product or attention

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Pass:
    """One generated program."""

    kernels: tuple[Kernel, ...]
    source: str

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of the generated kernels: everything but products and attention."""
        return sum(kernel.bytes for kernel in self.kernels if not kernel.is_library)


@dataclass(frozen=True)
class Generated:
    """Both passes of a function."""

    forward: Pass
    backward: Pass
    kept_bytes: int  # held from forward to backward, the input with it, parameters without


def generated(make: Make, target: Target, dtype: torch.dtype = torch.bfloat16) -> Generated:
    """What Inductor would run for the function that `make` gives, of the one tensor that it gives with it.

    `make` is called under FakeTensorMode, `dtype` being the default: its tensors and modules have no memory.
    """
    lowering, before = _Lowering(target), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _compiling(lowering):
            function, x = make()
            compiled = torch.compile(function, backend=lowering.compile, fullgraph=True, dynamic=False)
            with suppress(_CompiledOnly):
                compiled(x)
        forward, backward = lowering.passes
        kept = lowering.kept_bytes + x.untyped_storage().nbytes()
    finally:
        torch.set_default_dtype(before)
        torch._dynamo.reset()
    return Generated(forward, backward, kept)


class _CompiledOnly(Exception):
    """Raised where a compiled function would run."""


def _do_not_run(*arguments: Any) -> None:
    raise _CompiledOnly


class _Lowering:
    """Takes the place of Inductor's last step; notes what it would have compiled and loaded."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.passes: list[Pass] = []
        self.kept_bytes = 0

    def compile(self, graph: GraphModule, inputs: list[Any]) -> Any:
        """A backend of torch.compile: Inductor, but for its last step; what it gives cannot be called."""
        from torch._inductor.compile_fx import compile_fx

        compile_fx(graph, inputs, inner_compile=self._lower)
        return _do_not_run

    def _lower(self, graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        is_on_gpu = self.target != "cpu"
        with _pretended_gpu() if is_on_gpu and not torch.cuda.is_available() else nullcontext():
            inputs = _propagated(graph, inputs, GPU if is_on_gpu else torch.device("cpu"))
            if not options.get("is_backward"):
                self.kept_bytes = _kept_bytes(graph)
            return compile_fx_inner(graph, inputs, **options)

    def load(self, graph: Any) -> Any:
        """For GraphLowering.compile_to_module: note the generated program, and give an empty module."""
        source, _ = graph.codegen()
        kernels = (_kernel(node) for node in graph.scheduler.nodes)
        self.passes.append(Pass(tuple(kernel for kernel in kernels if kernel.bytes), source.value))
        return SimpleNamespace(__file__="", call=_do_not_run)


def _kernel(node: Any) -> Kernel:
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.utils import get_fused_kernel_name

    read, written = (
        sum(node.get_read_write_buffer_accesses(include_reads=reads, include_writes=not reads).values())
        for reads in (True, False)
    )
    is_library = isinstance(node, ExternKernelSchedulerNode)
    name = node.node.python_kernel_name if is_library else get_fused_kernel_name(node.get_nodes(), "original_aten")
    return Kernel(str(name or ""), read, written, is_library)


def _propagated(graph: GraphModule, inputs: Sequence[Any], device: torch.device) -> list[Any]:
    """The inputs on `device`, and the shape, storage and device of every value of `graph` noted anew from there."""
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
def _compiling(lowering: _Lowering) -> Iterator[None]:
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
def _pretended_gpu() -> Iterator[None]:
    """Answers what Inductor asks of CUDA and of Triton's driver, where neither is there, as an H100 would."""
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
