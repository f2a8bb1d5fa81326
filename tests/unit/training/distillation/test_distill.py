"""Distillation: the seed decides the loss curve, a stop changes nothing, and what ships computes what was learnt."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from models.backbones import EMBEDDED, CnnBackbone, untrained_weights
from training.distillation.distill import distil, distillation_terms, write_student
from training.distillation.lessons import LAYERS, Classroom, DistillConfig, Teacher, prepared_lessons
from training.distillation.student import Student, channel_scales, finish, fold_batch_norm, fold_channel_scales
from training.fitting.checkpoint import CheckpointRefused
from training.progress import SilentReporter


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of eight steps, taught by an untrained network of the student's own kind."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    safetensors.torch.save_file(untrained_weights(EMBEDDED, seed=7), path)
    return DistillConfig(
        (Teacher(EMBEDDED, path),),
        seed=3,
        images=64,
        batch_size=8,
        frame_size=32,
        canvas_size=64,
        texture_count=4,
        shard_size=16,
        warmup_images=16,
        normalising_images=16,
        held_out_images=16,
        finishing_images=16,
        checkpoint_images=32,
    )


@pytest.fixture(scope="module")
def distilled(config, tmp_path_factory):
    """What the run gives."""
    return distil(config, tmp_path_factory.mktemp("run"), SilentReporter())


class _Stop(Exception):
    """Somebody pressed Ctrl-C."""


class _StoppingReporter(SilentReporter):
    """Ends the run after five of its eight steps."""

    def __init__(self):
        self.steps = 0

    @contextmanager
    def bar(self, name, total, done=0):  # noqa: ARG002 - the shape of a reporter
        """Count the steps and stop."""
        yield self

    def advance(self, steps=1, figures=None):  # noqa: ARG002 - the shape of a bar
        """Take a step."""
        self.steps += steps
        if self.steps >= 40:
            raise _Stop


def _curve(distilled):
    return [sum(point.terms.values()) for point in distilled.losses]


def test_distil_when_repeated_with_the_seed_then_gives_the_same_curve_and_weights(config, distilled, tmp_path):
    """The seed decides everything, to the last bit."""
    again = distil(config, tmp_path, SilentReporter())

    assert _curve(again) == _curve(distilled)
    assert all(torch.equal(again.weights[name], value) for name, value in distilled.weights.items())


def test_distil_when_another_seed_then_gives_another_curve(config, distilled, tmp_path):
    """Frames and first weights follow the seed."""
    other = distil(dataclasses.replace(config, seed=4), tmp_path, SilentReporter())

    assert _curve(other) != _curve(distilled)


def test_distil_when_run_then_learns(distilled):
    """A few steps already lower the loss."""
    curve = _curve(distilled)

    assert len(curve) == 8
    assert sum(curve[-2:]) < 0.9 * sum(curve[:2])


def test_distil_when_stopped_and_resumed_then_equals_the_uninterrupted_run(config, tmp_path):
    """A run that is stopped halfway and goes on ends with the same bits."""
    whole = distil(config, tmp_path / "whole", SilentReporter())

    with pytest.raises(_Stop):
        distil(config, tmp_path / "stopped", _StoppingReporter())
    resumed = distil(config, tmp_path / "stopped", SilentReporter(), resume=True)

    assert _curve(resumed) == _curve(whole)
    assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())


def test_distil_when_resumed_with_another_recipe_then_refuses(config, tmp_path):
    """A checkpoint belongs to one recipe; only the length may change."""
    distil(dataclasses.replace(config, images=32), tmp_path, SilentReporter())

    with pytest.raises(CheckpointRefused, match="learning_rate"):
        distil(dataclasses.replace(config, learning_rate=1e-4), tmp_path, SilentReporter(), resume=True)


def test_lessons_when_prepared_by_another_process_then_are_the_same(config):
    """Workers change the speed of a run, never its result."""
    classroom = Classroom(config)

    with prepared_lessons(config, classroom, range(1), 0) as here:
        ours = next(here)
    with prepared_lessons(config, classroom, range(1), 1) as there:
        theirs = next(there)

    assert torch.equal(ours.frames, theirs.frames)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours.targets, theirs.targets, strict=True))


def test_weights_when_finished_then_load_into_the_backbone_and_give_scaled_maps(config, distilled):
    """What ships is float16, fits the backbone by name, and has channels of about unit spread on generated frames."""
    backbone = CnnBackbone(EMBEDDED, LAYERS)
    backbone.load_weights(distilled.weights)
    frames = Classroom(config).frames(3, 1)

    maps = backbone(frames.float() / 255)

    assert all(value.dtype == torch.float16 for value in distilled.weights.values())
    assert [tuple(one.shape[1:]) for one in maps] == [(64, 8, 8), (192, 4, 4), (384, 2, 2)]
    for one in maps:
        spread = one.std(dim=(0, 2, 3))
        assert 0.6 < spread[spread > 0].median() < 1.4


def test_folding_when_applied_then_only_scales_the_maps(config):
    """Batch norm and scales move into the weights without changing what is computed, beyond the factor itself."""
    torch.manual_seed(0)
    student = Student([[4], [4], [4]])
    frames = Classroom(config).frames(3, 1)
    student.features(frames)
    student.eval()
    with torch.no_grad():
        before = student.features(frames)
        scales = channel_scales(student, frames, 8)

        fold_batch_norm(student.network)
        fold_channel_scales(student.network, scales)
        after = student.features(frames)

    for old, new, scale in zip(before, after, scales, strict=True):
        assert torch.allclose(new, old * scale.view(1, -1, 1, 1), rtol=1e-3, atol=1e-4)


def test_finish_when_done_then_heads_still_predict_the_same(config):
    """The heads are changed with the maps, so that the explained variance can be measured on what ships."""
    torch.manual_seed(0)
    student = Student([[4], [4], [4]])
    frames = Classroom(config).frames(3, 1)
    offsets = torch.zeros(3, 2, dtype=torch.int64)
    reference = Student([[4], [4], [4]])
    reference.load_state_dict(student.state_dict())

    weights = finish(student, frames, 8)

    with torch.no_grad():
        for norm in (module for module in reference.network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        reference.features(frames[:32])
        reference.eval()
        for ours, theirs in zip(student(frames, offsets), reference(frames, offsets), strict=True):
            assert torch.allclose(ours[0], theirs[0], atol=0.05)
    assert "conv_stem.weight" in weights


def test_distillation_terms_when_the_guess_is_right_then_are_zero(config):
    """Both terms vanish for a perfect student and grow with the error."""
    target = [[torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))] for _ in LAYERS]
    worse = [[value[0] + 1] for value in target]

    right, wrong = distillation_terms(config, target, target), distillation_terms(config, worse, target)

    assert sum(right.values()).item() == pytest.approx(0, abs=1e-5)
    assert all(wrong[name] > right[name] + 0.01 for name in right)


def test_write_student_when_written_then_the_record_tells_digest_recipe_and_figures(config, distilled, tmp_path):
    """Whoever finds the weights can see how they were made."""
    path = write_student(distilled, config, tmp_path)

    record = json.loads(path.with_suffix(".json").read_text())
    assert path.name == "embedded.safetensors"
    assert path.stat().st_size < 6e6
    assert record["parameters"] < 3e6
    assert record["config"]["seed"] == "3"
    assert record["explained"][-1]["images"] == 64


@pytest.mark.parametrize("change", [{"teachers": ()}, {"images": 40}, {"batch_size": 7}], ids=str)
def test_config_when_it_does_not_divide_then_refuses(config, change):
    """A run consists of whole shards and whole batches, and has a teacher."""
    with pytest.raises(ValueError, match=r"teacher|whole"):
        dataclasses.replace(config, **change)


def test_config_when_asked_for_a_length_then_rounds_to_whole_shards(config):
    """The command takes any length."""
    assert config.with_images(100).images == 96
    assert config.with_images(1).images == 32
