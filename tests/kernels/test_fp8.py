"""Float8 products against the oracle that rounds and multiplies in plain PyTorch; the rule of what pays; the door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels import fp8
from kernels.fp8 import E4M3, E5M2, SMALL, LinearBackend, float8_reference, resolve_linears, to_torchao, torchao_linear
from tests.float8_count import float8_products

pytestmark = pytest.mark.L0
ROOT = Path(__file__).resolve().parents[2]
sides = st.integers(1, 6).map(lambda sixteenths: 16 * sixteenths)


def _operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and the gradient that comes back, bf16."""
    generator = torch.Generator().manual_seed(m + 1000 * k + n)
    shapes = ((m, k), (n, k), (n,), (m, n))
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in shapes)  # type: ignore[return-value]


def _with_gradients(linear, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@given(m=st.integers(1, 70), k=sides, n=sides)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_torchao_equals_the_oracle_in_values_and_gradients(m: int, k: int, n: int) -> None:
    operands = _operands(m, k, n)
    ours, theirs = _with_gradients(torchao_linear(), *operands), _with_gradients(float8_reference, *operands)
    for found, expected in zip(ours, theirs, strict=True):
        # The same roundings; the order of sums may differ. Worst seen 3.1e-4; e4m3 for gradients is 3.5e-2 off.
        assert _distance(found, expected) < 1e-3


def test_a_converted_layer_computes_the_same_and_keeps_its_parameters() -> None:
    x, weight, bias, _ = _operands(24, 64, 32)
    holder = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16), nn.Linear(32, 32, dtype=torch.bfloat16))
    with torch.no_grad():
        holder[0].weight.copy_(weight)
        holder[0].bias.copy_(bias)
    before, plain = dict(holder.named_parameters()), holder[1](holder[0](x))
    to_torchao(holder, [holder[0]])
    assert {name: id(p) for name, p in holder.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert torch.equal(holder[0](x), torchao_linear()(x, weight, bias))
    assert type(holder[1]) is nn.Linear
    assert _distance(holder[1](holder[0](x)), plain) > 1e-3


def test_the_products_run_in_float8_and_err_as_float8_does() -> None:
    operands = _operands(64, 128, 96)
    with float8_products() as products:
        ours = _with_gradients(torchao_linear(), *operands)
    assert products == [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3)]  # output, input's and weight's gradient
    plain = _with_gradients(F.linear, *operands)
    exact = _with_gradients(F.linear, *(t.float() for t in operands))
    # Three mantissa bits round by 2.6 % (root mean square over a binade), two by 5 %; two operands add up: seen 3.6 %
    # and 5.8 %. bf16: 0.2 %.
    for found, bf16, truth, low, high in zip(
        ours[:3], plain, exact, (0.02, 0.04, 0.04), (0.05, 0.08, 0.08), strict=False
    ):
        assert low < _distance(found, truth) < high
        assert _distance(bf16, truth) < 0.005
    torch.testing.assert_close(ours[3], plain[3])  # the bias is added in bf16


@pytest.mark.parametrize(
    ("k", "n", "m", "obstacle"),
    [
        (1024, 3072, 16_448, None),  # VTP-L: qkv pays,
        (1024, 1024, 16_448, SMALL),  # the output projection does not,
        (1024, 2736, 16_448, None),  # gate and value do,
        (2736, 1024, 16_448, SMALL),  # the way back does not
        (768, 2304, 16_448, SMALL),  # VTP-B is too narrow
        (1536, 4096, 8192, None),
        (1536, 4096, 512, SMALL),  # too few tokens
        (2048, 1024, 1024, SMALL),  # torchao measured 0.80
        (8192, 16_384, 4096, None),  # and 1.39
        (1024, 2730, 16_448, "with a side that is no multiple of 16"),
    ],
)
def test_a_product_becomes_fp8_where_it_pays(k: int, n: int, m: int, obstacle: str | None) -> None:
    assert LinearBackend("fp8_torchao", "", is_gated_by_speed=True).why_not_fp8(k, n, m) == obstacle


def test_without_a_gain_to_expect_only_the_shape_counts() -> None:
    on_cpu = resolve_linears("fp8_torchao", "cpu")
    assert on_cpu.why_not_fp8(32, 48, 5) is None
    assert on_cpu.why_not_fp8(32, 40, 5) == "with a side that is no multiple of 16"
    assert "emulated on cpu" in on_cpu.reason


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("fp4", torch.bfloat16, "'fp4' is not a kind of linear layer; choose bf16, fp8_torchao or fp8_te"),
        ("fp8_torchao", torch.float32, "fp8_torchao with torch.float32 parameters: FP8 products take and give bf16"),
        ("fp8_te", torch.bfloat16, "fp8_te on cpu: Transformer Engine needs an NVIDIA GPU; use bf16, or fp8_torchao"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_remedy(name: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=r"^" + message.replace(".", r"\.")):
        resolve_linears(name, "cpu", dtype)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.0: FP8 begins at 8\.9"):
        resolve_linears("fp8_torchao", "cuda")


@pytest.mark.parametrize("prelude", ["", "sys.modules['torchao'] = None;"], ids=["installed", "missing"])
def test_the_library_comes_in_without_talk_or_is_named_with_its_extra(prelude: str) -> None:
    """In a process of its own: an import happens once."""
    program = f"import sys, warnings; warnings.simplefilter('error'); {prelude} from kernels import fp8\n"
    program += "try:\n    fp8.torchao_linear(); print(fp8.resolve_linears('fp8_torchao', 'cpu').name)\n"
    program += "except ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("fp8_torchao needs torchao (" if prelude else "fp8_torchao\n")
    assert ("pip install -e '.[gpu]'" in done.stdout) == bool(prelude)


def of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """The next import of torchao.float8 compiles this source: nothing is imported yet, and no .pyc is there."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    (tmp_path / "torchao" / "float8.py").write_text(source)
    known = [name for name in sys.modules if name.partition(".")[0] == "torchao"]
    for name in {*known, "torchao", "torchao.float8"}:
        monkeypatch.setitem(sys.modules, name, sys)  # put back afterwards, or away where it was not there
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_torchaos_invalid_escape_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_source(tmp_path, monkeypatch, 'PATTERN = "layers\\.0"\n')
    assert fp8._torchao.__wrapped__().PATTERN == r"layers\.0"


def test_another_warning_of_torchao_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_source(tmp_path, monkeypatch, 'import warnings\nwarnings.warn("old", DeprecationWarning)\n')
    with pytest.raises(DeprecationWarning, match="old"):
        fp8._torchao.__wrapped__()
