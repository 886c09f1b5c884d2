"""python -m profiling.doctor [--quick] [--json]: what this machine has, what a run would use of it, what is missing.

    python -m profiling.doctor --config configs/vtp_l.yaml --ds_config configs/deepspeed/zero3_offload.json

Versions, devices, every backend with usable / why not / how to get it, what each `auto` of the config becomes here, the
system's limits, and two quick measurements. Exit code 0: a run is possible; 1: something it needs is missing, and the
last line says what.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from profiling.checks.devices import gpus, processor
from profiling.checks.finding import Finding, carefully
from profiling.checks.imports import Answer, ask
from profiling.checks.limits import limits
from profiling.checks.packages import INSTALL, PACKAGES, packages

ENGINE = ("torch", "deepspeed", "tensorboard")  # what checks import that import the engine
LOADER = ("torch", "nvidia.dali", "tokenizers", "webdataset", "fsspec")
PRESETS = Path(__file__).resolve().parent.parent / "configs"
MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    options = _parse(arguments)
    groups: dict[str, list[Finding]] = {}
    talk = io.StringIO()  # what libraries print while they are imported
    for group, check in _groups(options):
        with redirect_stdout(talk):
            groups[group] = check()
        if not options.json:
            _show(group, groups[group])
    lacking = [found for group in groups.values() for found in group if found.is_needed and found.state != "ok"]
    device = "GPU" if any(found.name.startswith("GPU ") for found in groups["devices"]) else "CPU"
    if options.json:
        findings = {group: [vars(found) for found in found_here] for group, found_here in groups.items()}
        names = [found.name for found in lacking]
        print(
            json.dumps({"is_possible": not lacking, "device": device, "missing": names, "groups": findings}, indent=2)
        )
    elif lacking:
        print("No run is possible yet:", *(f"  {found.name}: {found.remedy}" for found in lacking), sep="\n")
    else:
        print(f"A run is possible here, on the {device}.")
    return 1 if lacking else 0


def _groups(options: argparse.Namespace) -> Iterable[tuple[str, Callable[[], list[Finding]]]]:
    """Name and check of each group, in the order of the page."""
    answers: dict[str, Answer] = {}

    def versions() -> list[Finding]:
        answers.update(ask([package.module for package in PACKAGES]))
        return carefully("packages", lambda: packages(answers), INSTALL, is_needed=True)

    yield "versions", versions
    look = partial(_careful, answers)
    yield "devices", lambda: [*look("CPU", processor, ("torch",)), *look("GPU", gpus, ("torch",), is_needed=False)]
    yield "backends", lambda: _backends(options, answers)
    yield "system", lambda: look("limits", partial(limits, Path.cwd()))
    if not options.quick:
        yield "speed", lambda: _speed(answers)


def _backends(options: argparse.Namespace, answers: dict[str, Answer]) -> list[Finding]:
    def load() -> list[Finding]:
        from configs import UserError, load_config
        from configs.ds import load_ds_config
        from profiling.checks import backends

        try:
            config = load_config(options.config)
            plan = backends.Plan(config, load_ds_config(options.ds_config, config, world_size=1))
        except UserError as error:
            return [Finding("config", "broken", str(error), "name another --config or --ds_config", is_needed=True)]
        return [
            *look("attention", partial(backends.attention, plan, answers), ENGINE),
            *look("linear", partial(backends.products, plan, answers), ENGINE),
            *look("optimizer", partial(backends.optimizers, plan, answers), ENGINE),
            *look("compile", partial(backends.compiling, plan, answers), ENGINE),
            *look("decoding", backends.decoding, ("nvidia.dali",)),
            *look("energy", partial(backends.energy, plan), is_needed=False),
        ]

    look = partial(_careful, answers)
    return look("backends", load, ("pydantic", "torch"))


def _speed(answers: Mapping[str, Answer]) -> list[Finding]:
    from profiling.checks import speed

    return [
        *_careful(answers, "product", speed.products, ("torch",)),
        *_careful(answers, "loader", speed.loading, LOADER),
    ]


def _careful(
    answers: Mapping[str, Answer],
    name: str,
    check: Callable[[], Iterable[Finding]],
    modules: tuple[str, ...] = (),
    is_needed: bool = True,
) -> list[Finding]:
    """What `check` finds, if the `modules` it imports were seen to import: some breakages end the process."""
    broken = [module for module in modules if module in answers and answers[module].state != "ok"]
    if broken:
        said = f"not looked at: {' and '.join(broken)} cannot be imported"
        return [Finding(name, "broken", said, f"mend {' and '.join(broken)} first (see versions)", is_needed)]
    return carefully(name, check, f"mend what it names; {INSTALL}", is_needed)


def _show(group: str, findings: list[Finding]) -> None:
    try:
        from rich.console import Console
    except ImportError:  # what is missing should still be told
        for found in findings:
            print(f"{group}: {found.name}: {found.state}: {found.said}", f"  -> {found.remedy}" * bool(found.remedy))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=group, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for found in findings:
        remedy = f"\n[dim]-> {escape(found.remedy)}[/]" if found.remedy else ""
        table.add_row(found.name, MARKS[found.state], escape(found.said) + remedy)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    console.print()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=PRESETS / "vtp_l.yaml", help="the run to choose for")
    parser.add_argument("--ds_config", type=Path, default=PRESETS / "deepspeed" / "zero3.json", help="its layout")
    parser.add_argument("--quick", action="store_true", help="without the measurements")
    parser.add_argument("--json", action="store_true", help="for other programs: the same as JSON, nothing else")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
