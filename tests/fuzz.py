"""Random and hostile inputs for every reader of what comes from outside: none may end in anything but a counted reason.

    make fuzz                                              # 100,000 inputs for each reader, minutes
    python -m tests.fuzz --inputs 5000 --seed 7 tar        # fewer, for one of them

`tar` reads whole shards, `index` the sidecars beside an honest shard, `caption` text and JSON up to the row of tokens,
`picture` the headers of pictures (their pixels are the decoders' own business). Hypothesis makes the inputs: pieces of
honest files, fields with right checksums around wrong values, and random bytes; each is then read several times,
damaged in other ways. `make test` reads a few hundred of each.

A reader may raise UserError for the whole file; and for a sample BadMember or Unreadable, which
data/bad_samples.py counts.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from configs import UserError
from data.captions import CaptionEncoder, train_bpe
from data.pillow_decoder import image_fault, needs_pillow
from data.shards import BadMember, Shards
from data.storage import Unreadable
from data.tar_index import ensure_index
from tests.data.hostile_tars import END, header, long_name, member, octal, padded, record
from tests.data.tar_shards import encoded, index_of, write_corpus

DAMAGED = 24  # readings of one drawn input, the first one as it is
MOST_PIXELS = 10**6
CONTEXT = 12

texts = st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
names = st.one_of(
    st.sampled_from(
        [b"0.jpg", b"0.txt", b"1.png", b"1.json", b"../0.jpg", b"/0.jpg", b"a/../b.jpg", b"d/", b".jpg", b""]
    ),
    texts,
    st.binary(max_size=120),
)
sizes = st.one_of(
    st.integers(0, 4000).map(octal),
    st.sampled_from(
        [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + bytes(11), b"-1", b"77777777777", b"8", b" 7 ", b""]
    ),
    st.binary(min_size=12, max_size=12),
)
kinds = st.one_of(
    st.sampled_from([b"0", b"\0", b"L", b"K", b"x", b"g", b"S", b"5", b"1", b"2", b"3", b"6", b"7"]),
    st.binary(min_size=1, max_size=1),
)
records = st.builds(
    record,
    st.one_of(
        st.sampled_from([b"path", b"size", b"linkpath", b"hdrcharset", b"GNU.sparse.major"]), st.binary(max_size=8)
    ),
    st.one_of(texts, st.sampled_from([b"-1", b"9" * 30, b"0", b"../x.jpg", b"BINARY"]), st.binary(max_size=30)),
)
tar_pieces = st.one_of(
    st.builds(member, names, st.binary(max_size=700)),
    st.builds(header, names, sizes, kinds, names, st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)])),
    st.lists(st.one_of(records, st.binary(max_size=12)), max_size=4).map(lambda r: member("x", b"".join(r), kind=b"x")),
    names.map(long_name),
    st.binary(max_size=600).map(padded),
    st.binary(max_size=40),
    st.just(END),
)
honest = b"".join(
    member(f"{i}.{ext}", encoded(i, height=8, width=8) if ext == "jpg" else b"words")
    for i in range(3)
    for ext in ("jpg", "txt")
)
tars = st.lists(st.one_of(tar_pieces, st.just(honest)), max_size=8).map(b"".join)

numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 60_000), st.sampled_from([0, 512, 2**63 - 1]))
lines = st.one_of(
    st.lists(
        st.tuples(st.sampled_from(["jpg", "txt", "json", "a%20b", ""]), numbers, numbers, st.text(max_size=9)),
        max_size=3,
    ).map(lambda members: " ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in members)),
    st.text(max_size=30),
).map(lambda line: line.replace("\n", ""))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
pairs = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), max_size=2)
counts = st.dictionaries(st.sampled_from(["", "txt"]), st.tuples(st.integers(0, 9), st.just({"bad": 1})))
trailers = st.one_of(
    json_values,
    *[st.fixed_dictionaries({"tar_bytes": st.none(), "set_aside": pairs, "usable": counts})] * 3,
    st.fixed_dictionaries({"tar_bytes": numbers, "set_aside": json_values, "usable": json_values}),
)
indexes = st.builds(
    lambda some, trailer: (
        "".join(f"{line}\n" for line in (f"v1.2 {len(some)}", *some)).encode("utf-8", "surrogatepass")
        + f"# {json.dumps(trailer)}".encode()
    ),
    st.lists(lines, max_size=4),
    trailers,
)
captions = st.one_of(
    texts,
    st.binary(max_size=60),
    st.sampled_from(
        [b"[" * 5000, b'{"alt":' * 2000, b"\0" * 5000, b"<|endoftext|>", "e\u0301".encode() * 500, b"a" * 70_000]
    ),
    st.builds(lambda value: json.dumps({"alt": value}).encode("utf-8", "surrogatepass"), json_values),
)
pictures = st.one_of(
    st.builds(
        lambda kind, side: encoded(1, kind, side, side),
        st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"]),
        st.sampled_from([8, 16]),
    ),
    st.builds(
        lambda start, rest: start + rest,
        st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM", b"RIFF\0\0\0\0WEBP", b"<"]),
        st.binary(max_size=300),
    ),
    st.binary(max_size=100),
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes replaced, cut off, doubled or left out, in one to three places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(out) + 1)
        change = rng.randrange(6)
        if change == 0:
            del out[place:]
        elif change == 1:
            out[place:place] = rng.randbytes(rng.choice((1, 4, 512)))
        elif change == 2:
            out[place : place + rng.choice((1, 4, 512))] = b""
        elif change == 3:
            out[place:place] = out[place : place + 512]
        elif place < len(out):
            out[place] = rng.randrange(256) if change == 4 else out[place] ^ 1 << rng.randrange(8)
    return bytes(out)


class Readers:
    """Each reads one input in a directory of its own and says what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tar = folder / "fuzz.tar"
        write_corpus(folder / "honest", num_shards=1, per_shard=3, height=8, width=8)
        self.honest = folder / "honest" / "00000.tar"
        self.index_path, self._trailer = index_of(self.honest), ensure_index(self.honest).trailer

    def read_tar(self, data: bytes) -> str:
        self.tar.with_suffix(".idx").unlink(missing_ok=True)
        self.tar.write_bytes(data)
        return self._read_all(self.tar, "txt")

    def read_index(self, data: bytes) -> str:
        """`data` is the lines and what is to stand in the last one; with right checksums, or it would not be read."""
        text, _, last = data.rpartition(b"# ")
        try:
            trailer = json.loads(last)
        except ValueError:
            trailer = {"tar_bytes": None, "set_aside": [], "usable": {}}
        if isinstance(trailer, dict) and trailer.get("tar_bytes", 0) is None:
            trailer |= {key: self._trailer[key] for key in ("rules", "tar_bytes", "tar_mtime_ns")}
        crc32 = [zlib.crc32(text), zlib.crc32(json.dumps(trailer).encode())]
        self.index_path.write_bytes(text + f"# {json.dumps({'crc32': crc32, 'of': trailer})}\n".encode())
        return self._read_all(self.honest, "txt")

    def read_caption(self, data: bytes) -> str:
        self.tar.with_suffix(".idx").unlink(missing_ok=True)
        ext, caption = ("json", "json:alt") if data.startswith((b"{", b"[")) else ("txt", "txt")
        self.tar.write_bytes(member("0.jpg", encoded_once()) + member(f"0.{ext}", data) + END)
        return self._read_all(self.tar, caption)

    def read_picture(self, data: bytes) -> str:
        if reason := image_fault(data, MOST_PIXELS):
            return reason
        return "read by Pillow" if needs_pillow(data) else "read"

    def _read_all(self, tar: Path, caption: str) -> str:
        try:
            shards = Shards([str(tar)], caption, tries=1)
            rows = [self._outcome(shards, sample_idx) for sample_idx in range(min(len(shards.index(0)), 4))]
        except UserError as error:
            return type(error).__name__
        aside = ", ".join(sorted(shards.bad)) or "nothing"
        return next((row for row in rows if row != "read"), "read" if rows else aside)

    def _outcome(self, shards: Shards, sample_idx: int) -> str:
        try:
            sample = shards.read(0, sample_idx)
            label = shards.label(0, sample_idx)
        except (BadMember, Unreadable) as reason:
            return str(reason)
        assert len(sample.image) <= Path(shards.names[0]).stat().st_size
        assert -(2**63) <= label < 2**63
        row = encoder().encode([sample.caption])
        assert row.shape == (1, CONTEXT)
        assert (row == encoder().end_of_text_id).sum() == 1
        return "read"


