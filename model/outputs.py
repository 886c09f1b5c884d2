"""Outputs of one forward pass, the inputs of the losses: plain tensors, no parameters.

Under ZeRO-3 a parameter is an empty tensor outside the engine's forward, so everything a loss needs, the logit scale
included, is in these dataclasses. The field of an objective that the run does not train is None.

    S = 3 ssl images with 2 global and N = 4 local crops each, K = 1024 prototypes of E = 256, M = 20 hidden patches:
    outputs.ssl.student_global_GE.shape == (6, 256)   # G = 2S: images 0 1 2 of view 0, then 0 1 2 of view 1
    outputs.ssl.student_local_LE.shape  == (12, 256)  # L = N*S: images 0 1 2 of local view 0, of 1, ...
    outputs.ssl.student_patch_ME.shape  == (20, 256)  # in the order of Batch.masked_idx
    outputs.ssl.student_KE.shape        == (1024, 256)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from model.latent import DiagonalGaussian


@dataclass(frozen=True)
class ClipOutputs:
    """Image and caption embeddings of this rank's B pairs, row by row."""

    image_BE: Tensor  # (B, E) float32, L2-normalised
    text_BE: Tensor  # (B, E) float32, L2-normalised
    logit_scale: Tensor  # (1,) float32, already exponentiated and at most 100
    logit_bias: Tensor | None  # (1,) float32; only the sigmoid loss has one


@dataclass(frozen=True)
class SslOutputs:
    """Student and teacher features of S images, and the prototypes. Crops are view-major: G = 2S, L = N*S, N may be 0.

    Rows (., E) are L2-normalised; a row's logits, no temperature, are its products with the (K, E) prototypes. They
    are left to the losses, which compute a chunk of them at a time: together they would be the step's largest tensors.
    """

    student_global_GE: Tensor  # (2S, E) CLS of the masked global crops
    student_local_LE: Tensor  # (N*S, E) CLS of the local crops
    student_patch_ME: Tensor  # (M, E) hidden patches of the global crops, crop by crop
    student_KE: Tensor  # (K, E) the student's prototypes
    teacher_global_GE: Tensor  # (2S, E) CLS of the whole global crops; no gradient
    teacher_patch_ME: Tensor  # (M, E) the same patches from the teacher, which sees them; no gradient
    teacher_KE: Tensor  # (K, E) the teacher's prototypes; no gradient
    student_cls_GD: Tensor  # (2S, D) CLS before the prototype head and before any L2 norm, for KoLeo
    patch_weight_M: Tensor  # (M,) float32: 1 / (hidden patches of the crop this patch belongs to)


@dataclass(frozen=True)
class AlignOutputs:
    """Latents of the R images, to be compared with a frozen encoder's features of width W."""

    latent_RPL: Tensor  # (R, P, L)
    projected_RPW: Tensor  # (R, P, W) a linear map of them


@dataclass(frozen=True)
class RecOutputs:
    """Reconstructions of R images and their targets, both ImageNet-normalised."""

    recon: Tensor  # (R, 3, H, W)
    target: Tensor  # (R, 3, H, W)
    latent: Tensor  # (R, L, h, w) before any noise, 0 where a patch was hidden; for image logs, no loss reads it
    posterior: DiagonalGaussian | None = None  # (R, V, L) each, of the visible patches; with model.latent=gaussian
    align: AlignOutputs | None = None  # with objectives.rec.align


@dataclass(frozen=True)
class Outputs:
    """One forward pass of the Pretrainer.

    `branch_features` are views of the features (T, D), one for each objective by name, equal in value: the gradient at
    one of them is that objective's alone (engine/reporting/step_meter.py).
    """

    clip: ClipOutputs | None
    ssl: SslOutputs | None
    rec: RecOutputs | None
    branch_features: dict[str, Tensor] = field(default_factory=dict)
