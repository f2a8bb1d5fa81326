"""What readers see of the registry: which line is served by what, as one snapshot that is replaced as a whole.

Every frame asks here, so nothing here waits for anything or takes a lock.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from service.errors import (
    FlawlineError,
    LineLoading,
    LineNotCalibrated,
    LineNotReady,
    UnknownLine,
    UnknownVersion,
)
from service.lines.live import (
    NOT_CALIBRATED,
    Found,
    LineCard,
    LineStatus,
    LiveLine,
    LoadedVersion,
    VersionKey,
    status_of,
)

WHILE_LOADING_S = 5.0


@dataclass(frozen=True)
class State:
    """All that readers see; replaced as a whole.

    Attributes:
        live: what serves each line.
        not_live: why the others are not served.
        loaded: every version that is in memory and may be asked for, the live ones among them.
        shadows: by name of the bundle, the version that is tried beside the live one.
    """

    live: Mapping[str, LiveLine] = field(default_factory=dict)
    not_live: Mapping[str, LineStatus] = field(default_factory=dict)
    loaded: Mapping[VersionKey, LoadedVersion] = field(default_factory=dict)
    shadows: Mapping[str, LoadedVersion] = field(default_factory=dict)


class ServedLines(ABC):
    """The lines that are served, and why others are not.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._state = State()
        self._is_loading = True
        self._taken_out: set[str] = set()
        self._used_at: dict[VersionKey, float] = {}

    def find(self, line: str, bundle_version: str | None, policy_version: str | None) -> Found:
        """Return what serves a request.

        Args:
            line: name of the line.
            bundle_version: None takes the live one.
            policy_version: None takes the default one.

        Raises:
            UnknownLine: if there is no such line.
            UnknownVersion: if a version is asked for that is not loaded.
            UnknownPolicy: if the line has no such policy, or it was written for another network's scores.
            LineNotReady: if the line is loading, refused, unloaded or unhealthy.
            LineNotCalibrated: if the policy needs a calibration and the line has none.
        """
        live = self.serving(line, bundle_version)
        policy = live.policy(policy_version)
        if not live.may_be_judged_by(policy):
            raise LineNotCalibrated(NOT_CALIBRATED)
        return Found(live, policy)

    def serving(self, line: str, bundle_version: str | None) -> LiveLine:
        """Return what serves a frame of a line, by whatever policy; a line that made room for others is loaded for it.

        Args:
            line: name of the line.
            bundle_version: None takes the live one.

        Raises:
            UnknownLine: if there is no such line.
            UnknownVersion: if a version is asked for that is not loaded.
            LineNotReady: if the line is loading, refused, unloaded or unhealthy.
        """
        serving = self._serving(line, bundle_version, is_wanted=True)
        self._used_at[serving.key] = self._clock()
        return serving

    def look_at(self, line: str, bundle_version: str | None) -> LineCard:
        """Return what is told of a line to somebody who only looks: no use of it, and nothing is loaded for that.

        One that made room for others is as it was. Whoever waited to send a frame until something else was told would
        wait for ever, since it is a frame that brings it back.

        Args:
            line: name of the line.
            bundle_version: None takes the live one.

        Raises:
            FlawlineError: whatever `serving` raises of a line that no frame brings back.
        """
        state = self._state
        absent = None if line in state.live else state.not_live.get(line)
        card = absent.card if absent is not None and self.comes_back(absent) else None
        if card is not None and bundle_version in (None, card.manifest.version):
            return card
        return self._serving(line, bundle_version, is_wanted=False).card

    def _serving(self, line: str, bundle_version: str | None, *, is_wanted: bool) -> LiveLine:
        state = self._state
        serving = state.live.get(line)
        if serving is None:
            raise self._why_not(line, is_wanted=is_wanted)
        live_key = serving.key
        key = live_key if bundle_version is None else VersionKey(live_key.name, bundle_version)
        if key != live_key:
            version = state.loaded.get(key)
            if version is None or line not in version.lines:
                sentence = f"The line is served by version {live_key.version}, and this one is not loaded."
                raise UnknownVersion(
                    f"{sentence} Ask for that or none. `flawline admin activate` makes one live that the store has; "
                    "to ask it beside the live one, start a server of its own on a store that holds nothing newer."
                )
            serving = version.lines[line]
        if not serving.bundle.batcher.is_healthy:
            raise LineNotReady("The line is unhealthy and waits for a restart; the part has no verdict.")
        return serving

    def is_what_judges(self, line: LiveLine, policy_version: str | None) -> bool:
        """Tell whether a version of a line, with a policy, is what judges whoever names neither.

        Args:
            line: as `serving` or `find` returned it.
            policy_version: None takes the default one.
        """
        live = self._state.live.get(line.name)
        return live is not None and live.key == line.key and policy_version in (None, live.default_policy)

    def shadow_of(self, line: str, bundle_version: str, policy_version: str) -> tuple[LiveLine, LiveLine] | None:
        """Return what serves a line and what is tried beside it, for a frame that was judged.

        Args:
            line: of the frame.
            bundle_version: that judged it.
            policy_version: that judged it.

        Returns:
            None where nothing is tried, or the frame was judged in another way than others are who ask for nothing.
        """
        state = self._state
        if not state.shadows:
            return None
        live = state.live.get(line)
        shadow = None if live is None else state.shadows.get(live.key.name)
        if (
            live is None
            or shadow is None
            or (live.key.version, live.default_policy) != (bundle_version, policy_version)
        ):
            return None
        tried = shadow.lines.get(line)
        return None if tried is None or tried.bundle is live.bundle else (live, tried)

    def statuses(self) -> list[LineStatus]:
        """Return how every line stands, by name."""
        state = self._state
        lines = {**state.not_live, **{name: status_of(live) for name, live in state.live.items()}}
        return [lines[name] for name in sorted(lines)]

    def status(self, line: str) -> LineStatus:
        """Return how one line stands.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if that can't be told before everything is loaded.
        """
        state = self._state
        live = state.live.get(line)
        status = state.not_live.get(line) if live is None else status_of(live)
        if status is None:
            raise self._unknown()
        return status

    def live_versions(self) -> list[LoadedVersion]:
        """Return the version of each bundle that serves lines, where it is healthy."""
        state = self._state
        keys = {live.key for live in state.live.values() if live.bundle.batcher.is_healthy}
        return [state.loaded[key] for key in sorted(keys)]

    @property
    def is_lost(self) -> bool:
        """Whether an engine is lost for good, so that only a new process can open it again."""
        return any(live.bundle.batcher.is_lost for live in self._state.live.values())

    def _why_not(self, line: str, *, is_wanted: bool) -> FlawlineError:
        status = self._state.not_live.get(line)
        if status is None:
            return self._unknown()
        if status.state == "loading":
            wait_s = WHILE_LOADING_S if self._is_loading else self._load_takes_s(status.bundle)
            return LineLoading("The line is loading; try again in a moment.", retry_after_s=wait_s)
        if status.state == "unloaded" and line not in self._taken_out:
            return self._bring_back(status, is_wanted=is_wanted)
        state = "unloaded" if status.state == "unloaded" else "refused"
        return LineNotReady(f"The line is {state} and the part has no verdict. {status.reason}")

    def _bring_back(self, status: LineStatus, *, is_wanted: bool) -> FlawlineError:
        """Have a line loaded that made room for others, where somebody wants it, and say how long that may take."""
        if not is_wanted:
            return LineNotReady(f"The line is not in memory. {status.reason}")
        pause_s = self._pause_s(status.bundle)
        if pause_s > 0:
            return LineNotReady(f"The part has no verdict. {status.reason}", retry_after_s=pause_s)
        # Not waited for: nobody knows how long it takes, and a body would be held in memory all the while.
        self._ask_again(status.bundle)
        wait_s = self._load_takes_s(status.bundle)
        return LineLoading("The line is loaded again; try again in a moment.", retry_after_s=wait_s)

    @abstractmethod
    def comes_back(self, status: LineStatus) -> bool:
        """Tell whether a line is not in memory and would come back with its next frame, or is on its way."""

    @abstractmethod
    def _ask_again(self, name: str) -> None:
        """Have a bundle loaded that was unloaded."""

    @abstractmethod
    def _pause_s(self, name: str) -> float:
        """Return how many seconds to wait before a bundle is tried again that could not be loaded; 0 where none."""

    @abstractmethod
    def _load_takes_s(self, name: str) -> float:
        """Return how many seconds it may take, or still take, to load a bundle."""

    def _unknown(self) -> FlawlineError:
        if self._is_loading:
            return LineLoading("The line is loading; try again in a moment.", retry_after_s=WHILE_LOADING_S)
        return UnknownLine("There is no such line; GET /v1/lines lists them.")
