"""Which line is served by what: verifies bundles, proves them on the real device, and only then lets them answer.

The store is `<store>/<name>/<version>/`; the newest version of each name is the live one. A line's own policies are
`<store>/<line>/policies/<version>.json`, beside the default policy that is in the bundle.

A newest version that is refused is not replaced by an older one: a silent step back would give verdicts that nobody
expects, so the line is refused, with the sentence that says why, and the service is not ready. Whoever wants the older
version removes the newer one. A policy file that is refused is not offered; the line goes on with its others.

`load` blocks and belongs into a thread; every other function only reads, and what becomes live does so in one
assignment.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.batcher import Batcher
from service.contract.bundle import (
    LINE_NAME,
    Bundle,
    Manifest,
    load_bundle,
    load_policy,
    promised_lines,
    versions_of,
)
from service.contract.calibration import Calibration
from service.contract.golden import read_golden, replay
from service.contract.policy import Policy, inspected_mask, may_judge, refuse_unfit
from service.engines.engine import Engine
from service.errors import (
    BundleRefused,
    FlawlineError,
    LineNotCalibrated,
    LineNotReady,
    StoreUnreachable,
    UnknownLine,
    UnknownPolicy,
    UnknownVersion,
)
from service.schedule import RunTimes
from service.stores.store import Store
from service.telemetry import Telemetry

POLICIES_DIRECTORY = "policies"

_WHILE_LOADING_S = 5.0
_NOT_CALIBRATED = (
    "The line is not calibrated and the part has no verdict; calibrate it with good parts (flawline calibrate BUNDLE "
    "GOOD_FOLDER), or ask for a policy that says calibration: self."
)

LineState = Literal["loading", "ready", "refused", "unhealthy"]
OpenEngine = Callable[[Bundle], Engine]

_log = logging.getLogger("flawline")


@dataclass(frozen=True)
class BatcherOptions:
    """How each engine is driven; see `Settings`."""

    runners: int
    max_batch_size: int
    max_queue_size: int
    stuck_after_s: float


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A bundle that passed everything and is on its device.

    Attributes:
        manifest: as verified.
        digest: SHA-256 of the manifest.
        device: where the engine really runs.
        batcher: of its engine.
    """

    manifest: Manifest
    digest: str
    device: str
    batcher: Batcher


@dataclass(frozen=True, eq=False)
class LivePolicy:
    """A policy that fits its line.

    Attributes:
        policy: the rules.
        digest: SHA-256 of its canonical JSON.
        inspected: `(h, w)` bool, the region of interest on the map's grid; None where everything is inspected.
    """

    policy: Policy
    digest: str
    inspected: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class LiveLine:
    """A line that is served.

    Attributes:
        name: of the line.
        bundle: that serves it, with other lines where it was fitted on several.
        line_index: of the line among the bundle's.
        calibration: good-part values of the line, or None where it was not calibrated.
        policies: by version, the default one included.
        default_policy: version of the bundle's own policy for the line.
    """

    name: str
    bundle: LoadedBundle
    line_index: int
    calibration: Calibration | None
    policies: Mapping[str, LivePolicy]
    default_policy: str


class Found(NamedTuple):
    """What one request is served by."""

    line: LiveLine
    policy: LivePolicy


@dataclass(frozen=True, eq=False)
class LineStatus:
    """How a line stands.

    Attributes:
        line: its name.
        bundle: name of the bundle that serves it, or means to.
        state: `ready` lines are served, others are not.
        reason: why it is not ready, or why it is and gives no verdict, in a sentence.
        live: what serves it, once it was loaded.
    """

    line: str
    bundle: str
    state: LineState
    reason: str | None
    live: LiveLine | None


