"""A folder of images may hold links, pipes, devices and bombs: each is left out under its reason, and nothing hangs."""

import os
from pathlib import Path

import pytest

from data.pictures import Unusable, load_picture
from tests.data.tar_shards import encoded, huge_png

pytestmark = pytest.mark.L0


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "nowhere.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for path in tmp_path.iterdir():
        with pytest.raises(Unusable, match="not a regular file"):
            load_picture(path, None)


def test_a_bomb_is_left_out_by_its_header_and_a_link_to_a_picture_is_one(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(huge_png())
    with pytest.raises(Unusable, match="too many pixels"):
        load_picture(tmp_path / "bomb.png", None)
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    assert load_picture(tmp_path / "link.jpg", None)[0] == encoded(0)
