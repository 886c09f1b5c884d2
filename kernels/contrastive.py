"""Contrastive losses in tiles: every image against every caption, and never a matrix of all scores.

The plain formula holds B x A scores, their softmax and its gradient: 4 GiB each at 32,768 pairs. Here a tile of scores
is one matrix product that is used up while it is in cache: the softmax keeps a running maximum and sum for each row and
column (online log-sum-exp), the backward pass makes each tile a second time. Memory is linear in B and A; of the six
products that the plain softmax loss takes, four are left, because one score serves both directions.

    loss, accuracy = softmax_contrast(image_BE, text_BE, scale)        # both (B, E), L2-normalised; scale (1,)
    loss, accuracy = sigmoid_contrast(image_BE, text_BE, scale, bias)
    loss.backward()

Letters: B own rows, A rows of all ranks, E width of the joint space, R x C a tile. The products and what happens to a
tile between them are methods of TorchTiles (kernels/contrastive_tiles.py) or of TritonTiles
(kernels/contrastive_triton.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.contrastive_tiles import Online, Sums, Tiles, TorchTiles, pairs

Merge = Callable[[Tensor, Tensor], Sums]
BACKENDS = ("torch", "triton")


def softmax_contrast(
    image_BE: Tensor,
    text_AE: Tensor,
    scale: Tensor,
    first: int = 0,
    merge: Merge = lambda best_A, total_A: (best_A, total_A),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """InfoNCE, both directions averaged, as a scalar; and the share of images whose own caption scores highest.

    Image i's caption is row first + i of `text_AE`. On several ranks A = all rows, and `merge` turns each caption's
    largest score and sum of exponentials over this rank's images into those over all ranks' images; the gradient is
    then what the losses of all ranks together say about this rank's scores, undivided. `backend`: torch, triton, or
    auto (triton on CUDA, else torch). Oracle: softmax_reference.
    """
    loss, accuracy = _Softmax.apply(image_BE, text_AE, scale, first, merge, tiles_of(backend, image_BE.device))
    return loss, accuracy


def sigmoid_contrast(
    image_BE: Tensor, text_AE: Tensor, scale: Tensor, bias: Tensor, first: int = 0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss of the own images against all captions, divided by B, as a scalar; and the accuracy as above.

    A tile's gradient needs no other tile, so it is taken in the forward pass, where the tile is. Oracle:
    sigmoid_reference.
    """
    loss, accuracy = _Sigmoid.apply(image_BE, text_AE, scale, bias, first, tiles_of(backend, image_BE.device))
    return loss, accuracy


