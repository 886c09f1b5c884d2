"""README and docs name only what exists: links, files, functions, modules, options, settings, make targets."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from configs import UserError, load_run
from engine import launch
from tests import architecture

pytestmark = pytest.mark.L0

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PACKAGES = (*architecture.PACKAGES, "tests")
FOLDERS = "|".join((*PACKAGES, "docs"))
SUFFIXES = "py|yaml|json|md|svg|png|safetensors|sbatch"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
FILE = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\.(?:{SUFFIXES}))\b")
TEST_FILE = re.compile(r"(?<![\w/])(test_\w+\.py)")
NAME_IN_FILE = re.compile(rf"`((?:{FOLDERS})/[\w/]+\.py): ([\w.]+)`")
MODULE = re.compile(rf"-m ((?:{'|'.join(PACKAGES)})[\w.]*)")
IMPORT = re.compile(r"^\s*from ([\w.]+) import (\w+)", re.MULTILINE)
MAKE = re.compile(r"(?:^    |`)make ([a-z-]+)", re.MULTILINE)
MOST_WORDS = 1000  # of README.md, as `wc -w` counts


def places(pattern: re.Pattern[str]) -> Iterator[tuple[str, Path, re.Match[str]]]:
    """Every match on every page, with `page:line` in front."""
    for page in PAGES:
        text = page.read_text()
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{page.relative_to(ROOT)}:{line}", page, match


def test_readme_has_at_most_a_thousand_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    wrong = []
    for where, page, match in places(LINK):
        target = match[1] or match[2]
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(f"{where} {target}")
    assert not wrong, "\n".join(wrong)


def test_every_file_named_exists() -> None:
    wrong = [
        f"{where} {match[1]}{moved(match[1])}" for where, _, match in places(FILE) if not (ROOT / match[1]).exists()
    ]
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    wrong += [f"{where} {match[1]}" for where, _, match in places(TEST_FILE) if match[1] not in tests]
    assert not wrong, "\n".join(wrong)


def test_every_page_named_by_the_code_exists() -> None:
    """In docstrings, comments and messages, in presets, in the Makefile."""
    sources = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    wrong = []
    for path in (*sources, ROOT / "Makefile"):
        names = re.findall(r"\bdocs/[\w./-]+\.(?:md|sbatch|yaml|json)", path.read_text())
        wrong += [f"{path.relative_to(ROOT)} {name}" for name in names if not (ROOT / name).exists()]
    assert not wrong, "\n".join(wrong)


def test_every_name_given_with_its_file_is_defined_there() -> None:
    """`engine/step.py: train_step` and `data/order.py: Order.locate`."""
    wrong = [
        f"{where} {match[1]}: {match[2]}{defined_in(match[2])}"
        for where, _, match in places(NAME_IN_FILE)
        if match[2] not in definitions(ROOT / match[1])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_named_exists() -> None:
    wrong = [f"{where} {match[1]}" for where, _, match in places(MODULE) if not is_program(match[1])]
    for where, _, match in places(IMPORT):
        path = ROOT / (match[1].replace(".", "/") + ".py")
        if match[1].split(".")[0] in PACKAGES and match[2] not in definitions(path):
            wrong.append(f"{where} from {match[1]} import {match[2]}")
    assert not wrong, "\n".join(wrong)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = [f"{where} make {match[1]}" for where, _, match in places(MAKE) if match[1] not in targets]
    assert not wrong, "\n".join(wrong)


def test_every_launch_command_has_options_and_settings_that_exist() -> None:
    """Parsed as by the launcher, with the settings resolved; whether the reader's files exist is not checked."""
    seen = 0
    for page in PAGES:
        for command in commands(page):
            if "engine/launch.py --" not in command or "..." in command:
                continue
            words = shlex.split(re.sub(r" \[[^\]]*\]", "", command), comments=True)  # without " [what is optional]"
            try:
                options = launch.parse(words[words.index("engine/launch.py") + 1 :])
                load_run(options.config, options.overrides)
            except UserError as error:
                pytest.fail(f"{page.relative_to(ROOT)}: {command}\n{error}")
            assert Path(options.ds_config).exists(), command
            seen += 1
    assert seen >= 10, "the pages show launch commands: are they still found?"


