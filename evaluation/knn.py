"""k nearest neighbours: what the features say of the classes with nothing learned at all.

DINO's rule: the 20 training images of highest cosine similarity vote, each with weight exp(similarity / 0.07).

    predicted = nearest_neighbours(train_Nd, train_N, test_Md, num_classes=1000, device=device)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.bank import Features
from evaluation.learners import Corpora
from evaluation.outcome import Figure, Outcome
from evaluation.products import Products

K, TEMPERATURE = 20, 0.07
_QUERIES, _KEYS = 256, 65_536  # similarities looked at together: 64 MB


class NearestNeighbours:
    """Top-1 for each kind of feature."""

    def __init__(self, corpora: Corpora) -> None:
        self._corpora = corpora

    def add(self, batch: Products) -> None:
        """Keeps the labelled rows. Raises UserError for a label that is no class."""
        self._corpora.held_out.add(batch)

    def result(self) -> Outcome:
        """Figures for each kind of feature. Raises UserError where a label was never seen in training."""
        return self._corpora.learn(self._vote)

    def _vote(self, train: Features, held_out: Features, num_classes: int) -> Outcome:
        figures: dict[str, Figure] = {}
        for name, x_Nd in train.sets.items():
            predicted_M = nearest_neighbours(
                x_Nd, train.labels_N, held_out.sets[name], num_classes, self._corpora.device
            )
            figures[f"{name}_top1"] = float((predicted_M == held_out.labels_N).float().mean())
        k = min(K, len(train.labels_N))
        return Outcome(
            figures | {"k": k, "temperature": TEMPERATURE} | self._corpora.counts(train, held_out, num_classes)
        )


def nearest_neighbours(
    train_Nd: Tensor, train_N: Tensor, test_Md: Tensor, num_classes: int, device: torch.device
) -> Tensor:
    """(M,) predicted classes on the CPU; k is 20, or the number of training rows where there are fewer."""
    k, predicted = min(K, len(train_Nd)), []
    for query_Bd in test_Md.split(_QUERIES):
        similarity_Bk, labels_Bk = _nearest(F.normalize(query_Bd.to(device), dim=1), train_Nd, train_N, k)
        votes_BK = torch.zeros(len(query_Bd), num_classes, device=device)
        votes_BK.scatter_add_(1, labels_Bk, (similarity_Bk / TEMPERATURE).exp())
        predicted.append(votes_BK.argmax(dim=1).cpu())
    return torch.cat(predicted)


def _nearest(query_Bd: Tensor, train_Nd: Tensor, train_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, k) highest similarities and their labels, keeping the best k of the chunks seen so far."""
    best = query_Bd.new_empty(len(query_Bd), 0)
    labels = torch.empty_like(best, dtype=torch.int64)
    for key_Cd, key_C in zip(train_Nd.split(_KEYS), train_N.split(_KEYS), strict=True):
        similarity_BC = query_Bd @ F.normalize(key_Cd.to(query_Bd.device), dim=1).T
        candidates = torch.cat([best, similarity_BC], dim=1)
        of_key = torch.cat([labels, key_C.to(query_Bd.device).expand(len(query_Bd), -1)], dim=1)
        best, where = candidates.topk(min(k, candidates.shape[1]), dim=1)
        labels = of_key.gather(1, where)
    return best, labels
