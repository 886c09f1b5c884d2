"""Asks in another process whether packages import: one that is broken, or takes its process along, harms nobody here.

    ask(["torch", "torchao"])
    # {"torch": Answer("ok", "2.13.0+cpu"), "torchao": Answer("broken", "ImportError: undefined symbol: _ZN3c10...")}

The file is the other process's program, too: `python profiling/checks/imports.py torch torchao` writes a line of
JSON for each. Where the process dies, the package it was at is the broken one, and a new process goes on after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

TIMEOUT_SECONDS = 300.0  # for all packages together


@dataclass(frozen=True)
class Answer:
    """`said` is the version where it is ok ("" where the package names none), else the reason."""

    state: Literal["ok", "absent", "broken"]
    said: str


def ask(modules: list[str]) -> dict[str, Answer]:
    """An answer for every module, in their order."""
    answers: dict[str, Answer] = {}
    end = time.monotonic() + TIMEOUT_SECONDS
    while waiting := modules[len(answers) :]:
        lines, fate = _run(waiting, max(1.0, end - time.monotonic()))
        for line in lines:
            module, state, said = json.loads(line)
            answers[module] = Answer(state, said)
        if len(lines) < len(waiting):
            answers[waiting[len(lines)]] = Answer("broken", fate)
    return answers


def _run(modules: list[str], seconds: float) -> tuple[list[str], str]:
    """The lines that came, and how the process ended."""
    with subprocess.Popen(
        [sys.executable, __file__, *modules], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, talk = process.communicate(timeout=seconds)
            last = talk.strip().splitlines()[-1:]
            fate = f"importing it ended the process (exit code {process.returncode}): {' '.join(last)}".rstrip(": ")
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            fate = f"importing it took more than {seconds:.0f} s"
    return out.splitlines(), fate


def _answer(module: str) -> tuple[str, str]:
    try:
        if find_spec(module.partition(".")[0]) is None:
            return "absent", "not installed"
        return "ok", str(getattr(import_module(module), "__version__", ""))
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines() or [""]
        return "broken", f"{type(error).__name__}: {said[0]}"


def _main(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries talk while they are imported
    for module in modules:
        print(json.dumps([module, *_answer(module)]), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # what libraries do at exit is no answer


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are no packages
    _main(sys.argv[1:])
