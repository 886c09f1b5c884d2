"""Bad samples are counted by reason, logged once, and stop the run only above the configured share."""

import json
from collections import Counter
from pathlib import Path

import pytest

from configs import UserError
from data.bad_samples import BadSample, BadSampleTracker, TooManyBadSamples

pytestmark = pytest.mark.L0


def bad(i: int, reason: str = "truncated image") -> BadSample:
    return BadSample(f"00000/{i:03d}", reason, i)


def logged(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_bad_sample_counts_and_is_logged_once(tmp_path: Path) -> None:
    log = tmp_path / "run" / "bad.jsonl"
    tracker = BadSampleTracker(0.5, 100, Counter({"missing caption": 2}), log)
    for sample in (bad(1), bad(2, "web page"), bad(1)):
        tracker.record(sample)
    assert tracker.counts == {"missing caption": 2, "truncated image": 1, "web page": 1}
    assert json.loads(log.read_text().splitlines()[0]) == {
        "key": "00000/001", "reason": "truncated image", "position": 1,
    }  # fmt: skip
    assert logged(log) == ["00000/001", "00000/002"]


def test_a_resumed_run_and_another_rank_do_not_log_a_sample_again(tmp_path: Path) -> None:
    log = tmp_path / "bad.jsonl"
    first, second = (BadSampleTracker(1, 100, Counter(), log) for _ in range(2))
    first.record(bad(1))
    second.record(bad(2))
    first.record(bad(2))
    second.log_left_out([bad(1), bad(3)])
    with log.open("a") as file:
        file.write('{"key": "half\n')  # a killed run leaves this
    BadSampleTracker(1, 100, Counter(), log).record(bad(1))
    assert log.read_text().count("00000/001") == 1
    assert log.read_text().count("00000/002") == 1
    assert log.read_text().count("00000/003") == 1


def test_the_first_bad_samples_of_a_good_corpus_do_not_stop_the_run() -> None:
    tracker = BadSampleTracker(0.02, 10_000, Counter(), None)
    tracker.count_served(8, 8)
    tracker.count_served(1000, 5)
    assert tracker.share == pytest.approx(13 / 1008)


def test_a_share_above_the_limit_stops_with_the_counts() -> None:
    tracker = BadSampleTracker(0.02, 10_000, Counter({"missing image": 50}), None)
    for i in range(30):
        tracker.record(bad(i))
    with pytest.raises(
        TooManyBadSamples, match=r"30 truncated image, 50 missing|50 missing image, 30 truncated"
    ) as error:
        tracker.count_served(1000, 30)
    assert error.value.counts == {"missing image": 50, "truncated image": 30}
    assert isinstance(error.value, UserError)
    assert "raise data.max_bad_share" in str(error.value)


def test_too_many_left_out_samples_stop_a_run_before_its_first_step(tmp_path: Path) -> None:
    log = tmp_path / "bad.jsonl"
    BadSampleTracker(0.05, 950, Counter({"missing image": 50}), log).check_share()
    tracker = BadSampleTracker(0.05, 949, Counter({"missing image": 51}), log)
    with pytest.raises(TooManyBadSamples, match=r"5\.1% of the samples are bad \(51 missing image\).* corpus or raise"):
        tracker.check_share()
    tracker.log_left_out([bad(1)])
    with pytest.raises(TooManyBadSamples, match=r"mend the corpus \(keys in .*bad\.jsonl\) or raise"):
        tracker.check_share()


def test_the_share_joins_what_the_index_and_what_reading_showed() -> None:
    tracker = BadSampleTracker(1, 900, Counter({"missing image": 100}), None)
    tracker.count_served(200, 20)
    assert tracker.share == pytest.approx(0.1 + 0.9 * 0.1)
