"""Every checkpoint says which samples made it, and a resume notices another corpus."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import UserError
from data.order import Order
from data.sequence import CorpusFacts
from engine import archive
from engine.health.rollback import check_corpus
from tests.engine.health import runs
from tests.engine.health.runs import Spoilt
from tests.harness import run_ranks
from tests.tiny import tiny_config

SHORT = ("optim.steps=2", "system.report_every=1", "objectives.ssl.weight=0", "batch.ssl=0")


def digest(run_dir: Path) -> str:
    return archive.read_state(archive.find(run_dir / "checkpoints")).samples_digest


@pytest.mark.L1
def test_the_digest_knows_no_world_size(tmp_path: Path) -> None:
    for world_size in (1, 2):
        run_ranks(runs.train, world_size, tiny_config(*SHORT), tmp_path / str(world_size), Spoilt())
    assert digest(tmp_path / "1") == digest(tmp_path / "2") != ""


def facts(samples: int, place: int) -> dict[str, str]:
    return CorpusFacts(["a.tar"], Order([samples], 1, 1, 0)).at(8 * place)


@pytest.mark.L0
def test_a_resume_on_another_corpus_is_refused_by_what_has_changed(tmp_path: Path) -> None:
    state = archive.State(3, {}, 1, "", {}, skipped_steps=2, corpus=facts(64, 5))
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    same: Any = SimpleNamespace(corpus=lambda place: facts(64, place))
    other: Any = SimpleNamespace(corpus=lambda place: facts(65, place))
    check_corpus(same, tmp_path, ())
    check_corpus(other, tmp_path, ("data",))
    check_corpus(other, tmp_path, ("batch.clip",))
    with pytest.raises(UserError, match="samples: 64 -> 65; names and sizes of the shards"):
        check_corpus(other, tmp_path, ("optim.lr",))
