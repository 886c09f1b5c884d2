"""Who is lost, from what was heard and when."""

import pytest

from engine.watch.judge import Beat, Judge, Verdict

pytestmark = pytest.mark.L0


def judge_of(world_size: int = 3) -> Judge:
    """All ranks are after step 4 in backward, heard at 100 s."""
    judge = Judge(world_size, silent_seconds=10, stuck_seconds=60, now=0.0)
    for rank in range(world_size):
        judge.heard(Beat(rank, f"host{rank % 2}", 4, "backward"), now=100.0)
    return judge


def hear(judge: Judge, now: float, *beats: tuple[int, int, str]) -> None:
    for rank, step, phase in beats:
        judge.heard(Beat(rank, f"host{rank % 2}", step, phase), now)


def ranks_of(verdict: Verdict | None) -> tuple[str, tuple[int, ...]]:
    assert verdict is not None
    return verdict.kind, verdict.ranks


def test_while_all_speak_and_advance_nobody_is_lost() -> None:
    judge = judge_of()
    for second in range(101, 400):
        hear(judge, second, *((rank, second, "trunk") for rank in range(3)))
        assert judge.verdict(second) is None


def test_a_run_that_went_back_advances_from_there() -> None:
    judge = judge_of()
    for second in range(101, 200):
        hear(judge, second, *((rank, second % 5, "trunk") for rank in range(3)))
        assert judge.verdict(second) is None


def test_before_the_first_step_every_phase_has_its_own_time() -> None:
    judge = Judge(2, silent_seconds=10, stuck_seconds=60, now=0.0)
    stages = ["starting up"] * 50 + ["assembling"] * 50 + ["loading"] * 61
    for second, stage in enumerate(stages):
        hear(judge, second, (0, 0, stage), (1, 0, stage))
        assert judge.verdict(second) is None
    hear(judge, 161, (0, 0, "loading"), (1, 0, "loading"))
    assert ranks_of(judge.verdict(161)) == ("stuck", (0, 1))


def test_while_the_first_rank_consolidates_those_that_wait_for_it_are_not_suspected() -> None:
    judge = judge_of()
    for second in range(101, 163):
        hear(judge, second, (0, 9, "consolidating"), (1, 9, "barrier"), (2, 9, "barrier"))
    assert ranks_of(judge.verdict(162)) == ("stuck", (0,))


def test_a_closed_connection_is_a_death_at_once_and_a_goodbye_is_none() -> None:
    judge = judge_of()
    judge.goodbye(1)
    judge.closed(1)
    assert judge.verdict(100.1) is None
    judge.closed(2)
    verdict = judge.verdict(100.1)
    assert ranks_of(verdict) == ("dead", (2,))
    assert verdict is not None
    assert verdict.message == (
        "dead: rank 2 (host host0) after step 4 in backward: its process has ended without a word; "
        "others: rank 0 (host host0) after step 4 in backward"
    )


def test_silence_beyond_the_limit_names_who_is_silent_and_where_all_were() -> None:
    judge = judge_of()
    hear(judge, 109.0, (0, 5, "all_reduce"), (1, 5, "all_reduce"))
    assert judge.verdict(110.0) is None
    verdict = judge.verdict(110.1)
    assert ranks_of(verdict) == ("silent", (2,))
    assert verdict is not None
    assert "rank 2 (host host0) after step 4 in backward: not heard of for 10 s" in verdict.message
    assert "rank 0 (host host0) after step 5 in all_reduce" in verdict.message


def test_a_rank_that_never_came_is_silent() -> None:
    judge = Judge(2, silent_seconds=10, stuck_seconds=60, now=0.0)
    hear(judge, 9.0, (0, 0, "other"))
    verdict = judge.verdict(10.5)
    assert ranks_of(verdict) == ("silent", (1,))
    assert verdict is not None
    assert "after step 0 in starting" in verdict.message


@pytest.mark.parametrize(
    ("places", "suspects"),
    [
        ([(0, 7, "all_reduce"), (1, 7, "data"), (2, 7, "backward")], (1,)),
        ([(0, 7, "trunk"), (1, 6, "all_gather"), (2, 7, "data")], (1,)),  # behind comes before busy
        ([(0, 7, "all_reduce"), (1, 7, "all_gather"), (2, 7, "backward")], (0, 1, 2)),
    ],
)
def test_where_no_step_ends_those_are_named_for_whom_others_wait(
    places: list[tuple[int, int, str]], suspects: tuple[int, ...]
) -> None:
    judge = judge_of()
    for second in range(101, 161):
        hear(judge, second, *places)
        assert judge.verdict(second) is None
    hear(judge, 162.0, *places)
    assert ranks_of(judge.verdict(162.0)) == ("stuck", suspects)
