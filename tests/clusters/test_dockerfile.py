"""The Dockerfile cannot be built here; what it says can be held against the package."""

import ast
import re

import pytest

from tests.engine.small_runs import ROOT

pytestmark = pytest.mark.L0

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILT_IN_THE_IMAGE = {"torch", "nvidia-dali-cuda130"}
FROM_THE_GPU_EXTRA = {"torchao"}  # the image has the others: flash-attn, transformer-engine; xformers is an alternative


def package_name(requirement: str) -> str:
    return re.split(r"[\[<>=;]", requirement)[0]


def requirements() -> dict[str, str]:
    """What setup.py asks for, by name."""
    [call] = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    [asked] = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "install_requires"]
    return {package_name(requirement): requirement for requirement in asked}


def installed() -> dict[str, str]:
    """What the image gets by pip beside the engine, by name."""
    [step] = [step for step in DOCKERFILE.split("\nRUN ") if step.startswith("pip install") and "deepspeed" in step]
    words = step.split("\n\n")[0].replace("\\\n", " ").replace('"', "").split()[2:]
    return {package_name(word): word for word in words if not word.startswith("--")}


def test_the_image_gets_every_package_that_the_engine_needs() -> None:
    assert installed().keys() == requirements().keys() - BUILT_IN_THE_IMAGE | FROM_THE_GPU_EXTRA


def test_what_is_pinned_is_what_was_tested() -> None:
    pins = {word for word in installed().values() if "==" in word}
    assert len(pins) == 5
    assert pins <= {line.split(" ;")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}


def test_the_oldest_torch_is_the_one_of_setup() -> None:
    oldest = re.search(r"torch>=(\d+)\.(\d+)", requirements()["torch"])
    assert oldest is not None
    assert f">= ({oldest[1]}, {oldest[2]})" in DOCKERFILE


def test_the_engine_is_where_the_manifests_look_for_it() -> None:
    [home] = re.findall(r"^WORKDIR (.+)$", DOCKERFILE, re.MULTILINE)
    for name in ("pytorchjob", "trainjob"):
        assert f"workingDir: {home}\n" in (ROOT / "docs" / "clusters" / f"{name}.yaml").read_text()
