"""What the events mean, folded once."""

from typing import get_type_hints

import numpy as np
from hypothesis import given, strategies as st

from distill.run.events import (
    KINDS,
    Commit,
    Evict,
    Expire,
    Fail,
    Group,
    GroupWaits,
    History,
    Lease,
    MakeAgain,
    Pool,
    Quarantine,
    Resume,
    Scale,
    Steps,
    WorkerJoin,
    WorkerLeave,
    replay,
)


def commit(time, shard, worker, seconds=1.0):
    return Commit(shard, worker, 1, seconds, time=time)


def test_production_is_even_between_lease_and_commit_and_adds_up():
    history = replay(
        [
            Lease(0, "a", time=0.0),
            Lease(1, "b", time=1.0),
            Lease(2, "a", time=1.5),  # expires; another worker makes the shard
            commit(4.0, 0, "a"),
            Lease(2, "b", time=4.0),
            commit(5.0, 1, "b"),
            commit(6.0, 2, "b"),
            commit(9.0, 3, "c", seconds=2.0),  # its lease was not logged
        ]
    )
    made = history.shards_made([-1.0, 0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    expected = [0, 0, 0.25, 0.75, 1.75, 2.5, 3, 3, 3.5, 4, 4]
    np.testing.assert_allclose(made, expected, atol=1e-12)
    assert History().shards_made([0.0, 1.0]).tolist() == [0, 0]


def test_workers_join_and_leave_and_none_outlives_its_supervisor():
    history = replay(
        [
            Pool(1, 4, time=0.0),
            WorkerJoin("a", {}, time=3.0),
            Scale(2, time=4.0),
            WorkerJoin("b", {}, time=6.0),
            WorkerLeave("unknown", "killed", time=7.0),
            WorkerLeave("a", "scaled down", time=8.0),
            Steps(0, 1, "", time=9.0),  # the last that is heard before a kill -9
            Pool(2, None, time=50.0),
            WorkerJoin("c", {}, time=55.0),
        ]
    )
    assert history.changes == [
        (0.0, 1, 0),
        (3.0, 1, 1),
        (4.0, 2, 1),
        (6.0, 2, 2),
        (8.0, 2, 1),
        (9.0, 2, 0),
        (50.0, 2, 0),
        (55.0, 2, 1),
    ]
    assert (history.target, history.most, history.workers) == (2, None, {"c"})
    assert history.joins == [3.0, 6.0, 55.0] and history.lost == 1


def test_shards_are_made_until_they_are_taken_back():
    events = [commit(1.0, 0, "a"), commit(2.0, 1, "a"), Quarantine(1, time=3.0)]
    history = replay(events)
    assert (history.made, history.made_twice) == ({0}, set())
    events += [commit(4.0, 1, "a"), Evict((0, 1), 2, time=5.0), MakeAgain((0,), time=6.0)]
    history = replay(events)
    assert (history.made, history.evicted) == ({1}, {0, 1})
    history = replay([*events, commit(7.0, 0, "a"), commit(8.0, 0, "b")])
    assert (history.made, history.made_twice) == ({0, 1}, {0})


def test_a_lease_ends_with_its_failure_and_with_its_worker():
    events = [Lease(0, "a", time=0.0), Lease(1, "b", time=0.0), Lease(2, "b", time=0.0)]
    failed = replay([*events, Fail(1, "b", "no", time=1.0)])
    assert failed.leases.keys() == {(0, "a"), (2, "b")}
    assert replay([*events, WorkerLeave("b", "killed", time=1.0)]).leases.keys() == {(0, "a")}


def test_a_second_lease_stays_when_the_first_ends_and_both_end_with_the_shard():
    events = [Lease(5, "a", time=0.0), Lease(5, "b", time=3.0)]
    expired = replay([*events, Expire(5, "a", "", time=4.0)])
    assert expired.leases.keys() == {(5, "b")}
    made = replay([*events, commit(6.0, 5, "a")])
    assert made.leases == {} and made.spans == [(0.0, 6.0)]


def test_the_training_in_its_order():
    course = [Resume(0, 2, time=0.0), Steps(0, 3, "", time=1.0), Resume(2, 1, time=2.0)]
    history = replay([course[0], GroupWaits(time=0.5), course[1], Group(1, time=1.5), course[2]])
    assert history.course == course and history.starts == [course[0], course[2]]
    assert not history.waits_for_nodes
    assert replay([Group(1), GroupWaits()]).waits_for_nodes


# Few shards and workers, so that they meet.
VALUES = {
    int: st.integers(0, 5),
    int | None: st.none() | st.integers(0, 5),
    float: st.floats(0, 10),
    float | None: st.none() | st.floats(0, 10),
    str: st.sampled_from("ab"),
    tuple[int, ...]: st.lists(st.integers(0, 5), max_size=3).map(tuple),
    tuple[int, ...] | None: st.none() | st.lists(st.integers(0, 5), max_size=3).map(tuple),
    dict[str, str]: st.just({}),
}


def any_event(kind):
    """(class, values of its fields)"""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name != "kind"}
    values = {name: VALUES[hint] for name, hint in hints.items()}
    return st.tuples(st.just(kind), st.fixed_dictionaries(values))


ANY = st.one_of([any_event(kind) for kind in KINDS.values()])


@given(st.lists(ANY, max_size=60), st.integers(0, 60))
def test_any_part_of_any_log_has_a_history(drawn, end):
    events = [kind(**values) for kind, values in drawn][:end]
    history = replay(events)
    made = history.shards_made([0.0, 1e9])
    assert made[0] <= made[1] <= len(history.spans) + 1e-6
    assert len(history.spans) == sum(isinstance(event, Commit) for event in events)
    assert history.leases.keys() <= {(e.shard, e.worker) for e in events if isinstance(e, Lease)}