def test_every_option_and_subcommand_of_a_command_exists() -> None:
    """Searched in the source of the command's package and in the parser that all commands share."""
    wrong = []
    for page in PAGES:
        for command in commands(page):
            if (module := MODULE.search(command)) is None:
                continue
            known = options_in(module[1].split(".")[0])
            subcommand = re.match(r" ([a-z][a-z0-9_]*)(?= |$)", command[module.end() :])
            if subcommand and f'"{subcommand[1]}"' not in source_of(module[1].split(".")[0]):
                wrong.append(f"{page.relative_to(ROOT)}: {module[1]} {subcommand[1]}")
            options = re.findall(r"(?<=[ \[])--[a-z][\w-]*", command[module.end() :].split("#")[0])
            wrong += [f"{page.relative_to(ROOT)}: {module[1]} {option}" for option in options if option not in known]
    assert not wrong, "\n".join(wrong)


def test_the_figure_is_what_its_script_draws() -> None:
    folder = ROOT / "docs/images"
    names: dict[str, object] = {"__file__": str(folder / "architecture.py"), "__name__": "architecture"}
    exec(compile((folder / "architecture.py").read_text(), "architecture.py", "exec"), names)
    for name, palette in names["PALETTES"].items():  # type: ignore[attr-defined]
        drawn = names["draw"](palette)  # type: ignore[operator]
        assert (folder / f"architecture-{name}.svg").read_text() == drawn, "run python docs/images/architecture.py"


def test_the_list_of_files_is_that_of_the_tree() -> None:
    page = architecture.PAGE.read_text()
    assert architecture.with_file_list(page, architecture.file_list()) == page, (
        "docs/architecture.md is not that of the tree: run python -m tests.architecture --update"
    )


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page
    decisions = (ROOT / "docs/decisions/README.md").read_text()
    for page in (ROOT / "docs/decisions").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in decisions, page


def test_the_checks_find_what_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "nowhere.md"
    wrong = (
        "[a](b.md) `engine/none.py` `engine/launch.py: none` `python -m engine.none` `make nothing`\n"
        "    python -m engine.consolidate runs/demo --nothing\n"
    )
    monkeypatch.setattr(
        Path, "read_text", lambda self, *_, _read=Path.read_text: wrong if self == page else _read(self)
    )
    monkeypatch.setattr("tests.test_docs.PAGES", (page,))
    for check in (
        test_every_relative_link_leads_to_a_file_and_a_heading,
        test_every_file_named_exists,
        test_every_name_given_with_its_file_is_defined_there,
        test_every_module_named_exists,
        test_every_make_target_named_exists,
        test_every_option_and_subcommand_of_a_command_exists,
    ):
        with pytest.raises(AssertionError, match=r"docs/nowhere\.md"):
            check()


def commands(page: Path) -> Iterator[str]:
    """Indented lines, continued ones joined, and commands in backticks."""
    text = page.read_text().replace("\\\n", " ")
    yield from re.findall(r"^ {4,}(?:\$ )?(.*(?:launch\.py|-m ).*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]*-m [^`\n]*)`", text)


@lru_cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@lru_cache
def definitions(path: Path) -> frozenset[str]:
    """Classes, functions, methods (`Class.method`) and constants of a module."""
    if not path.exists():
        return frozenset()
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return frozenset(names)


def moved(name: str) -> str:
    """A remark on where files of that name are."""
    there = [str(path.relative_to(ROOT)) for folder in PACKAGES for path in (ROOT / folder).rglob(Path(name).name)]
    return f" (now {', '.join(there)}?)" if there else ""


def defined_in(name: str) -> str:
    """A remark on where that name is defined."""
    paths = (path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
    there = [str(path.relative_to(ROOT)) for path in paths if name in definitions(path)]
    return f" (now in {', '.join(there)}?)" if there else ""


def is_program(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    path = ROOT / module.replace(".", "/")
    return (path / "__main__.py").exists() or (
        path.with_suffix(".py").exists() and "__main__" in path.with_suffix(".py").read_text()
    )


@lru_cache
def options_in(package: str) -> frozenset[str]:
    """Every string like "--option" in a package's source and in that of `configs`."""
    source = source_of(package) + source_of("configs")
    return frozenset(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", source)) | {"--help"}


@lru_cache
def source_of(package: str) -> str:
    """All modules of a package, one after the other."""
    return "\n".join(path.read_text() for path in sorted((ROOT / package).rglob("*.py")))
