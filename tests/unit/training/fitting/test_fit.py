"""Promises of fitting: stages in order, the same bits after a resumption, and clear ends."""

import dataclasses
import math
import signal
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.detector import AnomalyOutput, GradientStage, PassStage, Recipe
from training.data.loader import MemoryFrames
from training.faults import CALLERS
from training.fitting.checkpoint import CheckpointRefused, load_checkpoint
from training.fitting.fit import CheckpointPlan, FitFailed, FitSettings, FitStopped, FramesRefused, fit
from training.fitting.optimisers import learning_rate_at
from training.fitting.peers import Alone, PeerLost
from training.progress import SilentReporter

_RECIPE = Recipe("adamw", 1e-2, 1e-3, 1e-4, batch_size=4, epochs=3, warmup_iterations=2, clip_gradient_norm=0.5)
_IDENTITY = {"config": "c", "backbone": "b"}


class _TinyDetector(nn.Module):
    """A pass, a descent on encoded frames with dropout, a pass, and a descent on images.

    `at` calls a function when the loss of the first descent is asked for a step.
    """

    def __init__(self, recipe=_RECIPE, at=None, encode=True):
        super().__init__()
        torch.manual_seed(0)
        self.image_size = (4, 4)
        self.backbone = nn.Linear(3, 6)
        self.student = nn.Linear(6, 6)
        self.head = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("spread", torch.zeros(()))
        self.recipe, self.at, self.with_encode = recipe, at or {}, encode
        self.told = []
        self._sum, self._count = torch.zeros(3), 0

    def stages(self):
        parameters = list(self.student.parameters())
        return [
            PassStage("mean", self._observe, self._finish),
            GradientStage("student", self._loss, parameters, self.recipe, self._encode if self.with_encode else None),
            PassStage("spread", lambda images: self.spread.add_(self(images).score.sum()), lambda: None),
            GradientStage("head", self._head_loss, list(self.head.parameters()), _RECIPE),
        ]

    def forward(self, images: Tensor) -> AnomalyOutput:
        features = self._encode(images)
        distance = (self.student(features) - features).square().sum(-1)
        return AnomalyOutput(distance, distance.flatten(1).amax(1))

    def _observe(self, images):
        self.told.append(("mean", self.training, len(images)))
        self._sum, self._count = self._sum + images.sum((0, 2, 3)), self._count + images.shape[0] * 16

    def _finish(self):
        self.mean.copy_(self._sum / self._count)

    def _encode(self, images):
        self.told.append(("encode", self.training, len(images)))
        return self.backbone(images.permute(0, 2, 3, 1) - self.mean)

    def _loss(self, inputs, step):
        self.told.append(("loss", self.training, len(inputs)))
        self.at.get(step, lambda: None)()
        features = inputs if self.with_encode else self._encode(inputs)
        loss = (self.student(functional.dropout(features)) - features).square().mean()
        return {"distance": loss, "size": 0.1 * loss.sqrt()}

    def _head_loss(self, images, step):  # noqa: ARG002 -- the shape of a loss
        return {"fit": (self.head(images.mean((2, 3))) - 1).square().mean()}


class _LineDetector(_TinyDetector):
    """A mean of each line, and a descent towards it; tells which lines it was shown."""

    def __init__(self, lines=2, recipe=_RECIPE, at=None, encode=True):
        super().__init__(recipe, at, encode)
        self.lines = lines
        self.register_buffer("means", torch.zeros(lines, 3))
        self.seen = []

    def stages(self):
        encode = self._encode if self.with_encode else None
        return [
            PassStage("means", None, lambda: None, self._observe_lines),
            GradientStage("student", None, list(self.student.parameters()), self.recipe, encode, self._line_loss),
        ]

    def forward(self, images, line_index=None):  # noqa: ARG002 -- the shape of a line-conditioned detector
        return super().forward(images)

    def _observe_lines(self, images, line_index):
        self.means.index_add_(0, line_index, images.mean((2, 3)))

    def _line_loss(self, inputs, line_index, step):
        self.seen.append(line_index.tolist())
        wanted = self.means[line_index].repeat(1, 2)[:, None, None]
        terms = super()._loss(inputs, step)
        features = inputs if self.with_encode else self._encode(inputs)
        return {**terms, "line": (self.student(features) - wanted).square().mean()}


