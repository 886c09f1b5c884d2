"""The house's rules, read off the source: who may import whom, one door per heavy library, one class per name.

    broken_rules(ROOT)         # [] or ["data/loader.py:24 imports model: data may import configs only", ...]

The walk is over the syntax tree, so an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.L0

ROOT = Path(__file__).resolve().parent.parent
ALL = ("configs", "kernels", "data", "model", "profiling", "engine", "evaluation")
# A package, or a folder in one: the longest name that fits a file counts. Instruments lie below the engine, the
# programs of profiling above it; of these the engine uses the predictions of profiling/cost alone.
MAY_IMPORT = {
    "configs": (),
    "kernels": (),
    "data": ("configs",),
    "model": ("configs", "kernels"),
    "profiling/instruments": ("configs",),
    "profiling": ALL,
    "engine": ("configs", "kernels", "data", "model", "profiling/instruments", "profiling/cost"),
    "evaluation": ALL,
}
# configs is imported before anything else, to report a typo in milliseconds.
LIGHT = (*sys.stdlib_module_names, "yaml", "pydantic")
# library: the files that may touch it. A folder ends with a slash.
DOORS = {
    "deepspeed": ("engine/zero/",),
    "torch.distributed": ("engine/distributed.py",),
    "nvidia": ("data/decode.py",),
    "webdataset": ("data/corpus.py",),
    "fsspec": ("data/remote.py",),
    "tokenizers": ("data/captions.py",),
    "huggingface_hub": ("data/captions.py", "model/hub.py"),
    "transformer_engine": ("kernels/fp8.py",),
    "torchao": ("kernels/fp8.py",),
    "flash_attn": ("kernels/attention.py",),
    "flash_attn_interface": ("kernels/attention.py",),
    "xformers": ("kernels/xformers_attention.py",),
    "triton": ("kernels/",),
    "apex": ("engine/optim.py",),
    "pynvml": ("profiling/instruments/energy.py",),
    "tensorboard": ("engine/reporting/sinks.py",),
    "torch.utils.tensorboard": ("engine/reporting/sinks.py",),
    "matplotlib": ("profiling/report/plots.py", "evaluation/plots.py"),
    "torchmetrics": ("evaluation/fid.py",),
    "jinja2": ("profiling/report/page.py",),
}
SAYS_NOTHING = re.compile(r"^_?(utils?|helpers?|misc|common)$")


def broken_rules(root: Path) -> list[str]:
    """Every breach in the packages below `root`, as `file:line what: rule`."""
    found = []
    for package in ALL:
        for path in sorted((root / package).rglob("*.py")):
            tree, place = ast.parse(path.read_text()), path.relative_to(root)
            found += [f"{place}:{line} {breach}" for line, breach in _breaches(tree, place)]
    return list(dict.fromkeys(found))


def _breaches(tree: ast.Module, place: Path) -> Iterator[tuple[int, str]]:
    names = list(_imported(tree))
    yield from _wrong_directions(names, place)
    yield from _forced_doors(names + list(_attributes(tree)), place)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.names[0].name == "*"):
            yield node.lineno, f"imports * or relatively from {node.module}: every name is imported in full"
    if place.name == "__init__.py":
        yield from _code_in_init(tree)
    if any(SAYS_NOTHING.match(Path(part).stem) for part in place.parts):
        yield 1, "is named after nothing: a module is named by its noun"
    if place.stem in sys.stdlib_module_names:
        yield 1, f"is named like the standard library's {place.stem}: a script beside it would import it"


def _wrong_directions(names: list[tuple[int, str]], place: Path) -> Iterator[tuple[int, str]]:
    package = max((name for name in MAY_IMPORT if f"{place}".startswith(f"{name}/")), key=len)
    allowed = MAY_IMPORT[package]
    for line, name in names:
        top, folder = name.split(".")[0], "/".join(name.split(".")[:2])
        if top in ALL and not {top, folder} & {package, *allowed}:
            is_split = any(each.startswith(f"{top}/") for each in (package, *allowed))
            rule = f"{package} may import {', '.join(allowed) or 'nothing of ours'}"
            if not is_split or "." in name:  # of `from top import folder` the folder decides
                yield line, f"imports {folder.replace('/', '.') if is_split else top}: {rule}"
        if top in ("tests", "setup"):
            yield line, f"imports {top}: the product does not know its tests"
        if package == "configs" and top not in (*LIGHT, *ALL):
            yield line, f"imports {top}: configs imports the standard library, yaml and pydantic"


def _forced_doors(names: list[tuple[int, str]], place: Path) -> Iterator[tuple[int, str]]:
    for line, name in names:
        for library, doors in DOORS.items():
            is_inside = any(
                str(place) == door or (door.endswith("/") and str(place).startswith(door)) for door in doors
            )
            if (name == library or name.startswith(f"{library}.")) and not is_inside:
                yield line, f"touches {library}: its one door is {' or '.join(doors)}"


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` is both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, "torch.distributed.get_rank") for what is reached through a library imported elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith("torch."):
                yield node.lineno, dotted


def _code_in_init(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for number, node in enumerate(tree.body):
        is_docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if not (is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom)):
            yield node.lineno, "runs code in __init__.py: it holds a docstring, imports and __all__"


def test_the_tree_keeps_its_rules() -> None:
    assert broken_rules(ROOT) == []


def test_a_class_name_means_one_thing_in_the_whole_tree() -> None:
    defined: dict[str, list[str]] = {}
    for path in (path for package in ALL for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                defined.setdefault(node.name.lstrip("_"), []).append(f"{path.relative_to(ROOT)}")
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


def test_every_package_is_there_and_was_walked() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(ALL), "a new package needs a line in MAY_IMPORT"
    walked = [path for package in ALL for path in (ROOT / package).rglob("*.py")]
    assert len(walked) > 50, "the walk found hardly a file: is ROOT right?"


def test_every_package_is_installed() -> None:
    """An installation leaves out, without a word, a folder that setup.py does not name."""
    [names] = re.findall(r"packages=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    packages = [path.parent.relative_to(ROOT) for top in ALL for path in (ROOT / top).rglob("__init__.py")]
    assert sorted(re.findall(r'"(.+?)"', names)) == sorted(".".join(package.parts) for package in packages)


def test_every_door_in_use_is_there() -> None:
    """A door whose file was renamed would let nobody in and nobody notice."""
    in_use = ("engine/zero/", "engine/distributed.py", "data/decode.py", "data/corpus.py", "engine/reporting/sinks.py")
    in_use += ("profiling/report/plots.py", "profiling/report/page.py")
    assert [door for door in in_use if not (ROOT / door).exists()] == []


BAD = {
    "configs/schema.py": ("import torch", "imports torch: configs imports the standard library"),
    "configs/load.py": ("from data import order", "imports data: configs may import nothing of ours"),
    "kernels/attention.py": ("from configs import UserError", "imports configs: kernels may import nothing"),
    "kernels/fp8.py": (
        "import flash_attn_interface",
        "touches flash_attn_interface: its one door is kernels/attention.py",
    ),
    "data/loader.py": ("def f():\n    from model.packing import pack", "imports model: data may import configs"),
    "data/order.py": ("import nvidia.dali.fn as fn", "touches nvidia: its one door is data/decode.py"),
    "data/misc.py": ("", "is named after nothing"),
    "model/trunk.py": ("import data.batch", "imports data: model may import configs, kernels"),
    "model/heads.py": ("from torch import distributed", "touches torch.distributed: its one door"),
    "model/text.py": ("import torch\nx = torch.distributed.get_rank()", "touches torch.distributed"),
    "model/block.py": ("import triton.language as tl", "touches triton: its one door is kernels/"),
    "model/losses/clip.py": ("from .total import compute", "imports * or relatively"),
    "model/losses/helpers/one.py": ("", "is named after nothing"),
    "profiling/instruments/energy.py": (
        "from model import pack",
        "imports model: profiling/instruments may import configs",
    ),
    "profiling/instruments/memory.py": (
        "from profiling.cost import flops",
        "imports profiling.cost: profiling/instruments may import configs",
    ),
    "engine/trainer.py": (
        "from profiling.report.page import write_report",
        "imports profiling.report: engine may import configs",
    ),
    "engine/step.py": ("from evaluation.run import main", "imports evaluation: engine may import"),
    "engine/guard.py": ("import importlib\nimportlib.import_module('deepspeed')", "touches deepspeed"),
    "engine/optim.py": ("from configs import *", "imports * or relatively from configs"),
    "engine/queue.py": ("", "is named like the standard library's queue"),
    "engine/__init__.py": ('"""Doc."""\nprint("hello")', "runs code in __init__.py"),
    "evaluation/probe.py": ("from tests.tiny import tiny_config", "the product does not know its tests"),
}
GOOD = {
    "configs/__init__.py": '"""Doc."""\nfrom configs.schema import Config\n__all__ = ["Config"]',
    "kernels/norm.py": "import triton",
    "data/decode.py": "from nvidia.dali import types\nfrom configs import UserError",
    "model/decoder.py": "from kernels.attention import attend\nfrom model.block import Block\nimport torch",
    "profiling/instruments/energy.py": "def read():\n    import pynvml",
    "profiling/report/page.py": "from engine.checkpoint import reading",
    "engine/out_of_memory.py": "from profiling.cost.peak_memory import predict_peak\nfrom profiling import instruments",
    "engine/distributed.py": "import torch.distributed as dist",
    "engine/zero/build.py": "import deepspeed\nfrom deepspeed.utils import logger",
    "evaluation/run.py": "from engine.checkpoint import reading\nfrom data.held_out import HeldOutImages",
}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


@pytest.mark.parametrize("name", BAD)
def test_a_breach_is_found(name: str, tmp_path: Path) -> None:
    source, message = BAD[name]
    _write(tmp_path, {**GOOD, name: source})
    found = broken_rules(tmp_path)
    assert found, f"{name} with {source!r} went through"
    assert all(breach.startswith(f"{name}:") and message in breach for breach in found), found


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    _write(tmp_path, GOOD)
    assert broken_rules(tmp_path) == []
