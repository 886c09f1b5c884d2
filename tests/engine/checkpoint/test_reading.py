"""Start of a run whose directory has checkpoints: refused, resumed, and which settings a resume can change."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from configs.generator import GeneratorConfig
from configs.load import validate
from engine.checkpoint import reading
from engine.checkpoint.contents import load_checkpoint
from engine.checkpoint.directory import SUMS
from engine.checkpoint.reading import check_start
from engine.checkpoint.saver import save
from model.losses.comm import Comm
from tests.engine import ranks
from tests.engine.small_runs import write_checkpoint
from tests.harness import run_ranks
from tests.tiny import tiny_config

REFUSED_CHANGES = {
    "model.trunk.width=16": "model.trunk.width: 32 -> 16",
    "model.trunk.depth=1": "model.trunk.depth: 2 -> 1",
    "model.trunk.heads=4": "model.trunk.heads: 2 -> 4",
    "model.latent_channels=4": "model.latent_channels: 8 -> 4",
    "objectives.clip.kind=sigmoid": "objectives.clip.kind: softmax -> sigmoid",
    "objectives.rec.mask=[-0.1,0.7]": "objectives.rec.mask: None -> [-0.1, 0.7]",
    "ema=0.9": "ema: None -> 0.9",
}


@pytest.mark.L0
@pytest.mark.parametrize("override", REFUSED_CHANGES)
def test_a_setting_that_weights_depend_on_cannot_change_and_allow_change_is_not_suggested(
    tmp_path: Path, override: str
) -> None:
    here = f"system.run_dir={tmp_path}"
    write_checkpoint(tmp_path / "checkpoints", tiny_config(here))
    changed = tiny_config(here, override, "optim.lr=2e-3")
    for allowed in ((), (override.partition("=")[0], "optim.lr")):
        with pytest.raises(UserError, match="are those of another model") as caught:
            check_start(changed, True, allowed)
        assert f"({REFUSED_CHANGES[override]})" in str(caught.value)
        assert "say --allow-change" not in str(caught.value)


@pytest.mark.L0
@pytest.mark.parametrize("damage", ["nothing", "latest", "sums"])
def test_a_plain_start_over_checkpoints_is_refused_whatever_is_wrong_with_them(tmp_path: Path, damage: str) -> None:
    config = tiny_config(f"system.run_dir={tmp_path}")
    check_start(config, False, ())
    path = write_checkpoint(tmp_path / "checkpoints", config)
    if damage == "latest":
        (tmp_path / "checkpoints" / "latest").write_text("garbage")
    elif damage == "sums":
        (path / SUMS).unlink()
    with pytest.raises(UserError, match=r"already holds a run \(step-00000003\): go on with --resume"):
        check_start(config, False, ())


@pytest.mark.L0
@pytest.mark.parametrize("override", ["model.trunk.drop_path=0.4", "model.rope_base=50", "objectives.ssl.weight=0.5"])
def test_a_setting_that_no_weight_depends_on_can_change_and_allow_change_is_suggested(
    tmp_path: Path, override: str
) -> None:
    here = f"system.run_dir={tmp_path}"
    write_checkpoint(tmp_path / "checkpoints", tiny_config(here))
    changed, key = tiny_config(here, override), override.partition("=")[0]
    with pytest.raises(UserError, match=f"or say --allow-change {key}$"):
        check_start(changed, True, ())
    check_start(changed, True, (key,))


@pytest.mark.L0
def test_a_generators_times_may_change_and_its_width_may_not(tmp_path: Path) -> None:
    def generator(**section: object) -> GeneratorConfig:
        tree = {"width": 32, "depth": 2, "heads": 2, "model": "diffusion", **section}
        latents = {"train": "latents"}
        run = {"name": "g", "kind": "generator", "generator": tree, "latents": latents, "batch": {"samples": 4}}
        return validate(run | {"optim": {"steps": 4}, "system": {"run_dir": str(tmp_path)}}, "test", GeneratorConfig)

    write_checkpoint(tmp_path / "checkpoints", generator())
    check_start(generator(times={"mean": 1.0}), True, ("generator.times.mean",))
    with pytest.raises(UserError, match=r"\(generator.width: 32 -> 16\)"):
        check_start(generator(width=16), True, ("generator.width",))


def save_and_load_others(comm: Comm, root: Path, variants: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Load a checkpoint of the tiny config under other configs; return each error text, "" where it loads."""
    config, errors = tiny_config("optim.steps=6"), {}
    parts = ranks.build(config, comm, "zero3")
    ranks.run_steps(parts, config, comm, 0, 1)
    save(root, 1, parts.train_state(None), config)
    for name, overrides in variants.items():
        other = ranks.build(tiny_config("optim.steps=6", *overrides), comm, "zero2")
        try:
            load_checkpoint(reading.latest_readable(root), other.train_state(None))
            errors[name] = ""
        except UserError as error:
            errors[name] = str(error)
    return errors


@pytest.mark.L1
def test_weights_of_another_shape_are_refused_by_name_and_an_objective_may_be_left_out(tmp_path: Path) -> None:
    variants = {
        "narrower": ("model.trunk.width=16",),
        "shallower": ("model.trunk.depth=1",),
        "more": ("objectives.clip.kind=sigmoid",),
        "without ssl": ("objectives.ssl.weight=0", "batch.ssl=0"),
    }
    [errors] = run_ranks(save_and_load_others, 1, tmp_path, variants)
    path = tmp_path / "step-00000001"
    assert f"trunk.cls_token is (1, 1, 32) in {path} and (1, 1, 16) in this run" in errors["narrower"]
    assert f"is (32,) in {path} and not there in this run" in errors["shallower"]
    assert "trunk.blocks.1." in errors["shallower"]
    assert f"clip.logit_bias is not in {path} and (1,) in this run" in errors["more"]
    assert errors["without ssl"] == ""
