"""Image folders and tables as people have them: a caption reaches its own image, or is counted by name.

A folder may hold links, pipes, devices and decompression bombs: each is left out under its reason, and nothing hangs.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from configs import UserError
from data import corpus, processes
from data.corpora import folder
from data.corpora.image_files import folder_classes, folder_splits, list_files, table_captions
from data.corpora.samples import CorpusSample, UnusableImage, load_image
from data.corpus import main, show_progress
from tests.data.tar_shards import encoded, huge_png
from tests.data.test_corpus import digests, read_split

pytestmark = pytest.mark.L0

IMAGES = [encoded(i, "PNG", 8, 8) for i in range(6)]


def write(source: Path, *names: str, **texts: bytes) -> Path:
    """Images of these names, and caption files."""
    for number, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(IMAGES[number])
    for name, text in texts.items():
        (source / f"{name}.txt").write_bytes(text)
    return source


def pack(source: Path, *options: object) -> dict[str, tuple[str, str]]:
    """File -> (split, caption) of the corpus made of `source`."""
    out = source.parent / "out"
    assert main([str(argument) for argument in ("folder", source, "--out", out, *options)]) == 0
    return {
        json.loads(sample["json"])["file"]: (split, sample["txt"].decode())
        for split in ("train", "held_out")
        for _, sample in read_split(out, split)
    }


def skipped(source: Path) -> dict[str, str]:
    listed = json.loads((source.parent / "out" / "skipped.json").read_text())
    found = {entry["file"]: entry["reason"] for entry in listed}
    assert len(found) == len(listed), "a file is counted twice"
    return found


def refusal(source: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    out = source.parent / "out"
    assert main([str(argument) for argument in ("folder", source, "--out", out, *options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not out.exists()
    return error


# Tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('0.png,"a cat\n1.png,a dog\n2.png,"b"\n', r"row 1 \(line 2\) has a misplaced quote"),
        (
            '0.png,x\n\n1.png,"a cat\n2.png,a dog\n',
            r"row 2 \(line 4\) has a misplaced quote \(unexpected end of data",
        ),
        ('0.png,"a 5" pipe"\n', r"row 1 \(line 2\) has a misplaced quote"),
        (
            '0.png,"a cat\n1.png,a dog"\n2.png,b\n',
            r"row 1 \(line 2\) continues over the line '1.png,a dog', which looks",
        ),
        (
            '0.png,"two\nlines"\n1.png,a cat, on a mat\n',
            r'row 2 \(line 4\) has 3 cells, the header 2: .* in quotes, "a cat, on a mat"',
        ),
        ("0.png,a\n./0.png,b\n", r"row 2 \(line 3\) lists 0.png again: .* with a list of its captions"),
    ],
)
def test_cut_captions_and_joined_rows_are_errors_with_row_and_line(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "c.csv").write_text("file,caption\n" + rows)
    with pytest.raises(UserError, match=message):
        table_captions(tmp_path / "c.csv")


def test_captions_with_commas_quotes_and_lines_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(
        b'\xef\xbb\xbffile,width,caption\r\n0.png,8,"a cat, ""tabby"""\r\n\r\n'
        b'1.png,8,"two\r\nlines"\r\n2.png,8,a 5" pipe,,\r\n'
    )
    texts = {"0.png": ('a cat, "tabby"',), "1.png": ("two\r\nlines",), "2.png": ('a 5" pipe',)}
    assert table_captions(tmp_path / "c.csv").texts == texts
    (tmp_path / "c.tsv").write_text("0.png\tx\n")
    with pytest.raises(UserError, match=r"line 1 has no column file or file_name, it has '0.png', 'x'"):
        table_captions(tmp_path / "c.tsv")
    (tmp_path / "c.tsv").write_text("text\tfile_name\na cat, a dog\t0.png\n", encoding="utf-16")
    assert table_captions(tmp_path / "c.tsv").texts == {"0.png": ("a cat, a dog",)}


