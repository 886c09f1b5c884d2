"""The tiled contrastive losses against the formulas with a whole matrix, whatever the tiles are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.contrastive import (
    TorchTiles,
    resolve_tiles,
    sigmoid_contrast,
    sigmoid_reference,
    softmax_contrast,
    softmax_reference,
)
from profiling.instruments.memory import peak_bytes

Loss = Callable[..., tuple[Tensor, Tensor]]
KINDS: dict[str, tuple[Loss, Loss]] = {
    "softmax": (softmax_contrast, softmax_reference),
    "sigmoid": (sigmoid_contrast, sigmoid_reference),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def batch(
    kind: str, pairs: int, width: int, scale: float, dtype: torch.dtype = torch.float32, likeness: float = 1.0
) -> tuple[Tensor, ...]:
    """Captions somewhat like their images, the scale, and the bias of the sigmoid loss: leaves with a gradient."""
    draw = torch.Generator().manual_seed(pairs)
    image = torch.randn(pairs, width, generator=draw, dtype=dtype)
    text = likeness * image + torch.randn(pairs, width, generator=draw, dtype=dtype)
    bias = (torch.tensor([-9.0], dtype=dtype),) if kind == "sigmoid" else ()
    inputs = (F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor([scale], dtype=dtype), *bias)
    return tuple(tensor.requires_grad_() for tensor in inputs)


def compare(kind: str, inputs: tuple[Tensor, ...], tolerance: float, backend: str = "torch") -> None:
    """Loss, accuracy and every gradient, relative to the largest entry."""
    tiled, oracle = KINDS[kind]
    found, expected = tiled(*inputs, backend=backend), oracle(*inputs)
    assert found[1] == expected[1]
    # The upstream gradient is 3: an objective has a weight.
    pairs = zip(
        (found[0].detach(), *torch.autograd.grad(3 * found[0], inputs)),
        (expected[0].detach(), *torch.autograd.grad(3 * expected[0], inputs)),
        strict=True,
    )
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)) < tolerance


@pytest.mark.L0
@kinds
@given(pairs=st.integers(1, 40), width=st.integers(2, 9), tile=st.tuples(st.integers(1, 17), st.integers(1, 17)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tiles_of_any_size_give_the_whole_matrix_s_loss_and_gradients(
    kind: str, pairs: int, width: int, tile: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTiles, "size", tile)
        # float64, so that what is compared is the formula: worst seen 2e-12, where a batch is nearly solved.
        compare(kind, batch(kind, pairs, width, 20.0, torch.float64), 1e-10)


@pytest.mark.L0
@kinds
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_float32_keeps_its_digits_at_every_scale(kind: str, scale: float) -> None:
    # 700 pairs: two tiles down, one across, neither full. Worst seen 1.6e-6.
    compare(kind, batch(kind, 700, 16, scale), 1e-5)


@pytest.mark.L0
def test_scores_far_below_the_best_of_a_tile_still_count() -> None:
    """One caption at cosine 1 must not drown another image's captions at cosine -1, 200 below at the largest scale."""
    image, text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    compare("softmax", tuple(x.requires_grad_() for x in (image, text, torch.tensor([100.0]))), 1e-6)


@pytest.mark.L0
@kinds
def test_of_equal_scores_the_first_caption_is_the_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchTiles, "size", (4, 4))  # the first of equals in a tile, and among tiles
    image, text = torch.eye(6), torch.eye(6)
    text[5] = text[0]  # image 0 fits captions 0 and 5; image 5 fits none
    scale_and_bias = tuple(x.detach() for x in batch(kind, 6, 4, 10.0)[2:])
    assert KINDS[kind][0](image, text, *scale_and_bias)[1] == pytest.approx(5 / 6)


@pytest.mark.L0
@kinds
def test_memory_grows_with_the_batch_and_not_with_its_square(kind: str) -> None:
    def peak(pairs: int) -> int:
        inputs = batch(kind, pairs, 16, 10.0)
        return peak_bytes(lambda: torch.autograd.grad(KINDS[kind][0](*inputs)[0], inputs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTiles, "size", (32, 64))
        small, large = peak(128), peak(1024)
    assert large < 8.5 * small, "eight times the pairs"
    assert large < 1024 * 1024, "one byte a score would be more"


@pytest.mark.L0
def test_a_name_that_is_no_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' is not known; choose auto, torch or triton"):
        resolve_tiles("cuda", torch.device("cpu"))
    assert isinstance(resolve_tiles("auto", torch.device("cpu")), TorchTiles)


@pytest.mark.L0
@kinds
def test_triton_equals_the_whole_matrix_in_its_interpreter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA: test_triton_equals_the_whole_matrix_on_cuda")
    triton_tiles: Any = pytest.importorskip("kernels.contrastive_triton")
    monkeypatch.setattr(triton_tiles.TritonTiles, "size", (40, 150))
    # 70 pairs: two tiles down, one across, blocks of 32 x 128 that are not full. Three bf16 products leave 2^-18 of a
    # number out: worst seen 2.7e-5 over widths of 16 to 300 and scales of 1 to 100, with one of the three missing 4e-3.
    compare(kind, batch(kind, 70, 16, 30.0), 1e-4, backend="triton")


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_triton_equals_the_whole_matrix_on_cuda(kind: str, backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    draw = random.Random(0)
    drawn = [(draw.randint(2, 3000), 16 * draw.randint(1, 64)) for _ in range(8)]
    for pairs, width in [(5000, 768), *drawn]:
        # Captions little like their images: a solved batch has a gradient of 1 - p, p near 1, which no float32 holds.
        inputs = tuple(x.detach().cuda().requires_grad_() for x in batch(kind, pairs, width, 30.0, likeness=0.1))
        # On a CPU, the bf16 products emulated: worst 1.9e-5; tensor cores round sums of 144 to 312 parts towards zero.
        compare(kind, inputs, 2e-4 if backend == "triton" else 1e-4, backend=backend)