def softmax_reference(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle of softmax_contrast on one rank: the formula with its whole matrix, as one would write it."""
    image_logits_BB, text_logits_BB = scale * image_BE @ text_BE.T, scale * text_BE @ image_BE.T
    answer_B = torch.arange(len(image_BE), device=image_BE.device)
    loss = (F.cross_entropy(image_logits_BB, answer_B) + F.cross_entropy(text_logits_BB, answer_B)) / 2
    return loss, (image_logits_BB.detach().argmax(dim=1) == answer_B).float().mean()


def sigmoid_reference(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle of sigmoid_contrast on one rank."""
    logits_BB = scale * image_BE @ text_BE.T + bias
    answer_B = torch.arange(len(image_BE), device=image_BE.device)
    sign_BB = torch.full_like(logits_BB, -1.0).scatter_(1, answer_B[:, None], 1.0)
    loss = -F.logsigmoid(sign_BB * logits_BB).sum() / len(image_BE)
    return loss, (logits_BB.detach().argmax(dim=1) == answer_B).float().mean()


def tiles_of(backend: str, device: torch.device) -> Tiles:
    """What works on the tiles. Raises ValueError for a name that is no backend, ImportError without Triton."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"contrastive backend {backend!r} is not known; choose auto, {' or '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return TorchTiles()
    tiles: Tiles = import_module("kernels.contrastive_triton").TritonTiles()
    return tiles


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BE: Tensor, text_AE: Tensor, scale: Tensor, first: int, merge: Merge, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        num_rows = len(image_BE)
        rows, columns = Online.start(num_rows, image_BE), Online.start(len(text_AE), image_BE)
        own_B = torch.empty_like(rows.best)
        for row, column, tile_RC in _Products(tiles, scale * image_BE, text_AE):
            diagonal = row.start + first - column.start
            pair_scores = pairs(tile_RC, diagonal)
            own_B[row][max(0, -diagonal) :][: len(pair_scores)] = pair_scores
            tiles.follow(tile_RC, rows[row], columns[column], column.start)
        best_A, total_A = merge(columns.best, columns.total)
        own = slice(first, first + num_rows)
        to_text_B, to_image_B = rows.total.log() + (rows.best - own_B), total_A[own].log() + (best_A[own] - own_B)
        ctx.save_for_backward(image_BE, text_AE, scale, rows.best, rows.total, best_A, total_A)
        ctx.first, ctx.tiles = first, tiles
        return (to_text_B + to_image_B).sum() / (2 * num_rows), _accuracy(ctx, rows, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image_BE, text_AE, scale, best_B, total_B, best_A, total_A = ctx.saved_tensors
        products, sums = _Products(ctx.tiles, scale * image_BE, text_AE), _Gradients.zeros(image_BE, text_AE)
        for row, column, tile_RC in products:
            diagonal = row.start + ctx.first - column.start
            row_sums, column_sums = (best_B[row], total_B[row]), (best_A[column], total_A[column])
            gradient = ctx.tiles.softmax_gradient(tile_RC, row_sums, column_sums, diagonal)
            products.add(sums, row, column, gradient)
        return *sums.of_inputs(image_BE, scale, grad / (2 * len(image_BE))), None, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image_BE: Tensor, text_AE: Tensor, scale: Tensor, bias: Tensor, first: int, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        num_rows, wants_grad = len(image_BE), any(ctx.needs_input_grad)
        rows, sums = Online.start(num_rows, image_BE), _Gradients.zeros(image_BE, text_AE)
        products = _Products(tiles, scale * image_BE, text_AE)
        loss, bias_grad = torch.zeros_like(bias), torch.zeros_like(bias)
        for row, column, tile_RC in products:
            tile_RC.add_(bias)
            tiles.follow_best(tile_RC, rows[row], column.start)
            gradient, tile_loss, tile_bias_grad = tiles.sigmoid_gradient(tile_RC, row.start + first - column.start)
            loss += tile_loss
            if wants_grad:
                bias_grad += tile_bias_grad
                products.add(sums, row, column, gradient)
        ctx.save_for_backward(*sums.of_inputs(image_BE, scale, 1 / num_rows), bias_grad / num_rows)
        return loss.squeeze(0) / num_rows, _accuracy(ctx, rows, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * of_input for of_input in ctx.saved_tensors), None, None


@dataclass(frozen=True)
class _Gradients:
    """Sums over tiles of d loss / d score times what the score was a product of."""

    scaled_BE: Tensor
    text_AE: Tensor

    @classmethod
    def zeros(cls, image_BE: Tensor, text_AE: Tensor) -> _Gradients:
        return cls(torch.zeros_like(image_BE), torch.zeros_like(text_AE))

    def of_inputs(self, image_BE: Tensor, scale: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Those of image_BE, text_AE and scale, times `factor`."""
        scale_grad = (self.scaled_BE * image_BE).sum().view(1) * factor
        return self.scaled_BE * (scale * factor), self.text_AE * factor, scale_grad


class _Products:
    """Every tile of scaled_BE @ text_AE.T with its rows and columns; one buffer holds one tile after the other."""

    def __init__(self, tiles: Tiles, scaled_BE: Tensor, text_AE: Tensor) -> None:
        self._tiles, (self._scaled_BX, self._text_AX) = tiles, tiles.factors(scaled_BE, text_AE)
        self._shape = num_rows, num_columns = tiles.shape(len(scaled_BE))
        self._buffer = text_AE.new_empty(min(num_rows, len(scaled_BE)) * min(num_columns, len(text_AE)))

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        num_rows, num_columns = self._shape
        for row in _spans(len(self._scaled_BX), num_rows):
            for column in _spans(len(self._text_AX), num_columns):
                left_RX, right_CX = self._scaled_BX[row], self._text_AX[column]
                tile_RC = self._buffer[: len(left_RX) * len(right_CX)].view(len(left_RX), len(right_CX))
                yield row, column, self._tiles.scores(left_RX, right_CX, tile_RC)

    def add(self, sums: _Gradients, row: slice, column: slice, gradient: Tensor) -> None:
        """Adds a tile's part to the gradients of its rows and columns."""
        left_RX, right_CX = self._scaled_BX[row], self._text_AX[column]
        self._tiles.add_gradients(gradient, left_RX, right_CX, sums.scaled_BE[row], sums.text_AE[column])


def _spans(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _accuracy(ctx: Any, rows: Online, first: int) -> Tensor:
    answer_B = torch.arange(len(rows.idx), device=rows.idx.device) + first
    accuracy = (rows.idx == answer_B).float().mean()
    ctx.mark_non_differentiable(accuracy)
    return accuracy