def test_a_table_in_another_encoding_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes("file,caption\n0.png,a\n1.png,café\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"line 3 is not UTF-8 \(byte 0xe9 is not UTF-8\): .* save it as UTF-8"):
        table_captions(tmp_path / "c.csv")


@pytest.mark.parametrize(
    "table",
    [
        ("c.csv", 'file,caption\n0.png,a\n1.png\n2.png,\n3.png,"\u200b "\n,x\n4.png,e\n', "row 5 (line 6)"),
        (
            "c.jsonl",
            '{"file": "0.png", "caption": "a"}\n{"file": "1.png"}\n{"file": "2.png", "caption": null}\n'
            '{"file": "3.png", "caption": "\u200b "}\n{"file": null, "caption": "x"}\n'
            '{"file_name": "4.png", "text": "e"}\n',
            "line 5",
        ),
    ],
)
def test_a_row_without_caption_or_name_costs_that_row_and_is_counted(
    tmp_path: Path, table: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, where = table
    source = write(tmp_path / "source", *(f"{i}.png" for i in range(6)))
    (tmp_path / name).write_text(content)
    found = pack(source, "--captions", tmp_path / name, "--held-out-share", 0)
    assert found == {"0.png": ("train", "a"), "4.png": ("train", "e")}
    reasons = skipped(source)
    assert reasons == {
        "1.png": "no caption", "2.png": reasons["2.png"], "3.png": "empty caption", "5.png": "no caption",
        f"{name} {where}": "no file name in the table",
    }  # fmt: skip
    assert reasons["2.png"] in ("no caption", "empty caption")
    assert "left out 5: " in capsys.readouterr().err


def test_names_match_whatever_their_unicode_form_or_slashes(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    source = write(tmp_path / "source", f"{apart}/{apart}.png", "b/1.png", f"{composed}.png", "d.png")
    (tmp_path / "c.csv").write_text(
        f"file,caption\n{composed}/{composed}.png,a\nb\\1.png,b\n{apart}.png,c\n d.png ,d\ngone.png,e\n"
    )
    found = pack(source, "--captions", tmp_path / "c.csv", "--held-out-share", 0)
    assert {name: text for name, (_, text) in found.items()} == {
        f"{apart}/{apart}.png": "a", "b/1.png": "b", f"{composed}.png": "c", "d.png": "d"
    }  # fmt: skip
    assert skipped(source) == {"gone.png": "caption without image"}


def test_an_exact_file_name_wins_over_another_unicode_form(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    source = write(tmp_path / "source", composed, apart)
    (tmp_path / "c.csv").write_text(f"file,caption\n{composed},one\n{apart},two\n")
    found = pack(source, "--captions", tmp_path / "c.csv", "--held-out-share", 0)
    assert {name: text for name, (_, text) in found.items()} == {composed: "one", apart: "two"}


def test_held_out_images_are_chosen_among_those_that_have_captions(tmp_path: Path) -> None:
    source = write(tmp_path / "source", *(f"{i}.png" for i in range(6)), **{"1": b"one", "4": b"four"})
    found = pack(source, "--held-out-share", 0.5)
    assert sorted(split for split, _ in found.values()) == ["held_out", "train"]
    assert len(skipped(source)) == 4


def test_several_captions_of_an_image_reach_the_shards(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "0.png")
    (tmp_path / "c.jsonl").write_text('{"file": "0.png", "caption": ["a cat", null, "a tabby"]}\n')
    assert pack(source, "--captions", tmp_path / "c.jsonl", "--train-tokenizer", 300)["0.png"] == ("train", "a cat")
    [(_, sample)] = read_split(tmp_path / "out", "train")
    assert json.loads(sample["json"])["captions"] == ["a cat", "a tabby"]


# Files beside the images -------------------------------------------------------------------------------------


def test_caption_files_are_decoded_by_their_byte_order_mark_or_refused(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", *(f"{name}.png" for name in "abcde"),
        a="a caf\u00e9".encode("utf-16"), b="b caf\u00e9".encode("cp1252"), c=b"\0\0", d=b"one\r\ntwo\r\n",
    )  # fmt: skip
    (source / "e.TXT").write_text("loud")
    found = pack(source, "--held-out-share", 0)
    assert found == {"a.png": ("train", "a caf\u00e9"), "d.png": ("train", "one\ntwo"), "e.png": ("train", "loud")}
    assert skipped(source) == {"b.png": "caption is not UTF-8: byte 0xe9 is not UTF-8", "c.png": "empty caption"}


# Folders -------------------------------------------------------------------------------------------------------


def test_a_caption_file_may_be_named_after_the_whole_image_name(tmp_path: Path) -> None:
    source = write(tmp_path / "a", "cat.jpg", "cat.png", "dog.png", "fox.2.png")
    for name, text in {
        "cat.jpg.txt": "a cat",
        "cat.png.txt": "a tabby",
        "dog.txt": "a dog",
        "fox.2.txt": "foxes",
    }.items():
        (source / name).write_text(text)
    (source / "dog.png.txt").write_text("a dog that goes on after the name")
    expected = {"cat.jpg": "a cat", "cat.png": "a tabby", "dog.png": "a dog", "fox.2.png": "foxes"}
    found = {name: caption for name, (_, caption) in pack(source, "--held-out-share", "0").items()}
    assert found == expected


def test_split_folders_name_no_class_and_decide_what_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", "train/cat/0.png", "train/red_fox/1.png", "Val/cat/2.png", "test/cat/3.png")
    assert "which decide what is held out" in refusal(source, capsys, "--caption-from-folder", "--held-out-share", 0.1)
    assert pack(source, "--caption-from-folder") == {
        "train/cat/0.png": ("train", "a photo of a cat"), "train/red_fox/1.png": ("train", "a photo of a red fox"),
        "Val/cat/2.png": ("held_out", "a photo of a cat"), "test/cat/3.png": ("held_out", "a photo of a cat"),
    }  # fmt: skip
    table = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert [entry["name"] for entry in table] == ["cat", "red fox"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train/a/0.png", "validation/a/1.png"], {"train": "train", "validation": "held_out"}),
        (["train2017/0.png", "val2017/1.png"], {"train2017": "train", "val2017": "held_out"}),
        (["Training_set/0.png", "test-images/1.png"], {"Training_set": "train", "test-images": "held_out"}),
        (["train/a/0.png", "1.png"], {"train": "train"}),
        (["train/0.png", "car/1.png", "plane/2.png"], {}),  # vehicles
        (["developer/0.png", "tester/1.png"], {}),
        (["0.png"], {}),
    ],
)
def test_top_folders_are_splits_if_all_are_named_so_or_both_kinds_exist(
    names: list[str], found: dict[str, str]
) -> None:
    assert folder_splits(names) == found


def test_a_folder_called_train_among_others_is_a_class() -> None:
    assert folder_classes(["train/0.png", "car/1.png"], None) == {"train/0.png": "train", "car/1.png": "car"}


def test_nested_folders_need_a_class_folder_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source", "animals/cat/0.png", "animals/dog/1.png", "plants/2.png")
    error = refusal(source, capsys, "--caption-from-folder")
    assert "animals/cat/0.png lies in 2 folders, so its class could be 'animals' or 'cat'" in error
    assert "--class-folder has an effect with --caption-from-folder" in refusal(
        source, capsys, "--class-folder", "last"
    )
    names = list_files(source).images
    assert folder_classes(names, "last") == dict(zip(names, ["cat", "dog", "plants"], strict=True))
    assert folder_classes(names, "first") == dict(zip(names, ["animals", "animals", "plants"], strict=True))
    assert {text for _, text in pack(source, "--caption-from-folder", "--class-folder", "last").values()} == {
        "a photo of a cat", "a photo of a dog", "a photo of a plants"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "1.png"], r"no image lies in a class folder \('0.png', and 1 more\)"),
        (["train/0.png", "val/1.png"], r"no image lies in a class folder \('train/0.png', and 1 more\)"),
        (["train/a/0.png", "val/a/1.png", "more/a/2.png"], "more/a/2.png lies beside the splits train, val, in 'more'"),
    ],
)
def test_folders_that_name_no_class_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        folder_classes(names, None)


