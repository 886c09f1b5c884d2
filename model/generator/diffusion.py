"""The diffusion generator: what is trained on noisy latents, and sampled from noise.

    generator = DiffusionGenerator(section, LatentShape(64, 16, 16), num_classes=1000, backend="sdpa")
    draws = draw(generator.needs, seed=0, step=7, positions=positions_B)
    generator(latents_BLhw, labels_B, draws)["total"].backward()
    generator.sample(labels_B, Sampling("heun", steps=25, guidance=2.0), draws)         # (B, 64, 16, 16)

Latents are normalised: each channel of zero mean and unit variance over the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.generator import Diffusion
from model.generator import noising, ode, variance, velocity
from model.generator.backbone import Backbone
from model.generator.draws import Draws, Needs
from model.generator.sampling import Sampling
from model.generator.shape import LatentShape

Guided = Callable[[Tensor, Tensor, float], Tensor]  # (x, model time (B,), path time) -> prediction


class DiffusionGenerator(nn.Module):
    """A backbone and its objective. `needs` are the numbers one row takes in training."""

    def __init__(self, section: Diffusion, shape: LatentShape, num_classes: int, backend: str) -> None:
        super().__init__()
        self.section, self.shape, self.num_classes = section, shape, num_classes
        self.needs = Needs(normals=shape.numel, uniforms=2)  # the noise; the time, whether the class is hidden
        self.backbone = Backbone(section, shape, num_classes, backend)

    def forward(self, latents_BLhw: Tensor, labels_B: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The loss of a batch: "total" and its named terms, float32 scalars, means over rows."""
        noise_BLhw = draws.normal_BN.view(latents_BLhw.shape)
        time_B, hidden_B = draws.uniform_BU.unbind(1)
        labels_B = torch.where(hidden_B < self.section.class_dropout, self.num_classes, labels_B)
        if self.section.objective == "noise":
            step_B = noising.drawn_steps(time_B)
            x_BLhw = noising.noised(latents_BLhw, noise_BLhw, step_B, noising.linear_survival())
            return self._noise_terms(self.backbone(x_BLhw, step_B, labels_B), noise_BLhw, x_BLhw, latents_BLhw, step_B)
        time_B = velocity.drawn_times(time_B, self.section.times)
        x_BLhw = velocity.on_path(latents_BLhw, noise_BLhw, time_B)
        predicted_BLhw = self.backbone(x_BLhw, self.section.time_scale * time_B, labels_B)
        return velocity.velocity_terms(predicted_BLhw, latents_BLhw, noise_BLhw, self.section.direction)

    def _noise_terms(
        self, said_BXhw: Tensor, noise_BLhw: Tensor, x_BLhw: Tensor, latents_BLhw: Tensor, step_B: Tensor
    ) -> dict[str, Tensor]:
        """DDPM's loss; where the variance is learnt, with its bound."""
        predicted_BLhw, *of_variance = said_BXhw.split(self.shape.channels, dim=1)
        terms = {"noise": F.mse_loss(predicted_BLhw, noise_BLhw)}
        if not of_variance:
            return {"total": terms["noise"], **terms}
        survival_S = noising.linear_survival()
        terms["bound"] = variance.bound(of_variance[0], predicted_BLhw, x_BLhw, latents_BLhw, step_B, survival_S)
        return {"total": terms["noise"] + terms["bound"], **terms}

    def resolved(self, sampling: Sampling) -> Sampling:
        """`sampling` with what it leaves open as this generator takes it. Raises UserError for what cannot be."""
        sampling = sampling.fitted(self.section.objective, "generator")
        if sampling.iterations is not None:
            raise UserError(
                f"iterations={sampling.iterations} for a diffusion generator: it draws all tokens at once; leave "
                "iterations out"
            )
        return sampling if sampling.method == "dopri5" else replace(sampling, steps=sampling.num_steps)

    def sampling_needs(self, sampling: Sampling) -> Needs:
        """The numbers one row takes in `sample`; raises UserError as it does, before they are drawn."""
        return Needs(normals=self.resolved(sampling).num_latents * self.shape.numel, uniforms=0)

    @torch.no_grad()
    def sample(self, labels_B: Tensor, sampling: Sampling, draws: Draws) -> Tensor:
        """(B,) int64, num_classes for no class -> (B, L, h, w) float32, normalised.

        The same draws give the same latents. Raises UserError for a method of another objective.
        """
        return self.follow(labels_B, sampling, draws).end

    @torch.no_grad()
    def follow(self, labels_B: Tensor, sampling: Sampling, draws: Draws) -> ode.Path:
        """`sample`, with the number of times the model was asked; a guided question is one."""
        sampling = self.resolved(sampling)
        shape = (len(labels_B), self.shape.channels, self.shape.height, self.shape.width)
        noise_SBLhw = draws.normal_BN.unflatten(1, (-1, *shape[1:])).transpose(0, 1)
        predict = self._guided(labels_B, sampling)
        if self.section.objective == "noise":
            return self._denoised(predict, noise_SBLhw, sampling)

        def field(x_BLhw: Tensor, time: float) -> Tensor:
            return predict(x_BLhw, x_BLhw.new_full((len(x_BLhw),), self.section.time_scale * time), time)

        return velocity.followed(field, noise_SBLhw, sampling)

    def _denoised(self, predict: Guided, noise_SBLhw: Tensor, sampling: Sampling) -> ode.Path:
        survival_S, count = noising.linear_survival(), sampling.num_steps

        def noise_in(x_BLhw: Tensor, step: int) -> noising.Said:
            steps_B = torch.full((len(x_BLhw),), step, device=x_BLhw.device)
            said_BXhw = predict(x_BLhw, steps_B, 1 - step / (len(survival_S) - 1))
            noise_BLhw, *of_variance = said_BXhw.split(self.shape.channels, dim=1)
            return noising.Said(noise_BLhw, variance.share(of_variance[0]) if of_variance else None)

        if sampling.method == "ddim":
            return ode.Path(noising.ddim(noise_in, noise_SBLhw[0], survival_S, count), count)
        added = noise_SBLhw[1:]
        return ode.Path(
            noising.ancestral(noise_in, noise_SBLhw[0], survival_S, count, added, sampling.temperature), count
        )

    def _guided(self, labels_B: Tensor, sampling: Sampling) -> Guided:
        """Without + guidance * (with - without the class), both in one pass; where there is none, the class's alone.

        What is said of a variance is the class's in either case [C].
        """
        both_B = torch.cat((labels_B, torch.full_like(labels_B, self.num_classes)))

        def predict(x_BLhw: Tensor, model_time_B: Tensor, time: float) -> Tensor:
            if not sampling.guides(time):
                return self.backbone(x_BLhw, model_time_B, labels_B)
            twice = self.backbone(torch.cat((x_BLhw, x_BLhw)), torch.cat((model_time_B, model_time_B)), both_B)
            of_class, of_none = twice.chunk(2)
            guided = of_none + sampling.guidance * (of_class - of_none)
            channels = self.shape.channels
            return torch.cat((guided[:, :channels], of_class[:, channels:]), dim=1)

        return predict
