"""What serves and how it stands: plain data that the registry keeps and routes read. Nothing here changes anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Manifest
from service.contract.calibration import Calibration
from service.contract.policy import Policy, may_judge, scores_alike
from service.contract.tiling import Run
from service.engines.engine import Engine
from service.errors import UnknownPolicy
from service.scheduling.batcher import Batcher

# `unloaded`: nothing is wrong with the line, but its network is not in memory.
LineState = Literal["loading", "ready", "refused", "unhealthy", "unloaded"]
# `kept`: loaded, and answers whoever asks for it by its version; `stored`: in the store, and no more is known.
VersionState = Literal["live", "kept", "shadow", "loading", "refused", "stored"]

NOT_CALIBRATED = (
    "The line is not calibrated and the part has no verdict; calibrate it with good parts (flawline calibrate BUNDLE "
    "GOOD_FOLDER), or ask for a policy that says calibration: self."
)


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A bundle that passed everything and is on its device.

    Attributes:
        manifest: as verified, without what only training and reports read.
        digest: SHA-256 of the manifest.
        device: where the engine really runs.
        engine: the network; closed when nobody uses it any more.
        batcher: of its engine.
        proofs: each replays the golden frames of one line on whatever it is given to run them, and raises where an
            answer is another one than was validated; of a few lines, at least one.
    """

    manifest: Manifest
    digest: str
    device: str
    engine: Engine
    batcher: Batcher
    proofs: tuple[Callable[[Run], None], ...]

    @property
    def precision(self) -> str:
        """What the engine computes in."""
        return self.engine.precision

    @property
    def provider(self) -> str:
        """What runs the engine on its device, in the runtime's own word."""
        return self.engine.provider


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


class PolicyRefusal(NamedTuple):
    """Why a policy file of a line is not offered as it lies in the store.

    Attributes:
        reason: in a sentence.
        is_fault: whether somebody should look at the file; one of another network only waits for that.
    """

    reason: str
    is_fault: bool


@dataclass(frozen=True, eq=False)
class LiveLine:
    """A line that is served.

    Attributes:
        name: of the line.
        bundle: that serves it, with other lines where it was fitted on several.
        line_index: of the line among the bundle's.
        calibration: good-part values of the line, or None where it was not calibrated.
        policies: by version, the bundle's own one included.
        own_policy: version of that one, which the line was calibrated under.
        default_policy: version of the one that judges where the caller names none. Where it is not offered any more,
            no other one takes its place.
        least_contrast: of a frame that shows a picture of the line (`contract/pictures.py`); 0 asks for none.
        refusals: policy files that are not offered as they lie in the store, by the version that they would have.
    """

    name: str
    bundle: LoadedBundle
    line_index: int
    calibration: Calibration | None
    policies: Mapping[str, LivePolicy]
    own_policy: str
    default_policy: str
    least_contrast: float
    refusals: Mapping[str, PolicyRefusal] = field(default_factory=dict)

    @property
    def key(self) -> "VersionKey":
        """Name and version of its bundle."""
        return VersionKey(self.bundle.manifest.name, self.bundle.manifest.version)

    @property
    def gives_verdicts(self) -> bool:
        """Whether frames that name no policy may get a verdict."""
        return self.default_policy in self.policies and self.may_be_judged_by(self.policies[self.default_policy])

    def policy(self, version: str | None) -> LivePolicy:
        """Return a policy that is offered.

        Args:
            version: None takes the default one.

        Raises:
            UnknownPolicy: if it is not offered; the sentence says why, where its file is there.
        """
        asked = version or self.default_policy
        found = self.policies.get(asked)
        if found is not None:
            return found
        refusal = self.refusals.get(asked)
        if refusal is not None:
            raise UnknownPolicy(f"This policy is not offered. {refusal.reason}")
        if version is None:
            raise UnknownPolicy("The policy that was chosen for this version is gone; name another one.")
        raise UnknownPolicy("The line has no policy of this version; leave it out to take the default one.")

    @property
    def card(self) -> "LineCard":
        """What is told of it."""
        bundle = self.bundle
        return LineCard(
            self.name,
            bundle.manifest,
            bundle.digest,
            bundle.device,
            bundle.provider,
            bundle.precision,
            self.default_policy,
            self.gives_verdicts,
        )

    def may_be_judged_by(self, policy: LivePolicy) -> bool:
        """Tell whether a policy may give a verdict here: most need a calibration."""
        return may_judge(policy.policy, is_calibrated=self.calibration is not None)

    def calibration_for(self, policy: Policy) -> Calibration | None:
        """Return the calibration where it speaks of a policy's scores; None where nothing is promised of them."""
        return self.calibration if scores_alike(policy, self.policies[self.own_policy].policy) else None


