"""Silent memory corruption: compare what ranks hold alike, bit by bit, and a rank's rounded copies with their masters.

    check_replicas(task.train_state(), comm, step)          # raises TrainingFailed naming parameter and ranks

What can differ unnoticed, and for how long:

ZeRO-1 and 2   a rank's copy of the model, until the next step gathers it anew; the teacher's averages, the centres and
               what is frozen: for good
ZeRO-3         parameters that stay gathered, centres and windows, as above. A shard has no second holder; it is
               compared with the rounding of its fp32 master, which every step makes it
all            fp32 masters and moments have one holder: a flipped bit in them is not seen here, unless it makes the
               model's values differ from the master

Each tensor gets one 64-bit sum: of its words times odd numbers that depend on the position, modulo 2^64. A single
changed bit always changes it. Only the sums travel.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine import distributed, zero
from engine.checkpoint.contents import TrainState
from engine.health.anomalies import TrainingFailed
from model.losses.comm import Comm

_CHUNK = 1 << 20  # words at a time: 8 MiB of 64-bit products
_ODD = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, odd, as a signed number
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(state: TrainState, comm: Comm, step: int) -> None:
    """Raise TrainingFailed, on every rank, where ranks hold different values of what must be equal.

    A collective; waits for the device once. Call it between two steps, at the same one on every rank.
    """
    replicated, copies = dict(_replicated_tensors(state)), list(_rounded_copies(state))
    digests = (
        torch.stack([digest(tensor).cpu() for tensor in replicated.values()]) if replicated else torch.zeros(0).long()
    )
    wrong_copies = [name for name, values, master in copies if not _is_rounded(values, master)]
    differs = bool((comm.all_max(digests) != -comm.all_max(-digests)).any())
    if not distributed.any_rank(differs or bool(wrong_copies)):
        return
    gathered = distributed.gather_objects((digests.tolist(), wrong_copies, platform.node()))
    found = [*_differing(list(replicated), [sums for sums, _, _ in gathered])]
    found += [
        f"{name} is not its fp32 master on rank {rank}" for rank, (_, names, _) in enumerate(gathered) for name in names
    ]
    hosts = ", ".join(f"{rank} on {host}" for rank, (_, _, host) in enumerate(gathered))
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise TrainingFailed(
        "replicas",
        f"at step {step} ranks hold different values of what is one: {'; '.join(found[:8])}{more} (ranks {hosts}): "
        "memory or a device there is not to be trusted; resume from a checkpoint before it on other machines",
    )


@torch.no_grad()
def digest(values: Tensor) -> Tensor:
    """Return a () int64 digest of any tensor's bits, on its device."""
    flat = values.detach().contiguous().view(-1)
    words = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_WORDS[flat.element_size()])
    factors = torch.arange(min(_CHUNK, len(words)), device=words.device) * _ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        total = total * _ODD + (chunk.long() * factors[: len(chunk)]).sum()
    return total


def _replicated_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    for engine_name, engine in state.engines.items():
        yield from ((f"{engine_name}: {name}", tensor) for name, tensor in zero.replicated_tensors(engine))
    for each in state.stateful:
        yield from each.replicated_tensors()


def _rounded_copies(state: TrainState) -> Iterator[tuple[str, Tensor, Tensor]]:
    for engine_name, engine in state.engines.items():
        yield from ((f"{engine_name}: {name}", values, master) for name, values, master in zero.rounded_copies(engine))
    for each in state.stateful:
        yield from each.rounded_copies()


def _is_rounded(values: Tensor, master: Tensor) -> bool:
    rounded = master.to(values.device, values.dtype)
    kind = _WORDS[values.element_size()]
    return torch.equal(values.contiguous().view(kind), rounded.contiguous().view(kind))


def _differing(names: list[str], digests: Sequence[Sequence[int]]) -> Iterator[str]:
    """Describe each tensor that differs, and the ranks that are not with the majority."""
    for name, sums in zip(names, zip(*digests, strict=True), strict=True):
        [(usual, count)] = Counter(sums).most_common(1)
        if count < len(sums):
            others = [rank for rank, found in enumerate(sums) if found != usual]
            doubt = ", or the others do" if 2 * count <= len(sums) else ""
            yield f"{name} differs on rank {', '.join(map(str, others))}{doubt}"
