"""The directory of a run's checkpoints: drafts, commits, `latest`, checksums; safe against a kill at any point.

    root/.step-00000300.tmp/     a draft: every rank writes its file here, and its sum when the file is on disk
    root/step-00000300/          the same directory, renamed once all sums are there
    root/latest                  "step-00000300"

What has no SHA256SUMS is no checkpoint. Nothing here knows ranks or tensors; one process commits, any may read.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from configs import UserError
from data.durable_files import fsync_path, write_atomic

LATEST, SUMS = "latest", "SHA256SUMS"
BLOCK = 1 << 22  # bytes read at once
_NAME = re.compile(r"step-[0-9]{1,18}")


def checkpoint_name(step: int) -> str:
    """Return the directory name of a checkpoint after `step` steps: 300 -> "step-00000300"."""
    return f"step-{step:08d}"


def draft_path(root: Path, step: int) -> Path:
    """Return where a checkpoint is written before it is committed: root/.step-00000300.tmp."""
    return root / f".{checkpoint_name(step)}.tmp"


def clear_drafts(root: Path) -> None:
    """Remove what was not committed. No rank may be writing."""
    for draft in root.glob(".step-*.tmp"):
        shutil.rmtree(draft)
    for draft in root.glob(f".{LATEST}.*.tmp"):
        draft.unlink()


def checksum_line(path: Path) -> str:
    """Return a file's line of SHA256SUMS, as sha256sum(1) writes it. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return f"{digest.hexdigest()}  {path.name}\n"


def commit_draft(draft: Path, sums: list[str]) -> Path:
    """Turn a draft, whose files are all on disk, into a checkpoint, and let `latest` name it; return its path."""
    step = draft.name.removeprefix(".").removesuffix(".tmp")
    final = draft.with_name(step)
    write_atomic(draft / SUMS, "".join(sums))
    fsync_path(draft)
    aside = _set_aside(final) if final.exists() else None  # the same step saved again, after going back
    draft.rename(final)
    fsync_path(final.parent)
    write_atomic(final.parent / LATEST, final.name)
    fsync_path(final.parent)
    if aside:
        shutil.rmtree(aside)
    return final


def step_of(path: Path) -> int:
    """Return the steps of a checkpoint's path, the inverse of `checkpoint_name`. Raises ValueError for another name."""
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(root: Path) -> list[Path]:
    """List the committed checkpoints, sorted by step."""
    found = [path for path in root.glob("step-*") if path.name[5:].isdigit() and (path / SUMS).is_file()]
    return sorted(found, key=step_of)


def step_directories(root: Path) -> list[Path]:
    """List the directories named step-*, complete or not, sorted by name: a new run would overwrite them."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def resume_candidates(root: Path) -> list[Path]:
    """List the checkpoints to resume from, best first: what `latest` names, then those before it, newest first.

    Without a `latest` (a kill before the first was written) the newest counts as named. Raises UserError where `latest`
    names no checkpoint of this directory: it was edited, or a checkpoint removed, by hand.
    """
    finished, latest = complete_checkpoints(root), read_latest(root)
    if latest is None:
        return finished[::-1]
    before = [path for path in finished[::-1] if step_of(path) < step_of(latest)]
    return [latest, *before] if latest in finished else before


def read_latest(root: Path) -> Path | None:
    """Return the checkpoint that `latest` names, complete or not; None without a `latest`. Raises UserError."""
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    text = pointer.read_text(errors="replace").strip()
    step = int(text.removeprefix("step-")) if _NAME.fullmatch(text) else -1
    if step < 0 or text != checkpoint_name(step) or not _is_present_or_interrupted(root / text):
        choices = ", ".join(path.name for path in complete_checkpoints(root)) or f"none is complete in {root}"
        raise UserError(
            f"{pointer} names {text[:80]!r}, which is no checkpoint there: it must hold the name of the one to "
            f"resume from ({choices}); write one of these names into it, or remove {pointer} to resume from the newest"
        )
    return root / text


def remove_old_checkpoints(root: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove old checkpoints; return those removed.

    Kept are the last `keep_last` up to the one that `latest` names, the first at or after each multiple of
    `keep_every` steps (0: none), and whatever is newer than `latest`: a user has gone back on purpose.
    """
    finished, named = complete_checkpoints(root), resume_candidates(root)[:1]
    past = [path for path in finished if named and step_of(path) <= step_of(named[0])]
    before = [0, *map(step_of, past)]
    landmarks = [
        path
        for path, previous in zip(past, before, strict=False)
        if keep_every and step_of(path) // keep_every > previous // keep_every
    ]
    old = [path for path in past[:-keep_last] if path not in landmarks]
    for path in old:
        shutil.rmtree(_set_aside(path))
    return old


def check_checksums(path: Path, names: list[str] | None = None) -> None:
    """Check files of a checkpoint against SHA256SUMS: all, or those of these names.

    Raises UserError that names the first file which is missing or differs.
    """
    sums = read_checksums(path)
    for name in sums if names is None else names:
        try:
            found = checksum_line(path / name).partition("  ")[0]
        except OSError as error:
            raise UserError(f"{path}/{name} cannot be read ({error.strerror}): the checkpoint is damaged") from None
        if found != sums[name]:
            size = (path / name).stat().st_size
            raise UserError(
                f"{path}/{name} is not what was saved ({size} bytes, SHA-256 {found[:16]}, expected {sums[name][:16]}):"
                " the checkpoint is damaged"
            )


def read_checksums(path: Path) -> dict[str, str]:
    """Return SHA-256 by file name. Raises UserError where the list cannot be read or is not that of the files there."""
    try:
        pairs = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
        sums = {name: digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{SUMS} cannot be read ({error}): the checkpoint is damaged") from None
    differ = sums.keys() ^ ({file.name for file in path.iterdir()} - {SUMS})
    for name in sorted(differ):
        wrong = "missing" if name in sums else f"not in {SUMS}"
        raise UserError(f"{path}/{name} is {wrong}: the checkpoint is damaged")
    return sums


def _is_present_or_interrupted(path: Path) -> bool:
    """Whether the checkpoint exists, damaged or not, or a kill interrupted saving the same step again."""
    return path.is_dir() or draft_path(path.parent, step_of(path)).is_dir() or _replaced_path(path).is_dir()


def _replaced_path(path: Path) -> Path:
    """Return where a checkpoint is moved while its step is saved again."""
    return path.with_name(f".{path.name}.old.tmp")


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint, atomically, to what is none; `clear_drafts` removes what a kill leaves of it."""
    aside = _replaced_path(path)
    path.rename(aside)
    return aside
