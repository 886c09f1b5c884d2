"""Diffusion generators (DiT, SiT, LightningDiT): the trained module, and the transformer inside.

    generator = DiffusionGenerator(section, LatentShape(64, 16, 16), num_classes=1000, backend="sdpa")
    draws = draw(generator.draw_counts, seed=0, step=7, positions=positions_B)
    generator(latents_BLhw, labels_B, draws)["total"].backward()
    generator.sample(labels_B, Sampling("heun", steps=25, guidance=2.0), draws)         # (B, 64, 16, 16)

Latents are normalised: each channel of zero mean and unit variance over the corpus.

    backbone = DiffusionBackbone(section, LatentShape(64, 16, 16), num_classes=1000, backend="sdpa")
    backbone(x_BLhw, time_B, labels_B)        # (B, 64, 16, 16) float32; zeros before the first step

Tokens of `patch` x `patch` latents -> Linear -> (fixed positions) -> blocks modulated by time and class -> modulated
norm -> Linear, zero at the start. With a learned variance the output has twice as many channels, the variance last. The
embedding is outside the blocks, so that the input of the first of them requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.generator import Diffusion
from model.generator import ddpm, flow_matching
from model.generator.blocks import ClassEmbedding, ModulatedBlock, TimeEmbedding, build_norm, modulate, sinusoids
from model.generator.ddpm import outputs_per_number
from model.generator.draws import DrawCounts, RandomDraws
from model.generator.sampling import Sampling
from model.generator.tokens import LatentShape, patchify, unpatchify
from model.rope import Rope

ROPE_BASE = 100.0  # coordinates normalised to [-1, 1], as the trunk's (model/rope.py) [D]
GuidedPredictor = Callable[[Tensor, Tensor, float], Tensor]  # (x, model time (B,), path time) -> prediction


class DiffusionGenerator(nn.Module):
    """A diffusion backbone and its objective. `draw_counts`: random numbers of one row in training."""

    def __init__(self, section: Diffusion, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.shape, self.num_classes = section, shape, num_classes
        self.draw_counts = DrawCounts(
            normals=shape.numel, uniforms=2
        )  # the noise; the time, and whether the class is dropped
        self.backbone = DiffusionBackbone(section, shape, num_classes, backend)

    def forward(self, latents_BLhw: Tensor, labels_B: Tensor, draws: RandomDraws) -> dict[str, Tensor]:
        """Loss of a batch: "total" and its named terms, float32 scalars, means over rows."""
        noise_BLhw = draws.normal_BN.view(latents_BLhw.shape)
        time_B, dropout_B = draws.uniform_BU.unbind(1)
        labels_B = torch.where(dropout_B < self.section.class_dropout, self.num_classes, labels_B)
        if self.section.objective == "noise":
            step_B = ddpm.sample_timesteps(time_B)
            x_BLhw = ddpm.add_noise(latents_BLhw, noise_BLhw, step_B, ddpm.linear_alphas_cumprod())
            return self._noise_terms(self.backbone(x_BLhw, step_B, labels_B), noise_BLhw, x_BLhw, latents_BLhw, step_B)
        time_B = flow_matching.sample_times(time_B, self.section.times)
        x_BLhw = flow_matching.interpolate(latents_BLhw, noise_BLhw, time_B)
        predicted_BLhw = self.backbone(x_BLhw, self.section.time_scale * time_B, labels_B)
        return flow_matching.velocity_terms(predicted_BLhw, latents_BLhw, noise_BLhw, self.section.direction)

    def _noise_terms(
        self, predicted_BXhw: Tensor, noise_BLhw: Tensor, x_BLhw: Tensor, latents_BLhw: Tensor, step_B: Tensor
    ) -> dict[str, Tensor]:
        """DDPM's loss, plus the variational bound where the variance is learned."""
        predicted_BLhw, *raw_variance = predicted_BXhw.split(self.shape.channels, dim=1)
        terms = {"noise": F.mse_loss(predicted_BLhw, noise_BLhw)}
        if not raw_variance:
            return {"total": terms["noise"], **terms}
        alphas_cumprod_S = ddpm.linear_alphas_cumprod()
        terms["bound"] = ddpm.variational_bound(
            raw_variance[0], predicted_BLhw, x_BLhw, latents_BLhw, step_B, alphas_cumprod_S
        )
        return {"total": terms["noise"] + terms["bound"], **terms}

    def resolve_sampling(self, sampling: Sampling) -> Sampling:
        """Fill in the defaults of this generator. Raises UserError for settings that do not fit it."""
        sampling = sampling.fitted(self.section.objective, "generator")
        if sampling.iterations is not None:
            raise UserError(
                f"iterations={sampling.iterations} for a diffusion generator: it draws all tokens at once; leave "
                "iterations out"
            )
        return sampling if sampling.method == "dopri5" else replace(sampling, steps=sampling.num_steps)

    def sampling_draw_counts(self, sampling: Sampling) -> DrawCounts:
        """Random numbers of one row in `sample`; raises UserError like it, before anything is drawn."""
        return DrawCounts(normals=self.resolve_sampling(sampling).num_latents * self.shape.numel, uniforms=0)

    @torch.no_grad()
    def sample(self, labels_B: Tensor, sampling: Sampling, draws: RandomDraws) -> Tensor:
        """Sample latents: (B,) int64 labels, num_classes for no class -> (B, L, h, w) float32, normalised.

        The same draws give the same latents. Raises UserError for a method of another objective.
        """
        return self.follow(labels_B, sampling, draws).end

    @torch.no_grad()
    def follow(self, labels_B: Tensor, sampling: Sampling, draws: RandomDraws) -> flow_matching.OdeSolution:
        """As `sample`, and count the evaluations of the model; a guided one counts once."""
        sampling = self.resolve_sampling(sampling)
        shape = (len(labels_B), self.shape.channels, self.shape.height, self.shape.width)
        noise_SBLhw = draws.normal_BN.unflatten(1, (-1, *shape[1:])).transpose(0, 1)
        predict = self._guided(labels_B, sampling)
        if self.section.objective == "noise":
            return self._denoised(predict, noise_SBLhw, sampling)

        def field(x_BLhw: Tensor, time: float) -> Tensor:
            return predict(x_BLhw, x_BLhw.new_full((len(x_BLhw),), self.section.time_scale * time), time)

        return flow_matching.integrate(field, noise_SBLhw, sampling)

    def _denoised(self, predict: GuidedPredictor, noise_SBLhw: Tensor, sampling: Sampling) -> flow_matching.OdeSolution:
        alphas_cumprod_S, count = ddpm.linear_alphas_cumprod(), sampling.num_steps

        def noise_in(x_BLhw: Tensor, step: int) -> ddpm.NoisePrediction:
            steps_B = torch.full((len(x_BLhw),), step, device=x_BLhw.device)
            predicted_BXhw = predict(x_BLhw, steps_B, 1 - step / (len(alphas_cumprod_S) - 1))
            noise_BLhw, *raw_variance = predicted_BXhw.split(self.shape.channels, dim=1)
            return ddpm.NoisePrediction(noise_BLhw, ddpm.variance_fraction(raw_variance[0]) if raw_variance else None)

        if sampling.method == "ddim":
            return flow_matching.OdeSolution(ddpm.ddim_sample(noise_in, noise_SBLhw[0], alphas_cumprod_S, count), count)
        added = noise_SBLhw[1:]
        return flow_matching.OdeSolution(
            ddpm.ancestral_sample(noise_in, noise_SBLhw[0], alphas_cumprod_S, count, added, sampling.temperature), count
        )

    def _guided(self, labels_B: Tensor, sampling: Sampling) -> GuidedPredictor:
        """Classifier-free guidance: without + guidance * (with - without the class), both in one pass.

        At times without guidance, the prediction with the class. A learned variance is always that with the class [C].
        """
        both_B = torch.cat((labels_B, torch.full_like(labels_B, self.num_classes)))

        def predict(x_BLhw: Tensor, model_time_B: Tensor, time: float) -> Tensor:
            if not sampling.guides(time):
                return self.backbone(x_BLhw, model_time_B, labels_B)
            twice = self.backbone(torch.cat((x_BLhw, x_BLhw)), torch.cat((model_time_B, model_time_B)), both_B)
            with_class, without = twice.chunk(2)
            guided = without + sampling.guidance * (with_class - without)
            channels = self.shape.channels
            return torch.cat((guided[:, :channels], with_class[:, channels:]), dim=1)

        return predict


