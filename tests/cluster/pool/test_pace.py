"""What is costly takes a tenth of the time, or a fiftieth of a core, whichever is rarer."""

import pytest

from cluster.pool import member
from cluster.pool.member import Pace


@pytest.mark.parametrize(
    ("wall", "core", "rests"), [(0.02, 0.01, 1.0), (3.0, 0.1, 30.0), (0.6, 0.5, 25.0)]
)
def test_the_longer_it_takes_the_rarer_it_is(wall, core, rests, monkeypatch):
    now = {"monotonic": 100.0, "thread_time": 7.0}
    monkeypatch.setattr(member.time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(member.time, "thread_time", lambda: now["thread_time"])
    listing = Pace()
    assert listing.is_due(now["monotonic"])
    now["monotonic"] += wall
    now["thread_time"] += core
    listing.done(1.0)
    assert not listing.is_due(100.0 + rests - 0.01) and listing.is_due(100.0 + rests + 0.01)
