"""Takes from root, for a moment, the right to read whatever it likes, so that tests see what an ordinary user sees."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h
_READS_ANYTHING = 1 << 1 | 1 << 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("thread", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def rights_of_an_ordinary_user() -> Iterator[None]:
    """Have the rights of files count for this thread, and for those that it starts, whoever runs it."""
    if os.geteuid() != 0:
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    header, halves = _Header(_VERSION_3, 0), (_Half * 2)()
    _call(library.capget, header, halves)
    before = halves[0].effective
    halves[0].effective = before & ~_READS_ANYTHING
    _call(library.capset, header, halves)
    try:
        yield
    finally:
        halves[0].effective = before
        _call(library.capset, header, halves)


def _call(function: "ctypes._NamedFuncPointer", header: _Header, halves: "ctypes.Array[_Half]") -> None:
    if function(ctypes.byref(header), halves) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
