"""The queue in front of a device: what waits is cut into batches of one key, the oldest first.

Plain Python: the server, a test or a worker of another engine may own one. A batch is cut when a device asks for it,
so that it holds whatever has come by then. A device that has just answered a batch may ask to settle: clients who ask
again at once then get into the next batch. A device that was idle never waits for a batch to fill. The batch of the
oldest item is always the next one, so an item waits for no more batches than there are items before it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class QueueFullError(Exception):
    """There is no room for what was put."""


class QueueClosedError(Exception):
    """The queue takes nothing any more."""


class Batcher(Generic[K, T]):
    """Items that wait by key; safe for many threads.

    Args:
        max_batch: items of one batch.
        max_waiting: items that may wait.

    """

    def __init__(self, max_batch: int, max_waiting: int):
        if max_batch < 1 or max_waiting < 1:
            raise ValueError(f"max_batch={max_batch}, max_waiting={max_waiting}: both must be at least 1")
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._numbers = count()
        self._waiting: dict[K, deque[tuple[int, T]]] = {}  # by key, each with its place in the order of arrival
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Return how many items wait."""
        return self._size

    def has_room(self, items: int) -> bool:
        """Return whether so many items would be taken now."""
        return self._size + items <= self.max_waiting

    def put(self, key: K, items: Sequence[T]) -> None:
        """Let items of one key wait, all of them or none.

        Raises:
            QueueFullError: there is no room for all.
            QueueClosedError: after `close`.

        """
        with self._changed:
            if self._closed:
                raise QueueClosedError
            if not self.has_room(len(items)):
                raise QueueFullError
            if items:
                self._waiting.setdefault(key, deque()).extend((next(self._numbers), item) for item in items)
                self._size += len(items)
                self._changed.notify_all()

    def cut(self) -> list[T]:
        """Take the next batch: the oldest item and the oldest others of its key; empty where nothing waits."""
        with self._changed:
            if not self._waiting:
                return []
            key = self._oldest()
            line = self._waiting[key]
            batch = [line.popleft()[1] for _ in range(min(self.max_batch, len(line)))]
            if not line:
                del self._waiting[key]
            self._size -= len(batch)
            return batch

    def take(self, settle: float = 0.0) -> list[T] | None:
        """Wait for the next batch; None once the queue is closed and empty.

        settle: seconds that items which wait already may go on waiting until their batch is full.
        """
        with self._changed:
            if self._waiting and settle:
                self._changed.wait_for(self._is_settled, settle)
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self.cut() or None

    def _oldest(self) -> K:
        return min(self._waiting, key=lambda key: self._waiting[key][0][0])

    def _is_settled(self) -> bool:
        """Whether no later item would get into the next batch."""
        return self._closed or not self._waiting or len(self._waiting[self._oldest()]) >= self.max_batch

    def remove(self, items: Collection[T]) -> int:
        """Drop those of the items that still wait, by identity; return how many there were."""
        gone = {id(item) for item in items}
        with self._changed:
            before = self._size
            for key, line in list(self._waiting.items()):
                if kept := deque(entry for entry in line if id(entry[1]) not in gone):
                    self._waiting[key] = kept
                else:
                    del self._waiting[key]
            self._size = sum(map(len, self._waiting.values()))
            return before - self._size

    def close(self) -> None:
        """Take nothing any more; what waits is still cut."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