def test_every_image_type_is_packed_or_skipped_with_a_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "0.JFIF", "1.jpe", "2.gif", "3.avif", "4.HEIC", "5.jxl")
    for name, kind in (("0.JFIF", "JPEG"), ("1.jpe", "JPEG"), ("2.gif", "GIF"), ("3.avif", "AVIF")):
        (source / name).write_bytes(encoded(0, kind))
    for name in "012345":
        (source / f"{name}.txt").write_text(name)
    found = pack(source, "--held-out-share", 0)
    reasons = skipped(source)
    assert set(found) | set(reasons) == {"0.JFIF", "1.jpe", "2.gif", "3.avif", "4.HEIC", "5.jxl"}
    assert set(found) >= {"0.JFIF", "1.jpe", "2.gif"}
    assert (reasons["4.HEIC"], reasons["5.jxl"]) == ("heic image", "jpeg xl image")


def test_linked_folders_are_read_once_and_hidden_or_unreadable_ones_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", "a/0.png", ".thumbnails/0.png", "locked/1.png")
    write(tmp_path / "elsewhere", "b/2.png")
    (tmp_path / "elsewhere" / "b" / "round").symlink_to(tmp_path / "elsewhere")
    (source / "other").symlink_to(tmp_path / "elsewhere")
    (source / "again").symlink_to(source / "a")
    (source / "up").symlink_to(tmp_path)
    scan = os.scandir

    def scandir(path: str) -> object:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    files = list_files(source)
    assert files.images == ("a/0.png", "other/b/2.png")
    assert files.left_out == (
        (".thumbnails/", "hidden folder"),
        ("again/", "link to a folder that is read already"),
        ("locked/", "folder cannot be read: Permission denied"),
        ("other/b/round/", "link to a folder that is read already"),
        ("up/", "link to a folder that is read already"),
    )


