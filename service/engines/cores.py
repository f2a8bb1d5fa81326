"""Which cores the threads of one run take, where a frame is alone and several work on it.

Left to itself Linux may wake all of them on the core that is awake, and then one by one they compute there while the
others idle: after a pause of 20 ms a run on two cores was seen to take as long as on one. So the threads that help keep
off one core, the *home*, and the one that they help goes there when it begins; both may be moved later on.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_OWN_STATE = Path("/proc/thread-self/stat")
# Of what follows the name of the command in that file, which may itself hold spaces: the core that it runs on.
_PROCESSOR = 36


@dataclass(frozen=True)
class Cores:
    """The cores of this process, as the kernel numbers them.

    Attributes:
        home: of the thread that is helped.
        others: for those that help.
    """

    home: int
    others: tuple[int, ...]

    @classmethod
    def choose(cls) -> "Cores | None":
        """Take as home the core that asks, so that processes side by side have different ones.

        Returns:
            None where there is but one core, or no telling which.
        """
        if sys.platform != "linux":
            return None
        allowed = os.sched_getaffinity(0)
        try:
            home = int(_OWN_STATE.read_text().rpartition(")")[2].split()[_PROCESSOR])
        except (OSError, ValueError, IndexError):
            return None
        others = tuple(sorted(allowed - {home}))
        return cls(home, others) if home in allowed and others else None

    def go_home(self) -> None:
        """Move the calling thread to its home, from where it may be moved on; where that is refused it stays."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                allowed = os.sched_getaffinity(0)
                if self.home in allowed:  # an administrator may have taken cores away meanwhile
                    os.sched_setaffinity(0, (self.home,))
                    os.sched_setaffinity(0, allowed)
