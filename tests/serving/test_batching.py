"""The queue loses no item, returns none twice and starves none; a batch has one key and at most max_batch items."""

import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prunekit.serving.batching import Batcher, QueueClosedError, QueueFullError

MAX_BATCH, MAX_WAITING = 3, 8


class Queue(RuleBasedStateMachine):
    """State machine that compares the queue with a plain list of the waiting items, oldest first."""

    def __init__(self):
        super().__init__()
        self.queue: Batcher[str, object] = Batcher(MAX_BATCH, MAX_WAITING)
        self.waiting: list[tuple[str, object]] = []
        self.passed: Counter = Counter()  # number of batches taken while an item waited
        self.before: dict[object, int] = {}  # number of items that waited when an item came
        self.closed = False

    @rule(key=st.sampled_from("abcd"), count=st.integers(0, 4))
    def put(self, key, count):
        items = [object() for _ in range(count)]
        if self.closed:
            with pytest.raises(QueueClosedError):
                self.queue.put(key, items)
        elif len(self.waiting) + count > MAX_WAITING:
            assert not self.queue.has_room(count)
            with pytest.raises(QueueFullError):
                self.queue.put(key, items)
        else:
            for item in items:
                self.before[item] = len(self.waiting)
                self.waiting.append((key, item))
            self.queue.put(key, items)

    @rule()
    def cut(self):
        batch = self.queue.cut()
        key = self.waiting[0][0] if self.waiting else None
        assert batch == [item for own, item in self.waiting if own == key][:MAX_BATCH]
        self.waiting = [entry for entry in self.waiting if entry[1] not in batch]
        self.passed.update(item for _, item in self.waiting)

    @rule(rows=st.lists(st.integers(0, MAX_WAITING), max_size=4))
    def remove(self, rows):
        gone = [self.waiting[row][1] for row in set(rows) if row < len(self.waiting)]
        assert self.queue.remove([*gone, object()]) == len(gone)
        self.waiting = [entry for entry in self.waiting if entry[1] not in gone]

    @precondition(lambda self: len(self.before) > 5)
    @rule()
    def close(self):
        self.queue.close()
        self.closed = True

    @invariant()
    def nothing_is_lost(self):
        assert len(self.queue) == len(self.waiting)

    @invariant()
    def nothing_starves(self):
        assert all(self.passed[item] <= self.before[item] for _, item in self.waiting)

    def teardown(self):
        while self.waiting:
            self.cut()
        assert self.queue.cut() == []


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_threads_take_everything_once():
    queue: Batcher[int, int] = Batcher(4, 10_000)
    taken: list[list[int]] = []

    def work():
        while (batch := queue.take()) is not None:
            taken.append(batch)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for start in range(0, 900, 3):
        queue.put(start % 5, range(start, start + 3))
    queue.close()
    for worker in workers:
        worker.join(20)
    assert sorted(item for batch in taken for item in batch) == list(range(900))
    assert all(len({(item // 3 * 3) % 5 for item in batch}) == 1 and len(batch) <= 4 for batch in taken)


@pytest.mark.parametrize("bounds", [(0, 1), (1, 0)])
def test_bounds_are_positive(bounds):
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(*bounds)


def test_a_batch_that_settles_takes_what_comes_and_ends_when_it_is_full():
    queue: Batcher[str, int] = Batcher(MAX_BATCH, MAX_WAITING)
    queue.put("a", [0])
    later = threading.Timer(0.05, lambda: [queue.put("b", [1]), queue.put("a", [2, 3, 4])])
    later.start()
    assert queue.take(settle=60.0) == [0, 2, 3]  # a full batch stops waiting
    later.join()
    assert queue.take(settle=0.01) == [1]  # no other item came
    assert queue.take(settle=0.01) == [4]
    closing = threading.Timer(0.05, queue.close)
    queue.put("a", [5])
    closing.start()
    assert queue.take(settle=60.0) == [5] and queue.take(settle=60.0) is None


def test_a_full_batch_and_an_idle_device_do_not_wait():
    queue: Batcher[str, int] = Batcher(1, MAX_WAITING)
    queue.put("a", [0, 1])
    assert queue.take(settle=1e9) == [0] and queue.take(settle=1e9) == [1]
    later = threading.Timer(0.05, lambda: queue.put("a", [2]))
    later.start()
    assert Batcher.take(queue, settle=1e9) == [2]  # it waits for an item, but not for a full batch
