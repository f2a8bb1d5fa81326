"""What stops a command from outside: a termination signal ends it as Ctrl-C does.

Fitting hears both between two steps only (`fitting/fit.py`); everywhere else, a command ends at once, says how it goes
on, and leaves with 130.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at a termination signal, as Ctrl-C does, while the context is open.

    Only the main thread may listen to signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
