"""A run that starts from a weights file has exactly the file's numbers at its first step, whoever holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import Config, UserError, fingerprint
from engine.initial_weights import _check_meaning, initial_weights, match_tensors, with_digests
from model.interchange import main
from model.losses.comm import Comm
from model.weights import digest, read_weights, write_weights
from tests.engine import ranks
from tests.harness import run_ranks
from tests.model.tiny_weights import build, write_run
from tests.tiny import tiny_config

LOADED = "trunk, bottleneck, decoder, text, clip"
STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line makes of a run: exported to the public layout, and imported from there."""
    folder = tmp_path_factory.mktemp("initial")
    run = write_run(folder / "run", tiny_config())
    assert main(["export", str(run), "--out", str(folder / "public")]) == 0
    assert main(["import", str(folder / "public"), "--out", str(folder / "weights.safetensors")]) == 0
    return folder / "weights.safetensors"


def other_run(imported: Path, *overrides: str) -> Config:
    """A run that would draw other weights than the file's."""
    return tiny_config("seed=7", f"init.weights={imported}", *overrides)


def first_weights(comm: Comm, config: Config) -> dict[str, tuple[ranks.Trained, str]]:
    """By ZeRO stage, what the run's weights are before its first step, and what it says of them."""
    built = {stage: ranks.build(config, comm, stage) for stage in STAGES}
    return {stage: (ranks.outcome(parts, []), parts.choices["weights"]) for stage, parts in built.items()}


@pytest.mark.L1
def test_on_two_ranks_under_zero_1_2_and_3_the_first_weights_are_the_files(imported: Path) -> None:
    config = other_run(imported)
    given, drawn = read_weights(imported)[0], dict(build(config).named_parameters())
    for stage, (found, said) in run_ranks(first_weights, 2, config)[1].items():
        for name, weight in found.weights.items():
            expected = given[name] if name in given else drawn[name]
            assert torch.equal(weight, expected), (stage, name)
        for name, weight in found.teacher.items():
            assert torch.equal(weight, found.weights[name.removeprefix("teacher.")]), (stage, name)
        assert said == f"{imported}: {LOADED}; teacher from the student; drawn: prototypes"
    assert not torch.equal(given["trunk.blocks.0.attn.qkv.weight"], drawn["trunk.blocks.0.attn.qkv.weight"])


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}


@pytest.mark.L0
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.trunk.width=48",), r"trunk.cls_token is \(1, 1, 32\) there and \(1, 1, 48\) in this run"),
        (
            ("model.trunk.depth=3",),
            r"trunk.blocks.2.norm1.weight \(32,\) is not there, though other tensors of trunk are",
        ),
        (("model.trunk.depth=1",), r"trunk.blocks.1.attn.proj.bias \(32,\) has no place in this run"),
        (("model.trunk.heads=4",), "trained with model.trunk.heads=2, this run has 4"),
        (("model.rope_dtype=fp32",), "trained with model.rope_dtype=bf16, this run has fp32"),
        (("model.decoder.norm=rmsnorm",), "decoder.* has no place in this run"),
    ],
)
def test_weights_of_another_architecture_are_one_error_that_names_the_first_difference(
    imported: Path, overrides: tuple[str, ...], message: str
) -> None:
    config = other_run(imported, *overrides)
    with pytest.raises(UserError, match=message) as error, initial_weights(config, shapes_of(config)):
        pass
    assert str(error.value).startswith(f"init.weights={imported}: ")