def _frames(count=10):
    return MemoryFrames(np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))


def _fit(detector, plan=None, frames=None, **settings):
    values = {"seed": 5, "pass_batch_size": 3} | settings
    return fit(detector, _frames() if frames is None else frames, FitSettings(**values), SilentReporter(), plan)


def _same(first, second):
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def _interrupt():
    signal.raise_signal(signal.SIGINT)


def test_fit_runs_the_stages_in_order_and_ends_in_eval_mode():
    """Passes see every frame once, descents every step of their recipe, and the detector is ready to judge."""
    detector = _TinyDetector()

    report = _fit(detector)

    assert [size for name, _, size in detector.told if name == "mean"] == [3, 3, 3, 1]
    assert [(p.stage, p.step) for p in report.losses] == [
        *(("student", step) for step in range(6)),
        *(("head", step) for step in range(6)),
    ]
    assert list(report.seconds) == ["mean", "student", "spread", "head"]
    assert not detector.training


def test_fit_observes_and_encodes_in_eval_mode_and_descends_in_train_mode():
    """Only losses see the detector in train mode."""
    detector = _TinyDetector()

    _fit(detector)

    assert {(name, training) for name, training, _ in detector.told} == {
        ("mean", False),
        ("encode", False),
        ("loss", True),
    }


def test_fit_gives_passes_the_mean_of_all_frames_in_zero_to_one():
    """Frames arrive as float32 in [0, 1], channels first."""
    detector, frames = _TinyDetector(), _frames()

    _fit(detector, frames=frames)

    expected = frames.take(range(10)).reshape(-1, 3).mean(0) / 255
    assert detector.mean.numpy() == pytest.approx(expected, abs=1e-6)


def test_fit_changes_the_parameters_of_its_stages_only():
    """Parameters outside of a stage stay as they are, and stay trainable."""
    detector, untouched = _TinyDetector(), _TinyDetector()

    _fit(detector)

    assert torch.equal(detector.backbone.weight, untouched.backbone.weight)
    assert not torch.equal(detector.student.weight, untouched.student.weight)
    assert not torch.equal(detector.head.weight, untouched.head.weight)
    assert all(parameter.requires_grad for parameter in detector.parameters())


