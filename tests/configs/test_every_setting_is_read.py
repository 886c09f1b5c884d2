"""A setting that nothing reads is a promise nobody keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.configs.field_reads import all_fields, read_fields

pytestmark = pytest.mark.L0

ROOT = Path(__file__).resolve().parents[2]
# configs/deepspeed.py hands settings on to DeepSpeed; nothing else in configs has a use for them.
READERS = ("kernels", "data", "model", "profiling", "engine", "evaluation", "configs/deepspeed.py")


def test_every_setting_is_read_outside_configs() -> None:
    unread = all_fields() - read_fields(ROOT, READERS)
    assert sorted(unread) == [], "settings without effect"


def test_only_what_holds_a_section_counts_as_reading(tmp_path: Path) -> None:
    """Attributes of that name elsewhere do not count: optim.lr is read here, optim.eps and views.hue not."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "step.py").write_text(
        "from configs import Config\n"
        "from configs.run import Optim\n"
        "class Step:\n"
        "    def __init__(self, config: Config) -> None:\n"
        "        self.optim, self.eps = config.optim, 1\n"
        "    def run(self, group, picture):\n"
        "        group.eps = self.eps + picture.hue\n"
        "        return self.optim.lr\n"
        "def later(step: Step):\n"
        "    for key in ('rec', 'ssl'):\n"
        "        print(getattr(step.optim, 'steps'), key)\n"
    )
    expected = {("RunConfig", "optim"), ("Optim", "lr"), ("Optim", "steps")}
    assert read_fields(tmp_path, ("engine",)) == expected
