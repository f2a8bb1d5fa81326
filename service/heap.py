"""Gives memory back to the system that the process needed for a while, and tells the collector of cycles what stays.

Loading a bundle reads all of its files, and the C library keeps what was freed for later; later does not come. What the
process holds beside that is told as well as the system knows it. The collector of cycles, too, is told that loading has
ended, and that what is imported never leaves. Where there was too little memory, that is told from other faults.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of the C++ library, the runtimes, CUDA, and the loader of shared libraries.
_LACKS = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
)


@contextmanager
def imports_stay() -> Iterator[None]:
    """Keep the collector of cycles away from what is imported inside the block.

    It would look through all of that again and again, and once more at the end of the process: a third of the time
    that a command takes to start.
    """
    known, collects = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if collects:
            gc.enable()


def lacked_memory(error: BaseException) -> bool:
    """Tell whether an error, or what it came from, was a lack of memory; runtimes say that in words alone."""
    known: BaseException | None = error
    while known is not None:
        said = str(known).lower()
        if isinstance(known, MemoryError) or any(words in said for words in _LACKS):
            return True
        known = known.__cause__
    return False


def held_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return how much memory of its own this process holds, files that are mapped left out; None where nobody tells.

    What is free is given back first, so that what is taken between two calls shows in the difference.

    Args:
        status: where the kernel tells.
    """
    _trim()
    try:
        [held] = re.findall(r"^RssAnon:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    except (OSError, ValueError):  # only Linux tells
        return None
    return int(held) * 1024


def give_back() -> None:
    """Return what is free, and have what stays left alone; does nothing where the C library knows no such call."""
    gc.unfreeze()
    gc.collect()
    # What serves from now on stays for long. Looking through it again and again for what nobody refers to would stop
    # every frame for tens of milliseconds.
    gc.freeze()
    _trim()


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # only glibc has it
        return
