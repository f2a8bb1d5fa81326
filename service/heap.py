"""Gives memory back to the system that the process needed for a while.

Loading a bundle reads all of its files, and the C library keeps what was freed for later; later does not come.
"""

import ctypes
import gc


def give_back() -> None:
    """Return what is free; does nothing where the C library knows no such call."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # only glibc has it
        return
