"""Which line is served by what, and how that changes while frames come: nothing answers that was not proved here.

The store is `<store>/<name>/<version>/`; the newest version of each name is the live one. A line's own policies are
`<store>/<line>/policies/<version>.json`, beside the default policy that is in the bundle.

A change is prepared beside what is live, by `loading.py`, and becomes true in one assignment: a frame that was
there before is answered by what was live before, one that comes after by the new version. What is replaced is kept for
rolling back, and closed once it is too many and the last of its frames is answered.

What administrators choose is noted by `choices.py` and counts again after a restart, where it could be kept; a
file of choices that does not hold refuses every line.

While an older version is live, a newer one that does not hold changes nothing: the line goes on with what it has, and
log, metric and the list of versions tell of the refusal. A restart changes nothing in that, where a state directory
keeps which version was live before. Where nobody knows, a version that is refused at the start is not replaced by an
older one, which perhaps nobody ever wanted: a silent step back would give verdicts that nobody expects, so the line is
refused, with the sentence that says why, and the service is not ready. Whoever wants the older version removes the
newer one. Nor is it replaced while store or machine may be at fault rather than the version: it is tried again.

A version that is removed from the store is let go of at the next look, but where lines are judged by it: a hand that
slipped in a bucket takes no line out of service. That one serves on until another one is made live or its lines are
unloaded, and log, metric and the list of versions tell of it. Nobody steps back to one that is gone.

A version that somebody stepped back from, on purpose, is held back until somebody asks for it by name. A policy file
that is refused is not offered, and one that is gone is withdrawn; the line goes on with its others, but where the one
that was chosen to judge is gone, it is refused. `policies.py` says which file may judge which bundle.

What changes anything blocks and belongs into a thread; what only reads takes no lock. Looks at the store come one after
another and may take long, for the store as well as for what is loaded. What administrators and frames want does not
wait for them: it comes between two versions, or at once where nothing has to be loaded. `versions.py` says how that is
kept apart. Here is what may be asked and changed; below it lie, each knowing only those before it, what readers see
(`served.py`), what all share (`ledger.py`), which version should serve (`wanted.py`), which stay in memory
(`residence.py`), how one becomes live (`going_live.py`), how one is loaded (`versions.py`), and what comes from the
store (`store_looks.py`).
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from service.errors import (
    BundleRefused,
    LineNotCalibrated,
    StoreUnreachable,
    UnknownBundle,
    UnknownLine,
    UnknownVersion,
)
from service.lines.ledger import GONE, TAKEN_OUT, History
from service.lines.live import (
    NOT_CALIBRATED,
    LineStatus,
    LiveLine,
    LoadedVersion,
    VersionKey,
    VersionState,
    VersionStatus,
)
from service.lines.served import State
from service.lines.store_looks import StoreLooks

_log = logging.getLogger("flawline")


class Registry(StoreLooks):
    """The lines of one store; see `Ledger` for what it is made of."""

    # What callers ask.

    def versions(self, line: str) -> list[VersionStatus]:
        """Return the versions of a line's bundle, oldest first.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if that can't be told before everything is loaded.
        """
        return self.versions_of(self.status(line).bundle)

    def versions_of(self, name: str) -> list[VersionStatus]:
        """Return the versions of a bundle that are loaded or lie in the store, oldest first."""
        state = self._state
        loaded = {key.version: version for key, version in state.loaded.items() if key.name == name}
        history = self._histories.get(name, History())
        stored = self._catalogue.readable_versions(name)
        return [
            VersionStatus(
                version,
                self._version_state(VersionKey(name, version), state, history),
                self._why_version(VersionKey(name, version), loaded.get(version), history),
                self._lines_of(name, version, loaded.get(version)),
                loaded[version].bundle.engine.size_bytes if version in loaded else None,
                version in history.held_back,
            )
            for version in sorted({*stored, *loaded}, key=int)
        ]

    def names(self) -> list[str]:
        """Return the bundles that serve lines, or mean to."""
        return sorted({status.bundle for status in self.statuses()})

    def lines_of(self, name: str) -> tuple[str, ...]:
        """Return the lines that a bundle serves or means to, as far as is known without loading anything.

        Raises:
            UnknownBundle: if there is no such bundle.
        """
        lines = tuple(status.line for status in self.statuses() if status.bundle == name)
        if not lines:
            raise UnknownBundle("There is no such bundle; GET /v1/bundles lists them.")
        return lines

    @property
    def why_forgotten(self) -> str | None:
        """Why something that administrators chose would not survive a restart; None where all would."""
        return self._choices.why_forgotten

    @property
    def live_in_store(self) -> Mapping[str, bool]:
        """Whether the version that judges lies in the store, as the last look found, by bundle whose lines are served.

        Those included that made room for others.
        """
        return {key.name: key not in self._gone for key in self._in_use()}

    @property
    def is_ready(self) -> bool:
        """Whether at least one line is served, and none of those that should be is missing.

        A line that made room for others is served: a frame brings it back, and while that takes its time. One that was
        refused when it came to the store later is told of, and takes no other line down.
        """
        missed = [status for status in self.statuses() if status.line not in self._late or status.live is not None]
        # Not whether the store can be read now: what is loaded needs it no longer.
        is_whole = not self._is_loading and not self._is_unfinished
        is_served = any(status.state == "ready" or self.comes_back(status) for status in missed)
        return is_whole and is_served and {status.state for status in missed} <= {"ready", "unloaded", "loading"}

    # What administrators change: in a thread.

    def activate(self, name: str, version: str) -> None:
        """Make a version live, after it was proved; newer ones no longer become live by themselves.

        Raises:
            UnknownVersion: if the store has no such version.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            return self._stored(name, version)

        def use(loaded: LoadedVersion) -> None:
            self._go_live(loaded)
            self._hold_back_newer(name, version)
            self._choices.choose_version(name, version, self._history(name).held_back)

        with self._called_for(name, version):
            self._bring(choose, use)

    def roll_back(self, name: str) -> str:
        """Make the version live that was live before, or the next older one in the store where none was.

        What is held back is stepped over there: somebody has stepped back from it, and it takes its name.

        Returns:
            The version that is live now.

        Raises:
            UnknownVersion: if there is none.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold any more; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            before = self._before(name)
            if before is None:
                self._demand_a_readable_store()
                raise UnknownVersion("There is no version before this one.")
            return self._stored(name, before)

        def use(loaded: LoadedVersion) -> str:
            before, history = loaded.key.version, self._history(name)
            left = history.live[-1] if history.live else None
            self._go_live(loaded)
            self._hold_back_newer(name, before)
            if left is not None:
                history.live = [version for version in history.live if version not in (left, before)] + [before]
                self._keep_only_what_is_needed(name)
            self._choices.choose_version(name, before, self._history(name).held_back)
            return before

        with self._called_for(name, self._before(name)):
            return self._bring(choose, use)

    def start_shadow(self, name: str, version: str) -> None:
        """Load a version that looks at the frames of the live one and answers nobody.

        Raises:
            UnknownVersion: if the store has no such version, or it is the live one.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if it does not hold.
            EngineFailed: if the device does not take it.
            LineNotCalibrated: if it could give no verdict on any of its lines.
        """

        def choose() -> VersionKey:
            self._refuse_to_guess()
            key = self._stored(name, version)
            if self._history(name).live[-1:] == [version]:
                raise UnknownVersion("This version is live; a shadow is another one.")
            return key

        def use(shadow: LoadedVersion) -> None:
            if not any(line.gives_verdicts for line in shadow.lines.values()):
                self._keep_only_what_is_needed(name)
                raise LineNotCalibrated(NOT_CALIBRATED)
            self._state = replace(self._state, shadows={**self._state.shadows, name: shadow})
            self._keep_only_what_is_needed(name)
            _log.info("shadow on", extra={"bundle": name, "version": version})

        with self._called_for(name, version):
            self._bring(choose, use)

    def stop_shadow(self, name: str) -> None:
        """Try no version beside the live one any more."""
        with self._changing:
            self._end_shadow(name)
            self._keep_only_what_is_needed(name)

    def activate_policy(self, line: str, version: str) -> None:
        """Judge a line by another of its policies while this version of its bundle is live.

        Raises:
            UnknownLine: if there is no such line.
            UnknownPolicy: if the line has no such policy, or it was written for another network's scores.
            BundleRefused: if its file was changed since it was offered first.
            LineNotReady: if the line is not served.
            LineNotCalibrated: if the policy needs a calibration and the line has none.
        """
        with self._changing:
            self._refuse_to_guess()
            serving = self._loader.with_policies_of_store(self._loaded_line(line))
            policy = serving.policy(version)
            if version in serving.refusals and version != serving.own_policy:
                raise BundleRefused(serving.refusals[version].reason)
            if not serving.may_be_judged_by(policy):
                raise LineNotCalibrated(NOT_CALIBRATED)
            self._replace_line(replace(serving, default_policy=version))
            self._choices.choose_policy(line, *serving.key, version)

    def load_line(self, line: str) -> None:
        """Serve a line again that was unloaded; one that is served takes the newest version that may become live.

        Raises:
            UnknownLine: if the store has no such line.
            UnknownVersion: if it has not the version that an administrator chose.
            StoreUnreachable: if the store can't be read now.
            BundleRefused: if its bundle does not hold; nothing has changed then.
            EngineFailed: if the device does not take it; nothing has changed then.
        """

        def choose() -> VersionKey:
            name = self._bundle_of(line)
            live = self._history(name).live
            key = self._newer(name, asks_again=True) or (VersionKey(name, live[-1]) if live else None)
            if key is None:
                stored = self._catalogue.readable_versions(name)
                if stored and (first := self._first(name, stored)) not in stored:
                    raise UnknownVersion(self._why_chosen_is_missing(name, first))
                raise UnknownLine("There is no bundle of this line in the store.")
            return key

        def use(loaded: LoadedVersion) -> None:
            if line not in loaded.lines:
                name, version = loaded.key
                raise UnknownLine(f"Version {version} of {name} does not serve this line; activate one that does.")
            self._taken_out.discard(line)
            self._go_live(loaded)
            self._choices.load(line)

        self._refuse_to_guess()
        self._ask_store()
        self._bring(choose, use)

    def unload_line(self, line: str) -> None:
        """Serve a line no longer, until it is loaded again; its engine goes with the last line that uses it.

        Raises:
            UnknownLine: if there is no such line.
        """
        with self._changing:
            self._refuse_to_guess()
            name = self.status(line).bundle
            self._taken_out.add(line)
            self._choices.unload(line)
            state = self._state
            live = {known: serving for known, serving in state.live.items() if known != line}
            status = LineStatus(line, name, "unloaded", TAKEN_OUT, None)
            self._become(replace(state, live=live, not_live={**state.not_live, line: status}))
            if not any(serving.bundle.manifest.name == name for serving in live.values()):
                self._end_shadow(name)
                self._retire(key for key in state.loaded if key.name == name)
            _log.info("line unloaded", extra={"line": line})

    # What is meant.

    def _stored(self, name: str, version: str) -> VersionKey:
        key = VersionKey(name, version)
        stored = {*self._catalogue.readable_versions(name)} - self._catalogue.removed(name)
        if key not in self._state.loaded and version not in stored:
            self._demand_a_readable_store()
            why = self._catalogue.absent(name).get(version)
            if why is not None:
                raise StoreUnreachable(f"Version {version} could not be brought from the store. {why}")
            raise UnknownVersion("The store has no such version of this bundle.")
        return key

    def _demand_a_readable_store(self) -> None:
        """Say of nothing that it is not in the store while nobody can look.

        Raises:
            StoreUnreachable: if that is so.
        """
        if not self._catalogue.names() and self._catalogue.why_unreadable is not None:
            raise StoreUnreachable(self._catalogue.why_unreadable)

    def _loaded_line(self, line: str) -> LiveLine:
        """Return what serves a line, or would but for its policy.

        Raises:
            UnknownLine: if there is no such line.
            LineNotReady: if it is not served for another reason.
        """
        state = self._state
        if line not in state.live and line in state.not_live and line not in self._taken_out:
            name = state.not_live[line].bundle
            live = self._history(name).live
            version = state.loaded.get(VersionKey(name, live[-1])) if live else None
            if version is not None and line in version.lines:
                return version.lines[line]
        return self.serving(line, None)

    def _bundle_of(self, line: str) -> str:
        """Return the name of the bundle that serves a line, or would if it were loaded.

        Of one that the store has no longer, the one that serves the line there now, if there is one.
        """
        state = self._state
        if line in state.live:
            return state.live[line].bundle.manifest.name
        name = state.not_live[line].bundle if line in state.not_live else None
        if name is None or not (self._catalogue.readable_versions(name) or self._catalogue.absent(name)):
            name = self._catalogue.bundle_of(line) or name
        if name is None:
            self._demand_a_readable_store()
            raise UnknownLine("There is no bundle of this line in the store.")
        return name

    def _lines_of(self, name: str, version: str, loaded: LoadedVersion | None) -> tuple[str, ...]:
        if loaded is not None:
            return tuple(loaded.lines)
        return self._catalogue.lines(name, version)

    # What is told.

    def _why_version(self, key: VersionKey, loaded: LoadedVersion | None, history: History) -> str | None:
        if loaded is not None and loaded.bundle.batcher.why_unhealthy is not None:
            return loaded.bundle.batcher.why_unhealthy
        if key in self._gone:
            return GONE
        is_refused = loaded is None and key.version in history.refusals
        return history.refusals[key.version].reason if is_refused else None

    def _version_state(self, key: VersionKey, state: State, history: History) -> VersionState:
        if key in state.loaded:
            shadow = state.shadows.get(key.name)
            if any(serving.key == key for serving in state.live.values()):
                return "live"
            return "shadow" if shadow is not None and shadow.key == key else "kept"
        if key == self._loading_now:
            return "loading"
        return "refused" if key.version in history.refusals else "stored"
