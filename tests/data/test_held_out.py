"""Held-out images: all of them, once, in order, with their labels, whatever rank reads them.

The evaluation crop is ADM's: Pillow's box and bicubic filters are the reference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from configs import UserError
from configs.run import System
from data.held_out import HeldOutImages, adm_crop
from tests.data.tar_shards import encoded, write_corpus, write_tar

pytestmark = pytest.mark.L0

# (height, width), size: shrunk, halved once and twice, odd sides, enlarged, as it is, long and narrow.
CASES = [
    ((375, 500), 256), ((500, 333), 64), ((257, 259), 64), ((131, 517), 64), ((40, 37), 64), ((64, 64), 64),
    ((64, 99), 64), ((1025, 70), 32), ((33, 1000), 32), ((128, 128), 64), ((127, 200), 64),
]  # fmt: skip


def with_pillow(pixels_HWC: Tensor, size: int) -> Tensor:
    """The same steps in Pillow's own operations, one axis a call: Pillow 13 begins with whichever is cheaper."""

    def resized(image: Image.Image, width: int, height: int, kind: Image.Resampling) -> Image.Image:
        return image.resize((width, image.height), kind).resize((width, height), kind)

    image = Image.fromarray(pixels_HWC.numpy())
    while min(image.size) >= 2 * size:
        image = resized(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = resized(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    cut = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


@pytest.mark.parametrize(("sides", "size"), CASES)
def test_it_is_pillows_to_one_level(sides: tuple[int, int], size: int) -> None:
    pixels = torch.randint(0, 256, (*sides, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = adm_crop(pixels, size), with_pillow(pixels, size)
    assert ours.shape == (3, size, size)
    apart = (ours.int() - theirs.int()).abs()
    # Noise is the worst case. Pillow's weights are whole numbers of 2^-22: a level, where a sum ends near a half.
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 5e-3


def test_an_image_of_the_right_size_is_untouched() -> None:
    pixels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8)
    assert torch.equal(adm_crop(pixels, 48), pixels.permute(2, 0, 1))


def held_out(folder: Path, **options: object) -> HeldOutImages:
    return HeldOutImages([f"{folder}/*.tar"], 16, System(), 10_000, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_shards=2, per_shard=9)
    return folder


def test_samples_come_once_in_index_order_with_their_labels(corpus: Path) -> None:
    images = held_out(corpus)
    read = list(images.batches(7))
    assert [len(batch.keys) for batch in read] == [7, 7, 4]
    assert len(images) == 18
    assert [key for batch in read for key in batch.keys] == [f"{i // 9:05d}/{i:06d}" for i in range(18)]
    assert torch.cat([batch.labels for batch in read]).tolist() == [i % 5 for i in range(18)]
    assert read[0].images.shape == (7, 3, 16, 16)
    again = list(images.batches(5))
    assert torch.cat([b.images for b in read]).equal(torch.cat([b.images for b in again]))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_samples_of_one_list(corpus: Path, world_size: int) -> None:
    [whole] = held_out(corpus).batches(100)
    found: dict[int, tuple[str, int]] = {}
    for rank in range(world_size):
        for batch in held_out(corpus, rank=rank, world_size=world_size).batches(2):
            rows = zip(batch.keys, batch.labels.tolist(), strict=True)
            found |= dict(zip(batch.positions.tolist(), rows, strict=True))
    assert [found[i] for i in range(18)] == list(zip(whole.keys, whole.labels.tolist(), strict=True))


def test_a_limit_keeps_samples_of_every_shard(corpus: Path) -> None:
    [batch] = held_out(corpus, limit=6).batches(100)
    assert [int(key.split("/")[1]) for key in batch.keys] == [0, 3, 6, 9, 12, 15]
    assert batch.positions.tolist() == list(range(6))
    assert len(held_out(corpus, limit=1000)) == 18


NAMES = {
    "a.json": b'{"label": "3"}', "b.json": b'{"label": "3.0"}', "c.json": b'{"label": 3.0}', "d.cls": b"3.0\n",
    "e.json": b'{"label": "dog"}', "f.cls": b"Tabby_cat\n", "g.json": b'{"label": "crane"}', "h.json": b'{"label": ""}',
    "i.json": b'{"label": 1.5}', "j.cls": b"\xff\xfe", "k.json": b'{"label": "-1"}',
}  # fmt: skip


def write_named(folder: Path) -> None:
    """Labels as texts, and .cls members beside .json ones."""
    members: dict[str, bytes] = {}
    for name, content in NAMES.items():
        members |= {f"{name[0]}.jpg": encoded(ord(name[0])), name: content}
    members |= {"l.jpg": encoded(1), "l.json": b"{}", "l.cls": b"4"}
    members |= {"m.jpg": encoded(1), "m.json": b'{"label": "dog"}', "m.cls": b"5"}
    write_tar(folder / "0.tar", members)


def test_labels_are_numbers_in_any_form_or_class_names_of_the_table(tmp_path: Path) -> None:
    write_named(tmp_path)
    names = ["crane", "dog", "tabby cat", "crane"]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [{"name": name} for name in names]}))
    images = held_out(tmp_path)
    [batch] = images.batches(100)
    assert batch.labels.tolist() == [3, 3, 3, 3, 1, 2, -1, -1, -1, -1, -1, 4, 5]
    with pytest.raises(
        UserError, match=r"0/g has label 'crane', a class name, and .*classes.json has no such class, or"
    ):
        images.classes.require_known()


