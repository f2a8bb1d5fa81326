"""What every detector promises, whoever wrote it; parametrised over the tiny variants of all registered detectors."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from models import DETECTORS, build_detector
from models.detector import AnomalyOutput, Detector, GradientStage, PassStage
from tests.benchmarks.gpu_detectors import steps_of
from tests.tiny_detectors import TINY, make_detector
from training.fitting.optimisers import build_optimiser, learning_rate_at

every_detector = pytest.mark.parametrize("variant", sorted(TINY))

# What specifications promise of a planted defect: that the map is nowhere warmer, and how many times the usual value of
# the rest it has there. Of the others some are warmest elsewhere, after frames of another seed.
_WARMEST_AT_A_DEFECT = frozenset({"dadf", "jigsaw_svdd"})
_CONTRASTS = {"st_mae": 3.0}


def _normal_frames(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Draw frames of one textured product: stripes of one pitch, any phase, a little noise."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(count, 1, 1, 1, generator=generator) * 2 * torch.pi
    columns = torch.arange(size[1]) * (2 * torch.pi / 8)
    stripes = 0.5 + 0.3 * torch.sin(columns + phase).expand(count, 3, *size)
    return (stripes + 0.02 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 1)


def _only_line(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.int64)


def _fit(detector: torch.nn.Module, frames: Tensor) -> None:
    """Run all stages, descents for as many iterations as their recipes say."""
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            for batch in frames.split(8):
                stage.show(batch, _only_line(batch))
            stage.finish()
        else:
            _descend(stage, frames)


def _descend(stage: GradientStage, frames: Tensor) -> None:
    total = stage.recipe.iterations
    inputs = frames if stage.encode is None else torch.cat([stage.encode(batch) for batch in frames.split(8)])
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    generator = torch.Generator().manual_seed(0)
    for step in range(total):
        drawn = torch.randperm(len(inputs), generator=generator)[: stage.recipe.batch_size]
        optimiser.zero_grad()
        sum(stage.terms(inputs[drawn], _only_line(drawn), step).values()).backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(stage.recipe, step, total)
        optimiser.step()


@cache
def _fitted_once(variant: str) -> torch.nn.Module:
    detector = make_detector(variant)
    _fit(detector, _normal_frames(24, detector.image_size))
    return detector.eval()


def _fitted(variant: str) -> torch.nn.Module:
    return copy.deepcopy(_fitted_once(variant))


@torch.no_grad()
def _judge(detector: torch.nn.Module, frames: Tensor) -> AnomalyOutput:
    return detector(frames)


def test_every_registered_detector_has_a_tiny_variant():
    """No detector escapes this suite."""
    covered = {variant.partition("-")[0] for variant in TINY}

    assert covered == set(DETECTORS)


def test_build_detector_when_the_name_is_unknown_then_it_is_refused():
    """The refusal lists the names that exist."""
    with pytest.raises(ValueError, match="inp_former"):
        build_detector("nothing", None)


@every_detector
def test_build_detector_when_the_configuration_is_anothers_then_it_is_refused(variant):
    """A configuration of the wrong class is named instead of failing somewhere inside."""
    with pytest.raises(ValueError, match="NoneType"):
        build_detector(variant.partition("-")[0], None)


@every_detector
def test_detector_follows_the_protocol(variant):
    """Size, stages and forward exist, and the stages are of the two known kinds."""
    detector = make_detector(variant)

    assert isinstance(detector, Detector)
    assert all(isinstance(stage, PassStage | GradientStage) for stage in detector.stages())


@every_detector
def test_forward_gives_finite_float32_maps_and_scores(variant):
    """A batch of B images gives `(B, h, w)` and `(B,)`, finite and float32."""
    detector = _fitted(variant)

    output = _judge(detector, _normal_frames(3, detector.image_size, seed=1))

    assert isinstance(output, AnomalyOutput)
    assert output.anomaly_map.ndim == 3
    assert len(output.anomaly_map) == 3
    assert output.score.shape == (3,)
    assert output.anomaly_map.dtype == output.score.dtype == torch.float32
    assert torch.isfinite(output.anomaly_map).all()
    assert torch.isfinite(output.score).all()


@every_detector
def test_forward_when_asked_twice_then_the_answer_is_the_same(variant):
    """Nothing random and nothing remembered is left in inference."""
    detector = _fitted(variant)
    frames = _normal_frames(2, detector.image_size, seed=1)

    first, second = _judge(detector, frames), _judge(detector, frames)

    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(first.score, second.score)


@every_detector
def test_forward_when_batch_mates_change_then_the_answer_stays(variant):
    """An image's answer is the same alone and inside any batch; 1e-5 relative is float32 summation order."""
    detector = _fitted(variant)
    frames = _normal_frames(5, detector.image_size, seed=1)
    frames[4] = 1.0

    together = _judge(detector, frames)
    alone = [_judge(detector, frame[None]) for frame in frames]

    span = float(together.anomaly_map.max() - together.anomaly_map.min())
    torch.testing.assert_close(
        torch.cat([one.anomaly_map for one in alone]), together.anomaly_map, rtol=0, atol=1e-5 * span
    )
    torch.testing.assert_close(torch.cat([one.score for one in alone]), together.score, rtol=0, atol=1e-5 * span)


