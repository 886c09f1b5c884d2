"""FP8 linear layers of transformer blocks: the one door to torchao and Transformer Engine.

A conversion changes how a module computes and leaves its parameters, their names and their values unchanged, so a
checkpoint of one kind is a checkpoint of all. Every scale is computed from the current tensor (torchao "tensorwise",
TE Float8CurrentScaling or MXFP8BlockScaling). TE's DelayedScaling is not offered: its amax history is state outside the
parameters, and a resumed run would differ from an uninterrupted one.

    linears = resolve_linears("fp8_torchao", "cuda")      # LinearBackend(name="fp8_torchao", reason=..., ...)
    linears.why_not_fp8(k=1024, n=1024, m=16448)             # "too small to pay": this product stays bf16
    to_torchao(block, [block.attn.qkv, block.mlp.w12])    # they multiply in float8 from now on
    layer = LinearParameters(qkv.weight, qkv.bias, n=3072, k=1024)
    te_norm_linear(block.norm1, layer, linears)           # x -> qkv(norm1(x))

Letters in this file: K inputs, N outputs, M tokens of one product, as in the libraries' own tables.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]  # (M, K) -> (M, N)
BareProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # like F.linear
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # values and weights; gradients
MULTIPLE, MXFP8_MULTIPLE = 16, 32  # of every side of an FP8 product on NVIDIA hardware; MXFP8 scales blocks of 32
SMALL = "too small to pay"
INSTALL_COMMANDS = {  # of each FP8 kind
    "fp8_torchao": "pip install -e '.[gpu]' -c constraints.txt",
    # against the installed torch, so without pip's isolated build environment
    "fp8_te": "pip install --no-build-isolation -e '.[transformer-engine]' -c constraints.txt "
    "(compiles, with CUDA's toolkit)",
}


@dataclass(frozen=True)
class LinearBackend:
    """A resolved kind of linear layer and why it was chosen. `recipe` is TE's class name; K and N must be multiples of
    `multiple`."""

    name: str
    reason: str
    multiple: int = MULTIPLE
    is_gated_by_speed: bool = False
    recipe: str = ""

    def why_not_aligned(self, k: int, n: int) -> str | None:
        """Return why a weight of (n, k) cannot be multiplied in FP8; None where it can."""
        return f"with a side that is no multiple of {self.multiple}" if k % self.multiple or n % self.multiple else None

    def why_not_fp8(self, k: int, n: int, m: int) -> str | None:
        """Return why the product (m, k) x (k, n) stays bf16; None where it becomes FP8.

        FP8 pays where the time saved in the products exceeds that of finding maxima and casting (torchao's rule). Per
        H100, forward and backward: 6 MKN FLOPs at about 700 against 1,200 TFLOP/s, and about 6 bytes for each element
        of input, weight and gradient at 2.5 TB/s; so 1/K + 1/N + 1/M must be below 1/670. torchao's published figures
        fit (speed-up 0.80 at M, K, N = 1024, 2048, 1024; 1.39 at 4096, 8192, 16384). Narrow outputs lose beside that:
        K <= 4096 with N <= 1024 is left out by torchao's own filter.
        """
        is_small = 1 / k + 1 / n + 1 / m > 1 / 670 or (k <= 4096 and n <= 1024)
        return self.why_not_aligned(k, n) or (SMALL if self.is_gated_by_speed and is_small else None)


def resolve_linears(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, widths: Collection[int] = ()
) -> LinearBackend:
    """Choose the linear layers that `name` (bf16, fp8_torchao, fp8_te) means for parameters of `dtype` on `device`.

    `widths` are all K and N that may become FP8; they decide between TE's recipes. Raises ValueError for an unknown
    name, a dtype or a device that has no FP8; ImportError for a library that is missing.
    """
    kind = torch.device(device).type
    if name == "bf16":
        return LinearBackend(name, "named in the config")
    if name not in ("fp8_torchao", "fp8_te"):
        raise ValueError(f"{name!r} is not a kind of linear layer; choose bf16, fp8_torchao or fp8_te")
    if dtype != torch.bfloat16:
        raise ValueError(f"{name} with {dtype} parameters: FP8 products take and give bf16; train in bf16")
    if kind == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise ValueError(f"{name} on a GPU of compute capability {found}: FP8 begins at 8.9 (Ada, Hopper); use bf16")
    if name == "fp8_te":
        return _resolve_te(kind, device, widths)
    _torchao()
    if kind == "cuda":
        return LinearBackend(name, "named in the config; one scale per tensor", is_gated_by_speed=True)
    return LinearBackend(name, f"named in the config; emulated on {kind}: true float8 values, no gain in speed")


def to_torchao(root: nn.Module, linears: Collection[nn.Linear]) -> None:
    """Convert `linears`, modules somewhere below `root`, to float8 products; the token axis may have any length."""
    chosen = {id(linear) for linear in linears}
    _torchao().convert_to_float8_training(
        root, module_filter_fn=lambda module, _: id(module) in chosen, config=_torchao_config()
    )


@cache
def torchao_linear() -> BareProduct:
    """F.linear in float8, for a weight that no nn.Linear holds: (M, K), (N, K), (N) -> (M, N). The same function at
    every call, so that blocks which carry it share one compiled graph."""
    library, config = _torchao(), _torchao_config()
    multiply = importlib.import_module("torchao.float8.float8_linear").matmul_with_hp_or_float8_args
    holder = nn.Sequential(nn.Linear(MULTIPLE, MULTIPLE, device="meta"))
    products = library.convert_to_float8_training(holder, config=config)[0].linear_mm_config

    def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        y_MN: Tensor = multiply.apply(x_MK, weight_NK.t(), products, config)
        return y_MN if bias_N is None else y_MN + bias_N

    return linear


def float8_reference(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Oracle of torchao_linear(): round every operand to float8 under one scale, multiply exactly in float32."""
    y_MN: Tensor = _RoundedLinear.apply(x_MK, weight_NK)
    return y_MN if bias_N is None else y_MN + bias_N


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return (_rounded(x_MK, E4M3) @ _rounded(weight_NK, E4M3).T).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, weight_NK = ctx.saved_tensors
        rounded_MN = _rounded(grad_MN, E5M2)
        grad_x_MK, grad_weight_NK = rounded_MN @ _rounded(weight_NK, E4M3), rounded_MN.T @ _rounded(x_MK, E4M3)
        return grad_x_MK.to(x_MK.dtype), grad_weight_NK.to(weight_NK.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `x` to float8 with its largest magnitude scaled to the format's largest: float32, same shape."""
    scale = torch.finfo(dtype).max / x.abs().amax().double().clamp(min=1e-12)
    return (x.float() * scale.float()).to(dtype).float() / scale.float()


@dataclass(frozen=True)
class LinearParameters:
    """The parameters of one linear layer and the weight's shape, which the tensor itself lacks under ZeRO-3."""

    weight: Tensor
    bias: Tensor
    n: int
    k: int


def te_linear(layer: LinearParameters, linears: LinearBackend) -> Product:
    """Transformer Engine's Linear, computing with the parameters of `layer`."""
    module = _transformer_engine().Linear(layer.k, layer.n, bias=True, **_without_storage(layer))
    return _aligned(_bound(module, weight=layer.weight, bias=layer.bias), linears)


def te_norm_linear(norm: nn.Module, layer: LinearParameters, linears: LinearBackend) -> Product:
    """layer(norm(x)) in one module: the norm writes float8, without a bf16 tensor in between.

    `norm` has `weight` and `eps`; it is a LayerNorm if it has a `bias`, else an RMSNorm.
    """
    module = _transformer_engine().LayerNormLinear(
        layer.k, layer.n, bias=True, **_norm_kind(norm), **_without_storage(layer)
    )
    return _aligned(_bound(module, weight=layer.weight, bias=layer.bias, **_norm_parameters(norm)), linears)


def te_norm_swiglu(
    norm: nn.Module, gate_and_value: LinearParameters, out: LinearParameters, linears: LinearBackend
) -> Product:
    """out(silu(gate) * value) in one module, gate above value = gate_and_value(norm(x)). TE has them in this order."""
    module = _transformer_engine().LayerNormMLP(
        out.n, out.k, bias=True, activation="swiglu", **_norm_kind(norm), **_without_storage(out)
    )
    products = {"fc1_weight": gate_and_value.weight, "fc1_bias": gate_and_value.bias}
    products |= {"fc2_weight": out.weight, "fc2_bias": out.bias}
    return _aligned(_bound(module, **products, **_norm_parameters(norm)), linears)


def te_autocast(forward: Callable[..., Any], linears: LinearBackend, group: Any) -> Callable[..., Any]:
    """Wrap `forward` in TE's FP8 autocast with the recipe of `linears`; outside of it TE's modules compute in bf16.

    `group` is the process group over which maxima are shared by recipes that do so: the data-parallel ranks.
    """
    library = _transformer_engine()
    recipe = getattr(importlib.import_module("transformer_engine.common.recipe"), linears.recipe)()

    def in_fp8(*arguments: Any, **named: Any) -> Any:
        with library.autocast(enabled=True, recipe=recipe, amax_reduction_group=group):
            return forward(*arguments, **named)

    return in_fp8


def _resolve_te(kind: str, device: torch.device | str, widths: Collection[int]) -> LinearBackend:
    if kind != "cuda":
        raise ValueError(f"fp8_te on {kind}: Transformer Engine needs an NVIDIA GPU; use bf16, or fp8_torchao")
    _transformer_engine()
    major, _ = torch.cuda.get_device_capability(device)
    has_blocks = major in (10, 11) and not any(width % MXFP8_MULTIPLE for width in widths)
    recipe, multiple = ("MXFP8BlockScaling", MXFP8_MULTIPLE) if has_blocks else ("Float8CurrentScaling", MULTIPLE)
    return LinearBackend("fp8_te", f"named in the config; {recipe}", multiple, is_gated_by_speed=True, recipe=recipe)


def _bound(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """Make `module`, a TE module without storage, compute with the given parameters."""
    for name, parameter in parameters.items():
        setattr(module, name, parameter)
    return module


def _without_storage(layer: LinearParameters) -> dict[str, Any]:
    return {"params_dtype": layer.weight.dtype, "device": "meta"}


def _norm_kind(norm: Any) -> dict[str, Any]:
    return {"eps": norm.eps, "normalization": "LayerNorm" if hasattr(norm, "bias") else "RMSNorm"}


def _norm_parameters(norm: Any) -> dict[str, Tensor]:
    return {"layer_norm_weight": norm.weight} | ({"layer_norm_bias": norm.bias} if hasattr(norm, "bias") else {})


def _aligned(product: Product, linears: LinearBackend) -> Product:
    """Wrap `product` for any number of tokens: pad with zero rows to the next multiple and drop their results."""

    def forward(x_MK: Tensor) -> Tensor:
        missing = -x_MK.shape[0] % linears.multiple
        return product(F.pad(x_MK, (0, 0, 0, missing)))[: x_MK.shape[0]] if missing else product(x_MK)

    return forward


@cache
def _torchao_config() -> Any:
    """One scale per tensor. With pad_inner_dim M may be any number: it is the inner side of the weight's gradient."""
    return _torchao().Float8LinearConfig(pad_inner_dim=True)


@cache
def _torchao() -> ModuleType:
    try:
        with _without_import_messages(), warnings.catch_warnings():
            # 0.18 writes "\." in an ordinary string, of which Python warns where there is no .pyc yet.
            warnings.filterwarnings("ignore", r".*invalid escape sequence", module=r".*\btorchao\b")
            return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ImportError(f"fp8_torchao needs torchao ({error}): {INSTALL_COMMANDS['fp8_torchao']}") from None


def _transformer_engine() -> ModuleType:
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # OSError: the package is there, CUDA's libraries are not
        raise ImportError(f"fp8_te needs transformer-engine ({error}): {INSTALL_COMMANDS['fp8_te']}") from None


@contextmanager
def _without_import_messages() -> Iterator[None]:
    """Hide messages at the import of torchao that do not concern float8 training.

    torchao 0.18 logs each of its kernels that does not fit this machine, torch 2.13 how torchao registers an enum.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]

    def is_wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith("Failed to load") or "is an Enum subclass" in text)

    for logger in loggers:
        logger.addFilter(is_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_wanted)
