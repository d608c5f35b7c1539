"""Which failures are a shard's, a GPU's, a node's or everybody's: the coordinator's judgement."""

from dataclasses import replace

import pytest

from cluster.pool.coordinator import Coordinator, Limits
from cluster.pool.health import FEWEST
from cluster.pool.messages import (
    Arrived,
    Asked,
    Committed,
    CursorMoved,
    Excluded,
    Expired,
    Failed,
    GivenUp,
    Heartbeat,
    Hopeless,
    Joined,
    Leased,
    Left,
    Place,
    Readmitted,
    Staffed,
    Superseded,
    Tick,
    Unfit,
)

LIMITS = Limits(
    num_shards=1000,
    block_shards=2,
    ready_ahead=1000,
    max_bytes=10**9,
    shard_bytes=100,
    lease_timeout_s=1000.0,
    max_attempts=3,
)
NAN = "teacher only gives values that are not finite"


class Pool:
    """A coordinator, and what its actions do to workers. A worker that ends is started again."""

    def __init__(self, nodes, gpus=1, limits=LIMITS, **excluded):
        self.state, self.now, self.count = Coordinator(limits, {}, **excluded), 0.0, 0
        self.birth, self.said = "first", []
        self.at = {}  # worker -> place
        self.work = {}  # worker -> shard
        for node in nodes:
            for gpu in range(gpus):
                self.start(Place(node, f"{gpu}"))

    def start(self, place):
        self.count += 1
        name = f"{place.node}-{place.gpu}-{self.count}"
        self.at[name] = place
        self.tell(Arrived(name, place, "gpu", self.birth))
        if self.state.health.takes_work(place):
            self.tell(Joined(name))
            self.tell(Asked(name))

    def tell(self, event):
        for action in self.state.handle(event, self.now):
            match action:
                case Leased(name, shard):
                    assert name not in self.work and self.state.health.takes_work(self.at[name])
                    self.work[name] = shard
                case Superseded(name, shard):
                    assert self.work.pop(name) == shard
                    self.tell(Asked(name))
                case Excluded(place):
                    self.said.append(action)
                    for name in [n for n, at in self.at.items() if place in (at, at.whole)]:
                        self.end(name, is_alone=False)
                case _:
                    self.said.append(action)

    def end(self, name, is_alone=True):
        if name in self.at:
            place = self.at.pop(name)
            self.work.pop(name, None)
            self.tell(Left(name, "ended", is_alone))
            self.start(place)

    def fail(self, name, words="CUDA error", **how):
        self.work.pop(name)
        self.tell(Failed(name, words, **how))
        self.end(name)

    def make(self, name):
        self.tell(Committed(self.work.pop(name), 100, name))
        if name in self.at:
            self.tell(Asked(name))

    def on(self, node):
        """The workers of a node that have a shard."""
        return [name for name in self.work if self.at[name].node == node]

    def unfit(self, node, words, **how):
        (place,) = {at for at in self.at.values() if at.node == node}
        self.tell(Unfit(place, self.birth, words, **how))

    def excluded(self):
        return [str(action.place) for action in self.said if isinstance(action, Excluded)]


def test_a_gpu_that_fails_every_shard_is_excluded_and_no_shard_is_given_up():
    pool = Pool(["a", "b", "c", "d"], gpus=2)
    for _ in range(20):
        for name in list(pool.work):
            if name in pool.work:
                bad = pool.at[name] == Place("a", "0")
                pool.fail(name) if bad else pool.make(name)
    assert pool.said == [Excluded(Place("a", "0"), "3 failures, the last: CUDA error")]
    assert len(pool.on("a")) == 1 and len(pool.work) == 7
    pool.tell(Tick())
    made = set(pool.state.committed)
    assert set(range(max(made))) <= made | set(pool.work.values())


def test_what_failed_is_tried_on_another_node_by_one_who_has_made_a_shard():
    pool = Pool(["a", "b", "c"], gpus=2)
    fresh, proven = pool.on("c"), pool.on("b")[0]
    pool.make(proven)
    first = pool.on("a")[0]
    shard = pool.work[first]
    pool.fail(first)
    assert shard not in pool.work.values()  # nobody asks who could tell
    pool.tell(Asked(fresh[0]))
    assert shard not in pool.work.values()
    pool.make(proven)
    assert pool.work[proven] == shard


