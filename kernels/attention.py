"""Attention over a packed sequence: tokens attend within their own segment only.

A packed sequence has no padding inside segments and few distinct segment lengths. Two families of backends serve it,
all exact. Dense ones make one batched call per segment length:

    sdpa        torch's fused kernel
    matmul      two batched products and a softmax: in bf16 on CPU the faster one

Varlen ones make one call for all segments, with offsets at which each segment begins:

    varlen      torch's varlen_attn: FlashAttention 2, part of torch's CUDA builds
    flash3      the same call with FlashAttention 3 for Hopper GPUs (module flash_attn_interface) in its place
    flash2      the flash-attn package, 2.7 or newer: the kernel of varlen, where torch was built without it
    xformers    its BlockDiagonalMask (kernels/xformers_attention.py), for GPUs that the others do not serve

Which kernel runs under torch's flash operators, its own or FlashAttention 3, is a setting of the process: activate().

Rows of equal length may be divided further into spans, as packed captions are.

    T = 2*5 + 3*2 + 2 = 18 tokens: two segments of 5, three of 2, two of padding
    attend(q_THE, k_THE, v_THE, segments=((2, 5), (3, 2)))      # (18, H, E); the last 2 rows are zeros

The file in order: `attend` and its oracle, the dense kernels, the varlen calls, the choice of a backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from kernels.xformers_attention import attend_xformers

Segments = tuple[tuple[int, int], ...]  # (count, length) pairs in the order of the tokens


class Spans(NamedTuple):
    """Rows of C slots divided into spans of tokens that attend to each other; slots of no caption form a span too."""

    ids_RC: Tensor  # int32: slots of one row with equal ids are one span
    offsets: Tensor  # (N + 1,) int32: where each span begins in the flattened rows (a span may be empty), then R * C


VARLEN_WITH_OFFSETS = ("flash3", "varlen", "flash2")  # xFormers needs lengths as Python numbers
UNDER_TORCH = {"flash3": "FA3"}  # torch's names of kernels that are not its own; every other backend runs torch's


def attend(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool = False,
    backend: str = "sdpa",
    spans: Spans | None = None,
) -> Tensor:
    """Attention within each segment, softmax(q k^T / sqrt(E)) v: (T, H, E) -> (T, H, E).

    `segments` lists (count, length) pairs; they cover the leading tokens, what follows is padding and comes
    out as zeros. With `causal` a token sees itself and the tokens before it in its segment. `spans` divides the
    rows of a single (count, length) pair further; then there is no padding.
    """
    num_tokens = sum(count * length for count, length in segments)
    assert num_tokens <= q_THE.shape[0], f"segments {segments} hold {num_tokens} tokens, the sequence {q_THE.shape[0]}"
    assert spans is None or len(segments) == 1, f"spans divide rows of one length, not {segments}"
    if backend in REQUIREMENTS and (spans is None or backend in VARLEN_WITH_OFFSETS):
        offsets = None if spans is None else spans.offsets
        out_THE = _attend_varlen(
            q_THE[:num_tokens], k_THE[:num_tokens], v_THE[:num_tokens], segments, offsets, causal, backend
        )
    else:
        out_THE = attend_dense(
            q_THE, k_THE, v_THE, segments, causal, DENSE_KERNELS.get(backend, DENSE_KERNELS["sdpa"]), spans
        )
    return F.pad(out_THE, (0, 0, 0, 0, 0, q_THE.shape[0] - num_tokens)) if num_tokens < q_THE.shape[0] else out_THE


def attend_reference(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments, causal: bool = False, spans: Spans | None = None
) -> Tensor:
    """Oracle of `attend` and every backend: the plain formula, one segment and one head at a time."""
    out_THE, start = torch.zeros_like(v_THE), 0
    lengths = [length for count, length in segments for _ in range(count)]
    for length in lengths if spans is None else spans.offsets.diff().tolist():
        rows = slice(start, start + length)
        for head in range(q_THE.shape[1]):
            scores_NN = q_THE[rows, head] @ k_THE[rows, head].T * q_THE.shape[2] ** -0.5
            if causal:
                scores_NN = scores_NN.masked_fill(_future(length, scores_NN.device), float("-inf"))
            out_THE[rows, head] = scores_NN.softmax(-1) @ v_THE[rows, head]
        start += length
    return out_THE


DenseKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_dense(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    segments: Segments,
    causal: bool,
    kernel: DenseKernel,
    spans: Spans | None,
) -> Tensor:
    """Call `kernel` once per segment length; (tokens in segments, H, E)."""
    done, parts = 0, []
    for count, length in segments:
        q_SHNE, k_SHNE, v_SHNE = (
            t[done : done + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (q_THE, k_THE, v_THE)
        )
        visible = _visible(length, causal, spans, q_THE.device)
        parts.append(kernel(q_SHNE, k_SHNE, v_SHNE, visible).transpose(1, 2).flatten(0, 1))
        done += count * length
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _sdpa(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, visible: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q_SHNE, k_SHNE, v_SHNE, attn_mask=visible)


def _matmul(q_SHNE: Tensor, k_SHNE: Tensor, v_SHNE: Tensor, visible: Tensor | None) -> Tensor:
    scores_SHNN = (q_SHNE * q_SHNE.shape[-1] ** -0.5) @ k_SHNE.transpose(-2, -1)
    if visible is not None:
        scores_SHNN = scores_SHNN.masked_fill(~visible, float("-inf"))
    return scores_SHNN.softmax(-1) @ v_SHNE


DENSE_KERNELS: dict[str, DenseKernel] = {"sdpa": _sdpa, "matmul": _matmul}


def _visible(length: int, causal: bool, spans: Spans | None, device: torch.device) -> Tensor | None:
    """Attention mask, bool, broadcast to (S, H, length, length): True where row attends to column; None: everywhere."""
    visible = ~_future(length, device) if causal else None
    if spans is None:
        return visible
    same = (spans.ids_RC[:, :, None] == spans.ids_RC[:, None, :]).unsqueeze(1)
    return same if visible is None else same & visible


def _future(length: int, device: torch.device) -> Tensor:
    """(length, length) bool: True where the column comes after the row."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


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
    offsets = segment_offsets(segments, q_THE.device) if offsets is None else offsets
    longest = max(length for _, length in segments)
    window = (-1, 0) if causal else (-1, -1)
    out_THE = varlen_attn(q_THE, k_THE, v_THE, offsets, offsets, longest, longest, window_size=window)
    assert isinstance(out_THE, Tensor), "it returns a tuple only with return_aux"
    return out_THE


