"""What one forward pass hands to the objectives: plain tensors, no parameters.

Under ZeRO-3 a parameter is an empty tensor outside the engine's forward, so everything an objective needs,
the logit scale included, leaves the model through these dataclasses. An objective the run does not train is
None.

    S = 3 ssl images with 2 global and N = 4 local crops each, K = 1024 prototypes, M = 20 hidden patches:
    outputs.ssl.student_global_GK.shape == (6, 1024)   # G = 2S: images 0 1 2 of view 0, then 0 1 2 of view 1
    outputs.ssl.student_local_LK.shape  == (12, 1024)  # L = N*S: images 0 1 2 of local view 0, of 1, ...
    outputs.ssl.student_patch_MK.shape  == (20, 1024)  # in the order of Batch.masked_idx
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClipOutputs:
    """Image and caption vectors of this rank's B pairs, row i of one belonging to row i of the other."""

    image_BE: Tensor  # (B, E) float32, L2-normalised
    text_BE: Tensor  # (B, E) float32, L2-normalised
    logit_scale: Tensor  # (1,) float32, already exponentiated and at most 100
    logit_bias: Tensor | None  # (1,) float32; only the sigmoid loss has one


@dataclass(frozen=True)
class SslOutputs:
    """Prototype logits of S images, no temperature. Crops are view-major: G = 2S, L = N*S, N may be 0."""

    student_global_GK: Tensor  # (2S, K) CLS of the masked global crops
    student_local_LK: Tensor  # (N*S, K) CLS of the local crops
    student_patch_MK: Tensor  # (M, K) hidden patches of the global crops, crop by crop
    teacher_global_GK: Tensor  # (2S, K) CLS of the whole global crops; no gradient
    teacher_patch_MK: Tensor  # (M, K) the same patches as student_patch_MK, seen by the teacher; no gradient
    student_cls_GD: Tensor  # (2S, D) CLS before the prototype head and before any L2 norm, for KoLeo
    patch_weight_M: Tensor  # (M,) float32: 1 / (hidden patches of the crop this patch belongs to)


@dataclass(frozen=True)
class RecOutputs:
    """Reconstructions of R images and what they should be, both in ImageNet-normalised space."""

    recon: Tensor  # (R, 3, H, W)
    target: Tensor  # (R, 3, H, W)
    latent: Tensor  # (R, L, h, w) what the decoder read; for pictures, no objective reads it


@dataclass(frozen=True)
class Outputs:
    """One forward pass of the Pretrainer."""

    clip: ClipOutputs | None
    ssl: SslOutputs | None
    rec: RecOutputs | None
