"""ssl without (rows, K) matrices equals ssl with all of them, on one rank and on two: targets, loss, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from configs.schema import Clip, Objectives, Rec, Ssl
from kernels import prototypes
from model.losses.comm import Comm, Solo
from model.losses.targets import dense_cross_entropy, dense_sinkhorn, dense_targets
from model.losses.total import compute_losses, teacher_targets
from model.outputs import Outputs, SslOutputs
from tests.harness import run_ranks

pytestmark = pytest.mark.L1
STUDENT_TEMP, TEACHER_TEMP, WIDTH = 0.1, 0.05, 16
# Relative to the largest entry. Measured worst case 8.9e-7 (targets at temperature 0.05); targets from a rank's own
# rows alone are off by tens of percents.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sizes:
    images: int
    locals: int
    patches: int  # of rank 0; every further rank hides 3 more
    prototypes: int


CASES = [
    Sizes(images=3, locals=4, patches=21, prototypes=37),
    Sizes(images=1, locals=0, patches=0, prototypes=5),
    Sizes(images=5, locals=2, patches=64, prototypes=300),
]


def ssl_outputs(sizes: Sizes, rank: int) -> SslOutputs:
    """A rank's rows; prototypes are the same on every rank."""
    own, shared = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(99)
    num_patches = sizes.patches + 3 * rank

    def unit(rows: int, generator: torch.Generator) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)

    return SslOutputs(
        student_global_GE=unit(2 * sizes.images, own).requires_grad_(),
        student_local_LE=unit(sizes.locals * sizes.images, own).requires_grad_(),
        student_patch_ME=unit(num_patches, own).requires_grad_(),
        student_KE=unit(sizes.prototypes, shared).requires_grad_(),
        teacher_global_GE=unit(2 * sizes.images, own),
        teacher_patch_ME=unit(num_patches, own),
        teacher_KE=unit(sizes.prototypes, shared),
        student_cls_GD=unit(2 * sizes.images, own),
        patch_weight_M=torch.rand(num_patches, generator=own),
    )


def learners(ssl: SslOutputs) -> tuple[Tensor, ...]:
    return ssl.student_global_GE, ssl.student_local_LE, ssl.student_patch_ME, ssl.student_KE


def written_out(ssl: SslOutputs, comm: Comm) -> tuple[list[Tensor], Tensor]:
    """Both targets and the loss, from whole matrices; pair by pair for DINO."""
    cls_GK = dense_sinkhorn(ssl.teacher_global_GE @ ssl.teacher_KE.T, TEACHER_TEMP, comm)
    patch_MK = dense_sinkhorn(ssl.teacher_patch_ME @ ssl.teacher_KE.T, TEACHER_TEMP, comm)
    first_SK, second_SK = cls_GK.chunk(2)
    num_images = len(first_SK)
    global_views = (ssl.student_global_GE @ ssl.student_KE.T).split(num_images)
    local_views = (ssl.student_local_LE @ ssl.student_KE.T).split(num_images) if len(ssl.student_local_LE) else ()
    pairs = [(global_views[0], second_SK), (global_views[1], first_SK)]
    pairs += [(local_SK, view_SK) for local_SK in local_views for view_SK in (first_SK, second_SK)]
    dino = torch.stack([dense_cross_entropy(student, target, STUDENT_TEMP).mean() for student, target in pairs]).mean()
    mim_M = dense_cross_entropy(ssl.student_patch_ME @ ssl.student_KE.T, patch_MK, STUDENT_TEMP)
    return [cls_GK, patch_MK], dino + (ssl.patch_weight_M * mim_M).sum() / (2 * num_images)


def everything(comm: Comm, sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (ours, dense), of one rank."""
    prototypes.MIN_ROWS = 5  # several chunks, the last one short
    prototypes.CHUNK_BYTES["cpu"] = prototypes.KEEP_BYTES["cpu"] = 0
    config = Ssl(koleo=0, student_temp=STUDENT_TEMP)
    ssl = ssl_outputs(sizes, comm.rank)
    objectives = Objectives(clip=Clip(weight=0), ssl=config, rec=Rec(weight=0))
    losses = compute_losses(Outputs(None, ssl, None), objectives, TEACHER_TEMP, comm)
    targets = teacher_targets(ssl, config, TEACHER_TEMP, comm, None)[:2]
    expected_targets, expected = written_out(ssl, comm)
    pairs = {"loss": (losses.total.detach(), expected.detach())}
    entropy = torch.special.entr(expected_targets[0]).sum(dim=1).mean()
    pairs["entropy"] = (losses.named()["teacher_entropy"], entropy)
    for name, ours, theirs in zip(("cls targets", "patch targets"), targets, expected_targets, strict=True):
        pairs[name] = (dense_targets(ours), theirs)
    ours = torch.autograd.grad(losses.total, learners(ssl))
    theirs = torch.autograd.grad(expected, learners(ssl), materialize_grads=True)
    names = ("global", "local", "patch", "prototypes")
    return pairs | {f"grad of {name}": pair for name, *pair in zip(names, ours, theirs, strict=True)}


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_ssl_in_chunks_equals_ssl_written_out(world_size: int, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "MIN_ROWS", prototypes.MIN_ROWS)  # `everything` sets all three
    for sizes_of in (prototypes.CHUNK_BYTES, prototypes.KEEP_BYTES):
        monkeypatch.setitem(sizes_of, "cpu", sizes_of["cpu"])
    shares = [everything(Solo(), sizes)] if world_size == 1 else run_ranks(everything, world_size, sizes)
    errors = {}
    for rank, share in enumerate(shares):
        for name, (ours, theirs) in share.items():
            assert ours.shape == theirs.shape
            if ours.numel():
                errors[rank, name] = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    worst = max(errors, key=errors.__getitem__)
    print(f"worst relative error {errors[worst]:.1e}: {worst}")
    assert {pair: found for pair, found in errors.items() if not found < TOLERANCE} == {}
