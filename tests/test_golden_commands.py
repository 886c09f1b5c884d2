"""What commands write holds the same names and the same bytes as when it was written down in tests/golden/commands.

    python -m tests.test_golden_commands                 # rewrites tests/golden/commands, after a change that is meant
    python -m tests.test_golden_commands latents         # or those products alone

The products are those of tests/golden_commands.py.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_golden import GOLDEN, machine
from tests.golden_commands import HAS_ONNX, PRODUCTS, SLOW, Tree, made

COMMANDS = GOLDEN / "commands"


def golden(name: str) -> tuple[str, Tree]:
    """The machine that wrote a product down, and the product."""
    tree = json.loads((COMMANDS / f"{name}.json").read_text())
    return tree.pop("machine"), tree


def names_of(value: Any) -> Any:
    """Without numbers and digests, which another processor, or another library that draws or encodes, may change."""
    if isinstance(value, dict):
        return {names_of(key): names_of(each) for key, each in value.items()}
    if isinstance(value, list):
        return [names_of(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]{6,}|\d+ % acc", "DIGEST", value)
    return value if isinstance(value, bool) or value is None else 0


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tree]:
    """Of the products that were selected (-k, -m), and of those that they need."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    names = [item.callspec.params["name"] for item in items if item.path == Path(__file__)]
    return made(tmp_path_factory.mktemp("commands"), names)


@pytest.mark.filterwarnings("ignore")  # of libraries in commands; what a command prints is tested where it is
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.L2 if name in SLOW else pytest.mark.L1) for name in PRODUCTS]
)
def test_a_command_writes_what_it_wrote(found: dict[str, Tree], name: str) -> None:
    writer, expected = golden(name)
    if not HAS_ONNX:
        expected.pop("onnx", None)
    if writer == machine(name):
        assert found[name] == expected
    else:
        assert names_of(found[name]) == names_of(expected)


def main(names: Iterable[str]) -> None:
    """Rewrites the named products, or all."""
    chosen = set(names) or set(PRODUCTS)
    with tempfile.TemporaryDirectory() as folder:
        trees = made(Path(folder).resolve(), chosen)
    COMMANDS.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        tree = {"machine": machine(name)} | trees[name]
        (COMMANDS / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
