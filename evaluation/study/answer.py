"""The study's question, answered by its figures: does gFID keep falling with compute for the joint objective, while it
stalls for reconstruction alone, and where do the two cross?

    answer(rows)      # ["With clip + ssl + rec gFID falls with compute: 61.0 at 4.0e12 FLOPs, 33.5 at 1.1e14 ...", ...]

Rules, fixed before the figures were seen. The trend of an objective is the slope of ln gFID over log2 FLOPs (least
squares): it *falls* where that is below -2 % a doubling and the last budget is the best so far, *rises* above +2 %, and
else it *stalls*. The crossover is the compute from which on the joint objective stays ahead of reconstruction alone,
interpolated in log FLOPs between the two budgets around it. Added later, and deciding nothing: the change between the
last two budgets, and how far the joint objective is from reconstruction alone at each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from evaluation.study.preset import JOINT, REC

Series = list[tuple[float, float]]  # (FLOPs, figure), by FLOPs
Verdict = Literal["falls", "stalls", "rises"]
STEADY = 0.02  # change a doubling that counts as none


def series(rows: Sequence[dict[str, Any]], objective: str, figure: str) -> Series:
    """What is there of one figure of one objective, by compute."""
    own = [row for row in rows if row["objective"] == objective and figure in row["figures"]]
    return sorted((row["flops"], row["figures"][figure]) for row in own)


def of_both(rows: Sequence[dict[str, Any]], figure: str, objective: str = JOINT) -> list[dict[str, Any]]:
    """The rows of those budgets at which both the objective and reconstruction alone have the figure."""
    there = {(row["objective"], row["budget"]) for row in rows if figure in row["figures"]}
    return [row for row in rows if {(objective, row["budget"]), (REC, row["budget"])} <= there]


def slope(points: Series) -> float:
    """Change of the logarithm of a figure with each doubling of the compute, by least squares; two points at least."""
    x, y = [math.log2(flops) for flops, _ in points], [math.log(value) for _, value in points]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def verdict(points: Series) -> Verdict:
    """Whether a figure of which less is better keeps falling, by the rules above."""
    change, last = slope(points), points[-1][1]
    if change < -STEADY and last == min(value for _, value in points):
        return "falls"
    return "rises" if change > STEADY else "stalls"


def crossover(ours: Series, theirs: Series) -> float | Literal["ahead", "behind"]:
    """FLOPs from which on `ours` stays below `theirs`; "ahead" or "behind" where it is so at every common budget.

    Both have the same budgets, two at least.
    """
    pairs = list(zip(ours, theirs, strict=True))
    gaps = [math.log(mine) - math.log(other) for (_, mine), (_, other) in pairs]
    if gaps[-1] >= 0:
        return "behind"
    if max(gaps) < 0:
        return "ahead"
    before = max(i for i, gap in enumerate(gaps) if gap >= 0)
    (x0, x1), (g0, g1) = (math.log(pairs[i][0][0]) for i in (before, before + 1)), gaps[before : before + 2]
    return math.exp(x0 + (x1 - x0) * g0 / (g0 - g1))


def answer(rows: Sequence[dict[str, Any]], figure: str = "gfid") -> list[str]:
    """Sentences: the two trends, the crossover, and what both together say."""
    common = of_both(rows, figure)
    joint, alone = (series(common, objective, figure) for objective in (JOINT, REC))
    if len(joint) < 2:
        return [
            "Not answered yet: it takes two budgets at which both the joint objective and reconstruction alone are "
            f"done, and there are {len(joint)}."
        ]
    titles = {row["objective"]: row["title"] for row in rows}
    trends = [_trend(titles[name], points) for name, points in ((JOINT, joint), (REC, alone))]
    crossing = f"The joint objective {_crossing(crossover(joint, alone))}."
    return [*trends, _distance(joint, alone), crossing, _together(verdict(joint), verdict(alone))]


def others(rows: Sequence[dict[str, Any]], figure: str = "gfid") -> list[str]:
    """A sentence for each further objective that has two budgets with reconstruction alone."""
    titles = {row["objective"]: row["title"] for row in rows if row["objective"] not in (JOINT, REC)}
    said = []
    for objective, title in titles.items():
        common = of_both(rows, figure, objective)
        own, alone = (series(common, name, figure) for name in (objective, REC))
        if len(own) > 1:
            said.append(f"{_trend(title, own)} It {_crossing(crossover(own, alone))}.")
    return said


def _trend(title: str, points: Series) -> str:
    says = {"falls": "keeps falling", "stalls": "stalls", "rises": "rises"}[verdict(points)]
    figures = ", ".join(f"{value:.3g} at {flops:.1e}" for flops, value in points)
    return (
        f"With {title}, gFID {says} ({100 * math.expm1(slope(points)):+.1f} % a doubling of compute, "
        f"{100 * math.expm1(slope(points[-2:])):+.1f} % a doubling between the last two budgets): {figures} FLOPs."
    )


def _distance(ours: Series, theirs: Series) -> str:
    ratios = [mine / other for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"From the smallest budget to the largest, gFID of the joint objective is {listed} times that of the other."


def _crossing(found: float | str) -> str:
    if found == "ahead":
        return "is ahead of reconstruction alone at every budget: a crossover, if any, lies below"
    if found == "behind":
        return "is behind reconstruction alone at the largest budget: a crossover, if any, lies above"
    assert isinstance(found, float)
    return f"is ahead of reconstruction alone from about {found:.1e} FLOPs on, and behind below that"


def _together(joint: Verdict, alone: Verdict) -> str:
    if joint == "falls" and alone != "falls":
        return (
            "So the claim is seen in this study: more pre-training compute buys better generation for the joint "
            f"objective, while for reconstruction alone it {'does harm' if alone == 'rises' else 'stalls'}."
        )
    if joint == "falls":
        return "So half of the claim is seen: the joint objective gains from compute, but so does reconstruction alone."
    return "So the claim is not seen in this study: gFID of the joint objective does not keep falling with compute."
