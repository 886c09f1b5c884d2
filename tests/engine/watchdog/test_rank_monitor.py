"""Who is lost, from what was heard and when."""

import pytest

from engine.watchdog.server import Heartbeat, LostRanks, RankMonitor

pytestmark = pytest.mark.L0


def judge_of(world_size: int = 3) -> RankMonitor:
    """All ranks are after step 4 in backward, heard at 100 s."""
    monitor = RankMonitor(world_size, silent_seconds=10, stuck_seconds=60, now=0.0)
    for rank in range(world_size):
        monitor.on_heartbeat(Heartbeat(rank, f"host{rank % 2}", 4, "backward"), now=100.0)
    return monitor


def hear(monitor: RankMonitor, now: float, *beats: tuple[int, int, str]) -> None:
    for rank, step, phase in beats:
        monitor.on_heartbeat(Heartbeat(rank, f"host{rank % 2}", step, phase), now)


def ranks_of(lost: LostRanks | None) -> tuple[str, tuple[int, ...]]:
    assert lost is not None
    return lost.kind, lost.ranks


def test_while_all_speak_and_advance_nobody_is_lost() -> None:
    monitor = judge_of()
    for second in range(101, 400):
        hear(monitor, second, *((rank, second, "trunk") for rank in range(3)))
        assert monitor.lost_ranks(second) is None


def test_a_run_that_went_back_advances_from_there() -> None:
    monitor = judge_of()
    for second in range(101, 200):
        hear(monitor, second, *((rank, second % 5, "trunk") for rank in range(3)))
        assert monitor.lost_ranks(second) is None


def test_before_the_first_step_every_phase_has_its_own_time() -> None:
    monitor = RankMonitor(2, silent_seconds=10, stuck_seconds=60, now=0.0)
    stages = ["starting up"] * 50 + ["assembling"] * 50 + ["loading"] * 61
    for second, stage in enumerate(stages):
        hear(monitor, second, (0, 0, stage), (1, 0, stage))
        assert monitor.lost_ranks(second) is None
    hear(monitor, 161, (0, 0, "loading"), (1, 0, "loading"))
    assert ranks_of(monitor.lost_ranks(161)) == ("stuck", (0, 1))


def test_while_the_first_rank_consolidates_those_that_wait_for_it_are_not_suspected() -> None:
    monitor = judge_of()
    for second in range(101, 163):
        hear(monitor, second, (0, 9, "consolidating"), (1, 9, "barrier"), (2, 9, "barrier"))
    assert ranks_of(monitor.lost_ranks(162)) == ("stuck", (0,))


def test_a_closed_connection_is_a_death_at_once_and_a_goodbye_is_none() -> None:
    monitor = judge_of()
    monitor.on_goodbye(1)
    monitor.on_disconnect(1)
    assert monitor.lost_ranks(100.1) is None
    monitor.on_disconnect(2)
    lost = monitor.lost_ranks(100.1)
    assert ranks_of(lost) == ("dead", (2,))
    assert lost is not None
    assert lost.message == (
        "dead: rank 2 (host host0) after step 4 in backward: its process has ended without a word; "
        "others: rank 0 (host host0) after step 4 in backward"
    )


def test_silence_beyond_the_limit_names_who_is_silent_and_where_all_were() -> None:
    monitor = judge_of()
    hear(monitor, 109.0, (0, 5, "all_reduce"), (1, 5, "all_reduce"))
    assert monitor.lost_ranks(110.0) is None
    lost = monitor.lost_ranks(110.1)
    assert ranks_of(lost) == ("silent", (2,))
    assert lost is not None
    assert "rank 2 (host host0) after step 4 in backward: not heard of for 10 s" in lost.message
    assert "rank 0 (host host0) after step 5 in all_reduce" in lost.message


def test_a_rank_that_never_came_is_silent() -> None:
    monitor = RankMonitor(2, silent_seconds=10, stuck_seconds=60, now=0.0)
    hear(monitor, 9.0, (0, 0, "other"))
    lost = monitor.lost_ranks(10.5)
    assert ranks_of(lost) == ("silent", (1,))
    assert lost is not None
    assert "after step 0 in starting" in lost.message


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
    monitor = judge_of()
    for second in range(101, 161):
        hear(monitor, second, *places)
        assert monitor.lost_ranks(second) is None
    hear(monitor, 162.0, *places)
    assert ranks_of(monitor.lost_ranks(162.0)) == ("stuck", suspects)
