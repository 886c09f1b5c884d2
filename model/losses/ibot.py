"""iBOT: the student predicts the teacher's prototype distribution for each masked patch.

bias_K = sinkhorn(ssl.teacher_patch_ME, ssl.teacher_KE, 0.05, comm)         # over the hidden patches of all ranks
targets = Targets(ssl.teacher_patch_ME, ssl.teacher_KE, bias_K, 0.05)
ibot_loss(ssl.student_patch_ME, ssl.student_KE, targets, ssl.patch_weight_M, 0.1, num_crops=2 * S)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kernels.prototypes import prototype_cross_entropy
from model.losses.targets import Targets


def ibot_loss(
    student_ME: Float[Tensor, "M E"],
    student_KE: Float[Tensor, "K E"],
    targets: Targets,
    weight_M: Float[Tensor, " M"],
    temp: float,
    num_crops: int,
) -> Float[Tensor, ""]:
    """Cross-entropy, mean over the hidden patches of a crop, then over all 2S global crops (arXiv 2111.07832, eq. 2).

        L = 1 / 2S * sum_{crop c} 1/n_c * sum_{hidden patch p of c}  H(target_cp, student_cp)

    for each global crop c with n_c > 0 hidden patches:
        for each hidden patch p: add weight_p * cross-entropy, weight_p = 1 / n_c
    divide by the number of global crops, those with nothing hidden included
    """
    return prototype_cross_entropy(
        student_ME.unsqueeze(1),
        student_KE,
        targets.teacher_RE.unsqueeze(1),
        targets.teacher_KE,
        targets.bias_K,
        (weight_M / num_crops).unsqueeze(1),
        temp,
        targets.temp,
    )