def test_fit_lowers_the_loss():
    """Following the gradient helps."""
    detector = _TinyDetector(dataclasses.replace(_RECIPE, epochs=40))

    report = _fit(detector)

    total = [sum(p.terms.values()) for p in report.losses if p.stage == "student"]
    assert np.mean(total[-8:]) < 0.7 * np.mean(total[:8])


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_fit_makes_the_steps_of_its_recipe(clip):
    """Rates rise and fall, and gradients are cut, as in a plain loop over the recipe (atol: the order of frames)."""
    recipe = dataclasses.replace(
        Recipe("sgd", 0.5, 0.05, 0.0, batch_size=10, iterations=6, warmup_iterations=3),
        betas=(0.0, 0.0),  # no momentum
        clip_gradient_norm=clip,
    )

    class Head(_TinyDetector):
        def stages(self):
            return [GradientStage("head", self._head_loss, list(self.head.parameters()), recipe)]

    fitted, plain = Head(), Head()
    _fit(fitted)

    images = torch.from_numpy(_frames().take(range(10))).permute(0, 3, 1, 2) / 255
    weights = list(plain.head.parameters())
    for step in range(6):
        for weight in weights:
            weight.grad = None
        plain._head_loss(images, step)["fit"].backward()
        norm = torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt()
        with torch.no_grad():
            for weight in weights:
                share = 1.0 if clip is None else min(1.0, clip / float(norm))
                weight.sub_(learning_rate_at(recipe, step, 6) * share * weight.grad)
    for one, other in zip(fitted.head.parameters(), weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_fit_twice_with_the_same_seed_gives_the_same_bits_and_with_another_seed_others():
    """The seed decides, and nothing that happened before."""
    detectors = [_TinyDetector() for _ in range(3)]

    for detector, seed in zip(detectors, (5, 5, 6), strict=True):
        torch.manual_seed(id(detector))
        _fit(detector, seed=seed)

    assert _same(detectors[0], detectors[1])
    assert not _same(detectors[0], detectors[2])


def test_fit_without_room_for_encoded_frames_encodes_each_batch():
    """Over the memory bound frames are encoded on the fly, and the result is the same up to rounding."""
    kept, fresh = _TinyDetector(), _TinyDetector()

    _fit(kept)
    _fit(fresh, cache_bytes=0)

    encoded = [sum(name == "encode" for name, _, _ in detector.told) for detector in (kept, fresh)]
    assert encoded[1] > encoded[0]
    # float32 products of another batch size may round differently
    assert torch.allclose(kept.student.weight, fresh.student.weight, atol=1e-5)


def test_fit_without_encode_gives_images_to_the_loss():
    """A stage without a frozen front gets the images themselves."""
    detector = _TinyDetector(encode=False)

    report = _fit(detector)

    assert len(report.losses) == 12


@pytest.mark.parametrize("step", [0, 1, 5], ids=["first step", "in between", "last step"])
@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["on the fly", "cached"])
@pytest.mark.parametrize("optimiser", ["stable_adamw", "adamw", "adam", "sgd"])
def test_fit_resumed_after_ctrl_c_gives_the_same_bits_as_one_that_ran_through(tmp_path, step, cache_bytes, optimiser):
    """Stopping at any step and resuming in a fresh process' detector changes nothing, history included."""
    recipe = dataclasses.replace(_RECIPE, optimiser=optimiser, amsgrad=True)
    through = _TinyDetector(recipe)
    expected = _fit(through, cache_bytes=cache_bytes)
    plan = CheckpointPlan(tmp_path, _IDENTITY)

    with pytest.raises(FitStopped, match="resume from"):
        _fit(_TinyDetector(recipe, at={step: _interrupt}), plan, cache_bytes=cache_bytes)
    resumed = _TinyDetector(recipe)
    report = _fit(resumed, dataclasses.replace(plan, resume=True), cache_bytes=cache_bytes)

    assert _same(through, resumed)
    assert report.losses == expected.losses
    assert [sum(name == "mean" for name, _, _ in resumed.told)] == [0]


def test_fit_killed_between_two_checkpoints_resumes_at_the_last_one(tmp_path):
    """A crash loses the steps since the last checkpoint and nothing else."""

    def crash():
        raise OSError

    through = _TinyDetector()
    _fit(through)
    plan = CheckpointPlan(tmp_path, _IDENTITY, every_steps=2)

    with pytest.raises(OSError):  # noqa: PT011 -- the crash of this test
        _fit(_TinyDetector(at={5: crash}), plan)
    kept = load_checkpoint(tmp_path, _IDENTITY)
    resumed = _TinyDetector()
    _fit(resumed, dataclasses.replace(plan, resume=True))

    assert (kept.stage, kept.step) == (1, 4)
    assert _same(through, resumed)


def test_fit_stopped_in_a_pass_repeats_the_pass(tmp_path):
    """Half a pass is not kept; the resumed run observes every frame once."""
    through, stopped, resumed = _TinyDetector(), _TinyDetector(), _TinyDetector()
    _fit(through)
    observe = stopped._observe
    stopped._observe = lambda images: (observe(images), _interrupt())
    plan = CheckpointPlan(tmp_path, _IDENTITY)

    with pytest.raises(FitStopped):
        _fit(stopped, plan)
    _fit(resumed, dataclasses.replace(plan, resume=True))

    assert _same(through, resumed)


