"""Invariants of the lease ledger, for any sequence of events."""

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from cluster.pool.coordinator import Coordinator, Limits
from cluster.pool.messages import (
    Asked,
    Committed,
    CursorMoved,
    Evicted,
    Expired,
    Failed,
    GivenUp,
    Heartbeat,
    Joined,
    Leased,
    Left,
    Quarantined,
    Released,
    Slept,
    Tick,
)

LIMITS = Limits(
    num_shards=8,
    block_shards=2,
    ready_ahead=4,
    max_bytes=10_000,
    shard_bytes=100,
    lease_timeout_s=10.0,
    max_attempts=3,
)


def start(limits=LIMITS, committed=None, workers=("a", "b")):
    """A coordinator with joined workers that have asked, and the leases they got."""
    coordinator = Coordinator(limits, dict(committed or {}))
    leases = []
    for worker in workers:
        coordinator.handle(Joined(worker), 0.0)
        leases += coordinator.handle(Asked(worker), 0.0)
    return coordinator, leases


def test_the_lowest_free_shard_is_leased_first():
    _, leases = start(committed={0: 100, 2: 100})
    assert leases == [Leased("a", 1), Leased("b", 3)]


def test_the_window_ends_ready_ahead_beyond_the_block_that_is_read():
    coordinator, _ = start(committed=dict.fromkeys(range(5), 100))
    assert set(coordinator.leases) == {5}  # 0 + 2 + 4 = 6 is the first shard outside
    assert coordinator.is_blocked
    assert coordinator.handle(CursorMoved(2), 0.0) == [Leased("b", 6)]
    assert not coordinator.is_blocked


def test_bytes_on_disk_and_bytes_of_leases_stay_below_the_limit():
    coordinator, leases = start(replace(LIMITS, max_bytes=350), committed={0: 120})
    assert leases == [Leased("a", 1)]  # 120 + 120 + 120 = 360 would be too many
    assert coordinator.is_blocked


def test_a_lease_without_progress_expires_and_goes_to_another_worker():
    coordinator, _ = start()
    coordinator.handle(Heartbeat("b"), 5.0)
    assert coordinator.handle(Tick(), 10.0) == [Expired("a", 0)]
    coordinator.handle(Committed(1, 100), 11.0)
    assert coordinator.handle(Asked("b"), 11.0) == [Leased("b", 0)]


def test_time_in_which_nobody_listened_counts_against_no_lease():
    coordinator, _ = start()
    assert coordinator.handle(Slept(100.0), 105.0) == []
    assert coordinator.handle(Tick(), 109.0) == []
    assert coordinator.handle(Tick(), 110.0) == [Expired("a", 0), Expired("b", 1)]


def test_a_late_commit_of_an_expired_lease_counts_once():
    coordinator, _ = start()
    coordinator.handle(Heartbeat("b"), 5.0)
    coordinator.handle(Tick(), 10.0)
    coordinator.handle(Committed(0, 100), 11.0)
    coordinator.handle(Committed(1, 100), 11.0)
    assert coordinator.handle(Asked("b"), 11.0) == [Leased("b", 2)]
    assert coordinator.num_made == 2


def test_a_shard_that_keeps_failing_is_given_up_with_its_traceback():
    coordinator, _ = start(workers=("a",))
    for _ in range(2):
        assert coordinator.handle(Failed("a", "boom"), 0.0) == []
        assert coordinator.handle(Asked("a"), 0.0) == [Leased("a", 0)]
    assert coordinator.handle(Failed("a", "boom"), 0.0) == [GivenUp(0, "3 failures", "boom")]
    assert coordinator.handle(Asked("a"), 0.0) == [Leased("a", 1)]


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_shard_that_takes_its_workers_with_it_is_given_up(is_silent):
    coordinator, now, said = Coordinator(LIMITS, {}), 0.0, []
    for n in range(9):  # 3 for each of the 3 attempts
        assert said == []
        coordinator.handle(Joined(f"w{n}"), now)
        assert coordinator.handle(Asked(f"w{n}"), now) == [Leased(f"w{n}", 0)]
        if is_silent:
            now += LIMITS.lease_timeout_s
            expired, *said = coordinator.handle(Tick(), now)
            assert expired == Expired(f"w{n}", 0)
        else:
            said = coordinator.handle(Left(f"w{n}", "killed by signal 9"), now)
    reason = "no progress" if is_silent else "killed by signal 9"
    assert said == [GivenUp(0, "9 workers were lost while making it", reason)]


def test_a_commit_forgives_earlier_losses():
    coordinator, _ = start(workers=("a",))
    coordinator.handle(Left("a", "gone"), 0.0)
    assert coordinator.suspects[0].losses == 1
    coordinator.handle(Committed(0, 100), 0.0)
    assert coordinator.suspects == {}


