"""Our objectives give the reference implementations' values and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

from model.losses import clip, dino, ibot, koleo, targets
from model.losses.comm import Solo
from model.losses.targets import Targets
from tests.parity import reference

pytestmark = pytest.mark.L0
SOLO = Solo()
# Relative to the largest entry. Measured worst case 2.6e-6 (Sinkhorn of the patches); 1e-5 is the promise,
# and a wrong denominator, a dropped row or a missing gradient path is off by percents.
TOLERANCE = 1e-5


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its shape annotations enforced, taken out of torch.no_grad's wrapper."""
    return jaxtyped(typechecker=beartype)(inspect.unwrap(function))


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def assert_same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert found.reshape(expected.shape).dtype == torch.float32
    error = (found.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
    print(f"relative error {error:.1e}")
    assert error < TOLERANCE


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return reference("losses")


def test_softmax_contrast_equals_the_reference_with_gradients(values: dict[str, Tensor]) -> None:
    image, text = leaf(values["clip_image"]), leaf(values["clip_text"])
    scale = values["clip_scale"].reshape(1).clone().requires_grad_()
    loss = checked(clip.softmax_clip_loss)(image, text, scale, SOLO).loss
    loss.backward()
    assert_same(loss, values["clip_loss"])
    assert_same(image.grad, values["clip_image_grad"])
    assert_same(text.grad, values["clip_text_grad"])
    assert_same(scale.grad, values["clip_scale_grad"])


def test_sigmoid_contrast_equals_the_reference_with_gradients(values: dict[str, Tensor]) -> None:
    image, text = leaf(values["clip_image"]), leaf(values["clip_text"])
    scale, bias = values["clip_scale"].reshape(1), values["siglip_bias"].reshape(1)
    loss = checked(clip.sigmoid_clip_loss)(image, text, scale, bias, SOLO).loss
    loss.backward()
    assert_same(loss, values["siglip_loss"])
    assert_same(image.grad, values["siglip_image_grad"])


def prototypes(logits: Tensor) -> Tensor:
    """Those that make a row of logits its own features: the reference has no others."""
    return torch.eye(logits.shape[1])


def spread_evenly(logits: Tensor) -> Targets:
    teacher_KE = prototypes(logits)
    return Targets(logits, teacher_KE, checked(targets.sinkhorn)(logits, teacher_KE, 0.05, SOLO), 0.05)


@pytest.mark.parametrize("tokens", ["teacher_cls", "teacher_patch"])
def test_sinkhorn_targets_equal_the_reference(values: dict[str, Tensor], tokens: str) -> None:
    expected = values[f"{tokens}_sinkhorn_0.05"]
    assert_same(checked(targets.dense_targets)(spread_evenly(values[tokens])), expected)
    assert_same(checked(targets.dense_sinkhorn)(values[tokens], 0.05, SOLO), expected)


def test_centred_targets_and_the_centre_that_follows_equal_the_reference(values: dict[str, Tensor]) -> None:
    centre = values["center"].squeeze(0)
    teacher = values["teacher_cls"]
    centred = Targets(teacher, prototypes(teacher), centre / 0.05, 0.05)
    assert_same(checked(targets.dense_targets)(centred), values["teacher_cls_centered_0.05"])
    followed = checked(targets.update_centre)(centre, teacher, prototypes(teacher), 0.9, SOLO)
    assert_same(followed, values["center_after_update_0.9"])


def test_local_loss_is_the_reference_sum_over_pairs_divided_by_all_pairs(values: dict[str, Tensor]) -> None:
    student, num_locals = leaf(values["student_local"]), 3
    target = spread_evenly(values["teacher_cls"])
    loss = checked(dino.dino_local_loss)(student, prototypes(student), target, 0.1)
    num_pairs = 2 + 2 * num_locals
    (loss * num_pairs).backward()
    assert_same(loss * num_pairs, values["dino_local_sum_over_pairs"])
    assert_same(student.grad, values["dino_local_grad"])


def test_global_loss_is_twice_the_reference_mean_divided_by_all_pairs(values: dict[str, Tensor]) -> None:
    student, num_locals = leaf(values["student_global"]), 3
    target = spread_evenly(values["teacher_cls"])
    loss = checked(dino.dino_global_loss)(student, prototypes(student), target, 0.1, num_locals)
    scaled = loss * (2 + 2 * num_locals) / 2
    scaled.backward()
    assert_same(scaled, values["dino_global_pair"])
    assert_same(student.grad, values["dino_global_grad"])


def test_masked_patch_loss_equals_the_reference_with_gradient(values: dict[str, Tensor]) -> None:
    student, mask = leaf(values["student_patch"]), values["patch_mask"]
    weight = (1 / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(mask)[mask]
    target = spread_evenly(values["teacher_patch"])
    loss = checked(ibot.ibot_loss)(student, prototypes(student), target, weight, 0.1, len(mask))
    loss.backward()
    assert_same(loss, values["ibot"])
    assert_same(student.grad, values["ibot_grad"])


def test_koleo_of_each_view_equals_the_reference_with_gradient(values: dict[str, Tensor]) -> None:
    student = leaf(values["koleo_in"].repeat(2, 1))
    loss = checked(koleo.koleo_loss)(student, SOLO)
    loss.backward()
    assert_same(loss / 2, values["koleo"])
    for view in student.grad.chunk(2):  # type: ignore[union-attr]
        assert_same(view, values["koleo_grad"])


def test_a_tensor_of_the_wrong_shape_breaks_the_annotations() -> None:
    with pytest.raises(TypeCheckError):
        checked(clip.softmax_clip_loss)(torch.ones(4, 8), torch.ones(5, 8), torch.ones(1), SOLO)
    with pytest.raises(TypeCheckError):
        checked(targets.sinkhorn)(torch.ones(4, 8), torch.ones(5, 7), 0.05, SOLO)
