"""Reading a checkpoint directory: which one, what it is, its weights as one file. Needs no DeepSpeed and no ranks.

python -m engine.archive runs/demo --out weights.safetensors
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from configs import Config, DecoderGan, RunConfig, UserError, fingerprint, load_run
from configs.command_line import CommandParser, output_file
from configs.generator import GeneratorConfig
from configs.load import science_changes
from data.durable_files import fsync_path
from engine.checkpoint.directory import SUMS, candidates, step_directories
from engine.checkpoint.pieces import AVERAGE, MASTER, WHOLE, Pieces
from engine.exits import DONE, FAILED, MISTAKE
from engine.places import checkpoints, run_directory
from engine.trainings.frozen_tokenizer import write_with_decoder
from model.generator.factory import write_generator
from model.generator.tokens import LatentShape
from model.weights import WeightsOrigin, write_weights

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
class State:
    """What a checkpoint knows besides its pieces."""

    step: int  # steps finished
    optimizer_steps: dict[str, int]  # by engine: steps taken; fewer where non-finite gradients were skipped
    world_size: int
    fingerprint: str
    shapes: dict[str, list[int]]
    skipped_steps: int = 0  # whose data roll-backs left out (engine/health/rollback.py)
    samples_digest: str = ""  # of all samples that made these weights, step by step (data/order.py)
    corpus: dict[str, str] = field(default_factory=dict)  # facts about it, to be compared at a resume
    # The data cursor: samples taken or skipped. None in checkpoints of earlier versions, with one batch size.
    position: int | None = None


def find(root: Path) -> Path:
    """The checkpoint `latest` names, or where that is damaged at first sight the one before it.

    Raises UserError when there is none. Sums are not looked at (engine/checkpoint/verified.py does).
    """
    there = candidates(root)
    for path in there:
        with suppress(UserError):
            read_state(path)
            return path
    for path in there:
        read_state(path)  # says what is wrong with it
    raise UserError(f"{root} has no complete checkpoint (a directory with {SUMS})")


def check_start(config: RunConfig, resume: bool, allowed_changes: tuple[str, ...]) -> None:
    """Refuses to write over a run, or to resume another one, before anything heavy is loaded."""
    if resume:
        check_science(_checkpoint_to_resume(config), config, allowed_changes)
    elif there := step_directories(checkpoints(config)):
        raise UserError(
            f"{run_directory(config)} already holds a run ({there[-1].name}): go on "
            "with --resume, choose another name=..., or remove the directory"
        )


def _checkpoint_to_resume(config: RunConfig) -> Path:
    """Return the checkpoint to resume from. Raises UserError where there is none, or it is past optim.steps."""
    try:
        path = find(checkpoints(config))
    except UserError as error:
        has_candidates = bool(candidates(checkpoints(config)))
        raise UserError(f"--resume: {error}" + ("" if has_candidates else "; start without --resume")) from None
    done = read_state(path).step
    if done > config.optim.steps:
        raise UserError(
            f"--resume: {path} has {done} steps done, but optim.steps={config.optim.steps}: there is nothing left to "
            "train; raise optim.steps, or write the weights of this checkpoint: "
            f"python -m engine.archive {run_directory(config)} --out weights.safetensors"
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


def read_state(path: Path) -> State:
    """The `state.json` of a checkpoint. Raises UserError where it is missing or damaged."""
    try:
        return State(**json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}/state.json cannot be read ({error}): the checkpoint is damaged; write the name of an earlier one "
            f"into {path.parent}/latest, or start anew"
        ) from None


def whole_weights(path: Path, key: str = MASTER) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint's main engine by name, or another vector of theirs. Needs no DeepSpeed."""
    state, pieces = read_state(path), Pieces(path)
    return {name: pieces.read(key, name).reshape(shape) for name, shape in state.shapes.items()}


def consolidate(path: Path, out: Path, run: RunConfig | None = None) -> None:
    """What a checkpoint's run is for, as one weights file: of pre-training the student or, with `ema`, its average
    (model/weights.py), of stage 2 the tokenizer with the averaged decoder, of a generator its average
    (model/generator/factory.py).

    The file is written whole or not at all. With `run`, a config of the same science, input files are read from its
    paths. Raises OSError where it cannot be written, UserError where stage 2's tokenizer file is missing or another.
    """
    draft = out.with_name(f".{out.name}.tmp")
    try:
        _write(path, draft, run)
        fsync_path(draft)
        draft.replace(out)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()  # a full disk needs the room
        raise OSError(f"could not write {out}: {error}") from error


def _write(path: Path, out: Path, run: RunConfig | None) -> None:
    config = load_run(path / "config.yaml")
    if isinstance(config, GeneratorConfig):
        _write_generator(path, out, config)
    elif isinstance(config, DecoderGan):
        if isinstance(run, DecoderGan):  # the tokenizer may have been moved since the checkpoint
            config = config.model_copy(update={"tokenizer": run.tokenizer})
        write_with_decoder(config, whole_weights(path, AVERAGE), read_state(path).step, out)
    elif isinstance(config, Config):
        weights = whole_weights(path, MASTER if config.ema is None else AVERAGE)
        write_weights(out, weights, config.model, WeightsOrigin.of(config, read_state(path).step))


def _write_generator(path: Path, out: Path, config: GeneratorConfig) -> None:
    pieces = Pieces(path)
    whole = {name: pieces.read(WHOLE, name) for name in pieces.names(WHOLE)}
    write_generator(
        out,
        whole_weights(path, AVERAGE),
        config.generator,
        LatentShape(*whole["shape"].tolist()),
        int(whole["num_classes"]),
        whole["mean"],
        whole["std"],
        config.latents.tokenizer,
        read_state(path).step,
    )


def _checkpoints_of(directory: Path) -> Path:
    """Return the checkpoints directory of a run directory; a checkpoints directory itself is returned as it is."""
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory: give a run directory, runs/NAME, or its checkpoints directory"
        )
    inside = directory / "checkpoints"
    return inside if inside.is_dir() else directory


def main(arguments: list[str]) -> int:
    """Command line of this module; the exit code."""
    parser = CommandParser(prog="python -m engine.archive", description="Checkpoint -> one safetensors file.")
    parser.add_argument("run", type=Path, help="a run directory, or its checkpoints directory; the latest one is read")
    parser.add_argument("--out", type=output_file, required=True, help="the safetensors file to write")
    parsed = parser.parse_args(arguments)
    try:
        consolidate(find(_checkpoints_of(parsed.run)), parsed.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    print(parsed.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