def test_fit_resumed_after_its_end_only_restores(tmp_path):
    """A finished run is not run again."""
    done, resumed = _TinyDetector(), _TinyDetector()
    plan = CheckpointPlan(tmp_path, _IDENTITY)
    expected = _fit(done, plan)

    report = _fit(resumed, dataclasses.replace(plan, resume=True))

    assert _same(done, resumed)
    assert report.losses == expected.losses
    assert resumed.told == []


def test_fit_keeps_the_run_every_so_many_seconds(tmp_path):
    """With a clock of a minute a call, each step is kept."""
    minutes = iter(range(0, 10**6, 60))
    kept = []
    look = {step: lambda: kept.append(load_checkpoint(tmp_path, _IDENTITY).step) for step in range(6)}
    plan = CheckpointPlan(tmp_path, _IDENTITY, every_s=60)

    fit(
        _TinyDetector(at=look),
        _frames(),
        FitSettings(5),
        SilentReporter(),
        plan,
        lambda: float(next(minutes)),
    )

    assert kept == [0, 1, 2, 3, 4, 5]


def test_fit_with_a_checkpoint_of_another_run_is_refused(tmp_path):
    """A resumed run must have the same configuration, data and backbone."""
    _fit(_TinyDetector(), CheckpointPlan(tmp_path, _IDENTITY))

    with pytest.raises(CheckpointRefused, match="another config"):
        _fit(_TinyDetector(), CheckpointPlan(tmp_path, {"config": "x", "backbone": "b"}, resume=True))


def test_fit_stopped_without_a_plan_says_that_nothing_was_kept():
    """Without a directory Ctrl-C still ends between two steps, with a sentence."""
    with pytest.raises(FitStopped, match="nothing was kept"):
        _fit(_TinyDetector(at={2: _interrupt}))


def test_fit_with_a_second_ctrl_c_ends_at_once():
    """Who presses twice does not want to wait; the handlers are put back."""
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _fit(_TinyDetector(at={2: lambda: (_interrupt(), _interrupt())}))

    assert signal.getsignal(signal.SIGINT) is before


def test_fit_outside_of_the_main_thread_works_without_signals():
    """A thread can't listen to signals and fits all the same."""
    reports = []
    thread = threading.Thread(target=lambda: reports.append(_fit(_TinyDetector())))

    thread.start()
    thread.join(60)

    assert len(reports[0].losses) == 12


def test_fit_with_a_loss_that_is_not_finite_names_the_step():
    """Not-a-number ends the run where it appears."""
    detector = _TinyDetector()

    def spoil():
        with torch.no_grad():
            detector.student.weight.fill_(math.nan)

    detector.at = {3: spoil}

    with pytest.raises(FitFailed, match=r"'student' is not finite at step 3 \(distance = nan"):
        _fit(detector)


def test_fit_when_a_pass_refuses_the_frames_then_names_it_and_its_reason():
    """What only a look at the frames can tell is told before any descent, as a fault that the caller can mend."""

    class Choosy(_TinyDetector):
        def _finish(self):
            raise ValueError("ten frames are too few")

    with pytest.raises(FramesRefused, match=r"'mean': ten frames are too few\."):
        _fit(Choosy())
    assert FramesRefused in CALLERS


def test_fit_when_a_loss_refuses_what_it_is_given_then_names_the_stage_its_step_and_the_reason():
    """What a detector says in words ends the run in a sentence, as in a pass."""

    class Choosy(_TinyDetector):
        def _loss(self, inputs, step):
            if step == 2:
                raise ValueError("no defect has this area")
            return super()._loss(inputs, step)

    with pytest.raises(FitFailed, match=r"'student' can't go on at step 2: no defect has this area\."):
        _fit(Choosy())


