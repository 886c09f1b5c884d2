"""Exchange weights with other programs: export to and import from the public layout, write standalone programs.

python -m model.interchange export runs/demo --out DIR      # the public VTP layout, vocabulary, model card
python -m model.interchange import DIR --out FILE           # back: VisualTokenizer.from_file(FILE), init.weights=FILE
python -m model.interchange programs runs/demo --out DIR    # encode.pt2, decode.pt2: torch alone runs them; --onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import UserError
from configs.command_line import CommandParser
from model.programs import write_onnx, write_programs
from model.public_config import official_class_note
from model.public_layout import PUBLIC_CONFIG, VOCABULARY, read_public
from model.tokenizer import VisualTokenizer
from model.weights import write_weights


def export(tokenizer: VisualTokenizer, out: Path, licence: str | None) -> None:
    """Write the public layout into `out`; print notes on what is missing or unreadable for the official class."""
    tokenizer.save_pretrained(out, model_card_kwargs={"license": licence} if licence else None)
    parts = {name.split(".")[0] for name in tokenizer.state_dict()}
    notes = [official_class_note(tokenizer.model, parts)]
    if "text" in parts and not (out / VOCABULARY).is_file():
        notes.append(
            f"{out} has no {VOCABULARY}, the captions' vocabulary: {tokenizer.vocabulary or 'its source'} is not "
            "available here; copy it there, or give --tokenizer to zero_shot"
        )
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr)


def import_directory(directory: Path, out: Path) -> None:
    """Convert a directory in the public layout into a weights file of ours."""
    state, model, origin = read_public(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(out, state, model, origin)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when done, 2 for a mistake that the user can fix."""
    given = _parser().parse_args(arguments)
    try:
        _check_out(given.out, is_file=given.command == "import")
        if given.command == "export":
            export(_tokenizer(given.directory), given.out, given.license)
        elif given.command == "import":
            import_directory(given.directory, given.out)
        elif given.onnx:
            write_onnx(_tokenizer(given.directory), given.out)
        else:
            write_programs(_tokenizer(given.directory), given.out)
    except (UserError, OSError) as error:  # OSError: of the disk, with the path
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


def _check_out(out: Path, is_file: bool) -> None:
    """Raise UserError where `out` exists and is a directory instead of a file, or the reverse."""
    if out.exists() and out.is_dir() == is_file:
        found, wanted = ("directory", "file") if is_file else ("file", "directory")
        raise UserError(f"--out {out} is a {found}, and what is written is a {wanted}: give another name")


def _tokenizer(directory: Path) -> VisualTokenizer:
    """Load the tokenizer of a run, or of a directory in the public layout."""
    is_public = (directory / PUBLIC_CONFIG).is_file()
    return VisualTokenizer.from_pretrained(directory) if is_public else VisualTokenizer.from_run(directory)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m model.interchange", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task, source, out in (
        ("export", "a run -> the public layout", "run directory with weights.safetensors", "DIR"),
        ("import", "the public layout -> a weights file of ours", "directory with config.json", "FILE"),
        ("programs", "either -> encode.pt2 and decode.pt2", "run directory, or one in the public layout", "DIR"),
    ):
        command = commands.add_parser(name, help=task)
        command.add_argument("directory", type=Path, help=source)
        command.add_argument("--out", type=Path, required=True, metavar=out)
        if name == "export":
            command.add_argument(
                "--license", metavar="ID", help="licence of the weights for the model card: mit, apache-2.0 ..."
            )
        if name == "programs":
            command.add_argument(
                "--onnx", action="store_true", help="write encode.onnx and decode.onnx for onnxruntime"
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