def test_a_worker_that_leaves_gives_its_shard_back_without_blame():
    coordinator, _ = start()
    coordinator.handle(Left("a", "gone"), 0.0)
    coordinator.handle(Committed(1, 100), 0.0)
    assert coordinator.handle(Asked("b"), 0.0) == [Leased("b", 0)]
    assert coordinator.suspects[0].failures == 0


def test_a_quarantined_shard_is_made_again_even_behind_the_cursor():
    coordinator, _ = start(committed=dict.fromkeys(range(8), 100))
    assert coordinator.is_done
    coordinator.handle(CursorMoved(6), 0.0)
    assert coordinator.handle(Quarantined(1), 0.0) == [Leased("a", 1)]


def test_the_oldest_blocks_make_room_once_no_checkpoint_reads_them():
    full = dict.fromkeys(range(4), 100)
    coordinator, leases = start(replace(LIMITS, max_bytes=400), committed=full, workers=("a",))
    assert leases == [] and coordinator.needs_room
    # The block that holds the lowest shard goes as a whole, and no further one.
    assert coordinator.handle(Released(4), 0.0) == [Evicted((0, 1)), Leased("a", 4)]
    assert sorted(coordinator.committed) == [2, 3] and coordinator.evicted == {0, 1}
    assert coordinator.num_made == 4


def test_nothing_is_evicted_while_there_is_room():
    coordinator, _ = start(committed=dict.fromkeys(range(4), 100))
    assert coordinator.handle(Released(4), 0.0) == [] and coordinator.evicted == set()


def test_an_evicted_shard_is_made_and_not_leased_again():
    coordinator = Coordinator(LIMITS, dict.fromkeys(range(2, 8), 100), evicted={0, 1})
    assert coordinator.is_done
    coordinator.handle(Joined("a"), 0.0)
    assert coordinator.handle(Asked("a"), 0.0) == []


def test_a_hole_in_a_released_block_is_made_again_and_goes_later():
    limits = replace(LIMITS, max_bytes=300)
    coordinator, _ = start(limits, committed=dict.fromkeys((0, 2, 3), 100), workers=())
    coordinator.handle(Released(4), 0.0)
    coordinator.handle(Joined("a"), 0.0)
    assert coordinator.handle(Asked("a"), 0.0) == [Evicted((0,)), Leased("a", 1)]
    coordinator.handle(Committed(1, 100), 0.0)
    assert coordinator.handle(Asked("a"), 0.0) == [Evicted((1,)), Leased("a", 4)]


def test_a_tar_that_reappears_counts_its_bytes_and_goes_again():
    limits = replace(LIMITS, max_bytes=200)
    coordinator = Coordinator(limits, {2: 100}, evicted={0, 1}, released=4)
    coordinator.handle(Committed(0, 100), 0.0)  # of a producer that was believed dead
    assert coordinator.evicted == {1} and coordinator.num_made == 3
    coordinator.handle(Joined("a"), 0.0)
    assert coordinator.handle(Asked("a"), 0.0) == [Evicted((0,)), Leased("a", 3)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_shard_is_made_whatever_happens(data):
    """Commits, failures, deaths, silences, corruptions: no double lease, bounds, no deadlock."""
    limits = replace(
        LIMITS,
        num_shards=data.draw(st.integers(1, 12)),
        ready_ahead=data.draw(st.integers(2, 5)),
        max_attempts=1_000,
    )
    coordinator = Coordinator(limits, {})
    now, working, names, faults = 0.0, {}, 0, 30

    def feed(event):
        for action in coordinator.handle(event, now):
            match action:
                case Leased(worker, shard):
                    assert shard not in working.values() and worker not in working
                    assert shard not in coordinator.committed
                    assert shard < coordinator.cursor + limits.block_shards + limits.ready_ahead
                    working[worker] = shard
                case Expired(worker, _):
                    working.pop(worker)

    for _ in range(300):
        while len(coordinator.workers) < 3:
            feed(Joined(f"w{names}"))
            names += 1
        for worker in sorted(coordinator.workers - working.keys()):
            feed(Asked(worker))
        if coordinator.is_done and faults == 0:
            break
        kind = (
            data.draw(st.sampled_from(["commit", "fail", "die", "silence", "corrupt"]))
            if faults
            else "commit"
        )
        faults = max(0, faults - 1)
        busy = sorted(working)
        if kind == "corrupt" and coordinator.committed:
            feed(Quarantined(data.draw(st.sampled_from(sorted(coordinator.committed)))))
        elif kind == "silence":
            now += limits.lease_timeout_s
            feed(Tick())
        elif busy:
            worker = data.draw(st.sampled_from(busy))
            shard = working.pop(worker)
            match kind:
                case "commit" | "corrupt":
                    feed(Committed(shard, 100))
                case "fail":
                    feed(Failed(worker, "boom"))
                case "die":
                    feed(Left(worker, "gone"))
        cursor = 0  # the trainer stands at the first block that is not complete
        while all(cursor + i in coordinator.committed for i in range(limits.block_shards)):
            cursor += limits.block_shards
        feed(CursorMoved(cursor))
    assert coordinator.is_done
