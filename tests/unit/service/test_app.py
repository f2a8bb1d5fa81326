"""What watches a service beside its frames: each goes on after a fault of its own, and what it missed is counted."""

import asyncio
import threading

import pytest

from service import app
from service.observability.telemetry import Telemetry
from service.routes.context import Lifecycle
from service.settings import Settings
from tests.fakes import FakeClock, in_loop


class Faulty:
    """Fails the first time, with what nobody foresaw, and tells of each try."""

    def __init__(self, when_again):
        self.tries = 0
        self._when_again = when_again

    def __call__(self):
        """Do what is looked for."""
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("can't start new thread")
        self._when_again()


class Looks:
    """A registry that is only looked at, of a service that stops with the second look."""

    def __init__(self):
        self.clock, self.telemetry, self.lifecycle = FakeClock(), Telemetry(), Lifecycle()
        self.rescan = Faulty(self.lifecycle.start_draining)
        self.registry = self

    def load(self):
        """Load nothing."""

    def try_again(self):
        """Let the time of the next look come."""
        self.clock.advance(1.0)


def test_look_when_it_ends_by_a_fault_of_its_own_then_it_is_counted_as_missed_and_looking_goes_on(monkeypatch):
    """New versions that nobody looks for are told as those of a store that is away."""
    monkeypatch.setattr(app, "_TRY_AGAIN_EVERY_S", 0.001)
    looks = Looks()

    app._load_and_look(looks, Settings(store_poll_s=1.0))

    assert looks.rescan.tries == 2
    assert "flawline_store_unreachable_total 1.0" in looks.telemetry.exposition()[0].decode()


@in_loop
async def test_renew_when_a_look_ends_by_a_fault_of_its_own_then_the_next_one_is_taken(monkeypatch):
    """A certificate that ends stops every camera, whatever the machine was short of for a moment."""
    monkeypatch.setattr(app, "_RENEW_EVERY_S", 0.0)
    is_renewed = threading.Event()

    class Certificate:
        renew = Faulty(is_renewed.set)

    renewing = asyncio.create_task(app._renew(Certificate()))
    await asyncio.to_thread(is_renewed.wait, 20)
    renewing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await renewing
    assert is_renewed.is_set()