# Time ----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_same_bytes_for_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", *(f"{i}.png" for i in range(6)))
    for i in range(40):
        (source / f"more{i}.png").write_bytes(IMAGES[i % 6] if i % 9 else b"<html>")
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    monkeypatch.setattr(folder, "MIN_POOL_BYTES", 1)
    for workers in (1, 2):
        command = ["folder", source, "--out", tmp_path / str(workers), "--workers", workers, "--held-out-share", 0]
        assert main([str(argument) for argument in command]) == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_a_worker_process_that_dies_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match=r"a worker process died: .* fewer processes"):
        list(processes.map_in_order(os._exit, range(100), workers=2))


def test_progress_is_a_line_a_minute_where_there_is_no_terminal_and_a_bar_where_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [CorpusSample(b"", "jpg", "", {})] * 4
    assert list(show_progress(samples, "train", 4)) == samples
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(corpus.time, "monotonic", lambda: next(clock))
    list(show_progress(samples, "train", 8))
    assert capsys.readouterr().err == "train: 2 of 8, about 3 minutes left\ntrain: 4 of 8, about 2 minutes left\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(show_progress(samples, "train", 4)) == samples
    assert "train" in capsys.readouterr().err


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "nowhere.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for path in tmp_path.iterdir():
        with pytest.raises(UnusableImage, match="not a regular file"):
            load_image(path, None)


def test_a_bomb_is_left_out_by_its_header_and_a_link_to_an_image_is_one(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(huge_png())
    with pytest.raises(UnusableImage, match="too many pixels"):
        load_image(tmp_path / "bomb.png", None)
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    assert load_image(tmp_path / "link.jpg", None)[0] == encoded(0)
