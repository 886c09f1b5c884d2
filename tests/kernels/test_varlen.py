"""The doors to varlen libraries: what each needs, and that each is called as its own signature wants it.

The libraries need a GPU. On the CPU stand-ins with their signatures (read from flash-attn 2.8.3, xformers 0.0.35 and
torch 2.13) compute by the oracle, so that offsets, lengths and gradients of our side are checked; the `gpu` tests run
the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention
from kernels.attention import attend, resolve
from kernels.dense_attention import Spans, reference
from tests.kernels.attention_parity import check, random_qkv

SEGMENTS = ((2, 5), (3, 2))
CUDA = torch.device("cuda")
IDS = torch.tensor([[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]], dtype=torch.int32)
SPANS = Spans(IDS, torch.tensor([0, 3, 5, 5, 6, 10], dtype=torch.int32))


def by_offsets(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> Tensor:
    assert offsets.dtype == torch.int32
    return reference(q, k, v, ((1, q.shape[0]),), causal, Spans(offsets, offsets))


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that compute on the CPU what the libraries compute on a GPU."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        return by_offsets(q, k, v, cu_seqlens_q, causal)

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        return by_offsets(query, key, value, cu_seq_q, {(-1, -1): False, (-1, 0): True}[window_size])

    flash_attn = ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for name, module in xformers_stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    attention._block_diagonal.cache_clear()


def by_hand(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """The gradients of q, k, v without autograd, which is off inside an operator."""
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(begin, end)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head].T * q.shape[2] ** -0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1) if causal else torch.zeros_like(scores).bool()
            shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            dv[rows, head] = shares.T @ grad[rows, head]
            dshares = grad[rows, head] @ v[rows, head].T
            dscores = shares * (dshares - (dshares * shares).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
            dq[rows, head], dk[rows, head] = dscores @ k[rows, head], dscores.T @ q[rows, head]
    return dq, dk, dv


def xformers_stand_in() -> dict[str, ModuleType]:
    class BlockDiagonalMask:
        def __init__(self, lengths: list[int], causal: bool) -> None:
            self.offsets = torch.tensor([0, *lengths]).cumsum(0).int()
            self.causal = causal
            self.lengths = lengths

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], *, device: torch.device | None = None) -> BlockDiagonalMask:
            return cls(q_seqlen, False)

        def make_causal(self) -> BlockDiagonalMask:
            return BlockDiagonalMask(self.lengths, True)

    def forward(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, *, op: Any) -> tuple[Tensor, Tensor]:
        assert query.shape[0] == 1
        out = by_offsets(query[0], key[0], value[0], attn_bias.offsets, attn_bias.causal)
        return out[None], torch.zeros(1, query.shape[2], query.shape[1])

    def backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, *, op: Any
    ) -> tuple[Tensor, ...]:
        assert output.shape == grad.shape
        assert lse.shape == (1, query.shape[2], query.shape[1])
        return tuple(t[None] for t in by_hand(grad[0], query[0], key[0], value[0], attn_bias.offsets, attn_bias.causal))

    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    fmha: Any = modules["xformers.ops.fmha"]
    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    fmha.flash = SimpleNamespace(FwOp=object, BwOp=object)
    modules["xformers.ops"].fmha = fmha  # type: ignore[attr-defined]
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    return modules


@pytest.mark.L0
@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("backend", list(attention.NEEDS))
@pytest.mark.parametrize("causal", [False, True])
def test_each_library_gets_segments_and_spans_in_its_own_form(backend: str, causal: bool) -> None:
    check(backend, SEGMENTS, 18, causal, None)  # two tokens of padding
    check(backend, ((2, 5),), 10, causal, SPANS)


@pytest.mark.L0
@pytest.mark.usefixtures("libraries")
def test_the_xformers_operator_compiles_without_a_break() -> None:
    q, k, v = random_qkv(16)
    call = torch.compile(
        lambda q, k, v: attend(q, k, v, SEGMENTS, backend="xformers") * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(q, k, v), 2 * reference(q, k, v, SEGMENTS), rtol=0, atol=1e-5)


@pytest.mark.L0
@pytest.mark.parametrize("backend", list(attention.NEEDS))
def test_a_named_backend_that_cannot_run_says_what_it_needs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device, this machine has none in use \(cpu\); or choose auto"):
        resolve(backend, "cpu")
    pretend(monkeypatch, (9, 0), installed=())
    with pytest.raises(ValueError, match=r"half precision, not torch\.float32; set optim\.precision=bf16"):
        resolve(backend, "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"is not installed; (pip )?(install|build)"):
        resolve(backend, "cuda")
    pretend(monkeypatch, (7, 0), installed=())
    with pytest.raises(ValueError, match=r"needs compute capability \d\.0, this GPU has 7\.0"):
        resolve(backend, "cuda")


@pytest.mark.L0
def test_auto_on_a_gpu_takes_the_best_there_is_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr(attention, "activate", activated.append)
    for capability, installed, name, reason in (
        ((9, 0), ("flash_attn_interface", "torch.nn.attention.varlen"), "flash3", "auto: one call for all segments"),
        ((9, 0), ("torch.nn.attention.varlen",), "varlen", "not flash3: flash_attn_interface is not installed"),
        ((10, 0), ("flash_attn_interface", "torch.nn.attention.varlen"), "varlen", "made for Hopper"),
        ((8, 0), ("flash_attn",), "flash2", "not varlen: torch.nn.attention.varlen is not installed"),
        ((7, 0), (), "sdpa", "this GPU has 7.0"),
    ):
        pretend(monkeypatch, capability, installed)
        backend = resolve("auto", "cuda")
        assert backend.name == name
        assert reason in backend.reason
    assert activated == ["flash3", "varlen", "varlen", "flash2"]
    assert resolve("auto", "cuda", torch.float32).name == "sdpa"


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_is_installed", lambda module: module in installed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", list(attention.NEEDS))
@pytest.mark.parametrize("spans", [None, SPANS])
@pytest.mark.parametrize("causal", [False, True])
def test_each_installed_library_equals_the_oracle_on_the_gpu(backend: str, spans: Spans | None, causal: bool) -> None:
    if reason := attention.missing(backend, CUDA, torch.bfloat16):
        pytest.skip(reason)
    attention.activate(backend)
    segments, tokens = (SEGMENTS, 18) if spans is None else (((2, 5),), 10)
    spans = None if spans is None else Spans(*(t.cuda() for t in spans))
    exact = [t.detach().cuda().requires_grad_() for t in random_qkv(tokens)]
    qkv = [t.detach().bfloat16().requires_grad_() for t in exact]
    call = torch.compile(attend, fullgraph=True)
    out, expected = call(*qkv, segments, causal, backend, spans), reference(*exact, segments, causal, spans)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)  # bf16 rounds numbers of order 1 by 0.004
    for ours, theirs in zip(
        torch.autograd.grad(out.float().sum(), qkv), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.06)
