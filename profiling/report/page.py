"""python -m profiling.report RUN [--compare RUN2] [--out FILE]: report on a run as one HTML page.

Writes RUN/report.html, self-contained (no network, no script, pictures and plots inside), and the same facts as
RUN/report.json. With --compare two runs are put side by side.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from configs import UserError
from configs.command_line import CommandParser, output_file
from profiling.report.blocks import LinePlot, PlotLine, ReportSection, as_json, format_cell
from profiling.report.metrics import labels
from profiling.report.plots import line_plot, part_colour, part_marker, roofline_plot, stacked_bars
from profiling.report.run_record import read_run
from profiling.report.sections import sections

PNG = b"\x89PNG\r\n\x1a\n"


def write_report(run: Path, compare: Path | None = None, out: Path | None = None) -> Path:
    """Write the page to `out` (default: RUN/report.html) and its facts beside it as .json; return the page's path.

    Raises UserError for a directory that is no run, and where the page cannot be written.
    """
    runs = [read_run(path) for path in (run, compare) if path is not None]
    page = out or run / "report.html"
    if page.suffix == ".json":
        raise UserError(f"--out {page}: the page is HTML, and its facts go beside it as .json; name a .html file")
    title = " and ".join(labels(runs))
    content = sections(runs)
    try:
        page.write_text(render(title, content), encoding="utf-8", errors="replace")
        page.with_suffix(".json").write_text(as_json(title, content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page} cannot be written ({error.strerror}): name another file with --out") from None
    return page


def render(title: str, content: list[ReportSection]) -> str:
    """Render the page. Everything that a run wrote is escaped; the plots' SVG holds none of it."""
    environment = Environment(
        loader=PackageLoader("profiling.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": format_cell,
        "line_plot": lambda plot: Markup(line_plot(plot)),
        "stacked_bars": lambda bars: Markup(stacked_bars(bars)),
        "roofline_plot": lambda roofline: Markup(roofline_plot(roofline)),
        "inlined": inlined,
        "breakable": breakable,
    }
    environment.globals |= {"part_colour": part_colour, "part_marker": part_marker, "alt_text": alt_text}
    return environment.get_template("report.html.j2").render(title=title, sections=content)


def inlined(picture: Path) -> str | None:
    """Return a PNG file as a data URI; None where it is missing or not a PNG."""
    try:
        content = picture.read_bytes()
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(PNG) else None


def breakable(name: str) -> Markup:
    """Allow line breaks after / and _ in a figure's name, for narrow screens; not in units such as GFLOP/s."""
    return Markup(re.sub(r"(?<=\w{3})([/_])(?=\w{3})", r"\1<wbr>", str(escape(name))))


def alt_text(plot: LinePlot) -> str:
    """Describe the plot for screen readers."""
    return f"{plot.title} over steps. {'; '.join(_ends(line) for line in plot.lines)}"


def _ends(line: PlotLine) -> str:
    seen = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
    if not seen:
        return f"{line.label}: no figures"
    (first_step, first), (last_step, last) = seen[0], seen[-1]
    return f"{line.label}: {format_cell(first)} at step {first_step:,}, {format_cell(last)} at step {last_step:,}"


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = CommandParser(prog="python -m profiling.report", description="Report on a run as one self-contained page.")
    parser.add_argument("run", type=Path, help="a run directory with log.jsonl, finished or not")
    parser.add_argument("--compare", type=Path, metavar="RUN2", help="a second run, put beside the first")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="the page (default: RUN/report.html)")
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints that it has found no GPU; nothing runs
    try:
        page = write_report(parsed.run, parsed.compare, parsed.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0
