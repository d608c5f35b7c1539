"""Workers and production over time, from the events alone."""

import numpy as np

from distill.run.events import worker_history


def event(time, kind, **values):
    """A line of events.jsonl."""
    return {"time": time, "kind": kind, **values}


def lease(time, shard, worker):
    return event(time, "lease", shard=shard, worker=worker)


def commit(time, shard, worker, seconds=1.0):
    return event(time, "commit", shard=shard, worker=worker, bytes=1, seconds=seconds)


def test_production_is_even_between_lease_and_commit_and_adds_up():
    history = worker_history(
        [
            lease(0.0, 0, "a"),
            lease(1.0, 1, "b"),
            lease(1.5, 2, "a"),  # expires; another worker makes the shard
            commit(4.0, 0, "a"),
            lease(4.0, 2, "b"),
            commit(5.0, 1, "b"),
            commit(6.0, 2, "b"),
            commit(9.0, 3, "c", seconds=2.0),  # its lease was not logged
        ]
    )
    made = history.shards_made([-1.0, 0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    expected = [0, 0, 0.25, 0.75, 1.75, 2.5, 3, 3, 3.5, 4, 4]
    np.testing.assert_allclose(made, expected, atol=1e-12)
    assert worker_history([]).shards_made([0.0, 1.0]).tolist() == [0, 0]


def test_workers_join_and_leave_and_none_outlives_its_supervisor():
    history = worker_history(
        [
            event(0.0, "pool", workers=1, most=4),
            event(3.0, "worker_join", worker="a"),
            event(4.0, "scale", workers=2),
            event(6.0, "worker_join", worker="b"),
            event(7.0, "worker_leave", worker="unknown"),
            event(8.0, "worker_leave", worker="a"),
            event(9.0, "steps"),  # the last that is heard before a kill -9
            event(50.0, "pool", workers=2, most=4),
            event(55.0, "worker_join", worker="c"),
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
