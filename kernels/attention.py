"""Attention over a packed sequence: tokens see their own segment only.

A packed sequence has no padding inside segments and few distinct segment lengths. Two families of kernels serve it, all
exact. Dense ones take one batched call per segment length (kernels/dense_attention.py: sdpa, matmul). Varlen ones take
one call for all, with offsets that say where each segment begins:

    varlen      torch's varlen_attn: FlashAttention 2, part of torch's CUDA builds
    flash3      the same call with FlashAttention 3 for Hopper GPUs (module flash_attn_interface) in its place
    flash2      the flash-attn package, 2.7 or newer: the kernel of varlen, where torch was built without it
    xformers    its BlockDiagonalMask (kernels/xformers_attention.py), for GPUs that the others do not serve

Which kernel runs under torch's flash operators, its own or FlashAttention 3, is a setting of the process, made by
activate().

Rows of equal length may be divided further into spans, as packed captions are.

    T = 2*5 + 3*2 + 2 = 18 tokens: two segments of 5, three of 2, two of padding
    attend(q_THE, k_THE, v_THE, segments=((2, 5), (3, 2)))      # (18, H, E); the last 2 rows are zeros
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from kernels.dense_attention import DENSE, Segments, Spans, attend_dense
from kernels.xformers_attention import attend_xformers


@dataclass(frozen=True)
class Need:
    """What a backend needs beside a CUDA device and half precision, and the command that installs it."""

    module: str
    capability: tuple[int, int]
    remedy: str


NEEDS = {
    # A wheel of PyTorch's own index, for any torch from 2.9 on. PyPI has none: `flash-attn-3` is not there, and its
    # `flash_attn_interface` is another project.
    "flash3": Need(
        "flash_attn_interface",
        (9, 0),
        "pip install --no-deps flash-attn-3 --index-url https://download.pytorch.org/whl/cu130",
    ),
    "varlen": Need("torch", (8, 0), "pip install --force-reinstall torch -c constraints.txt"),
    "flash2": Need(
        "flash_attn", (8, 0), "pip install --no-build-isolation flash-attn (compiles for about half an hour)"
    ),
    "xformers": Need("xformers", (8, 0), "pip install --no-build-isolation --no-binary xformers xformers (compiles)"),
}
PREFERENCE = ("flash3", "varlen", "flash2", "xformers")  # what "auto" tries, best first
# Whose gradients differ from run to run. torch passes FlashAttention 3 its flag for a fixed order of sums, but with
# builds of early 2026 the queries' gradients are reported to differ all the same; xFormers has no such flag.
NOT_DETERMINISTIC = ("flash3", "xformers")
TAKES_OFFSETS = ("flash3", "varlen", "flash2")  # xFormers wants lengths as Python numbers, known before the call
UNDER_TORCH = {"flash3": "FA3"}  # torch's names of kernels that are not its own; every other backend runs torch's


@dataclass(frozen=True)
class Backend:
    """A resolved choice: what runs, and why it was chosen."""

    name: str
    reason: str


def resolve(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, is_deterministic: bool = False
) -> Backend:
    """The backend that `name` means for `dtype` on `device`; "auto" picks by rule, a name is held to its needs.

    With `is_deterministic` only those whose gradients are the same bits every time, under
    torch.use_deterministic_algorithms. The backend is activated: `attend` may be called with its name from now on.

    Raises ValueError for a name that is no backend or cannot run here: what it needs and how to get it.
    """
    backend = _resolve(name, torch.device(device), dtype, NOT_DETERMINISTIC if is_deterministic else ())
    activate(backend.name)
    return backend


def _resolve(name: str, device: torch.device, dtype: torch.dtype, refused: tuple[str, ...]) -> Backend:
    if name == "auto":
        return _pick(device, dtype, refused)
    if name not in (*DENSE, *NEEDS):
        raise ValueError(f"attention backend {name!r} is not known; choose one of auto, {', '.join((*DENSE, *NEEDS))}")
    if name in refused:
        raise ValueError(
            "its backward is not deterministic, which the run is to be; choose auto, varlen, flash2 or sdpa"
        )
    obstacle = missing(name, device, dtype) if name in NEEDS else None
    if obstacle:
        raise ValueError(f"it cannot run here: {obstacle}; or choose auto")
    return Backend(name, "named in the config")


def _pick(device: torch.device, dtype: torch.dtype, refused: tuple[str, ...]) -> Backend:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return Backend("matmul", "auto: bf16 on CPU, two batched products take a half to a fifth of sdpa")
    if device.type == "cpu" or dtype == torch.float32:
        return Backend("sdpa", f"auto: torch's fused attention, one call per segment length, serves {dtype} best")
    reasons: list[str] = []
    for name in PREFERENCE:
        obstacle = "its backward is not deterministic" if name in refused else missing(name, device, dtype)
        if not obstacle:
            return Backend(name, "auto: one call for all segments" + "".join(f"; {why}" for why in reasons))
        reasons.append(f"not {name}: {obstacle}")
    return Backend("sdpa", "auto: one call per segment length; " + "; ".join(reasons))


def attend(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool = False,
    backend: str = "sdpa",
    spans: Spans | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each segment: (T, H, E) -> (T, H, E).

    `segments` lists (count, length) pairs; they cover the leading tokens, what follows is padding and comes
    out as zeros. With `causal` a token sees itself and the tokens before it in its segment. `spans` divides the
    rows of a single (count, length) pair further; then there is no padding.
    """
    held = sum(count * length for count, length in segments)
    assert held <= q_THE.shape[0], f"segments {segments} hold {held} tokens, the sequence {q_THE.shape[0]}"
    assert spans is None or len(segments) == 1, f"spans divide rows of one length, not {segments}"
    if backend in NEEDS and (spans is None or backend in TAKES_OFFSETS):
        offsets = None if spans is None else spans.offsets
        out_THE = _attend_varlen(q_THE[:held], k_THE[:held], v_THE[:held], segments, offsets, causal, backend)
    else:
        out_THE = attend_dense(q_THE, k_THE, v_THE, segments, causal, DENSE.get(backend, DENSE["sdpa"]), spans)
    return F.pad(out_THE, (0, 0, 0, 0, 0, q_THE.shape[0] - held)) if held < q_THE.shape[0] else out_THE


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot serve `dtype` on `device`, with the way out; None if it can."""
    need = NEEDS[name]
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it needs a CUDA device, this machine has none in use ({device.type})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in half precision, not {dtype}; set optim.precision=bf16"
    capability = torch.cuda.get_device_capability(device)
    if capability < need.capability:
        return f"it needs compute capability {_dotted(need.capability)}, this GPU has {_dotted(capability)}"
    if name == "flash3" and capability[0] != 9:
        return f"FlashAttention 3 is made for Hopper (9.0), this GPU has {_dotted(capability)}"
    if name == "varlen":
        is_here, lack = torch.backends.cuda.is_flash_attention_available(), "torch was built without FlashAttention"
    else:
        is_here, lack = find_spec(need.module) is not None, f"{need.module} is not installed"
    return None if is_here else f"{lack}; {need.remedy}"


def activate(name: str) -> None:
    """Put the kernel of backend `name` under torch's flash operators: FlashAttention 3 for flash3, else torch's own.

    It holds for the whole process until the next call: for varlen_attn and for the flash path of torch's fused
    attention, forward and backward. A compiled graph runs what lies there when it runs.

    Raises ValueError where the kernel is installed and does not load.
    """
    wanted = UNDER_TORCH.get(name)
    if current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        restore_flash_attention_impl()
        return
    with warnings.catch_warnings():  # torch warns, once, that the kernels are put over its own: that is the purpose
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        try:
            activate_flash_attention_impl(wanted)
        except (ImportError, RuntimeError) as error:  # built for other libraries, or another package of that name
            reason = f"{NEEDS[name].module} is installed and does not load ({error})"
            raise ValueError(f"{reason}; {NEEDS[name].remedy}, or choose varlen") from error


@contextmanager
def activated(name: str) -> Iterator[None]:
    """Activate the kernel of backend `name` inside the `with`; restore the previous one afterwards."""
    before = current_flash_attention_impl()
    activate(name)
    try:
        yield
    finally:
        activate(next((name for name, kernel in UNDER_TORCH.items() if kernel == before), "varlen"))


def _attend_varlen(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    offsets: Tensor | None,
    causal: bool,
    backend: str,
) -> Tensor:
    """Attention within segments that cover all T tokens, or, given `offsets`, between neighbouring offsets."""
    if backend == "xformers":
        lengths = [length for count, length in segments for _ in range(count)]
        return attend_xformers(q_THE, k_THE, v_THE, lengths, causal)
    if backend == "flash2":
        return _attend_flash2(q_THE, k_THE, v_THE, segments, offsets, causal)
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which takes seconds

    under = current_flash_attention_impl()  # in a compiled graph a guard: where it changes, the graph is compiled anew
    assert under == UNDER_TORCH.get(backend), f"torch runs {under or 'its own kernel'}: activate({backend!r}) first"
    offsets = begins(segments, q_THE.device) if offsets is None else offsets
    longest = max(length for _, length in segments)
    window = (-1, 0) if causal else (-1, -1)
    out_THE = varlen_attn(q_THE, k_THE, v_THE, offsets, offsets, longest, longest, window_size=window)
    assert isinstance(out_THE, Tensor), "it returns more only when asked"
    return out_THE


def _attend_flash2(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments, offsets: Tensor | None, causal: bool
) -> Tensor:
    """Call the flash-attn package's varlen attention."""
    from flash_attn import flash_attn_varlen_func

    offsets = begins(segments, q_THE.device) if offsets is None else offsets
    longest = max(length for _, length in segments)
    is_fixed = torch.are_deterministic_algorithms_enabled()
    out_THE: Tensor = flash_attn_varlen_func(
        q_THE, k_THE, v_THE, offsets, offsets, longest, longest, causal=causal, deterministic=is_fixed
    )
    return out_THE


def begins(segments: Segments, device: torch.device) -> Tensor:
    """(N + 1,) int32: where each segment begins, then where the last ends. Made on the device, not copied there."""
    parts, done = [], 0
    for count, length in segments:
        parts.append(torch.arange(count, dtype=torch.int32, device=device) * length + done)
        done += count * length
    parts.append(torch.full((1,), done, dtype=torch.int32, device=device))
    return torch.cat(parts)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
