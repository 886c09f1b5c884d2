"""The corpus command: same arguments same bytes, whole or nothing, no silent loss, one line a mistake."""

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import UserError
from data import corpus
from data.captions import CaptionEncoder
from data.corpora import samples
from data.corpora.folder import ImageFolder
from data.corpora.image_files import list_files, sidecar_captions
from data.corpora.synthetic_images import render_synthetic_sample, synthetic_samples
from data.corpora.synthetic_scenes import class_names
from data.corpus import main
from data.corpus_directory import staged_directory

pytestmark = pytest.mark.L0

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def read_shard(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """[(key, {extension: bytes}), ...] in the order of the file."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return list(samples.items())


def read_split(directory: Path, split: str) -> list[tuple[str, dict[str, bytes]]]:
    return [sample for path in sorted(directory.glob(f"{split}-*.tar")) for sample in read_shard(path)]


def image_of(sample: dict[str, bytes]) -> Image.Image:
    (extension,) = set(sample) - {"txt", "json"}
    return Image.open(io.BytesIO(sample[extension]))


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    assert run("synthetic", "--out", out, "--samples", 300, "--held-out", 128, "--shard-size", 100, "--size", 32) == 0
    return out


def test_a_synthetic_corpus_holds_what_was_asked(demo: Path) -> None:
    names = [
        "README",
        "classes.json",
        "held_out-000000.tar",
        "held_out-000001.tar",
        "manifest.json",
        "tokenizer.json",
    ]
    assert sorted(p.name for p in demo.iterdir()) == [
        *names,
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]
    assert [len(read_shard(demo / f"train-00000{n}.tar")) for n in range(3)] == [100, 100, 100]
    assert [len(read_shard(demo / f"held_out-00000{n}.tar")) for n in range(2)] == [100, 28]
    shards = json.loads((demo / "manifest.json").read_text())["shards"]
    assert shards["held_out-000001.tar"] == {
        "samples": 28,
        "bytes": (demo / "held_out-000001.tar").stat().st_size,
    }


def test_samples_hold_an_image_its_caption_and_its_label(demo: Path) -> None:
    samples = read_split(demo, "train")
    assert [key for key, _ in samples] == [f"{number:09d}" for number in range(300)]
    extensions = [next(iter(set(sample) - {"txt", "json"})) for _, sample in samples]
    shares = {extension: extensions.count(extension) / 300 for extension in ("jpg", "png", "webp")}
    assert shares == pytest.approx({"jpg": 0.8, "png": 0.1, "webp": 0.1}, abs=0.06)
    for _, sample in samples[:50]:
        with image_of(sample) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
        attributes = json.loads(sample["json"])
        scene = attributes["scene"]
        assert class_names()[attributes["label"]] == f"{scene['main']['colour']} {scene['main']['shape']}"
        assert sample["txt"].decode().isprintable()


def test_held_out_is_balanced_and_shares_no_image_with_train(demo: Path) -> None:
    labels = [json.loads(sample["json"])["label"] for _, sample in read_split(demo, "held_out")]
    assert sorted(labels) == sorted([*range(64), *range(64)])
    train, held_out = (
        {image_of(sample).convert("RGB").tobytes() for _, sample in read_split(demo, split)}
        for split in ("train", "held_out")
    )
    assert len(train) == 300
    assert len(held_out) == 128
    assert not train & held_out


def test_the_same_arguments_give_the_same_bytes_whatever_the_workers(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.corpora.samples.MIN_POOL_PIXELS", 0)  # or a corpus this small is drawn in one process
    again = ("synthetic", "--samples", 300, "--held-out", 128, "--shard-size", 100, "--size", 32)
    assert run(*again, "--out", tmp_path / "again", "--workers", 3) == 0
    assert digests(tmp_path / "again") == digests(demo)


def test_another_seed_gives_other_images() -> None:
    zero, one = ([s.image for s in synthetic_samples(seed, "train", 20, 16, workers=1)] for seed in (0, 1))
    assert not set(zero) & set(one)
    assert render_synthetic_sample(0, "train", 16, 7).image == zero[7]


def test_the_tokenizer_of_a_corpus_reads_its_captions_and_prompts(demo: Path) -> None:
    encoder = CaptionEncoder(str(demo / "tokenizer.json"), 77)
    rows = encoder.encode([sample["txt"].decode() for _, sample in read_split(demo, "train")])
    assert rows.argmax(dim=1).max() < 40  # words are mostly single tokens even on 300 captions
    classes = json.loads((demo / "classes.json").read_text())["classes"]
    assert [entry["name"] for entry in classes] == class_names()
    assert encoder.encode(classes[0]["prompts"]).argmax(dim=1).min() >= 2


def test_the_tokenizer_learns_from_train_captions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []
    monkeypatch.setattr(corpus, "_train_tokenizer", lambda captions, vocab, path: learned.extend(captions))
    assert run("synthetic", "--out", tmp_path, "--samples", 5, "--held-out", 3, "--size", 16) == 0
    assert learned == [sample["txt"].decode() for _, sample in read_split(tmp_path, "train")]


def test_the_same_command_again_does_nothing(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.iterdir()}
    assert run("synthetic", "--out", demo, "--samples", 300, "--held-out", 128, "--shard-size", 100, "--size", 32) == 0
    assert "already holds this corpus" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in demo.iterdir()} == before


def test_a_directory_with_another_corpus_is_refused_naming_the_difference(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(demo)
    assert run("synthetic", "--out", demo, "--samples", 300, "--held-out", 128, "--shard-size", 90, "--size", 32) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "shard_size: 100 there, 90 requested" in error
    assert error.count("\n") == 1
    assert digests(demo) == before


def test_a_corpus_with_a_shard_cut_short_is_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "train-000001.tar", 1000)
    command = ("synthetic", "--samples", 300, "--held-out", 128, "--shard-size", 100, "--size", 32)
    assert run(*command, "--out", tmp_path / "cut") == 2
    assert "train-000001.tar is missing or cut short" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train-000000.tar", "holiday.jpg", "manifest.json"])
def test_a_directory_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("{}")
    assert run("synthetic", "--out", tmp_path, "--samples", 2) == 2
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_for_out_and_a_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run("synthetic", "--out", tmp_path / "file", "--samples", 2) == 2
    assert "is a file" in capsys.readouterr().err
    assert run("synthetic", "--out", tmp_path / "file" / "below", "--samples", 2) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_corpus_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "_train_tokenizer", broken)  # after all shards were written
    assert run("synthetic", "--out", tmp_path, "--samples", 2, "--size", 16) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert run("synthetic", "--out", tmp_path, "--samples", 2, "--size", 16) == 0


def test_what_a_killed_run_left_is_swept_away_and_a_live_one_is_respected(tmp_path: Path) -> None:
    with staged_directory(tmp_path) as first:
        (first / "train-000000.tar").touch()
        with pytest.raises(UserError, match="being written by another run"), staged_directory(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    (tmp_path / "train-000000.tar").unlink()
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "train-000000.tar").write_text("half")
    assert run("synthetic", "--out", tmp_path, "--samples", 2, "--size", 16) == 0
    assert not (tmp_path / ".partial").exists()
    assert len(read_split(tmp_path, "train")) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("synthetic", "--out", "x"),
        ("synthetic", "--out", "x", "--samples", "0"),
        ("synthetic", "--out", "x", "--samples", "many"),
        ("synthetic", "--out", "x", "--samples", "2", "--size", "8"),
        ("folder", "x", "--out", "y", "--held-out-share", "1"),
        ("folder", "x", "--out", "y", "--captions", "c.csv", "--caption-from-folder"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_is_there_for_both_commands_without_importing_torch() -> None:
    for command in ("synthetic", "folder"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "data.corpus", command, "--help"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "--out DIR" in done.stdout
        assert "torch" not in done.stderr


def test_an_interrupt_stops_all_processes_with_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data.corpus",
        "synthetic",
        "--out",
        str(tmp_path),
        "--samples",
        "100000",
    ]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(tmp_path.glob(".partial/*.tar")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process gets it
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert error == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


# A folder of images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photographs of several sizes, modes and formats in two class folders, each with a text file."""
    sklearn = pytest.importorskip("sklearn.datasets")
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "old_places").mkdir()
    (folder / "living-things").mkdir()
    flowers, shipped = Path(sklearn.__file__).parent / "images", Path(skimage.__file__).parent / "data"
    shutil.copy(flowers / "china.jpg", folder / "old_places" / "china.jpg")
    shutil.copy(flowers / "flower.jpg", folder / "living-things" / "flower.jpeg")
    shutil.copy(shipped / "chelsea.png", folder / "living-things" / "chelsea.png")
    shutil.copy(shipped / "horse.png", folder / "living-things" / "horse.png")  # RGBA
    shutil.copy(shipped / "coins.png", folder / "old_places" / "coins.png")  # grey
    with Image.open(shipped / "rocket.jpg") as rocket:
        rocket.save(folder / "old_places" / "rocket.bmp")
        rocket.save(folder / "old_places" / "rocket_small.webp", quality=80)
        rocket.convert("CMYK").save(folder / "old_places" / "rocket_print.tif")
        rocket.convert("P").save(folder / "old_places" / "ROCKET_PALETTE.PNG")
    for path in list(folder.rglob("*.*")):
        path.with_suffix(".txt").write_text(f"a photograph called {path.stem}\n")
    return folder


