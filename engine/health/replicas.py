"""Memory that changed by itself: what ranks hold alike is compared, bit by bit, and a rank's own copies too.

    check(training.kept(), comm, step)          # raises TrainingFailed naming parameter and ranks, on every rank

What can differ unnoticed, and for how long:

ZeRO-1 and 2   a rank's copy of the model, until the next step gathers it anew; the teacher's averages, the centres and
               what is frozen: for good
ZeRO-3         parameters that stay gathered, centres and windows, as above. A shard has no second holder; it is held
               against the rounding of its fp32 master, which every step makes it
all            fp32 masters and moments have one holder: a bit in them is not seen here. Where it makes the model's
               values differ from the master it is

Compared is one 64-bit sum a tensor, of its words times odd numbers that depend on the place, modulo 2^64: a single
changed bit always changes it. Only the sums travel.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine import world, zero
from engine.health.failure import TrainingFailed
from engine.training import Kept
from model.losses.comm import Comm

_CHUNK = 1 << 20  # words at a time: 8 MiB of 64-bit products
_ODD = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, odd, as a signed number
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check(kept: Kept, comm: Comm, step: int) -> None:
    """A collective; waits for the device once. Call it between two steps, at the same one on every rank."""
    alike, own = dict(_alike(kept)), list(_own(kept))
    digests = torch.stack([digest(tensor).cpu() for tensor in alike.values()]) if alike else torch.zeros(0).long()
    strays = [name for name, values, master in own if not _is_rounded(values, master)]
    differs = bool((comm.all_max(digests) != -comm.all_max(-digests)).any())
    if not world.any_rank(differs or bool(strays)):
        return
    gathered = world.gather_objects((digests.tolist(), strays, platform.node()))
    told = [*_differing(list(alike), [sums for sums, _, _ in gathered])]
    told += [
        f"{name} is not its fp32 master on rank {rank}" for rank, (_, own, _) in enumerate(gathered) for name in own
    ]
    hosts = ", ".join(f"{rank} on {host}" for rank, (_, _, host) in enumerate(gathered))
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    raise TrainingFailed(
        "replicas",
        f"at step {step} ranks hold different values of what is one: {'; '.join(told[:8])}{more} (ranks {hosts}): "
        "memory or a device there is not to be trusted; resume from a checkpoint before it on other machines",
    )


@torch.no_grad()
def digest(values: Tensor) -> Tensor:
    """() int64 of any tensor's bits, on its device."""
    flat = values.detach().contiguous().view(-1)
    words = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_WORDS[flat.element_size()])
    places = torch.arange(min(_CHUNK, len(words)), device=words.device) * _ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK):
        total = total * _ODD + (chunk.long() * places[: len(chunk)]).sum()
    return total


def _alike(kept: Kept) -> Iterator[tuple[str, Tensor]]:
    for engine_name, engine in kept.engines.items():
        yield from ((f"{engine_name}: {name}", tensor) for name, tensor in zero.replicas(engine))
    for follower in kept.followers:
        yield from follower.replicas()
    yield from kept.whole.items()


def _own(kept: Kept) -> Iterator[tuple[str, Tensor, Tensor]]:
    for engine_name, engine in kept.engines.items():
        yield from ((f"{engine_name}: {name}", values, master) for name, values, master in zero.copies(engine))
    for follower in kept.followers:
        yield from follower.copies()


def _is_rounded(values: Tensor, master: Tensor) -> bool:
    rounded = master.to(values.device, values.dtype)
    kind = _WORDS[values.element_size()]
    return torch.equal(values.contiguous().view(kind), rounded.contiguous().view(kind))


def _differing(names: list[str], digests: Sequence[Sequence[int]]) -> Iterator[str]:
    """What differs, and on which ranks: those that are not with the most."""
    for name, sums in zip(names, zip(*digests, strict=True), strict=True):
        [(usual, count)] = Counter(sums).most_common(1)
        if count < len(sums):
            others = [rank for rank, found in enumerate(sums) if found != usual]
            doubt = ", or the others do" if 2 * count <= len(sums) else ""
            yield f"{name} differs on rank {', '.join(map(str, others))}{doubt}"
