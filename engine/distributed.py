"""torch.distributed's one door: the ranks of this run, their collectives, and errors raised on all of them.

    comm = distributed.start(timeout_minutes=60)     # reads the launcher's variables; alone where no launcher set them
    comm.rank, comm.world_size                       # 1, 2
    if distributed.any_rank(got_sigterm): ...        # all ranks take the same branch
    raise_on_all_ranks(lambda: check_own_files())    # an error of one rank is raised on all
    distributed.stop()

Tensors travel over NCCL where they are on a GPU and over gloo where they are on the CPU; one process group holds both,
so flags and objects cross between hosts without waiting for a GPU. DeepSpeed finds this group and uses it.

A collective that fails raises `RankError` with the rank and the operation: usually another rank has ended.
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
from model.losses.comm import Comm

T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# torch 2.13 renamed both and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# Called before a collective with its kind and the bytes of the whole message.
CollectiveObserver = Callable[[str, int], None]


class RankError(RuntimeError):
    """A collective failed on this rank; the message names the rank, the world size and the operation."""


def is_caused_by_other_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer.

    The type of the error decides, not its text; but gloo raises nothing but plain RuntimeErrors, whose text begins with
    the line of its source.
    """
    while isinstance(error, RankError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))


def start(timeout_minutes: float, rendezvous: str = "env://") -> Ranks:
    """Join the ranks that the launcher started, or form a world of one where no launcher did. Call once, first.

    `timeout_minutes` is how long a collective waits before it counts another rank as lost. `rendezvous` is
    where ranks meet: the launcher's MASTER_ADDR and MASTER_PORT, or `file:///path` on one machine. Raises UserError
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
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_backend() -> str:
    """Return NCCL for tensors on a GPU beside gloo for those on the host, or gloo alone where there is no GPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    """Return where this rank computes: the GPU that `start` took, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """Return this process's number among all ranks of all hosts; 0 before `start`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 before `start`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, which prints and writes what one rank writes."""
    return rank() == 0


