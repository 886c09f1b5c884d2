"""The report page: whole, true to the log, self-contained, and unmoved by what a run directory may hold."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError, to_yaml
from engine.reporting.images import png
from engine.reporting.sinks import LogFiles
from model.packing import RankBatchSizes
from profiling.cost.step_flops import step_flops
from profiling.report.blocks import LinePlot, PlotLine, StackedBars, as_json, format_cell
from profiling.report.metrics import MAX_POINTS, labels, thinned
from profiling.report.page import breakable, main, write_report
from profiling.report.plots import line_plot, stacked_bars
from profiling.report.run_record import read_run
from profiling.report.sections import sections
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

SECTIONS = [
    "summary", "losses", "throughput", "phases", "flops", "roofline", "memory", "communication", "energy", "health",
    "data", "other", "pictures", "choices", "configuration",
]  # fmt: skip
HOSTILE = "</td></table><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'"


def figures(step: int, **more: float) -> dict[str, float]:
    return {
        "loss/clip": 4.0 - step / 10,
        "loss/total": 9.0 - step / 10,
        "health/logit_scale": 14.0 + step,
        "optim/grad_norm": 2.0 + step,
        "speed/samples_per_second": 50.0 + step,
        "speed/step_ms": 1000.0 + step,
        "speed/seconds_left": 60.0,
        **more,
    }


def make_run(directory: Path, reports: list[tuple[int, dict[str, float]]], *overrides: str) -> Path:
    """A run directory as engine/trainer.py leaves it, in small; log.jsonl and log.txt by the engine's own sink."""
    directory.mkdir()
    config = tiny_config(f"optim.steps={reports[-1][0]}", *overrides)
    (directory / "config.yaml").write_text(to_yaml(config))
    (directory / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}, indent=2))
    (directory / "choices.json").write_text(json.dumps({"attention": "sdpa (auto: serves float32 best)"}))
    (directory / "pictures").mkdir()
    for step, _ in reports:
        (directory / "pictures" / f"latents-{step:08d}.png").write_bytes(png(torch.rand(3, 4, 8)))
    log = LogFiles(directory, config.optim.steps)
    log.message("attention: sdpa (auto: serves float32 best)")
    for step, values in reports:
        log.scalars(step, values)
    log.message("peak memory of this rank: 1.25 GiB")
    log.close()
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with every kind of figure."""
    more = {
        "phase/trunk_ms": 300.0, "phase/backward_ms": 500.0, "speed/mfu": 0.31, "memory/peak_gib": 2.5,
        "comm/all_gather_bytes": 1.5e6, "energy/joules_per_sample": 3.5, "data/bad/truncated image": 1.0,
        "unheard/of": 7.25, "straggler/rank": 1.0,
    }  # fmt: skip
    reports = [(step, figures(step, **{key: value * step for key, value in more.items()})) for step in range(1, 6)]
    directory = make_run(tmp_path / "demo", reports)
    (directory / "bad_samples.jsonl").write_text('{"key": "00000/7", "reason": "truncated image", "position": 9}\n')
    (directory / "evaluation.json").write_text(json.dumps({"zero_shot": {"top1": 0.125, "images": 1024}}))
    return directory


class Page(HTMLParser):
    """Sections by id, table cells, attributes that load something, tags that must not be there."""

    VOID = ("meta", "link", "img", "br", "use", "path", "rect", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in named), named
        self.ids += [named["id"]] if "id" in named else []
        self.loads += [named[name] for name in ("src", "href", "xlink:href", "data", "action") if name in named]
        if tag == "section":
            self.sections.append(named["id"])
        if tag == "img":
            assert named["alt"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            assert tag == "td" or named["scope"] in ("row", "col")
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.sections and "style" not in self.open:
            self.text[self.sections[-1]] = self.text.get(self.sections[-1], "") + data


def read(page: Path) -> tuple[Page, dict[str, Any]]:
    """The page, parsed, held against its rules; and report.json, which must be strict JSON."""
    parsed = Page(page.read_text(encoding="utf-8"))
    assert parsed.sections == SECTIONS
    assert parsed.open == []
    assert not {"script", "iframe", "object", "form"} & set(parsed.tags)
    assert all(load.startswith(("#", "data:")) for load in parsed.loads), parsed.loads
    assert len(parsed.ids) == len(set(parsed.ids)), "an id twice on a page names nothing"
    assert "url(http" not in page.read_text()
    assert "@import" not in page.read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    facts = json.loads(page.with_suffix(".json").read_text(), parse_constant=refuse)
    return parsed, facts


def facts_of(*runs: Path) -> dict[str, Any]:
    """report.json without the page, whose plots take their time."""
    facts: dict[str, Any] = json.loads(as_json("", sections([read_run(run) for run in runs])))
    return facts


def blocks(facts: dict[str, Any], kind: str, section: str | None = None) -> list[dict[str, Any]]:
    chosen = [each for each in facts["sections"] if section in (None, each["name"])]
    return [block for each in chosen for block in each["blocks"] if block["kind"] == kind]


def plots(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [plot for block in blocks(facts, "plots") for plot in block["plots"]]


def sentences(facts: dict[str, Any], section: str) -> str:
    return " ".join(block["text"] for block in blocks(facts, "sentence", section))


def test_every_section_is_there_and_the_page_shows_what_the_json_has(run: Path) -> None:
    page, facts = read(write_report(run))
    assert [section["name"] for section in facts["sections"]] == SECTIONS
    tables = blocks(facts, "table")
    assert len(page.tables) == len(tables)
    for drawn, table in zip(page.tables, tables, strict=True):
        assert drawn == [table["header"], *([format_cell(cell) for cell in row] for row in table["rows"])]
    drawings = len(plots(facts)) + len(blocks(facts, "stack")) + len(blocks(facts, "roofline"))
    assert page.tags.count("svg") == drawings
    for section in SECTIONS:
        assert all(block["text"] in page.text[section] for block in blocks(facts, "sentence", section))
    for listing in blocks(facts, "listing"):
        assert "\n".join(listing["lines"]) in page.text["choices"] + page.text["configuration"]


def test_the_figures_are_those_of_the_log(run: Path) -> None:
    facts = facts_of(run)
    rows = {row[0]: row[1:] for table in blocks(facts, "table") for row in table["rows"]}
    assert rows["loss/clip"] == pytest.approx([3.9, 3.7, 3.5])
    assert rows["unheard/of"] == [7.25, 21.75, 36.25]
    assert rows["steps"] == [5]
    assert rows["samples"] == [5 * tiny_config().batch.clip]
    assert rows["minutes in steps"] == [pytest.approx((5000 + 15) / 60_000)]
    assert rows["peak memory of the first rank, GiB"] == [1.25]
    assert rows["zero_shot images"] == [1024.0]
    assert rows["end"] == ["finished"]
    assert rows["00000/7"] == ["truncated image", "9"]
    assert rows["attention"] == ["sdpa (auto: serves float32 best)"]
    assert "speed/seconds_left" not in rows
    [clip] = [plot for plot in plots(facts) if plot["title"] == "loss/clip"]
    assert clip["lines"] == [
        {"label": "demo", "steps": [1, 2, 3, 4, 5], "values": pytest.approx([3.9, 3.8, 3.7, 3.6, 3.5])}
    ]
    [stack] = blocks(facts, "stack")
    [phases] = blocks(facts, "table", "phases")
    assert [row[0] for row in phases["rows"]] == ["phase/trunk_ms", "phase/backward_ms", "straggler/rank"]
    assert stack["parts"] == {"trunk": [900.0], "backward": [1500.0]}


def test_the_table_of_flops_is_the_count_for_the_ranks_of_the_run(run: Path) -> None:
    batch = tiny_config().batch.clip
    sizes = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": batch // 2, "gradient_accumulation_steps": 1}
    (run / "ds_config.json").write_text(json.dumps(sizes))
    [table] = [block for block in blocks(facts_of(run), "table", "flops") if "GFLOP" in block["caption"]]
    counted = step_flops(tiny_config("optim.steps=5"), RankBatchSizes.per_rank(tiny_config(), 2))
    assert [row[0] for row in table["rows"]] == [*(part.name for part in counted.components), "sum"]
    assert table["rows"][-1][2] + table["rows"][-1][3] == pytest.approx(counted.model_flops / 1e9)
    for damaged in (
        "{}",
        "[]",
        '{"train_batch_size": "x"}',
        json.dumps(sizes | {"train_batch_size": math.inf}),
        json.dumps(sizes | {"train_micro_batch_size_per_gpu": 0}),
    ):
        (run / "ds_config.json").write_text(damaged)
        assert "no table of FLOPs" in sentences(facts_of(run), "flops"), damaged


def test_of_each_kind_of_picture_the_first_the_middle_and_the_last_are_inlined(run: Path) -> None:
    (run / "pictures" / "held_out.png").write_bytes(png(torch.rand(3, 4, 8)))
    (run / "pictures" / "torn.png").write_bytes(b"no picture")
    page, facts = read(write_report(run))
    kinds = {block["title"]: block["captions"] for block in blocks(facts, "pictures")}
    assert kinds["Latents of demo"] == ["Latents after 1 step", "Latents after 3 steps", "Latents after 5 steps"]
    assert "Each square is the latent of the image in the same column" in sentences(facts, "pictures")
    assert kinds["held_out of demo"] == ["held_out"]
    assert page.tags.count("img") == 4
    assert "torn.png is no PNG file that can be read" in page.text["pictures"]


def test_what_a_run_is_without_is_said(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "log.jsonl").write_text('{"step": 3, "strange": 1}\n')
    facts = facts_of(bare)
    for section, word in {
        "losses": "loss/*", "throughput": "speed/*", "phases": "phase/*", "flops": "speed/mfu",
        "roofline": "no roofline", "memory": "memory/*", "communication": "comm/*", "energy": "energy/*",
        "health": "health/*", "data": "bad_samples.jsonl", "pictures": "no pictures", "choices": "choices.json",
        "configuration": "no config.yaml", "summary": "python -m evaluation.run", "other": "Not plotted",
    }.items():  # fmt: skip
        assert word in sentences(facts, section), section


def test_a_run_with_one_report_has_a_page(tmp_path: Path) -> None:
    _, facts = read(write_report(make_run(tmp_path / "short", [(1, figures(1))])))
    assert plots(facts) == []
    assert "two different values: loss/total, loss/clip" in sentences(facts, "losses")


def test_half_a_line_at_the_end_of_a_killed_run_is_left_out_and_noted(run: Path) -> None:
    whole = read_run(run).reports
    for junk in ('{"step": 6, "loss/cl', "\x00\x00", "[1, 2]", '{"step": "six"}', '{"step": -1}', "[" * 100_000):
        shutil.copy(run / "log.jsonl", run / "kept")
        with (run / "log.jsonl").open("a") as file:
            file.write(junk)
        read_again = read_run(run)
        assert read_again.reports == whole, junk[:20]
        assert len(read_again.notes) == 1, junk[:20]
        shutil.move(run / "kept", run / "log.jsonl")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/cl')
    facts = facts_of(run)
    assert "line 6 of log.jsonl is no report (cut short?)" in sentences(facts, "summary")


def test_a_killed_run_does_not_pass_for_a_finished_one(run: Path) -> None:
    (run / "config.yaml").write_text(to_yaml(tiny_config("optim.steps=9")))
    facts = facts_of(run)
    ends = [row[1] for table in blocks(facts, "table", "summary") for row in table["rows"] if row[0] == "end"]
    assert ends == ["the log ends at step 5 of 9: still running, killed or failed"]
    with (run / "log.txt").open("a") as file:
        file.write("asked to stop: 5 of 9 steps are done; go on with --resume\n")
    facts = facts_of(run)
    ends = [row[1] for table in blocks(facts, "table", "summary") for row in table["rows"] if row[0] == "end"]
    assert ends == ["stopped when asked to, at step 5 of 9"]


def test_of_a_step_that_was_taken_twice_the_later_report_holds(tmp_path: Path) -> None:
    reports = [(1, figures(1)), (2, figures(2)), (3, figures(3)), (2, figures(20)), (4, figures(4))]
    resumed = make_run(tmp_path / "resumed", reports)
    facts = facts_of(resumed)
    [clip] = [plot for plot in plots(facts) if plot["title"] == "loss/clip"]
    assert clip["lines"][0]["steps"] == [1, 2, 3, 4]
    assert clip["lines"][0]["values"] == pytest.approx([3.9, 2.0, 3.7, 3.6])
    assert "after step 3 its log goes on with step 2" in sentences(facts, "summary")


def test_values_that_are_no_numbers_are_named_and_left_as_gaps(tmp_path: Path) -> None:
    reports = [(step, figures(step)) for step in (1, 2, 3, 4)]
    reports[1][1]["loss/clip"] = float("nan")
    reports[3][1]["loss/clip"] = float("-inf")
    reports[2][1]["loss/total"], reports[1][1]["loss/total"] = 1.7e308, -1.7e308
    reports[2][1]["optim/grad_norm"] = float("inf")
    for _, values in reports:
        values["loss/dead"] = float("nan")
    page, facts = read(write_report(make_run(tmp_path / "nan", reports)))
    assert "loss/clip of nan is not finite in 2 of 4 reports, first at step 2" in sentences(facts, "losses")
    assert "values: loss/dead" in sentences(facts, "losses")
    assert "-Infinity" in [cell for table in page.tables for row in table for cell in row]


def test_a_figure_of_every_tenth_report_is_plotted_as_a_line(tmp_path: Path) -> None:
    reports = [(step, figures(step)) for step in range(1, 41)]
    for step, values in reports[9::10]:
        values |= {"health/grad_share/clip": step / 50, "health/grad_share/ssl": 1 - step / 50}
    _, facts = read(write_report(make_run(tmp_path / "demo", reports)))
    [plot] = [plot for plot in plots(facts) if plot["title"] == "health/grad_share/clip"]
    assert plot["lines"] == [{"label": "demo", "steps": [10, 20, 30, 40], "values": [0.2, 0.4, 0.6, 0.8]}]
    assert (
        sentences(facts, "health")
        == "Not in every one of the 40 reports of demo: health/grad_share/clip, health/grad_share/ssl in 4."
    )


def test_a_value_between_two_gaps_gets_a_dot() -> None:
    def marks(values: list[float | None]) -> int:
        return line_plot(LinePlot("loss", [PlotLine("demo", list(range(len(values))), values)])).count("<use ")

    gaps: list[float | None] = [math.nan, 1.0] * 20
    ticks = marks([1.0, 2.0] * 20)
    assert marks(gaps) - ticks >= 15, "a dot for each of 20, less what the ticks of the other axis differ by"


def test_every_phase_of_a_step_has_a_colour_of_its_own() -> None:
    parts = {f"phase {number}": [1.0] for number in range(16)}
    svg = stacked_bars(StackedBars("phases", "ms a step", ["demo"], parts))
    assert len(set(re.findall(r"fill: (#[0-9a-f]{6})", svg))) == 16


def test_names_break_between_words_and_units_do_not() -> None:
    assert breakable("health/grad_share<") == "health/<wbr>grad_<wbr>share&lt;"
    assert breakable("GFLOP/s") == "GFLOP/s"


def test_nothing_a_run_wrote_becomes_markup(tmp_path: Path) -> None:
    reports = [(step, figures(step, **{f"loss/{HOSTILE}": 1.0 * step, f"phase/{HOSTILE}_ms": 2.0})) for step in (1, 2)]
    hostile = make_run(tmp_path / "<b onclick=alert(1)>", reports)
    surrogate = "\\ud800$x_{$"
    with (hostile / "log.jsonl").open("a") as file:
        file.write(f'{{"step": 2, "loss/{surrogate}": 1, "loss/none": 10, "time": 1e300}}\n')
        file.write(f'{{"step": 3, "loss/{surrogate}": 2, "loss/none": {"9" * 400}, "time": -5}}\n')
    (hostile / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    (hostile / "ds_config.json").write_text(HOSTILE)
    (hostile / "choices.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (hostile / "log.txt").write_text(HOSTILE)
    (hostile / "evaluation.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE, "huge": 10**400}}))
    (hostile / "bad_samples.jsonl").write_text(json.dumps({"key": HOSTILE, "reason": HOSTILE, "position": None}))
    (hostile / "pictures" / "<script>-1.png").write_bytes(png(torch.rand(3, 4, 8)))
    page, _ = read(write_report(hostile))
    for section in ("losses", "phases", "choices", "configuration", "data", "summary"):
        assert "<script>alert('x')</script>" in page.text[section], f"{section} lost what the run wrote"


def test_files_that_are_no_text_do_not_stop_the_page(run: Path) -> None:
    for name in ("config.yaml", "ds_config.json", "choices.json", "evaluation.json", "log.txt", "bad_samples.jsonl"):
        (run / name).write_bytes(b"\xff\xfe\x00[")
    facts = facts_of(run)
    assert "choices.json is no JSON object" in sentences(facts, "summary")


def test_two_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    reports = [(step, figures(2 * step, **{"loss/rec": 0.5 * step})) for step in range(1, 4)]
    other = make_run(tmp_path / "other", reports, "optim.lr=0.123")
    _, facts = read(write_report(run, compare=other, out=tmp_path / "both.html"))
    assert not (run / "report.html").exists()
    [clip] = [plot for plot in plots(facts) if plot["title"] == "loss/clip"]
    assert [line["label"] for line in clip["lines"]] == ["demo", "other"]
    [table] = list(blocks(facts, "table", "losses"))
    assert table["header"] == ["", "demo", "other", "other / demo"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert rows["loss/clip"] == pytest.approx([3.5, 3.4, 3.4 / 3.5])
    assert rows["loss/rec"] == [None, 1.5, None]
    [difference] = list(blocks(facts, "listing", "configuration"))
    changed = [line for line in difference["lines"] if line[0] in "+-"]
    assert "+  lr: 0.123" in changed
    assert "+++ other" in changed
    assert "ds_config.json is the same in both" in sentences(facts, "configuration")


def test_two_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    again = make_run(tmp_path / "later" / "demo", [(1, figures(1))])
    assert labels([read_run(run), read_run(again)]) == [str(run), str(again)]


def test_the_command_writes_the_same_page_every_time_and_says_where(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run / "report.html"
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    first = page.read_bytes()
    assert main([str(run)]) == 0
    assert page.read_bytes() == first


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    steps = list(range(10_001))
    line = thinned(PlotLine("long", steps, [float(step) for step in steps]))
    assert len(line.steps) <= MAX_POINTS
    assert line.steps[-1] == 10_000
    assert line.values == [float(step) for step in line.steps]
    assert len({after - before for before, after in zip(line.steps, line.steps[1:], strict=False)}) == 1


def test_no_word_of_a_run_gets_into_an_svg() -> None:
    svg = line_plot(LinePlot(HOSTILE, [PlotLine(HOSTILE, [1, 2], [1.0, None])]))
    svg += stacked_bars(StackedBars(HOSTILE, "ms a step", [HOSTILE], {HOSTILE: [1.0]}))
    assert "evil" not in svg
    assert "alert" not in svg
    assert re.findall(r'(?:href|src)="(?!#)[^"]*"', svg) == []


@pytest.mark.parametrize("content", [None, "", "{}\n", "no json\n"])
def test_what_is_no_run_is_one_clear_error(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}")
    assert "log.jsonl" in told
    assert told.count("\n") == 1
    assert list(tmp_path.glob("report.*")) == []


def test_a_page_that_cannot_be_written_is_a_clear_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name another file with --out"):
        write_report(run, out=tmp_path / "absent" / "page.html")
    with pytest.raises(UserError, match=r"name a \.html file"):
        write_report(run, out=tmp_path / "page.json")


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)} is on PATH")
def test_a_browser_shows_every_section_and_complains_of_nothing(run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown_page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.findall(r'<section id="(\w+)"', shown_page.stdout) == SECTIONS
    assert "CONSOLE" not in shown_page.stderr, shown_page.stderr
    assert shown_page.stdout.count("</svg>") == page.read_text().count("</svg>")
