"""An index that is damaged is written anew; one that lies costs samples, and nothing outside its tar is read."""

import json
import zlib
from pathlib import Path

import pytest

from data import tar_index
from data.shards import BadMember, Shards
from data.tar_index import ensure_index
from data.tar_samples import TarMember
from tests.data.tar_shards import encoded, index_of, write_corpus

pytestmark = pytest.mark.L0


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    write_corpus(tmp_path, num_shards=1, per_shard=6)
    return tmp_path / "00000.tar"


def forged(tar: Path, lines: list[str], **trailer: object) -> None:
    """An index with right checksums that says what it is told to."""
    path, honest = index_of(tar), ensure_index(tar).trailer
    text = "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines)).encode()
    of = {**honest, "usable": {}, **trailer}
    last = {"crc32": [zlib.crc32(text), zlib.crc32(json.dumps(of).encode())], "of": of}
    path.write_bytes(text + f"# {json.dumps(last)}\n".encode())


def test_every_bit_that_flips_in_an_index_is_noticed_and_mended(tar: Path) -> None:
    path = index_of(tar)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        shards = Shards([str(tar)], "txt")
        assert shards.sizes.tolist() == [6]
        assert shards.read(0, 5).caption == "sample 5"
        assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_an_index_that_was_cut_off_is_written_anew(tar: Path, kept: float) -> None:
    path = index_of(tar)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert Shards([str(tar)], "txt").sizes.tolist() == [6]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "trailer",
    [
        b"[]", b"{}", b"[" * 100_000, b'{"crc32": [0, 0], "of": 3}', b'{"crc32": 1, "of": {}}', b"\xff\xfe",
        b'{"crc32": [0, NaN], "of": {"tar_bytes": 1e999}}',
    ],
)  # fmt: skip
def test_a_last_line_of_any_other_kind_is_foreign(tar: Path, trailer: bytes) -> None:
    path = index_of(tar)
    path.write_bytes(b"v1.2 0\n# " + trailer + b"}\n")
    assert tar_index.read_trailer(path, tar) is None
    assert Shards([str(tar)], "txt").sizes.tolist() == [6]


@pytest.mark.parametrize(
    "trailer",
    [{"rules": "1 jpg"}, {"tar_mtime_ns": None},
     {"usable": {"txt": [-1, {}]}}, {"usable": {"txt": [1, {"x": "y"}]}}, {"usable": []}, {"set_aside": [[1, 2]]},
     {"usable": {"txt": [2**70, {}]}}, {"tar_bytes": True}, {"usable": {"txt": [True, {}]}}],
)  # fmt: skip
def test_counts_that_are_none_make_an_index_foreign(tar: Path, trailer: dict) -> None:
    forged(tar, ["jpg 512 10 0.jpg txt 2048 3 0.txt"], **trailer)
    assert Shards([str(tar)], "txt").sizes.tolist() == [6]


@pytest.mark.parametrize(
    "line",
    [
        "jpg -512 10 0.jpg txt 2048 3 0.txt", "jpg 512 -10 0.jpg txt 2048 3 0.txt", "jpg 0 10 0.jpg txt 2048 3 0.txt",
        "jpg 512 4611686018427387904 0.jpg txt 2048 3 0.txt", "jpg 99999999999999999999 1 0.jpg txt 2048 3 0.txt",
        "jpg five 10 0.jpg txt 2048 3 0.txt", "txt 2048 3 0.txt txt 1 1 1.txt",
    ],
)  # fmt: skip
def test_a_line_that_lies_is_a_corrupt_index(tar: Path, line: str) -> None:
    forged(tar, [line])
    shards = Shards([str(tar)], "txt")
    with pytest.raises(BadMember, match="corrupt index"):
        shards.read(0, 0)


@pytest.mark.parametrize("line", ["", "jpg", "jpg 512 10", "jpg 512 10 0.jpg txt", "\0"])
def test_a_line_of_too_few_fields_makes_an_index_be_written_anew(tar: Path, line: str) -> None:
    forged(tar, [line])
    shards = Shards([str(tar)], "txt")
    assert len(shards.index(0)) == 6
    assert shards.read(0, 5).caption == "sample 5"


def test_a_place_that_is_not_that_members_gives_nothing_of_it(tar: Path) -> None:
    """Neither another sample's caption nor the middle of an image: the member's own header has to stand before it."""
    honest = Shards([str(tar)], "txt")
    first, second = honest.index(0).members(0), honest.index(0).members(1)
    swapped = [first[0], TarMember("txt", second[1].offset, second[1].size, first[1].name)]
    shifted = [TarMember("jpg", first[0].offset + 512, 10, first[0].name), first[1]]
    lines = [" ".join(f"{m.ext} {m.offset} {m.size} {m.name}" for m in sample) for sample in (swapped, shifted)]
    forged(tar, lines)
    shards = Shards([str(tar)], "txt")
    for sample_idx in range(2):
        assert shards.read(0, sample_idx) == honest.read(0, sample_idx)  # the shard was indexed anew


def test_an_index_that_is_a_link_is_replaced_and_what_it_leads_to_is_left(tar: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    tar.with_suffix(".idx").symlink_to(treasure)
    assert Shards([str(tar)], "txt").sizes.tolist() == [6]
    assert treasure.read_text() == "mine"
    assert not tar.with_suffix(".idx").is_symlink()


def test_an_image_larger_than_any_such_image_can_be_is_not_read(tar: Path) -> None:
    shards = Shards([str(tar)], "txt")
    num_bytes = len(encoded(0))
    assert shards.read(0, 0, max_image_bytes=num_bytes).image == encoded(0)
    with pytest.raises(BadMember, match="too many bytes"):
        shards.read(0, 0, max_image_bytes=num_bytes - 1)
