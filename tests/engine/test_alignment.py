"""VA-VAE's term in the engine: the same run on one rank and on two, resumed, and a frozen encoder that stays so."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from configs import Config, UserError, fingerprint
from engine.initial_weights import with_digests
from engine.step import train_step
from model.frozen import FrozenTrunk, load_frozen
from model.losses.comm import Comm
from profiling.cost.communication import by_kind
from profiling.cost.communication import predict_collectives as communication
from profiling.cost.peak_memory import predict_states as footprint
from tests.engine import ranks
from tests.harness import run_ranks
from tests.model.dinov2_files import write_transformers
from tests.model.tiny_weights import write_run
from tests.profiling import test_communication, test_footprint
from tests.tiny import CONV, of_all_rows, random_batch, tiny_config

REC_ALONE = ("objectives.clip.weight=0", "objectives.ssl.weight=0", "batch.ssl=0")
ENCODER = "objectives.rec.align.encoder={width: 48, depth: 1, heads: 2}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of another width, depth and patch than the run's."""
    theirs = tiny_config("model.trunk={width: 48, depth: 1, heads: 2}", "model.patch_size=16", "seed=5")
    return write_run(tmp_path_factory.mktemp("align") / "theirs", theirs) / "weights.safetensors"


def aligned(encoder: Path, *overrides: str) -> Config:
    return tiny_config(f"objectives.rec.align.weights={encoder}", ENCODER, *overrides)


def trained(comm: Comm, config: Config, stage: str, steps: int) -> tuple[ranks.Trained, list[dict[str, float]], str]:
    """Weights, every step's losses as means over ranks, and the digest of the frozen encoder's bytes at the end."""
    parts, losses, centres = ranks.build(config, comm, stage), [], None
    for step in range(steps):
        record = train_step(parts, random_batch(config, step, comm.rank, comm.world_size), centres, config)
        losses.append({name: float(comm.all_sum(x)) / comm.world_size for name, x in record.losses.items()})
    return ranks.outcome(parts, []), losses, frozen_bytes(parts.frozen)


def frozen_bytes(encoder: torch.nn.Module | None) -> str:
    assert encoder is not None
    state = encoder.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


@pytest.mark.L1
@pytest.mark.parametrize(
    "overrides",
    [REC_ALONE, ("model.bottleneck_ae_only=false",), (*CONV, "model.latent=gaussian", "objectives.rec.kl=1e-6")],
    ids=["rec alone", "joint", "convolutions, Gaussian latents, as VA-VAE's own"],
)
def test_two_ranks_balance_the_gradients_of_the_whole_batch_as_one_does(
    encoder: Path, overrides: tuple[str, ...]
) -> None:
    config = aligned(encoder, *overrides)
    [(alone, once, before)] = run_ranks(trained, 1, config, "zero3", 4)
    shared, twice, after = run_ranks(trained, 2, config, "zero3", 4)[0]
    for mine, theirs in zip(once, twice, strict=True):
        assert of_all_rows(mine) == pytest.approx(of_all_rows(theirs), rel=5e-6)  # worst seen 8e-7
    for name, weight in alone.weights.items():
        # Worst seen 1.2e-6; where each rank balances by its own rows the worst is 2e-3.
        torch.testing.assert_close(weight, shared.weights[name], rtol=0, atol=1e-5)
    assert before == after
    assert {"align_cosine", "align_distance"} < once[0].keys()


@pytest.mark.L1
def test_alignment_moves_the_latents_and_nothing_moves_the_frozen_encoder(encoder: Path) -> None:
    steps, heavy = 8, "objectives.rec.align.weight=5.0"
    config = aligned(encoder, *REC_ALONE, heavy, "optim.steps=8", "optim.lr=1e-2")
    [(aligned_run, losses, after)] = run_ranks(trained, 1, config, "zero3", steps)
    first, last = (step["align_cosine"] + step["align_distance"] for step in (losses[0], losses[-1]))
    assert last < 0.9 * first  # 0.60 of 0.79
    align = config.objectives.rec.align
    assert align is not None
    assert after == frozen_bytes(FrozenTrunk.load(align, "sdpa", torch.float32))
    [plain] = run_ranks(ranks.train, 1, tiny_config(*REC_ALONE, "optim.steps=8"), "zero3", steps)
    assert not torch.equal(plain.weights["bottleneck.weight"], aligned_run.weights["bottleneck.weight"])
    assert set(aligned_run.weights) - set(plain.weights) == {"align.weight"}


