"""From a directory in the store to a version that may answer: verify, bring to the device, warm, prove.

Whatever is wrong ends as one of `service.errors`, and what was opened on the way is closed again. Nothing here knows
what is live; a version that comes out of here has answered its golden frames on this device.

All of it takes one thread, which stands back behind the event loop as runners do; the threads that a runtime begins
for its engine inherit that, so that they are as the runners whom they help. Beside lines that are served, runs are done
in gaps between those of frames, in threads that stand back behind runners: where gaps are rare, a version takes longer
to load, and no frame does. Where somebody waits for the load, its runs hardly wait for gaps: until it is done, parts of
the line that comes back have no verdict.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, load_bundle
from service.contract.golden import GoldenSet, least_contrast_of, read_golden_by_line, replay
from service.contract.signature import Trust
from service.contract.tiling import Run
from service.engines.engine import Engine, EngineOutput, LoneRun, RunBatch
from service.errors import BundleRefused, FlawlineError
from service.lines.live import LiveLine, LoadedBundle, LoadedVersion
from service.lines.policies import LinePolicies, fit_policy
from service.lines.warm_up import LoneTrial, TimedRun, at_once, run_side_by_side, warm_up
from service.observability.telemetry import Telemetry
from service.scheduling.batch_queue import Running
from service.scheduling.batcher import Batcher
from service.threads import BEHIND_FRAMES, BEHIND_THE_LOOP, begin

# Golden frames of so many are kept in memory, whole lines of them: a bundle may have thousands.
_FRAMES_TO_ASK_AGAIN = 4
# For gaps, all runs of one load together: a service that has none for so long must still get its new version.
_LONGEST_PATIENCE_S = 30.0
_PATIENCE_WHILE_AWAITED_S = 1.0
# Who begins to wait for a load that is under way does so no longer than this before it hurries.
_LOOKS_EVERY_S = 0.5

OpenEngine = Callable[[Bundle], Engine]


@dataclass(frozen=True)
class BatcherOptions:
    """How each engine is driven; see `Settings`."""

    runners: int
    max_batch_size: int
    max_queue_size: int
    stuck_after_s: float
    warm_up_limit_s: float = 120


class Loaded(NamedTuple):
    """A version that may answer.

    Attributes:
        version: as loaded.
        takes_s: how long that takes while somebody waits for it: less than it took where it gave way to frames.
    """

    version: LoadedVersion
    takes_s: float


class Loader:
    """Loads versions of bundles; blocks, and belongs into a thread.

    Args:
        directory: of the store.
        open_engine: brings a verified bundle to its device.
        options: how engines are driven.
        telemetry: counts.
        clock: monotonic seconds.
        trust: whose signature bundles must have; None does not ask for one.
    """

    def __init__(
        self,
        directory: Path,
        open_engine: OpenEngine,
        options: BatcherOptions,
        telemetry: Telemetry,
        clock: Callable[[], float],
        trust: Trust | None = None,
    ) -> None:
        self._trust = trust
        self._directory = directory
        self._open_engine = open_engine
        self._options = options
        self._telemetry = telemetry
        self._clock = clock
        self._running = Running(options.runners)
        self._policies = LinePolicies(directory, telemetry)

    def load(
        self,
        name: str,
        version: str,
        wanted: Callable[[tuple[str, ...]], tuple[str, ...]],
        *,
        gives_way: bool = False,
        is_awaited: Callable[[], bool] = lambda: False,
    ) -> Loaded:
        """Load one version.

        Args:
            name: of the bundle.
            version: of the bundle.
            wanted: says which of the bundle's lines are served here; called in another thread.
            gives_way: whether frames are answered meanwhile, which come first.
            is_awaited: says whether somebody waits for the load by now, so that its runs hardly wait for gaps; called
                in another thread, again and again.

        Raises:
            BundleRefused: if anything about it does not hold.
            EngineFailed: if the device does not take it.
        """
        in_gaps = _InGaps(self._running, self._clock, is_awaited)
        work = partial(self._load, name, version, wanted, in_gaps if gives_way else at_once(self._clock))
        began_at = self._clock()
        loaded = begin(work, name="flawline-load", niceness=BEHIND_THE_LOOP).result()
        return Loaded(loaded, self._clock() - began_at - in_gaps.given_away_s)

    def _load(
        self, name: str, version: str, wanted: Callable[[tuple[str, ...]], tuple[str, ...]], timed: TimedRun
    ) -> LoadedVersion:
        started_at = self._clock()
        bundle = load_bundle(self._directory / name / version, self._trust)
        manifest = bundle.manifest
        if (manifest.name, manifest.version) != (name, version):
            raise BundleRefused("The bundle lies under another name or version than its manifest says; move it.")
        lines = wanted(manifest.lines)
        engine = self._open_engine(bundle)
        try:
            run_times = warm_up(engine, manifest, self._options.max_batch_size, self._options.warm_up_limit_s, timed)
            if self._options.runners > 1:
                run_side_by_side(engine, manifest, run_times.max_batch_size, self._options.runners)
            known, alone, contrasts = self._prove(bundle, engine, timed)
            own = {line: fit_policy(bundle.policies[line], manifest) for line in lines}
            offered = {line: self._policies.offered(line, manifest, policy) for line, policy in own.items()}
        except BaseException:
            engine.close()
            raise
        lean = replace(bundle, model=b"", files={})  # what is asked later must not keep the weights alive twice
        proofs = tuple(partial(self._replay, lean, golden) for golden in known)
        batcher = Batcher(
            engine,
            lambda: _all(proofs, engine.run),
            lines=len(lines),
            runners=self._options.runners,
            max_queue_size=self._options.max_queue_size,
            run_times=run_times,
            stuck_after_s=self._options.stuck_after_s,
            meter=self._telemetry.engine(name),
            clock=self._clock,
            alone=alone,
            running=self._running,
        )
        self._telemetry.engine_loaded(name, self._clock() - started_at)
        loaded = LoadedBundle(manifest, bundle.digest, engine.device, engine, batcher, proofs)
        index_of = {line: index for index, line in enumerate(manifest.lines)}
        return LoadedVersion(
            loaded,
            {
                line: LiveLine(
                    name=line,
                    bundle=loaded,
                    line_index=index_of[line],
                    calibration=bundle.calibrations.get(line),
                    policies=offered[line].policies,
                    own_policy=own[line].policy.version,
                    default_policy=own[line].policy.version,
                    least_contrast=contrasts[line],
                    refusals=offered[line].refusals,
                )
                for line in lines
            },
        )

    def with_policies_of_store(self, live: LiveLine) -> LiveLine:
        """Return a line with the policies that lie in the store by now, or itself where they are the same."""
        found = self._policies.offered(live.name, live.bundle.manifest, live.policies[live.own_policy])
        was = {version: policy.digest for version, policy in live.policies.items()}
        now = {version: policy.digest for version, policy in found.policies.items()}
        if was == now and live.refusals == found.refusals:
            return live
        return replace(live, policies=found.policies, refusals=found.refusals)

    def _prove(
        self, bundle: Bundle, engine: Engine, timed: TimedRun
    ) -> tuple[list[GoldenSet], LoneRun | None, dict[str, float]]:
        """Replay the golden frames of every line.

        Returns:
            Those of a few lines, to ask again later, the engine's way for a frame that is alone, if those say that it
            may be taken, and the contrast that a frame of each line must have.
        """
        kept: list[GoldenSet] = []
        contrasts: dict[str, float] = {}
        trial = LoneTrial(engine, timed)

        def run(frames: NDArray[np.uint8], line_index: NDArray[np.int64]) -> EngineOutput:
            return timed(engine.run, frames, line_index)[0]

        for golden in read_golden_by_line(bundle):
            is_kept = sum(len(known.answers) for known in kept) < _FRAMES_TO_ASK_AGAIN
            self._replay(bundle, golden, trial.run if is_kept else run)
            contrasts[golden.answers[0].line] = least_contrast_of(bundle, golden)
            if is_kept:
                kept.append(golden)
        return kept, trial.winner(), contrasts

    def prove_again(self, version: LoadedVersion) -> None:
        """Replay golden frames on a version that is loaded already, before it becomes live once more.

        Raises:
            BundleRefused: if an answer is another one than was validated.
            EngineFailed: if the engine fails.
        """
        _all(version.bundle.proofs, version.bundle.engine.run)

    def _replay(self, bundle: Bundle, golden: GoldenSet, run: Run) -> None:
        try:
            replay(bundle, golden, run)
        except FlawlineError:
            self._telemetry.golden_failed()
            raise


class _InGaps:
    """Does runs where those of frames leave room, in a thread that stands back behind runners.

    Args:
        running: the runs of this process.
        clock: monotonic seconds.
        is_awaited: says whether somebody waits for the runs by now.
    """

    def __init__(self, running: Running, clock: Callable[[], float], is_awaited: Callable[[], bool]) -> None:
        self._running = running
        self._clock = clock
        self._is_awaited = is_awaited
        self._waited_s = 0.0

    def __call__(
        self, run: RunBatch, frames: NDArray[np.uint8], line_index: NDArray[np.int64]
    ) -> tuple[EngineOutput, float]:
        self._wait_for_gap()
        with self._running.in_gap(0.0):
            began_at = self._clock()
            # A thread for each, since a priority can't be taken back; it costs a tenth of a millisecond.
            work = partial(run, frames, line_index)
            output = begin(work, name="flawline-prove", niceness=BEHIND_FRAMES).result()
            return output, self._clock() - began_at

    @property
    def given_away_s(self) -> float:
        """How long runs have waited that would not have, had somebody waited for them."""
        return max(0.0, self._waited_s - _PATIENCE_WHILE_AWAITED_S)

    def _wait_for_gap(self) -> None:
        """Wait as long as there is patience left, which whoever comes to wait for the runs shortens."""
        is_gap = False
        while not is_gap and (left_s := self._patience_s - self._waited_s) > 0:
            asked_at = self._clock()
            is_gap = self._running.wait_for_gap(min(left_s, _LOOKS_EVERY_S))
            self._waited_s += self._clock() - asked_at

    @property
    def _patience_s(self) -> float:
        return _PATIENCE_WHILE_AWAITED_S if self._is_awaited() else _LONGEST_PATIENCE_S


def _all(proofs: Iterable[Callable[[Run], None]], run: Run) -> None:
    for proof in proofs:
        proof(run)
