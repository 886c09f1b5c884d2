"""torch.distributed's one door: who else takes part in this run, and the few things ranks say to each other.

Tensors travel over NCCL where they lie on a GPU and over gloo where they lie on the CPU; one process group
holds both, so flags and objects cross between hosts without waiting for a GPU. DeepSpeed finds this group and
uses it.

    comm = world.start(timeout_minutes=60)      # reads what the launcher set; alone if no launcher started us
    comm.rank, comm.world_size                  # 1, 2
    if world.any_rank(got_sigterm): ...         # all ranks take the same branch
    world.stop()

A collective that fails raises `RankError` with the rank and what it was doing: the other side's end is
usually the cause.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import UserError
from engine.launcher import rank_environment

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# torch 2.13 renamed both and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# (kind, bytes of the whole message): what `observed` tells of every collective.
Note = Callable[[str, int], None]


class RankError(RuntimeError):
    """A collective failed on this rank; the message names the rank, the world size and the operation."""


def is_of_others(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer. What was raised decides it, not how
    it reads: gloo alone raises nothing but plain RuntimeErrors, which begin with the place in its source."""
    while isinstance(error, RankError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))


class Ranks:
    """model.losses.comm.Comm over all ranks of the run."""

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world_size(self) -> int:
        return world_size()

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """(B, ...) -> (world_size * B, ...); its gradient is the sum over ranks, not the mean."""
        gathered: Tensor = _GatherWithGrad.apply(x)
        return gathered

    def all_sum(self, x: Tensor) -> Tensor:
        """A new tensor, the same on every rank. Raises RankError."""
        return _all_reduce(x, dist.ReduceOp.SUM, "all_sum")

    def all_max(self, x: Tensor) -> Tensor:
        """A new tensor, the same on every rank. Raises RankError."""
        return _all_reduce(x, dist.ReduceOp.MAX, "all_max")


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return scatter_rows(grad)


def gather_rows(x: Tensor, among: Any = None) -> Tensor:
    """(B, ...) of each rank -> (ranks * B, ...), in the order of the ranks of a group (`join_group`), or of all."""
    gathered = x.new_empty((dist.get_world_size(among) * x.shape[0], *x.shape[1:]))
    with _named(f"gather of {tuple(x.shape)}"):
        _all_gather(gathered, x.contiguous(), group=among)
    return gathered


def scatter_rows(x: Tensor, among: Any = None) -> Tensor:
    """(ranks * B, ...) -> (B, ...): of each rank's rows, the sum of what the ranks of a group, or all, have of them."""
    own = x.new_empty((x.shape[0] // dist.get_world_size(among), *x.shape[1:]))
    with _named(f"backward of a gather of {tuple(own.shape)}"):
        _reduce_scatter(own, x.contiguous(), group=among)
    return own


def make_group(members: Iterable[int], timeout_minutes: float) -> Any:
    """A group of these ranks, with a timeout of its own; a collective of all ranks."""
    return dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))


def join_group(partition: list[list[int]], timeout_minutes: float) -> Any:
    """The group of this rank in a partition of all ranks; a collective of all of them."""
    groups = [make_group(members, timeout_minutes) for members in partition]
    return next(group for group, members in zip(groups, partition, strict=True) if rank() in members)