def _attend_flash2(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, segments: Segments, offsets: Tensor | None, causal: bool
) -> Tensor:
    """Call the flash-attn package's varlen attention."""
    from flash_attn import flash_attn_varlen_func

    offsets = segment_offsets(segments, q_THE.device) if offsets is None else offsets
    longest = max(length for _, length in segments)
    is_fixed = torch.are_deterministic_algorithms_enabled()
    out_THE: Tensor = flash_attn_varlen_func(
        q_THE, k_THE, v_THE, offsets, offsets, longest, longest, causal=causal, deterministic=is_fixed
    )
    return out_THE


def segment_offsets(segments: Segments, device: torch.device) -> Tensor:
    """(N + 1,) int32: where each segment begins, then where the last ends. Computed on the device, not copied there."""
    parts, done = [], 0
    for count, length in segments:
        parts.append(torch.arange(count, dtype=torch.int32, device=device) * length + done)
        done += count * length
    parts.append(torch.full((1,), done, dtype=torch.int32, device=device))
    return torch.cat(parts)


@dataclass(frozen=True)
class BackendRequirement:
    """Requirements of a backend beside a CUDA device and half precision, and the command that installs it."""

    module: str
    capability: tuple[int, int]
    remedy: str


REQUIREMENTS = {
    # A wheel of PyTorch's own index, for any torch from 2.9 on. PyPI has none: `flash-attn-3` is not there, and its
    # `flash_attn_interface` is another project.
    "flash3": BackendRequirement(
        "flash_attn_interface",
        (9, 0),
        "pip install --no-deps flash-attn-3 --index-url https://download.pytorch.org/whl/cu130",
    ),
    "varlen": BackendRequirement("torch", (8, 0), "pip install --force-reinstall torch -c constraints.txt"),
    "flash2": BackendRequirement(
        "flash_attn", (8, 0), "pip install --no-build-isolation flash-attn (compiles for about half an hour)"
    ),
    "xformers": BackendRequirement(
        "xformers", (8, 0), "pip install --no-build-isolation --no-binary xformers xformers (compiles)"
    ),
}
PREFERENCE = ("flash3", "varlen", "flash2", "xformers")  # the order in which "auto" tries them
# Backends whose gradients differ from run to run. torch passes FlashAttention 3 its flag for a fixed order of sums, but
# with builds of early 2026 the queries' gradients are reported to differ all the same; xFormers has no such flag.
NOT_DETERMINISTIC = ("flash3", "xformers")


