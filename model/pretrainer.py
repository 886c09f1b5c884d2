"""One step's forward: teacher, the shared trunk, text, heads, decoder.

    rows = Rows.per_rank(config, world_size=2)     # clip 32, ssl 8, rec 8, rec_start 0
    model = Pretrainer(config, rows)
    initialise(model, config)                      # model/initialise.py; the teacher starts as the student
    outputs = model(images, captions, global_crops, local_crops, masks, masked_idx)   # one Batch

The trunk runs once, over every image of the step; rec reads the clip rows' own features. An objective of
weight 0 builds no modules and puts no tokens into the sequence. Every parameter is used inside the forward of
the module that owns it, because there, and only there, ZeRO-3 has gathered it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs import Config
from model.captions import PackedCaptions
from model.corruption import Corruption, corrupted
from model.heads import ClipHeads, PrototypeHead
from model.imagenet import normalise
from model.latent import Gaussian, bottleneck, head_width, mode
from model.objectives.balance import Balance, balanced
from model.objectives.comm import Comm, Solo
from model.outputs import AlignOutputs, ClipOutputs, Outputs, RecOutputs, SslOutputs
from model.pack import Layout
from model.reads import Reads, masked_patches, reads_of, tokens
from model.rows import Rows
from model.teacher import Teacher
from model.text import TextTower
from model.towers import decoder_of, encoder_of


class Pretrainer(nn.Module):
    """Student, teacher and heads of the objectives in `config`, for `rows` images per rank.

    `attention` is the name of a resolved backend (kernels.attention.resolve), `comm` the other ranks, whom
    objectives.rec.align asks for their share of a gradient.
    """

    def __init__(self, config: Config, rows: Rows, attention: str = "sdpa", comm: Comm | None = None) -> None:
        super().__init__()
        model, weights, align = config.model, config.objectives, config.objectives.rec.align
        has_clip, has_ssl, has_rec = weights.clip.weight > 0, rows.ssl > 0, rows.rec > 0
        self.rows, self.image_feature, self.bottleneck_ae_only = (
            rows,
            model.image_feature,
            model.bottleneck_ae_only,
        )
        self.model, self.noise, self.attention = model, weights.rec.noise, attention
        self.trunk = encoder_of(model, attention)
        self.bottleneck = bottleneck(model) if has_rec or not model.bottleneck_ae_only else None
        self.decoder = decoder_of(model, attention, weights.rec.mask is not None) if has_rec else None
        self.align = None if align is None else nn.Linear(model.latent_channels, align.encoder.width, bias=False)
        self.balance = None
        if align is not None and align.adaptive:
            self.balance = Balance(align.weight, weights.rec.weight, comm or Solo())
        self.text = TextTower(model.text, model.clip_width, attention) if has_clip else None
        has_bias = weights.clip.kind == "sigmoid"
        self.clip = ClipHeads(head_width(model), model.clip_width, has_bias) if has_clip else None
        self.prototypes = PrototypeHead(head_width(model), model.prototypes) if has_ssl else None
        self.teacher = Teacher(model, attention) if has_ssl else None

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
        corruption: Corruption | None = None,
    ) -> Outputs:
        """Data's Batch, captions packed, pixels uint8 or float in [0, 1] -> what the objectives compare.

        `kept_idx` is stochastic depth's draw for the student's trunk (Trunk.forward); the teacher sees everything. With
        micro-batches `images` and `captions` are those of one; all but the shared one pass `clip_only`. `corruption` is
        what chance does to rec; without it the decoder reads the mode of every patch.
        """
        if clip_only:
            return self._clip_alone(images, captions)
        corruption = corruption or Corruption()
        visible = self._visible(corruption.visible_idx_RV, images)
        crops = self._crops(images, global_crops, local_crops, tuple(visible))
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(crops["ssl_global"], masked_idx)
        layout = self.trunk.layout(crops, visible)
        hidden = {"ssl_global": masks} if taught is not None else {}
        reads = self._reads(layout, masked_idx)
        x_TD = self.trunk(crops, hidden, kept_idx=kept_idx, reads=reads, visible=visible)
        y_TD = x_TD if self.bottleneck_ae_only else self._through_bottleneck(x_TD)
        forks = self._forks(y_TD)
        rec_TD = forks.get("rec", y_TD)
        return Outputs(
            clip=self._clip(layout, forks, captions),
            ssl=None if taught is None else self._ssl(layout, forks, masks, masked_idx, taught),
            rec=self._rec(layout, rec_TD if self.bottleneck_ae_only else x_TD, rec_TD, crops, corruption),
            forks=forks,
        )

    def _forks(self, y_TD: Tensor) -> dict[str, Tensor]:
        heads = {"clip": self.clip, "ssl": self.teacher, "rec": self.decoder}
        return {name: y_TD.view_as(y_TD) for name, head in heads.items() if head is not None}

    def _clip_alone(self, images: Tensor, captions: PackedCaptions) -> Outputs:
        crops = {"clip": normalise(images)}
        layout = self.trunk.layout(crops)
        reads = reads_of([self._clip_rows(layout, tokens(layout, images.device))])
        x_TD = self.trunk(crops, {}, reads=reads)
        y_TD = x_TD if self.bottleneck_ae_only else self._through_bottleneck(x_TD)
        forks = {"clip": y_TD.view_as(y_TD)}
        return Outputs(clip=self._clip(layout, forks, captions), ssl=None, rec=None, forks=forks)

    def _visible(self, visible_idx_RV: Tensor | None, images: Tensor) -> dict[str, Tensor]:
        """What the trunk leaves out of the group "rec"; nothing where rec sees all that clip does, and needs no group.

        Decided by shapes: all ranks have the same.
        """
        if visible_idx_RV is None:
            return {}
        patches = images.shape[2] * images.shape[3] // self.model.patch_size**2
        return {} if visible_idx_RV.shape[1] == patches else {"rec": visible_idx_RV}

    def _crops(
        self, images: Tensor, global_crops: Tensor, local_crops: Tensor, partly_seen: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Normalised pixels by group, in packing order; without clip only the rows that rec reads."""
        crops = {}
        images = images if self.clip is not None else images[self._rows_of_rec()]
        pixels = normalise(images)
        has_own_rec = "rec" in partly_seen
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
        """Which of the images that came are reconstructed."""
        first = self.rows.rec_start - self.rows.shared * self.rows.part
        return slice(first, first + self.rows.rec)

    def _rec_rows(self) -> slice:
        """Which of the packed images are: without the contrastive loss there are no others."""
        return self._rows_of_rec() if self.clip is not None else slice(None)

    def _through_bottleneck(self, x: Tensor) -> Tensor:
        assert self.bottleneck is not None, "built whenever an objective reads it"
        return self.bottleneck(x)

    def _without_variance(self, y_TD: Tensor) -> Tensor:
        """What the heads read of tokens behind the bottleneck; before it they have none."""
        return y_TD if self.bottleneck_ae_only else mode(y_TD, self.model)

    def _reads(self, layout: Layout, masked_idx: Tensor) -> Reads:
        """What clip, ssl and rec take from the trunk, each by the same selection as from its features."""
        token_T1 = tokens(layout, masked_idx.device)
        parts: list[Tensor] = [] if self.clip is None else [self._clip_rows(layout, token_T1)]
        is_read_by_clip = self.clip is not None and self.image_feature == "patch_mean" and not layout.has("rec")
        if self.decoder is not None and not is_read_by_clip:
            parts.append(self._rec_patches(layout, token_T1))
        if self.prototypes is not None:
            parts.extend(_ssl_rows(layout, token_T1, masked_idx))
        return reads_of(parts)

    def _clip_rows(self, layout: Layout, x_TD: Tensor) -> Tensor:
        """(B, D) or (B, P, D): what stands for an image in the contrastive loss, before a mean over patches."""
        return layout.cls(x_TD, "clip") if self.image_feature == "cls" else layout.patches(x_TD, "clip")

    def _rec_patches(self, layout: Layout, x_TD: Tensor) -> Tensor:
        """(R, V, D): the patches that rec reconstructs from, of rows of its own where patches are hidden from it."""
        return layout.patches(x_TD, "rec") if layout.has("rec") else layout.patches(x_TD, "clip")[self._rec_rows()]

    def _clip(self, layout: Layout, forks: dict[str, Tensor], captions: PackedCaptions) -> ClipOutputs | None:
        if self.clip is None or self.text is None:
            return None
        z_TD = self._without_variance(forks["clip"])
        return ClipOutputs(*self.clip(image_feature(layout, z_TD, self.image_feature), self.text(captions)))

    def _ssl(
        self,
        layout: Layout,
        forks: dict[str, Tensor],
        masks: Tensor,
        masked_idx: Tensor,
        taught: tuple[Tensor, Tensor, Tensor],
    ) -> SslOutputs:
        """CLS of global and local crops and the hidden patches, through the prototype head in one call."""
        assert self.prototypes is not None
        parts = _ssl_rows(layout, self._without_variance(forks["ssl"]), masked_idx)
        rows_XE, student_KE = self.prototypes(torch.cat(parts))
        global_GE, local_LE, patch_ME = rows_XE.split([part.shape[0] for part in parts])
        num_hidden_G = masks.sum(dim=1).float()
        return SslOutputs(
            student_global_GE=global_GE,
            student_local_LE=local_LE,
            student_patch_ME=patch_ME,
            student_KE=student_KE,
            teacher_global_GE=taught[0],
            teacher_patch_ME=taught[1],
            teacher_KE=taught[2],
            student_cls_GD=parts[0],
            patch_weight_M=1 / num_hidden_G.index_select(0, masked_idx // masks.shape[1]),
        )

    def _rec(
        self, layout: Layout, x_TD: Tensor, y_TD: Tensor, crops: dict[str, Tensor], corruption: Corruption
    ) -> RecOutputs | None:
        """Reconstructs clip rows from the features that clip itself reads, or from those of their visible patches: no
        pass of its own."""
        if self.decoder is None:
            return None
        y_RVM = self._rec_patches(layout, y_TD)
        if self.bottleneck_ae_only:
            y_RVM = self._through_bottleneck(y_RVM)
        posterior = self._posterior(y_RVM)
        forked_RVM, align = self._aligned(y_RVM, self._rec_patches(layout, x_TD))
        decoded = posterior if align is None else self._posterior(forked_RVM)
        grid = layout.group("rec" if layout.has("rec") else "clip").grid
        latent_RVL = corrupted(forked_RVM if decoded is None else decoded, corruption, self.noise)
        recon = self.decoder(latent_RVL, grid, corruption.visible_idx_RV)
        return RecOutputs(
            recon=recon.float(),
            target=crops["rec"] if "rec" in crops else crops["clip"][self._rec_rows()],
            latent=_on_grid(mode(y_RVM, self.model), grid, corruption.visible_idx_RV),
            posterior=posterior,
            align=align,
        )

    def _posterior(self, y_RVM: Tensor) -> Gaussian | None:
        return Gaussian.of(y_RVM, dim=-1) if self.model.latent == "gaussian" else None

    def _aligned(self, y_RPM: Tensor, feature_RPD: Tensor) -> tuple[Tensor, AlignOutputs | None]:
        """The bottleneck's output for the decoder, and its mode for the frozen encoder's features: VA-VAE."""
        if self.align is None:
            return y_RPM, None
        other_RPM = y_RPM
        if self.balance is not None:
            pair = balanced(y_RPM.flatten(0, 1), feature_RPD.flatten(0, 1), self.balance)
            y_RPM, other_RPM = (part.view_as(y_RPM) for part in pair)
        latent_RPL = mode(other_RPM, self.model)
        return y_RPM, AlignOutputs(latent_RPL, self.align(latent_RPL))


def image_feature(layout: Layout, x_TD: Tensor, kind: str) -> Tensor:
    """(T, D) -> (B, D): what stands for an image, CLS ("cls") or mean patch ("patch_mean")."""
    return layout.cls(x_TD, "clip") if kind == "cls" else layout.patches(x_TD, "clip").mean(dim=1)


def teacher_pairs(model: Pretrainer) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, student's, teacher's) for every parameter of the teacher, in its order; empty without ssl."""
    if model.teacher is None:
        return []
    student = dict(model.named_parameters())
    return [(name, student[name], parameter) for name, parameter in model.teacher.named_parameters()]


def _ssl_rows(layout: Layout, x_TD: Tensor, masked_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(G, D), (L, D), (M, D): CLS of the global crops, CLS of the local ones, hidden patches."""
    global_GD = layout.cls(x_TD, "ssl_global")
    local_LD = layout.cls(x_TD, "ssl_local") if layout.has("ssl_local") else global_GD[:0]
    return global_GD, local_LD, masked_patches(x_TD, layout, masked_idx)


def _on_grid(latent_RVL: Tensor, grid: tuple[int, int], visible_idx_RV: Tensor | None) -> Tensor:
    """(R, V, L) -> (R, L, h, w), zeros where nothing was visible."""
    if visible_idx_RV is not None:
        nothing_RPL = latent_RVL.new_zeros(len(latent_RVL), grid[0] * grid[1], latent_RVL.shape[2])
        latent_RVL = nothing_RPL.scatter(1, visible_idx_RV.unsqueeze(-1).expand_as(latent_RVL), latent_RVL.detach())
    return latent_RVL.transpose(1, 2).unflatten(2, grid)