def start(timeout_minutes: float, rendezvous: str = "env://") -> Ranks:
    """Joins the ranks the launcher started, or forms a world of one where no launcher did. Call once, first.

    `timeout_minutes` is how long a collective waits before it counts another rank as lost. `rendezvous` is
    where ranks meet: the launcher's MASTER_ADDR and MASTER_PORT, or `file:///path` on one machine. UserError
    for half-set variables, a taken port or too few GPUs; RankError where not all ranks arrive.
    """
    environment = rank_environment()
    needed = [name for name in LAUNCHER_VARIABLES if rendezvous == "env://" or not name.startswith("MASTER")]
    unset = [name for name in needed if name not in os.environ]
    half_set = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if unset and half_set:
        raise UserError(
            f"{', '.join(half_set)} is set but {', '.join(unset)} is not: a launcher sets "
            f"all of {', '.join(needed)}; start with `deepspeed engine/launch.py ...`, or unset "
            "RANK and WORLD_SIZE to run alone"
        )
    backend, timeout = choose_backend(), timedelta(minutes=timeout_minutes)
    if unset:
        _take_device(0)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return Ranks()
    own, size = environment["RANK"], environment["WORLD_SIZE"]
    _take_device(environment["LOCAL_RANK"])
    try:
        dist.init_process_group(backend, init_method=rendezvous, rank=own, world_size=size, timeout=timeout)
    except RuntimeError as error:  # a timeout of the store is one too
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {os.environ.get('MASTER_PORT')} of this machine is taken, by another run most likely: every run "
                "meets at a port of its own; give another, `deepspeed --master_port 29501 engine/launch.py ...`"
            ) from None
        raise RankError(
            f"rank {own} of {size}: not all ranks met at {rendezvous} in {timeout_minutes} min: {error}"
        ) from error
    return Ranks()


def stop() -> None:
    """Leaves the group; nothing to do where none was formed."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_backend() -> str:
    """NCCL for tensors on a GPU beside gloo for those on the host, or gloo alone where there is no GPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    """Where this rank computes: the GPU `start` gave it, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's number among all ranks of all machines; 0 before `start`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 before `start`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that prints and writes what one rank writes."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first rank of its machine: the one that does what a machine does once."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def ranks_here() -> int:
    """How many ranks the launcher started on this machine; 1 without one. DeepSpeed's calls it LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def group() -> Any:
    """The process group of all ranks: they are data-parallel, all of them."""
    return dist.group.WORLD


def barrier() -> None:
    """Returns when every rank's host has arrived; queued GPU work may still run."""
    _all_reduce(torch.zeros(1), dist.ReduceOp.SUM, "barrier")


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank, the same answer on all. No GPU is waited for."""
    return bool(_all_reduce(torch.tensor([int(flag)]), dist.ReduceOp.MAX, "any_rank").item())


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, pickled, on every rank; what the others pass is ignored."""
    if world_size() == 1:
        return value
    box = [value]
    with _named("broadcast_object"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, pickled, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with _named("gather_objects"):
        dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def observed(note: Note) -> Iterator[None]:
    """Inside, every collective on tensors that goes through torch.distributed's functions is told to `note` first.

    Told are integers of the host: nothing is waited for. Objects and barriers of torch's own are not told.
    """
    kinds = {"all_reduce": "all_reduce", "reduce": "reduce", "broadcast": "broadcast"}
    own = globals()
    with ExitStack() as stack:
        for name, kind in kinds.items():
            stack.callback(setattr, dist, name, getattr(dist, name))
            setattr(dist, name, told(getattr(dist, name), kind, note))
        for name, kind in {"_all_gather": "all_gather", "_reduce_scatter": "reduce_scatter"}.items():
            stack.callback(own.__setitem__, name, own[name])
            own[name] = told(own[name], kind, note)
        yield


def told(collective: Callable[..., Any], kind: str, note: Note) -> Callable[..., Any]:
    """`collective` with a call of `note` before it. Its first two arguments are output and input, or one tensor."""

    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)][:2]
        note(kind, max(tensor.numel() * tensor.element_size() for tensor in tensors))
        return collective(*arguments, **options)

    return call


def _all_reduce(x: Tensor, op: Any, what: str) -> Tensor:
    reduced = x.detach().clone()
    if world_size() > 1:
        with _named(f"{what} of {tuple(x.shape)}"):
            dist.all_reduce(reduced, op=op)
    return reduced


def _take_device(local_rank: int) -> None:
    """Takes the GPU of this rank on its machine; without GPUs, its share of the cores unless OMP_NUM_THREADS is set.

    Ranks that all compute on all cores only get in each other's way.
    """
    if not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))
        return
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank} but this machine shows {torch.cuda.device_count()} GPUs: every "
            "rank needs its own; lower --num_gpus, or mind CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank()} of {world_size()}: {what} failed: {error}") from error