@dataclass(frozen=True)
class AttentionBackend:
    """A resolved backend: its name and why it was chosen."""

    name: str
    reason: str


def resolve_attention(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, is_deterministic: bool = False
) -> AttentionBackend:
    """Choose and activate the attention backend for `dtype` on `device`: the best one for "auto", else the named one.

    With `is_deterministic` only backends whose gradients are the same bits every time, under
    torch.use_deterministic_algorithms. Afterwards `attend` may be called with the returned name.

    Raises ValueError for a name that is no backend or cannot run here, with what is missing and how to get it.
    """
    backend = _resolve(name, torch.device(device), dtype, NOT_DETERMINISTIC if is_deterministic else ())
    activate(backend.name)
    return backend


def _resolve(name: str, device: torch.device, dtype: torch.dtype, refused: tuple[str, ...]) -> AttentionBackend:
    if name == "auto":
        return _pick(device, dtype, refused)
    known = (*DENSE_KERNELS, *REQUIREMENTS)
    if name not in known:
        raise ValueError(f"attention backend {name!r} is not known; choose one of auto, {', '.join(known)}")
    if name in refused:
        raise ValueError(
            "its backward is not deterministic, which the run is to be; choose auto, varlen, flash2 or sdpa"
        )
    obstacle = why_unavailable(name, device, dtype) if name in REQUIREMENTS else None
    if obstacle:
        raise ValueError(f"it cannot run here: {obstacle}; or choose auto")
    return AttentionBackend(name, "named in the config")


def _pick(device: torch.device, dtype: torch.dtype, refused: tuple[str, ...]) -> AttentionBackend:
    if device.type == "cpu" and dtype == torch.bfloat16:
        return AttentionBackend("matmul", "auto: bf16 on CPU, two batched products take a half to a fifth of sdpa")
    if device.type == "cpu" or dtype == torch.float32:
        return AttentionBackend(
            "sdpa", f"auto: torch's fused attention, one call per segment length, serves {dtype} best"
        )
    reasons: list[str] = []
    for name in PREFERENCE:
        obstacle = "its backward is not deterministic" if name in refused else why_unavailable(name, device, dtype)
        if not obstacle:
            return AttentionBackend(name, "auto: one call for all segments" + "".join(f"; {why}" for why in reasons))
        reasons.append(f"not {name}: {obstacle}")
    return AttentionBackend("sdpa", "auto: one call per segment length; " + "; ".join(reasons))


def why_unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why backend `name` cannot serve `dtype` on `device`, with the remedy; None if it can."""
    need = REQUIREMENTS[name]
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


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def activate(name: str) -> None:
    """Select the kernel under torch's flash operators: FlashAttention 3 for flash3, else torch's own.

    It holds for the whole process until the next call: for varlen_attn and for the flash path of torch's fused
    attention, forward and backward. A compiled graph runs the kernel that is active when it runs.

    Raises ValueError where the kernel is installed and does not load.
    """
    wanted = UNDER_TORCH.get(name)
    if current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        restore_flash_attention_impl()
        return
    with warnings.catch_warnings():  # torch warns, once, that its own kernels are replaced: that is the purpose
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        try:
            activate_flash_attention_impl(wanted)
        except (ImportError, RuntimeError) as error:  # built for other libraries, or another package of that name
            reason = f"{REQUIREMENTS[name].module} is installed and does not load ({error})"
            raise ValueError(f"{reason}; {REQUIREMENTS[name].remedy}, or choose varlen") from error


@contextmanager
def activated(name: str) -> Iterator[None]:
    """Activate the kernel of backend `name` inside the `with`; restore the previous one afterwards."""
    before = current_flash_attention_impl()
    activate(name)
    try:
        yield
    finally:
        activate(next((name for name, kernel in UNDER_TORCH.items() if kernel == before), "varlen"))
