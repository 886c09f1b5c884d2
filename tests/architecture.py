"""The list of files in docs/architecture.md, made of module docstrings.

python -m tests.architecture                # print the list
python -m tests.architecture --update       # write it into docs/architecture.md
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("configs", "kernels", "data", "model", "engine", "profiling", "evaluation")
BEGIN, END = "<!-- files: python -m tests.architecture --update -->\n", "<!-- end of files -->\n"
MAX_LINE = 150  # characters of a line; longer docstrings are cut at a word


def file_list(root: Path = ROOT) -> str:
    """A code block for each folder: its own docstring, then a line for each file."""
    return "\n".join(_folder(root, folder) for package in PACKAGES for folder in _folders(root / package))


def with_file_list(page: str, files: str) -> str:
    """Return the page with the list between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE.relative_to(ROOT)} lacks the markers {BEGIN.strip()} and {END.strip()}"
    return f"{before}{BEGIN}\n{files}\n{END}{after}"


def _folders(top: Path) -> list[Path]:
    return [top, *sorted(path for path in top.rglob("*") if path.is_dir() and any(path.glob("*.py")))]


def _folder(root: Path, folder: Path) -> str:
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    width = max((len(path.name) for path in files), default=0)
    about = _first_sentence(folder / "__init__.py")
    lines = [f"    {path.name:<{width}}  {_first_sentence(path)}".rstrip() for path in files]
    return "\n".join([f"`{folder.relative_to(root)}/`{f': {about}' if about else ''}", "", *map(_cut, lines), ""])


def _first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring; empty where there is no module or no docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
    paragraph = " ".join((docstring or "").split("\n\n", 1)[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def _cut(line: str) -> str:
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 4].rsplit(" ", 1)[0].rstrip(" ,;:") + " ..."


def main(arguments: list[str]) -> None:
    """Print the list, or with --update write it into the page."""
    if arguments == ["--update"]:
        PAGE.write_text(with_file_list(PAGE.read_text(), file_list()))
    else:
        assert not arguments, __doc__
        print(file_list())


if __name__ == "__main__":
    main(sys.argv[1:])