def test_class_names_without_a_table_are_an_error_for_tasks_that_need_labels(tmp_path: Path) -> None:
    write_named(tmp_path)
    images = held_out(tmp_path)
    [batch] = images.batches(100)
    assert batch.labels.tolist() == [3, 3, 3, 3, -1, -1, -1, -1, -1, -1, -1, 4, 5]
    assert not images.bad
    with pytest.raises(
        UserError, match=r"0/e has label 'dog', a class name, and there is no .*classes.json: names are"
    ):
        images.classes.require_known()
    (tmp_path / "other.json").write_text('{"classes": [{"name": "DOG"}, {"name": "tabby-cat"}, {"name": "crane"}]}')
    given = held_out(tmp_path, classes=tmp_path / "other.json")
    [batch] = given.batches(100)
    assert batch.labels.tolist() == [3, 3, 3, 3, 0, 1, 2, -1, -1, -1, -1, 4, 5]
    given.classes.require_known()


def test_labels_come_from_json_or_cls_and_anything_else_is_none(tmp_path: Path) -> None:
    labels = {
        "a.json": b'{"label": 7}', "b.cls": b" 12\n", "c.json": b'{"label": "dog"}', "d.json": b'{"label": true}',
        "e.cls": b"n01440764", "f.json": b'{"other": 1}', "g.txt": b"no label", "h.json": b'{"label": -3}',
    }  # fmt: skip
    members: dict[str, bytes] = {}
    for name, content in labels.items():
        members |= {f"{name[0]}.jpg": encoded(ord(name[0])), name: content}
    write_tar(tmp_path / "0.tar", members)
    [batch] = held_out(tmp_path).batches(100)
    assert batch.labels.tolist() == [7, 12, -1, -1, -1, -1, -1, -3]


def test_bad_samples_are_skipped_and_counted_and_batches_filled(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(9):
        members |= {f"{i}.jpg": encoded(i), f"{i}.json": b'{"label": 1}'}
    members["2.jpg"] = members["2.jpg"][:200]
    members["4.json"] = b"{"
    write_tar(tmp_path / "0.tar", members)
    images = held_out(tmp_path)
    assert [batch.positions.tolist() for batch in images.batches(4)] == [[0, 1, 3, 5], [6, 7, 8]]
    assert images.bad.total() == 2
    assert images.bad["corrupt json"] == 1


def test_no_shards_or_no_samples_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.held_out is empty"):
        HeldOutImages([], 16, System(), 10_000)
    with pytest.raises(UserError, match="matches no file"):
        held_out(tmp_path)
    write_tar(tmp_path / "0.tar", {"0.txt": b"no image"})
    with pytest.raises(UserError, match="holds no readable sample"):
        held_out(tmp_path)
