"""Runs a detector's stages over the good frames: passes that observe, and descents that follow a gradient.

Comes after the split and before evaluation. Rules:

- What a step computes depends on (seed, stage, step) and on nothing else: not on the time, not on earlier draws. So a
  run that was stopped and resumed gives the same bits as one that was not.
- Several processes may fit together (`peers.py`). Each batch is then split into shares, each share draws its own noise,
  and a step's gradient and loss are the means over all of its frames. What is computed depends on the number of shares
  and not on who computes them, but for the order of sums.
- Signals are heard between two steps only, so that no checkpoint holds half an update.
- Good frames only. Nothing here knows labels.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from models.detector import Detector, GradientStage, LineConditioned, PassStage, Step
from training.data.loader import FrameSource, LineIndex
from training.fitting.batch_norms import RunningStatistics
from training.fitting.batches import orders_of, planned_iterations, taken_ahead
from training.fitting.checkpoint import (
    LossPoint,
    TrainingState,
    detector_tensors,
    load_checkpoint,
    optimiser_state,
    restore_detector,
    restore_optimiser,
    save_checkpoint,
)
from training.fitting.optimisers import build_optimiser, learning_rate_at
from training.fitting.peers import Alone, PeerLost, Peers
from training.progress import Reporter

# Between two figures of speed, so that the number can be read.
_SPEED_EVERY_S = 1.0


class FitStopped(Exception):
    """Somebody stopped the run; the sentence tells how it goes on."""


class FitFailed(Exception):
    """A stage can't go on; the sentence names it, and the step of a descent."""


class FramesRefused(Exception):
    """A look at all good frames showed that they do not serve for what was asked; the sentence says why."""


@dataclass(frozen=True)
class FitSettings:
    """How fitting runs, as far as the detector's recipe leaves it open.

    Attributes:
        seed: of the order of frames.
        pass_batch_size: frames a batch where nothing is learnt by gradient: passes and encoding.
        cache_bytes: encoded frames are computed once and kept up to this bound, else for each batch again. A resumed
            run needs the same bound to give the same bits. Each process keeps its own.
        shares: into how many parts each batch of a descent is split; each process computes equally many.
    """

    seed: int
    pass_batch_size: int = 16
    cache_bytes: int = 4 * 2**30
    shares: int = 1


@dataclass(frozen=True)
class CheckpointPlan:
    """Where and how often the run is kept.

    Attributes:
        directory: for the checkpoint's files.
        identity: digests of configuration, data and backbone weights; a checkpoint of others is refused.
        resume: go on from the checkpoint that lies there.
        every_s: seconds between two checkpoints.
        every_steps: iterations between two checkpoints, or None for time alone.
    """

    directory: Path
    identity: Mapping[str, str]
    resume: bool = False
    every_s: float = 300.0
    every_steps: int | None = None


@dataclass(frozen=True)
class FitReport:
    """What happened.

    Attributes:
        losses: all iterations of all descents, in order, those before a resumption included.
        seconds: by stage, of this process.
    """

    losses: tuple[LossPoint, ...]
    seconds: dict[str, float]


def fit(
    detector: nn.Module,
    frames: FrameSource,
    settings: FitSettings,
    reporter: Reporter,
    plan: CheckpointPlan | None = None,
    clock: Callable[[], float] = time.monotonic,
    peers: Peers | None = None,
) -> FitReport:
    """Fit a detector on good frames; it ends in eval mode, and is the same in all processes.

    Args:
        detector: on the device that shall do the work.
        frames: good frames of the detector's image size.
        settings: seed and memory.
        reporter: shows progress.
        plan: whether and where the run is kept; the first process keeps it.
        clock: seconds that only grow.
        peers: who fits together; None where this process is alone.

    Raises:
        TypeError: if the module is no detector.
        ValueError: if there are no frames, their lines are not those that the detector is conditioned on, or the
            processes can't compute equally many shares.
        FitStopped: after Ctrl-C or a termination signal, once the state is kept.
        FitFailed: if the loss is not finite, a descent can't go on, or a batch has fewer frames than shares.
        FramesRefused: if a pass refuses the frames that it saw.
        PeerLost: if another process has ended.
        CheckpointRefused: if the run shall be resumed from a checkpoint that does not fit.
    """
    if not isinstance(detector, Detector):
        raise TypeError(f"{type(detector).__name__} is no detector: it has no stages")
    if isinstance(detector, LineConditioned):
        _refuse_other_lines(detector.lines, frames.line_index)
    with _deferred_signals() as stop, _lost_for_a_reason(stop):
        run = _Run(detector, frames, settings, reporter, plan, clock, stop, Alone() if peers is None else peers)
        seconds: dict[str, float] = {}
        first = run.begin()
        for index, stage in enumerate(detector.stages()):
            if index < first:
                continue
            if len(frames) == 0:
                raise ValueError("there is no frame to fit on")
            begun = clock()
            if isinstance(stage, PassStage):
                run.observe(stage)
            else:
                run.descend(index, stage)
            run.keep(index + 1, 0)
            seconds[stage.name] = seconds.get(stage.name, 0.0) + clock() - begun
    detector.eval()
    return FitReport(tuple(run.losses), seconds)


