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
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from profiling.doctor import checks
from profiling.doctor.packages import (
    INSTALL,
    PACKAGES,
    CheckResult,
    ImportResult,
    check_packages,
    run_check,
    try_imports,
)

ENGINE = ("torch", "deepspeed", "tensorboard")  # imported by checks that import the engine
LOADER = ("torch", "nvidia.dali", "tokenizers", "webdataset", "fsspec")
PRESETS = Path(__file__).resolve().parents[2] / "configs"
MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    options = _parse(arguments)
    groups: dict[str, list[CheckResult]] = {}
    printed = io.StringIO()  # by libraries while they are imported
    for group, check in _groups(options):
        with redirect_stdout(printed):
            groups[group] = check()
        if not options.json:
            _show(group, groups[group])
    lacking = [result for group in groups.values() for result in group if result.is_needed and result.state != "ok"]
    device = "GPU" if any(result.name.startswith("GPU ") for result in groups["devices"]) else "CPU"
    if options.json:
        as_json = {group: [result.as_dict() for result in results] for group, results in groups.items()}
        report = {"is_possible": not lacking, "device": device, "missing": [result.name for result in lacking]}
        print(json.dumps(report | {"groups": as_json}, indent=2))
    elif lacking:
        print("No run is possible yet:", *(f"  {result.name}: {result.remedy}" for result in lacking), sep="\n")
    else:
        print(f"A run is possible here, on the {device}.")
    return 1 if lacking else 0


def _groups(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[CheckResult]]]]:
    """Name and check of each group, in the order of the page."""
    imports: dict[str, ImportResult] = {}

    def versions() -> list[CheckResult]:
        imports.update(try_imports([package.module for package in PACKAGES]))
        return run_check("packages", lambda: check_packages(imports), INSTALL, is_needed=True)

    yield "versions", versions
    check = partial(_check, imports)
    yield (
        "devices",
        lambda: [
            *check("CPU", checks.processor_and_memory, ("torch",)),
            *check("GPU", checks.gpus, ("torch",), is_needed=False),
        ],
    )
    yield "backends", lambda: _backends(options, imports)
    yield "system", lambda: check("limits", partial(checks.limits, Path.cwd()))
    if not options.quick:
        yield (
            "speed",
            lambda: [
                *check("product", checks.matmul_speed, ("torch",)),
                *check("loader", checks.loader_speed, LOADER),
            ],
        )


def _backends(options: argparse.Namespace, imports: dict[str, ImportResult]) -> list[CheckResult]:
    def load() -> list[CheckResult]:
        from configs import UserError, load_config
        from configs.deepspeed import load_ds_config

        try:
            config = load_config(options.config)
            run = checks.CheckedRun(config, load_ds_config(options.ds_config, config, world_size=1))
        except UserError as error:
            return [CheckResult("config", "broken", str(error), "name another --config or --ds_config", is_needed=True)]
        return [
            *check("attention", partial(checks.attention_backends, run, imports), ENGINE),
            *check("linear", partial(checks.linear_backends, run, imports), ENGINE),
            *check("optimizer", partial(checks.optimizers, run, imports), ENGINE),
            *check("compile", partial(checks.compilation, run, imports), ENGINE),
            *check("decoding", checks.decoding, ("nvidia.dali",)),
            *check("energy", partial(checks.energy, run), is_needed=False),
        ]

    check = partial(_check, imports)
    return check("backends", load, ("pydantic", "torch"))


def _check(
    imports: dict[str, ImportResult],
    name: str,
    check: Callable[[], Iterable[CheckResult]],
    modules: tuple[str, ...] = (),
    is_needed: bool = True,
) -> list[CheckResult]:
    """Results of `check`, if the `modules` it imports were seen to import: some breakages end the process."""
    broken = [module for module in modules if module in imports and imports[module].state != "ok"]
    if broken:
        message = f"not checked: {' and '.join(broken)} cannot be imported"
        return [CheckResult(name, "broken", message, f"repair {' and '.join(broken)} first (see versions)", is_needed)]
    return run_check(name, check, f"repair what it names; {INSTALL}", is_needed)


def _show(group: str, results: list[CheckResult]) -> None:
    try:
        from rich.console import Console
    except ImportError:  # what is missing should still be printed
        for each in results:
            print(f"{group}: {each.name}: {each.state}: {each.message}", f"  -> {each.remedy}" * bool(each.remedy))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=group, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in results:
        remedy = f"\n[dim]-> {escape(each.remedy)}[/]" if each.remedy else ""
        table.add_row(each.name, MARKS[each.state], escape(each.message) + remedy)
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
