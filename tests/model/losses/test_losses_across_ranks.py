"""One rank with all rows equals several gloo ranks with a share each: loss, gradient, state, every objective.

The whole batch is the same leaves everywhere; a rank cuts its images' rows out of them, as a data-parallel
rank computes its rows from parameters that all ranks share. ZeRO averages gradients, so the mean over ranks
of the leaves' gradients must be the gradient one rank with the whole batch gets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Clip, Objectives, Rec, Ssl
from model.losses.comm import Comm, Solo
from model.losses.total import TeacherCentres, compute_losses
from model.outputs import ClipOutputs, Outputs, RecOutputs, SslOutputs
from tests.harness import run_ranks
from tests.tiny import of_all_rows

pytestmark = pytest.mark.L1
# Relative to the largest entry. Measured worst case 1.3e-5: the scale gradient of softmax, where pairs are nearly
# found, is what float32 leaves of 1 - p, and the whole matrix's formula is up to 1.5e-5 off float64 there too;
# everything else is within 2e-6. A collective left out is off by 1 % at the least.
TOLERANCE = 5e-5
REC = Rec(perceptual=0.0)
KINDS = {
    "clip softmax": Objectives(ssl=Ssl(weight=0), rec=Rec(weight=0)),
    "clip sigmoid": Objectives(clip=Clip(kind="sigmoid"), ssl=Ssl(weight=0), rec=Rec(weight=0)),
    "ssl sinkhorn": Objectives(clip=Clip(weight=0), ssl=Ssl(koleo=0), rec=Rec(weight=0)),
    "ssl centering": Objectives(clip=Clip(weight=0), ssl=Ssl(koleo=0, targets="centering"), rec=Rec(weight=0)),
    "ssl koleo": Objectives(clip=Clip(weight=0), ssl=Ssl(koleo=5.0), rec=Rec(weight=0)),
    "rec": Objectives(clip=Clip(weight=0), ssl=Ssl(weight=0), rec=REC),
    "everything": Objectives(rec=REC),
}


@dataclass(frozen=True)
class Sizes:
    """Rows of the whole batch, to be divided by the world size, and the rest."""

    clip: int
    ssl: int
    rec: int
    locals: int
    prototypes: int


@dataclass(frozen=True)
class Result:
    named: dict[str, Tensor]
    grads: dict[str, Tensor]
    centres: TeacherCentres | None


def whole_batch(sizes: Sizes) -> tuple[Outputs, Tensor]:
    """Outputs of one step and the crop of each hidden patch; some hide nothing, ranks hide unequally."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    crops, k = 2 * sizes.ssl, sizes.prototypes
    num_hidden = torch.randint(0, 6, (crops,), generator=draw)
    crop_of_patch_M = torch.arange(crops).repeat_interleave(num_hidden)
    patches = len(crop_of_patch_M)
    image = torch.nn.functional.normalize(randn(sizes.clip, 24), dim=1)
    # Captions half like their images: unrelated ones leave a scale gradient that is all cancellation.
    text = torch.nn.functional.normalize(image + 0.2 * randn(sizes.clip, 24), dim=1)
    ssl = SslOutputs(
        student_global_GE=randn(crops, 12),
        student_local_LE=randn(sizes.locals * sizes.ssl, 12),
        student_patch_ME=randn(patches, 12),
        student_KE=randn(k, 12) * 12**-0.5,
        teacher_global_GE=randn(crops, 12),
        teacher_patch_ME=randn(patches, 12),
        teacher_KE=randn(k, 12) * 12**-0.5,
        student_cls_GD=randn(crops, 16),
        patch_weight_M=1 / num_hidden[crop_of_patch_M],
    )
    clip = ClipOutputs(image, text, torch.tensor([14.3]), torch.tensor([-9.0]))
    return Outputs(
        clip,
        ssl,
        RecOutputs(randn(sizes.rec, 3, 8, 8), randn(sizes.rec, 3, 8, 8), latent=randn(sizes.rec, 4, 1, 1)),
    ), crop_of_patch_M


