"""The processes that fit one detector together, a GPU each: the one door to `torch.distributed`.

`torchrun` starts them and tells each its number. Every batch is split into shares, a process computes its own ones, and
all make the same step, because each gradient is averaged over all shares. The first process alone passes over frames,
keeps checkpoints, speaks, and goes on when fitting is done.

Rule: all of them call the same methods in the same order. Who has ended is noticed by the others at their next call, or
by torchrun, which then ends them all.
"""

from datetime import timedelta
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from training.config import ConfigFault

# As long as the first process may pass over its frames while the others wait; a dead process is noticed much earlier.
_PATIENCE = timedelta(hours=12)


class PeerLost(Exception):
    """Another process of the run has ended; the sentence says how the run goes on."""


class Peers(Protocol):
    """Who fits together; processes are numbered from 0."""

    @property
    def number(self) -> int:
        """Return the number of this process."""
        ...

    @property
    def count(self) -> int:
        """Return how many there are."""
        ...

    def add_up(self, values: Tensor) -> None:
        """Replace the values, of any shape, by their sum over all processes."""
        ...

    def hear_first(self, data: bytes) -> bytes:
        """Return what the first process gave; what the others gave is dropped."""
        ...

    def part(self) -> None:
        """Say that there is nothing more to say."""
        ...


class Alone:
    """The only process of a run."""

    number = 0
    count = 1

    def add_up(self, values: Tensor) -> None:
        """Leave the values: there is nobody else."""

    def hear_first(self, data: bytes) -> bytes:
        """Return what was given."""
        return data

    def part(self) -> None:
        """Do nothing."""


class _Group:
    """One of several processes; what they exchange lies on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.number = dist.get_rank()
        self.count = dist.get_world_size()
        self._device = device

    def add_up(self, values: Tensor) -> None:
        try:
            dist.all_reduce(values)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _lost() from error

    def hear_first(self, data: bytes) -> bytes:
        own = np.frombuffer(data, np.uint8)
        length = torch.tensor([len(own)], device=self._device)
        try:
            dist.broadcast(length, 0)
            told = torch.empty(int(length), dtype=torch.uint8, device=self._device)
            if self.number == 0:
                told.copy_(torch.tensor(own))
            dist.broadcast(told, 0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _lost() from error
        return told.cpu().numpy().tobytes()

    def part(self) -> None:
        dist.destroy_process_group()


def refuse_company() -> None:
    """Refuse to be one of several processes, for commands that would do the same work several times.

    Raises:
        ConfigFault: if torchrun started this process.
    """
    if dist.is_torchelastic_launched():
        raise ConfigFault("torchrun is for flawline train; start this command without it.")


def process_number() -> int:
    """Return the number of this process among those of its machine, 0 where it is the only one."""
    return dist.get_node_local_rank(fallback_rank=0)


def meet_peers(wanted: Literal["auto", "cpu", "cuda"]) -> Peers:
    """Wait for the processes that torchrun started with this one; where it did not, this one is alone.

    Args:
        wanted: where to fit. On GPUs each process takes the one of its own number, and they speak over NCCL; else over
            gloo.

    Raises:
        ConfigFault: if this process has no GPU of its own.
        PeerLost: if the others do not come.
    """
    if not dist.is_torchelastic_launched():
        return Alone()
    on_gpu = wanted != "cpu" and torch.cuda.is_available()
    if on_gpu:
        own, found = process_number(), torch.cuda.device_count()
        if own >= found:
            raise ConfigFault(
                f"Each process takes a GPU of its own, and there are {found}; give torchrun --nproc-per-node={found}, "
                "or fit with --device cpu."
            )
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise _lost() from error
    return _Group(torch.device("cuda" if on_gpu else "cpu"))


def _lost() -> PeerLost:
    return PeerLost(
        "Another process of this run has ended; torchrun tells which. What was kept stands: start torchrun again, with "
        "flawline train --resume and the run's directory."
    )
