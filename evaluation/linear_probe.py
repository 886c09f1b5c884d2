"""Linear probe: how much of the classes a linear map reads off frozen features.

Recipe (DINOv2's, on features extracted once): SGD with momentum 0.9, no weight decay, cosine to zero, a sweep over
learning rates, the best one on the held-out set reported, as published tables do; `rows` hold the whole sweep. Two
differences: no augmentation, because features are extracted once, and features are standardised with the training
set's mean and deviation (a linear map itself), because the scale of a latent is arbitrary and the sweep should not
depend on it.

All rates are trained at once. With R rates, d features and K classes the weights are one (d, R K) matrix, so a step is
two matrix products, however many rates there are:

    logits_BRK = x_Bd @ weights + bias;  weights -= lr_R * momentum(x_Bd.T @ (softmax(logits) - onehot) / B)

Weights start at zero and the order of the samples comes from a fixed seed: the same features give the same figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.bank import Features
from evaluation.figures import lr_sweep
from evaluation.learners import Corpora
from evaluation.outcome import Figure, Outcome
from evaluation.products import Products

LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
BATCH, EPOCHS, LEAST_STEPS = 256, 10, 1_000
MOMENTUM = 0.9
EPS = 1e-6  # of a deviation: a feature that never changes stays zero
# A confident head's softmax is full of numbers below float32's smallest normal one, and a product with one of those
# takes Intel's cores a hundred cycles: steps on 640 features took seven times as long. So small a share moves nothing.
TINY = 1e-30


@dataclass(frozen=True)
class Schedule:
    """How long the probe learns: `epochs`, or `least_steps` where a small corpus would see fewer."""

    batch: int = BATCH
    epochs: int = EPOCHS
    least_steps: int = LEAST_STEPS

    def steps(self, samples: int) -> int:
        """Optimizer steps on a corpus of so many samples."""
        return max(self.least_steps, self.epochs * math.ceil(samples / self.batch))


class LinearProbe:
    """Top-1 of the best rate for each kind of feature; learns on the training split after the pass."""

    def __init__(self, corpora: Corpora, schedule: Schedule | None = None) -> None:
        self._corpora, self._schedule = corpora, schedule or Schedule()

    def add(self, batch: Products) -> None:
        """Keeps the labelled rows. Raises UserError for a label that is no class."""
        self._corpora.held_out.add(batch)

    def result(self) -> Outcome:
        """Figures for each kind of feature, and the sweep. Raises UserError for a label never seen in training."""
        return self._corpora.learn(self._sweep)

    def _sweep(self, train: Features, held_out: Features, num_classes: int) -> Outcome:
        figures: dict[str, Figure] = {}
        rows: list[dict[str, Figure]] = []
        for name, x_Nd in train.sets.items():
            top1_R = probe(
                x_Nd, train.labels_N, held_out.sets[name], held_out.labels_N, num_classes, LRS, self._schedule,
                self._corpora.device,
            )  # fmt: skip
            best = max(range(len(LRS)), key=top1_R.__getitem__)
            figures |= {f"{name}_top1": top1_R[best], f"{name}_lr": LRS[best], f"{name}_width": x_Nd.shape[1]}
            rows += [{"features": name, "lr": lr, "top1": top1} for lr, top1 in zip(LRS, top1_R, strict=True)]
        counts = self._corpora.counts(train, held_out, num_classes)
        figures |= counts | {"steps": self._schedule.steps(len(train.labels_N))}
        picture = partial(lr_sweep, rows, 1 / num_classes)
        return Outcome(figures, rows, {"linear_probe_lr": picture})


def probe(
    train_Nd: Tensor, train_N: Tensor, test_Md: Tensor, test_M: Tensor, num_classes: int, lrs: Sequence[float],
    schedule: Schedule, device: torch.device,
) -> list[float]:  # fmt: skip
    """Held-out top-1 for each rate, of heads trained on (features, labels) and tested on others; shares of one."""
    mean_d, deviation_d = statistics(train_Nd, device)
    weights_dRK, bias_RK = train_heads(train_Nd, train_N, mean_d, deviation_d, num_classes, lrs, schedule, device)
    right_R = torch.zeros(len(lrs), dtype=torch.int64, device=device)
    for x_Bd, labels_B in zip(test_Md.split(BATCH), test_M.split(BATCH), strict=True):
        x_Bd = (x_Bd.to(device) - mean_d) / deviation_d
        logits_BRK = (x_Bd @ weights_dRK.flatten(1)).view(-1, *bias_RK.shape) + bias_RK
        right_R += (logits_BRK.argmax(dim=2) == labels_B.to(device).unsqueeze(1)).sum(dim=0)
    return [int(right) / len(test_M) for right in right_R]


def train_heads(
    x_Nd: Tensor, labels_N: Tensor, mean_d: Tensor, deviation_d: Tensor, num_classes: int, lrs: Sequence[float],
    schedule: Schedule, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d, R, K) weights and (R, K) biases: R heads on standardised features, which differ in their rate alone."""
    num_rates, steps = len(lrs), schedule.steps(len(x_Nd))
    weights_dRK = torch.zeros(x_Nd.shape[1], num_rates, num_classes, device=device)
    bias_RK = torch.zeros(num_rates, num_classes, device=device)
    velocities = [torch.zeros_like(weights_dRK), torch.zeros_like(bias_RK)]
    lr_R1 = torch.tensor(lrs, device=device).unsqueeze(1)
    batches = _batches(len(x_Nd), schedule.batch, steps)
    for step, idx_B in enumerate(batches):
        x_Bd = (x_Nd[idx_B].to(device) - mean_d) / deviation_d
        share_BRK = (x_Bd @ weights_dRK.flatten(1)).view(-1, num_rates, num_classes).add_(bias_RK).softmax(dim=2)
        error_BRK = F.hardshrink(share_BRK, TINY)
        error_BRK[torch.arange(len(idx_B), device=device), :, labels_N[idx_B].to(device)] -= 1
        error_BRK /= len(idx_B)
        gradients = (x_Bd.T @ error_BRK.flatten(1)).view_as(weights_dRK), error_BRK.sum(dim=0)
        rate_R1 = lr_R1 * (0.5 * (1 + math.cos(math.pi * step / steps)))
        for parameter, velocity, gradient in zip((weights_dRK, bias_RK), velocities, gradients, strict=True):
            parameter -= rate_R1 * velocity.mul_(MOMENTUM).add_(gradient)
    return weights_dRK, bias_RK


def statistics(x_Nd: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each column, float32 on `device`; read in chunks, summed in float64."""
    sum_d = torch.zeros(x_Nd.shape[1], dtype=torch.float64)
    square_d = torch.zeros_like(sum_d)
    for x_Bd in x_Nd.split(8192):
        sum_d += x_Bd.double().sum(dim=0)
        square_d += x_Bd.double().square().sum(dim=0)
    mean_d = sum_d / len(x_Nd)
    variance_d = (square_d / len(x_Nd) - mean_d.square()).clamp_min(0)
    return mean_d.float().to(device), variance_d.sqrt().clamp_min(EPS).float().to(device)


def _batches(samples: int, batch: int, steps: int) -> Iterator[Tensor]:
    """Indices of `steps` batches: every sample once before any comes again, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    epochs = (torch.randperm(samples, generator=generator).split(batch) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)
