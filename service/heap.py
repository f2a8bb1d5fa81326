"""Gives memory back to the system that the process needed for a while.

Loading a bundle reads all of its files, and the C library keeps what was freed for later; later does not come. The
collector of cycles, too, is told that loading has ended.
"""

import ctypes
import gc


def give_back() -> None:
    """Return what is free, and have what stays left alone; does nothing where the C library knows no such call."""
    gc.unfreeze()
    gc.collect()
    # What serves from now on stays for long. Looking through it again and again for what nobody refers to would stop
    # every frame for tens of milliseconds.
    gc.freeze()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # only glibc has it
        return
