"""Probes of frozen features: k nearest neighbours and linear probe.

    data = ProbeData(held_out=FeatureBank(...), training=lambda: bank_of(training_images), device=device)
    data.evaluate(lambda train, held_out, num_classes: TaskResult(...))
    predicted = nearest_neighbours(train_Nd, train_N, test_Md, num_classes=1000, device=device)

kNN is DINO's: the 20 training images of highest cosine similarity vote, each with weight exp(similarity / 0.07).

The linear probe is DINOv2's, on features extracted once: SGD with momentum 0.9, no weight decay, cosine to zero, a
sweep over learning rates. The best rate on the held-out set is reported, as in published tables; `rows` hold the whole
sweep. Two differences: no augmentation, because features are extracted once; and features are standardised with the
training set's mean and deviation (a linear map itself), because the scale of a latent is arbitrary and the sweep
should not depend on it.

All rates are trained at once. With R rates, d features and K classes the weights are one (d, R K) matrix, so a step is
two matrix products for any number of rates:

    logits_BRK = x_Bd @ weights + bias;  weights -= lr_R * momentum(x_Bd.T @ (softmax(logits) - onehot) / B)

Weights start at zero and the order of the samples comes from a fixed seed: the same features give the same metrics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from engine.distributed import on_first_rank
from evaluation.feature_bank import FeatureBank, LabelledFeatures
from evaluation.plots import draw_lr_sweep
from evaluation.results import MetricValue, TaskResult
from evaluation.tokenizer_source import TokenizerOutputs


class ProbeData:
    """Training and held-out features, shared by all probes; the first rank trains and tests for all.

    `held_out` is filled by the tasks during the held-out pass. `training` extracts the training features: it is called
    once, when the first probe needs them.
    """

    def __init__(self, held_out: FeatureBank, training: Callable[[], FeatureBank], device: torch.device) -> None:
        self.held_out, self._training, self.device = held_out, training, device

    def evaluate(self, work: Callable[[LabelledFeatures, LabelledFeatures, int], TaskResult]) -> TaskResult:
        """Run `work`(training features, held-out features, number of classes) on the first rank; return it on all."""
        train, held_out = self._features
        return on_first_rank(lambda: work(train, held_out, _count_classes(train, held_out)))  # type: ignore[arg-type]

    @staticmethod
    def counts(train: LabelledFeatures, held_out: LabelledFeatures, num_classes: int) -> dict[str, MetricValue]:
        """Return the sizes of both corpora, the number of classes and chance accuracy, as metrics."""
        return {
            "chance": 1 / num_classes,
            "classes": num_classes,
            "images": len(held_out.labels_N),
            "train_images": len(train.labels_N),
        }

    @cached_property
    def _features(self) -> tuple[LabelledFeatures | None, LabelledFeatures | None]:
        held_out = self.held_out.gather("held-out")  # first: an error about its labels shows before the longer pass
        return self._training().gather("training"), held_out


def _count_classes(train: LabelledFeatures | None, held_out: LabelledFeatures | None) -> int:
    assert train is not None
    assert held_out is not None
    num_classes = int(train.labels_N.max()) + 1
    if (unseen := held_out.labels_N[~torch.isin(held_out.labels_N, train.labels_N)]).numel():
        raise UserError(
            f"held-out label {int(unseen[0])} occurs in no training sample ({num_classes - 1} is the highest there): "
            "both corpora must have the same classes; correct --data or --train-data, or raise --limit"
        )
    return num_classes


NUM_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
_QUERY_ROWS, _KEY_ROWS = 256, 65_536  # of one block of similarities: 64 MB


class NearestNeighbours:
    """kNN top-1 accuracy for each kind of feature."""

    def __init__(self, data: ProbeData) -> None:
        self._data = data

    def add(self, batch: TokenizerOutputs) -> None:
        """Keeps the labelled rows. Raises UserError for a label that is no class."""
        self._data.held_out.add(batch)

    def result(self) -> TaskResult:
        """Return accuracies. Raises UserError if a held-out label does not occur in training."""
        return self._data.evaluate(self._vote)

    def _vote(self, train: LabelledFeatures, held_out: LabelledFeatures, num_classes: int) -> TaskResult:
        metrics: dict[str, MetricValue] = {}
        for name, x_Nd in train.sets.items():
            predicted_M = nearest_neighbours(x_Nd, train.labels_N, held_out.sets[name], num_classes, self._data.device)
            metrics[f"{name}_top1"] = float((predicted_M == held_out.labels_N).float().mean())
        k = min(NUM_NEIGHBOURS, len(train.labels_N))
        return TaskResult(
            metrics | {"k": k, "temperature": KNN_TEMPERATURE} | self._data.counts(train, held_out, num_classes)
        )


def nearest_neighbours(
    train_Nd: Tensor, train_N: Tensor, test_Md: Tensor, num_classes: int, device: torch.device
) -> Tensor:
    """Predict (M,) classes, on the CPU; k is 20, or the number of training rows if there are fewer."""
    k, predicted = min(NUM_NEIGHBOURS, len(train_Nd)), []
    for query_Bd in test_Md.split(_QUERY_ROWS):
        similarity_Bk, labels_Bk = _top_similarities(F.normalize(query_Bd.to(device), dim=1), train_Nd, train_N, k)
        votes_BK = torch.zeros(len(query_Bd), num_classes, device=device)
        votes_BK.scatter_add_(1, labels_Bk, (similarity_Bk / KNN_TEMPERATURE).exp())
        predicted.append(votes_BK.argmax(dim=1).cpu())
    return torch.cat(predicted)


def _top_similarities(query_Bd: Tensor, train_Nd: Tensor, train_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the (B, k) highest similarities and their labels, keeping the best k over chunks of the training rows."""
    best = query_Bd.new_empty(len(query_Bd), 0)
    labels = torch.empty_like(best, dtype=torch.int64)
    for key_Cd, key_C in zip(train_Nd.split(_KEY_ROWS), train_N.split(_KEY_ROWS), strict=True):
        similarity_BC = query_Bd @ F.normalize(key_Cd.to(query_Bd.device), dim=1).T
        candidates = torch.cat([best, similarity_BC], dim=1)
        of_key = torch.cat([labels, key_C.to(query_Bd.device).expand(len(query_Bd), -1)], dim=1)
        best, where = candidates.topk(min(k, candidates.shape[1]), dim=1)
        labels = of_key.gather(1, where)
    return best, labels


LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
BATCH, EPOCHS, MIN_STEPS = 256, 10, 1_000
MOMENTUM = 0.9
EPS = 1e-6  # least standard deviation: a constant feature stays zero
# Probabilities below this are set to 0. A confident head's softmax is full of denormal float32 numbers, a product with
# one of which takes Intel cores a hundred cycles: steps on 640 features took seven times as long.
TINY = 1e-30


@dataclass(frozen=True)
class ProbeSchedule:
    """Length of the probe's training: `epochs`, but at least `min_steps` on a small corpus."""

    batch: int = BATCH
    epochs: int = EPOCHS
    min_steps: int = MIN_STEPS

    def steps(self, samples: int) -> int:
        """Return the number of optimizer steps on a corpus of this many samples."""
        return max(self.min_steps, self.epochs * math.ceil(samples / self.batch))


class LinearProbe:
    """Linear-probe top-1 accuracy at the best learning rate, for each kind of feature."""

    def __init__(self, data: ProbeData, schedule: ProbeSchedule | None = None) -> None:
        self._data, self._schedule = data, schedule or ProbeSchedule()

    def add(self, batch: TokenizerOutputs) -> None:
        """Keeps the labelled rows. Raises UserError for a label that is no class."""
        self._data.held_out.add(batch)

    def result(self) -> TaskResult:
        """Return accuracies and the sweep. Raises UserError if a held-out label does not occur in training."""
        return self._data.evaluate(self._sweep)

    def _sweep(self, train: LabelledFeatures, held_out: LabelledFeatures, num_classes: int) -> TaskResult:
        metrics: dict[str, MetricValue] = {}
        rows: list[dict[str, MetricValue]] = []
        for name, x_Nd in train.sets.items():
            top1_R = train_and_test(
                x_Nd, train.labels_N, held_out.sets[name], held_out.labels_N, num_classes, LEARNING_RATES,
                self._schedule, self._data.device,
            )  # fmt: skip
            best = max(range(len(LEARNING_RATES)), key=top1_R.__getitem__)
            metrics |= {
                f"{name}_top1": top1_R[best],
                f"{name}_lr": LEARNING_RATES[best],
                f"{name}_width": x_Nd.shape[1],
            }
            rows += [
                {"features": name, "lr": lr, "top1": top1} for lr, top1 in zip(LEARNING_RATES, top1_R, strict=True)
            ]
        counts = self._data.counts(train, held_out, num_classes)
        metrics |= counts | {"steps": self._schedule.steps(len(train.labels_N))}
        return TaskResult(metrics, rows, {"linear_probe_lr": partial(draw_lr_sweep, rows, 1 / num_classes)})