def is_first_of_host() -> bool:
    """Whether this is the first rank of its host, which does what a host does once."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def ranks_per_host() -> int:
    """Return how many ranks the launcher started on this host; 1 without one. DeepSpeed's variable is LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def group() -> Any:
    """Return the process group of all ranks, which are all data-parallel."""
    return dist.group.WORLD


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
        """Sum over ranks, as a new tensor. Raises RankError."""
        return _all_reduce(x, dist.ReduceOp.SUM, "all_sum")

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over ranks, as a new tensor. Raises RankError."""
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
    with _operation_named(f"gather of {tuple(x.shape)}"):
        _all_gather(gathered, x.contiguous(), group=among)
    return gathered


def scatter_rows(x: Tensor, among: Any = None) -> Tensor:
    """(ranks * B, ...) -> (B, ...): sum this rank's rows over the ranks of a group, or all."""
    own = x.new_empty((x.shape[0] // dist.get_world_size(among), *x.shape[1:]))
    with _operation_named(f"backward of a gather of {tuple(own.shape)}"):
        _reduce_scatter(own, x.contiguous(), group=among)
    return own


def barrier() -> None:
    """Wait until every rank's host has arrived; queued GPU work may still run."""
    _all_reduce(torch.zeros(1), dist.ReduceOp.SUM, "barrier")


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on all. Waits for no GPU."""
    return bool(_all_reduce(torch.tensor([int(flag)]), dist.ReduceOp.MAX, "any_rank").item())


def broadcast_object(value: T) -> T:
    """Return rank 0's `value`, pickled, on every rank; what the others pass is ignored."""
    if world_size() == 1:
        return value
    box = [value]
    with _operation_named("broadcast_object"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value`, pickled, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with _operation_named("gather_objects"):
        dist.all_gather_object(gathered, value)
    return gathered


def _all_reduce(x: Tensor, op: Any, what: str) -> Tensor:
    reduced = x.detach().clone()
    if world_size() > 1:
        with _operation_named(f"{what} of {tuple(x.shape)}"):
            dist.all_reduce(reduced, op=op)
    return reduced


@contextmanager
def _operation_named(what: str) -> Iterator[None]:
    """Turn an error inside the `with` into a RankError that names the rank and the operation."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank()} of {world_size()}: {what} failed: {error}") from error


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Return this rank's result of `work`; raise the first UserError of any rank on all.

    So no rank waits for one that has left. `work` must not contain a collective.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as caught:
        error = str(caught)
    if errors := [text for text in gather_objects(error) if text is not None]:
        raise UserError(errors[0])
    return result  # type: ignore[return-value]


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; return its result, or raise its UserError, on every rank. A collective."""
    result = raise_on_all_ranks(lambda: work() if is_first() else None)
    return broadcast_object(result)  # type: ignore[return-value]


def error_of_first_rank(work: Callable[[], object]) -> str:
    """Run `work` on rank 0; return its OSError or UserError as text on every rank, "" on success. A collective."""
    text = ""
    if is_first():
        try:
            work()
        except (OSError, UserError) as error:
            text = str(error)
    return broadcast_object(text)


def gather_sorted(values: Tensor, positions: Tensor) -> Tensor:
    """(n, ...) of every rank -> (N, ...) on all, on the CPU, sorted by position: as one rank would have it."""
    parts = gather_objects((values.cpu(), positions.cpu()))
    order = torch.cat([where for _, where in parts]).argsort()
    return torch.cat([part for part, _ in parts])[order]


def make_group(members: Iterable[int], timeout_minutes: float) -> Any:
    """Make a process group of these ranks, with a timeout of its own; a collective of all ranks."""
    return dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))


def join_group(partition: list[list[int]], timeout_minutes: float) -> Any:
    """Make a group for each part of a partition of all ranks; return this rank's. A collective of all ranks."""
    groups = [make_group(members, timeout_minutes) for members in partition]
    return next(group for group, members in zip(groups, partition, strict=True) if rank() in members)


class HierarchicalRanks:
    """A Comm that gathers features across hosts first and then inside each: fewer rounds on the slow link.

    Of H hosts with G ranks each, W = H * G, every rank has a block of b bytes that all others want. Bytes and rounds:

        way                               leaves a host on the slow link          rounds that wait for it
        one ring through all ranks        (W - 1) b                               W - 1
        inside first, every rank sends    G (W - G) b                             H - 1
        inside first, one rank sends      (W - G) b, through one network card     H - 1, and a broadcast inside
        across first, then inside         (W - G) b, over all G cards             H - 1

    No way moves less than (W - G) b: so much a host does not have. A ring is within (G - 1) / (W - G) of it: what it
    loses is time, not bytes. Gathering inside first makes blocks G times as large before each of G ranks sends them.
    So rank i of a host gathers from the ranks i of all hosts, and the host's ranks then exchange what each of them got.
    Backward is the mirror: gradients are summed inside the host first, so that a host sends one sum, not G. NCCL's own
    trees do part of this from some hundred ranks on; docs/scaling.md says when it pays.

    Building one is a collective. `ranks` does everything but gathering; rows come in its order, with its gradient.
    """

    def __init__(self, ranks: Comm, per_host: int, timeout_minutes: float) -> None:
        first_of_host = range(0, ranks.world_size, per_host)
        self._ranks = ranks
        self._inside = join_group([list(range(at, at + per_host)) for at in first_of_host], timeout_minutes)
        self._across = join_group([[at + i for at in first_of_host] for i in range(per_host)], timeout_minutes)
        self._per_host = per_host

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.world_size

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """(B, ...) -> (world_size * B, ...), as distributed.Ranks has it."""
        gathered: Tensor = _HierarchicalGather.apply(x, self._inside, self._across, self._per_host)
        return gathered

    def all_sum(self, x: Tensor) -> Tensor:
        return self._ranks.all_sum(x)

    def all_max(self, x: Tensor) -> Tensor:
        return self._ranks.all_max(x)


class _HierarchicalGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: Any, across: Any, per_host: int) -> Tensor:
        ctx.groups, ctx.per_host = (inside, across), per_host
        by_local_rank = gather_rows(gather_rows(x, across), inside).view(per_host, -1, *x.shape)
        return by_local_rank.transpose(0, 1).flatten(0, 2)  # hosts before their ranks, as ranks are counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside, across), rows = ctx.groups, grad.shape[0] // world_size()
        by_local_rank = grad.view(-1, ctx.per_host, rows, *grad.shape[1:]).transpose(0, 1).flatten(0, 2)
        return scatter_rows(scatter_rows(by_local_rank, inside), across), None, None, None


def gather_comm(ranks: Comm, way: str, timeout_minutes: float) -> tuple[Comm, str]:
    """Return the Comm of system.gather, and a summary. A collective. Raises UserError where hosts differ in ranks."""
    if way == "flat":
        return ranks, "flat (system.gather)"
    found = sorted(set(gather_objects(ranks_per_host())))
    per_host = found[0]
    if len(found) > 1 or ranks.world_size % per_host:
        raise UserError(
            f"system.gather=by_host on {ranks.world_size} ranks, of which hosts have {' and '.join(map(str, found))}: "
            "ranks meet in pairs of hosts, so each has as many; start as many on each, or set system.gather=flat"
        )
    if per_host in (1, ranks.world_size):
        return ranks, f"flat ({ranks.world_size // per_host} hosts of {per_host}: there is one way alone)"
    hosts = ranks.world_size // per_host
    return HierarchicalRanks(
        ranks, per_host, timeout_minutes
    ), f"across {hosts} hosts, then inside (system.gather=by_host)"


@contextmanager
def observe_collectives(note: CollectiveObserver) -> Iterator[None]:
    """Call `note` before every collective on tensors through torch.distributed's functions, inside the `with`.

    It gets integers of the host: nothing is waited for. Collectives on objects and torch's own barriers are left out.
    """
    kinds = {"all_reduce": "all_reduce", "reduce": "reduce", "broadcast": "broadcast"}
    own = globals()
    with ExitStack() as stack:
        for name, kind in kinds.items():
            stack.callback(setattr, dist, name, getattr(dist, name))
            setattr(dist, name, observing(getattr(dist, name), kind, note))
        for name, kind in {"_all_gather": "all_gather", "_reduce_scatter": "reduce_scatter"}.items():
            stack.callback(own.__setitem__, name, own[name])
            own[name] = observing(own[name], kind, note)
        yield


def observing(collective: Callable[..., Any], kind: str, note: CollectiveObserver) -> Callable[..., Any]:
    """Wrap `collective` in a call of `note` before it. Its first two arguments are output and input, or one tensor."""

    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)][:2]
        note(kind, max(tensor.numel() * tensor.element_size() for tensor in tensors))
        return collective(*arguments, **options)

    return call


def _take_device(local_rank: int) -> None:
    """Take this rank's GPU; without GPUs, its share of the host's cores unless OMP_NUM_THREADS is set.

    Ranks that all compute on all cores slow each other down.
    """
    if not torch.cuda.is_available():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_per_host()))
        return
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank} but this machine shows {torch.cuda.device_count()} GPUs: every "
            "rank needs its own; lower --num_gpus, or mind CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
