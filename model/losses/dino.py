"""DINO: the student's CLS of one crop predicts the teacher's prototype distribution for another crop of the image.

The teacher sees the 2 unmasked global crops of an image; the student sees them masked, and N local crops. A
local crop is compared with both teacher views, a global crop with the other view only: 2N local and 2 global
pairs an image. Both losses are divided by all 2N + 2 pairs, so `local + global` is the mean over pairs,
whatever N is. (DINOv2 writes the global half as twice its mean over 2S rows. With N = 0 its code divides by 3
and not by 2; ours stays the mean.)

    targets = Targets(ssl.teacher_global_GE, ssl.teacher_KE, bias_K, 0.05)
    local = dino_local_loss(ssl.student_local_LE, ssl.student_KE, targets, 0.1)
    dino = local + dino_global_loss(ssl.student_global_GE, ssl.student_KE, targets, 0.1, num_locals=8)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kernels.prototypes import prototype_cross_entropy
from model.losses.targets import Targets


def dino_local_loss(
    student_LE: Float[Tensor, "L E"], student_KE: Float[Tensor, "K E"], targets: Targets, temp: float
) -> Float[Tensor, ""]:
    """DINO loss of pairs (local student crop, teacher crop); 0 where N = 0. Rows are view-major; N follows from shapes.

        L = 1 / (S (2 + 2N)) * sum_i sum_{local view l} sum_{teacher view v}  H(target_vi, student_li)

    for each image i:
        average the targets of its two teacher views (the cross-entropy is linear in its target)
        for each local view l: add twice the cross-entropy of student crop (l, i) against that average
    divide by S * (2 + 2N)
    """
    num_images, width = len(targets.teacher_RE) // 2, student_LE.shape[1]
    num_locals = len(student_LE) // num_images
    student_SNE = student_LE.reshape(num_locals, num_images, width).transpose(0, 1)
    teacher_S2E = targets.teacher_RE.unflatten(0, (2, num_images)).transpose(0, 1)
    weight_SN = targets.bias_K.new_full((num_images, num_locals), 2 / (num_images * (2 + 2 * num_locals)))
    return prototype_cross_entropy(
        student_SNE, student_KE, teacher_S2E, targets.teacher_KE, targets.bias_K, weight_SN, temp, targets.temp
    )


def dino_global_loss(
    student_GE: Float[Tensor, "G E"],
    student_KE: Float[Tensor, "K E"],
    targets: Targets,
    temp: float,
    num_locals: int,
) -> Float[Tensor, ""]:
    """DINO loss of pairs (global student crop, the other global crop of the teacher).

        L = 1 / (S (2 + 2N)) * sum_i sum_{view v}  H(target_{1-v, i}, student_vi)

    for each of the two global views v, for each image i:
        add the cross-entropy of student crop (v, i) against teacher crop (other view, i)
    divide by S * (2 + 2N)
    """
    num_images = len(student_GE) // 2
    other_G1E = targets.teacher_RE.roll(num_images, dims=0).unsqueeze(1)
    weight_G1 = targets.bias_K.new_full((2 * num_images, 1), 1 / (num_images * (2 + 2 * num_locals)))
    return prototype_cross_entropy(
        student_GE.unsqueeze(1),
        student_KE,
        other_G1E,
        targets.teacher_KE,
        targets.bias_K,
        weight_G1,
        temp,
        targets.temp,
    )
