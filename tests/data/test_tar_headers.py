"""The tar walk lists what tarfile lists, goes on after damage, and no header leads it backwards or out of bounds."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tar_headers import BLOCK, MAX_NAME_BYTES, NotATar, read_tar_headers
from data.tar_samples import scan_tar
from tests.data.hostile_tars import END, header, long_name, member, octal, padded, pax
from tests.data.tar_shards import encoded

pytestmark = pytest.mark.L0

SLOW_DISK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150)
kinds = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
formats = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@SLOW_DISK
@given(members=st.lists(st.tuples(names, kinds, st.binary(max_size=1500)), max_size=8), tar_format=formats)
def test_it_lists_what_tarfile_lists(tmp_path: Path, members: list, tar_format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, kind, data in members:
            if kind == tarfile.REGTYPE and name.endswith("/"):  # GNU tar makes a directory of it, as we do; tarfile not
                continue
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "a/target", len(data) if kind == tarfile.REGTYPE else 0
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that ustar cannot hold
                continue
    path = written(tmp_path / "a.tar", buffer.getvalue())
    with tarfile.open(path, "r:") as tar:
        expected = [(i.name, i.isreg(), i.isdir(), i.offset_data, i.size) for i in tar]
    headers = read_tar_headers(path)
    assert [(e.name, e.is_file, e.is_folder, e.offset, e.size) for e in headers.entries] == expected
    assert (headers.damage, headers.is_cut_off) == ({}, False)


def test_sparse_files_are_no_files_and_what_follows_them_is_found(tmp_path: Path) -> None:
    old = bytearray(header(b"hole.jpg", octal(BLOCK), kind=b"S", magic=b"ustar  "))
    old[482] = 1  # one more block of the map, the last one
    old[148:156] = b"        "
    old[148:156] = b"%06o\0 " % sum(old)
    new = pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + member("hole2.jpg", b"1\n0\n1\n")
    path = written(tmp_path / "a.tar", bytes(old) + bytes(BLOCK) + b"x" * BLOCK + new + member("0.jpg", b"data") + END)
    entries = read_tar_headers(path).entries
    assert [(entry.name, entry.is_file) for entry in entries] == [
        ("hole.jpg", False),
        ("hole2.jpg", False),
        ("0.jpg", True),
    ]
    assert path.read_bytes()[entries[-1].offset :][:4] == b"data"


GOOD = [member(f"{i}.{ext}", encoded(i) if ext == "jpg" else b"words") for i in range(5) for ext in ("jpg", "txt")]


def listed(path: Path, parts: list[bytes]) -> tuple[list[str], dict[str, str]]:
    listing = scan_tar(written(path, b"".join(parts) + END))
    return [sample[0].name for sample in listing.samples], {reason: key for key, reason in listing.set_aside}


@pytest.mark.parametrize(
    ("place", "junk", "lost"),
    [
        (4, b"\xff" * BLOCK + GOOD[4][BLOCK:], "2.jpg"),  # a header overwritten: its image is lost
        (4, bytes(len(GOOD[4])), "2.jpg"),  # a hole of zeros, as a failed write leaves
        (4, GOOD[4][:100] + b"?" + GOOD[4][101:], "2.jpg"),  # one bit too many in a header
    ],
)
def test_after_damage_the_walk_goes_on_and_counts_it(tmp_path: Path, place: int, junk: bytes, lost: str) -> None:
    found, aside = listed(tmp_path / "a.tar", [*GOOD[:place], junk, *GOOD[place + 1 :]])
    assert found == [f"{i}.jpg" for i in range(5) if f"{i}.jpg" != lost]
    assert aside["corrupt tar"].startswith("a@")
    assert aside["missing image"] == "2"


def test_a_damaged_first_header_costs_its_sample_and_not_the_shard(tmp_path: Path) -> None:
    found, aside = listed(tmp_path / "a.tar", [b"\xff" * BLOCK + GOOD[0][BLOCK:], *GOOD[1:]])
    assert found == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert aside == {"corrupt tar": "a@0", "missing image": "0"}


def test_unreadable_bytes_count_as_the_samples_that_fit_into_them(tmp_path: Path) -> None:
    parts = [member(f"{i:02d}.{ext}", b"x" * 700) for i in range(20) for ext in ("jpg", "txt")]
    hole = bytes(sum(map(len, parts[10:20])))
    listing = scan_tar(written(tmp_path / "a.tar", b"".join([*parts[:10], hole, *parts[20:]]) + END))
    place = len(b"".join(parts[:10]))
    lost = [f"a@{place}", *(f"a@{place}+{i}" for i in range(1, 5))]
    assert (len(listing.samples), listing.set_aside) == (15, tuple((key, "corrupt tar") for key in lost))


@pytest.mark.parametrize(("megabytes", "num_lost"), [(1, 0), (3, 10)])
def test_zeros_of_an_interrupted_copy_are_a_truncated_tar(tmp_path: Path, megabytes: int, num_lost: int) -> None:
    """Zeros to the end: a tar's own are fewer. How many samples they stand for is not known: as many as there are."""
    parts = [member(f"{i:02d}.{ext}", b"x" * 700) for i in range(10) for ext in ("jpg", "txt")]
    listing = scan_tar(written(tmp_path / "a.tar", b"".join(parts) + bytes(megabytes << 20)))
    assert len(listing.samples) == (9 if num_lost else 10)
    assert [reason for _, reason in listing.set_aside] == ["truncated tar"] * (num_lost + bool(num_lost))


