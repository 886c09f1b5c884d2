"""KoLeo: spread the images of a batch by pushing every CLS away from its nearest neighbour.

Applied to each of the two global views separately (two crops of one image should be near, so they are not
compared) and summed over the two, as in DINOv2. Unlike there, neighbours are searched among the rows of all
ranks, with gradient, so the loss does not depend on the number of ranks.

    koleo_loss(ssl.student_cls_GD, comm)     # 0 where neighbours are 1 apart, 2 * 0.69 where 0.5
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from configs import UserError
from model.losses.comm import Comm

EPS = 1e-8  # of the norm, of each coordinate's difference and of the logarithm, as in DINOv2


def koleo_loss(student_GD: Float[Tensor, "G D"], comm: Comm) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko entropy (arXiv 1806.03198, eq. 2), one view after the other; rows are view-major.

        L = sum_{view v} 1/S * sum_i -log | x_vi - x_vj |
        x L2-normalised,   j = argmin_{j != i} | x_vi - x_vj |

    for each of the two views v:
        for each own image i: find the nearest other image of all ranks in view v; add -log of the distance
        divide by S
    Raises UserError where there is one image only: it has no neighbour.
    """
    num_images = len(student_GD) // 2
    if num_images * comm.world_size < 2:
        raise UserError(
            "batch.ssl=1 with objectives.ssl.koleo on: KoLeo pushes an image away from its nearest "
            "neighbour, and one image has none; raise batch.ssl or set objectives.ssl.koleo=0"
        )
    x_2SD = F.normalize(student_GD.float(), dim=1, eps=EPS).unflatten(0, (2, num_images))
    all_2AD = comm.gather_with_grad(x_2SD.transpose(0, 1).contiguous()).transpose(0, 1)
    first = comm.rank * num_images
    return torch.stack([_one_view(x_SD, all_AD, first) for x_SD, all_AD in zip(x_2SD, all_2AD, strict=True)]).sum()


def _one_view(x_SD: Tensor, all_AD: Tensor, first: int) -> Tensor:
    """Mean over own rows of -log distance to the nearest of the others; own row i is `first + i` of all."""
    with torch.no_grad():
        cosine_SA = x_SD @ all_AD.T
        cosine_SA.diagonal(offset=first).fill_(-torch.inf)
        nearest_S = cosine_SA.argmax(dim=1)
    distance_S = F.pairwise_distance(x_SD, all_AD[nearest_S], eps=EPS)
    return -torch.log(distance_S + EPS).mean()
