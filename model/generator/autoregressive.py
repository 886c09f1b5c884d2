"""Autoregressive generators (MAR, RandomAR, RasterAR): a transformer and a diffusion head that draws the next tokens.

    generator = AutoregressiveGenerator(Autoregressive(), LatentShape(16, 16, 16), num_classes=1000, backend="sdpa")
    draws = draw(generator.draw_counts, seed=0, step=7, positions=positions_B)
    generator(latents_BLhw, labels_B, draws)["total"].backward()
    generator.sample(labels_B, Sampling("ancestral", iterations=64, guidance=3.0), draws)       # (B, 16, 16, 16)

The loss is the head's, over the hidden tokens. Each has `head.repeats` noise levels on average: a sample has a fixed
number of rows, dealt to its hidden tokens in turn, so no row is spent on a known token and shapes do not change.
Latents are normalised: each channel of zero mean and unit variance over the corpus.

A sample's random numbers: uniforms of its order (N), mask ratio, class dropout, noise levels (one a row); normals, the
noise.

The diffusion process of one token, with the samplers of whole latents:

    objective   noisy token                                the head predicts    published in
    noise       sqrt(a) token + sqrt(1 - a) noise          noise                MAR (arXiv 2406.11838)
    velocity    time token + (1 - time) noise              token - noise        rectified flow (arXiv 2209.03003)

a is alphas_cumprod of the cosine schedule, in 1,000 steps (iDDPM, arXiv 2102.09672).

    add_token_noise("velocity", tokens_RC, noise_RC, uniform_R)         # noisy rows, their times, targets
    sample_tokens(predict, noise_KRC, Sampling("euler", steps=25))      # (R, C)

The head's time input is in thousandths: the step, or 1,000 times the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.generator import Autoregressive
from model.generator import ddpm, flow_matching
from model.generator.autoregressive_networks import CausalBackbone, DiffusionHead, MaskedBackbone
from model.generator.draws import DrawCounts, RandomDraws
from model.generator.sampling import Sampling
from model.generator.tokens import (
    LatentShape,
    assign_head_rows,
    cosine_schedule,
    max_visible,
    mean_mask_ratio,
    num_visible,
    patchify,
    permute_tokens,
    sample_mask_ratio,
    sample_order,
    unpatchify,
    unpermute_tokens,
)

ITERATIONS = 64  # default number in which all tokens of order=masked are drawn [P]
HEAD_STEPS = 100  # default number of steps of a token's diffusion [P]
# Number of different token counts that the encoder gets while sampling; each is a graph where blocks are compiled.
NUM_ENCODER_LENGTHS = 8
COSINE_OFFSET = 0.008  # of the cosine schedule
# Sampling begins at this step of the 1,000. At the last one the signal is 5e-5 of the noise, and an error of the
# prediction would come out 20,000 times as large; here 50 times.
FIRST_SAMPLING_STEP = 987
Objective = Literal["noise", "velocity"]
# (noisy (R, C), thousandths, time) -> (R, C). The time runs from 0, noise, to 1, a token, whatever the objective.
TokenPredictor = Callable[[Tensor, float, float], Tensor]


class AutoregressiveGenerator(nn.Module):
    """Backbone and diffusion head. `draw_counts`: random numbers of one row in training."""

    def __init__(self, section: Autoregressive, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.shape, self.num_classes = section, shape, num_classes
        rows, columns = shape.grid(section.patch)
        self.tokens, self.channels = rows * columns, shape.channels * section.patch**2
        self.rows = num_head_rows(section, self.tokens)
        self.draw_counts = DrawCounts(normals=self.rows * self.channels, uniforms=self.tokens + 2 + self.rows)
        kind: Any = MaskedBackbone if section.order == "masked" else CausalBackbone
        self.backbone = kind(section, self.channels, self.tokens, num_classes, backend)
        self.head = DiffusionHead(section.head, self.channels, section.width)

    def forward(self, latents_BLhw: Tensor, labels_B: Tensor, draws: RandomDraws) -> dict[str, Tensor]:
        """Loss of a batch: "total", and the same under the name of the objective; float32 scalars, means over rows."""
        order_BN, ratio_B1, dropout_B1, level_BR = draws.uniform_BU.split([self.tokens, 1, 1, self.rows], dim=1)
        labels_B = torch.where(dropout_B1.squeeze(1) < self.section.class_dropout, self.num_classes, labels_B)
        order_BN = sample_order(self.section.order, order_BN)
        tokens_BNC = permute_tokens(self._tokens(latents_BLhw), order_BN)
        z_BND, visible_B = self._conditions(tokens_BNC, order_BN, labels_B, ratio_B1.squeeze(1))
        row_idx_R = assign_head_rows(visible_B, self.tokens, self.rows).flatten()
        target_RC = tokens_BNC.flatten(0, 1).index_select(0, row_idx_R)
        noise_RC, objective = draws.normal_BN.reshape(-1, self.channels), self.section.head.objective
        rows = add_token_noise(objective, target_RC, noise_RC, level_BR.flatten())
        predicted_RC = self.head(rows.noisy_RC, rows.thousandths_R, z_BND.flatten(0, 1), row_idx_R)
        loss = F.mse_loss(predicted_RC, rows.target_RC)
        return {"total": loss, objective: loss}

    def _conditions(
        self, tokens_BNC: Tensor, order_BN: Tensor, labels_B: Tensor, ratio_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The head's condition of every token, (B, N, D), and the number of known tokens of each sample."""
        if self.section.order != "masked":
            return self.backbone(tokens_BNC[:, :-1], order_BN, labels_B), torch.zeros_like(labels_B)
        section = self.section.mask_ratio
        visible_B = num_visible(self.tokens, sample_mask_ratio(ratio_B, section), section)
        known_BKC = tokens_BNC[:, : max_visible(self.tokens, section)]
        return self.backbone(known_BKC, order_BN, visible_B, labels_B), visible_B

    def _tokens(self, latents_BLhw: Tensor) -> Tensor:
        """Latents as tokens (B, N, C), row by row."""
        return patchify(latents_BLhw, self.section.patch).unflatten(0, (-1, self.tokens))

    def _latents(self, tokens_BNC: Tensor) -> Tensor:
        """The inverse of `_tokens`."""
        shape = torch.Size((len(tokens_BNC), self.shape.channels, self.shape.height, self.shape.width))
        return unpatchify(tokens_BNC.flatten(0, 1), shape, self.section.patch)

    def resolve_sampling(self, sampling: Sampling) -> Sampling:
        """Fill in the defaults of this generator. Raises UserError for settings that do not fit it."""
        sampling = sampling.fitted(self.section.head.objective, "head")
        self._check_iterations(sampling)
        steps, iterations = sampling.steps, sampling.iterations
        if steps is None and sampling.method != "dopri5":
            steps = HEAD_STEPS
        if iterations is None and self.section.order == "masked":
            iterations = min(ITERATIONS, self.tokens)
        return replace(sampling, steps=steps, iterations=iterations)

    def sampling_draw_counts(self, sampling: Sampling) -> DrawCounts:
        """Random numbers of one row in `sample`."""
        each = self.resolve_sampling(sampling).num_latents
        return DrawCounts(normals=each * self.tokens * self.channels, uniforms=self.tokens)

    @torch.no_grad()
    def sample(self, labels_B: Tensor, sampling: Sampling, draws: RandomDraws) -> Tensor:
        """Sample latents: (B,) int64 labels, num_classes for no class -> (B, L, h, w) float32, normalised.

        Guidance grows with the fraction of tokens drawn, as in MAR [C], up to `sampling.guidance`. All settings except
        `iterations` are those of each token's own diffusion. The same draws give the same latents. Raises like
        `resolve_sampling`.
        """
        sampling = self.resolve_sampling(sampling)
        order_BN = sample_order(self.section.order, draws.uniform_BU)
        noise_KBNC = draws.normal_BN.unflatten(1, (-1, self.tokens, self.channels)).transpose(0, 1)
        drawn_BNC = torch.zeros_like(noise_KBNC[0])
        conditions = self._masked_conditions if self.section.order == "masked" else self._causal_conditions
        for slots, z_XND in conditions(labels_B, order_BN, drawn_BNC, sampling):
            guidance = 1 + (sampling.guidance - 1) * slots.stop / self.tokens
            predict = self._guided(z_XND, len(labels_B), guidance, sampling)
            tokens_RC = sample_tokens(predict, noise_KBNC[:, :, slots].flatten(1, 2), sampling)
            drawn_BNC[:, slots] = tokens_RC.unflatten(0, (len(labels_B), -1))
        return self._latents(unpermute_tokens(drawn_BNC, order_BN))

    def _masked_conditions(
        self, labels_B: Tensor, order_BN: Tensor, drawn_BNC: Tensor, sampling: Sampling
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the next tokens to draw and the head's conditions for them: (B, n, D), with guidance (2B, n, D), those
        without a class last. The caller writes drawn tokens to `drawn_BNC` in between."""
        labels_X, order_XN = self._with_classless(labels_B, order_BN, sampling)
        width, known = -(-self.tokens // NUM_ENCODER_LENGTHS), 0
        assert sampling.iterations is not None, "it is resolved"
        for count in cosine_schedule(self.tokens, sampling.iterations):
            length = min(self.tokens, -(-known // width) * width)
            known_XKC = _repeated(drawn_BNC[:, :length], len(labels_X))
            visible_X = torch.full_like(labels_X, known)
            slots = slice(known, known + count)
            yield slots, self.backbone(known_XKC, order_XN, visible_X, labels_X)[:, slots]
            known += count

    def _causal_conditions(
        self, labels_B: Tensor, order_BN: Tensor, drawn_BNC: Tensor, sampling: Sampling
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `_masked_conditions`, one token at a time, with the keys and values of those before it."""
        labels_X, order_XN = self._with_classless(labels_B, order_BN, sampling)
        caches = self.backbone.caches(len(labels_X))
        for idx in range(self.tokens):
            begin = max(idx - 1, 0)
            last_XKC = _repeated(drawn_BNC[:, begin:idx], len(labels_X))
            z_X1D = self.backbone(last_XKC, order_XN[:, begin : idx + 1], None if idx else labels_X, caches)
            yield slice(idx, idx + 1), z_X1D

    def _guided(self, z_XND: Tensor, samples: int, guidance: float, sampling: Sampling) -> TokenPredictor:
        """Classifier-free guidance: without + guidance * (with - without the class), both in one pass; at times without
        guidance, the prediction with the class."""
        z_RD, z_QD = z_XND[:samples].flatten(0, 1), z_XND.flatten(0, 1)

        def predict(x_RC: Tensor, thousandths: float, time: float) -> Tensor:
            if not sampling.guides(time):
                return self.head(x_RC, x_RC.new_full((len(x_RC),), thousandths), z_RD)
            twice = self.head(torch.cat((x_RC, x_RC)), x_RC.new_full((len(z_QD),), thousandths), z_QD)
            with_class, without = twice.chunk(2)
            return without + guidance * (with_class - without)

        return predict

    def _with_classless(self, labels_B: Tensor, order_BN: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Labels and orders; with guidance followed by the same without a class."""
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
                f"iterations={sampling.iterations} for latents of {self.tokens} tokens: each draws at least one; lower "
                "iterations"
            )


def num_head_rows(section: Autoregressive, tokens: int) -> int:
    """Rows of the head in a step, of one sample: `repeats` times the mean number of hidden tokens."""
    ratio = mean_mask_ratio(section.mask_ratio) if section.order == "masked" else 1.0
    return round(section.head.repeats * tokens * ratio)


def _repeated(tokens_BKC: Tensor, samples: int) -> Tensor:
    """Repeat (B, K, C) along the first axis up to `samples`."""
    return tokens_BKC.repeat(samples // len(tokens_BKC), 1, 1)


class NoisyTokens(NamedTuple):
    """Noisy rows, their times, and the head's targets; all float32."""

    noisy_RC: Tensor
    thousandths_R: Tensor
    target_RC: Tensor


def add_token_noise(objective: Objective, tokens_RC: Tensor, noise_RC: Tensor, uniform_R: Tensor) -> NoisyTokens:
    """Add noise to each row at the time that its uniform, in (0, 1), selects."""
    if objective == "noise":
        step_R = ddpm.sample_timesteps(uniform_R)
        noisy_RC = ddpm.add_noise(tokens_RC, noise_RC, step_R, cosine_alphas_cumprod())
        return NoisyTokens(noisy_RC, step_R.float(), noise_RC)
    noisy_RC = torch.lerp(noise_RC, tokens_RC, uniform_R.unsqueeze(1))
    return NoisyTokens(noisy_RC, 1000 * uniform_R, tokens_RC - noise_RC)


def sample_tokens(predict: TokenPredictor, noise_KRC: Tensor, sampling: Sampling) -> Tensor:
    """Sample (R, C) float32 tokens from normals (K, R, C), K = sampling.num_latents."""
    if sampling.method in ("ddim", "ancestral"):
        return _denoise_tokens(predict, noise_KRC, sampling)

    def field(x_RC: Tensor, time: float) -> Tensor:
        return predict(x_RC, 1000 * time, time)

    return flow_matching.integrate(field, noise_KRC, sampling).end


def _denoise_tokens(predict: TokenPredictor, noise_KRC: Tensor, sampling: Sampling) -> Tensor:
    alphas_cumprod_S, count = cosine_alphas_cumprod()[: FIRST_SAMPLING_STEP + 1], sampling.num_steps

    def noise_in(x_RC: Tensor, step: int) -> ddpm.NoisePrediction:
        return ddpm.NoisePrediction(predict(x_RC, step, 1 - step / (ddpm.NUM_TIMESTEPS - 1)))

    if sampling.method == "ddim":
        return ddpm.ddim_sample(noise_in, noise_KRC[0], alphas_cumprod_S, count)
    return ddpm.ancestral_sample(noise_in, noise_KRC[0], alphas_cumprod_S, count, noise_KRC[1:], sampling.temperature)


@lru_cache(maxsize=1)
def cosine_alphas_cumprod() -> Tensor:
    """The cosine schedule, (1000,) float64 on the host: fraction of a token's variance left, from 1 to 2e-9."""
    ends = torch.arange(1, ddpm.NUM_TIMESTEPS + 1, dtype=torch.float64, device="cpu") / ddpm.NUM_TIMESTEPS
    alphas_cumprod_S = (math.pi / 2 * (ends + COSINE_OFFSET) / (1 + COSINE_OFFSET)).cos() ** 2
    alphas_cumprod_S = alphas_cumprod_S / math.cos(math.pi / 2 * COSINE_OFFSET / (1 + COSINE_OFFSET)) ** 2
    alphas_cumprod_S[-1] = 0.001 * alphas_cumprod_S[-2]  # a step leaves at least a thousandth [P]
    return alphas_cumprod_S
