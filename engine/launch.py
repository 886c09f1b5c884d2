"""The command: deepspeed engine/launch.py --config configs/demo.yaml [--ds_config D] [--resume] [key=value ...]

Train: check everything a user can get wrong before anything heavy is imported, so that a typo costs a second, not a
minute; then run this rank. Exit codes are those of engine/exits.py. With --max-restarts it starts the launcher itself,
and again when a rank is lost (engine/launcher.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # started by path, Python puts engine/ there, and `import engine` would fail

import argparse  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

from configs import Config, DecoderGan, RunConfig, UserError, load_run  # noqa: E402
from configs.command_line import CommandParser  # noqa: E402
from configs.deepspeed import load_ds_config  # noqa: E402
from configs.generator import GeneratorConfig  # noqa: E402
from engine.checkpoint.directory import resume_candidates  # noqa: E402
from engine.launcher import end_with_launcher, rank_environment  # noqa: E402
from engine.run_directory import checkpoint_directory, run_directory  # noqa: E402
from engine.stderr import ignore_output_errors, print_error  # noqa: E402

MAX_PATH_BYTES, MAX_SUBPATH_BYTES = 4095, 200  # of a path on Linux; of a path inside a run directory
FIRST_RANK_SECONDS = 10.0  # rank 0 has to print a mistake that all ranks see, before another rank does


class _Parser(CommandParser):
    """A CommandParser that raises UserError: one rank prints the mistake for all of them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.with_remedy(message))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. `--local_rank` is what the DeepSpeed launcher adds."""
    parser = _Parser(
        prog="deepspeed engine/launch.py",
        description="Pre-train a visual tokenizer (VTP): clip + ssl + rec in one step; or what its config says.",
    )
    parser.add_argument("--config", required=True, help="a preset, for example configs/demo.yaml")
    parser.add_argument(
        "--ds_config",
        default=str(ROOT / "configs/deepspeed/zero3.json"),
        help="DeepSpeed JSON (default: ZeRO-3)",
    )
    parser.add_argument(
        "--resume",
        choices=("latest", "auto"),
        help="go on from the run's latest good checkpoint; `--resume auto` starts where there is none",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="start the ranks from here, and again from the last checkpoint when one is lost, N times without progress",
    )
    parser.add_argument(
        "--launcher",
        default="deepspeed",
        metavar="'COMMAND ...'",
        help="what starts the ranks, with --max-restarts (default: deepspeed)",
    )
    parser.add_argument(
        "--allow-change",
        default="",
        metavar="KEY,KEY",
        help="science keys that may differ from the checkpoint's",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="overrides, for example optim.steps=100")
    return parser.parse_intermixed_args(_with_resume_mode(arguments))


def _with_resume_mode(arguments: list[str]) -> list[str]:
    """`--resume` alone is `--resume latest`: an override may follow it."""
    modes, following = ("auto", "latest"), [*arguments[1:], ""]
    pairs = zip(arguments, following, strict=True)
    return [f"{word}=latest" if word == "--resume" and after not in modes else word for word, after in pairs]


def preflight(options: argparse.Namespace) -> tuple[RunConfig, dict[str, Any], bool, tuple[str, ...]]:
    """Check all that needs no model; return config, DeepSpeed JSON, whether to resume, and what may differ then."""
    world_size = rank_environment()["WORLD_SIZE"]
    config = load_run(options.config, options.overrides)
    resume = options.resume == "latest" or (
        options.resume == "auto" and bool(resume_candidates(checkpoint_directory(config)))
    )
    ds_config = load_ds_config(options.ds_config, config, world_size)
    _require_profiled_ranks(config, world_size)
    if isinstance(config, Config):
        config = _check_pretraining(config, resume)
    elif isinstance(config, DecoderGan):
        config = _check_decoder_gan(config, resume)
    elif isinstance(config, GeneratorConfig):
        from engine.tasks.frozen_tokenizer import with_latents_digest

        config = with_latents_digest(config)
    from engine.checkpoint.reading import check_start  # imports torch: after what needs milliseconds

    _require_writable(run_directory(config))
    allowed = tuple(filter(None, map(str.strip, options.allow_change.split(","))))
    check_start(config, resume, allowed)
    return config, ds_config, resume, allowed


def main(arguments: list[str]) -> int:
    """Run one rank; return the exit code."""
    ignore_output_errors()
    end_with_launcher()
    try:
        options = parse(arguments)
        if options.max_restarts is not None:
            return _supervise(options, arguments)
        return _train(*preflight(options))
    except UserError as error:
        return _refuse(error)


def _supervise(options: argparse.Namespace, arguments: list[str]) -> int:
    """Start the launcher, and again where a rank is lost; return the exit code."""
    if "RANK" in os.environ:
        raise UserError(
            "--max-restarts, but a launcher has started this rank: a rank cannot start the others again; run `python "
            "engine/launch.py --max-restarts N --launcher 'deepspeed --hostfile ...' ...`"
        )
    from engine.launcher import supervise

    config = load_run(options.config, options.overrides)
    return supervise(options.launcher, Path(__file__).resolve(), arguments, run_directory(config), options.max_restarts)


def _train(config: RunConfig, ds_config: dict[str, Any], resume: bool, allowed_changes: tuple[str, ...]) -> int:
    from data.bad_samples import StorageError
    from engine import distributed, trainer
    from engine.exits import FAILED, LOST_RANK
    from engine.health.anomalies import TrainingFailed

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, also where no launcher has set it
    comm = distributed.start(config.system.timeout_minutes)
    try:
        return trainer.train(config, ds_config, comm, resume, allowed_changes)
    except TrainingFailed as error:
        if distributed.is_first():  # every rank has come to it
            print_error(f"error: {error}")
        return FAILED
    except StorageError as error:  # perhaps on this rank alone: engine/watch ends the others
        print_error(f"error: {error}")
        return LOST_RANK
    finally:
        distributed.stop()


def _check_pretraining(config: Config, resume: bool) -> Config:
    """Check that the input files exist; return the config with their digests filled in."""
    _require_shards(config, resume)
    from data import captions
    from engine.initial_weights import with_digests

    config = config.model_copy(update={"data": captions.with_tokenizer_digest(config.data)})
    return with_digests(config, resume)


def _check_decoder_gan(config: DecoderGan, resume: bool) -> DecoderGan:
    """Check that the input files exist; return the config with their digests filled in."""
    _require_shards(config, resume)
    from engine.tasks.frozen_tokenizer import with_tokenizer_digests

    return with_tokenizer_digests(config)


def _require_shards(config: Config | DecoderGan, resume: bool) -> None:
    """Check that all shards exist at a new run, and at least one at a resume, which skips and counts missing ones."""
    from data import order, storage

    recorded = order.recorded_shard_names(run_directory(config) / "corpus.json", config.data.train) if resume else None
    if recorded is None:
        storage.expand_patterns(config.data.train, config.system.loader.cache_dir)
    else:
        storage.require_any_shard(recorded)


def _require_profiled_ranks(config: RunConfig, world_size: int) -> None:
    missing = [rank for rank in config.profile.ranks if rank >= world_size]
    if missing:
        raise UserError(
            f"profile.ranks={list(config.profile.ranks)} but the ranks of this run are 0 to {world_size - 1}: there is "
            f"no rank {missing[0]} to record; change profile.ranks"
        )


def _require_writable(run_dir: Path) -> None:
    longest = len(os.fsencode(run_dir.absolute())) + MAX_SUBPATH_BYTES
    if longest > MAX_PATH_BYTES:
        raise UserError(
            f"system.run_dir={run_dir}: paths of files in it would have up to {longest} bytes, and the system allows "
            f"{MAX_PATH_BYTES}; choose a shorter one"
        )
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"system.run_dir={run_dir}: {there} is not a directory that can be written; choose another system.run_dir"
        )


def _refuse(error: UserError) -> int:
    """Print a mistake, once for all ranks; return the exit code.

    The launcher ends every rank when one leaves, so rank 0 alone prints what it sees too. Another rank prints when it
    is still there after a while: then it alone has met the mistake.
    """
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and int(rank) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's call; a running run would save first
        time.sleep(FIRST_RANK_SECONDS)
    print_error(f"error: {error}")
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the run can save: end without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
