"""Members of a tar become samples by their names: webdataset's fields stay fields, and dots may belong to a name."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.data import ImageData
from configs.run import LoaderSettings
from data.bad_samples import TooManyBadSamples
from data.sample_reader import SampleReader
from data.shards import Shards
from data.tar_samples import split_names
from tests.data.hostile_tars import END, member
from tests.data.tar_shards import encoded, index_of, write_tar

pytestmark = pytest.mark.L0


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("0.jpg 0.txt 0.json", "0 0 0"),
        ("0.jpg 0.seg.png 0.seg.1.png 0.caption.txt 0.depth.npy", "0 0 0 0 0"),
        ("0.jpg 0.txt 0.seg.png 0.seg.json", "0 0 0 0"),
        ("d.e/0.JPG d.e/0.TXT", "d.e/0 d.e/0"),
        ("IMG_2024.03.05.jpg IMG_2024.03.05.txt", "IMG_2024.03.05 IMG_2024.03.05"),
        ("IMG_2024.03.05.txt IMG_2024.03.05.blip IMG_2024.03.05.jpg", "IMG_2024.03.05 IMG_2024.03.05 IMG_2024.03.05"),
        ("v1.jpg v1.2.jpg v1.2.3.png", "v1 v1.2 v1.2.3"),
        ("v1.jpg v1.txt v1.2.jpg v1.2.txt", "v1 v1 v1.2 v1.2"),
        ("v1.jpg v1.txt v1.2.jpg v1.3.png", "v1 v1 v1 v1"),  # one caption: further images of one sample
        ("a.jpg a.txt a.copy.jpg a.copy.txt", "a a a.copy a.copy"),
        ("photo.jpg photo.jpg.txt photo.jpg.json", "photo photo photo"),
        ("a.b.heic a.b.txt a.c.heic a.c.heic.txt", "a.b a.b a.c a.c"),
        ("0.left.jpg 0.right.jpg 0.txt", "0.left 0.right 0"),
        ("0.image.npy 0.txt", "0 0"),
        ("0 a/1 .jpg", "0 a/1 .jpg"),
    ],
)  # fmt: skip
def test_a_key_is_the_name_of_its_image_without_the_extension(names: str, keys: str) -> None:
    for order in (1, -1):
        ordered = names.split()[::order]
        split = split_names(ordered)
        assert [key for key, _ in split] == keys.split()[::order]
        for (key, ext), name in zip(split, ordered, strict=True):
            assert name.lower() == (f"{key}.{ext}".lower() if ext else key)


@given(
    keys=st.sets(st.from_regex(r"[a-z0-9_ -]{1,4}", fullmatch=True), min_size=1),
    fields=st.sets(
        st.sampled_from(
            ["txt", "json", "cls", "npy", "seg.png", "seg.1.png", "depth.npy", "caption.txt", "1.txt", "left.jpg"]
        )
    ),
    image=st.sampled_from(["jpg", "PNG", "webp"]),
    folder=st.sampled_from(["", "part/", "v1.0/"]),
    rng=st.randoms(),
)
def test_keys_without_dots_are_split_as_webdataset_splits_them(
    keys: set[str], fields: set[str], image: str, folder: str, rng: Random
) -> None:
    names = [
        f"{folder}{key}.{field}" for key in keys for field in (image, *fields) if field == image or rng.random() < 0.8
    ]
    rng.shuffle(names)
    assert split_names(names) == [
        (f"{folder}{key}", field.lower()) for key, _, field in (name[len(folder) :].partition(".") for name in names)
    ]


def members(names: list[str]) -> list[tuple[str, bytes]]:
    """Images and captions, each with a content of its own."""
    return [(name, encoded(i) if name.endswith("jpg") else name.encode()) for i, name in enumerate(names)]


def test_names_with_dots_are_read_with_their_captions(tmp_path: Path) -> None:
    names = [f"IMG_2024.03.{day:02d}.{ext}" for day in range(4) for ext in ("jpg", "txt")]
    shards = Shards([str(write_tar(tmp_path / "a.tar", members(names)))], "txt")
    assert not shards.bad
    samples = [shards.read(0, i) for i in range(4)]
    assert [s.key for s in samples] == [f"a/IMG_2024.03.{day:02d}" for day in range(4)]
    assert [s.caption for s in samples] == names[1::2]
    assert [s.image for s in samples] == [encoded(i) for i in (0, 2, 4, 6)]
    assert shards.key(0, 3) == samples[3].key


def test_captions_and_labels_named_after_the_whole_image_are_found(tmp_path: Path) -> None:
    parts = [("a.b.jpg", encoded(0)), ("a.b.jpg.txt", b"words"), ("a.b.jpg.json", b'{"label": 7}')]
    shards = Shards([str(write_tar(tmp_path / "a.tar", parts))], "txt")
    assert (shards.read(0, 0).key, shards.read(0, 0).caption, shards.label(0, 0)) == ("a/a.b", "words", 7)


@pytest.mark.parametrize(("ext", "reason"), [("heic", "heic image"), ("xyz", "unsupported image type")])
def test_every_lost_image_counts_as_a_bad_sample_in_the_share(tmp_path: Path, ext: str, reason: str) -> None:
    lost = [f"IMG_2024.03.{day:02d}.{kind}" for day in range(20) for kind in (ext, "txt")]
    good = [f"{i}.{kind}" for i in range(180) for kind in ("jpg", "txt")]
    tar = write_tar(tmp_path / "a.tar", [(name, b"x") for name in lost + good])
    shards = Shards([str(tar)], "txt")
    assert (shards.sizes.tolist(), shards.bad) == ([180], {reason: 20})
    data = ImageData(train=(str(tar),), streams=1, max_bad_share=0.09)
    with pytest.raises(TooManyBadSamples, match=rf"10\.0% of the samples are bad \(20 {reason}\)"):
        SampleReader(data, LoaderSettings(), 0, "txt")


def test_members_that_are_not_adjacent_are_joined_by_their_key(tmp_path: Path) -> None:
    """As `tar cf` of a directory has them: in any order."""
    names = [f"p/{i}.{ext}" for ext in ("txt", "jpg", "json") for i in (3, 1, 0, 4, 2)]
    labels = [(name, b'{"label": %s}' % name[2:3].encode()) for name in names[10:]]
    tar = write_tar(tmp_path / "a.tar", [*members(names[:10]), *labels])
    shards = Shards([str(tar)], "txt")
    assert (shards.sizes.tolist(), shards.bad) == ([5], {})
    assert [shards.read(0, i).key for i in range(5)] == [f"a/p/{i}" for i in (3, 1, 0, 4, 2)]
    assert [shards.read(0, i).caption for i in range(5)] == names[:5]
    assert [shards.read(0, i).image for i in range(5)] == [encoded(i) for i in range(5, 10)]
    assert [shards.label(0, i) for i in range(5)] == [3, 1, 0, 4, 2]


def test_dali_reads_an_index_of_members_that_are_not_adjacent(tmp_path: Path) -> None:
    from nvidia.dali.experimental import dynamic as dali

    names = [f"{day}.{i}.{ext}" for ext in ("jpg", "txt") for day in "ab" for i in range(3)]
    tar = write_tar(tmp_path / "a.tar", members(names))
    reader = dali.readers.Webdataset(paths=[str(tar)], index_paths=[str(index_of(tar))], ext=["jpg", "txt"])
    read = [[bytes(bytearray(part.cpu().torch().numpy())) for part in sample] for sample in reader.next_epoch()]
    assert read == [[encoded(i), names[6 + i].encode()] for i in range(6)]


def test_a_repeated_key_is_a_duplicate_anywhere_in_the_tar(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "a.jpg", "a.txt", "b.txt", "a.txt", "a.txt"]
    shards = Shards([str(write_tar(tmp_path / "a.tar", members(names)))], "txt")
    assert shards.bad == {"duplicate key": 2}  # a second image with its caption, and a third caption
    assert [shards.read(0, i).image for i in range(2)] == [encoded(0), encoded(1)]


def test_a_hard_link_is_the_file_it_links_to(tmp_path: Path) -> None:
    deep = "d" * 120  # a name and a target in headers of their own
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [("0.jpg", encoded(0)), ("0.txt", b"words"), (f"{deep}/1.jpg", encoded(1))]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        links = {
            "b.2.jpg": "0.jpg", "b.2.txt": "./0.txt", "3.jpg": f"{deep}/1.jpg", "3.txt": "b.2.txt",
            "4.jpg": "gone.jpg", "4.txt": "0.txt",
        }  # fmt: skip
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    for _ in range(2):  # made, and read from its index
        shards = Shards([str(tmp_path / "a.tar")], "txt")
        assert [shards.read(0, i).key for i in range(3)] == ["a/0", "a/b.2", "a/3"]
        assert [shards.read(0, i).image for i in range(3)] == [encoded(0), encoded(0), encoded(1)]
        assert [shards.read(0, i).caption for i in range(3)] == ["words"] * 3
        assert shards.bad == {"wrong member type": 1, "missing caption": 1}
        assert shards.key(0, 1) == "a/b.2"


def test_hidden_names_are_counted_and_what_macos_adds_is_not(tmp_path: Path) -> None:
    names = ["0.jpg", "._0.jpg", "0.txt", "._0.txt", "d/1.jpg", "d/1.txt", "__MACOSX/d/._1.jpg", "d/.DS_Store"]
    hidden = [".a.jpg", ".a.txt", "d/.jpg", "._lone.jpg", ".b.txt"]
    shards = Shards([str(write_tar(tmp_path / "a.tar", members(names + hidden)))], "txt")
    assert shards.sizes.tolist() == [2]
    assert shards.bad == {"hidden member name": 4}
    assert {key for key, _ in shards.index(0).bad} == {".a", "d/.jpg", "._lone", ".b"}


def test_a_broken_extended_header_costs_one_sample(tmp_path: Path) -> None:
    broken = member("pax", b"9999 path=a\n", kind=b"x") + member("1.jpg", encoded(1)) + member("1.txt", b"one")
    (tmp_path / "a.tar").write_bytes(member("0.jpg", encoded(0)) + member("0.txt", b"zero") + broken + END)
    shards = Shards([str(tmp_path / "a.tar")], "txt")
    assert (shards.sizes.tolist(), shards.bad) == ([1], {"corrupt tar": 1})


def test_names_of_thousands_of_dots_are_joined_as_others_are() -> None:
    names = ["a" + "." * 3000 + f"{i}.jpg" for i in range(200)]
    keys = Counter(key for key, _ in split_names([*names, *(f"{name}.txt" for name in names)]))
    assert set(keys.values()) == {2}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_written_one_after_the_other_in_a_file_are_read_as_one(tmp_path: Path, tar_format: int) -> None:
    parts = []
    for part in range(3):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            for ext, content in (("jpg", b"x" * (1 + 3000 * part)), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{part}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        parts.append(buffer.getvalue())
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    shards = Shards([str(tmp_path / "a.tar")], "txt")
    assert (shards.sizes.tolist(), shards.bad) == ([3], {})
    (tmp_path / "b.tar").write_bytes(parts[0] + bytes(512) + parts[1])  # not the end of a record: something was lost
    assert Shards([str(tmp_path / "b.tar")], "txt").bad["corrupt tar"] >= 1
