"""ssl, second half (iBOT): the student says of a hidden patch what the teacher, who sees it, says of it.

targets_MK = sinkhorn(ssl.teacher_patch_MK, 0.05, comm)         # over the hidden patches of all ranks
masked_patch_loss(ssl.student_patch_MK, targets_MK, ssl.patch_weight_M, 0.1, num_crops=2 * S)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from model.objectives.targets import cross_entropy


def masked_patch_loss(
    student_MK: Float[Tensor, "M K"],
    target_MK: Float[Tensor, "M K"],
    weight_M: Float[Tensor, " M"],
    temp: float,
    num_crops: int,
) -> Float[Tensor, ""]:
    """Mean over the hidden patches of a crop, then over all 2S global crops (iBOT, arXiv 2111.07832, eq. 2).

        L = 1 / 2S * sum_{crop c} 1/n_c * sum_{hidden patch p of c}  H(target_cp, student_cp)

    for each global crop c with n_c > 0 hidden patches:
        for each hidden patch p: add weight_p * cross-entropy, weight_p = 1 / n_c
    divide by the number of global crops, those with nothing hidden included
    """
    return (weight_M * cross_entropy(student_MK, target_MK, temp)).sum() / num_crops
