"""The pre-trained model and its forward pass: teacher, shared trunk, text tower, heads, decoder.

    rows = RankBatchSizes.per_rank(config, world_size=2)     # clip 32, ssl 8, rec 8, rec_start 0
    model = Pretrainer(config, rows)
    initialise(model, config)                      # model/initialise.py; the teacher starts as the student
    outputs = model(images, captions, global_crops, local_crops, masks, masked_idx)   # one Batch

The trunk runs once, over every image of the step; rec reads the clip rows' own features. An objective of weight 0
builds no modules and puts no tokens into the sequence. Every parameter is used inside the forward of the module that
owns it, because there, and only there, ZeRO-3 has gathered it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs import Config
from configs.model import Model
from model.factory import build_decoder, build_encoder
from model.heads import ClipHeads, PrototypeHead
from model.imagenet import normalise
from model.latent import DiagonalGaussian, RecNoise, add_rec_noise, build_bottleneck, head_width, mode
from model.losses.alignment import AdaptiveBalance, balance_gradients
from model.losses.comm import Comm, Solo
from model.outputs import AlignOutputs, ClipOutputs, Outputs, RecOutputs, SslOutputs
from model.packing import PackedLayout, RankBatchSizes, TokenSubset, masked_patches, token_indices, token_subset
from model.text import PackedCaptions, TextTower
from model.trunk import Trunk


class Pretrainer(nn.Module):
    """Student, teacher and heads of the objectives in `config`, for `rows` images per rank.

    `attention` is the name of a resolved backend (kernels.attention.resolve_attention), `comm` the collectives
    over ranks that objectives.rec.align needs for its adaptive weight.
    """

    def __init__(self, config: Config, rows: RankBatchSizes, attention: str = "sdpa", comm: Comm | None = None) -> None:
        super().__init__()
        model, weights, align = config.model, config.objectives, config.objectives.rec.align
        has_clip, has_ssl, has_rec = weights.clip.weight > 0, rows.ssl > 0, rows.rec > 0
        self.rows, self.image_feature, self.bottleneck_ae_only = (
            rows,
            model.image_feature,
            model.bottleneck_ae_only,
        )
        self.model, self.noise, self.attention = model, weights.rec.noise, attention
        self.trunk = build_encoder(model, attention)
        self.bottleneck = build_bottleneck(model) if has_rec or not model.bottleneck_ae_only else None
        self.decoder = build_decoder(model, attention, weights.rec.mask is not None) if has_rec else None
        self.align = None if align is None else nn.Linear(model.latent_channels, align.encoder.width, bias=False)
        self.balance = None
        if align is not None and align.adaptive:
            self.balance = AdaptiveBalance(align.weight, weights.rec.weight, comm or Solo())
        self.text = TextTower(model.text, model.clip_width, attention) if has_clip else None
        has_bias = weights.clip.kind == "sigmoid"
        self.clip = ClipHeads(head_width(model), model.clip_width, has_bias) if has_clip else None
        self.prototypes = PrototypeHead(head_width(model), model.prototypes) if has_ssl else None
        self.teacher = TeacherNetwork(model, attention) if has_ssl else None

    def forward(
        self,
        images: Tensor,
        captions: PackedCaptions,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: Tensor,
        masked_idx: Tensor,
        kept_idx: Tensor | None = None,
        clip_only: bool = False,
        rec_noise: RecNoise | None = None,
    ) -> Outputs:
        """Compute the inputs of all losses from a Batch of data/: captions packed, pixels uint8 or float in [0, 1].

        `kept_idx` holds the segments that stochastic depth keeps in the student's trunk (Trunk.forward); the teacher
        sees everything. With micro-batches `images` and `captions` are those of one; all but the shared one pass
        `clip_only`. `rec_noise` is the step's noise and masks for rec; without it the decoder reads the mode of every
        patch.
        """
        if clip_only:
            return self._clip_only(images, captions)
        rec_noise = rec_noise or RecNoise()
        visible = self._visible(rec_noise.visible_idx_RV, images)
        crops = self._crops(images, global_crops, local_crops, tuple(visible))
        teacher_outputs = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_outputs = self.teacher(crops["ssl_global"], masked_idx)
        layout = self.trunk.layout(crops, visible)
        hidden = {"ssl_global": masks} if teacher_outputs is not None else {}
        read_tokens = self._read_tokens(layout, masked_idx)
        x_TD = self.trunk(crops, hidden, kept_idx=kept_idx, read_tokens=read_tokens, visible=visible)
        y_TD = x_TD if self.bottleneck_ae_only else self._through_bottleneck(x_TD)
        branch_features = self._branch_features(y_TD)
        rec_TD = branch_features.get("rec", y_TD)
        return Outputs(
            clip=self._clip(layout, branch_features, captions),
            ssl=None
            if teacher_outputs is None
            else self._ssl(layout, branch_features, masks, masked_idx, teacher_outputs),
            rec=self._rec(layout, rec_TD if self.bottleneck_ae_only else x_TD, rec_TD, crops, rec_noise),
            branch_features=branch_features,
        )

    def _branch_features(self, y_TD: Tensor) -> dict[str, Tensor]:
        heads = {"clip": self.clip, "ssl": self.teacher, "rec": self.decoder}
        return {name: y_TD.view_as(y_TD) for name, head in heads.items() if head is not None}

    def _clip_only(self, images: Tensor, captions: PackedCaptions) -> Outputs:
        crops = {"clip": normalise(images)}
        layout = self.trunk.layout(crops)
        read_tokens = token_subset([self._clip_rows(layout, token_indices(layout, images.device))])
        x_TD = self.trunk(crops, {}, read_tokens=read_tokens)
        y_TD = x_TD if self.bottleneck_ae_only else self._through_bottleneck(x_TD)
        branch_features = {"clip": y_TD.view_as(y_TD)}
        return Outputs(
            clip=self._clip(layout, branch_features, captions), ssl=None, rec=None, branch_features=branch_features
        )

    def _visible(self, visible_idx_RV: Tensor | None, images: Tensor) -> dict[str, Tensor]:
        """The visible patches of the group "rec"; empty where rec sees the same patches as clip and needs no group.

        Decided by shapes, which are the same on all ranks.
        """
        if visible_idx_RV is None:
            return {}
        patches = images.shape[2] * images.shape[3] // self.model.patch_size**2
        return {} if visible_idx_RV.shape[1] == patches else {"rec": visible_idx_RV}

    def _crops(
        self, images: Tensor, global_crops: Tensor, local_crops: Tensor, partly_visible: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Normalised pixels by group, in packing order; without clip only the rows of rec."""
        crops = {}
        images = images if self.clip is not None else images[self._rows_of_rec()]
        pixels = normalise(images)
        has_own_rec = "rec" in partly_visible
        if images.shape[0] and (self.clip is not None or not has_own_rec):
            crops["clip"] = pixels
        if self.teacher is not None:
            crops["ssl_global"] = normalise(global_crops)
            if local_crops.shape[0]:
                crops["ssl_local"] = normalise(local_crops)
        if has_own_rec:
            crops["rec"] = pixels[self._rec_rows()]
        return crops

    def _rows_of_rec(self) -> slice:
        """The rows of `images` that are reconstructed."""
        first = self.rows.rec_start - self.rows.shared_micro_batch * self.rows.clip_per_micro_batch
        return slice(first, first + self.rows.rec)

    def _rec_rows(self) -> slice:
        """The rows of the packed images that are reconstructed: all of them without the contrastive loss."""
        return self._rows_of_rec() if self.clip is not None else slice(None)

    def _through_bottleneck(self, x: Tensor) -> Tensor:
        assert self.bottleneck is not None, "built whenever an objective reads it"
        return self.bottleneck(x)

    def _without_variance(self, y_TD: Tensor) -> Tensor:
        """The heads' input: without the variance, which tokens after the bottleneck may have."""
        return y_TD if self.bottleneck_ae_only else mode(y_TD, self.model)

    def _read_tokens(self, layout: PackedLayout, masked_idx: Tensor) -> TokenSubset:
        """The tokens that clip, ssl and rec read from the trunk, selected in the same way as their features."""
        token_T1 = token_indices(layout, masked_idx.device)
        parts: list[Tensor] = [] if self.clip is None else [self._clip_rows(layout, token_T1)]
        is_read_by_clip = self.clip is not None and self.image_feature == "patch_mean" and not layout.has("rec")
        if self.decoder is not None and not is_read_by_clip:
            parts.append(self._rec_patches(layout, token_T1))
        if self.prototypes is not None:
            parts.extend(_ssl_rows(layout, token_T1, masked_idx))
        return token_subset(parts)

    def _clip_rows(self, layout: PackedLayout, x_TD: Tensor) -> Tensor:
        """(B, D) or (B, P, D): the image features of the contrastive loss, before a mean over patches."""
        return layout.cls(x_TD, "clip") if self.image_feature == "cls" else layout.patches(x_TD, "clip")

    def _rec_patches(self, layout: PackedLayout, x_TD: Tensor) -> Tensor:
        """(R, V, D): the patches that rec reconstructs from; its own rows where patches are hidden from it."""
        return layout.patches(x_TD, "rec") if layout.has("rec") else layout.patches(x_TD, "clip")[self._rec_rows()]

    def _clip(
        self, layout: PackedLayout, branch_features: dict[str, Tensor], captions: PackedCaptions
    ) -> ClipOutputs | None:
        if self.clip is None or self.text is None:
            return None
        z_TD = self._without_variance(branch_features["clip"])
        return ClipOutputs(*self.clip(image_feature(layout, z_TD, self.image_feature), self.text(captions)))

    def _ssl(
        self,
        layout: PackedLayout,
        branch_features: dict[str, Tensor],
        masks: Tensor,
        masked_idx: Tensor,
        teacher_outputs: tuple[Tensor, Tensor, Tensor],
    ) -> SslOutputs:
        """CLS of global and local crops and the hidden patches, passed through the prototype head in one call."""
        assert self.prototypes is not None
        parts = _ssl_rows(layout, self._without_variance(branch_features["ssl"]), masked_idx)
        rows_XE, student_KE = self.prototypes(torch.cat(parts))
        global_GE, local_LE, patch_ME = rows_XE.split([part.shape[0] for part in parts])
        num_hidden_G = masks.sum(dim=1).float()
        return SslOutputs(
            student_global_GE=global_GE,
            student_local_LE=local_LE,
            student_patch_ME=patch_ME,
            student_KE=student_KE,
            teacher_global_GE=teacher_outputs[0],
            teacher_patch_ME=teacher_outputs[1],
            teacher_KE=teacher_outputs[2],
            student_cls_GD=parts[0],
            patch_weight_M=1 / num_hidden_G.index_select(0, masked_idx // masks.shape[1]),
        )

    def _rec(
        self, layout: PackedLayout, x_TD: Tensor, y_TD: Tensor, crops: dict[str, Tensor], rec_noise: RecNoise
    ) -> RecOutputs | None:
        """Reconstruct clip rows from the features that clip itself reads, or from those of their visible patches; no
        trunk pass of its own."""
        if self.decoder is None:
            return None
        y_RVM = self._rec_patches(layout, y_TD)
        if self.bottleneck_ae_only:
            y_RVM = self._through_bottleneck(y_RVM)
        posterior = self._posterior(y_RVM)
        decoder_RVM, align = self._split_for_alignment(y_RVM, self._rec_patches(layout, x_TD))
        decoded = posterior if align is None else self._posterior(decoder_RVM)
        grid = layout.group("rec" if layout.has("rec") else "clip").grid
        latent_RVL = add_rec_noise(decoder_RVM if decoded is None else decoded, rec_noise, self.noise)
        recon = self.decoder(latent_RVL, grid, rec_noise.visible_idx_RV)
        return RecOutputs(
            recon=recon.float(),
            target=crops["rec"] if "rec" in crops else crops["clip"][self._rec_rows()],
            latent=_on_grid(mode(y_RVM, self.model), grid, rec_noise.visible_idx_RV),
            posterior=posterior,
            align=align,
        )

    def _posterior(self, y_RVM: Tensor) -> DiagonalGaussian | None:
        return DiagonalGaussian.of(y_RVM, dim=-1) if self.model.latent == "gaussian" else None

    def _split_for_alignment(self, y_RPM: Tensor, feature_RPD: Tensor) -> tuple[Tensor, AlignOutputs | None]:
        """VA-VAE: the bottleneck's output for the decoder, and its mode for the comparison with the frozen encoder."""
        if self.align is None:
            return y_RPM, None
        align_RPM = y_RPM
        if self.balance is not None:
            pair = balance_gradients(y_RPM.flatten(0, 1), feature_RPD.flatten(0, 1), self.balance)
            y_RPM, align_RPM = (part.view_as(y_RPM) for part in pair)
        latent_RPL = mode(align_RPM, self.model)
        return y_RPM, AlignOutputs(latent_RPL, self.align(latent_RPL))


class TeacherNetwork(nn.Module):
    """The EMA teacher of ssl: the student's trunk and prototype head, without gradient; it sees unmasked crops.

        teacher = TeacherNetwork(config.model, backend="sdpa")
        cls_GE, patch_ME, prototypes_KE = teacher(global_crops, masked_idx)      # under no_grad

    engine/ema.py moves its parameters after each step; student_teacher_pairs lists them.
    """

    def __init__(self, model: Model, backend: str) -> None:
        super().__init__()
        self.model = model
        self.trunk = Trunk(model, backend)
        self.bottleneck = None if model.bottleneck_ae_only else build_bottleneck(model)
        self.prototypes = PrototypeHead(head_width(model), model.prototypes)
        self.requires_grad_(False)

    def forward(self, global_crops: Tensor, masked_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(G, 3, height, width) normalised pixels -> CLS (G, E), hidden patches (M, E), prototypes (K, E)."""
        crops = {"ssl_global": global_crops}
        layout = self.trunk.layout(crops)
        token_T1 = token_indices(layout, global_crops.device)
        read_tokens = token_subset((layout.cls(token_T1, "ssl_global"), masked_patches(token_T1, layout, masked_idx)))
        x_TD = self.trunk(crops, {}, read_tokens=read_tokens)
        if self.bottleneck is not None:
            x_TD = mode(self.bottleneck(x_TD), self.model)
        cls_GD, patch_MD = layout.cls(x_TD, "ssl_global"), masked_patches(x_TD, layout, masked_idx)
        rows_XE, prototypes_KE = self.prototypes(torch.cat((cls_GD, patch_MD)))
        return *rows_XE.split((cls_GD.shape[0], patch_MD.shape[0])), prototypes_KE


def student_teacher_pairs(model: Pretrainer) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, student's parameter, teacher's parameter) for every parameter of the teacher; empty without ssl."""
    if model.teacher is None:
        return []
    student = dict(model.named_parameters())
    return [(name, student[name], parameter) for name, parameter in model.teacher.named_parameters()]


def image_feature(layout: PackedLayout, x_TD: Tensor, kind: str) -> Tensor:
    """(T, D) -> (B, D): the feature of an image, CLS ("cls") or mean of its patches ("patch_mean")."""
    return layout.cls(x_TD, "clip") if kind == "cls" else layout.patches(x_TD, "clip").mean(dim=1)


def _ssl_rows(layout: PackedLayout, x_TD: Tensor, masked_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G, D), (L, D), (M, D): CLS of the global crops, CLS of the local ones, hidden patches."""
    global_GD = layout.cls(x_TD, "ssl_global")
    local_LD = layout.cls(x_TD, "ssl_local") if layout.has("ssl_local") else global_GD[:0]
    return global_GD, local_LD, masked_patches(x_TD, layout, masked_idx)


def _on_grid(latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None) -> Tensor:
    """(R, V, L) -> (R, L, h, w), zeros at hidden patches."""
    if visible_idx_RV is not None:
        zeros_RPL = latent_RVL.new_zeros(len(latent_RVL), grid[0] * grid[1], latent_RVL.shape[2])
        latent_RVL = zeros_RPL.scatter(1, visible_idx_RV.unsqueeze(-1).expand_as(latent_RVL), latent_RVL.detach())
    return latent_RVL.transpose(1, 2).unflatten(2, grid)
