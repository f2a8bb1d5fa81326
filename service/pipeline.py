"""One frame's way, told in order: find the line, take a place, decode, batch and run, judge, answer.

Before: the HTTP side received the body. After: it answers, and only then records. Everything that goes wrong on the way
is raised as one of `service.errors`; whatever is raised is `NO_VERDICT`, and nothing here makes a verdict but the
policy, out of finite numbers.

On a CPU the runner that runs a frame decodes it before and judges it after, in one go: every hand-over from thread to
thread costs more than judging does, and the caches hold what was just made. On a device the runner must not be kept
from the next batch, so that decoding and judging have threads of their own, and overlap with runs.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import Frame, FrameLimits, fit_to_input, read_frame
from service.contract.geometry import InputSpec
from service.contract.pictures import refuse_blank
from service.contract.policy import Judgement, judge
from service.contract.raw_frames import decode_raw
from service.contract.regions import Window
from service.contract.tiling import answer_of, cut_tiles
from service.errors import DeadlinePassed, ParameterInvalid, UnreadableFrame
from service.inspection import HeatmapKind, Inspection, InspectionRequest, RawLayout, digest_differs
from service.lines.live import Found
from service.lines.registry import Registry
from service.scheduling.decoders import Decoders
from service.scheduling.engine_runs import RunResult
from service.scheduling.places import Place
from service.scheduling.schedule import Priority

__all__ = ["HeatmapKind", "Inspection", "InspectionRequest", "Pipeline", "RawLayout", "TellDigest"]

TellDigest = Callable[[str], None]


def _tell_nobody(_digest: str) -> None:
    pass


class Pipeline:
    """Inspects frames.

    Args:
        registry: finds what serves a line.
        limits: what a caller may send.
        default_deadline_s: from a request's arrival to its answer, where the caller names none.
        max_deadline_s: the longest that a caller may name.
        decode_workers: threads that decode and resize apart from the runners, and as many that trace regions; with 0
            the runners do both.
        stuck_after_s: a frame whose decoding takes longer costs one of these threads.
        tell_of_replaced: called for each of them that was given up for that.
        clock: monotonic seconds; the one that `received_at` was taken from.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        limits: FrameLimits,
        default_deadline_s: float,
        max_deadline_s: float,
        decode_workers: int,
        stuck_after_s: float,
        tell_of_replaced: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._clock = clock
        self._decoders: Decoders | None = None
        self._tracers: ThreadPoolExecutor | None = None
        if decode_workers:
            self._decoders = Decoders(
                decode_workers, stuck_after_s=stuck_after_s, clock=clock, tell_of_replaced=tell_of_replaced
            )
            # Apart from them, so that an answer that is nearly there does not wait behind frames that just came.
            self._tracers = ThreadPoolExecutor(decode_workers, thread_name_prefix="flawline-trace")

    def time_allowed_s(self, asked_s: float | None) -> float:
        """Return how many seconds a request may take, from its arrival to its answer.

        Args:
            asked_s: by the caller; None takes the service's default.

        Raises:
            ParameterInvalid: if that is more than callers may ask for here.
        """
        if asked_s is None:
            return self._default_deadline_s
        if not 0 < asked_s <= self._max_deadline_s:
            raise ParameterInvalid(
                f"A deadline lies between 0 and {self._max_deadline_s * 1000:g} ms here; the operator sets the longest "
                "one with FLAWLINE_MAX_DEADLINE_S."
            )
        return asked_s

    def refuse_hopeless(
        self, found: Found, received_at: float, deadline_s: float | None, priority: Priority = Priority.NORMAL
    ) -> None:
        """Refuse a frame whose body has not come yet and that could not be answered in time even if it came at once.

        Args:
            found: what would serve it.
            received_at: when its request came.
            deadline_s: after that; None takes the service's default.
            priority: of the frame.

        Raises:
            ParameterInvalid: if the deadline is out of bounds.
            MomentError: if the line has no place left, or the deadline can't be met.
        """
        deadline = received_at + self.time_allowed_s(deadline_s)
        weight = found.line.bundle.manifest.input.tile_count
        found.line.bundle.batcher.refuse_hopeless(deadline, line=found.line.name, weight=weight, priority=priority)

    @property
    def is_lost(self) -> bool:
        """Whether so many decoders never came back that only a new process helps."""
        return self._decoders is not None and self._decoders.is_lost

    async def inspect(self, request: InspectionRequest, *, tell_digest: TellDigest = _tell_nobody) -> Inspection:
        """Inspect one frame.

        Args:
            request: what is asked.
            tell_digest: as for `inspect_by`.

        Raises:
            CallerError: if the frame, or what is asked of it, does not fit.
            MomentError: if the line is not ready, has no place left, or the deadline can't be met.
            OwnError: if the engine fails.
        """
        found = self._registry.find(request.line, request.bundle_version, request.policy_version)
        return await self.inspect_by(found, request, tell_digest=tell_digest)

    async def inspect_by(
        self,
        found: Found,
        request: InspectionRequest,
        *,
        is_hopeful: bool = False,
        tell_digest: TellDigest = _tell_nobody,
    ) -> Inspection:
        """Inspect one frame by a version and a policy that were found already.

        Args:
            found: what serves it.
            request: what is asked.
            is_hopeful: whether `refuse_hopeless` has let it pass just now, with no other frame since.
            tell_digest: called with the SHA-256 of the frame's bytes once they were looked at, however the frame ends.

        Raises:
            FlawlineError: whatever `inspect` raises.
        """
        bundle, deadline_s = found.line.bundle, self.time_allowed_s(request.deadline_s)
        deadline = request.received_at + deadline_s
        reserved = bundle.batcher.place(
            deadline,
            line=found.line.name,
            weight=bundle.manifest.input.tile_count,
            priority=request.priority,
            is_hopeful=is_hopeful,
        )
        work = _Work(request, found, self._limits, self._clock)
        try:
            with reserved as place:
                if self._decoders is None:
                    seen = await bundle.batcher.run(place, work, found.line.line_index)
                else:
                    seen = await self._step_by_step(self._decoders, work, place, found, deadline)
                judged_at = self._clock()
            if judged_at > deadline:  # the process was stopped for a while, and its timers with it
                raise _deadline_passed()
        finally:
            if work.frame_digest:
                tell_digest(work.frame_digest)
        frame, canvas, result, judgement, window = seen
        return Inspection(
            inspection_id=os.urandom(16).hex(),
            request=request,
            line=found.line.name,
            bundle_version=bundle.manifest.version,
            bundle_digest=bundle.digest,
            policy_version=found.policy.policy.version,
            policy_digest=found.policy.digest,
            frame_digest=work.frame_digest,
            detector=bundle.manifest.detector,
            device=bundle.device,
            precision=bundle.precision,
            judgement=judgement,
            p_value=_p_value(judgement, found),
            review_threshold=found.policy.policy.review_threshold,
            fail_threshold=found.policy.policy.fail_threshold,
            frame=frame,
            canvas=canvas,
            anomaly_map=judgement.anomaly_map,
            window=window,
            policy=found.policy.policy,
            batch_size=result.batch_size,
            batch_number=result.batch_number,
            timings_s={
                "receive": request.receive_s,
                "decode": result.prepare_s,
                "queue": result.queue_s,
                "infer": result.infer_s,
                "postprocess": judged_at - result.ran_at,
            },
            deadline_s=deadline_s,
        )

    def close(self) -> None:
        """End the threads, without waiting for work that nobody waits for any more."""
        if self._decoders is not None:
            self._decoders.close()
        if self._tracers is not None:
            self._tracers.shutdown(wait=False, cancel_futures=True)

    async def _step_by_step(
        self, decoders: Decoders, work: "_Work", place: Place, found: Found, deadline: float
    ) -> "_Seen":
        """Decode, run and judge, each where it keeps nobody else waiting."""
        async with self._until(deadline):
            await decoders.run(found.line.name, work.prepare)
        result = await found.line.bundle.batcher.submit(place, work.prepare(), found.line.line_index)
        result = result._replace(prepare_s=work.prepare_s)
        # A good part is judged in microseconds. Stitching maps and tracing regions take up to tens of milliseconds, in
        # which the event loop could answer nobody else.
        if work.is_judged_quickly(result):
            return work.finish(result)
        async with self._until(deadline):
            return await asyncio.get_running_loop().run_in_executor(self._tracers, work.finish, result)

    @asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline - self._clock()):
                yield
        except TimeoutError as error:
            raise _deadline_passed() from error


