"""The Pretrainer's one forward: what it hands out, what it builds, and what it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs import Config, UserError
from model.imagenet import normalise
from model.initialise import initialise
from model.outputs import Outputs
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer, student_teacher_pairs
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
NO_SSL = ("batch.ssl=0", "objectives.ssl.weight=0")
NO_REC = ("batch.rec=0", "objectives.rec.weight=0")
NO_CLIP = ("objectives.clip.weight=0",)


def build(config: Config) -> Pretrainer:
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    return model


def run(model: Pretrainer, config: Config, **changed: Tensor) -> Outputs:
    return model(**model_inputs(random_batch(config, step=0)) | changed)


def total(outputs: Outputs) -> Tensor:
    """Some scalar that every output with a gradient enters."""
    parts = [value for part in (outputs.clip, outputs.ssl, outputs.rec) if part for value in vars(part).values()]
    return torch.stack(
        [(p.float() * torch.linspace(1, 2, p.numel()).view_as(p)).sum() for p in parts if _learns(p)]
    ).sum()


def _learns(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad


def test_outputs_have_the_documented_shapes_and_dtypes() -> None:
    config = tiny_config()  # B 12, S 6, R 6, N 2, 16 patches, 48 prototypes; 4 hidden patches in 6 of 12 crops
    outputs = run(build(config), config)
    assert outputs.clip is not None
    assert outputs.ssl is not None
    assert outputs.rec is not None
    shapes = {name: tuple(value.shape) for name, value in vars(outputs.ssl).items()}
    assert shapes == {
        "student_global_GE": (12, 16),
        "student_local_LE": (12, 16),
        "student_patch_ME": (24, 16),
        "student_KE": (48, 16),
        "teacher_global_GE": (12, 16),
        "teacher_patch_ME": (24, 16),
        "teacher_KE": (48, 16),
        "student_cls_GD": (12, 32),
        "patch_weight_M": (24,),
    }
    assert torch.equal(outputs.ssl.patch_weight_M, torch.full((24,), 0.25))
    assert outputs.clip.image_BE.shape == outputs.clip.text_BE.shape == (12, 32)
    assert outputs.clip.logit_bias is None
    torch.testing.assert_close(outputs.clip.logit_scale, torch.tensor([1 / 0.07]))
    torch.testing.assert_close(outputs.clip.text_BE.norm(dim=1), torch.ones(12))
    assert outputs.rec.recon.shape == outputs.rec.target.shape == (6, 3, 32, 32)


def test_every_student_parameter_learns_and_no_teacher_parameter_does() -> None:
    config = tiny_config("model.trunk.qk_norm=true", "model.trunk.layer_scale=0.1", "model.registers=1")
    model = build(config)
    total(run(model, config)).backward()
    assert model.teacher is not None
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == [name for name, _ in model.named_parameters() if name.startswith("teacher.")]


def test_bf16_parameters_give_float32_features_and_finite_gradients() -> None:
    config = tiny_config()
    expected, model = run(build(config), config), build(config).bfloat16()
    outputs = run(model, config)
    total(outputs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert outputs.clip is not None
    assert expected.clip is not None
    assert outputs.rec is not None
    assert expected.rec is not None
    assert outputs.clip.image_BE.dtype == outputs.rec.recon.dtype == torch.float32
    # Unit vectors over 32 numbers, a bf16 step of 2^-8 and three blocks: measured worst 0.006.
    torch.testing.assert_close(outputs.clip.image_BE, expected.clip.image_BE, rtol=0, atol=0.02)
    # Pixels of standard deviation 1: measured root mean square 0.007 over six seeds (bf16 rounds by 0.002 each time).
    assert (outputs.rec.recon - expected.rec.recon).pow(2).mean().sqrt() < 0.02


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((), {"trunk", "bottleneck", "decoder", "text", "clip", "prototypes", "teacher"}),
        (NO_SSL, {"trunk", "bottleneck", "decoder", "text", "clip"}),
        (NO_REC, {"trunk", "text", "clip", "prototypes", "teacher"}),
        ((*NO_CLIP, *NO_SSL), {"trunk", "bottleneck", "decoder"}),
        ((*NO_CLIP, *NO_REC), {"trunk", "prototypes", "teacher"}),
        ((*NO_SSL, *NO_REC), {"trunk", "text", "clip"}),
    ],
)
def test_an_objective_of_weight_zero_builds_nothing(overrides: tuple[str, ...], parts: set[str]) -> None:
    config = tiny_config(*overrides)
    model = build(config)
    assert {name for name, _ in model.named_children()} == parts
    outputs = run(model, config)
    assert (outputs.clip is not None) == ("clip" in parts)
    assert (outputs.ssl is not None) == ("teacher" in parts)
    assert (outputs.rec is not None) == ("decoder" in parts)


def test_rec_reads_the_same_rows_with_and_without_clip() -> None:
    layout = ("batch.layout=disjoint", "batch.rec=6")
    both, alone = (
        tiny_config(*layout, "model.rope_dtype=fp32"),
        tiny_config(*layout, *NO_CLIP, "model.rope_dtype=fp32"),
    )
    images = random_batch(both, step=0).images
    with_clip, without = run(build(both), both).rec, run(build(alone), alone).rec
    assert with_clip is not None
    assert without is not None
    assert torch.equal(with_clip.target, normalise(images[6:12]))
    assert torch.equal(without.target, with_clip.target)
    torch.testing.assert_close(without.recon, with_clip.recon, rtol=0, atol=1e-5)


def test_the_mask_hides_patches_from_the_student_and_not_from_the_teacher() -> None:
    config = tiny_config()
    model, batch = build(config), random_batch(config, step=0)
    crops = batch.global_crops.clone()
    crops[0, :, :8, :8] = 255 - crops[0, :, :8, :8]  # the first patch of the first crop
    hidden = batch.masks.clone()
    hidden[0] = False
    hidden[0, 0] = True
    changed = {"masks": hidden, "masked_idx": hidden.flatten().nonzero().squeeze(1)}
    before, after = (run(model, config, global_crops=c, **changed).ssl for c in (batch.global_crops, crops))
    assert before is not None
    assert after is not None
    assert torch.equal(before.student_global_GE[0], after.student_global_GE[0])
    assert not torch.equal(before.teacher_global_GE[0], after.teacher_global_GE[0])
    assert before.patch_weight_M[:2].tolist() == [1.0, 0.25]


def test_heads_read_latents_when_the_bottleneck_is_not_for_rec_alone() -> None:
    config = tiny_config("model.bottleneck_ae_only=false", "model.image_feature=patch_mean")
    model = build(config)
    outputs = run(model, config)
    assert outputs.ssl is not None
    assert outputs.ssl.student_cls_GD.shape == (12, 8)
    assert model.teacher is not None
    assert model.teacher.bottleneck is not None
    assert len(student_teacher_pairs(model)) == len(list(model.teacher.parameters()))


def test_patch_mean_and_cls_are_different_features_of_the_same_pass() -> None:
    cls, mean = (tiny_config(f"model.image_feature={kind}") for kind in ("cls", "patch_mean"))
    one, other = run(build(cls), cls).clip, run(build(mean), mean).clip
    assert one is not None
    assert other is not None
    assert not torch.allclose(one.image_BE, other.image_BE)
    assert torch.equal(one.text_BE, other.text_BE)


def test_only_the_sigmoid_loss_has_a_bias() -> None:
    config = tiny_config("objectives.clip.kind=sigmoid")
    outputs = run(build(config), config)
    assert outputs.clip is not None
    assert outputs.clip.logit_bias is not None
    assert outputs.clip.logit_bias.tolist() == [-10.0]


def test_the_logit_scale_ends_at_one_hundred() -> None:
    config = tiny_config()
    model = build(config)
    assert model.clip is not None
    with torch.no_grad():
        model.clip.logit_scale.fill_(9.0)
    outputs = run(model, config)
    assert outputs.clip is not None
    torch.testing.assert_close(outputs.clip.logit_scale, torch.tensor([100.0]))


def test_rows_are_a_ranks_share_of_the_batch() -> None:
    config = tiny_config("batch.layout=disjoint")
    assert RankBatchSizes.per_rank(config, 2) == RankBatchSizes(clip=6, ssl=3, rec=3, rec_start=3)
    assert RankBatchSizes.per_rank(tiny_config(), 1) == RankBatchSizes(clip=12, ssl=6, rec=6, rec_start=0)
    with pytest.raises(UserError, match=r"batch\.clip=12 is not a multiple of the 5 ranks"):
        RankBatchSizes.per_rank(config, 5)


def test_the_rec_rows_name_the_shared_micro_batch() -> None:
    config = tiny_config("batch.layout=disjoint", "system.clip.micro_batches=2")
    rows = RankBatchSizes.per_rank(config, 2)
    assert (rows.clip_per_micro_batch, rows.shared_micro_batch) == (3, 1)
    assert RankBatchSizes.per_rank(tiny_config("system.clip.micro_batches=2"), 3).shared_micro_batch == 0
    with pytest.raises(UserError, match=r"micro_batches=2 does not divide a rank's 3 rows .batch\.clip=12 on 4 ranks"):
        RankBatchSizes.per_rank(tiny_config("system.clip.micro_batches=2", *NO_SSL, *NO_REC), 4)


def test_two_ranks_see_together_what_one_rank_sees() -> None:
    config = tiny_config("model.rope_dtype=fp32")
    whole = run(build(config), config).clip
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 2))
    initialise(model, config)
    for rank in range(2):
        part = model(**model_inputs(random_batch(config, 0, rank, 2))).clip
        assert whole is not None
        torch.testing.assert_close(part.image_BE, whole.image_BE[rank::2], rtol=0, atol=1e-5)