def test_fit_whose_last_step_breaks_the_parameters_fails():
    """The last update has no loss after it and is looked at by itself."""
    recipe = Recipe("sgd", 1e38, 1e38, 0.0, batch_size=4, betas=(0.0, 0.0), iterations=1)

    class _Steep(_TinyDetector):
        def _loss(self, inputs, step):
            return {"steep": 1e30 * super()._loss(inputs, step)["distance"]}

    with pytest.raises(FitFailed, match="last step of 'student'"):
        _fit(_Steep(recipe))


def test_fit_of_fewer_frames_than_a_batch_uses_them_all():
    """The only batch is not dropped for being incomplete."""
    detector = _TinyDetector()

    report = _fit(detector, frames=_frames(3))

    assert len([p for p in report.losses if p.stage == "student"]) == 3
    assert {size for name, _, size in detector.told if name == "loss"} == {3}


def _frames_of_lines(line_index):
    pixels = np.random.default_rng(2).integers(0, 256, (len(line_index), 4, 4, 3), dtype=np.uint8)
    return MemoryFrames(pixels, line_index)


@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["on the fly", "cached"])
def test_fit_tells_a_line_conditioned_detector_which_line_each_frame_shows(cache_bytes):
    """The pass sums each line's own frames, and every loss gets the lines of the very frames that it gets."""
    lines = [0, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    frames = _frames_of_lines(lines)
    detector = _LineDetector()
    told = []

    def note(inputs, line_index, step):
        told.extend(zip(inputs.flatten(1).tolist(), line_index.tolist(), strict=True))
        return {"none": 0 * detector.student(inputs).sum() + step}

    detector._line_loss = note
    _fit(detector, frames=frames, cache_bytes=cache_bytes)

    pixels = torch.from_numpy(frames.take(range(10)) / 255).float().permute(0, 3, 1, 2)
    expected = [pixels[[i for i, line in enumerate(lines) if line == which]].mean((2, 3)).sum(0) for which in (0, 1)]
    torch.testing.assert_close(detector.means, torch.stack(expected))
    encoded = detector._encode(pixels).flatten(1).detach()
    for inputs, line in told:
        assert line == lines[int((encoded - torch.tensor(inputs)).abs().sum(1).argmin())]


def test_fit_with_balanced_lines_shows_every_line_equally_often():
    """A short line begins again within the epoch, so that a long one does not drown it; every batch is mixed."""
    detector = _LineDetector(recipe=dataclasses.replace(_RECIPE, balance_lines=True))

    _fit(detector, frames=_frames_of_lines([0, 0, 0] + [1] * 13))

    assert len(detector.seen) == 12
    assert all(sorted(batch) == [0, 0, 1, 1] for batch in detector.seen)


def test_fit_without_balanced_lines_shows_every_frame_once_an_epoch():
    """Without the wish a line is shown as often as it has frames."""
    detector = _LineDetector()

    _fit(detector, frames=_frames_of_lines([0, 0, 0] + [1] * 13))

    shown = [line for batch in detector.seen for line in batch]
    assert shown.count(0) == 3 * 3
    assert shown.count(1) == 3 * 13


@pytest.mark.parametrize("step", [0, 2, 5], ids=["first step", "in between", "last step"])
@pytest.mark.parametrize("balance_lines", [False, True], ids=["as they are", "balanced"])
def test_fit_of_several_lines_resumed_gives_the_same_bits(tmp_path, step, balance_lines):
    """The order of frames and their lines depend on the seed and the epoch alone."""
    recipe = dataclasses.replace(_RECIPE, balance_lines=balance_lines)
    frames = _frames_of_lines([0] * 3 + [1] * 7)
    through = _LineDetector(recipe=recipe)
    expected = _fit(through, frames=frames)
    plan = CheckpointPlan(tmp_path, _IDENTITY)

    with pytest.raises(FitStopped):
        _fit(_LineDetector(recipe=recipe, at={step: _interrupt}), plan, frames)
    resumed = _LineDetector(recipe=recipe)
    report = _fit(resumed, dataclasses.replace(plan, resume=True), frames)

    assert _same(through, resumed)
    assert report.losses == expected.losses
    assert resumed.seen == through.seen[step + 1 :]


@pytest.mark.parametrize("lines", [1, 3], ids=["an unknown line", "a line without frames"])
def test_fit_when_the_lines_are_not_the_detectors_then_is_refused(lines):
    """A detector that is conditioned on its lines is fitted on all of them, and on no other."""
    with pytest.raises(ValueError, match=r"lines 0 to .* show \[0, 1\]"):
        _fit(_LineDetector(lines), frames=_frames_of_lines([0, 1, 1]))


def test_fit_without_frames_or_without_a_detector_is_refused():
    """There must be something to fit, and something to fit on."""
    with pytest.raises(ValueError, match="no frame"):
        _fit(_TinyDetector(), frames=MemoryFrames(np.zeros((0, 4, 4, 3), np.uint8)))
    with pytest.raises(TypeError, match="Linear is no detector"):
        _fit(nn.Linear(1, 1))


class _SecondOfTwo(Alone):
    """Another process that has ended before the first step."""

    count = 2

    def add_up(self, values):  # noqa: ARG002 -- the shape of peers
        raise PeerLost("it has ended")


@pytest.mark.parametrize(("told_to_stop", "expected"), [(False, PeerLost), (True, FitStopped)])
def test_fit_when_another_process_has_ended_then_says_so_unless_all_were_told_to_stop(told_to_stop, expected):
    """An end that was asked for is no fault; any other one is."""
    detector = _TinyDetector(at={0: _interrupt} if told_to_stop else {})

    with pytest.raises(expected):
        fit(detector, _frames(), FitSettings(5, shares=2), SilentReporter(), peers=_SecondOfTwo())


class _FirstOfTwo(Alone):
    """Stopped when the message of its third step has left; the other process has nothing to add to any."""

    count = 2

    def __init__(self):
        self.messages = 0

    def add_up(self, values):  # noqa: ARG002 -- the shape of peers
        self.messages += 1
        if self.messages == 3:
            _interrupt()


def test_fit_when_told_to_stop_after_a_steps_message_then_stops_after_the_next_one(tmp_path):
    """The others can't know of it before, and would make a step alone and wait for ever."""
    peers = _FirstOfTwo()
    plan = CheckpointPlan(tmp_path, _IDENTITY)

    with pytest.raises(FitStopped):
        fit(_TinyDetector(), _frames(), FitSettings(5, shares=2), SilentReporter(), plan, peers=peers)

    assert (peers.messages, load_checkpoint(tmp_path, _IDENTITY).step) == (4, 4)


def test_fit_when_a_batch_has_fewer_frames_than_shares_then_is_refused():
    """No process may be left without a frame."""
    with pytest.raises(FitFailed, match="'student' has 3 frames, too few for 4 processes"):
        _fit(_TinyDetector(), frames=_frames(3), shares=4)


def test_fit_when_shares_can_not_be_dealt_evenly_then_is_refused():
    """Three shares are not for two processes."""
    with pytest.raises(ValueError, match="2 processes can't compute equally many of 3 shares"):
        fit(_TinyDetector(), _frames(), FitSettings(5, shares=3), SilentReporter(), peers=_SecondOfTwo())


def test_fit_when_a_batch_comes_in_uneven_shares_then_every_frame_counts_the_same():
    """Three shares of four frames are weighted by their size, so the losses of a mean are those of the whole batch."""
    recipe = dataclasses.replace(_RECIPE, optimiser="sgd", clip_gradient_norm=None)

    class Undropped(_TinyDetector):
        def _loss(self, inputs, step):  # noqa: ARG002 -- the shape of a loss
            return {"distance": (self.student(inputs) - inputs).square().mean()}

    whole, parts = Undropped(recipe), Undropped(recipe)
    expected, found = _fit(whole), _fit(parts, shares=3)

    torch.testing.assert_close(parts.student.weight, whole.student.weight, atol=1e-6, rtol=0)  # another order of sums
    assert [point.terms for point in found.losses] == [pytest.approx(point.terms) for point in expected.losses]