@every_detector
def test_forward_when_in_training_mode_then_type_and_values_are_those_of_eval_mode(variant):
    """Switching the mode changes neither the type of the answer nor the answer."""
    detector = _fitted(variant)
    frames = _normal_frames(2, detector.image_size, seed=1)

    in_eval = _judge(detector.eval(), frames)
    in_training = _judge(detector.train(), frames)

    assert isinstance(in_training, AnomalyOutput)
    torch.testing.assert_close(in_training.score, in_eval.score)


@every_detector
def test_descent_gives_a_gradient_to_its_parameters_and_to_no_other_tensor(variant):
    """What a stage lists is what it trains."""
    detector = make_detector(variant)
    frames = _normal_frames(8, detector.image_size)
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            stage.show(frames, _only_line(frames))
            stage.finish()
            continue

        inputs = frames if stage.encode is None else stage.encode(frames)
        sum(stage.terms(inputs, _only_line(frames), 0).values()).backward()

        listed = {id(parameter) for parameter in stage.parameters}
        for name, parameter in detector.named_parameters():
            touched = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert touched == (id(parameter) in listed), name
        detector.zero_grad()


@every_detector
def test_stages_when_in_bfloat16_then_every_loss_gradient_map_and_score_is_finite(variant):
    """What `gpu_detectors.py` asks of the paper's sizes on a GPU; nothing may want one type of numbers."""
    detector = make_detector(variant)

    costs = steps_of(detector, torch.device("cpu"), most=4)

    assert [cost.stage for cost in costs[:-1]] == [stage.name for stage in detector.stages()]


@every_detector
def test_loss_when_a_step_is_repeated_then_its_value_is_the_same(variant):
    """All randomness of a step comes from the step, so that a resumed run equals an uninterrupted one."""
    detector = _fitted(variant)
    frames = _normal_frames(4, detector.image_size)

    for stage in detector.stages():
        if isinstance(stage, GradientStage):
            inputs = frames if stage.encode is None else stage.encode(frames)
            first, second = (stage.terms(inputs, _only_line(frames), 7) for _ in range(2))

            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


@every_detector
def test_encode_when_batch_mates_change_then_the_encoding_stays(variant):
    """Encoded frames may be kept one by one; 1e-5 is float32 summation order."""
    detector = _fitted(variant)
    frames = _normal_frames(4, detector.image_size)

    for stage in detector.stages():
        if isinstance(stage, GradientStage) and stage.encode is not None:
            together = stage.encode(frames)
            alone = torch.cat([stage.encode(frame[None]) for frame in frames])

            torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@every_detector
def test_state_dict_when_loaded_into_a_new_detector_then_answers_are_the_same(variant):
    """Everything that was learnt or measured is in the state dict; the backbone comes from its own file."""
    fitted = _fitted(variant)
    frames = _normal_frames(2, fitted.image_size, seed=1)
    own = {key: value for key, value in fitted.state_dict().items() if not key.startswith("backbone.")}

    restored = make_detector(variant).eval()
    restored.load_state_dict(own, strict=False)

    assert torch.equal(_judge(restored, frames).anomaly_map, _judge(fitted, frames).anomaly_map)


@every_detector
@pytest.mark.parametrize("grow", [(16, 0), (0, 16)], ids=["taller", "wider"])
def test_forward_when_the_image_size_is_wrong_then_both_sizes_are_named(variant, grow):
    """The refusal says which size was expected and which one came."""
    detector = _fitted(variant)
    height, width = detector.image_size

    with pytest.raises(ValueError, match=rf"{height}, {width}\).*{height + grow[0]}, {width + grow[1]}\)"):
        _judge(detector, torch.zeros(1, 3, height + grow[0], width + grow[1]))


@every_detector
def test_forward_when_a_pass_has_not_run_then_it_refuses(variant):
    """A detector whose statistics are missing never gives a plausible answer."""
    detector = make_detector(variant)
    if not any(isinstance(stage, PassStage) for stage in detector.stages()):
        assert torch.isfinite(_judge(detector, _normal_frames(1, detector.image_size)).score).all()
        return

    with pytest.raises(RuntimeError, match="pass"):
        _judge(detector, _normal_frames(1, detector.image_size))


@every_detector
def test_planted_defect_when_fitted_briefly_then_it_ranks_above_every_normal_frame(variant):
    """Fitting on normal frames is enough to rank an obvious defect higher and to point at it."""
    detector = _fitted(variant)
    normal = _normal_frames(8, detector.image_size, seed=1)
    height, width = detector.image_size
    defective = normal.clone()
    defective[:, :, height // 2 : height * 3 // 4, width // 4 : width // 2] = 0.9

    good, bad = _judge(detector, normal), _judge(detector, defective)

    assert bad.score.min() > good.score.max()
    map_height, map_width = bad.anomaly_map.shape[1:]
    at_defect = torch.zeros(map_height, map_width, dtype=torch.bool)
    at_defect[map_height // 2 : map_height * 3 // 4, map_width // 4 : map_width // 2] = True
    inside, outside = bad.anomaly_map[:, at_defect], bad.anomaly_map[:, ~at_defect]
    assert (inside.mean(dim=1) > outside.mean(dim=1)).all()
    if variant in _WARMEST_AT_A_DEFECT:
        assert (inside.amax(dim=1) > outside.amax(dim=1)).all()
    if (contrast := _CONTRASTS.get(variant)) is not None:
        assert (inside.mean(dim=1) > contrast * outside.median(dim=1).values).all()
