"""How a version becomes live, in one assignment, and a line by one of its policies.

Whoever calls holds the registry's lock. A line whose chosen policy is not there is refused rather than judged by
another one.
"""

import logging
from dataclasses import replace
from typing import NamedTuple

from service.lines.ledger import named
from service.lines.live import LineCard, LineState, LineStatus, LiveLine, LoadedVersion
from service.lines.residence import ResidentVersions

_FEWER_LINES = "does not serve the line; activate a version that does, or take the line out of FLAWLINE_LINES."

_log = logging.getLogger("flawline")


class LiveVersions(ResidentVersions):
    """The versions that judge, and by which policies."""

    def _go_live(self, version: LoadedVersion) -> None:
        """Serve the lines of a loaded version by it."""
        key, state = version.key, self._state
        served, refused = self._by_their_policies(version)
        others = {line: live for line, live in state.live.items() if live.bundle.manifest.name != key.name}
        absent = {
            line: status
            for line, status in state.not_live.items()
            if line not in served and (status.bundle != key.name or line in self._taken_out)
        }
        left = {line for line, status in state.not_live.items() if status.bundle == key.name}
        left |= state.live.keys() - others.keys()
        left -= {*served, *refused, *absent}
        missing = {
            line: LineStatus(line, key.name, "refused", f"Version {key.version} of {key.name} {_FEWER_LINES}", None)
            for line in left & (self._wanted or frozenset())
        }
        self._become(replace(state, live={**others, **served}, not_live={**absent, **refused, **missing}))
        self._late &= self._state.not_live.keys()  # what was served once is missed when it is gone
        for live in served.values():
            self._keep(live)
            self._tell_of(live)
        if left:
            _log.warning("the new version serves fewer lines", extra={**named(key), "lines": sorted(left)})
        history = self._history(key.name)
        history.live = [known for known in history.live if known != key.version] + [key.version]
        history.held_back.discard(key.version)
        self._last_live.note(*key)
        shadow = self._state.shadows.get(key.name)
        if shadow is not None and shadow.key == key:
            self._end_shadow(key.name)
        self._keep_only_what_is_needed(key.name)
        _log.info("version live", extra={**named(key), "digest": version.bundle.digest})

    def _by_their_policies(self, version: LoadedVersion) -> tuple[dict[str, LiveLine], dict[str, LineStatus]]:
        """Return the lines that a version may serve, and those whose chosen policy is not there any more."""
        served: dict[str, LiveLine] = {}
        refused: dict[str, LineStatus] = {}
        for line, live in version.lines.items():
            if line in self._taken_out:
                continue
            found = self._by_its_policy(live)
            if found.default_policy == found.own_policy or found.gives_verdicts:
                served[line] = found
            else:
                refused[line] = _without_its_policy(found)
        return served, refused

    def _by_its_policy(self, live: LiveLine) -> LiveLine:
        """Return a line with the policies of the store, judged by the one that was chosen for it and this version."""
        found = self._loader.with_policies_of_store(live)
        wanted = self._choices.policy_of(live.name, *live.key) or live.own_policy
        return found if wanted == found.default_policy else replace(found, default_policy=wanted)

    def _replace_line(self, line: LiveLine) -> None:
        """Serve a line by the same version in another way."""
        self._keep(line)
        state = self._state
        not_live = {name: status for name, status in state.not_live.items() if name != line.name}
        self._state = replace(state, live={**state.live, line.name: line}, not_live=not_live)
        self._late.discard(line.name)
        self._tell_of(line)

    def _keep(self, line: LiveLine) -> None:
        """Replace a line of a version that is in memory, whether that is live, kept or in the shadow."""
        state, key = self._state, line.key
        before = state.loaded[key]
        version = replace(before, lines={**before.lines, line.name: line})
        shadows = {name: version if shadow is before else shadow for name, shadow in state.shadows.items()}
        self._state = replace(state, loaded={**state.loaded, key: version}, shadows=shadows)

    def _look_at_policies(self) -> "PoliciesSeen":
        """Offer the policies that lie in the store by now, and no others, in every version that is in memory."""
        seen = PoliciesSeen([], [], {})
        for version in list(self._state.loaded.values()):
            is_current = self._history(version.key.name).live[-1:] == [version.key.version]
            for kept in version.lines.values():
                serving = self._state.live.get(kept.name)
                is_live = serving is not None and serving.key == version.key
                found = self._loader.with_policies_of_store(kept)
                if is_current and kept.name not in self._taken_out:
                    seen.offered.extend((kept.name, name) for name in found.policies.keys() - kept.policies.keys())
                    seen.withdrawn.extend((kept.name, name) for name in kept.policies.keys() - found.policies.keys())
                    faults = {name: refusal.reason for name, refusal in found.refusals.items() if refusal.is_fault}
                    seen.refused.update({(kept.name, name): reason for name, reason in faults.items()})
                if found is kept:
                    continue
                self._keep(found)
                if is_live:
                    self._go_on_with(found)
        for line, policy in seen.withdrawn:
            _log.warning("policy withdrawn", extra={"line": line, "policy": policy})
        return PoliciesSeen(sorted(seen.offered), sorted(seen.withdrawn), seen.refused)

    def _go_on_with(self, line: LiveLine) -> None:
        """Serve a line with other policies than before, or refuse it where the one that judged is gone.

        It is not judged by another one: that could pass what this one stops.
        """
        state = self._state
        if line.default_policy in line.policies:
            self._state = replace(state, live={**state.live, line.name: line})
            return
        live = {name: serving for name, serving in state.live.items() if name != line.name}
        not_live = {**state.not_live, line.name: _without_its_policy(line)}
        self._become(replace(state, live=live, not_live=not_live))

    def _tell_of(self, live: LiveLine) -> None:
        bundle, default = live.bundle, live.policies[live.default_policy].policy
        self._telemetry.line_serves(
            live.name,
            bundle.manifest.version,
            bundle.digest,
            live.default_policy,
            bundle.device,
            live.calibration_for(default),
        )

    def _note(self, bundle: str, lines: tuple[str, ...], state: LineState, reason: str) -> None:
        for line in lines:
            self._telemetry.declare_line(line)
        cards = {line: None if state == "refused" else self._card_of(line, bundle) for line in lines}
        noted = {line: LineStatus(line, bundle, state, reason, None, card) for line, card in cards.items()}
        self._state = replace(self._state, not_live={**self._state.not_live, **noted})

    def _card_of(self, line: str, bundle: str) -> LineCard | None:
        """Return what was told of a line that is not in memory, where the same bundle is to bring it back."""
        before = self._state.not_live.get(line)
        return before.card if before is not None and before.bundle == bundle else None

    def _hold_back_newer(self, name: str, version: str) -> None:
        """Hold back what is newer than a version: also what was live and is gone from the store, if it comes back."""
        there = {*self._catalogue.readable_versions(name), *self._catalogue.absent(name)}
        there |= {*self._history(name).live, *self._gone_of(name)}
        newer = {stored for stored in there if int(stored) > int(version)}
        self._history(name).held_back |= newer


class PoliciesSeen(NamedTuple):
    """What a look at the policy files has changed for the lines that are served, as line and version.

    Attributes:
        offered: policies that were not offered before.
        withdrawn: policies that are not offered any more.
        refused: files that do not hold, with the reason.
    """

    offered: list[tuple[str, str]]
    withdrawn: list[tuple[str, str]]
    refused: dict[tuple[str, str], str]


def _without_its_policy(live: LiveLine) -> LineStatus:
    """Return how a line stands that is not judged by the policy that was chosen for it, and so by none."""
    refusal = live.refusals.get(live.default_policy)
    reason = (
        f"An administrator chose its policy {live.default_policy}, which is not there or was refused; put the file "
        f"back and load the line, or choose another policy.{'' if refusal is None else ' ' + refusal.reason}"
    )
    _log.error("line refused", extra={"line": live.name, "reason": reason})
    return LineStatus(live.name, live.key.name, "refused", reason, None)