def share_of(outputs: Outputs, crop_of_patch_M: Tensor, sizes: Sizes, comm: Comm) -> Outputs:
    """One rank's rows, as its loader would deal them: whole images, view-major."""
    assert outputs.clip is not None
    assert outputs.ssl is not None
    assert outputs.rec is not None

    def rows(x: Tensor, num_views: int = 1) -> Tensor:
        return torch.cat([view.chunk(comm.world_size)[comm.rank] for view in x.chunk(num_views)])

    ssl, own_crops = outputs.ssl, rows(torch.arange(2 * sizes.ssl), 2)
    own_M = torch.isin(crop_of_patch_M, own_crops)
    by_crop = ("student_global_GE", "teacher_global_GE", "student_cls_GD")
    by_patch = ("student_patch_ME", "teacher_patch_ME", "patch_weight_M")
    own = {name: rows(getattr(ssl, name), 2) for name in by_crop}
    own |= {name: getattr(ssl, name)[own_M] for name in by_patch}
    own["student_local_LE"] = rows(ssl.student_local_LE, sizes.locals) if sizes.locals else ssl.student_local_LE
    own |= {"student_KE": ssl.student_KE, "teacher_KE": ssl.teacher_KE}
    clip = replace(outputs.clip, image_BE=rows(outputs.clip.image_BE), text_BE=rows(outputs.clip.text_BE))
    return Outputs(
        clip,
        SslOutputs(**own),
        RecOutputs(rows(outputs.rec.recon), rows(outputs.rec.target), rows(outputs.rec.latent)),
    )


def with_leaves(outputs: Outputs) -> tuple[Outputs, dict[str, Tensor]]:
    """A copy whose tensors with a gradient in training are leaves, and those leaves by name."""
    fixed = ("teacher_global_GE", "teacher_patch_ME", "teacher_KE", "patch_weight_M", "target", "posterior", "align")
    leaves: dict[str, Tensor] = {}

    def copy(part: Any) -> Any:
        for field in fields(part):
            if field.name not in fixed:
                leaves[field.name] = getattr(part, field.name).clone().requires_grad_()
        return replace(part, **{name: leaf for name, leaf in leaves.items() if hasattr(part, name)})

    return Outputs(copy(outputs.clip), copy(outputs.ssl), copy(outputs.rec)), leaves


def one_result(sizes: Sizes, objectives: Objectives, comm: Comm) -> Result:
    outputs, crop_of_patch_M = whole_batch(sizes)
    whole, leaves = with_leaves(outputs)
    own = share_of(whole, crop_of_patch_M, sizes, comm)
    ramp_K = torch.linspace(-1, 1, sizes.prototypes)
    losses = compute_losses(own, objectives, teacher_temp=0.05, comm=comm, centres=TeacherCentres(ramp_K, -ramp_K))
    losses.total.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Result(losses.named(), grads, losses.centres)


def all_results(comm: Comm, sizes: Sizes) -> dict[str, Result]:
    return {kind: one_result(sizes, objectives, comm) for kind, objectives in KINDS.items()}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if found.numel() else 0.0


CASES = [
    pytest.param(2, Sizes(clip=8, ssl=4, rec=2, locals=3, prototypes=48), id="2 ranks"),
    pytest.param(3, Sizes(clip=9, ssl=9, rec=3, locals=1, prototypes=37), id="3 ranks, odd sizes"),
    pytest.param(2, Sizes(clip=2, ssl=2, rec=2, locals=0, prototypes=5), id="2 ranks, one row each, no local crops"),
]


@pytest.mark.parametrize(("world_size", "sizes"), CASES)
def test_several_ranks_equal_one_rank_in_loss_gradient_and_state(world_size: int, sizes: Sizes) -> None:
    shares = run_ranks(all_results, world_size, sizes)
    errors: dict[tuple[str, str], float] = {}
    for kind, whole in all_results(Solo(), sizes).items():
        of_kind = [share[kind] for share in shares]
        assert whole.centres is not None
        assert whole.grads, f"{kind} trains nothing"
        for name, value in of_all_rows(whole.named).items():
            errors[kind, name] = error(torch.stack([share.named[name] for share in of_kind]).mean(), value)
        for name, grad in whole.grads.items():
            errors[kind, f"grad of {name}"] = error(
                torch.stack([share.grads[name] for share in of_kind]).mean(dim=0), grad
            )
        for share in of_kind:
            assert share.centres is not None
            assert error(share.centres.cls_K, whole.centres.cls_K) < TOLERANCE
            assert error(share.centres.patch_K, whole.centres.patch_K) < TOLERANCE
    worst = max(errors, key=errors.__getitem__)
    print(f"worst relative error {errors[worst]:.1e}: {worst}")
    assert {pair: found for pair, found in errors.items() if not found < TOLERANCE} == {}
