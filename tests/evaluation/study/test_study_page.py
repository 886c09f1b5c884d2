"""The study's answer is computed: from made-up figures, every way it can come out; and the page that carries it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.study import __main__ as command
from evaluation.study import results
from evaluation.study.cells import OBJECTIVES, PRESETS, StudyLayout, study_cells, tokenizer_config
from evaluation.study.page import answer, answer_others, crossover, render_page, slope, verdict, write_page
from tests.evaluation.study.made_up import four_cells, made_up, rows

pytestmark = pytest.mark.L0

FALLING, FLAT, RISING = (80.0, 60.0, 45.0, 30.0), (55.0, 54.0, 55.0, 55.2), (50.0, 53.0, 56.0, 60.0)


def test_the_claim_is_seen_where_joint_falls_and_rec_does_not() -> None:
    said = answer(rows({"joint": FALLING, "rec": RISING}))
    assert "keeps falling" in said[0]
    assert "80 at 1.0e+12" in said[0]
    assert "rises" in said[1]
    assert "does harm" in said[4]
    assert "it stalls" in answer(rows({"joint": FALLING, "rec": FLAT}))[4]


def test_beside_the_trend_stand_the_last_step_and_the_distance() -> None:
    said = answer(rows({"joint": FALLING, "rec": RISING}))
    step = 100 * ((FALLING[3] / FALLING[2]) - 1)
    assert f"{step:+.1f} % a doubling between the last two budgets" in said[0]
    assert "is 1.60, 1.13, 0.80, 0.50 times that of the other" in said[2]


def test_the_claim_is_not_seen_where_joint_stalls_or_both_fall() -> None:
    assert "is not seen" in answer(rows({"joint": FLAT, "rec": FLAT}))[4]
    assert "so does reconstruction alone" in answer(rows({"joint": FALLING, "rec": FALLING}))[4]
    assert verdict([(1.0, 50.0), (2.0, 30.0), (4.0, 31.0)]) == "stalls", "its last budget is not its best"


def test_the_crossover_is_interpolated_in_log_flops() -> None:
    ours, theirs = [(1e12, 80.0), (4e12, 40.0)], [(1e12, 40.0), (4e12, 80.0)]
    assert crossover(ours, theirs) == pytest.approx(2e12)  # half way in log FLOPs, for gaps of the same size
    assert crossover(ours[:1] * 2, [(1e12, 90.0)] * 2) == "ahead"
    assert crossover(theirs, ours) == "behind"
    again = [(1.0, 1.0), (2.0, 3.0), (4.0, 1.0)], [(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)]
    found = crossover(*again)
    assert isinstance(found, float)
    assert 2 < found < 4, "the last crossing counts: from there on it stays ahead"
    assert (
        "ahead of reconstruction alone from about 2.2e+12 FLOPs on"
        in answer(rows({"joint": FALLING, "rec": (60.0, 58.0, 59.0, 60.0)}))[3]
    )


def test_the_slope_is_that_of_each_doubling() -> None:
    assert math.exp(slope([(1e12, 100.0), (2e12, 90.0), (4e12, 81.0)])) == pytest.approx(0.9)


def test_further_objectives_are_held_against_reconstruction_alone_too() -> None:
    made = rows({"joint": FALLING, "rec": FLAT, "clip_rec": (70.0, 50.0, 40.0), "ssl_rec": FLAT[:1]})
    [said] = answer_others(made)
    assert said.startswith("With clip + rec, gFID keeps falling")
    assert "40 at 4.0e+12 FLOPs. It is ahead of reconstruction alone from about 1.7e+12 FLOPs on" in said  # 2^0.758


def test_two_common_budgets_are_needed_for_an_answer() -> None:
    assert "Not answered yet" in answer(rows({"joint": FALLING[:3], "rec": FLAT[:1]}))[0]
    assert "Not answered yet" in answer([])[0]
    gap = [row for row in rows({"joint": FALLING, "rec": FLAT}) if row["cell"] != "rec-1"]
    assert "60 at" not in answer(gap)[0], "a budget that only one of both has is left out"


def test_the_page_carries_answer_figures_table_and_limits(tmp_path: Path) -> None:
    made = rows({"joint": FALLING, "rec": FLAT, "clip_rec": FALLING[:2]})
    made[-1] |= {"state": "failed"}
    found = {"preset": "mini", "cells": made, "corpus": {"train": 12000, "classes": 100}, "image_size": 32}
    text = render_page(found, {"rec_generated.png": "rec, generated"})
    flowing = " ".join(text.split())
    for sentence in answer(made):
        assert f"Without guidance: - {answer(made)[0]}" in flowing
        assert f"- {sentence}" in flowing
    assert "With the best of the guidance scales, which each cell may choose: - Not answered yet" in flowing
    assert "| clip + ssl + rec | 8.0e+12 | 10 | 30.00 |  | 6.00 | 23.00 | 40.0% | 40.0% |  |" in text
    assert "Not done when this page was written: `clip_rec-1` (failed)." in flowing
    assert "corpus:1" in text
    assert "(images/study/rec_generated.png)" in text
    assert "12000 drawn scenes of 32 pixels" in text
    assert all(len(line) <= 120 or line.startswith(("|", "![")) for line in text.splitlines())


def test_the_page_is_written_with_its_figures_and_images(tmp_path: Path) -> None:
    layout = made_up(tmp_path / "study")
    cell = four_cells()[2]
    for place in ("generation/pictures/samples.png", "evaluation/pictures/held_out.png"):
        (layout.cell(cell) / place).parent.mkdir(parents=True)
        (layout.cell(cell) / place).write_bytes(b"a picture")
    (tmp_path / "docs").mkdir()
    write_page(layout, results.collect_results(layout, four_cells()), four_cells(), tmp_path / "docs" / "study.md")
    names = {path.name for path in (tmp_path / "docs" / "images" / "study").iterdir()}
    assert names == {
        "gfid.png", "gfid_guided.png", "probe.png", "probe_features.png", "rfid.png", "zero_shot.png",
        "understanding.png", "rec_generated.png", "rec_reconstructed.png",
    }  # fmt: skip
    assert "Not answered yet" in (tmp_path / "docs" / "study.md").read_text()


def test_cells_cost_their_budget_and_come_cheapest_first() -> None:
    mini = PRESETS["mini"]
    found = study_cells(mini)
    assert len({cell.name for cell in found}) == len(OBJECTIVES) * len(mini.budgets) == 20
    assert [cell.budget_idx for cell in found] == sorted(cell.budget_idx for cell in found)
    for cell in found:
        assert cell.flops == pytest.approx(mini.budgets[cell.budget_idx], rel=0.01)
    steps = {cell.objective.name: cell.steps for cell in found[:5]}
    assert steps["rec"] > 1.8 * steps["joint"]
    assert steps["joint"] < min(steps["clip_rec"], steps["ssl_rec"])


def test_the_objectives_of_a_study_differ_in_their_objectives_alone() -> None:
    configs = {objective.name: tokenizer_config(PRESETS["mini"], objective) for objective in OBJECTIVES}
    weights = {name: (c.objectives.clip.weight > 0, c.batch.ssl > 0, c.batch.rec) for name, c in configs.items()}
    assert weights == {
        "rec": (False, False, 64), "clip_rec": (True, False, 64), "ssl_rec": (False, True, 64),
        "joint": (True, True, 64), "joint_noise": (True, True, 64),
    }  # fmt: skip
    assert len({config.model for config in configs.values()}) == 1
    assert configs["joint_noise"].objectives.rec.noise.kind == "interpolative"


@pytest.fixture
def layout(tmp_path: Path) -> StudyLayout:
    """The real commands; a tokenizer's config stands in for the generator's."""
    mini = PRESETS["mini"]
    return StudyLayout(tmp_path / "out", replace(mini, generator=mini.tokenizer))


def test_the_commands_of_a_cell_name_each_others_results(layout: StudyLayout) -> None:
    cell = study_cells(layout.preset)[3]
    tokenizer, evaluation, latents, generator, generation = layout.stages(cell)
    launched = replace(layout, ranks=2).stages(cell)[0].command
    assert tokenizer.command[1].endswith("engine/launch.py"), "a rank alone needs no launcher"
    assert launched[1:5] == ("--num_accelerators", "2", "--master_port", "{port}")
    assert launched[5:] == tokenizer.command[1:]
    assert f"optim.steps={cell.steps}" in tokenizer.command
    assert str(tokenizer.folder) in evaluation.command
    assert "linear_probe,reconstruction,zero_shot" in evaluation.command
    assert "linear_probe,reconstruction" in layout.stages(study_cells(layout.preset)[0])[1].command
    assert f'latents.train="{latents.folder}"' in generator.command
    assert str(generator.folder) in generation.command
    assert (tokenizer.is_training, latents.is_training, generator.is_training) == (True, False, True)
    folders = [stage.folder for stage in (tokenizer, evaluation, latents, generator, generation, *layout.shared())]
    assert len(set(folders)) == 7, "each stage owns what is thrown away with it"


def test_fingerprints_follow_science_and_not_places_or_ranks(layout: StudyLayout, tmp_path: Path) -> None:
    cell = study_cells(layout.preset)[3]

    def prints(other: StudyLayout) -> list[str]:
        return [stage.fingerprint for stage in other.stages(cell)]

    assert prints(replace(layout, out=tmp_path / "elsewhere", ranks=2)) == prints(layout)
    corpus = (*layout.preset.corpus[:2], "999", *layout.preset.corpus[3:])
    larger = replace(layout, preset=replace(layout.preset, corpus=corpus))
    assert not set(prints(larger)) & set(prints(layout))
    sampled = replace(layout, preset=replace(layout.preset, generate=("--num-samples", "9")))
    assert prints(sampled)[:4] == prints(layout)[:4]
    assert prints(sampled)[4] != prints(layout)[4]


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "nothing-*", "--dry-run"]) == 2
    assert "no such cell; they are rec-0, clip_rec-0" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--limit-minutes", "0"]) == 2
    assert "--limit-minutes 0: give a number above 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.L2
def test_a_dry_run_shows_cells_and_the_command_works_through_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    monkeypatch.setattr(command, "_layout", lambda given: made_up(out))
    monkeypatch.setattr(command, "study_cells", lambda _: four_cells())
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main(["--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "clip_rec-1" in shown
    assert "missing" in shown
    mini = PRESETS["mini"]
    behind = sum(mini.seconds.values())
    minutes = [(budget / mini.flops_per_second + behind) / 60 for budget in (1e12, 2e12)]
    assert all(f"{each:.1f}" in shown for each in minutes)
    assert made_up(out).ran() == []
    assert command.main(["--out", str(out), "--only", "rec-*,clip_rec-0"]) == 0
    shown = capsys.readouterr().out
    assert "done: rec-0, clip_rec-0, rec-1" in shown
    assert (out / "results.json").is_file()
    assert (out / "figures" / "gfid.png").is_file()
    (out / "break-clip_rec-1-latents").touch()
    assert command.main(["--out", str(out), "--page", str(tmp_path / "page.md")]) == 1
    assert "failed: clip_rec-1" in capsys.readouterr().out
    assert "`clip_rec-1` (failed)" in (tmp_path / "page.md").read_text()
    assert command.main(["--out", str(out), "--page-only"]) == 0
