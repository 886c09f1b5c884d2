"""Read a checkpoint directory without DeepSpeed and without ranks: which one, its state, its weights, resume checks.

path = latest_readable(run_dir / "checkpoints")
read_state(path).step                       # 300
full_weights(path, AVERAGE)                 # name -> fp32 tensor
check_start(config, resume, allowed)        # UserError for a run that would be overwritten, or other science
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from configs import RunConfig, UserError, fingerprint, load_run
from configs.load import science_changes
from engine.checkpoint.directory import SUMS, resume_candidates, step_directories
from engine.checkpoint.tensor_ranges import MASTER, RangeReader
from engine.run_directory import checkpoint_directory, run_directory

# Settings that decide names, shapes or meaning of the weights: a resume cannot change them.
WEIGHT_KEYS = (
    "kind", "model.", "generator.", "discriminator.width", "discriminator.layers", "tokenizer.", "latents.tokenizer",
    "objectives.rec.align.kind", "objectives.rec.align.encoder.",
)  # fmt: skip
CHANGEABLE_KEYS = (  # settings of those sections that a resume can change
    "model.trunk.drop_path", "model.rope_base", "model.rope_dtype", "model.image_feature", "generator.direction",
    "generator.class_dropout", "generator.times.", "generator.mask_ratio.", "generator.head.repeats",
)  # fmt: skip
# Values under which part of the model has no weights: a resume cannot change them to another value.
VALUES_WITHOUT_WEIGHTS = {
    "objectives.clip.weight": "0.0", "objectives.ssl.weight": "0.0", "objectives.rec.weight": "0.0",
    "objectives.clip.kind": "softmax", "objectives.rec.mask": "None", "ema": "None",
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointState:
    """Content of a checkpoint's state.json: everything in it but tensors."""

    step: int  # steps finished
    optimizer_steps: dict[str, int]  # by engine: steps taken; fewer where non-finite gradients were skipped
    world_size: int
    fingerprint: str
    shapes: dict[str, list[int]]
    skipped_steps: int = 0  # steps of data that roll-backs left out (engine/resume.py)
    samples_digest: str = ""  # of all samples that made these weights, step by step (data/order.py)
    corpus: dict[str, str] = field(default_factory=dict)  # facts that a resume compares
    # The data cursor: samples taken or skipped. None in checkpoints of earlier versions, with one batch size.
    position: int | None = None


def latest_readable(root: Path) -> Path:
    """Return the checkpoint that `latest` names or, where its state.json cannot be read, the one before it.

    Raises UserError where there is none. Checksums are not looked at: `newest_good` (contents.py) does that.
    """
    complete = resume_candidates(root)
    for path in complete:
        with suppress(UserError):
            read_state(path)
            return path
    for path in complete:
        read_state(path)  # raises what is wrong with it
    raise UserError(f"{root} has no complete checkpoint (a directory with {SUMS})")


def check_start(config: RunConfig, resume: bool, allowed_changes: tuple[str, ...]) -> None:
    """Raise UserError where a start would overwrite a run, or a resume would continue another one."""
    if resume:
        check_science(_checkpoint_to_resume(config), config, allowed_changes)
    elif directories := step_directories(checkpoint_directory(config)):
        raise UserError(
            f"{run_directory(config)} already holds a run ({directories[-1].name}): go on "
            "with --resume, choose another name=..., or remove the directory"
        )


def _checkpoint_to_resume(config: RunConfig) -> Path:
    """Return the checkpoint to resume from. Raises UserError where there is none, or it is past optim.steps."""
    try:
        path = latest_readable(checkpoint_directory(config))
    except UserError as error:
        has_candidates = bool(resume_candidates(checkpoint_directory(config)))
        raise UserError(f"--resume: {error}" + ("" if has_candidates else "; start without --resume")) from None
    done = read_state(path).step
    if done > config.optim.steps:
        raise UserError(
            f"--resume: {path} has {done} steps done, but optim.steps={config.optim.steps}: there is nothing left to "
            "train; raise optim.steps, or write the weights of this checkpoint: "
            f"python -m engine.consolidate {run_directory(config)} --out weights.safetensors"
        )
    return path


def check_science(path: Path, config: RunConfig, allowed: tuple[str, ...] = ()) -> None:
    """Refuse a resume whose science differs from the checkpoint's, unless every changed key is in `allowed`.

    A change of a key that decides names, shapes or meaning of the weights is refused in any case.
    """
    if read_state(path).fingerprint == fingerprint(config):
        return
    changes = science_changes(load_run(path / "config.yaml"), config)
    if refused := [change for change in changes if _changes_weights(change)]:
        raise UserError(
            f"--resume: {path} was trained with other settings ({'; '.join(refused)}): its weights are those of "
            "another model, and --allow-change cannot make them fit; restore the values, or start a new run under "
            "another name"
        )
    refused = [change for change in changes if change.partition(":")[0] not in allowed]
    if refused:
        keys = ",".join(change.partition(":")[0] for change in refused)
        raise UserError(
            f"--resume: {path} was trained with other settings ({'; '.join(refused)}): a run keeps its science; "
            f"restore the values, start a new run under another name, or say --allow-change {keys}"
        )


def _changes_weights(change: str) -> bool:
    """Whether a change `key: old -> new` needs other weights than the checkpoint's."""
    key, _, values = change.partition(": ")
    if VALUES_WITHOUT_WEIGHTS.get(key) == values.partition(" -> ")[0]:
        return True
    return key.startswith(WEIGHT_KEYS) and not key.startswith(CHANGEABLE_KEYS)


def read_state(path: Path) -> CheckpointState:
    """Return the state.json of a checkpoint. Raises UserError where it is missing or damaged."""
    try:
        return CheckpointState(**json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}/state.json cannot be read ({error}): the checkpoint is damaged; write the name of an earlier one "
            f"into {path.parent}/latest, or start anew"
        ) from None


def full_weights(path: Path, key: str = MASTER) -> dict[str, Tensor]:
    """Return the main engine's fp32 weights by name, or with another `key` their running average."""
    state, reader = read_state(path), RangeReader(path)
    return {name: reader.read(key, name).reshape(shape) for name, shape in state.shapes.items()}
