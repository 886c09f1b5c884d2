"""Captions of any bytes and any length give a row of tokens or a counted bad sample, in bounded memory and time.

Bytes in another encoding are no text, whatever characters they could be taken for; what does not show is no caption.
"""

import json
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import UserError
from configs.data import ImageData, Views
from configs.run import LoaderSettings as LoaderSettings
from data.bad_samples import TooManyBadSamples
from data.captions import CaptionEncoder, train_bpe
from data.hashing import hash_text
from data.image_headers import UNSUPPORTED_TYPES
from data.sample_reader import SampleReader
from data.shards import BadMember, Shards, main
from data.tar_samples import IMAGE_EXTS
from tests.data.tar_shards import encoded, write_tar

pytestmark = pytest.mark.L0

IMAGE = encoded(0, height=16, width=16)
TEXTS = {
    "control characters": b"a \x1b[2J\x07 red\x00 circle\x7f",
    "UTF-16": "a red circle".encode("utf-16"),
    "marks without end": ("e" + "\u0301" * 100_000).encode(),
    "one word": b"a" * 3_000_000,
    "all of Unicode": "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])).encode(),
    "right to left and back": "\u202e\u202d\u2066a".encode() * 10_000,
    "special tokens": b"<|endoftext|><|startoftext|>" * 1000,
}
NO_TEXTS = {
    "nothing but NULs": (b"\0" * 5000, "empty caption"),
    "spaces without width": ("\u200b\u2060\ufeff\u200d".encode(), "empty caption"),
    "direction alone": ("\u202e\u202d\u2066".encode() * 10_000, "empty caption"),
    "replaced characters alone": ("\ufffd".encode() * 9, "empty caption"),
    "a byte order mark alone": (b"\xff\xfe", "empty caption"),
    "cp1252": ("caf\u00e9".encode("cp1252"), "not UTF-8"),
    "shift-jis": ("\u8d64\u3044\u5186".encode("shift-jis"), "not UTF-8"),
    "UTF-16 without its mark": ("a red circle".encode("utf-16-le"), "not UTF-8"),
    "half a character of UTF-16": ("a red".encode("utf-16")[:-1], "not UTF-8"),
    "surrogates in UTF-8": (b"a \xed\xa0\x80", "not UTF-8"),
    "an image": (IMAGE, "not UTF-8"),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["a red circle", "a blue star"] * 3, 300).save(str(path))
    return CaptionEncoder(str(path), context=16)


def one(folder: Path, caption: str, **members: bytes) -> Shards:
    return Shards([str(write_tar(folder / "a.tar", {"0.jpg": IMAGE, **members}))], caption)


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_a_row_that_ends_where_it_should(tmp_path: Path, name: str, encoder: CaptionEncoder) -> None:
    text = one(tmp_path, "txt", **{"0.txt": TEXTS[name]}).read(0, 0).caption
    row = encoder.encode([text])
    assert row.shape == (1, 16)
    assert (row == encoder.end_of_text_id).sum() == 1
    assert row[0, row.argmax() + 1 :].eq(0).all()


@pytest.mark.parametrize("name", NO_TEXTS)
def test_bytes_that_are_not_text_are_a_bad_sample_with_a_reason(tmp_path: Path, name: str) -> None:
    content, reason = NO_TEXTS[name]
    with pytest.raises(BadMember, match=f"^{reason}$"):
        one(tmp_path, "txt", **{"0.txt": content}).read(0, 0)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_selects_the_encoding_and_is_removed(tmp_path: Path, encoding: str) -> None:
    text = "a caf\u00e9, \u8d64\u3044 \U0001f98a"
    content = text.encode(encoding) if encoding[-3:] != "-be" else ("\ufeff" + text).encode(encoding)
    assert one(tmp_path, "txt", **{"0.txt": content}).read(0, 0).caption == text


def test_text_that_is_cut_off_inside_a_character_loses_that_character_alone(tmp_path: Path) -> None:
    shards = one(tmp_path, "txt", **{"0.txt": b"a" + "\u00e9".encode() * (1 << 17)})
    assert shards.read(0, 0).caption == "a" + "\u00e9" * ((1 << 17) - 1)


def test_nuls_around_a_text_and_joiners_in_it_are_kept(tmp_path: Path) -> None:
    for text in ("\0\0a red circle\0\0\0\0\0\0\0\0\0", "a family \U0001f468\u200d\U0001f469\u200d\U0001f466"):
        assert one(tmp_path, "txt", **{"0.txt": text.encode()}).read(0, 0).caption == text


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
        (b'{"alt": "\xff\xfe"}', "not UTF-8"),
        (b'{"alt": ' + b"9" * 5000 + b"}", "corrupt json"),  # more digits than Python takes
        (b'{"alt": "' + b"a" * (1 << 22) + b'"}', "overlong json"),
        (b'{"alt": 5}', "empty caption"),
        (b'{"alt": []}', "empty caption"),
        (b'{"alt": [null, " ", ["a"], {"b": "c"}]}', "empty caption"),
        (b'{"alt": null}', "missing caption"),
        (b"", "empty caption"),
    ],
)
def test_json_of_any_kind_is_a_reason(tmp_path: Path, record: bytes, reason: str) -> None:
    if not record:
        assert one(tmp_path, "json:alt", **{"0.json": record}).bad == {reason: 1}
        return
    with pytest.raises(BadMember, match=reason):
        one(tmp_path, "json:alt", **{"0.json": record}).read(0, 0)


