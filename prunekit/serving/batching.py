"""The queue in front of a device: waiting items are cut into batches of one key, the oldest items first.

The queue is plain Python: the server, a test or a worker of another engine may own one. A batch is cut when a device
takes it, so it can hold all items that have arrived by then. A device that has just answered a batch may wait a short
time (`settle`), so that clients who send their next request at once get into the next batch. A device that was idle
does not wait for a batch to fill. The batch of the oldest item is always the next one, so the number of batches that an
item waits for is at most the number of items before it.
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
    """The queue has no room for the given items."""


class QueueClosedError(Exception):
    """The queue is closed and accepts no more items."""


class Batcher(Generic[K, T]):
    """A queue of items that are batched by key; safe for many threads.

    Args:
        max_batch: largest number of items in a batch.
        max_waiting: largest number of waiting items.

    """

    def __init__(self, max_batch: int, max_waiting: int):
        if max_batch < 1 or max_waiting < 1:
            raise ValueError(f"max_batch={max_batch}, max_waiting={max_waiting}: both must be at least 1")
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._numbers = count()
        self._waiting: dict[K, deque[tuple[int, T]]] = {}  # by key: (order of arrival, item)
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Return how many items wait."""
        return self._size

    def has_room(self, items: int) -> bool:
        """Return whether the queue now has room for this number of items."""
        return self._size + items <= self.max_waiting

    def put(self, key: K, items: Sequence[T]) -> None:
        """Add items of one key to the queue, all of them or none.

        Raises:
            QueueFullError: there is no room for all items.
            QueueClosedError: `close` was called.

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
        """Remove and return the next batch: the oldest item and the next oldest items of its key; [] if none waits."""
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
        """Wait for the next batch, remove it and return it; return None once the queue is closed and empty.

        settle: longest time in seconds that already waiting items wait for their batch to fill.
        """
        with self._changed:
            if self._waiting and settle:
                self._changed.wait_for(self._is_settled, settle)
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self.cut() or None

    def _oldest(self) -> K:
        return min(self._waiting, key=lambda key: self._waiting[key][0][0])

    def _is_settled(self) -> bool:
        """Return whether the next batch is full, no item waits, or the queue is closed."""
        return self._closed or not self._waiting or len(self._waiting[self._oldest()]) >= self.max_batch

    def remove(self, items: Collection[T]) -> int:
        """Remove the given items that still wait, compared by identity; return the number removed."""
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
        """Accept no more items; waiting items can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
