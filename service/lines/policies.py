"""The policy files of lines: which of them a bundle may be judged by, read anew at every look into the store.

Three rules keep a file from passing parts that it should not:

- Thresholds are chosen by scores, so a file names the network whose scores they are (`Manifest.network`), and is
  offered for bundles of that network only. A file that names none is offered where it is as strict as the bundle's own
  policy, because then it passes nothing that this one stops, whatever its thresholds were chosen by.
- A policy's version means the same thresholds as long as the process lives: a file that was changed under the same
  name, or does not hold any more, is refused, and what was read first goes on. A correction takes a name of its own.
- A file that is gone takes its policy with it. A folder that can't be read, or a store in which nothing lies at all, is
  a fault of the volume and takes nothing.

Everything that is refused is said once, counted, and kept with its reason for whoever asks.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from service.contract.bundle import Manifest, load_policy
from service.contract.policy import Policy, PolicyFile, inspected_mask, is_as_strict, policy_digest, refuse_unfit_region
from service.errors import BundleRefused, FlawlineError
from service.lines.live import LivePolicy, PolicyRefusal
from service.observability.telemetry import Telemetry

POLICIES_DIRECTORY = "policies"

_OWN = "Its version is that of the bundle's own policy; rename it."
_MISNAMED = "A policy file is named as its version; rename it."
_CHANGED = (
    "Its file was changed, and a policy's version never changes, so it judges as it did: save the file under a new "
    "version, and remove this one."
)

_log = logging.getLogger("flawline")


class Offered(NamedTuple):
    """What a line may be judged by.

    Attributes:
        policies: by version, the bundle's own one among them.
        refusals: files that are not offered as they lie in the store, by the version that they would have.
    """

    policies: Mapping[str, LivePolicy]
    refusals: Mapping[str, PolicyRefusal]


class LinePolicies:
    """The policy files of a store's lines, `<line>/policies/<version>.json`.

    Args:
        directory: of the store.
        telemetry: counts.
    """

    def __init__(self, directory: Path, telemetry: Telemetry) -> None:
        self._directory = directory
        self._telemetry = telemetry
        self._taken: dict[tuple[str, str], PolicyFile] = {}
        self._gone: set[tuple[str, str]] = set()
        self._told: set[tuple[str, str, str]] = set()

    def offered(self, line: str, manifest: Manifest, own: LivePolicy) -> Offered:
        """Look at a line's files, and return what a bundle may judge the line by.

        Args:
            line: of the bundle.
            manifest: of the bundle.
            own: the bundle's own policy of the line.
        """
        policies, refusals = {own.policy.version: own}, {}
        for version, found in self._look(line).items():
            if found.reason is not None:
                refusals[version] = PolicyRefusal(found.reason, is_fault=True)
            if found.file is None:
                continue
            if version == own.policy.version:
                refusals[version] = PolicyRefusal(_OWN, is_fault=True)
                continue
            refusal = _why_not_for(found.file, manifest, own.policy)
            if refusal is not None:
                refusals[version] = refusal
                continue
            try:
                policies[version] = fit_policy(found.file.rules, manifest)
            except BundleRefused as error:
                refusals[version] = PolicyRefusal(error.sentence, is_fault=True)
            else:
                self._taken[line, version] = found.file
        for version, refusal in refusals.items():
            self._tell(line, version, refusal)
        return Offered(policies, refusals)

    def _look(self, line: str) -> "dict[str, _Found]":
        """Read a line's files, by their names; beside those that were offered before."""
        taken = {version: file for (of, version), file in self._taken.items() if of == line}
        paths = self._list(line)
        if paths is None:
            return {version: _Found(file, None) for version, file in taken.items() if (line, version) not in self._gone}
        self._gone |= {(line, version) for version in taken if version not in paths}
        return {version: self._read(path, line, taken.get(version)) for version, path in paths.items()}

    def _read(self, path: Path, line: str, taken: PolicyFile | None) -> "_Found":
        # What is gone does not come back in another form, either.
        before = None if (line, path.stem) in self._gone else taken
        try:
            file = load_policy(path)
        except FlawlineError as error:
            return _Found(before, error.sentence)
        if file.version != path.stem:
            return _Found(before, _MISNAMED)
        if taken is not None and file.rules != taken.rules:
            return _Found(before, _CHANGED)
        self._gone.discard((line, path.stem))
        return _Found(file, None)

    def _list(self, line: str) -> dict[str, Path] | None:
        """Return a line's files by their names; None where nobody can tell which there are."""
        try:
            if not any(self._directory.iterdir()):  # a volume that is not mounted, or is no longer
                return None
            folder = self._directory / line / POLICIES_DIRECTORY
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.name[0] != ".")
        except (FileNotFoundError, NotADirectoryError):
            return {} if self._directory.exists() else None
        except OSError as error:
            fields = {"line": line, "reason": f"Its policies can't be read: {error.strerror}; those before go on."}
            _log.error("policies can't be looked at", extra=fields)
            return None
        return {path.stem: path for path in paths}

    def _tell(self, line: str, version: str, refusal: PolicyRefusal) -> None:
        """Say why a file is refused, once: the store is looked at again and again."""
        if (line, version, refusal.reason) in self._told:
            return
        self._told.add((line, version, refusal.reason))
        if refusal.is_fault:
            self._telemetry.policy_refused(line)
        _log.log(
            logging.ERROR if refusal.is_fault else logging.INFO,
            "policy refused",
            extra={"line": line, "policy": version, "reason": refusal.reason},
        )


class _Found(NamedTuple):
    """What one file is good for.

    Attributes:
        file: to be offered: as it is now, or as it was; None where it never held.
        reason: why the file as it is now is refused, in a sentence.
    """

    file: PolicyFile | None
    reason: str | None


def _why_not_for(file: PolicyFile, manifest: Manifest, own: Policy) -> PolicyRefusal | None:
    """Say why a bundle may not be judged by a file; None where it may."""
    if file.network == manifest.network or (file.network is None and is_as_strict(file.rules, own)):
        return None
    version = f"version {manifest.version} of {manifest.name}"
    if file.network is not None:
        reason = (
            f"It was written for the scores of another network than that of {version}, which is {manifest.network}."
        )
        return PolicyRefusal(reason, is_fault=False)
    reason = (
        "It could pass what the bundle's own policy stops, and does not name the network whose scores its thresholds "
        f'were chosen by. If that is the one of {version}, add "network": "{manifest.network}" to it.'
    )
    return PolicyRefusal(reason, is_fault=True)


def fit_policy(policy: Policy, manifest: Manifest) -> LivePolicy:
    """Make a policy ready to judge maps of a bundle.

    Raises:
        BundleRefused: if it does not fit the bundle.
    """
    window = manifest.input.window(1, 1)
    inspected = inspected_mask(policy, *manifest.map_size, window=window)
    refuse_unfit_region(inspected, manifest.output.score_rule)
    return LivePolicy(policy, policy_digest(policy), inspected)
