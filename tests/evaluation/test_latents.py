"""Extraction: what `encode` gives for every image and its mirror image, the same from any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from configs import UserError
from data.latents.store import LatentStore
from engine.distributed import Ranks
from evaluation import latents
from evaluation.latents import LatentOptions, write_latents
from evaluation.tokenizer_source import open_tokenizer
from model.tokenizer import VisualTokenizer
from model.weights import read_weights, write_weights
from tests.data.tar_shards import encoded, write_tar
from tests.evaluation.tiny_runs import write_labelled_corpus, write_run
from tests.harness import run_ranks

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpus(tmp_path_factory.mktemp("corpus") / "labelled")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", corpus)


@pytest.fixture(scope="module")
def store(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return write_latents(trained, tmp_path_factory.mktemp("store") / "latents", LatentOptions(batch_size=7))


def test_a_store_holds_what_encode_gives(trained: Path, store: LatentStore) -> None:
    """Of the run's training images, at its own crop, mirrored ones encoded as images."""
    source = open_tokenizer(trained, torch.device("cpu"))
    [batch] = source.open_images(source.config.data.train, "data.train").batches(100)  # type: ignore[union-attr]
    assert store.num_samples == len(batch.labels) == 30
    for is_flipped, images in ((False, batch.images), (True, batch.images.flip(-1))):
        found, labels = store.read(range(30), [is_flipped] * 30)
        # Measured 0 on this kind of CPU: batches of other sizes may round otherwise. The other orientation is 5 away.
        torch.testing.assert_close(found, source.tokenizer.encode(images), rtol=0, atol=1e-5)
        assert labels.equal(batch.labels)
    values = torch.cat([store.read(range(30), [flip] * 30)[0] for flip in (False, True)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(store.mean, values.mean(1))
    torch.testing.assert_close(store.std, values.std(1))


def test_the_manifest_says_what_the_latents_are(trained: Path, store: LatentStore, corpus: Path) -> None:
    arguments = json.loads((store.directory / "manifest.json").read_text())["arguments"]
    assert arguments["tokenizer"] == store.tokenizer == open_tokenizer(trained, torch.device("cpu")).latent_digest()
    assert (arguments["crop"], arguments["pictures"], arguments["dtype"]) == (32, 30, "float32")
    assert arguments["corpus"] == [f"{corpus}/train/*.tar"]


def test_a_digest_is_that_of_the_encoder_alone(trained: Path, tmp_path: Path) -> None:
    state, model = read_weights(trained / "weights.safetensors")

    def digest(changed: str) -> str:
        state_now = {name: tensor + (name == changed) for name, tensor in state.items()}
        write_weights(tmp_path / "weights.safetensors", state_now, model)
        return open_tokenizer(tmp_path / "weights.safetensors", torch.device("cpu"), 32).latent_digest()

    names = {part: next(name for name in state if name.startswith(part)) for part in ("trunk", "bottleneck", "decoder")}
    whole = digest("nothing")
    tokenizer = open_tokenizer(trained, torch.device("cpu")).tokenizer
    tokenizer.save_pretrained(tmp_path / "public")
    assert open_tokenizer(tmp_path / "public", torch.device("cpu"), 32).latent_digest() == whole
    assert digest(names["decoder"]) == whole
    assert len({digest(names["trunk"]), digest(names["bottleneck"]), whole}) == 3


def test_a_second_run_does_nothing_and_another_is_refused(
    trained: Path, store: LatentStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisualTokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    assert latents.main([str(trained), "--out", str(store.directory)]) == 0
    assert "30 images of 5 classes as torch.float32 latents" in capsys.readouterr().out
    assert latents.main([str(trained), "--out", str(store.directory), "--limit", "4"]) == 2
    assert "pictures: 30 there, 4 requested" in capsys.readouterr().err


def test_limit_and_dtype_hold(trained: Path, tmp_path: Path) -> None:
    store = write_latents(trained, tmp_path / "few", LatentOptions(limit=6, dtype="bfloat16"))
    assert (store.num_samples, store.dtype) == (6, torch.bfloat16)
    assert store.labels.tolist() == [0, 0, 0, 0, 0, 0]


def test_an_image_that_cannot_be_decoded_is_left_out_and_counted(trained: Path, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(5):
        members |= {f"{i}.jpg": encoded(i)[: 200 if i == 2 else None], f"{i}.json": b'{"label": %d}' % i}
    store = write_latents(
        trained, tmp_path / "store", LatentOptions(data=(str(write_tar(tmp_path / "0.tar", members)),))
    )
    assert store.labels.tolist() == [0, 1, 3, 4]
    assert sum(store.notes["bad_samples"].values()) == 1


def _extract(_: Ranks, trained: Path, out: Path, unlabelled: Path) -> str:
    """Writes the store; the error that another corpus ends with."""
    write_latents(trained, out, LatentOptions(batch_size=7))
    try:
        write_latents(trained, out.parent / "none", LatentOptions(data=(str(unlabelled),)))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.L1
def test_ranks_write_what_one_rank_writes_and_fail_together(trained: Path, store: LatentStore, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(3):  # the second rank alone meets the picture without a label
        members |= {f"{i}.jpg": encoded(i), f"{i}.json": b"{}" if i == 1 else b'{"label": 0}'}
    unlabelled = write_tar(tmp_path / "0.tar", members)
    errors = run_ranks(_extract, 2, trained, tmp_path / "store", unlabelled)
    assert errors[0] == errors[1]
    assert errors[0].startswith("0/1 has no label (found -1)")
    assert [path.name for path in (tmp_path / "none").iterdir()] == []
    together = LatentStore(tmp_path / "store")
    assert [path.name for path in sorted((tmp_path / "store").glob("*.safetensors"))] == [
        "latents_rank00_shard000.safetensors", "latents_rank01_shard000.safetensors",
    ]  # fmt: skip
    assert together.labels.equal(store.labels)
    for flip in (False, True):
        one, two = (found.read(range(30), [flip] * 30)[0] for found in (store, together))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)  # measured 0; another picture is 5 away
    torch.testing.assert_close(together.std, store.std)


def test_every_mistake_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlabelled = tmp_path / "0.tar"
    write_tar(unlabelled, {"0.jpg": encoded(0), "0.txt": b"no label"})
    undecodable = tmp_path / "1.tar"
    write_tar(undecodable, {"0.jpg": encoded(0)[:200], "0.json": b'{"label": 0}'})
    hashes = write_tar(tmp_path / "2.tar", {"0.jpg": encoded(0), "0.json": b'{"label": 123456789012}'})
    lonely = Path(shutil.copy(trained / "weights.safetensors", tmp_path / "weights.safetensors"))
    state, model = read_weights(lonely)
    silent = tmp_path / "silent.safetensors"
    names = [name for name in state if name.startswith("bottleneck")]
    write_weights(silent, state | {name: torch.zeros_like(state[name]) for name in names}, model)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    mistakes: list[tuple[str, tuple[object, ...]]] = [
        ("0/0 has no label (found -1): a generator is trained on", (trained, "--data", unlabelled)),
        ("has label 123456789012: labels number the classes", (trained, "--data", hashes)),
        ("could be decoded", (trained, "--data", undecodable)),
        ("name labelled ones with --data", (lonely,)),
        ("matches no file", (trained, "--data", tmp_path / "none*.tar")),
        ("is no run directory", (tmp_path / "nowhere",)),
        ("--crop 30: sides must be multiples of the patch size 8; give 24", (trained, "--crop", 30)),
        ("--batch-size 0: give a number from 1 on", (trained, "--batch-size", 0)),
        ("channel 0 has mean 0 and deviation 0", (silent, "--crop", 32, "--data", *_shards(trained))),
        ("no manifest.json of this program", (trained, "--out", full)),
    ]  # fmt: skip
    for expected, arguments in mistakes:
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        assert latents.main([*map(str, (*arguments, *out))]) == 2, arguments
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
        assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_disk_without_room_shows_before_anything_is_encoded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = 2 * 30 * 8 * 4 * 4 * 4  # pictures, mirrored too, of 8 x 4 x 4 in four bytes
    free = {"bytes": wanted - 1}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free["bytes"]))
    with pytest.raises(UserError, match=r"30 images and as many mirrored ones take 0\.0 GB in float32"):
        write_latents(trained, tmp_path / "a" / "b", LatentOptions())
    assert not (tmp_path / "a").exists()
    write_latents(trained, tmp_path / "half", LatentOptions(dtype="float16"))
    free["bytes"] = wanted
    write_latents(trained, tmp_path / "a" / "b", LatentOptions())


def test_a_file_that_cannot_be_written_is_a_user_error(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("data.latents.store.save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.: see whether the disk is full"):
        write_latents(trained, tmp_path / "store", LatentOptions())
    assert list((tmp_path / "store").iterdir()) == []


def _shards(trained: Path) -> tuple[str, ...]:
    config = open_tokenizer(trained, torch.device("cpu")).config
    assert config is not None
    return config.data.train
