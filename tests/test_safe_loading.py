"""Files are read without executing what they hold, and archives without writing what they name: read off the source,
and tried with a pickle that would leave a trace.

    unsafe_loads(ROOT)         # [] or ["model/weights.py:12 torch.load: give weights_only=True", ...]

Ranks send each other pickled objects (engine/distributed.py): they are processes of one run, and trust each other.
"""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from configs import UserError, load_run
from data.latents.channel_statistics import STATISTICS, read_channel_statistics
from data.latents.store import LatentStore
from engine.checkpoint.tensor_ranges import RangeReader
from evaluation.inception import read_inception
from model.generator.factory import read_generator
from model.public_layout import read_public
from model.weights import read_torch_tensors, read_weights
from tests.test_layering import ALL, ROOT

pytestmark = pytest.mark.L0

# Modules whose reading executes, or may: nothing of theirs is touched.
MODULES = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.package")
CALLS = (
    "eval", "exec", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.export.load",
    "torch.serialization.add_safe_globals", "pandas.read_pickle", "shutil.unpack_archive", "yaml.unsafe_load",
    "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all", "yaml.Loader", "yaml.FullLoader",
    "yaml.UnsafeLoader",
)  # fmt: skip
# Of archives: their members say where they are written; filter="data" refuses all but files below the folder.
METHODS = ("extract", "extractall")
ARGUMENTS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}


def unsafe_loads(root: Path) -> list[str]:
    """Every place below the packages of `root` that could run what a file holds, as `file:line what: rule`."""
    found = []
    for package in ALL:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            found += [f"{path.relative_to(root)}:{line} {breach}" for line, breach in _breaches(tree)]
    return list(dict.fromkeys(found))


def _breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    names = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            dotted = _dotted(node, names)
            if dotted in CALLS or any(dotted == module or dotted.startswith(f"{module}.") for module in MODULES):
                yield node.lineno, f"{dotted}: it executes what it reads, or may; use safetensors or JSON"
        if isinstance(node, ast.Call):
            yield from _call(node, _dotted(node.func, names), tree)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for module in set(modules) & set(MODULES):
                yield node.lineno, f"imports {module}: it executes what it reads; use safetensors or JSON"


def _call(node: ast.Call, dotted: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if dotted in ARGUMENTS:
        name, value = ARGUMENTS[dotted]
        given = [k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)]
        if given != [value]:
            yield node.lineno, f"{dotted}: give {name}={value}"
    if dotted == "yaml.load":
        loaders = [k.value.id for k in node.keywords if k.arg == "Loader" and isinstance(k.value, ast.Name)]
        if not loaders or not set(loaders) <= set(_safe_loaders(tree)):
            yield node.lineno, "yaml.load: use yaml.safe_load, or a Loader of this file that derives from SafeLoader"
    filters = [k.value.value for k in node.keywords if k.arg == "filter" and isinstance(k.value, ast.Constant)]
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and filters != ["data"]:
        yield node.lineno, f".{node.func.attr}: an archive's members say where they are written; read them in place"


def _names(tree: ast.Module) -> dict[str, str]:
    """What a name stands for: {"np": "numpy", "loads": "pickle.loads"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _safe_loaders(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]:
            yield node.name


def test_nothing_in_the_product_executes_what_it_reads() -> None:
    assert unsafe_loads(ROOT) == []


BAD = [
    "import torch\ntorch.load(path)",
    "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=flag)",
    "import torch as t\nt.load(path, map_location='cpu')",
    "from torch import load\nload(path)",
    "from torch import load as read\nread(path)",
    "import numpy as np\nnp.load(path)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "import pickle",
    "def f():\n    from pickle import loads\n    return loads(data)",
    "import marshal\nmarshal.loads(data)",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "import yaml\nclass Mine(yaml.Loader): ...\nyaml.load(text, Loader=Mine)",
    "from yaml import unsafe_load\nunsafe_load(text)",
    "eval(text)",
    "exec(text)",
    "import torch\ntorch.jit.load(path)",
    "import torch\ntorch.hub.load('someone/thing', 'net')",
    "import tarfile\ntarfile.open(path).extractall(out)",
    "import zipfile\nzipfile.ZipFile(path).extract('a', out)",
    "import shutil\nshutil.unpack_archive(path, out)",
]
GOOD = [
    "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
    "import numpy as np\nnp.load(path, allow_pickle=False)",
    "import tarfile\ntarfile.open(path).extractall(out, filter='data')",
    "import yaml\nyaml.safe_load(text)",
    "import yaml\nclass Mine(yaml.SafeLoader): ...\nyaml.load(text, Loader=Mine)",
    "model.eval()\nstate.load(path)",
    "from safetensors.torch import load_file\nload_file(path)",
]


@pytest.mark.parametrize("source", BAD)
def test_a_load_that_could_execute_is_found(source: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "new.py").write_text(source)
    assert unsafe_loads(tmp_path), f"{source!r} went through"


@pytest.mark.parametrize("source", GOOD)
def test_a_load_that_cannot_is_left_alone(source: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fine.py").write_text(source)
    assert unsafe_loads(tmp_path) == []


# --- and the same, tried


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def public_directory(path: Path) -> object:
    (path.parent / "config.json").write_text("{}")
    (path.parent / "model.safetensors").write_bytes(path.read_bytes())
    return read_public(path.parent)


def pieces_of(path: Path) -> object:
    (path.parent / "rank-00000.safetensors").write_bytes(path.read_bytes())
    return RangeReader(path.parent)


def latent_store(path: Path) -> object:
    (path.parent / "latents_rank00_shard000.safetensors").write_bytes(path.read_bytes())
    return LatentStore(path.parent)


DOORS: dict[str, Callable[[Path], object]] = {
    "latent statistics": lambda path: read_channel_statistics(path.rename(path.with_name(STATISTICS)).parent, 16),
    "latents": latent_store,
    "perceptual network": read_torch_tensors,
    "feature network": read_inception,
    "weights": read_weights,
    "generator": read_generator,
    "public directory": public_directory,
    "checkpoint": pieces_of,
    "config": lambda path: load_run(path, []),
}


@pytest.mark.parametrize("form", ["a torch archive", "torch's old form", "a bare pickle"])
@pytest.mark.parametrize("door", DOORS)
def test_a_malicious_pickle_is_refused_and_not_executed(door: str, form: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    stored = {"mean": torch.zeros(16), "std": torch.ones(16), "trap": Trap(trace)}
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(stored))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=form == "a torch archive")
    with pytest.raises(UserError):
        DOORS[door](path)
    assert not trace.exists()


def test_the_trap_works_where_pickles_are_executed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path}/executed]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_run(path, [])
    assert not (tmp_path / "executed").exists()