@dataclass(frozen=True, eq=False)
class LineCard:
    """What is told of a line to whoever only asks; it is as true of one that made room for others and comes back.

    Attributes:
        name: of the line.
        manifest: of the bundle that serves it.
        digest: of that bundle.
        device: where its engine runs.
        provider: what runs it there.
        precision: what it computes in.
        default_policy: version of the policy that judges where the caller names none.
        gives_verdicts: whether frames that name no policy may get a verdict.
    """

    name: str
    manifest: Manifest
    digest: str
    device: str
    provider: str
    precision: str
    default_policy: str
    gives_verdicts: bool


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """One version of a bundle, on its device, with the lines that it can serve.

    Attributes:
        bundle: as loaded.
        lines: by name; only those that are wanted here.
    """

    bundle: LoadedBundle
    lines: Mapping[str, LiveLine]

    @property
    def key(self) -> "VersionKey":
        """Name and version."""
        return VersionKey(self.bundle.manifest.name, self.bundle.manifest.version)


class VersionKey(NamedTuple):
    """Which version of which bundle."""

    name: str
    version: str


class Found(NamedTuple):
    """What one request is served by."""

    line: LiveLine
    policy: LivePolicy

    def named(self) -> dict[str, str]:
        """Return the versions and digests of bundle and policy, as the log has them."""
        return {
            "bundle_version": self.line.key.version,
            "bundle_digest": self.line.bundle.digest,
            "policy_version": self.policy.policy.version,
            "policy_digest": self.policy.digest,
        }


@dataclass(frozen=True, eq=False)
class LineStatus:
    """How a line stands.

    Attributes:
        line: its name.
        bundle: name of the bundle that serves it, or means to.
        state: `ready` lines are served, others are not.
        reason: why it is not ready, or why it is and gives no verdict, in a sentence.
        live: what serves it, once it was loaded.
        card: of a line that is not in memory, what was told of it when it last was; None where that says nothing of it.
    """

    line: str
    bundle: str
    state: LineState
    reason: str | None
    live: LiveLine | None
    card: LineCard | None = None


@dataclass(frozen=True)
class VersionStatus:
    """How one version of a bundle stands.

    Attributes:
        version: its number.
        state: `live` answers, `kept` and `shadow` are loaded beside it, others are not loaded.
        reason: why it was refused, or is unhealthy, or what is to be done about it.
        lines: that it serves, or could.
        size_bytes: memory of its engine, where it is loaded.
        is_held_back: whether it becomes live only when it is asked for by name.
    """

    version: str
    state: VersionState
    reason: str | None
    lines: tuple[str, ...]
    size_bytes: int | None
    is_held_back: bool


def status_of(live: LiveLine) -> LineStatus:
    """Return how a line stands that was loaded."""
    name = live.bundle.manifest.name
    if live.bundle.batcher.is_healthy:
        return LineStatus(live.name, name, "ready", None if live.gives_verdicts else NOT_CALIBRATED, live)
    return LineStatus(live.name, name, "unhealthy", live.bundle.batcher.why_unhealthy, live)
