"""Varlen backends: what each needs, which kernel runs under torch's flash operators, and that it is called rightly.

The kernels need a GPU. On the CPU stand-ins under torch's operators compute by the oracle, so that offsets, lengths and
gradients of our side are checked through the varlen_attn of the installed torch; the `gpu` tests run the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from kernels import attention
from kernels.attention import Spans, activate, activated, attend, attend_reference, resolve_attention
from tests.kernels.attention_parity import check, random_qkv
from tests.kernels.flash_stand_ins import flash_stand_ins

SEGMENTS = ((2, 5), (3, 2))
CUDA = torch.device("cuda")
IDS = torch.tensor([[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]], dtype=torch.int32)
SPANS = Spans(IDS, torch.tensor([0, 3, 5, 5, 6, 10], dtype=torch.int32))
UNDER_TORCH = {"flash3": "FA3", "varlen": "torch"}  # the kernel that runs under torch's flash operators


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with flash_stand_ins(monkeypatch) as calls:
        yield calls


@pytest.mark.L0
@pytest.mark.parametrize("backend", list(attention.REQUIREMENTS))
@pytest.mark.parametrize("causal", [False, True])
def test_each_kernel_gets_segments_and_spans_as_torch_wants_them(backend: str, causal: bool, calls: list[str]) -> None:
    with activated(backend):
        check(backend, SEGMENTS, 18, causal, None)  # two tokens of padding
        check(backend, ((2, 5),), 10, causal, SPANS)
    ways = ("forward", "backward") if backend in UNDER_TORCH else ()
    assert calls == [f"{UNDER_TORCH[backend]} {way}" for way in ways] * 2


@pytest.mark.L0
def test_torch_runs_its_own_kernel_again_after_flash_attention_3(calls: list[str]) -> None:
    qkv = random_qkv(16)
    for backend in ("varlen", "flash3", "varlen"):
        with activated(backend):
            attend(*qkv, SEGMENTS, backend=backend).sum().backward()
    assert calls == [f"{kernel} {way}" for kernel in ("torch", "FA3", "torch") for way in ("forward", "backward")]
    activate("flash3")
    with pytest.raises(RuntimeError, match="in between"), activated("varlen"):  # noqa: PT012
        assert current_flash_attention_impl() is None
        raise RuntimeError("in between")
    assert current_flash_attention_impl() == "FA3", "what lay there before lies there again"
    activate("sdpa")
    assert current_flash_attention_impl() is None


@pytest.mark.L0
def test_a_compiled_graph_runs_the_kernel_that_is_active_without_a_break(calls: list[str]) -> None:
    qkv = random_qkv(16)
    call = torch.compile(
        lambda q, k, v, backend: attend(q, k, v, SEGMENTS, backend=backend) * 2, fullgraph=True, backend="aot_eager"
    )
    for backend in ("flash3", "varlen", "flash3"):
        with activated(backend):
            out = call(*qkv, backend)
            torch.testing.assert_close(out, 2 * attend_reference(*qkv, SEGMENTS), rtol=0, atol=1e-5)
            out.sum().backward()
    assert calls == [f"{kernel} {way}" for kernel in ("FA3", "torch", "FA3") for way in ("forward", "backward")]


@pytest.mark.L0
@pytest.mark.usefixtures("calls")
def test_the_xformers_operator_compiles_without_a_break() -> None:
    q, k, v = random_qkv(16)
    call = torch.compile(
        lambda q, k, v: attend(q, k, v, SEGMENTS, backend="xformers") * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(q, k, v), 2 * attend_reference(q, k, v, SEGMENTS), rtol=0, atol=1e-5)


@pytest.mark.L0
@pytest.mark.usefixtures("calls")
def test_no_backend_is_computed_by_the_other_ones_kernel() -> None:
    qkv = random_qkv(16)
    with pytest.raises(AssertionError, match=r"torch runs its own kernel: activate\('flash3'\) first"):
        attend(*qkv, SEGMENTS, backend="flash3")
    with activated("flash3"), pytest.raises(AssertionError, match=r"torch runs FA3: activate\('varlen'\) first"):
        attend(*qkv, SEGMENTS, backend="varlen")


@pytest.mark.L0
def test_flash_attention_3_that_does_not_load_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), here=("flash3", "varlen"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))  # as PyPI has one
    with pytest.raises(ValueError, match=r"does not load \(.*FA3.*\); pip install --no-deps flash-attn-3.* varlen"):
        resolve_attention("auto", "cuda")
    assert current_flash_attention_impl() is None


@pytest.mark.L0
@pytest.mark.parametrize("backend", list(attention.REQUIREMENTS))
def test_a_named_backend_that_cannot_run_says_what_it_needs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs a CUDA device, this machine has none in use \(cpu\); or choose auto"):
        resolve_attention(backend, "cpu")
    pretend(monkeypatch, (9, 0), here=())
    with pytest.raises(ValueError, match=r"half precision, not torch\.float32; set optim\.precision=bf16"):
        resolve_attention(backend, "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"(is not installed|built without FlashAttention); pip install --"):
        resolve_attention(backend, "cuda")
    pretend(monkeypatch, (7, 0), here=())
    with pytest.raises(ValueError, match=r"needs compute capability \d\.0, this GPU has 7\.0"):
        resolve_attention(backend, "cuda")


@pytest.mark.L0
@pytest.mark.usefixtures("calls")
def test_auto_on_a_gpu_takes_the_best_there_is_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, here, name, reason in (
        ((9, 0), ("flash3", "varlen"), "flash3", "auto: one call for all segments"),
        ((9, 0), ("varlen",), "varlen", "not flash3: flash_attn_interface is not installed"),
        ((10, 0), ("flash3", "varlen"), "varlen", "made for Hopper"),
        ((8, 0), ("flash2",), "flash2", "not varlen: torch was built without FlashAttention"),
        ((8, 0), (), "sdpa", "was built without FlashAttention"),
        ((7, 0), (), "sdpa", "this GPU has 7.0"),
    ):
        pretend(monkeypatch, capability, here)
        backend = resolve_attention("auto", "cuda")
        assert backend.name == name
        assert reason in backend.reason
        assert current_flash_attention_impl() == ("FA3" if name == "flash3" else None)
    assert resolve_attention("auto", "cuda", torch.float32).name == "sdpa"


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], here: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: "varlen" in here)
    modules = {attention.REQUIREMENTS[name].module for name in here}
    monkeypatch.setattr(attention, "find_spec", lambda module: "found" if module in modules else None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", list(attention.REQUIREMENTS))
@pytest.mark.parametrize("spans", [None, SPANS])
@pytest.mark.parametrize("causal", [False, True])
def test_each_kernel_that_is_here_equals_the_oracle_on_the_gpu(backend: str, spans: Spans | None, causal: bool) -> None:
    if reason := attention.why_unavailable(backend, CUDA, torch.bfloat16):
        pytest.skip(reason)
    segments, tokens = (SEGMENTS, 18) if spans is None else (((2, 5),), 10)
    spans = None if spans is None else Spans(*(t.cuda() for t in spans))
    exact = [t.detach().cuda().requires_grad_() for t in random_qkv(tokens)]
    qkv = [t.detach().bfloat16().requires_grad_() for t in exact]
    call, expected = (
        torch.compile(attend, fullgraph=True, dynamic=False),
        attend_reference(*exact, segments, causal, spans),
    )
    with activated(backend):
        out = call(*qkv, segments, causal, backend, spans)
        grads = torch.autograd.grad(out.float().sum(), qkv)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)  # bf16 rounds numbers of order 1 by 0.004
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.06)
