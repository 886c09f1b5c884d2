"""Write the weights of a checkpoint as one safetensors file: the end of a run, and a command.

python -m engine.consolidate runs/demo --out weights.safetensors
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from configs import Config, DecoderGan, RunConfig, UserError, load_run
from configs.command_line import CommandParser, output_file
from configs.generator import GeneratorConfig
from data.durable_files import fsync_path
from engine.checkpoint.reading import full_weights, latest_readable, read_state
from engine.checkpoint.tensor_ranges import AVERAGE, MASTER, WHOLE, RangeReader
from engine.exits import DONE, FAILED, MISTAKE
from engine.tasks.frozen_tokenizer import write_with_decoder
from model.generator.factory import write_generator
from model.generator.tokens import LatentShape
from model.weights import WeightsOrigin, write_weights


def write_weights_file(path: Path, out: Path, run: RunConfig | None = None) -> None:
    """Write a checkpoint's weights as one file, whole or not at all.

    Pre-training: the student or, with `ema`, its average (model/weights.py). Stage 2: the tokenizer with the averaged
    decoder. A generator: its average (model/generator/factory.py).

    With `run`, a config of the same science, input files are read from its paths. Raises OSError where the file cannot
    be written, UserError where stage 2's tokenizer file is missing or another.
    """
    draft = out.with_name(f".{out.name}.tmp")
    try:
        _write_draft(path, draft, run)
        fsync_path(draft)
        draft.replace(out)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()  # a full disk needs the room
        raise OSError(f"could not write {out}: {error}") from error


def _write_draft(path: Path, out: Path, run: RunConfig | None) -> None:
    config = load_run(path / "config.yaml")
    if isinstance(config, GeneratorConfig):
        _write_generator(path, out, config)
    elif isinstance(config, DecoderGan):
        if isinstance(run, DecoderGan):  # the tokenizer may have been moved since the checkpoint
            config = config.model_copy(update={"tokenizer": run.tokenizer})
        write_with_decoder(config, full_weights(path, AVERAGE), read_state(path).step, out)
    elif isinstance(config, Config):
        weights = full_weights(path, MASTER if config.ema is None else AVERAGE)
        write_weights(out, weights, config.model, WeightsOrigin.of(config, read_state(path).step))


def _write_generator(path: Path, out: Path, config: GeneratorConfig) -> None:
    reader = RangeReader(path)
    whole = {name: reader.read(WHOLE, name) for name in reader.names(WHOLE)}
    write_generator(
        out,
        full_weights(path, AVERAGE),
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
    """Run the command; return the exit code."""
    parser = CommandParser(prog="python -m engine.consolidate", description="Checkpoint -> one safetensors file.")
    parser.add_argument("run", type=Path, help="a run directory, or its checkpoints directory; the latest one is read")
    parser.add_argument("--out", type=output_file, required=True, help="the safetensors file to write")
    parsed = parser.parse_args(arguments)
    try:
        write_weights_file(latest_readable(_checkpoints_of(parsed.run)), parsed.out)
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
