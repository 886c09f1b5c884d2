"""The total is the weighted sum of its named terms, and says nothing it was not asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.schema import Clip, Objectives, Rec, Ssl
from model.losses.clip import softmax_clip_loss
from model.losses.comm import Solo
from model.losses.perceptual import CONVS_PER_TAP, WEIGHT_KEYS, LpipsDistance
from model.losses.total import StepLosses, TeacherCentres, compute_losses
from model.outputs import ClipOutputs, Outputs, RecOutputs, SslOutputs

pytestmark = pytest.mark.L0
S, N, K, M, E = 3, 2, 11, 5, 8


def perceptual() -> LpipsDistance:
    draw = torch.Generator().manual_seed(0)
    weights = {key: torch.rand(4, 3 if ".0." in key else 4, 3, 3, generator=draw) - 0.4 for key in WEIGHT_KEYS}
    weights |= {key: torch.zeros(4) for key in WEIGHT_KEYS if key.endswith("bias")}
    weights |= {f"heads.{j}.weight": torch.rand(1, 4, 1, 1, generator=draw) for j in range(len(CONVS_PER_TAP))}
    return LpipsDistance(weights)


def outputs(num_locals: int = N, num_masked: int = M, dtype: torch.dtype = torch.float32) -> Outputs:
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    image, text = randn(4, 8), randn(4, 8)
    ssl = SslOutputs(
        student_global_GE=randn(2 * S, E),
        student_local_LE=randn(num_locals * S, E),
        student_patch_ME=randn(num_masked, E),
        student_KE=randn(K, E),
        teacher_global_GE=randn(2 * S, E).detach(),
        teacher_patch_ME=randn(num_masked, E).detach(),
        teacher_KE=randn(K, E).detach(),
        student_cls_GD=randn(2 * S, 6),
        patch_weight_M=torch.full((num_masked,), 0.5),
    )
    clip = ClipOutputs(image, text, torch.tensor([10.0]), torch.tensor([-5.0]))
    return Outputs(clip, ssl, RecOutputs(randn(2, 3, 32, 32), randn(2, 3, 32, 32).detach(), latent=randn(2, 4, 2, 2)))


def run(objectives: Objectives, given: Outputs | None = None, centres: TeacherCentres | None = None) -> StepLosses:
    return compute_losses(given or outputs(), objectives, 0.05, Solo(), centres, perceptual())


def test_total_is_the_weighted_sum_of_every_named_term() -> None:
    objectives = Objectives(
        clip=Clip(weight=0.7),
        ssl=Ssl(weight=2.0, koleo=0.3),
        rec=Rec(weight=0.1, l1=1.5, perceptual=0.5, lpips_weights="file"),
    )
    named = run(objectives).named()
    assert list(named) == [
        "clip", "logit_scale", "clip_accuracy", "ssl", "dino_local", "dino_global", "mim", "koleo",
        "teacher_entropy", "prototype_share", "rec", "l1", "lpips", "latent_std_min", "latent_std_max", "total",
    ]  # fmt: skip
    assert all(value.shape == () and not value.requires_grad for value in named.values())
    ssl = named["dino_local"] + named["dino_global"] + named["mim"] + 0.3 * named["koleo"]
    rec = 1.5 * named["l1"] + 0.5 * named["lpips"]
    torch.testing.assert_close(named["ssl"], ssl)
    torch.testing.assert_close(named["rec"], rec)
    torch.testing.assert_close(named["total"], 0.7 * named["clip"] + 2.0 * ssl + 0.1 * rec)


@pytest.mark.parametrize(
    ("objectives", "absent"),
    [
        (Objectives(clip=Clip(weight=0), rec=Rec(perceptual=0)), {"clip", "logit_scale", "lpips"}),
        (
            Objectives(ssl=Ssl(weight=0), rec=Rec(perceptual=0)),
            {"ssl", "mim", "koleo", "teacher_entropy", "prototype_share", "lpips"},
        ),
        (Objectives(ssl=Ssl(koleo=0), rec=Rec(weight=0)), {"koleo", "rec", "l1", "lpips", "latent_std_min"}),
    ],
)
def test_what_has_no_weight_is_neither_named_nor_computed(objectives: Objectives, absent: set[str]) -> None:
    named = run(objectives).named()
    assert absent.isdisjoint(named)
    assert "total" in named


def test_an_objective_the_model_does_not_train_needs_no_outputs() -> None:
    given = outputs()
    objectives = Objectives(clip=Clip(weight=0), ssl=Ssl(weight=0), rec=Rec(perceptual=0))
    named = run(objectives, Outputs(None, None, given.rec)).named()
    assert list(named) == ["rec", "l1", "latent_std_min", "latent_std_max", "total"]


@pytest.mark.parametrize(("num_locals", "num_masked"), [(0, M), (N, 0), (0, 0)])
def test_no_local_crops_and_nothing_hidden_still_train(num_locals: int, num_masked: int) -> None:
    given = outputs(num_locals, num_masked)
    for kind in ("sinkhorn", "centering"):
        objectives = Objectives(clip=Clip(weight=0), ssl=Ssl(targets=kind), rec=Rec(weight=0))
        losses = run(objectives, given, TeacherCentres.zeros(K))
        losses.total.backward()
        assert torch.isfinite(losses.total)
        assert losses.centres is not None
        assert torch.isfinite(losses.centres.patch_K).all()


def test_centres_move_with_centering_and_rest_with_sinkhorn() -> None:
    before = TeacherCentres.zeros(K)
    after = run(Objectives(ssl=Ssl(targets="centering"), rec=Rec(perceptual=0)), centres=before).centres
    assert after is not None
    assert (before.cls_K == 0).all()
    given = outputs().ssl
    assert given is not None
    cls_GK, patch_MK = given.teacher_global_GE @ given.teacher_KE.T, given.teacher_patch_ME @ given.teacher_KE.T
    torch.testing.assert_close(after.cls_K, 0.1 * cls_GK.mean(dim=0))
    torch.testing.assert_close(after.patch_K, 0.1 * patch_MK.mean(dim=0))
    assert run(Objectives(rec=Rec(perceptual=0)), centres=before).centres is before


def test_objectives_are_float32_under_autocast_and_for_bf16_outputs() -> None:
    given, objectives = outputs(dtype=torch.bfloat16), Objectives(rec=Rec(perceptual=0))
    assert given.clip is not None
    by_hand = softmax_clip_loss(given.clip.image_BE, given.clip.text_BE, given.clip.logit_scale, Solo()).loss
    plain = run(objectives, given).named()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(objectives, given).named()
    assert torch.equal(under_autocast["clip"], by_hand)
    for name, value in plain.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, under_autocast[name]), name


def test_the_sigmoid_kind_is_the_sigmoid_loss_and_shows_its_bias() -> None:
    softmax = run(Objectives(ssl=Ssl(weight=0), rec=Rec(weight=0))).named()
    sigmoid = run(Objectives(clip=Clip(kind="sigmoid"), ssl=Ssl(weight=0), rec=Rec(weight=0))).named()
    assert sigmoid["clip"] != softmax["clip"]
    assert sigmoid["logit_bias"] == -5.0
    assert "logit_bias" not in softmax
