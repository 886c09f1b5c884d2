"""Output that cannot be written: the reader has gone, the locale lacks a letter, the stream is closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import stderr

pytestmark = pytest.mark.L0

REPORTS = """
import sys
from pathlib import Path
from engine.stderr import ignore_output_errors, print_error
from engine.reporting.reporter import open_reporter

ignore_output_errors()
with open_reporter(Path(sys.argv[1]), total_steps=30, first_step=0, is_main=True) as reporter:
    reporter.message(f"saved {sys.argv[1]}")
    sys.stdin.readline()                    # meanwhile the reader closes the pipe
    for step in (10, 20, 30):
        reporter.message(f"saved {sys.argv[1]}")
        reporter.scalars(step, {"loss/total": 1.0})
        print_error("a warning")
        print("a library's own words")
"""


def test_a_run_continues_after_its_reader_has_gone_and_escapes_letters_that_the_locale_lacks(tmp_path: Path) -> None:
    run_dir = tmp_path / "größe-Жук"
    process = subprocess.Popen(
        [sys.executable, "-c", REPORTS, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().decode() == f"saved {tmp_path}/gr\\xf6\\xdfe-\\u0416\\u0443\\u043a\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
    assert (run_dir / "log.txt").read_text(encoding="utf-8").count(f"saved {run_dir}") == 4


CLOSED = "from engine.stderr import *; ignore_output_errors(); print('lost', flush=True); print_error('lost too')"


@pytest.mark.parametrize("closed", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_streams_and_full_disks_change_no_exit_code(closed: str) -> None:
    root = Path(stderr.__file__).parents[1]
    done = subprocess.run(f'"{sys.executable}" -c "{CLOSED}" {closed}', shell=True, cwd=root, timeout=60)
    assert done.returncode == 0
