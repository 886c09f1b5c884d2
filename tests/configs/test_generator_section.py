"""The generator's section: three published kinds, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configs.generator import DIT, SIT, Diffusion

pytestmark = pytest.mark.L0
B: dict[str, Any] = {"width": 768, "depth": 12, "heads": 12}


@pytest.mark.parametrize("kind", [{}, SIT, DIT])
def test_a_kind_survives_being_written_out(kind: dict[str, Any]) -> None:
    section = Diffusion(**B, **kind)
    assert Diffusion.model_validate_json(section.model_dump_json()) == section


def test_kinds_differ_where_their_papers_do() -> None:
    lightning, sit, dit = (Diffusion(**B, **kind) for kind in ({}, SIT, DIT))
    assert (lightning.mlp, lightning.norm, lightning.positions) == ("swiglu", "rmsnorm", "rope")
    assert (sit.mlp, sit.norm, sit.positions) == (dit.mlp, dit.norm, dit.positions) == ("gelu", "layernorm", "sincos")
    assert (lightning.objective, lightning.direction, lightning.times.kind) == ("velocity", 1.0, "logit_normal")
    assert (sit.objective, sit.direction, sit.times.kind) == ("velocity", 0.0, "uniform")
    assert dit.objective == "noise"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 7}, "width=768 over heads=7: the head width must be a multiple of 4"),
        ({"objective": "noise"}, "objective=noise with direction=1, times.kind=logit_normal, time_scale=1: DDPM"),
        ({"objective": "noise", "times": {"kind": "uniform"}}, "objective=noise with direction=1"),
        ({**DIT, "time_scale": 1000}, "direction=0, times.kind=uniform, time_scale=1000: DDPM draws"),
        ({"times": {"kind": "uniform", "mean": -0.5}}, "kind=uniform with mean=-0.5, std=1: only logit-normal"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"direction": -1.0}, "direction"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Diffusion(**{**B, **settings})