class Registry:
    """The lines of one store.

    Args:
        store: of bundles.
        wanted: lines that should be served; None means every one in the store.
        open_engine: brings a verified bundle to its device.
        options: how engines are driven.
        telemetry: learns which lines there are and what serves them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        wanted: frozenset[str] | None,
        open_engine: OpenEngine,
        options: BatcherOptions,
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        self._store = store.directory
        self._refresh = store.refresh
        self._wanted = wanted
        self._open_engine = open_engine
        self._options = options
        self._telemetry = telemetry
        self._clock = clock
        self._is_loading = True
        self._fault: str | None = None
        self._why_stale: str | None = None
        self._live: dict[str, LiveLine] = {}
        self._not_live: dict[str, LineStatus] = {}

    def load(self) -> None:
        """Load every wanted line of the store; whatever is wrong with a bundle refuses its lines and no others."""
        try:
            self._ask_store()
            candidates = self._scan()
            for name, version in candidates:
                self._load_or_refuse(name, version)
        except Exception:  # noqa: BLE001 - the edge of this thread: whoever asks must hear that loading has ended
            self._fault = "Loading ended early, in a way that nobody foresaw; the log says how."
            _log.exception("loading ended early")
        finally:
            self._is_loading = False

    def find(self, line: str, bundle_version: str | None, policy_version: str | None) -> Found:
        """Return what serves a request.

        Args:
            line: name of the line.
            bundle_version: None takes the live one.
            policy_version: None takes the default one.

        Raises:
            UnknownLine: if there is no such line.
            UnknownVersion: if another version than the live one is asked for.
            UnknownPolicy: if the line has no such policy.
            LineNotReady: if the line is loading, refused or unhealthy.
            LineNotCalibrated: if the policy needs a calibration and the line has none.
        """
        live = self.serving(line, bundle_version)
        policy = live.policies.get(policy_version or live.default_policy)
        if policy is None:
            raise UnknownPolicy("The line has no policy of this version; leave it out to take the default one.")
        if not may_judge(policy.policy, is_calibrated=live.calibration is not None):
            raise LineNotCalibrated(_NOT_CALIBRATED)
        return Found(live, policy)

    def serving(self, line: str, bundle_version: str | None) -> LiveLine:
        """Return what serves a line, whatever policy it is asked by.

        Args:
            line: name of the line.
            bundle_version: None takes the live one.

        Raises:
            UnknownLine: if there is no such line.
            UnknownVersion: if another version than the live one is asked for.
            LineNotReady: if the line is loading, refused or unhealthy.
        """
        live = self._live.get(line)
        if live is None:
            raise self._why_not(line)
        if not live.bundle.batcher.is_healthy:
            raise LineNotReady("The line is unhealthy and waits for a restart; the part has no verdict.")
        if bundle_version not in (None, live.bundle.manifest.version):
            raise UnknownVersion(f"The line is served by version {live.bundle.manifest.version}; ask for that or none.")
        return live

    def statuses(self) -> list[LineStatus]:
        """Return how every line stands, by name."""
        lines = {**self._not_live, **{name: _status_of(live) for name, live in self._live.items()}}
        return [lines[name] for name in sorted(lines)]

    def status(self, line: str) -> LineStatus:
        """Return how one line stands.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if that can't be told before everything is loaded.
        """
        live = self._live.get(line)
        status = self._not_live.get(line) if live is None else _status_of(live)
        if status is None:
            raise self._why_not(line)
        return status

    def versions(self, line: str) -> list[str]:
        """Return the versions of a line's bundle that lie in the store, oldest first.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if that can't be told before everything is loaded.
        """
        return versions_of(self._store / self.status(line).bundle)

    @property
    def why_empty(self) -> str:
        """Why no line is served, where none is even known."""
        return self._why_stale or self._fault or "No line is loaded; the store may be empty."

    @property
    def is_ready(self) -> bool:
        """Whether at least one line is served, and none of those that should be is missing."""
        return (
            not self._is_loading
            and self._fault is None
            and bool(self._live)
            and all(s.state == "ready" for s in self.statuses())
        )

    async def drain(self) -> None:
        """Admit nothing more, and return when all that was admitted is answered."""
        batchers = self._batchers()
        for batcher in batchers:
            batcher.stop_admitting()
        for batcher in batchers:
            await batcher.drain()

    def close(self) -> None:
        """End every runner; to be called where the event loop runs."""
        for batcher in self._batchers():
            batcher.close()

    def _ask_store(self) -> None:
        """Have the store bring what is new; where it can't be asked, what it brought before is served."""
        try:
            self._refresh()
        except StoreUnreachable as error:
            self._why_stale = error.sentence
            _log.exception("the store can't be asked")
        else:
            self._why_stale = None

    def _scan(self) -> list[tuple[str, str]]:
        """Find the newest version of each name, and say that its lines are loading."""
        candidates = []
        for name in self._names():
            try:
                versions = versions_of(self._store / name)
            except OSError as error:
                _log.exception("a folder of the store can't be read", extra={"bundle": name})
                self._note(name, self._wanted_of((name,)), "refused", f"Its folder can't be read: {error.strerror}.")
                continue
            lines = self._wanted_of(promised_lines(self._store / name / versions[-1], name)) if versions else ()
            if lines:
                candidates.append((name, versions[-1]))
                self._note(name, lines, "loading", "The line is loading; try again in a moment.")
        for missing in (self._wanted or frozenset()) - self._not_live.keys():
            self._note(missing, (missing,), "refused", "There is no bundle of this line in the store.")
        return candidates

    def _names(self) -> list[str]:
        """List what may be names of bundles; a volume has folders of its own, which may not even be looked into."""
        try:
            return sorted(entry.name for entry in self._store.iterdir() if re.fullmatch(LINE_NAME, entry.name))
        except OSError as error:
            self._fault = f"The store can't be read: {error.strerror}."
            _log.exception("the store can't be read", extra={"store": str(self._store)})
            return []

    def _wanted_of(self, lines: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(line for line in lines if self._wanted is None or line in self._wanted)

    def _note(self, bundle: str, lines: tuple[str, ...], state: LineState, reason: str) -> None:
        for line in lines:
            self._telemetry.declare_line(line)
        self._not_live = {**self._not_live, **{line: LineStatus(line, bundle, state, reason, None) for line in lines}}

    def _load_or_refuse(self, name: str, version: str) -> None:
        path = self._store / name / version
        try:
            self._load_one(name, version)
        except FlawlineError as error:
            reason = error.sentence
        except Exception:  # noqa: BLE001 - the edge: one bundle's fault must not keep the others from loading
            _log.exception("loading failed", extra={"bundle": name, "version": version})
            reason = "Loading failed in a way that nobody foresaw; the log says how."
        else:
            return
        _log.error("bundle refused", extra={"bundle": name, "version": version, "reason": reason})
        promised = self._wanted_of(promised_lines(path, name))
        not_served = tuple(line for line in promised if line not in self._live)
        self._note(name, not_served, "refused", f"Version {version}: {reason}")

    def _load_one(self, name: str, version: str) -> None:
        """Verify, bring to the device, warm, prove, and only then make live."""
        started_at = self._clock()
        bundle = load_bundle(self._store / name / version)
        manifest = bundle.manifest
        if (manifest.name, manifest.version) != (name, version):
            raise BundleRefused("The bundle lies under another name or version than its manifest says; move it.")
        taken = [line for line in manifest.lines if line in self._live]
        if taken:
            raise BundleRefused(f"{self._live[taken[0]].bundle.manifest.name} serves {taken[0]} already; remove one.")
        engine = self._open_engine(bundle)
        run_times = _warm(engine, manifest, self._options.max_batch_size, self._clock)
        probe = self._prove(bundle, engine)
        wanted = self._wanted_of(manifest.lines)
        policies = {line: self._policies_of(line, bundle) for line in wanted}
        batcher = Batcher(
            engine,
            probe,
            runners=self._options.runners,
            max_queue_size=self._options.max_queue_size,
            run_times=run_times,
            stuck_after_s=self._options.stuck_after_s,
            meter=self._telemetry.engine(name),
            clock=self._clock,
        )
        loaded = LoadedBundle(manifest, bundle.digest, engine.device, batcher)
        lines = {
            line: LiveLine(
                name=line,
                bundle=loaded,
                line_index=manifest.lines.index(line),
                calibration=bundle.calibrations.get(line),
                policies=policies[line],
                default_policy=bundle.policies[line].version,
            )
            for line in wanted
        }
        for line, serving in lines.items():
            self._telemetry.declare_line(line)
            self._telemetry.line_serves(
                line, version, bundle.digest, serving.default_policy, engine.device, serving.calibration
            )
        self._telemetry.engine_loaded(name, self._clock() - started_at)
        self._live = {**self._live, **lines}
        self._not_live = {line: status for line, status in self._not_live.items() if line not in lines}

    def _prove(self, bundle: Bundle, engine: Engine) -> Callable[[], None]:
        """Replay the golden frames, and return what replays them again."""
        golden = read_golden(bundle)
        lean = replace(bundle, model=b"", files={})  # what is replayed later must not keep the weights alive twice

        def probe() -> None:
            try:
                replay(lean, golden, engine.run)
            except FlawlineError:
                self._telemetry.golden_failed()
                raise

        probe()
        return probe

    def _policies_of(self, line: str, bundle: Bundle) -> dict[str, LivePolicy]:
        default = _fit_policy(bundle.policies[line], bundle.manifest)
        policies = {default.policy.version: default}
        for path in sorted((self._store / line / POLICIES_DIRECTORY).glob("*.json")):
            try:
                policy = load_policy(path)
                if policy.version != path.stem or policy.version in policies:
                    raise BundleRefused("A policy is named as its version, and the default one's is taken; rename it.")
                policies[policy.version] = _fit_policy(policy, bundle.manifest)
            except FlawlineError as error:
                _log.error("policy refused", extra={"line": line, "policy": path.stem, "reason": error.sentence})
        return policies

    def _why_not(self, line: str) -> FlawlineError:
        status = self._not_live.get(line)
        if status is None and not self._is_loading:
            return UnknownLine("There is no such line; GET /v1/lines lists them.")
        if status is None or status.state == "loading":
            return LineNotReady("The line is loading; try again in a moment.", retry_after_s=_WHILE_LOADING_S)
        return LineNotReady(f"The line is refused and the part has no verdict. {status.reason}")

    def _batchers(self) -> list[Batcher]:
        return list({id(live.bundle): live.bundle.batcher for live in self._live.values()}.values())


def policy_digest(policy: Policy) -> str:
    """Return the SHA-256 of a policy's canonical JSON."""
    text = json.dumps(policy.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _status_of(live: LiveLine) -> LineStatus:
    if live.bundle.batcher.is_healthy:
        default = live.policies[live.default_policy].policy
        judges = may_judge(default, is_calibrated=live.calibration is not None)
        return LineStatus(live.name, live.bundle.manifest.name, "ready", None if judges else _NOT_CALIBRATED, live)
    return LineStatus(
        live.name, live.bundle.manifest.name, "unhealthy", "The engine is lost; start the service again.", live
    )


def _warm(engine: Engine, manifest: Manifest, max_batch_size: int, clock: Callable[[], float]) -> RunTimes:
    """Run every batch size that may occur, and learn from the second run, since the first one also allocates."""
    run_times = RunTimes.unknown(max_batch_size)
    for size in range(1, max_batch_size + 1):
        frames = np.zeros((size, manifest.input.height, manifest.input.width, 3), np.uint8)
        line_index = np.zeros(size, np.int64)
        engine.run(frames, line_index)
        started_at = clock()
        engine.run(frames, line_index)
        run_times = run_times.learn(size, clock() - started_at)
    return run_times


def _fit_policy(policy: Policy, manifest: Manifest) -> LivePolicy:
    output = manifest.output
    refuse_unfit(policy, output.score_rule)
    window = manifest.input.window(1, 1)
    inspected = inspected_mask(policy, output.map_height, output.map_width, window=window)
    return LivePolicy(policy, policy_digest(policy), inspected)
