"""Replace DeepSpeed's host-device synchronisation by waits between CUDA streams, and its many norms by one call.

    let_host_run_ahead(engine)         # once, after deepspeed.initialize

Where deepspeed 0.19.8 holds the host in a step, and what is done instead:

    ZeRO-1, 2   end of backward, and before each bucket with use_multi_rank_bucket_allreduce=false or
                contiguous_gradients=false: the whole device. Now the stream that computes waits for the reductions
                queued so far, and later reductions wait for it.
    ZeRO-3      end of backward, and each fp32 shard that teacher and average read: the reduction stream. Now the stream
                that computes waits for it; a shard is written by the optimizer, on the stream that reads it.
    ZeRO-3      parameters that stay gathered, after each step: the whole device; on one rank, where nothing is
                gathered, each module: a stream. Now nobody: what reads them is queued behind them. With
                zero_hpz_partition_size each copy that a host keeps: the stream. Now the gathers wait.
    all         the norm of each group copies -1.0 to the device: the stream; and takes norms one by one, each of a
                float64 copy (VTP-L: 699). `torch._foreach_norm` takes a few launches; bit-equal on the CPU.

On one rank, where ZeRO-1 and 2 divide each bucket by 1, copy it, reduce it among one and copy it back, nothing is done.

Without these waits nothing orders ZeRO-3's gathers, on a stream of their own, behind the optimizer and the teacher that
write the shards: they wait for the stream that computes at the start of each forward.

Memory is safe: a tensor freed by one stream's allocator is used again by that stream alone, and each stream waits for
the other before it touches what the other wrote or read; where a tensor is freed sooner, DeepSpeed calls record_stream.
With the optimizer's states on the host, waits stay: the host's own step reads what they wait for. So do two bounds on
how far the host runs ahead, three buckets and three gathered modules, which keep memory bounded and drain nothing.

`check_known` compares the source of what is replaced, and of what the order relies on, with that of 0.19.8.
`collectives` and `observe_deepspeed` give the calls that meet other ranks to what times them and what counts bytes.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3, stage_1_and_2
from torch import Tensor

from configs import UserError
from engine import distributed

SHARDED, FLAT = stage3.DeepSpeedZeroOptimizer_Stage3, stage_1_and_2.DeepSpeedZeroOptimizer
GATHERS = (
    (partition_parameters.Init, "_allgather_params_coalesced"),
    (partition_parameters.Init, "_allgather_params_sequential"),
    (partition_parameters.NoGatherHandle, "wait"),
    (partition_parameters.NoGatherCoalescedHandle, "wait"),
)
REDUCTIONS = (
    "allreduce_and_copy",
    "_allreduce_noncontiguous_bucket_preserving_fp32",
    "independent_gradient_partition_epilogue",
)
COORDINATOR = partitioned_param_coordinator.PartitionedParameterCoordinator
# The first digits of the sha256 of each function's source.
KNOWN: dict[tuple[type, str], str] = {
    (FLAT, "average_tensor"): "6fd000d730e5",
    (FLAT, "allreduce_and_copy"): "1db38d57186c",
    (FLAT, "_allreduce_noncontiguous_bucket_preserving_fp32"): "68ea274ef32a",
    (FLAT, "independent_gradient_partition_epilogue"): "26ceef6d75b3",
    (FLAT, "reduce_independent_p_g_buckets_and_remove_grads"): "500839d3f30c",
    (FLAT, "reduce_ipg_grads"): "a41525b603f1",
    (FLAT, "get_grad_norm_direct"): "72af0993ad8c",
    (DeepSpeedEngine, "_flush_coalesced_reduction_zero12"): "7a477abc691d",
    (SHARDED, "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket"): "94d52f5b4af9",
    (SHARDED, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"): "24d09d54e4e6",
    (SHARDED, "partition_grads"): "93119b25314e",
    (SHARDED, "independent_gradient_partition_epilogue"): "f1575b87b3d6",
    (SHARDED, "_get_fp32_opt_state_partition"): "17cbde2bfa7a",
    (SHARDED, "get_grad_norm_direct"): "5ba2252d5f16",
    (SHARDED, "_post_step"): "d993f8fa66f0",
    (COORDINATOR, "_fetch_sub_module_impl"): "5a0c0616eaa0",
    (COORDINATOR, "_PartitionedParameterCoordinator__all_gather_params_"): "4833cf1eeb2b",
    (partition_parameters.Init, "_partition_param_sec"): "962ba1ded0ca",
    (partition_parameters.Init, "_allgather_params_coalesced"): "774cce0650d2",
    (partition_parameters.Init, "_allgather_params_sequential"): "13b0f115f112",
    (partition_parameters.NoGatherHandle, "wait"): "b86a33702302",
    (partition_parameters.NoGatherCoalescedHandle, "wait"): "e8a53706e84e",
}


def let_host_run_ahead(engine: Any) -> None:
    """Replace the host's waits in the steps of a started engine. Raises UserError for a DeepSpeed that is not known."""
    zero = engine.optimizer
    check_known()
    if isinstance(zero, SHARDED):
        zero.get_grad_norm_direct = partial(_norm_of_shards, zero)
        for owner, name in GATHERS:
            setattr(owner, name, _without_host_wait(getattr(owner, name)))
        if zero.reduce_and_partition_stream is not None and not zero.offload_optimizer:
            _wait_on_stream(zero.reduce_and_partition_stream)
            zero._get_fp32_opt_state_partition = _without_host_wait(zero._get_fp32_opt_state_partition)
        coordinator = zero.parameter_offload.get_param_coordinator()
        gathers = getattr(coordinator, f"_{COORDINATOR.__name__}__allgather_stream")
        if gathers is not None and distributed.world_size() > 1:  # a lone rank gathers nothing
            _order_gathers(engine, gathers)
    elif isinstance(zero, FLAT):
        zero.get_grad_norm_direct = partial(_norm_of_partition, zero)
        if distributed.world_size() == 1 and zero.reduce_scatter and not zero.overlap_comm:
            zero.average_tensor = partial(_average_of_one, zero.average_tensor)
        if zero.reduction_stream is not None and not zero.cpu_offload:
            _wait_on_stream(zero.reduction_stream)
            for name in REDUCTIONS:
                setattr(zero, name, _without_device_wait(getattr(zero, name), zero.reduction_stream))