class _Stop:
    """Whether somebody asked for an end."""

    def __init__(self) -> None:
        self.asked = False


class _Run:
    """One call of `fit`: what all stages share, and where the run stands."""

    def __init__(
        self,
        detector: nn.Module,
        frames: FrameSource,
        settings: FitSettings,
        reporter: Reporter,
        plan: CheckpointPlan | None,
        clock: Callable[[], float],
        stop: _Stop,
        peers: Peers,
    ) -> None:
        if settings.shares % peers.count:
            raise ValueError(f"{peers.count} processes can't compute equally many of {settings.shares} shares")
        self._detector = detector
        self._frames = frames
        self._settings = settings
        self._reporter = reporter
        self._plan = plan
        self._clock = clock
        self._stop = stop
        self._peers = peers
        own = settings.shares // peers.count
        self._own_shares = range(peers.number * own, (peers.number + 1) * own)
        self._device = next((t.device for t in detector.state_dict().values()), torch.device("cpu"))
        self._resumed: TrainingState | None = None
        self._kept_at_s = clock()
        self._all_end = False
        self.losses: list[LossPoint] = []

    def begin(self) -> int:
        """Restore the kept state, or keep the initial one; return the first stage to run."""
        if self._plan is None or not self._plan.resume:
            self._follow_first()
            self.keep(0, 0)
            return 0
        # All read the same checkpoint: nobody is still keeping one, or keeps the next one too early.
        self._await_all()
        state = load_checkpoint(self._plan.directory, self._plan.identity)
        self._await_all()
        restore_detector(self._detector, state.detector)
        self.losses = list(state.losses)
        self._resumed = state
        return state.stage

    def _await_all(self) -> None:
        self._peers.add_up(torch.zeros(1, device=self._device))

    def keep(self, stage: int, step: int, optimiser: Optimizer | None = None) -> None:
        """Write a checkpoint, if one is wanted."""
        if self._plan is None or self._peers.number > 0:
            return
        tensors, scalars = ({}, {}) if optimiser is None else optimiser_state(optimiser)
        state = TrainingState(stage, step, detector_tensors(self._detector), tensors, scalars, tuple(self.losses))
        save_checkpoint(self._plan.directory, state, self._plan.identity)
        self._kept_at_s = self._clock()

    def observe(self, stage: PassStage) -> None:
        """Show every frame once, in its own order; the first process does it, and the others take its result over."""
        if self._peers.number == 0:
            self._observe(stage)
        self._follow_first()

    def _observe(self, stage: PassStage) -> None:
        self._detector.eval()
        with torch.no_grad(), self._reporter.bar(stage.name, len(self._frames)) as bar:
            for order, pixels in taken_ahead(self._frames, self._in_order()):
                # Half a pass can't be kept: what was observed may lie anywhere. The checkpoint at its start stands.
                self._end_if_asked()
                stage.show(self._images(pixels), self._lines(order))
                bar.advance(len(pixels))
            try:
                stage.finish()
            except ValueError as error:
                raise FramesRefused(f"The frames do not serve for '{stage.name}': {error}.") from error

    def _follow_first(self) -> None:
        """Take over what the first process has, as a resumed run takes over what was kept."""
        if self._peers.count == 1:
            return
        is_first = self._peers.number == 0
        # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
        own = {name: value.detach().cpu().clone() for name, value in detector_tensors(self._detector).items()}
        told = self._peers.hear_first(safetensors.torch.save(own) if is_first else b"")
        if not is_first:
            restore_detector(self._detector, safetensors.torch.load(told))

    def descend(self, index: int, stage: GradientStage) -> None:
        """Follow the gradient of the stage's loss to the end of its recipe."""
        total, batch = planned_iterations(stage.recipe, len(self._frames))
        if batch < self._settings.shares:
            raise FitFailed(
                f"A batch of '{stage.name}' has {batch} frames, too few for {self._settings.shares} processes; start "
                "fewer, or give more frames and a larger batch_size."
            )
        optimiser = build_optimiser(stage.recipe, stage.parameters)
        done = 0
        if self._resumed is not None and self._resumed.stage == index and self._resumed.step > 0:
            restore_optimiser(optimiser, self._resumed)
            done = self._resumed.step
        encoded = self._encode_all(stage) if stage.encode is not None and done < total else None
        self._detector.train()
        lines = self._frames.line_index if stage.recipe.balance_lines else np.zeros(len(self._frames), np.int64)
        orders = orders_of(lines, batch, (self._settings.seed, index), range(done, total))
        with (
            _only_trainable(self._detector, stage.parameters),
            self._reporter.bar(stage.name, total, done) as bar,
            closing(self._inputs(stage, self._parts(orders), encoded)) as inputs,
        ):
            speed = _Speed(self._clock)
            for step in range(done, total):
                _set_rate(optimiser, learning_rate_at(stage.recipe, step, total))
                parts = islice(inputs, len(self._own_shares))
                terms = self._descend_once(stage, optimiser, parts, batch, (index, step))
                self.losses.append(LossPoint(stage.name, step, terms))
                bar.advance(figures={"loss": sum(terms.values()), **_parts(terms), "images/s": speed.after(batch)})
                self._keep_if_due(index, step + 1, optimiser)
        _refuse_broken(stage)

    def _parts(self, orders: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yield the frames of this process' shares of each step, one share after the other."""
        for order in orders:
            parts = np.array_split(np.asarray(order, np.int64), self._settings.shares)
            yield from (parts[share].tolist() for share in self._own_shares)

    def _descend_once(
        self,
        stage: GradientStage,
        optimiser: Optimizer,
        parts: Iterable[tuple[Tensor, Tensor]],
        batch: int,
        place: tuple[int, int],
    ) -> dict[str, float]:
        """Make one step; return the terms of its loss.

        Args:
            stage: which is under way.
            optimiser: of its parameters.
            parts: what the loss takes of each of this process' shares, and the lines that they show.
            batch: frames of all shares.
            place: index of the stage, and step.
        """
        index, step = place
        optimiser.zero_grad(set_to_none=True)
        statistics = RunningStatistics(self._detector) if self._settings.shares > 1 else None
        terms: dict[str, float] = {}
        for share, (inputs, line_index) in zip(self._own_shares, parts, strict=True):
            # For layers that draw from torch's own generator, such as dropout.
            torch.manual_seed(_seed_of(self._settings.seed, index, step, *([share] if share else [])))
            weight = len(inputs) / batch
            try:
                losses = stage.terms(inputs, line_index, Step(step, share))
            except ValueError as error:
                raise FitFailed(f"'{stage.name}' can't go on at step {step}: {error}.") from error
            loss: Tensor = torch.stack(list(losses.values())).sum() * weight
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + weight * float(value.detach())
            if statistics is not None:
                statistics.learn(weight)
        if self._peers.count > 1:
            terms = self._average(stage, statistics, terms)
        if statistics is not None:
            statistics.apply()
        _refuse_infinite(stage, step, terms)
        if stage.recipe.clip_gradient_norm is not None:
            nn.utils.clip_grad_norm_(stage.parameters, stage.recipe.clip_gradient_norm)
        optimiser.step()
        return terms

    def _average(
        self, stage: GradientStage, statistics: RunningStatistics | None, terms: dict[str, float]
    ) -> dict[str, float]:
        """Add the gradients and terms of all processes up, which are weighted already, in one message.

        It also tells whether somebody was asked to stop by then, so that all of them stop after the same step. Who is
        asked later tells it with the next step's message: the others can't know before, and would wait for it.
        """
        has_gradient = [float(parameter.grad is not None) for parameter in stage.parameters]
        told = torch.tensor([*has_gradient, *terms.values(), float(self._stop.asked)], device=self._device)
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in stage.parameters]
        learnt = [] if statistics is None else statistics.learnt
        flat = torch.cat([part.flatten() for part in (told, *gradients, *learnt)])
        self._peers.add_up(flat)

        counts, *sums = torch.split(flat, [part.numel() for part in (told, *gradients, *learnt)])
        told_by_all: list[float] = counts.tolist()
        for parameter, seen, total in zip(
            stage.parameters, told_by_all[: len(gradients)], sums[: len(gradients)], strict=True
        ):
            parameter.grad = total.view_as(parameter) if seen else None
        for mine, total in zip(learnt, sums[len(gradients) :], strict=True):
            mine.copy_(total.view_as(mine))
        *figures, asked = told_by_all[len(gradients) :]
        self._all_end = bool(asked)
        self._stop.asked = self._stop.asked or self._all_end
        return dict(zip(terms, figures, strict=True))

    def _keep_if_due(self, stage: int, step: int, optimiser: Optimizer) -> None:
        ends = self._stop.asked if self._peers.count == 1 else self._all_end
        if self._plan is not None:
            by_steps = self._plan.every_steps is not None and step % self._plan.every_steps == 0
            if ends or by_steps or self._clock() - self._kept_at_s >= self._plan.every_s:
                self.keep(stage, step, optimiser)
        if ends:
            self._end()

    def _end_if_asked(self) -> None:
        if self._stop.asked:
            self._end()

    def _end(self) -> NoReturn:
        if self._plan is None:
            raise FitStopped("Fitting was stopped and nothing was kept, because no checkpoint was wanted.")
        raise FitStopped(f"Fitting was stopped; resume from {self._plan.directory} to go on where it stood.")

    def _in_order(self) -> Iterator[Sequence[int]]:
        size = self._settings.pass_batch_size
        for start in range(0, len(self._frames), size):
            yield range(start, min(start + size, len(self._frames)))

    def _images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Turn `(B, H, W, 3)` uint8 into `(B, 3, H, W)` float32 in [0, 1] on the detector's device."""
        images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
        return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255

    def _lines(self, order: Sequence[int]) -> Tensor:
        """Return the lines of the frames of one batch, `(B,)` int64, on the detector's device."""
        return torch.from_numpy(self._frames.line_index[np.asarray(order, dtype=np.int64)]).to(self._device)

    def _encode_all(self, stage: GradientStage) -> Tensor | None:
        """Encode every frame once, `(n, ...)` on the CPU; None if that does not fit into the memory bound."""
        one = self._encode(stage, self._frames.take([0]))
        if one.numel() * one.element_size() * len(self._frames) > self._settings.cache_bytes:
            return None
        encoded = torch.empty((len(self._frames), *one.shape[1:]), dtype=one.dtype)
        begin = 0
        with self._reporter.bar(f"{stage.name}: encoding", len(self._frames)) as bar:
            for _, pixels in taken_ahead(self._frames, self._in_order()):
                # Nothing was learnt since the last checkpoint, so it stands.
                self._end_if_asked()
                encoded[begin : begin + len(pixels)] = self._encode(stage, pixels).cpu()
                begin += len(pixels)
                bar.advance(len(pixels))
        return encoded

    def _encode(self, stage: GradientStage, pixels: NDArray[np.uint8]) -> Tensor:
        images = self._images(pixels)
        if stage.encode is None:
            return images
        training = self._detector.training
        self._detector.eval()
        with torch.no_grad():
            encoded = stage.encode(images)
        self._detector.train(training)
        return encoded

    def _inputs(
        self, stage: GradientStage, orders: Iterable[Sequence[int]], encoded: Tensor | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield what the loss takes of each share of each step, `(B, ...)`, and the lines that it shows, `(B,)`."""
        if encoded is not None:
            for order in orders:
                yield encoded[torch.as_tensor(order)].to(self._device), self._lines(order)
            return
        for order, pixels in taken_ahead(self._frames, orders):
            yield self._encode(stage, pixels), self._lines(order)


def _refuse_other_lines(expected: int, line_index: LineIndex) -> None:
    found = np.unique(line_index).tolist()
    if found != list(range(expected)):
        raise ValueError(f"the detector is conditioned on the lines 0 to {expected - 1}, and the frames show {found}")


def _refuse_infinite(stage: GradientStage, step: int, terms: Mapping[str, float]) -> None:
    if not all(math.isfinite(value) for value in terms.values()):
        told = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
        raise FitFailed(
            f"The loss of '{stage.name}' is not finite at step {step} ({told}); lower the learning rate, or look at "
            "the frames."
        )


def _refuse_broken(stage: GradientStage) -> None:
    """The loss is looked at before its update, so the very last update needs a look of its own."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in stage.parameters):
        raise FitFailed(f"The last step of '{stage.name}' left values that are not finite; lower the learning rate.")


def _seed_of(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _set_rate(optimiser: Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _parts(terms: dict[str, float]) -> dict[str, float]:
    """A loss of a single term needs no list of its terms."""
    return terms if len(terms) > 1 else {}


class _Speed:
    """Images a second over the last second or more."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s = clock()
        self._images = 0
        self._value = 0.0

    def after(self, images: int) -> float:
        self._images += images
        passed_s = self._clock() - self._since_s
        if passed_s >= _SPEED_EVERY_S or self._value == 0.0:
            self._value = self._images / max(passed_s, 1e-9)
        if passed_s >= _SPEED_EVERY_S:
            self._images, self._since_s = 0, self._clock()
        return self._value


@contextmanager
def _only_trainable(detector: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Freeze all other parameters meanwhile: they stay as they are, and their gradients cost nothing."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in detector.parameters() if id(p) not in chosen and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _lost_for_a_reason(stop: _Stop) -> Iterator[None]:
    """Where somebody stopped all processes, those that wait for one that ended earlier have not failed."""
    try:
        yield
    except PeerLost as lost:
        if stop.asked:
            raise FitStopped("Fitting was stopped; the last checkpoint stands.") from lost
        raise


@contextmanager
def _deferred_signals() -> Iterator[_Stop]:
    """Note the first Ctrl-C or termination signal instead of raising it; a second Ctrl-C interrupts at once.

    Only the main thread may listen to signals; elsewhere nothing is changed.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        stop.asked = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