def test_where_nobody_is_proven_another_node_is_enough_and_alone_the_same():
    pool = Pool(["a", "b"])
    (a,), (b,) = pool.on("a"), pool.on("b")
    shard = pool.work[b]
    pool.fail(b)
    assert shard not in pool.work.values() and pool.on("b") != []  # it has got another one
    pool.end(a, is_alone=False)
    assert pool.work[pool.on("a")[0]] == shard
    alone = Pool(["a"])
    alone.fail(*alone.on("a"))
    assert alone.work[alone.on("a")[0]] == 0


def test_three_sick_gpus_that_meet_the_same_shard_do_not_convict_it():
    """They fail at once, so they ask more often than all others together."""
    pool = Pool(["a", "b", "c", "d", "e", "f", "g"])
    for _ in range(12):
        for node in "abc":
            for name in pool.on(node):
                pool.fail(name)
    assert sorted(pool.excluded()) == sorted([*(f"{node}, GPU 0" for node in "abc"), *"abc"])
    for _ in range(4):
        for node in "defg":
            for name in pool.on(node):
                pool.make(name)
    assert not any(isinstance(action, GivenUp | Hopeless) for action in pool.said)
    made = set(pool.state.committed)
    assert set(range(9)) <= made


def test_a_shard_that_fails_everywhere_is_given_up_after_three_nodes():
    pool = Pool(["a", "b", "c", "d"])
    for node in "abcd":
        pool.make(*pool.on(node))
    bad = max(pool.work.values())
    said = []
    while not (said := [x for x in pool.said if isinstance(x, GivenUp)]):
        for name in list(pool.work):
            if name in pool.work:
                pool.fail(name, "boom") if pool.work[name] == bad else pool.make(name)
    assert said == [GivenUp(bad, "3 failures", "boom")]
    assert pool.excluded() == []


def test_nan_is_believed_when_another_node_repeats_it():
    pool = Pool(["a", "b", "c", "d"])
    for node in "abcd":
        pool.make(*pool.on(node))
    (a,) = pool.on("a")
    shard = pool.work[a]
    pool.fail(a, NAN, is_refusal=True)
    assert pool.said == []
    pool.make(*pool.on("b"))
    (again,) = [name for name, its in pool.work.items() if its == shard]
    assert pool.at[again].node == "b"
    pool.fail(again, NAN, is_refusal=True)
    assert pool.said == [GivenUp(shard, "2 failures", NAN, is_refusal=True)]


def test_nan_of_one_gpu_is_the_gpus():
    pool = Pool(["a", "b", "c", "d"])
    for node in "bcd":
        pool.make(*pool.on(node))
    for _ in range(3):
        pool.fail(*pool.on("a"), NAN, is_refusal=True)
        for node in "bcd":
            pool.make(*pool.on(node))
    assert pool.excluded() == ["a, GPU 0", "a"]
    assert not any(isinstance(action, GivenUp | Hopeless) for action in pool.said)


def test_memory_that_does_not_suffice_for_one_sample_ends_a_gpu_at_once_and_no_shard():
    pool = Pool(["a", "b", "c"], gpus=2)
    name = pool.on("a")[0]
    shard = pool.work[name]
    pool.fail(name, "its memory does not suffice", is_final=True)
    assert pool.said == [Excluded(Place("a", "0"), "its memory does not suffice")]
    assert shard in pool.work.values() or shard in pool.state._freed
    assert pool.state.suspects.get(shard) is None or pool.state.suspects[shard].failures == 0


def test_the_run_ends_when_most_nodes_agree_and_says_what_they_share():
    pool = Pool(["a", "b", "c", "d", "e"])
    for node in "ab":
        pool.unfit(node, "cannot read 0x7f01: stale file handle", is_final=True)
    pool.unfit("c", "disk full", is_final=True)
    end = next(action for action in pool.said if isinstance(action, Hopeless))
    assert end.reason == (
        "3 of 5 nodes can make no shards (a, b, c); 2 of them say: cannot read 0x7f01: stale file "
        "handle"
    )
    assert not end.is_refusal