def test_a_tar_without_its_end_marks_is_whole(tmp_path: Path) -> None:
    headers = read_tar_headers(written(tmp_path / "a.tar", b"".join(GOOD)))
    assert len(headers.entries) == 10
    assert (headers.damage, headers.is_cut_off) == ({}, False)


TRAPS = {
    "a size below zero": member("trap.jpg", size=b"\xff" * 12),
    "a size past 63 bits": member("trap.jpg", size=b"\x80" + b"\xff" * 11),
    "a size that is no number": member("trap.jpg", size=b"99999999999\0"),
    "a pax size below zero": pax(size="-1024") + member("trap.jpg", b"x"),
    "a pax size of a megabyte of digits": pax(size="9" * 60_000) + member("trap.jpg", b"x"),
    "a pax record longer than its header": member("pax", b"9999 path=a\n", kind=b"x") + member("trap.jpg", b"x"),
    "a pax record of no length": member("pax", b"0 path=a\n", kind=b"x") + member("trap.jpg", b"x"),
    "a pax header of megabytes": member("pax", b"7" * (1 << 22), kind=b"x") + member("trap.jpg", b"x"),
    "a pax header without a member": pax(path="trap.jpg"),
    "a chain of long names": long_name(b"trap.jpg") * 5000,
    "a long name of megabytes": long_name(b"n" * (1 << 22) + b".jpg") + member("trap.jpg", b"x"),
    "a sparse map without an end": bytes(header(b"trap.jpg", octal(0), kind=b"S", magic=b"ustar  ")) + b"\xff" * 5000,
    "a member past the end": member("trap.jpg", size=octal(8**10)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_costs_its_own_member_at_most(tmp_path: Path, trap: str) -> None:
    path = written(tmp_path / "a.tar", b"".join(GOOD) + TRAPS[trap])
    listing = scan_tar(path)
    assert [sample[0].name for sample in listing.samples[:4]] == [f"{i}.jpg" for i in range(4)]
    for sample in listing.samples:
        assert all(m.offset + m.size <= path.stat().st_size and len(m.name) <= MAX_NAME_BYTES for m in sample)


UNSAFE = {
    "../0.jpg": b"0", "a/../../0.jpg": b"0", "/etc/0.jpg": b"0", "//0.jpg": b"0", "..": b"0", "a/..": b"0",
    "link.jpg": b"2", "hard.jpg": b"1", "device.jpg": b"3", "disk.jpg": b"4", "pipe.jpg": b"6",
}  # fmt: skip


def test_names_that_leave_and_members_that_are_no_files_are_counted_and_never_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    hostile = [
        member(name, b"evil" if kind == b"0" else b"", kind, link=b"/etc/passwd") for name, kind in UNSAFE.items()
    ]
    hostile.append(pax(path="../pax.jpg") + member("fine.jpg", b"evil"))
    hostile.append(long_name(b"../gnu.jpg") + member("fine.jpg", b"evil"))
    hostile.append(pax(path=b"nul\0../x.jpg") + member("fine.jpg", b"evil"))
    listing = scan_tar(written(folder / "a.tar", b"".join([*hostile, *GOOD]) + END))
    assert [sample[0].name for sample in listing.samples] == [f"{i}.jpg" for i in range(5)]
    reasons = [reason for _, reason in listing.set_aside]
    assert reasons.count("unsafe member name") >= 7
    assert reasons.count("wrong member type") == 5
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]


def test_what_is_no_tar_says_so(tmp_path: Path) -> None:
    for data in (b"<html>" * 1000, b"x", padded(b"PK\3\4") * 100, b"\x1f\x8b" + b"z" * 5000):
        with pytest.raises(NotATar, match="no block of it is a tar header"):
            read_tar_headers(written(tmp_path / "a.tar", data))
    assert read_tar_headers(written(tmp_path / "a.tar", b"")).entries == []
    assert read_tar_headers(written(tmp_path / "a.tar", END * 10)).entries == []
