"""Instances of one engine: each serves one run at a time, and a run takes whichever is free."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Generic, TypeVar

from service.errors import EngineFailed

_Instance = TypeVar("_Instance")


class Pool(Generic[_Instance]):
    """Opens instances, lends them, and closes each of them in the end.

    Args:
        count: of instances, at least one.
        make: opens one; what it raises closes those that are open already.
        close: gives an instance's memory back.

    Attributes:
        instances: to be looked at; only who lends one may use it.
    """

    def __init__(self, count: int, make: Callable[[], _Instance], close: Callable[[_Instance], None]) -> None:
        self.instances: list[_Instance] = []
        try:
            for _ in range(count):
                self.instances.append(make())
        except BaseException:
            for instance in self.instances:
                close(instance)
            raise
        self._close = close
        self._lock = Lock()
        self._is_closed = False
        self._free: SimpleQueue[_Instance | None] = SimpleQueue()  # None tells those who wait that the end has come
        for instance in self.instances:
            self._free.put(instance)

    @contextmanager
    def lend(self) -> Iterator[_Instance]:
        """Wait for a free instance and give it back in every outcome.

        Raises:
            EngineFailed: if the engine is closed.
        """
        instance = self._free.get()
        if instance is None:
            self._free.put(None)
            raise EngineFailed("The engine was unloaded; the part has no verdict.")
        try:
            yield instance
        finally:
            with self._lock:
                if not self._is_closed:
                    self._free.put(instance)
                else:
                    self._close(instance)

    def close(self) -> None:
        """Close what is free now and what is lent out as soon as it comes back; whoever asks later is refused."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            with suppress(Empty):
                while (instance := self._free.get_nowait()) is not None:
                    self._close(instance)
            self.instances.clear()
            self._free.put(None)