class _Inline:
    """A pool of no threads: opening one shard in one costs more than reading it."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> _Inline:
        return self

    map = staticmethod(map)

    def __exit__(self, *_: object) -> None: ...


@lru_cache(1)
def encoder() -> CaptionEncoder:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_bpe(["a red circle", "a blue star"] * 3, 300).save(str(path))
        return CaptionEncoder(str(path), CONTEXT)


@lru_cache(1)
def encoded_once() -> bytes:
    return encoded(0, height=8, width=8)


def fuzz(reader: str, inputs: int, first_seed: int = 0) -> Counter[str]:
    """Has a reader read `inputs` inputs; how often each outcome came. Raises what a reader must not."""
    outcomes: Counter[str] = Counter()
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder, patch("data.shards.ThreadPoolExecutor", _Inline):
        readers = Readers(Path(folder))
        read: Callable[[bytes], str] = getattr(readers, f"read_{reader}")
        drawn: st.SearchStrategy[bytes] = {
            "tar": tars,
            "index": indexes,
            "caption": captions,
            "picture": pictures,
        }[reader]

        def body(data: bytes, number: int) -> None:
            rng = random.Random(number)
            for attempt in range(DAMAGED):
                if outcomes.total() < inputs:
                    outcomes[read(damaged(data, rng) if attempt else data)] += 1

        while outcomes.total() < inputs:  # hypothesis stops early where it thinks it has seen everything
            examples = min(-(-(inputs - outcomes.total()) // DAMAGED), 1000)
            one_round = settings(
                max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
            )  # fmt: skip
            seed(first_seed)(one_round(given(drawn, st.integers(0, 2**64))(body)))()
            first_seed += 1
    return outcomes


READERS = ("tar", "index", "caption", "picture")


def main(argv: list[str] | None = None) -> int:
    """The command line. A reader that raises what it must not ends it with a traceback and the input."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Feed hostile inputs to the readers.")
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for reader in options.readers or READERS:
        start = time.monotonic()
        outcomes = fuzz(reader, options.inputs, options.seed)
        listed = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common(8))
        print(
            f"{reader}: {outcomes.total()} inputs in {time.monotonic() - start:.0f} s, 0 crashes; {listed}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