@pytest.mark.L1
def test_latents_follow_dinov2(tmp_path: Path) -> None:
    """The term falls, and the file's numbers stay."""
    path = write_transformers(tmp_path / "model.safetensors")
    section = f"{{kind: dinov2, weights: {path}, patch_size: 4, encoder: {{width: 32, depth: 2, heads: 2}}, weight: 5}}"
    more = (f"objectives.rec.align={section}", "optim.steps=8", "optim.lr=1e-2")
    config = tiny_config(*REC_ALONE, *more)
    [(_, losses, after)] = run_ranks(trained, 1, config, "zero3", 8)
    first, last = (step["align_cosine"] + step["align_distance"] for step in (losses[0], losses[-1]))
    assert last < 0.9 * first
    align = config.objectives.rec.align
    assert align is not None
    assert after == frozen_bytes(load_frozen(align, "sdpa", torch.float32))


@pytest.mark.L1
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(encoder: Path, tmp_path: Path) -> None:
    config = aligned(encoder, *REC_ALONE)
    whole, resumed = run_ranks(ranks.save_and_go_on, 2, config, tmp_path / "checkpoints")[0]
    assert whole == resumed


@pytest.mark.L1
def test_what_an_aligned_step_sends_and_holds_is_what_is_predicted(encoder: Path) -> None:
    config = aligned(encoder, "system.compile=off")
    sent = (config, test_communication.ds_of(config, "zero3", 2, test_communication.SPLIT))
    [(found, calls)] = run_ranks(test_communication.counted, 2, [sent])[0]
    assert found == by_kind(communication(*sent, 2))
    assert calls == test_communication.num_messages(sent, 2)
    states = (config, test_footprint.ds_of(config, "zero3", 2))
    held = run_ranks(test_footprint.held, 2, *states)[0]
    # Worst seen 64 bytes; the frozen encoder has 130,000.
    assert held == pytest.approx(footprint(*states, 2).static_bytes, abs=2 * test_footprint.STRAY_BYTES)


@pytest.mark.L0
def test_the_frozen_encoder_is_pinned_by_what_it_holds_and_needed_by_a_resumed_run_too(encoder: Path) -> None:
    moved = encoder.with_name("moved.safetensors")
    moved.write_bytes(encoder.read_bytes())
    here, there = with_digests(aligned(encoder), False), with_digests(aligned(moved), False)
    assert here.objectives.rec.align is not None
    assert here.objectives.rec.align.sha256
    assert fingerprint(here) == fingerprint(there) != fingerprint(aligned(encoder))
    with pytest.raises(UserError, match=r"objectives.rec.align.weights=.* has the digest .*: this is another file"):
        with_digests(aligned(encoder, f"objectives.rec.align.sha256={'0' * 64}"), False)
    moved.unlink()
    with pytest.raises(UserError, match=r"moved\.safetensors does not exist"):
        with_digests(there, resume=True)


@pytest.mark.L0
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("objectives.rec.weight=0", "batch.rec=0"), "align is set but weight=0"),
        (("objectives.rec.mask=[0.1,0.5]",), r"align is set and mask=\[0.1, 0.5\]: the frozen encoder sees whole"),
        (
            ("objectives.rec.align.patch_size=24",),
            "views.image_size=32 is not a multiple of objectives.rec.align.patch",
        ),
        (("objectives.rec.align.weight=0",), "objectives.rec.align.weight=0: input should be greater than 0"),
    ],
)
def test_an_alignment_without_effect_or_place_is_an_error(encoder: Path, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        aligned(encoder, *overrides)
