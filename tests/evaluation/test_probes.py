"""Linear probe and kNN against their definitions: torch.optim one rate at a time, scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from configs import UserError
from evaluation import feature_bank, probes
from evaluation.feature_bank import FeatureBank, LabelledFeatures
from evaluation.probes import (
    KNN_TEMPERATURE,
    LEARNING_RATES,
    LinearProbe,
    NearestNeighbours,
    ProbeData,
    ProbeSchedule,
    column_statistics,
    nearest_neighbours,
    train_and_test,
    train_heads,
)
from evaluation.tokenizer_source import TokenizerOutputs
from tests.evaluation.tiny_runs import untrained
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
CPU = torch.device("cpu")


def blobs(count: int, seed: int, classes: int = 6, width: int = 10, spread: float = 1.6) -> tuple[Tensor, Tensor]:
    """Gaussian clouds about one centre for each class, shifted and scaled as latents may be."""
    centres = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return 7 + 0.01 * (centres[labels] + spread * torch.randn(count, width, generator=generator)), labels


def one_rate_at_a_time(
    x: Tensor, labels: Tensor, classes: int, lr: float, schedule: ProbeSchedule
) -> tuple[Tensor, Tensor]:
    """The oracle: a linear layer, torch.optim.SGD, torch's cosine schedule."""
    head = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    steps = schedule.steps(len(x))
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator, done = torch.Generator().manual_seed(0), 0
    while done < steps:
        for idx in torch.randperm(len(x), generator=generator).split(schedule.batch)[: steps - done]:
            optimizer.zero_grad()
            F.cross_entropy(head(x[idx]), labels[idx]).backward()
            optimizer.step()
            cosine.step()
            done += 1
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("batch", [16, 50])  # 50 leaves a smaller last batch
def test_heads_trained_together_are_those_trained_one_by_one(batch: int) -> None:
    x, labels = blobs(120, seed=1)
    schedule, lrs = ProbeSchedule(batch, epochs=3, min_steps=11), (0.01, 0.1, 1.0)
    mean, deviation = column_statistics(x, CPU)
    weights, bias = train_heads(x, labels, mean, deviation, 6, lrs, schedule, CPU)
    for idx, lr in enumerate(lrs):
        expected = one_rate_at_a_time((x - mean) / deviation, labels, 6, lr, schedule)
        # Measured: 7e-7 at most on weights up to 3.9; a schedule off by one step changes them by more than 1e-3.
        torch.testing.assert_close(weights[:, idx].T, expected[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(bias[idx], expected[1], rtol=0, atol=5e-6)


def test_the_best_rate_reaches_what_logistic_regression_reaches() -> None:
    x, labels = blobs(600, seed=1)
    test_x, test_labels = blobs(400, seed=2)
    top1 = train_and_test(
        x, labels, test_x, test_labels, 6, LEARNING_RATES, ProbeSchedule(batch=64, epochs=5, min_steps=300), CPU
    )
    mean, deviation = column_statistics(x, CPU)
    reference = LogisticRegression(max_iter=1000).fit(((x - mean) / deviation).numpy(), labels.numpy())
    expected = reference.score(((test_x - mean) / deviation).numpy(), test_labels.numpy())
    assert 0.6 < expected < 0.99  # neither hopeless nor trivial
    assert max(top1) == pytest.approx(expected, abs=0.02)


def test_statistics_are_those_of_float64_and_constant_columns_harmless() -> None:
    x = torch.cat([1000 + torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)), torch.ones(20_000, 1)], 1)
    mean, deviation = column_statistics(x, CPU)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(deviation[:3], x[:, :3].double().std(0, correction=0), rtol=1e-4)
    assert deviation[3] > 0


@pytest.mark.parametrize("keys", [65_536, 70])  # all training rows at once, and in chunks
def test_neighbours_vote_as_scikit_learns_do(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_KEY_ROWS", keys)
    (x, labels), (test_x, _) = blobs(300, seed=3), blobs(280, seed=4)
    x, test_x = x - 7, test_x - 7
    predicted = nearest_neighbours(x, labels, test_x, 6, CPU)
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda far: np.exp((1 - far) / KNN_TEMPERATURE))
    expected = reference.fit(x.numpy(), labels.numpy()).predict(test_x.numpy())
    assert (predicted.numpy() == expected).all()


def test_nearer_neighbours_weigh_more_by_the_published_temperature() -> None:
    """One at cosine 1 weighs exp(0.1 / 0.07) = 4.2 at cosine 0.9: less than five of them, more than four."""
    far = torch.tensor([0.9, math.sqrt(1 - 0.81)])
    for others, expected in ((4, 0), (5, 1)):
        x = torch.stack([torch.tensor([3.0, 0.0]), *[far] * others])
        labels = torch.tensor([0, *[1] * others])
        assert nearest_neighbours(x, labels, torch.tensor([[2.0, 0.0]]), 2, CPU).tolist() == [expected]


def test_fewer_training_rows_than_neighbours_all_vote() -> None:
    x, labels = torch.eye(4)[:3], torch.tensor([0, 1, 1])
    assert nearest_neighbours(x, labels, x, 2, CPU).tolist() == [0, 1, 1]


