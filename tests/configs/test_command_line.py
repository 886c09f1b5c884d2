"""Commands: options in full, values between options, one line for a mistake before any work."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from configs.command_line import CommandParser, output_file, seed
from profiling.plan import __main__ as plan

pytestmark = pytest.mark.L0
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "data", "engine", "evaluation", "kernels", "model", "profiling")


def parser() -> CommandParser:
    made = CommandParser(prog="python -m profiling.plan")
    made.add_argument("--max-restarts", type=int)
    made.add_argument("--json", type=output_file)
    made.add_subparsers(dest="command").add_parser("index").add_argument("--processes", type=int)
    return made


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(arguments)
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_an_abbreviation_is_refused_with_the_option_that_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(["--max-restart=3"], capsys) == (
        "error: unrecognized arguments: --max-restart=3, did you mean --max-restarts?"
    )
    assert mistake(["--nothing-like-it"], capsys) == "error: unrecognized arguments: --nothing-like-it; see --help"
    assert mistake(["index", "--proc", "3"], capsys).startswith("error: unrecognized arguments: --proc 3")
    assert mistake(["--max-restarts", "many"], capsys) == (
        "error: argument --max-restarts: invalid int value: 'many'; see --help"
    )


def test_no_command_takes_abbreviations() -> None:
    """Every parser is a CommandParser, or says so itself where pydantic may be missing."""
    calls = (
        (path, node)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
    )
    taking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, node in calls
        if "allow_abbrev" not in [word.arg for word in node.keywords]
    ]
    assert taking == []


def test_the_directory_of_an_output_file_is_created_by_the_parser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser().parse_args(["--json", f"{tmp_path}/a/b/plans.json"]).json.parent.is_dir()
    (tmp_path / "file").write_text("")
    line = mistake(["--json", f"{tmp_path}/file/plans.json"], capsys)
    assert line.startswith(f"error: argument --json: {tmp_path}/file/plans.json cannot be written (")
    assert mistake(["--json", str(tmp_path)], capsys).endswith("is a directory: give the name of a file; see --help")
    assert "File name too long" in mistake(["--json", f"{tmp_path}/{'x' * 300}/plans.json"], capsys)


def test_a_seed_is_a_word_of_64_bits() -> None:
    assert seed(str(2**64 - 1)) == 2**64 - 1
    for text in ("-1", str(2**64), "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number from 0 to 2\^64 - 1"):
            seed(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--link", "nvlink,ib0"], "error: --link nvlink,ib0: .* in Gbit/s a GPU, from 1 on"),
        (["--samples", "nan"], "error: --samples nan: .* a finite number; give at least 1"),
        (["--samples", "inf"], "error: --samples inf: .* a finite number; give at least 1"),
        (["batch.clp=3"], "error: .*unknown key batch.clp"),
    ],
)
def test_the_planner_refuses_invalid_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides may stand between options, as for a run."""
    given = ["--config", "configs/vtp_b.yaml", "objectives.rec.lpips_weights=none", "--gpus", "8", *arguments]
    try:
        code = plan.main(given)
    except SystemExit as left:
        code = int(str(left.code))
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error), error
