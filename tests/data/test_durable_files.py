"""Lines through a disk that fills up, fails, and is well again: each is read back once, in order."""

from __future__ import annotations

import errno
import json
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.bad_samples import BadSample, BadSampleTracker, UnreadableLog, UnreadableRecord
from data.durable_files import AppendOnlyFile, write_atomic

pytestmark = pytest.mark.L0

Write = Callable[[int, bytes], int]
FULL = -1


@contextmanager
def writing(write: Write) -> Iterator[None]:
    """Inside, os.write is `write`, which gets the true one's file and bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        yield


def disk(room: list[int]) -> Write:
    """Takes so many bytes in each write, FULL: none and says why; when the list is used up, all."""
    write = os.write

    def some(descriptor: int, content: bytes) -> int:
        most = room.pop(0) if room else len(content)
        if most == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:most])

    return some


def numbers(path: Path) -> list[int]:
    """What a reader finds that passes over broken lines."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line)["n"] for line in lines if line.endswith(b"}")]  # the last byte of a whole one alone


def numbered(n: int) -> str:
    return json.dumps({"n": n, "text": "x" * (n % 7)})


@given(st.lists(st.lists(st.one_of(st.just(FULL), st.integers(0, 60)), max_size=3), max_size=12), st.integers(1, 3))
def test_whatever_the_disk_takes_each_line_is_read_once_and_in_order(rooms: list[list[int]], num_writers: int) -> None:
    """Writers take turns in one file, as ranks do; each finds the disk as the list says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run" / "log.jsonl"
        path.parent.mkdir()
        path.write_text('{"n": 1000, "te')  # a killed run has left half a line
        logs = [AppendOnlyFile(path) for _ in range(num_writers)]
        for n, room in enumerate(rooms):
            log = logs[n % num_writers]
            with writing(disk(list(room))):
                log.append(numbered(n))
            if not room:
                assert log.trouble == ""
        for log in logs:
            log.flush()
            assert log.trouble == ""
        found = numbers(path)
        assert sorted(found) == list(range(len(rooms)))
        for first in range(num_writers):
            assert [n for n in found if n % num_writers == first] == list(range(first, len(rooms), num_writers))


def test_trouble_has_path_and_reason_until_all_is_written(tmp_path: Path) -> None:
    log = AppendOnlyFile(tmp_path / "log.jsonl")
    with writing(disk([5, FULL])):  # the disk fills up in the middle of the first line
        log.append(numbered(0))
    assert log.trouble == f"{tmp_path}/log.jsonl: No space left on device"
    with writing(disk([FULL])):
        log.append(numbered(1), numbered(2))
    assert log.trouble
    log.flush()
    assert log.trouble == ""
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines == [numbered(0)[:5], numbered(0), numbered(1), numbered(2)]


def test_a_long_wait_ends_in_one_go(tmp_path: Path) -> None:
    log = AppendOnlyFile(tmp_path / "log.jsonl")
    with writing(disk([FULL])):
        log.append(*map(numbered, range(4500)))
    log.flush()
    assert log.trouble == ""
    assert numbers(tmp_path / "log.jsonl") == list(range(4500))


def test_a_line_that_lacks_its_end_alone_is_not_written_again(tmp_path: Path) -> None:
    log = AppendOnlyFile(tmp_path / "log.jsonl")
    with writing(disk([len(numbered(0)), FULL])):
        log.append(numbered(0), numbered(1))
    log.append(numbered(2))
    assert (tmp_path / "log.jsonl").read_text() == "".join(f"{numbered(n)}\n" for n in range(3))


def test_a_directory_that_is_not_there_for_a_while_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    log = AppendOnlyFile(tmp_path / "run" / "log.jsonl")
    log.append(numbered(0))
    assert log.trouble.endswith("run/log.jsonl: File exists")
    (tmp_path / "run").unlink()
    log.append(numbered(1))
    assert numbers(tmp_path / "run" / "log.jsonl") == [0, 1]


def test_the_systems_own_limit_is_survived(tmp_path: Path) -> None:
    """No patches: the kernel takes a part of a line, then refuses, in a process of its own."""
    path, child = tmp_path / "log.jsonl", os.fork()
    if child == 0:
        try:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            log, is_told = AppendOnlyFile(path), []
            for n in range(30):
                resource.setrlimit(resource.RLIMIT_FSIZE, (130 if 5 <= n < 20 else most, most))
                log.append(numbered(n))
                is_told.append(bool(log.trouble))
            os._exit(0 if is_told == [5 <= n < 20 for n in range(30)] else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert numbers(path) == list(range(30))
    assert path.read_text().count("\n") == 31  # one of them broken


def test_bad_samples_met_while_the_disk_was_full_are_written_once_later(tmp_path: Path) -> None:
    log = tmp_path / "bad_samples.jsonl"
    one, other = (BadSampleTracker(1, 100, Counter(), log) for _ in range(2))
    samples = [BadSample(f"0/{n}", "truncated image", n) for n in range(3)]
    one.record(samples[0])
    with writing(disk([9, FULL])):
        one.record(samples[1])
    other.record(samples[0])
    one.record(samples[2])
    keys = [line for line in log.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["key"] for line in keys] == ["0/0", "0/1", "0/2"]


def test_losses_met_while_the_disk_was_full_are_known_to_a_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "lost_shards.jsonl"
    log = UnreadableLog(path, rank=0)
    with writing(disk([FULL])):
        log.start_session(0)
    with writing(disk([20, FULL])):
        log.add(UnreadableRecord(7, 0, 3, -1, "vanished shard"))
    log.add(UnreadableRecord(8, 0, 4, -1, "vanished shard"))
    assert [loss.position for loss in UnreadableLog(path, rank=0).start_session(20)] == [7, 8]


def test_a_file_that_cannot_be_replaced_keeps_its_content_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "name: a\n")
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
            write_atomic(path, "name: another\n")
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() == "name: a\n"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"name: b\n", is_synced=False)
    assert path.read_text() == "name: b\n"