def test_a_refusal_of_most_nodes_is_a_refusal_and_of_one_node_is_its_own():
    pool = Pool(["a", "b", "c"])
    pool.unfit("a", "other weights", is_final=True, is_refusal=True)
    assert pool.said == [Excluded(Place("a"), "other weights")]
    pool.unfit("b", "other weights", is_final=True, is_refusal=True)
    words = "2 of 3 nodes can make no shards (a, b); all of them say: other weights"
    assert pool.said[-1] == Hopeless(words, is_refusal=True)
    alone = Pool(["a"])
    alone.unfit("a", "other weights", is_final=True, is_refusal=True)
    assert alone.said[-1] == Hopeless("other weights", is_refusal=True)


def test_nodes_that_are_still_to_come_are_waited_for_but_not_for_ever():
    pool = Pool([])
    pool.tell(Staffed(False))
    pool.start(Place("a", "0"))
    pool.tell(Unfit(Place("a"), "first", "no driver", is_final=True))
    pool.now = LIMITS.lease_timeout_s - 1
    pool.tell(Tick())
    assert [type(action) for action in pool.said] == [Excluded]
    late = Pool([])
    late.tell(Staffed(False))
    late.start(Place("a", "0"))
    late.tell(Unfit(Place("a"), "first", "no driver", is_final=True))
    for node in "bc":
        late.start(Place(node, "0"))
    late.now = LIMITS.lease_timeout_s - 1
    late.tell(Staffed(True))
    assert [type(action) for action in late.said] == [Excluded]
    pool.now += 1
    pool.tell(Tick())
    assert pool.said[-1] == Hopeless("no driver", is_refusal=False)


def test_a_node_that_comes_back_is_tried_again_and_one_failure_is_enough():
    pool = Pool(["a", "b", "c"])
    pool.unfit("a", "no driver", is_final=True)
    (parked,) = [name for name, at in pool.at.items() if at.node == "a"]
    pool.end(parked)  # the same node of Ray: still out
    assert pool.on("a") == []
    pool.birth = "second"
    (parked,) = [name for name, at in pool.at.items() if at.node == "a"]
    pool.end(parked)
    assert {Readmitted(Place("a")), Readmitted(Place("a", "0"))} <= set(pool.said)
    pool.fail(*pool.on("a"))
    assert pool.excluded()[2:] == ["a, GPU 0", "a"]
    pool.birth = "third"
    (parked,) = [name for name, at in pool.at.items() if at.node == "a"]
    pool.end(parked)
    for _ in range(3):
        pool.make(*pool.on("a"))
    pool.fail(*pool.on("a"))
    assert len(pool.excluded()) == 4  # mended: what it made counts


def test_who_expires_with_others_of_its_place_is_told_before_the_place_is_excluded():
    state, place = Coordinator(LIMITS, {}), Place("n")
    for node in (*"nmk", "n"):
        name = f"{node}{len(state.workers)}"
        state.handle(Arrived(name, Place(node), "cpu", node), 0.0)
        state.handle(Joined(name), 0.0)
        state.handle(Asked(name), 0.0)
    for _ in range(2 * LIMITS.max_attempts - 1):  # of two workers one failure less than is too much
        assert not state.handle(Unfit(place, "n", "bad"), 0.0)
    said = state.handle(Tick(), LIMITS.lease_timeout_s + 1)
    kinds = [type(action) for action in said if isinstance(action, (Expired, Excluded))]
    assert kinds.count(Excluded) >= 1 and kinds.count(Expired) == 4
    assert kinds.index(Excluded) == 4


def test_what_an_earlier_start_excluded_is_on_probation():
    pool = Pool(["a", "b", "c"], excluded={Place("a", "0"): "no driver"})
    assert pool.said == [Readmitted(Place("a", "0"))] and len(pool.on("a")) == 1
    pool.fail(*pool.on("a"))
    assert "a, GPU 0" in pool.excluded()