def products(labels: list[int], positions: list[int] | None = None) -> TokenizerOutputs:
    generator = torch.Generator().manual_seed(len(labels))
    where = torch.tensor(positions if positions is not None else range(len(labels)))
    return TokenizerOutputs(
        TOKENIZER, torch.rand(len(labels), 3, 32, 32, generator=generator), torch.tensor(labels), where
    )


TOKENIZER = untrained(tiny_config())


def test_products_of_one_pass_are_those_of_the_tokenizers_own_methods() -> None:
    batch = products([0, 1, 2])
    # The same products of the same numbers: equal bit for bit here; another order of sums would give 1e-6.
    torch.testing.assert_close(batch.latent, TOKENIZER.encode(batch.images), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.embedding, TOKENIZER.embed_images(batch.images), rtol=0, atol=1e-5)
    assert batch.recon.equal(TOKENIZER.decode(batch.latent))
    x_TD, layout = TOKENIZER.features(batch.images)
    blocks = batch.features["blocks"]
    assert blocks.shape == (3, 2 * 32 + 32)  # CLS of both blocks, mean patch of the last
    torch.testing.assert_close(blocks[:, 32:64], layout.cls(x_TD, "clip"), rtol=0, atol=1e-5)
    torch.testing.assert_close(blocks[:, 64:], layout.patches(x_TD, "clip").mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.features["latent"], batch.latent.mean((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit_bytes", [0, 1 << 30])  # mapped from a file, in memory
def test_a_bank_keeps_labelled_rows_once(limit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_bank, "MEMORY_BYTES", limit_bytes)
    kept, first, second = FeatureBank(5, tmp_path), products([3, -1, 0]), products([1, 1], [3, 4])
    for batch in (first, first, second):  # two tasks add the first
        kept.add(batch)
    features = kept.gather("held-out")
    assert features is not None
    assert features.labels_N.tolist() == [3, 0, 1, 1]
    assert {name: x.shape for name, x in features.sets.items()} == {
        "latent": (4, 8), "last_1_block": (4, 64), "last_2_blocks": (4, 96),
    }  # fmt: skip
    assert features.sets["last_1_block"][:2].equal(first.features["blocks"][[0, 2], 32:])
    assert features.sets["latent"][2:].equal(second.features["latent"])
    assert list(tmp_path.iterdir()) == []


def corpora(train: list[int], held_out: list[int]) -> ProbeData:
    learned, asked = FeatureBank(len(train), Path()), FeatureBank(len(held_out), Path())
    learned.add(products(train))
    asked.add(products(held_out))
    return ProbeData(asked, lambda: learned, CPU)


def test_both_tasks_report_every_kind_of_feature_and_the_sweep(tmp_path: Path) -> None:
    both = corpora([0, 1, 2, 0, 1], [0, 1, 2])
    outcome = LinearProbe(both, ProbeSchedule(batch=2, epochs=1, min_steps=5)).result()
    for name, width in (("latent", 8), ("last_1_block", 64), ("last_2_blocks", 96)):
        swept = [row["top1"] for row in outcome.rows if row["features"] == name]
        assert len(swept) == len(LEARNING_RATES)
        assert outcome.metrics[f"{name}_top1"] == max(swept)  # type: ignore[type-var]
        assert outcome.metrics[f"{name}_width"] == width
    assert (outcome.metrics["train_images"], outcome.metrics["images"], outcome.metrics["steps"]) == (5, 3, 5)
    assert outcome.metrics["chance"] == pytest.approx(1 / 3)
    outcome.plots["linear_probe_lr"](tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    neighbours = NearestNeighbours(both).result().metrics
    assert {"latent_top1", "last_1_block_top1", "last_2_blocks_top1", "k"} <= set(neighbours)
    assert neighbours["k"] == 5


def test_wrong_labels_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out label 4 occurs in no training sample"):
        NearestNeighbours(corpora([0, 1, 2], [0, 4])).result()
    with pytest.raises(UserError, match="no training sample has a label"):
        NearestNeighbours(corpora([-1, -1], [0, 4])).result()
    with pytest.raises(UserError, match="no held-out sample has a label"):
        LinearProbe(corpora([0, 1], [-1, -1])).result()
    with pytest.raises(UserError, match="label -7"):
        FeatureBank(2, tmp_path).add(products([0, -7]))


def test_a_tokenizer_without_a_part_says_which(tmp_path: Path) -> None:
    state = {name: x for name, x in TOKENIZER.state_dict().items() if not name.startswith(("clip.", "bottleneck."))}
    bare = type(TOKENIZER).from_state(TOKENIZER.model, state)
    batch = TokenizerOutputs(bare, torch.rand(1, 3, 32, 32), torch.tensor([0]), torch.tensor([0]))
    assert set(batch.features) == {"blocks"}
    for name in ("latent", "embedding"):
        with pytest.raises(UserError, match="these weights hold no"):
            getattr(batch, name)


def test_features_of_a_trunk_without_a_bottleneck_have_no_latent() -> None:
    assert list(LabelledFeatures(torch.zeros(2, 96), torch.zeros(2), {"blocks": 96}, 32).sets) == [
        "last_1_block",
        "last_2_blocks",
    ]
