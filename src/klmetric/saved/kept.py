"""Files that stay open from one reading to the next, but not for long.

To open a file anew is to read its header, which is long where it holds thousands of arrays. But what is mapped counts
as memory of this process once it was read, and there may be thousands of files.
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet, finalize

# Of all files together: how many are open at once, and the bytes that are read of them until they are let go of.
MOST_FILES, MOST_BYTES = 64, 2**25

T = TypeVar("T")


class Kept(Generic[T]):
    """A file that is opened when it is needed, and let go of with all others when they have become too many."""

    _lock: ClassVar[Lock] = Lock()
    _all: ClassVar["WeakSet[Kept[Any]]"] = WeakSet()
    _bytes: ClassVar[int] = 0

    def __init__(self, opened: Callable[[], T], close: Callable[[T], object] = lambda file: None) -> None:
        self._opened, self._close = opened, close
        self._file: T | None = None
        self._closing: Callable[[], object] = lambda: None

    def get(self, size: int = 0) -> T:
        """The open file, of which so many bytes are going to be read into memory that stays mapped."""
        with Kept._lock:
            Kept._bytes += size
            if Kept._bytes > MOST_BYTES or (self._file is None and len(Kept._all) >= MOST_FILES):
                for kept in list(Kept._all):
                    kept._file = None
                    kept._closing()
                Kept._all.clear()
                Kept._bytes = size
            if self._file is None:
                self._file = self._opened()
                self._closing = finalize(self, self._close, self._file)
                Kept._all.add(self)
            return self._file
