"""The autoregressive generators: a transformer that knows some tokens, a diffusion head that draws the next.

    generator = AutoregressiveGenerator(Autoregressive(), LatentShape(16, 16, 16), num_classes=1000, backend="sdpa")
    draws = draw(generator.needs, seed=0, step=7, positions=positions_B)
    generator(latents_BLhw, labels_B, draws)["total"].backward()
    generator.sample(labels_B, Sampling("ancestral", iterations=64, guidance=3.0), draws)       # (B, 16, 16, 16)

The loss is the head's, over the tokens that are to be drawn. Each meets `head.repeats` noise levels on average: a
sample has a fixed number of rows, dealt to its hidden tokens in turn, so no row is spent on a token that is known and
shapes do not change. Latents are normalised: each channel of zero mean and unit variance over the corpus.

A sample's numbers: uniforms of its order (N), mask ratio, class dropout, noise levels (one a row); normals, the noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.autoregressive import Autoregressive
from model.generator import token_order, token_process
from model.generator.backbone import patched, unpatched
from model.generator.causal_backbone import CausalBackbone
from model.generator.diffusion_head import DiffusionHead
from model.generator.draws import Draws, Needs
from model.generator.masked_backbone import MaskedBackbone
from model.generator.sampling import Sampling
from model.generator.shape import LatentShape

ITERATIONS = 64  # in which all tokens of order=masked are drawn, where no number is asked for [P]
STEPS = 100  # of a token's own diffusion, likewise [P]
SHAPES = 8  # numbers of tokens that the encoder meets while sampling: few, as each is a graph where blocks are compiled


class AutoregressiveGenerator(nn.Module):
    """Backbone and head. `needs` are the numbers one row takes in training."""

    def __init__(self, section: Autoregressive, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.shape, self.num_classes = section, shape, num_classes
        rows, columns = shape.grid(section.patch)
        self.tokens, self.channels = rows * columns, shape.channels * section.patch**2
        self.rows = head_rows(section, self.tokens)
        self.needs = Needs(normals=self.rows * self.channels, uniforms=self.tokens + 2 + self.rows)
        kind: Any = MaskedBackbone if section.order == "masked" else CausalBackbone
        self.backbone = kind(section, self.channels, self.tokens, num_classes, backend)
        self.head = DiffusionHead(section.head, self.channels, section.width)

    def forward(self, latents_BLhw: Tensor, labels_B: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss of a batch: "total", and the same under the head's objective; float32 scalars, means over rows."""
        order_BN, ratio_B1, dropout_B1, level_BR = draws.uniform_BU.split([self.tokens, 1, 1, self.rows], dim=1)
        labels_B = torch.where(dropout_B1.squeeze(1) < self.section.class_dropout, self.num_classes, labels_B)
        order_BN = token_order.draw_order(self.section.order, order_BN)
        tokens_BNC = token_order.arrange(self._tokens(latents_BLhw), order_BN)
        z_BND, visible_B = self._conditions(tokens_BNC, order_BN, labels_B, ratio_B1.squeeze(1))
        row_idx_R = token_order.dealt(visible_B, self.tokens, self.rows).flatten()
        target_RC = tokens_BNC.flatten(0, 1).index_select(0, row_idx_R)
        noise_RC, objective = draws.normal_BN.reshape(-1, self.channels), self.section.head.objective
        rows = token_process.corrupt(objective, target_RC, noise_RC, level_BR.flatten())
        predicted_RC = self.head(rows.noisy_RC, rows.thousandths_R, z_BND.flatten(0, 1), row_idx_R)
        loss = F.mse_loss(predicted_RC, rows.target_RC)
        return {"total": loss, objective: loss}

    def _conditions(
        self, tokens_BNC: Tensor, order_BN: Tensor, labels_B: Tensor, ratio_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the head is given of every token, (B, N, D), and how many of them each sample knows."""
        if self.section.order != "masked":
            return self.backbone(tokens_BNC[:, :-1], order_BN, labels_B), torch.zeros_like(labels_B)
        section = self.section.mask_ratio
        visible_B = token_order.visible(self.tokens, token_order.mask_ratio(ratio_B, section), section)
        known_BKC = tokens_BNC[:, : token_order.most_visible(self.tokens, section)]
        return self.backbone(known_BKC, order_BN, visible_B, labels_B), visible_B

    def _tokens(self, latents_BLhw: Tensor) -> Tensor:
        """(B, N, C), row by row."""
        return patched(latents_BLhw, self.section.patch).unflatten(0, (-1, self.tokens))

    def _latents(self, tokens_BNC: Tensor) -> Tensor:
        """The inverse of `_tokens`."""
        shape = torch.Size((len(tokens_BNC), self.shape.channels, self.shape.height, self.shape.width))
        return unpatched(tokens_BNC.flatten(0, 1), shape, self.section.patch)

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with what it leaves open as this generator takes it. Raises UserError for what cannot be."""
        sampling = sampling.fitted(self.section.head.objective, "head")
        self._check_iterations(sampling)
        steps, iterations = sampling.steps, sampling.iterations
        if steps is None and sampling.method != "dopri5":
            steps = STEPS
        if iterations is None and self.section.order == "masked":
            iterations = min(ITERATIONS, self.tokens)
        return replace(sampling, steps=steps, iterations=iterations)

    def sampling_needs(self, sampling: Sampling) -> Needs:
        """The numbers one row takes in `sample`."""
        each = self.resolved(sampling).num_latents
        return Needs(normals=each * self.tokens * self.channels, uniforms=self.tokens)

    @torch.no_grad()
    def sample(self, labels_B: Tensor, sampling: Sampling, draws: Draws) -> Tensor:
        """(B,) int64, num_classes for no class -> (B, L, h, w) float32, normalised.

        Guidance grows with the share of tokens drawn, as in MAR [C], up to `sampling.guidance`. All else of `sampling`
        but its iterations is about each token's own diffusion. The same draws give the same latents. Raises like
        `resolved`.
        """
        sampling = self.resolved(sampling)
        order_BN = token_order.draw_order(self.section.order, draws.uniform_BU)
        noise_KBNC = draws.normal_BN.unflatten(1, (-1, self.tokens, self.channels)).transpose(0, 1)
        drawn_BNC = torch.zeros_like(noise_KBNC[0])
        follow = self._masked_conditions if self.section.order == "masked" else self._causal_conditions
        for slots, z_XND in follow(labels_B, order_BN, drawn_BNC, sampling):
            guidance = 1 + (sampling.guidance - 1) * slots.stop / self.tokens
            predict = self._guided(z_XND, len(labels_B), guidance, sampling)
            tokens_RC = token_process.generated(predict, noise_KBNC[:, :, slots].flatten(1, 2), sampling)
            drawn_BNC[:, slots] = tokens_RC.unflatten(0, (len(labels_B), -1))
        return self._latents(token_order.restore(drawn_BNC, order_BN))

    def _masked_conditions(
        self, labels_B: Tensor, order_BN: Tensor, drawn_BNC: Tensor, sampling: Sampling
    ) -> Iterator[tuple[slice, Tensor]]:
        """Which tokens come next, and what the head is given of them: (B, n, D), twice that many with guidance, those
        without a class last. Reads of `drawn_BNC` what was drawn in between."""
        labels_X, order_XN = self._twice(labels_B, order_BN, sampling)
        width, known = -(-self.tokens // SHAPES), 0
        assert sampling.iterations is not None, "it is resolved"
        for count in token_order.cosine_schedule(self.tokens, sampling.iterations):
            held = min(self.tokens, -(-known // width) * width)
            known_XKC = _repeated(drawn_BNC[:, :held], len(labels_X))
            visible_X = torch.full_like(labels_X, known)
            slots = slice(known, known + count)
            yield slots, self.backbone(known_XKC, order_XN, visible_X, labels_X)[:, slots]
            known += count

    def _causal_conditions(
        self, labels_B: Tensor, order_BN: Tensor, drawn_BNC: Tensor, sampling: Sampling
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `_masked_conditions`, one token after the other, with the keys and values of those before it."""
        labels_X, order_XN = self._twice(labels_B, order_BN, sampling)
        pasts = self.backbone.pasts(len(labels_X))
        for idx in range(self.tokens):
            begin = max(idx - 1, 0)
            last_XKC = _repeated(drawn_BNC[:, begin:idx], len(labels_X))
            z_X1D = self.backbone(last_XKC, order_XN[:, begin : idx + 1], None if idx else labels_X, pasts)
            yield slice(idx, idx + 1), z_X1D

    def _guided(self, z_XND: Tensor, samples: int, guidance: float, sampling: Sampling) -> token_process.Predict:
        """Without + guidance * (with - without the class), both in one pass; where there is none, the class's alone."""
        z_RD, z_QD = z_XND[:samples].flatten(0, 1), z_XND.flatten(0, 1)

        def predict(x_RC: Tensor, thousandths: float, time: float) -> Tensor:
            if not sampling.guides(time):
                return self.head(x_RC, x_RC.new_full((len(x_RC),), thousandths), z_RD)
            twice = self.head(torch.cat((x_RC, x_RC)), x_RC.new_full((len(z_QD),), thousandths), z_QD)
            of_class, of_none = twice.chunk(2)
            return of_none + guidance * (of_class - of_none)

        return predict

    def _twice(self, labels_B: Tensor, order_BN: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Labels and orders, with guidance followed by the same without a class."""
        if sampling.guidance == 1:
            return labels_B, order_BN
        return torch.cat((labels_B, torch.full_like(labels_B, self.num_classes))), torch.cat((order_BN, order_BN))

    def _check_iterations(self, sampling: Sampling) -> None:
        order = self.section.order
        if sampling.iterations is not None and order != "masked":
            raise UserError(
                f"iterations={sampling.iterations} for a generator of order={order}: it draws token after token, "
                f"{self.tokens} in all; leave iterations out"
            )
        if (sampling.iterations or 0) > self.tokens:
            raise UserError(
                f"iterations={sampling.iterations} for latents of {self.tokens} tokens: each draws one at least; lower "
                "iterations"
            )


def head_rows(section: Autoregressive, tokens: int) -> int:
    """Rows of the head in a step, of one sample: `repeats` for every token that is hidden on average."""
    share = token_order.mean_mask_ratio(section.mask_ratio) if section.order == "masked" else 1.0
    return round(section.head.repeats * tokens * share)


def _repeated(tokens_BKC: Tensor, samples: int) -> Tensor:
    """(B, K, C) over and over, up to `samples`."""
    return tokens_BKC.repeat(samples // len(tokens_BKC), 1, 1)