def train_and_test(
    train_Nd: Tensor, train_N: Tensor, test_Md: Tensor, test_M: Tensor, num_classes: int, lrs: Sequence[float],
    schedule: ProbeSchedule, device: torch.device,
) -> list[float]:  # fmt: skip
    """Train a head for each learning rate and return its accuracy on the test features, a fraction each."""
    mean_d, deviation_d = column_statistics(train_Nd, device)
    weights_dRK, bias_RK = train_heads(train_Nd, train_N, mean_d, deviation_d, num_classes, lrs, schedule, device)
    num_right_R = torch.zeros(len(lrs), dtype=torch.int64, device=device)
    for x_Bd, labels_B in zip(test_Md.split(BATCH), test_M.split(BATCH), strict=True):
        x_Bd = (x_Bd.to(device) - mean_d) / deviation_d
        logits_BRK = (x_Bd @ weights_dRK.flatten(1)).view(-1, *bias_RK.shape) + bias_RK
        num_right_R += (logits_BRK.argmax(dim=2) == labels_B.to(device).unsqueeze(1)).sum(dim=0)
    return [int(num_right) / len(test_M) for num_right in num_right_R]


def train_heads(
    x_Nd: Tensor, labels_N: Tensor, mean_d: Tensor, deviation_d: Tensor, num_classes: int, lrs: Sequence[float],
    schedule: ProbeSchedule, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train R heads that differ only in learning rate, on standardised features: (d, R, K) weights, (R, K) biases."""
    num_rates, steps = len(lrs), schedule.steps(len(x_Nd))
    weights_dRK = torch.zeros(x_Nd.shape[1], num_rates, num_classes, device=device)
    bias_RK = torch.zeros(num_rates, num_classes, device=device)
    velocities = [torch.zeros_like(weights_dRK), torch.zeros_like(bias_RK)]
    lr_R1 = torch.tensor(lrs, device=device).unsqueeze(1)
    batches = _batches(len(x_Nd), schedule.batch, steps)
    for step, idx_B in enumerate(batches):
        x_Bd = (x_Nd[idx_B].to(device) - mean_d) / deviation_d
        probs_BRK = (x_Bd @ weights_dRK.flatten(1)).view(-1, num_rates, num_classes).add_(bias_RK).softmax(dim=2)
        error_BRK = F.hardshrink(probs_BRK, TINY)
        error_BRK[torch.arange(len(idx_B), device=device), :, labels_N[idx_B].to(device)] -= 1
        error_BRK /= len(idx_B)
        gradients = (x_Bd.T @ error_BRK.flatten(1)).view_as(weights_dRK), error_BRK.sum(dim=0)
        rate_R1 = lr_R1 * (0.5 * (1 + math.cos(math.pi * step / steps)))
        for parameter, velocity, gradient in zip((weights_dRK, bias_RK), velocities, gradients, strict=True):
            parameter -= rate_R1 * velocity.mul_(MOMENTUM).add_(gradient)
    return weights_dRK, bias_RK


def column_statistics(x_Nd: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each column, float32 on `device`; in chunks, summed in float64."""
    sum_d = torch.zeros(x_Nd.shape[1], dtype=torch.float64)
    square_d = torch.zeros_like(sum_d)
    for x_Bd in x_Nd.split(8192):
        sum_d += x_Bd.double().sum(dim=0)
        square_d += x_Bd.double().square().sum(dim=0)
    mean_d = sum_d / len(x_Nd)
    variance_d = (square_d / len(x_Nd) - mean_d.square()).clamp_min(0)
    return mean_d.float().to(device), variance_d.sqrt().clamp_min(EPS).float().to(device)


def _batches(samples: int, batch: int, steps: int) -> Iterator[Tensor]:
    """Yield the indices of `steps` batches; every epoch visits each sample once, in a new random order."""
    generator = torch.Generator().manual_seed(0)
    epochs = (torch.randperm(samples, generator=generator).split(batch) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)
