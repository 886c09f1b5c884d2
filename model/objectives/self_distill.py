"""ssl, first half (DINO): the student's CLS of one crop says what the teacher's CLS of another crop says.

The teacher sees the 2 whole global crops of an image; the student sees them masked, and N local crops. A
local crop is compared with both teacher views, a global crop with the other view only: 2N local and 2 global
pairs an image. Both losses are divided by all 2N + 2 pairs, so `local + global` is the mean over pairs,
whatever N is. (DINOv2 writes the global half as twice its mean over 2S rows. With N = 0 its code divides by 3
and not by 2; ours stays the mean.)

    targets_GK = sinkhorn(ssl.teacher_global_GK, 0.05, comm)
    local = local_loss(ssl.student_local_LK, targets_GK, 0.1)
    dino = local + global_loss(ssl.student_global_GK, targets_GK, 0.1, num_locals=8)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from model.objectives.targets import cross_entropy


def local_loss(student_LK: Float[Tensor, "L K"], target_GK: Float[Tensor, "G K"], temp: float) -> Float[Tensor, ""]:
    """The local pairs' share of DINO, 0 where N = 0. Rows are view-major; N is read off the shapes.

        L = 1 / (S (2 + 2N)) * sum_i sum_{local view l} sum_{teacher view v}  H(target_vi, student_li)

    for each local view l, for each image i:
        for each teacher view v: add the cross-entropy of student crop (l, i) against teacher crop (v, i)
    divide by S * (2 + 2N) The cross-entropy is linear in its target, so the two teacher views are added first
    and the student is read once.
    """
    num_images = len(target_GK) // 2
    num_locals = len(student_LK) // num_images
    both_views_SK = target_GK[:num_images] + target_GK[num_images:]
    pair_sum = cross_entropy(student_LK, both_views_SK.repeat(num_locals, 1), temp).sum()
    return pair_sum / (num_images * (2 + 2 * num_locals))


def global_loss(
    student_GK: Float[Tensor, "G K"], target_GK: Float[Tensor, "G K"], temp: float, num_locals: int
) -> Float[Tensor, ""]:
    """The global pairs' share of DINO.

        L = 1 / (S (2 + 2N)) * sum_i sum_{view v}  H(target_{1-v, i}, student_vi)

    for each of the two global views v, for each image i:
        add the cross-entropy of student crop (v, i) against teacher crop (other view, i)
    divide by S * (2 + 2N)
    """
    num_images = len(target_GK) // 2
    pair_sum = cross_entropy(student_GK, target_GK.roll(num_images, dims=0), temp).sum()
    return pair_sum / (num_images * (2 + 2 * num_locals))