def test_a_folder_keeps_original_bytes_and_turns_other_formats_into_png(photographs: Path, tmp_path: Path) -> None:
    assert run("folder", photographs, "--out", tmp_path / "out", "--held-out-share", 0.2) == 0
    train, held_out = (read_split(tmp_path / "out", split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (7, 2)
    found = {}
    for _, sample in [*train, *held_out]:
        attributes = json.loads(sample["json"])
        found[attributes["file"]] = sample
        with Image.open(photographs / attributes["file"]) as original, image_of(sample) as kept:
            assert kept.size == original.size == (attributes["width"], attributes["height"])
            if original.format in ("JPEG", "PNG", "WEBP"):
                assert (
                    sample[{"JPEG": "jpg"}.get(original.format, original.format.lower())]
                    == (photographs / attributes["file"]).read_bytes()
                )
            else:
                assert kept.format == "PNG"
                assert kept.mode == "RGB"
                assert kept.tobytes() == original.convert("RGB").tobytes()
        assert sample["txt"].decode() == f"a photograph called {Path(attributes['file']).stem}"
    assert len(found) == 9
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == []
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_folder_names_become_captions_and_classes(photographs: Path, tmp_path: Path) -> None:
    assert (
        run(
            "folder",
            photographs,
            "--out",
            tmp_path / "out",
            "--caption-from-folder",
            "--train-tokenizer",
            300,
        )
        == 0
    )
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert [entry["name"] for entry in classes] == ["living things", "old places"]
    assert "a photo of an old places" in classes[1]["prompts"]
    for _, sample in read_split(tmp_path / "out", "train"):
        attributes = json.loads(sample["json"])
        assert classes[attributes["label"]]["name"] == attributes["class"]
        assert sample["txt"].decode() in classes[attributes["label"]]["prompts"]
        assert attributes["file"].startswith(attributes["class"][:3])
    assert CaptionEncoder(str(tmp_path / "out" / "tokenizer.json"), 20).vocab_size <= 300


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_captions_is_read(
    photographs: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        ("old_places/china.jpg", 'roofs, "old" ones'),
        ("./living-things/chelsea.png", "a cat"),
        ("gone.jpg", "?"),
    ]
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([("file", "caption"), *rows])
    else:
        table.write_text("".join(json.dumps({"file_name": f, "text": c}) + "\n\n" for f, c in rows))
    assert run("folder", photographs, "--out", tmp_path / "out", "--captions", table, "--held-out-share", 0) == 0
    captions = {json.loads(s["json"])["file"]: s["txt"].decode() for _, s in read_split(tmp_path / "out", "train")}
    assert captions == {"old_places/china.jpg": 'roofs, "old" ones', "living-things/chelsea.png": "a cat"}
    assert "left out 8: 7 no caption, 1 caption without image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "a,b\n1,2\n", "line 1 has no column file or file_name, it has 'a', 'b'"),
        ("c.csv", "", "is empty: a table needs a header line"),
        ("c.csv", "file,caption\n", "none of its 0 rows has a file and a caption"),
        ("c.jsonl", '{"file": "a.jpg"}\n', "no line has a file and a caption, the keys found are 'file'"),
        ("c.jsonl", "[1]\n", "no line has a file and a caption, the keys found are none"),
        ("c.jsonl", '{"file": "a.jpg", "caption": "x"}\n\n{oops\n', "line 3 is not a JSON object"),
        ("c.parquet", "PAR1", "is not a supported table: supported are .csv .tsv .jsonl .ndjson .json"),
        ("c.csv", "file,caption\na.jpg,x\n./a.jpg,y\n", "lists a.jpg again"),
        ("c.csv", None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_table_is_one_clear_line(
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | None,
    message: str,
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert run("folder", photographs, "--out", tmp_path / "out", "--captions", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_silently(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(photographs, source)
    good = (source / "old_places" / "china.jpg").read_bytes()
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "cut.jpg": good[: len(good) // 2],
        "cut.png": (source / "living-things" / "chelsea.png").read_bytes()[:5000],
        "mute.jpg": good,
        "film.gif": b"GIF89a",
        "stray.txt": b"a caption of nothing",
    }
    for name, content in bad.items():
        (source / name).write_bytes(content)
        if name != "mute.jpg":
            (source / name).with_suffix(".txt").write_text("a caption")
    (source / "link.png").symlink_to("nowhere.png")
    (source / "link.txt").write_text("a link to nowhere")
    (source / ".hidden.jpg").write_bytes(b"")
    assert run("folder", source, "--out", tmp_path / "out", "--held-out-share", 0) == 0
    assert len(read_split(tmp_path / "out", "train")) == 9
    skipped = {entry["file"]: entry["reason"] for entry in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    assert skipped == {
        "empty.jpg": "empty file",
        "page.jpg": "web page",
        "cut.jpg": "truncated image",
        "cut.png": "truncated image",
        "film.gif": "corrupt header",
        "mute.jpg": "no caption",
        ".hidden.jpg": "hidden file",
        "stray.txt": "not an image format",
        "link.png": "not a regular file",
    }
    assert "left out 9: " in capsys.readouterr().err


def test_a_folder_without_images_or_usable_ones_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("folder", tmp_path / "absent", "--out", tmp_path / "out") == 2
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.md").touch()
    assert run("folder", tmp_path / "source", "--out", tmp_path / "out") == 2
    assert "holds 1 files and no image" in capsys.readouterr().err
    (tmp_path / "source" / "empty.jpg").touch()
    assert run("folder", tmp_path / "source", "--out", tmp_path / "out") == 2
    assert "none of its 1 images has a caption (1 no caption; the first image is empty.jpg)" in capsys.readouterr().err
    (tmp_path / "source" / "empty.txt").write_text("a caption")
    assert run("folder", tmp_path / "source", "--out", tmp_path / "out") == 2
    assert "no train sample" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_folder_corpus_is_found_again_until_the_folder_changes(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(photographs, source)
    command = ("folder", source, "--out", tmp_path / "out")
    assert run(*command) == 0
    assert run(*command) == 0
    assert "already holds this corpus" in capsys.readouterr().out
    (source / "old_places" / "china.txt").write_text("another caption")
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "another corpus (images, captions or options have changed since it was written): choose another" in error


def test_the_same_folder_gives_the_same_bytes(photographs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("folder", photographs, "--out", tmp_path / name, "--shard-size", 4, "--max-side", 100) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("train-*.tar"))) == 2


def test_a_folders_split_is_a_shuffle_that_adds_up(photographs: Path) -> None:
    files = list_files(photographs)
    images = ImageFolder(photographs, files, sidecar_captions(photographs, files))
    for share, held_out in ((0.0, 0), (0.02, 1), (0.5, 4), (0.99, 8)):
        split = images.split(share)
        assert len(split["held_out"]) == held_out
        assert sorted(split["train"] + split["held_out"]) == sorted(images.names)
    assert images.names != sorted(images.names)


def test_max_side_makes_larger_images_smaller_in_their_own_format(photographs: Path) -> None:
    for name, extension in (
        ("china.jpg", "jpg"),
        ("rocket_small.webp", "webp"),
        ("coins.png", "png"),
        ("rocket.bmp", "png"),
    ):
        path = photographs / "old_places" / name
        content, found, size = samples.load_image(path, 128)
        with Image.open(io.BytesIO(content)) as image, Image.open(path) as original:
            assert (found, max(size), image.size) == (extension, 128, size)
            assert size[0] / size[1] == pytest.approx(original.width / original.height, rel=0.02)
            small = np.asarray(original.convert("RGB").resize(size, Image.Resampling.LANCZOS), float)
            error = np.abs(np.asarray(image.convert("RGB"), float) - small).mean()
            assert error < 5  # worst: the jpg, 3.4, for its halved chroma; another image: 50 and more
    assert (
        samples.load_image(photographs / "old_places" / "coins.png", 400)[0]
        == (photographs / "old_places" / "coins.png").read_bytes()
    )


def test_odd_images_become_upright_eight_bit_first_frames(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.tif")
    content, _, _ = samples.load_image(tmp_path / "deep.tif", None)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "L"
        assert np.abs(np.asarray(image, float) - ramp / 257).max() <= 0.5  # 65535 is white

    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "moving.webp", save_all=True, append_images=[blue], lossless=True)
    content, extension, _ = samples.load_image(tmp_path / "moving.webp", None)
    with Image.open(io.BytesIO(content)) as image:
        assert (extension, getattr(image, "n_frames", 1)) == ("webp", 1)
        assert np.asarray(image.convert("RGB"))[5, 5, 0] > 240

    turned = Image.new("RGB", (200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert samples.load_image(tmp_path / "turned.jpg", None)[1:] == ("jpg", (100, 200))  # kept, of the size it shows
    assert samples.load_image(tmp_path / "turned.jpg", 50)[2] == (25, 50)

    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(samples.UnusableImage, match="floating-point"):
        samples.load_image(tmp_path / "float.tif", None)


def test_an_image_of_too_many_pixels_is_left_out_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(samples, "_MAX_PIXELS_TO_KEEP", 9999)
    reason = "too many pixels: above the 9,999 that a run reads; make it smaller with --max-side"
    with pytest.raises(samples.UnusableImage, match=reason):
        samples.load_image(tmp_path / "large.png", None)
    assert samples.load_image(tmp_path / "large.png", 50)[2] == (50, 50)
    monkeypatch.setattr(samples, "_MAX_PIXELS_TO_SHRINK", 9999)
    with pytest.raises(samples.UnusableImage, match=r"too many pixels: above the 9,999 that a run reads$"):
        samples.load_image(tmp_path / "large.png", 50)
