"""A checkpoint's directory: there or not there, the newest good one first, old ones gone by the policy."""

import subprocess
from pathlib import Path

import pytest

from configs import UserError
from engine.checkpoint import directory
from engine.checkpoint.contents import newest_good

pytestmark = pytest.mark.L0


def put(root: Path, step: int) -> Path:
    """A checkpoint as a save commits it."""
    draft = directory.draft_path(root, step)
    draft.mkdir(parents=True)
    files = {"rank-00000.safetensors": f"weights of {step} " * 100, "state.json": "{}", "config.yaml": "name: a\n"}
    for name, text in files.items():
        (draft / name).write_text(text)
    return directory.commit_draft(draft, [directory.checksum_line(draft / name) for name in files])


def steps(paths: list[Path]) -> list[int]:
    return [directory.step_of(path) for path in paths]


def test_what_is_committed_is_found_and_sha256sum_agrees(tmp_path: Path) -> None:
    path = put(tmp_path, 300)
    assert path == tmp_path / "step-00000300"
    assert (tmp_path / "latest").read_text() == path.name
    directory.check_checksums(path)
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert (found.returncode, found.stdout.count(": OK")) == (0, 3), found


def test_a_run_goes_on_from_latest_then_from_what_came_before_it(tmp_path: Path) -> None:
    assert directory.resume_candidates(tmp_path) == []
    for step in (100, 200, 300):
        put(tmp_path, step)
    assert steps(directory.resume_candidates(tmp_path)) == [300, 200, 100]
    (tmp_path / "latest").write_text("step-00000200")
    assert steps(directory.resume_candidates(tmp_path)) == [200, 100], "300 is of a way that somebody has left"
    (tmp_path / "latest").unlink()
    assert steps(directory.resume_candidates(tmp_path)) == [300, 200, 100]
    (tmp_path / "step-00000300" / "SHA256SUMS").unlink()
    assert steps(directory.resume_candidates(tmp_path)) == [200, 100]


@pytest.mark.parametrize(
    "text",
    ["4", "step-4", "300", "step-00000400", "no name of ours", "", "step-0000000200", "checkpoints/step-00000200"],
)
def test_a_latest_that_names_no_checkpoint_is_one_error_with_the_choices(tmp_path: Path, text: str) -> None:
    for step in (4, 200):
        put(tmp_path, step)
    (tmp_path / "latest").write_text(f"{text}\n")
    with pytest.raises(UserError) as caught:
        directory.resume_candidates(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/latest names {text!r}, which is no checkpoint there")
    assert "(step-00000004, step-00000200)" in str(caught.value)


def test_after_a_kill_while_a_step_is_saved_again_latest_is_not_an_error(tmp_path: Path) -> None:
    for step in (100, 200):
        put(tmp_path, step)
    (tmp_path / "step-00000200").rename(tmp_path / ".step-00000200.old.tmp")
    assert steps(directory.resume_candidates(tmp_path)) == [100]
    (tmp_path / ".step-00000200.old.tmp").rename(directory.draft_path(tmp_path, 200))
    assert steps(directory.resume_candidates(tmp_path)) == [100]


def test_the_same_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    (put(tmp_path, 100) / "extra").write_text("of the first time")
    again = put(tmp_path, 100)
    assert not (again / "extra").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000100"]


POLICIES = [(1, 1, 0), (3, 2, 0), (3, 2, 9), (4, 1, 10), (7, 3, 5), (2, 4, 16)]


@pytest.mark.parametrize(("every", "keep_last", "keep_every"), POLICIES)
def test_after_every_save_the_last_k_and_every_nth_are_there(
    quick_path: Path, every: int, keep_last: int, keep_every: int
) -> None:
    saved = [every * (i + 1) for i in range(20)]
    for done, step in enumerate(saved, 1):
        put(quick_path, step)
        directory.remove_old_checkpoints(quick_path, keep_last, keep_every)
        multiples = range(keep_every, step + 1, keep_every) if keep_every else ()
        landmarks = {min(step for step in saved if step >= multiple) for multiple in multiples}
        assert set(steps(directory.complete_checkpoints(quick_path))) == set(saved[:done][-keep_last:]) | landmarks
    assert [path for path in quick_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_newer_than_latest_is_removed(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        put(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000200")
    assert steps(directory.remove_old_checkpoints(tmp_path, keep_last=1, keep_every=0)) == [100]
    assert steps(directory.complete_checkpoints(tmp_path)) == [200, 300, 400]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "config.yaml", "SHA256SUMS"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, damage) -> None:  # type: ignore[no-untyped-def]
    for step in (100, 200):
        put(tmp_path, step)
    damage(tmp_path / "step-00000200" / name)
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == tmp_path / "step-00000100"
    [words] = said
    assert words.startswith(f"passed over: {tmp_path}/step-00000200")
    if (name, damage) == ("SHA256SUMS", Path.unlink):  # then it is no checkpoint at first sight
        assert words.endswith("is not complete (it has no SHA256SUMS)")
    else:
        assert "step-00000200/" in words
        assert "the checkpoint is damaged" in words


def test_without_a_good_checkpoint_the_error_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    for step in (100, 200):
        cut_off(put(tmp_path, step) / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint that can be trusted .*00200/state.json.*00100/state.json"):
        newest_good(tmp_path, lambda _: None)
    with pytest.raises(UserError, match="none is complete"):
        newest_good(tmp_path / "elsewhere", lambda _: None)