@pytest.mark.L0
def test_parts_that_the_file_lacks_are_drawn_and_parts_the_run_lacks_are_left_and_both_are_said(imported: Path) -> None:
    only_trunk = {name: t for name, t in load_file(imported).items() if name.split(".")[0] in ("trunk", "decoder")}
    path = imported.with_name("part.safetensors")
    write_weights(path, only_trunk, tiny_config().model)
    config = other_run(path, "batch.rec=0", "objectives.rec.weight=0", "objectives.clip.kind=sigmoid")
    with initial_weights(config, shapes_of(config)) as initial:
        drawn = "text, clip, clip.logit_bias, prototypes"
        assert initial.summary == f"{path}: trunk; teacher from the student; drawn: {drawn}; not used: decoder"
        norm, scale = torch.zeros(32), torch.zeros(1)
        assert initial.fill("teacher.trunk.norm.weight", norm)
        assert not initial.fill("clip.logit_scale", scale)
    assert torch.equal(norm, only_trunk["trunk.norm.weight"])
    assert scale.item() == 0.0, "what the file lacks is left alone"


@pytest.mark.L0
def test_masking_may_begin_and_end_with_other_weights(imported: Path) -> None:
    masks = "objectives.rec.mask=[-0.1,0.7]"
    config = other_run(imported, masks)
    with initial_weights(config, shapes_of(config)) as initial:
        assert initial.summary.endswith("drawn: decoder.mask_token, prototypes")
    path = imported.with_name("masked.safetensors")
    write_weights(path, build(tiny_config(masks)).state_dict(), tiny_config().model)
    config = other_run(path)
    with initial_weights(config, shapes_of(config)) as initial:
        assert initial.summary.endswith("not used: decoder.mask_token")


@pytest.mark.L0
def test_two_l_channels_of_moments_are_not_taken_for_a_latent() -> None:
    gaussian, point = tiny_config("model.latent=gaussian").model, tiny_config("model.latent_channels=16").model
    _check_meaning(gaussian, gaussian, {"bottleneck"})
    with pytest.raises(UserError, match="latent=gaussian, this run has deterministic"):
        _check_meaning(gaussian, point, {"bottleneck"})


@pytest.mark.L0
def test_a_file_with_a_teacher_gives_it_and_one_with_nothing_of_the_run_is_refused() -> None:
    held = {"trunk.norm.weight": (4,), "teacher.trunk.norm.weight": (4,)}
    assert match_tensors(held, held) == {name: name for name in held}
    with pytest.raises(UserError, match="it holds decoder, nothing that this run trains"):
        match_tensors(held, {"decoder.norm.weight": (4,)})


@pytest.mark.L0
def test_the_fingerprint_is_of_what_the_file_holds_and_not_of_where_it_lies(imported: Path, tmp_path: Path) -> None:
    tensors, moved, changed = load_file(imported), tmp_path / "moved.safetensors", tmp_path / "changed.safetensors"
    save_file(tensors, moved, {"written": "elsewhere"})
    save_file(tensors | {"trunk.norm.weight": tensors["trunk.norm.weight"] + 1e-3}, changed)
    here, there, else_ = (with_digests(tiny_config(f"init.weights={p}"), False) for p in (imported, moved, changed))
    assert here.init.sha256 == digest(imported)
    assert fingerprint(here) == fingerprint(there)
    assert len({fingerprint(config) for config in (here, else_, tiny_config())}) == 3
    with pytest.raises(UserError, match=f"has the digest {else_.init.sha256}, but init.sha256={here.init.sha256}"):
        with_digests(tiny_config(f"init.weights={changed}", f"init.sha256={here.init.sha256}"), False)


@pytest.mark.L0
def test_a_resumed_run_does_without_the_file(tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    config = tiny_config(f"init.weights={gone}", f"init.sha256={'0' * 64}")
    assert with_digests(config, resume=True) == config
    with initial_weights(config, {}, resume=True) as initial:
        assert not initial.fill("trunk.norm.weight", torch.zeros(32))
    for asked, resume in ((config, False), (tiny_config(f"init.weights={gone}"), True)):
        with pytest.raises(UserError, match="is not a file: it is what"):
            with_digests(asked, resume)


@pytest.mark.L0
def test_a_file_that_is_cut_off_is_one_clear_error(imported: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(imported.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"cut.safetensors is not a safetensors file, or is cut off"):
        with_digests(tiny_config(f"init.weights={path}"), resume=False)