class _Seen(NamedTuple):
    """A frame that was looked at."""

    frame: Frame
    canvas: NDArray[np.uint8]
    result: RunResult
    judgement: Judgement
    window: Window


class _Prepared(NamedTuple):
    """A frame that can be run.

    Attributes:
        frame: its size, and pixels to draw on.
        canvas: `(H, W, 3)` uint8 RGB, of the input's size.
        inputs: `(T, h, w, 3)` uint8 RGB, the canvas or tiles of it.
    """

    frame: Frame
    canvas: NDArray[np.uint8]
    inputs: NDArray[np.uint8]


class _Work:
    """What is done with one frame before and after its run, in whichever thread.

    Args:
        request: what is asked.
        found: what serves it.
        limits: what a caller may send.
        clock: monotonic seconds.

    Attributes:
        prepare_s: seconds that preparing took.
        frame_digest: SHA-256 of the frame's bytes as they came; empty before it is prepared.
    """

    def __init__(
        self, request: InspectionRequest, found: Found, limits: FrameLimits, clock: Callable[[], float]
    ) -> None:
        self.request = request
        self.prepare_s = 0.0
        self.frame_digest = ""
        self._found = found
        self._limits = limits
        self._clock = clock
        self._prepared: _Prepared | None = None

    @property
    def _spec(self) -> InputSpec:
        return self._found.line.bundle.manifest.input

    def prepare(self) -> NDArray[np.uint8]:
        """Decode the frame and make network inputs of it, once.

        Raises:
            CallerError: if it is not what was sent, can't be read, or shows no picture.
        """
        if self._prepared is None:
            began_at = self._clock()
            # Here, where it keeps nobody else waiting; after the answer, bodies would pile up in front of it. It takes
            # half a millisecond a megabyte: a thirtieth of decoding a JPEG, a third of what sensor bytes need besides.
            self.frame_digest = hashlib.sha256(self.request.data).hexdigest()
            if self.request.told_digest not in ("", self.frame_digest):
                raise digest_differs()
            if self.request.is_network_input:
                prepared = _take_as_input(self.request.data, self._spec)
            else:
                prepared = _decode_and_fit(self.request, self._spec, self._limits)
            refuse_blank(prepared.canvas, self._found.line.least_contrast)
            self._prepared = prepared
            self.prepare_s = self._clock() - began_at
        return self._prepared.inputs

    def is_judged_quickly(self, result: RunResult) -> bool:
        """Tell whether finishing takes microseconds."""
        policy = self._found.policy.policy
        if policy.calibration != "good_parts" or self._spec.tiles is not None:
            return False
        return not result.anomaly_maps[0].max() >= policy.region_threshold

    def finish(self, result: RunResult) -> _Seen:
        """Judge the frame by what the engine said.

        Raises:
            EngineFailed: if that can't be judged.
            FrameNotComparable: if the frame should be measured by itself and is flat.
        """
        if self._prepared is None:
            raise RuntimeError("a frame is prepared before it is run")
        policy, rule = self._found.policy, self._found.line.bundle.manifest.output.score_rule
        answer = answer_of(result.scores, result.anomaly_maps, self._spec, rule)
        window = self._window_of(self._prepared.frame)
        judgement = judge(float(answer.score), answer.anomaly_map, policy.policy, rule, window, policy.inspected)
        return _Seen(self._prepared.frame, self._prepared.canvas, result, judgement, window)

    def _window_of(self, frame: Frame) -> Window:
        """Return where the map lies on the original frame, in its pixels."""
        if self.request.is_network_input:
            return 0.0, 0.0, float(frame.height), float(frame.width)
        return self._spec.window(frame.height, frame.width)


