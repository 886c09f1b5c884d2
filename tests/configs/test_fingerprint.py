"""What counts as the same experiment: every science setting, and nothing of the system half."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from configs import Config, fingerprint, load_run
from configs.load import science_changes
from configs.section import AddedLater, Section, drop_added_later_defaults
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

S = typing.TypeVar("S", bound=Section)


def variants(section: S, prefix: str = "") -> Iterator[tuple[str, S]]:
    """(dotted key, the same section with that one setting changed), for every setting of the schema."""
    for name, field in type(section).model_fields.items():
        if name == "kind":
            continue  # another kind has another schema
        value = getattr(section, name)
        if value is None and any(issubclass(kind, Section) for kind in _classes(field.annotation)):
            continue  # a section that is left out has no settings
        if isinstance(value, Section):
            for key, changed in variants(value, f"{prefix}{name}."):
                yield key, section.model_copy(update={name: changed})
        else:
            yield prefix + name, section.model_copy(update={name: another(value, field.annotation)})


def _classes(annotation: Any) -> list[type]:
    return [kind for kind in typing.get_args(annotation) if isinstance(kind, type)]


def another(value: Any, annotation: Any) -> Any:
    """A different value of the same kind; rules between settings need not hold."""
    if typing.get_origin(annotation) is typing.Literal:
        return next(choice for choice in typing.get_args(annotation) if choice != value)
    if value is None and "tuple" in str(annotation):
        return (0.25, 0.5)
    if value is None:
        return 0.5 if "float" in str(annotation) else "x"
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (another(value[0], type(value[0])), *value[1:]) if value else ("x",)
    return value + ("x" if isinstance(value, str) else 1)


# A section that may be left out is walked where it is there.
CONFIG = tiny_config("objectives.rec.align={weights: x, encoder: {width: 32, depth: 1, heads: 2}}")
VARIANTS: dict[str, Config] = dict(variants(CONFIG))


# Compared where both runs know it (test_a_file_is_compared_by_its_digest_where_both_runs_have_one).
DIGESTS = set(Config.digest_keys.values())


def is_science(key: str) -> bool:
    return key not in ("name", "init.weights", "objectives.rec.align.weights") and not key.startswith(
        ("system.", "profile.")
    )


def test_the_walk_meets_the_whole_schema() -> None:
    assert {"seed", "data.train", "model.trunk.layer_scale", "optim.betas", "system.loader.cache_dir"} <= set(VARIANTS)
    assert len(VARIANTS) > 90


@pytest.mark.parametrize("key", [key for key in VARIANTS if is_science(key) and key not in DIGESTS])
def test_a_science_setting_changes_the_fingerprint_and_is_named(key: str) -> None:
    assert fingerprint(VARIANTS[key]) != fingerprint(CONFIG)
    [change] = science_changes(CONFIG, VARIANTS[key])
    assert change.startswith(f"{key}: ")


def test_name_and_system_change_nothing() -> None:
    system = [key for key in VARIANTS if not is_science(key)]
    assert len(system) > 10
    assert {fingerprint(VARIANTS[key]) for key in system} == {fingerprint(CONFIG)}
    assert [science_changes(CONFIG, VARIANTS[key]) for key in system] == [[]] * len(system)


def test_a_change_tells_both_values() -> None:
    assert science_changes(tiny_config(), tiny_config("optim.lr=2e-3", "batch.rec=12")) == [
        "optim.lr: 0.001 -> 0.002",
        "batch.rec: 6 -> 12",
    ]


def test_a_section_that_only_one_run_has_is_told_setting_by_setting() -> None:
    changes = science_changes(tiny_config(), CONFIG)
    assert "objectives.rec.align.weight: None -> 0.1" in changes
    assert all(change.startswith("objectives.rec.align.") for change in changes)
    assert len(science_changes(CONFIG, tiny_config())) == len(changes)


def test_a_file_is_compared_by_its_digest_where_both_runs_have_one() -> None:
    def run(path: str, *digest: str) -> Config:
        return tiny_config(f"data.tokenizer={path}", *(f"data.tokenizer_sha256={letter * 64}" for letter in digest))

    assert fingerprint(run("a", "d")) == fingerprint(run("b", "d")) != fingerprint(run("a", "e"))
    assert science_changes(run("a", "d"), run("b", "d")) == []
    [change] = science_changes(run("a", "d"), run("a", "e"))
    assert change == f"data.tokenizer_sha256: {'d' * 64} -> {'e' * 64} (data.tokenizer=a holds another file)"
    assert science_changes(run("a"), run("a", "d")) == [], "of a run from before there were digests"
    assert science_changes(run("a"), run("b", "d")) == ["data.tokenizer: a -> b"]


class Inner(Section):
    width: int = 8
    later: typing.Annotated[int, AddedLater()] = 3


class Outer(Section):
    inner: Inner = Inner()
    other: Inner | None = None


def test_a_setting_that_came_later_counts_where_it_is_not_at_its_default() -> None:
    outer = Outer(inner=Inner(later=4), other=Inner())
    tree = outer.model_dump()
    drop_added_later_defaults(outer, tree)
    assert tree == {"inner": {"width": 8, "later": 4}, "other": {"width": 8}}
    plain, learnt = (load_run("configs/dit_b.yaml", [f"generator.variance={kind}"]) for kind in ("fixed", "learnt"))
    assert fingerprint(plain) != fingerprint(learnt)
    assert science_changes(plain, learnt) == ["generator.variance: fixed -> learnt"]


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """Written down once: a checkpoint made yesterday must be recognised today."""
    assert fingerprint(tiny_config("name=other", "system.compile=on")) == fingerprint(tiny_config())
    assert len(fingerprint(CONFIG)) == 16
    assert int(fingerprint(CONFIG), 16) >= 0
