"""A store with a budget in bytes that lets go of what was not used for longest."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedStore(Generic[Value]):
    """Values by key, together with what is reserved never larger than `budget` bytes."""

    def __init__(self, budget: int):
        self.budget = budget
        self.used = self.reserved = 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Value | None:
        """The value, which now counts as just used; None when it is not, or no longer, there."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keeps a value of `size` bytes; what is larger than all there is room for is not kept."""
        self.pop(key)
        if size > self.budget - self.reserved:
            return
        self._let_go(self.budget - self.reserved - size)
        self._entries[key] = (value, size)
        self.used += size

    def reserve(self, size: int) -> None:
        """Leaves room for `size` bytes that are used elsewhere; gives it back when negative."""
        self.reserved += size
        self._let_go(self.budget - self.reserved)

    def _let_go(self, most: int) -> None:
        while self._entries and self.used > most:
            self.pop(next(iter(self._entries)))

    def pop(self, key: Hashable) -> Value | None:
        """Takes the value out, if it is there."""
        value, size = self._entries.pop(key, (None, 0))
        self.used -= size
        return value

    def clear(self) -> None:
        self._entries.clear()
        self.used = 0