def _p_value(judgement: Judgement, found: Found) -> float | None:
    """Return the score's p-value, where the line was calibrated on such scores."""
    calibration = found.line.calibration_for(found.policy.policy)
    return None if calibration is None else calibration.p_value(judgement.score)


def _deadline_passed() -> DeadlinePassed:
    return DeadlinePassed("The deadline passed before the answer was there; the part has no verdict.")


def _take_as_input(data: bytes, spec: InputSpec) -> _Prepared:
    height, width = spec.canvas_height, spec.canvas_width
    if len(data) != height * width * 3:
        raise UnreadableFrame(f"The network takes {height} x {width} RGB pixels; send as many bytes.")
    canvas = np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return _Prepared(Frame(canvas, height, width), canvas, cut_tiles(canvas, spec))


def _decode_and_fit(request: InspectionRequest, spec: InputSpec, limits: FrameLimits) -> _Prepared:
    raw = request.raw
    if raw is None:
        frame = read_frame(request.data, limits, spec)
    else:
        frame = decode_raw(request.data, raw.pixel_format, raw.width, raw.height, raw.stride, limits, spec.bit_depth)
    canvas = fit_to_input(frame.pixels, spec)
    if request.heatmap == "none":  # then nobody looks at the pixels again, and frames that wait stay small
        frame = Frame(canvas, frame.height, frame.width)
    return _Prepared(frame, canvas, cut_tiles(canvas, spec))
