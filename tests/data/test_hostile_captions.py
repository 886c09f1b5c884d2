"""Captions of any bytes and any length give a row of tokens or a counted bad sample, in bounded memory and time."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.data import Pictures, Views
from configs.system import Loader as LoaderSettings
from data.captions import CaptionEncoder, train_bpe
from data.hashing import hash_text
from data.reading import SampleReader
from data.shards import BadMember, Shards
from tests.data.tar_shards import encoded, write_tar

pytestmark = pytest.mark.L0

PICTURE = encoded(0, height=16, width=16)
TEXTS = {
    "control characters": b"a \x1b[2J\x07 red\x00 circle\x7f",
    "nothing but NULs": b"\0" * 5000,
    "invalid UTF-8": b"\xff\xfe red \xc3\x28 \xed\xa0\x80",
    "UTF-16": "a red circle".encode("utf-16"),
    "marks without end": ("e" + "\u0301" * 100_000).encode(),
    "one word": b"a" * 3_000_000,
    "all of Unicode": "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])).encode(),
    "right to left and back": "\u202e\u202d\u2066".encode() * 10_000,
    "special tokens": b"<|endoftext|><|startoftext|>" * 1000,
    "a picture": PICTURE,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["a red circle", "a blue star"] * 3, 300).save(str(path))
    return CaptionEncoder(str(path), context=16)


def one(folder: Path, caption: str, **members: bytes) -> Shards:
    return Shards([str(write_tar(folder / "a.tar", {"0.jpg": PICTURE, **members}))], caption)


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_a_row_that_ends_where_it_should(tmp_path: Path, name: str, encoder: CaptionEncoder) -> None:
    text = one(tmp_path, "txt", **{"0.txt": TEXTS[name]}).read(0, 0).caption
    row = encoder.encode([text])
    assert row.shape == (1, 16)
    assert (row == encoder.end_of_text_id).sum() == 1
    assert row[0, row.argmax() + 1 :].eq(0).all()


def test_of_megabytes_of_text_only_a_part_is_read(tmp_path: Path) -> None:
    shards = one(tmp_path, "txt", **{"0.txt": b"word " * 4_000_000})
    tracemalloc.start()
    text = shards.read(0, 0).caption
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(text) <= 1 << 18
    assert peak < 1 << 22  # of 20 MB; measured 0.8 MB


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"[" * 200_000, "corrupt json"),
        (b'{"alt":' * 50_000, "corrupt json"),
        (b'{"alt": "\xff\xfe"}', "corrupt json"),
        (b'{"alt": ' + b"9" * 5000 + b"}", "corrupt json"),  # more digits than Python takes
        (b'{"alt": "' + b"a" * (1 << 22) + b'"}', "overlong json"),
        (b'{"alt": ["a"]}', "empty caption"),
        (b"", "empty caption"),
    ],
)
def test_json_of_any_kind_is_a_reason(tmp_path: Path, record: bytes, reason: str) -> None:
    if not record:
        assert one(tmp_path, "json:alt", **{"0.json": record}).bad == {reason: 1}
        return
    with pytest.raises(BadMember, match=reason):
        one(tmp_path, "json:alt", **{"0.json": record}).read(0, 0)


def test_a_lone_surrogate_in_json_reaches_the_encoder_as_a_space(tmp_path: Path, encoder: CaptionEncoder) -> None:
    text = one(tmp_path, "json:alt", **{"0.json": json.dumps({"alt": "a \ud800 red"}).encode()}).read(0, 0).caption
    assert torch.equal(encoder.encode([text]), encoder.encode(["a   red"]))


@pytest.mark.parametrize("record", [b'{"label": 1e999}', b'{"label": 99999999999999999999}', b'{"label": true}', b"3"])
def test_a_label_that_is_no_class_is_none(tmp_path: Path, record: bytes) -> None:
    assert one(tmp_path, "txt", **{"0.txt": b"x", "0.json": record}).label(0, 0) == -1


def test_names_of_raw_bytes_and_control_characters_are_trained_on_and_logged(tmp_path: Path) -> None:
    name = b"raw\xff \x1b[2J\n\t%00".decode(errors="surrogateescape")
    for shard in range(2):
        write_tar(
            tmp_path / f"{shard}.tar",
            {f"{name}.jpg": PICTURE, f"{name}.txt": b"x", "bad.jpg": b"<html>", "bad.txt": b"x"},
        )
    data = Pictures(train=(str(tmp_path),), streams=1, max_bad_share=1.0)
    reader = SampleReader(data, LoaderSettings(), 0, "txt", bad_log=tmp_path / "bad.jsonl")
    rows = reader.rows(np.arange(8))
    assert {row.sample.key for row in rows} == {f"{shard}/{name}" for shard in range(2)}
    assert reader.render(rows, ["image"], views_of(16)).shape == (8, 3, 16, 16)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2
    assert hash_text("a") == hash_text("a") != hash_text("\ud800")
    reader.close()


def views_of(size: int) -> Views:
    return Views(image_size=size, global_size=size, local_size=size)
