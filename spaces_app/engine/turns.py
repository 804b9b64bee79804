"""The queue before the model: bounded, and served in turns, so that nobody waits for another's
second question.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Container
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Items by conversation; conversations take turns, each gives its oldest item.

    Args:
        capacity: items that may wait.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, conversation: str, item: Item) -> None:
        """Queues an item.

        Raises:
            ValueError: as many as may wait are waiting.
        """
        with self._changed:
            if sum(map(len, self._waiting.values())) >= self.capacity:
                raise ValueError(
                    f"{self.capacity} questions are waiting already, which is as many as may: "
                    "try again in a minute"
                )
            self._waiting.setdefault(conversation, deque()).append(item)
            self._changed.notify()

    def take(self, timeout: float, busy: Container[str] = ()) -> Item | None:
        """The next item, as soon as there is one; None when there was none for `timeout` seconds.

        Its conversation goes to the end of the line. Conversations in `busy` are passed over.
        """

        def next_one() -> str | None:
            return next((name for name in self._waiting if name not in busy), None)

        with self._changed:
            conversation = self._changed.wait_for(next_one, timeout)
            if conversation is None:
                return None
            items = self._waiting.pop(conversation)
            item = items.popleft()
            if items:
                self._waiting[conversation] = items
            return item

    def remove(self, conversation: str, item: Item) -> bool:
        """Takes an item out that is no longer wanted; False when it was not waiting."""
        with self._changed:
            items = self._waiting.get(conversation, deque())
            if item not in items:
                return False
            items.remove(item)
            if not items:
                del self._waiting[conversation]
            return True

    def in_order(self) -> list[Item]:
        """What waits, the next one first."""
        with self._changed:
            lines = [list(items) for items in self._waiting.values()]
        rounds = max(map(len, lines), default=0)
        return [line[i] for i in range(rounds) for line in lines if i < len(line)]
