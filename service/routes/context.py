"""What every route works with: the parts that `app.py` put together, and who is calling."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from service.auth import Caller, Keyring, MountedKeyring
from service.errors import NotAuthorised
from service.lines.live import Found, LiveLine
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.observability.traces import Traces
from service.pipeline import Pipeline
from service.ports.body_budget import BodyBudget, Holding
from service.records import Records
from service.routes.headers import refuse_repeated
from service.settings import Settings
from service.shadows import Shadows
from service.threads import begin

# Of a request's scope, where the server tells more than others: a `Connection`.
CONNECTION_EXTENSION = "flawline.connection"
_SETTLED_AFTER_S = 0.1
_MOST_UNSETTLED = 32  # more at once would hold up a frame for milliseconds

_Result = TypeVar("_Result")

_log = logging.getLogger("flawline")


class AfterAnswers:
    """What is done once an answer is on its way, and before the process ends.

    What takes no time, such as counting, is done for several answers together: each time that the processor comes to
    it from a frame it has to fetch the code anew, which takes longer than counting does.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._due: list[Callable[[], None]] = []
        self._settles: asyncio.TimerHandle | None = None

    def later(self, count: Callable[[], None]) -> None:
        """Have something counted within a tenth of a second, or before anybody reads."""
        self._due.append(count)
        if len(self._due) == _MOST_UNSETTLED:
            self.settle()
        elif self._settles is None:
            self._settles = asyncio.get_running_loop().call_later(_SETTLED_AFTER_S, self.settle)

    def settle(self) -> None:
        """Count all that is due; whoever is about to read counts calls it."""
        if self._settles is not None:
            self._settles.cancel()
            self._settles = None
        due, self._due = self._due, []
        for count in due:
            try:
                count()
            except Exception:  # noqa: BLE001 - the edge: what can't be counted must not keep others from it
                _log.exception("an answer could not be counted")

    def start(self, inspection_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Start work about one inspection; it first runs when the current answer has been handed over."""
        task = asyncio.get_running_loop().create_task(work)
        self._running[inspection_id] = task
        task.add_done_callback(lambda _: self._running.pop(inspection_id, None))

    async def wait_for(self, inspection_id: str) -> None:
        """Wait for the work about one inspection, where there is some."""
        task = self._running.get(inspection_id)
        if task is not None:
            await asyncio.wait((task,))

    async def finish(self) -> None:
        """Wait for all work."""
        if self._running:
            await asyncio.wait(self._running.values())
        self.settle()


async def make_change(change: Callable[..., _Result], *arguments: str) -> _Result:
    """Make a change of an administrator's, which may take minutes, and return or raise what it does.

    In a thread of its own: it holds none that requests need, and keeps no other change waiting. Which one waits for
    which, the registry knows.
    """
    return await asyncio.wrap_future(begin(partial(change, *arguments), name="flawline-change"))


class Connection(Protocol):
    """What a server may tell of the connection behind a request."""

    def watch(self, when_left: Callable[[], None] | None) -> bool:
        """Have somebody told when the caller leaves, or nobody any more, and return whether it has left already."""
        ...

    def age_s(self) -> float:
        """Return how long ago the first byte of the request came."""
        ...

    def has_body(self) -> bool:
        """Tell whether all of the body is there."""
        ...

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer at once, and return whether it could be."""
        ...


class Lifecycle:
    """Whether the service still wants new frames."""

    def __init__(self) -> None:
        self._draining = threading.Event()

    @property
    def is_draining(self) -> bool:
        """Whether it does not."""
        return self._draining.is_set()

    def start_draining(self) -> None:
        """Be unready from now on; what was accepted is still answered."""
        self._draining.set()

    def stops_within(self, seconds: float) -> bool:
        """Wait so long, or until the service stops, and say whether it does; blocks."""
        return self._draining.wait(seconds)


@dataclass(frozen=True)
class Context:
    """The service's parts.

    Attributes:
        clock: seconds, monotonic; the one that deadlines are measured with.
        bodies: the memory that they may take.
        traces: None where no collector is named.
    """

    settings: Settings
    keyring: Keyring | MountedKeyring
    registry: Registry
    pipeline: Pipeline
    records: Records
    shadows: Shadows
    telemetry: Telemetry
    clock: Callable[[], float]
    bodies: BodyBudget
    traces: Traces | None = None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    after_answers: AfterAnswers = field(default_factory=AfterAnswers)

    def body_of(self, caller: Caller, line: str) -> Holding:
        """Return what counts the body of one request: towards its key, or its line where everybody is anybody."""
        return self.bodies.of(line if self.keyring.is_open else caller.name)

    def reasons_not_ready(self) -> list[dict[str, str]]:
        """Say what keeps the service from being ready; empty when it is."""
        if self.lifecycle.is_draining:
            return [{"state": "draining", "reason": "The service stops; send frames to another instance."}]
        if self.registry.is_ready:
            return []
        lines = [
            {"line": status.line, "state": status.state, "reason": status.reason or ""}
            for status in self.registry.statuses()
            if status.state != "ready"
        ]
        return lines or [{"state": "loading", "reason": self.registry.why_empty}]


class FrameRequest(Request):
    """A request whose headers are read once: a frame's way asks for eight of them, each of which is searched for."""

    @cached_property
    def headers(self) -> Headers:
        """By names in small letters; of several of one name the first."""
        return _KnownHeaders(scope=self.scope)


class _KnownHeaders(Headers):
    """Headers in a dictionary."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        self._first: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])
        }

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower()]

    def get(self, key: str, default: Any = None) -> Any:
        return self._first.get(key.lower(), default)

    def items(self) -> list[tuple[str, str]]:  # type: ignore[override]  # as Starlette has it
        return list(self._first.items())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower() in self._first


def connection_of(scope: Mapping[str, Any]) -> Connection | None:
    """Return what the server tells of the connection behind a request, if it does."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION_EXTENSION)
    return connection


def context_of(request: Request) -> Context:
    """Return the parts behind a request."""
    context: Context = request.app.state.context
    return context


def caller_of(request: Request) -> Caller:
    """Find out who is calling, which comes first in every request.

    Raises:
        ParameterInvalid: if a header that says one thing stands there twice, a key or any other.
        NotAuthenticated: if the service is not open and no known key was shown.
    """
    refuse_repeated(request.scope["headers"])
    headers = request.headers
    return context_of(request).keyring.identify(headers.get("authorization"), headers.get("x-api-key"))


def find_for(
    caller: Caller, context: Context, line: str, bundle_version: str | None, policy_version: str | None
) -> Found:
    """Return what judges a frame of a caller who may inspect on the line.

    Raises:
        NotAuthorised: if the caller may not choose it.
        FlawlineError: whatever `ServedLines.find` raises.
    """
    found = context.registry.find(line, bundle_version, policy_version)
    if bundle_version is not None or policy_version is not None:
        refuse_choice(caller, context, found.line, policy_version)
    return found


def refuse_choice(caller: Caller, context: Context, line: LiveLine, policy_version: str | None) -> None:
    """Refuse whoever names another version or policy than judges the line, and has no right to.

    What lies in the store for a trial would else be a switch to `PASS` in the hand of every camera.

    Args:
        caller: who asks.
        context: the service's parts.
        line: what was found for the version that the caller named, or did not.
        policy_version: that the caller named; None where it did not.

    Raises:
        NotAuthorised: if that is a choice, and the key does not allow it on the line.
    """
    if not caller.may("choose", line.name) and not context.registry.is_what_judges(line, policy_version):
        raise NotAuthorised(
            "Another version or policy judges this line, and this key may not choose; name neither, or ask for a key "
            "that allows the action 'choose' as well."
        )