def test_a_gpu_that_is_slow_beyond_those_of_its_model_is_excluded_and_another_model_is_not():
    pool = Pool(["a", "b", "c", "d"])
    old = Place("old", "0")
    pool.at["old"] = old
    pool.tell(Arrived("old", old, "an older gpu", "first"))
    pool.tell(Joined("old"))
    pool.tell(Asked("old"))
    for _ in range(1 + FEWEST // 3):
        pool.now += 100.0
        for node in "bcd":
            pool.make(*pool.on(node))
    for _ in range(60):
        pool.now += 20.0
        for name in list(pool.work):
            pool.tell(Heartbeat(name))
        pool.tell(Tick())
        if pool.now % 100 < 20:
            for node in "bcd":
                pool.make(*pool.on(node))
    assert pool.excluded() == ["a, GPU 0", "a"]
    assert "slow: " in pool.said[0].reason and "takes others 100 s" in pool.said[0].reason
    assert "old" in pool.work


def paced(slow_s, **limits):
    """Three good nodes, 100 s a shard, and one that takes longer; after some rounds."""
    pool = Pool(["good1", "good2", "good3", "slow"], limits=replace(LIMITS, **limits))
    due = dict.fromkeys(pool.work, 0.0)
    for _ in range(400):
        pool.now += 10.0
        for name in list(pool.work):
            pool.tell(Heartbeat(name))
            began = pool.state._lease_in_hand(name).since_s
            if pool.now >= began + (slow_s if "slow" in name else 100.0):
                pool.make(name)
    return pool, due


def test_a_slow_worker_takes_what_it_makes_in_time_and_leaves_what_is_needed_first():
    """At twice the time, four workers make four shards in what it is late by."""
    pool, _ = paced(slow_s=200.0)
    assert not pool.excluded()
    (slow,) = pool.on("slow")
    others = [shard for name, shard in pool.work.items() if name != slow]
    made = set(pool.state.committed)
    lowest = next(shard for shard in range(1000) if shard not in made | {*pool.work.values()})
    assert 0 <= pool.work[slow] - min(others) <= 8 and lowest > min(others)
    pool.now = pool.state._lease_in_hand(slow).since_s + 200.0
    pool.make(slow)
    lowest = pool.state._next_free()
    assert pool.work[slow] == lowest + 4  # (200 / 100 - 1) x 4 workers


def test_a_shard_that_is_late_where_the_trainer_stands_is_leased_twice_and_the_first_one_wins():
    pool, _ = paced(slow_s=100.0)
    (slow,) = pool.on("slow")
    late = pool.work[slow]
    pool.tell(CursorMoved(late // 2 * 2))
    doubled = None
    for _ in range(30):
        pool.now += 10.0
        for name in [n for n in pool.work if n != slow]:
            pool.tell(Heartbeat(name))
            doubled = name if pool.work[name] == late else doubled
            if doubled is None and pool.now >= pool.state._lease_in_hand(name).since_s + 100.0:
                pool.make(name)
        if doubled:
            break
    assert pool.work[doubled] == pool.work[slow] == late and pool.at[doubled].node != "slow"
    pool.make(doubled)
    assert late in pool.state.committed and pool.work[slow] != late and not pool.state.doubles


def test_the_last_shards_are_leased_twice_to_those_who_have_nothing_else_to_do():
    pool, _ = paced(slow_s=100.0, num_shards=164)
    while len(pool.work) > 1:
        pool.make(next(name for name in pool.work if "slow" not in name))
    (slow,) = pool.work
    pool.now = pool.state._lease_in_hand(slow).since_s + 140.0
    pool.tell(Tick())
    (other,) = pool.work.keys() - {slow}
    assert pool.work[other] == pool.work[slow]
    pool.end(slow)  # the second lease is then the only one
    assert pool.state.leases[pool.work[other]].worker == other and not pool.state.doubles
    pool.make(other)
    assert pool.state.is_done


@pytest.mark.parametrize("is_alone", [False, True])
def test_workers_taken_with_their_nodes_hardly_speak_against_a_shard(is_alone):
    """Where nodes are taken all the time some shard is in hand nine times, by no fault of its."""
    pool = Pool(["a", "b"], limits=replace(LIMITS, num_shards=1))
    for _ in range(9):
        pool.end(next(iter(pool.work)), is_alone)
    assert any(isinstance(action, GivenUp) for action in pool.said) == is_alone