class DiffusionBackbone(nn.Module):
    """Transformer: (noisy latents, time, class) -> prediction, and its variance where that is learned."""

    def __init__(self, section: Diffusion, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.grid = section, shape.grid(section.patch)
        numbers = shape.channels * section.patch**2
        self.embed = LatentEmbedding(numbers, section.width)
        self.time = TimeEmbedding(section.width)
        self.label = ClassEmbedding(num_classes, section.width)
        self.blocks = nn.ModuleList(ModulatedBlock(section, backend) for _ in range(section.depth))
        self.final = FinalLayer(section, numbers * outputs_per_number(section))

    def forward(self, x_BLhw: Tensor, time_B: Tensor, labels_B: Tensor) -> Tensor:
        """(B, L, h, w), (B,), (B,) int64 -> (B, L or 2L, h, w) float32."""
        x_TD, rope_2TE = self._tokens(x_BLhw)
        condition_BD = self.time(time_B, x_TD.dtype) + self.label(labels_B)
        for block in self.blocks:
            x_TD = block(x_TD, condition_BD, rope_2TE)
        count, channels, *sides = x_BLhw.shape
        shape = torch.Size((count, channels * outputs_per_number(self.section), *sides))
        return unpatchify(self.final(x_TD, condition_BD).float(), shape, self.section.patch)

    def _tokens(self, x_BLhw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, D) tokens, with fixed positions added, and the RoPE table, as generator.positions selects."""
        count, width, device = x_BLhw.shape[0], self.section.width, x_BLhw.device
        x_TD = self.embed(patchify(x_BLhw, self.section.patch))
        if self.section.positions != "rope":
            x_TD = x_TD + grid_sinusoids(self.grid, width, device).to(x_TD.dtype).repeat(count, 1)
        if self.section.positions == "sincos":
            return x_TD, None
        rope = Rope(width // self.section.heads, ROPE_BASE, torch.float32)
        return x_TD, rope.table(self.grid, device).repeat(1, count, 1)


class LatentEmbedding(nn.Module):
    """A linear layer over the numbers of a token."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, width)

    def forward(self, x_TF: Tensor) -> Tensor:
        """(T, numbers) float32 -> (T, width) in the model's dtype."""
        return self.linear(x_TF.to(self.linear.weight.dtype))


class FinalLayer(nn.Module):
    """Norm, shift and scale from the condition, linear layer to the outputs of a token."""

    def __init__(self, section: Diffusion, numbers: int) -> None:
        super().__init__()
        self.norm = build_norm(section)
        self.modulation = nn.Linear(section.width, 2 * section.width)
        self.linear = nn.Linear(section.width, numbers)

    def forward(self, x_TD: Tensor, condition_BD: Tensor) -> Tensor:
        """(T, D), (B, D) -> (T, numbers)."""
        shift_BD, scale_BD = self.modulation(F.silu(condition_BD)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x_TD), shift_BD, scale_BD))


def grid_sinusoids(grid: tuple[int, int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed sinusoidal positions (N, width) float32: half of the width for a token's row, half for its column."""
    down, across = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    position_N2 = torch.cartesian_prod(down, across)
    return sinusoids(position_N2, width // 2).flatten(1)
