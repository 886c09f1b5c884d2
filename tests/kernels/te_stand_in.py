"""A stand-in for Transformer Engine 2.20, which needs CUDA even to be imported: names and parameter lists as facts of
its published wheel, plain PyTorch inside, and the library's own demands on shapes and dtypes.

    with installed() as te:           # `import transformer_engine.pytorch` now finds it
        ...
    te.regions                        # the arguments of every autocast that was entered
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Constructor parameters in their order, read off transformer_engine-2.20.2-py3-none-any.whl.
SIGNATURES = {
    "Linear": """in_features out_features sequence_parallel fuse_wgrad_accumulation tp_group tp_size
        get_rng_state_tracker rng_tracker_name init_method bias return_bias params_dtype parallel_mode parameters_split
        device ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad ub_name delay_wgrad_compute
        symmetric_ar_type save_original_input name""",
    "LayerNormLinear": """in_features out_features eps sequence_parallel fuse_wgrad_accumulation tp_group tp_size
        get_rng_state_tracker init_method bias normalization return_bias params_dtype parallel_mode
        return_layernorm_output return_layernorm_output_gathered parameters_split zero_centered_gamma device
        ub_overlap_ag ub_overlap_rs ub_overlap_rs_dgrad ub_bulk_wgrad ub_bulk_dgrad ub_name delay_wgrad_compute
        symmetric_ar_type name""",
    "LayerNormMLP": """hidden_size ffn_hidden_size eps sequence_parallel return_bias get_rng_state_tracker tp_group
        tp_size init_method bias normalization activation activation_params output_layer_init_method
        fuse_wgrad_accumulation params_dtype return_layernorm_output return_layernorm_output_gathered seq_length
        micro_batch_size set_parallel_mode zero_centered_gamma device ub_overlap_ag name ub_overlap_rs
        ub_overlap_rs_dgrad ub_bulk_dgrad ub_bulk_wgrad delay_wgrad_compute symmetric_ar_type checkpoint""",
    "autocast": "enabled calibrating recipe amax_reduction_group _graph",
}
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling", "Float8BlockScaling", "NVFP4BlockScaling")


def bind(name: str, *arguments: Any, **named: Any) -> dict[str, Any]:
    """The arguments by name; TypeError for one that the real signature does not have."""
    parameters = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD, default=None) for each in SIGNATURES[name].split()]
    return Signature(parameters).bind(*arguments, **named).arguments


class Library(ModuleType):
    """transformer_engine.pytorch, remembering what was made and which FP8 regions were entered."""

    def __init__(self) -> None:
        super().__init__("transformer_engine.pytorch")
        self.made: list[dict[str, Any]] = []
        self.regions: list[dict[str, Any]] = []
        self.calls_in_fp8 = 0
        self.depth = 0

    def make(self, kind: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        bound = bind(kind, *arguments, **named)
        self.made.append({"kind": kind, **bound})
        return bound

    def check(self, module: nn.Module, x: Tensor) -> None:
        """What the real modules refuse: mixed dtypes; in FP8 also rows and columns that do not divide."""
        wrong = [name for name, p in module.named_parameters() if p.dtype != x.dtype or p.device.type == "meta"]
        assert not wrong, f"parameters without storage or of another dtype than the input: {wrong}"
        if self.depth:
            self.calls_in_fp8 += 1
            assert x.shape[0] % 8 == 0, f"{x.shape[0]} rows"
            assert x.shape[1] % 16 == 0, f"{x.shape[1]} columns"

    def autocast(self, *arguments: Any, **named: Any) -> Any:
        return _region(self, bind("autocast", *arguments, **named))


@contextmanager
def installed() -> Iterator[Library]:
    """The stand-in under the real library's names."""
    library, recipe = Library(), ModuleType("transformer_engine.common.recipe")
    for name in RECIPES:
        setattr(recipe, name, type(name, (), {}))
    for kind in (_Linear, _LayerNormLinear, _LayerNormMlp):
        setattr(library, kind.kind, lambda *a, kind=kind, **k: kind(library, a, k))
    top, common = ModuleType("transformer_engine"), ModuleType("transformer_engine.common")
    modules = {module.__name__: module for module in (top, common, recipe, library)}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield library
    finally:  # one by one: what torch imported meanwhile stays
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _region(library: Library, bound: dict[str, Any]) -> Iterator[None]:
    library.regions.append(bound)
    library.depth += 1
    try:
        yield
    finally:
        library.depth -= 1


class _Module(nn.Module):
    kind = ""

    def __init__(self, library: Library, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.library = library
        bound = library.make(self.kind, arguments, named)
        self.eps, self.normalization = bound.get("eps", 1e-5), bound.get("normalization", "LayerNorm")
        self.activation = bound.get("activation", "gelu")
        self.like = {"device": bound["device"], "dtype": bound["params_dtype"]}
        self.build(*list(bound.values())[:2])

    def build(self, first: int, second: int) -> None:
        raise NotImplementedError

    def parameter(self, name: str, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(*shape, **self.like)))

    def norm_parameters(self, width: int) -> None:
        self.parameter("layer_norm_weight", width)
        if self.normalization == "LayerNorm":
            self.parameter("layer_norm_bias", width)

    def norm(self, x: Tensor) -> Tensor:
        weight = self.layer_norm_weight.float()
        if self.normalization == "RMSNorm":
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), weight.shape, weight, self.layer_norm_bias.float(), self.eps).to(x.dtype)


class _Linear(_Module):
    kind = "Linear"

    def build(self, first: int, second: int) -> None:
        self.parameter("weight", second, first)
        self.parameter("bias", second)

    def forward(self, inp: Tensor) -> Tensor:
        self.library.check(self, inp)
        return F.linear(inp, self.weight, self.bias)


class _LayerNormLinear(_Linear):
    kind = "LayerNormLinear"

    def build(self, first: int, second: int) -> None:
        super().build(first, second)
        self.norm_parameters(first)

    def forward(self, inp: Tensor) -> Tensor:
        return super().forward(self.norm(inp))


class _LayerNormMlp(_Module):
    kind = "LayerNormMLP"

    def build(self, first: int, second: int) -> None:
        self.norm_parameters(first)
        self.parameter("fc1_weight", 2 * second, first)
        self.parameter("fc1_bias", 2 * second)
        self.parameter("fc2_weight", first, second)
        self.parameter("fc2_bias", first)

    def forward(self, inp: Tensor) -> Tensor:
        assert self.activation == "swiglu"
        self.library.check(self, inp)
        gate, value = F.linear(self.norm(inp), self.fc1_weight, self.fc1_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.fc2_weight, self.fc2_bias)