def check_known() -> None:
    """Raise UserError if the source of a replaced DeepSpeed function differs from that of 0.19.8."""
    for (owner, name), digest in KNOWN.items():
        if (found := source_digest(owner, name)) != digest:
            raise UserError(
                f"deepspeed {deepspeed.__version__}: {owner.__name__}.{name} is not the code of 0.19.8 (its source has "
                f"digest {found}, not {digest}), so engine/zero/streams.py cannot replace its waits; "
                "pip install deepspeed==0.19.8"
            )


@functools.cache
def source_digest(owner: type, name: str) -> str:
    """Return the first twelve digits of the sha256 of a method's source."""
    method = inspect.unwrap(inspect.getattr_static(owner, name))
    while inner := inspect.getclosurevars(method).nonlocals.get("func"):  # DeepSpeed's decorator for NVTX ranges
        method = inspect.unwrap(inner)
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:12]


def _wait_on_stream(stream: Any) -> None:
    """Redefine `stream.synchronize()`: the current stream waits for `stream`, the host does not."""
    stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)


def _without_host_wait(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `call` so that it skips its host wait; its results are read on the stream that makes them."""
    if hasattr(call, "is_without_host_wait"):
        return call

    @functools.wraps(call)
    def queued(*arguments: Any, **options: Any) -> Any:
        with _overriding_accelerator(resolves_data_dependency=lambda: True):
            return call(*arguments, **options)

    queued.is_without_host_wait = True  # type: ignore[attr-defined]
    return queued


def _order_gathers(engine: Any, gathers: Any) -> None:
    """Make the gather stream wait until shards are written, those of hierarchical partitioning (hpZ) included."""

    def wait(*_: Any) -> None:
        gathers.wait_stream(get_accelerator().current_stream())

    engine.module.register_forward_pre_hook(wait, prepend=True)
    if engine.zero_hpz_partition_size() == 1:
        return
    write = partition_parameters.Init._partition_param_sec

    @functools.wraps(write)
    def queued(init: Any, param: Any, buffer: Any = None, has_been_updated: bool = False) -> None:
        is_there = param.ds_secondary_tensor is not None and not has_been_updated
        with _overriding_accelerator(resolves_data_dependency=lambda: True):
            write(init, param, buffer, has_been_updated)
        if not is_there:
            wait()

    partition_parameters.Init._partition_param_sec = queued


def _without_device_wait(call: Callable[..., Any], reductions: Any) -> Callable[..., Any]:
    """Wrap `call` so that the compute and the reduction stream wait for each other instead of the host for both."""

    def wait() -> None:
        current = get_accelerator().current_stream()
        current.wait_stream(reductions)
        reductions.wait_stream(current)

    @functools.wraps(call)
    def queued(*arguments: Any, **options: Any) -> Any:
        with _overriding_accelerator(synchronize=wait):
            return call(*arguments, **options)

    return queued


@contextmanager
def _overriding_accelerator(**methods: Callable[[], Any]) -> Iterator[None]:
    """Override methods of DeepSpeed's accelerator inside the `with`; may be nested."""
    accelerator = get_accelerator()
    before = {name: vars(accelerator).get(name) for name in methods}
    vars(accelerator).update(methods)
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                vars(accelerator).pop(name)
            else:
                vars(accelerator)[name] = method


def _average_of_one(average: Callable[..., None], bucket: Tensor, communication_data_type: torch.dtype) -> None:
    """ZeRO-1 and 2's average_tensor on one rank: the bucket is the average, unless it is rounded on its way."""
    if bucket.dtype != communication_data_type:
        average(bucket, communication_data_type)


def _norm_of_partition(
    zero: Any, gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2
) -> Tensor:
    """ZeRO-1 and 2's get_grad_norm_direct: a group's norm over all ranks, float32; -1 where it is not finite."""
    assert norm_type == 2, "the only one that is called for"
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)][: len(params)]
    total = _sum_of_squares(own).float() if own else torch.zeros((), device=zero.device)
    deepspeed.comm.all_reduce(total, group=zero.dp_process_group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _norm_of_shards(zero: Any, gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2) -> Tensor:
    """ZeRO-3's get_grad_norm_direct: a group's norm over all ranks, float64; -1 where it is not finite."""
    assert norm_type == 2, "the only one that is called for"
    zero._assert_same_partition_group(params)
    total = _sum_of_squares(list(gradients))
    deepspeed.comm.all_reduce(total, group=zero._get_param_partition_group(params[0]))
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Return the sum of squares of all elements, in float64."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).pow(2).sum()


def collectives(engine: Any) -> list[tuple[str, Any, str]]:
    """List (kind, owner, method) of the calls in which a step of this engine waits for other ranks.

    The methods are called from the stream that computes. `fetch_sub_module` makes it wait for gathers that run on
    another; the epilogue waits for the reductions that backward has not hidden.
    """
    optimizer = engine.optimizer
    calls = [("reduce_scatter", optimizer, "independent_gradient_partition_epilogue")]
    if not isinstance(optimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        return [
            *calls,
            ("reduce_scatter", optimizer, "reduce_ipg_grads"),
            ("all_reduce", optimizer, "scaled_global_norm"),
        ]
    return [
        *calls,
        ("reduce_scatter", optimizer, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"),
        ("all_reduce", optimizer, "_get_norm_groups"),
        ("all_gather", optimizer.parameter_offload.get_param_coordinator(), "fetch_sub_module"),
        ("all_gather", optimizer, "_post_step"),  # of the parameters that stay gathered
    ]


@contextmanager
def observe_deepspeed(note: distributed.CollectiveObserver) -> Iterator[None]:
    """Call `note` before each of DeepSpeed's gathers and reduce-scatters; distributed.observe_collectives has the rest.

    DeepSpeed's backend holds these two functions by itself; torch's module no longer matters to it.
    """
    backend = deepspeed.comm.comm.cdb
    with ExitStack() as stack:
        for kind in ("all_gather", "reduce_scatter"):
            name = f"{kind}_function"
            stack.callback(setattr, backend, name, getattr(backend, name))
            setattr(backend, name, distributed.observing(getattr(backend, name), kind, note))
        yield