def test_of_a_list_of_captions_one_is_drawn_by_seed_sample_and_epoch(tmp_path: Path) -> None:
    record = json.dumps({"alt": ["a cat", "", None, "\ufeffa tabby ", "an animal"]}).encode()
    members = {f"{i}.{ext}": content for i in range(6) for ext, content in (("jpg", IMAGE), ("json", record))}
    tar = str(write_tar(tmp_path / "a.tar", members))

    def drawn(seed: int) -> list[list[str]]:
        shards = Shards([tar], "json:alt", seed=seed)
        return [[shards.read(0, i, epoch=epoch).caption for i in range(6)] for epoch in range(8)]

    zero = drawn(0)
    assert {text for epoch in zero for text in epoch} == {"a cat", "a tabby", "an animal"}
    assert zero == drawn(0) != drawn(1)
    assert zero[0] == [
        "a cat",
        "an animal",
        "a cat",
        "a tabby",
        "an animal",
        "an animal",
    ]  # in every version of the engine
    assert all(len(set(texts)) > 1 for texts in zip(*zero, strict=True)), "epochs are all alike"


def test_a_reader_serves_other_captions_of_a_list_in_the_next_epoch(tmp_path: Path) -> None:
    record = json.dumps({"alt": [f"text {i}" for i in range(50)]}).encode()
    members = {f"{i}.{ext}": content for i in range(8) for ext, content in (("jpg", IMAGE), ("json", record))}
    write_tar(tmp_path / "a.tar", members)

    def captions(seed: int) -> dict[tuple[int, str], str]:
        reader = SampleReader(ImageData(train=(str(tmp_path),), streams=1), LoaderSettings(), seed, "json:alt")
        rows = reader.rows(np.arange(16))
        reader.close()
        return {(row.epoch, row.sample.key): row.sample.caption for row in rows}

    first = captions(0)
    assert len(first) == 16
    assert first == captions(0)
    assert [first[0, f"a/{i}"] for i in range(8)] != [first[1, f"a/{i}"] for i in range(8)]
    assert first != captions(1)


def test_an_error_about_a_missing_caption_field_lists_the_fields_found(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        members |= {f"{i:02d}.jpg": IMAGE, f"{i:02d}.json": b'{"alt": "a", "url": "b", "": 1}'}
    write_tar(tmp_path / "a.tar", members)
    data = ImageData(train=(str(tmp_path),), streams=1)
    reader = SampleReader(data, LoaderSettings(), 0, "json:txt")
    with pytest.raises(TooManyBadSamples) as caught:
        reader.rows(np.arange(20))
    reader.close()
    assert caught.value.counts == {"missing caption": 20}, "samples were tried in vain after the first twenty"
    assert str(caught.value).endswith(
        "; data.caption=json:txt names a field that .json members lack: they have 'alt', 'url', ''; set data.caption "
        "to json:FIELD"
    )
    reader = SampleReader(data, LoaderSettings(), 0, "json:txt")
    with pytest.raises(UserError, match=r"no readable sample among 1000 .*they have 'alt', 'url', ''; set data"):
        reader.rows(np.arange(4))  # too few to judge the share by
    reader.close()


@pytest.mark.parametrize(("member", "has"), [({"caption": b"x", "cls": b"3"}, "caption, cls"), ({}, "none")])
def test_an_error_about_a_missing_caption_member_lists_the_members_found(
    tmp_path: Path, member: dict[str, bytes], has: str
) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": IMAGE, **{f"0.{ext}": content for ext, content in member.items()}})
    data = ImageData(train=(str(tmp_path),), streams=1)
    with pytest.raises(TooManyBadSamples, match=rf"data.caption=txt names a member .*image they have {has}; set data"):
        SampleReader(data, LoaderSettings(), 0, "txt")


@pytest.mark.parametrize("extension", [*IMAGE_EXTS, *chain(*UNSUPPORTED_TYPES.values()), "npy"])
def test_image_extensions_are_refused_as_caption_members(
    tmp_path: Path, extension: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(tmp_path), "--caption", extension]) == 2
    assert (
        f"error: --caption '{extension}': a .{extension} member holds an image or an array" in capsys.readouterr().err
    )


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
            {f"{name}.jpg": IMAGE, f"{name}.txt": b"x", "bad.jpg": b"<html>", "bad.txt": b"x"},
        )
    data = ImageData(train=(str(tmp_path),), streams=1, max_bad_share=1.0)
    reader = SampleReader(data, LoaderSettings(), 0, "txt", bad_log=tmp_path / "bad.jsonl")
    rows = reader.rows(np.arange(8))
    assert {row.sample.key for row in rows} == {f"{shard}/{name}" for shard in range(2)}
    assert reader.render(rows, ["image"], views_of(16)).shape == (8, 3, 16, 16)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2
    assert hash_text("a") == hash_text("a") != hash_text("\ud800")
    reader.close()


def views_of(size: int) -> Views:
    return Views(image_size=size, global_size=size, local_size=size)
