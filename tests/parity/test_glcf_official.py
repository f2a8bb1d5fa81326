"""GLCF gives the numbers of its authors' code: features, maps, calibration, evaluation, losses, gradients, steps.

`recorded/glcf.npz` was made by `record_glcf.py` with the official modules and scripts (hmyao22/GLCF at a9eaaec, its
calibration at 42be92d), every tensor filled by a rule that starts from its official name; both sides compute in
float64. What `models/glcf.py` names as a deviation is undone here: where the evaluation as published leaves out the
blur of the calibration, ours is left out too, and its choice of one branch by the name of the product is a fusion of
ours.
"""

import re
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbones import CnnBackbone
from models.detector import GradientStage
from models.glcf import Glcf, GlcfConfig
from tests.parity.official_code import RECORDED, checksum_of, fill, first_entries
from tests.parity.record_glcf import (
    CALIBRATION_IMAGES,
    CHANNELS,
    DEPTHS,
    IMAGES,
    SEED,
    STEPS,
    TRAINING_IMAGES,
    is_shown,
)
from tests.parity.recordings import draw, read_arrays
from training.fitting.optimisers import build_optimiser

# Both sides computed in float64; the recording was rounded to float32, and so are the matrices that resize and blur.
_EXACT = {"rtol": 1e-6, "atol": 1e-8}
_MAPS = {"rtol": 0.0, "atol": 1e-6}
_NORMALISED = {"rtol": 0.0, "atol": 5e-5}  # maps that were divided by deviations of a few hundredths
_CONFIG = GlcfConfig(
    token_channels=24,
    encoder_blocks=2,
    encoder_heads=4,
    decoder_blocks=2,
    decoder_heads=6,
    level_depths=DEPTHS,
)
_NAMES = {
    r"^backbone\.network\.": "teacher_encoder.",
    r"^decoders\.global_features\.": "student_decoder.",
    r"^decoders\.global_estimates\.": "student_decoder_reg_global.",
    r"^decoders\.local_estimates\.": "student_decoder_reg_local.",
    r"^bottleneck\.encoder_norm\.": "bottle.norm.",
    r"^bottleneck\.encoder\.": "bottle.blocks.",
    r"^bottleneck\.(global|local)_decoder\.": r"bottle.\1_decoder_blocks.",
    r"^bottleneck\.decoder_embedding\.": "bottle.decoder_embed.",
    r"^bottleneck\.prediction\.": "bottle.decoder_pred.",
    r"^bottleneck\.semantic_token$": "bottle.auxiliary_token",
    r"^bottleneck\.query_token$": "bottle.latent_auxiliary_token",
    r"^bottleneck\.": "bottle.",
}


def _official(name: str) -> str:
    """Return the official name of a tensor of ours."""
    for pattern, official in _NAMES.items():
        if re.match(pattern, name):
            name = re.sub(pattern, official, name)
            break
    name = re.sub(r"\.stages\.(\d+)\.", lambda match: f".layer{int(match[1]) + 1}.", name)
    return re.sub(r"\.embeddings\.(\d+)\.", lambda match: f".patch_embed{int(match[1]) + 1}.proj.", name)


def _filled(detector: Glcf) -> dict[str, Tensor]:
    """Return what the official code fills, by its names."""
    own = {"means", "deviations", "is_calibrated"}
    state = {name: tensor for name, tensor in detector.state_dict().items() if name not in own}
    return {_official(name): tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _build(**changes: object) -> Glcf:
    """Build a detector on a backbone as narrow as the recorded one."""
    from timm.models.resnet import BasicBlock, ResNet  # it needs what `models.backbones` has declared

    network = ResNet(BasicBlock, [1, 1, 1, 1], channels=CHANNELS)
    network.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    with patch("models.glcf.CnnBackbone", partial(CnnBackbone, network=network)):
        return Glcf(replace(_CONFIG, **changes))


def _detector(**changes: object) -> Glcf:
    """Return a detector whose tensors have the recorded values."""
    detector = _build(**changes)
    for key, tensor in _filled(detector).items():
        tensor.copy_(torch.from_numpy(fill(key, tensor.shape, SEED)))
    detector.backbone.is_loaded = True
    return detector.double().eval()


def _images(detector: Glcf, key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw(key, shape, SEED)).double() * detector.backbone.std + detector.backbone.mean


@pytest.fixture(scope="module")
def expected():
    """Return the recorded arrays."""
    return read_arrays(RECORDED / "glcf.npz")


def test_tensors_have_the_official_names_and_shapes(expected):
    """Every official tensor that is used has one of ours, and none of ours is left over."""
    shapes = {key: tuple(tensor.shape) for key, tensor in _filled(_build()).items()}

    np.testing.assert_array_equal(checksum_of(shapes), expected["tensors"])


def test_model_when_nothing_is_said_has_the_published_size(expected):
    """Our defaults make the tensors and heads of the official model's last version."""
    with torch.device("meta"):
        detector = Glcf(GlcfConfig())
    shapes = {key: tuple(tensor.shape) for key, tensor in _filled(detector).items()}
    bottleneck = detector.bottleneck
    stacks = (bottleneck.encoder, bottleneck.global_decoder, bottleneck.local_decoder)

    np.testing.assert_array_equal(checksum_of(shapes), expected["published_tensors"])
    np.testing.assert_array_equal([stack[-1].attn.heads for stack in stacks], expected["published_heads"])


@pytest.fixture(scope="module")
def answers():
    """Run the detector once, without gradients, and name everything that was recorded of the official inference."""
    detector = _detector()
    with torch.no_grad():
        levels = detector.backbone(_images(detector, "input_224", IMAGES))
        normed: list[Tensor] = []
        detector.bottleneck.encoder_norm.register_forward_hook(
            lambda *inputs_and_output: normed.append(inputs_and_output[2])
        )
        local, semantic = detector.bottleneck.encode(levels[1:])
        coarse_local, coarse_global = (
            detector.bottleneck.decode_local(local),
            detector.bottleneck.decode_semantic(semantic),
        )
        named = {
            "level": levels,
            "local_estimate": detector.decoders["local_estimates"](coarse_local),
            "global_feature": detector.decoders["global_features"](coarse_global),
            "global_estimate": detector.decoders["global_estimates"](coarse_local),
        }
    ours = {
        "positions": detector.bottleneck.positions[:, ::4],
        "tokens": normed[0][:, :, ::4],
        "coarse_local": coarse_local[:, ::4],
        "coarse_global": coarse_global[:, ::4],
    }
    for name, maps in named.items():
        for scale, one in enumerate(maps):
            ours[f"{name}{scale}_s"] = one[:, ::4, ::7, ::7]
            ours[f"{name}{scale}_l2"] = one.norm(dim=1)[:, ::7, ::7]
    return {name: value.numpy() for name, value in ours.items()}


def test_inference_equals_the_official_code(expected, answers):
    """Levels, positions, tokens, coarse maps and the decoders' maps are those of the official modules."""
    for name, ours in answers.items():
        np.testing.assert_allclose(ours, expected[name], **_EXACT, err_msg=name)


@cache
def _calibrated(blur_sigma: float) -> Glcf:
    """Return a detector that was calibrated with the blur, as in the official script, and judges with another."""
    detector = _detector()
    detector.observe(_images(detector, "calibration_224", CALIBRATION_IMAGES))
    detector.finish()
    if blur_sigma == detector.config.blur_sigma:
        return detector
    other = _detector(blur_sigma=blur_sigma)
    other.load_state_dict(detector.state_dict())
    return other


def test_distance_maps_equal_the_official_code(expected):
    """One minus cosine of both pairs at all scales, resized to the image, is what the official model answers."""
    detector = _calibrated(0.0)
    with torch.no_grad():
        maps = detector._distance_maps(detector.encode(_images(detector, "input_224", IMAGES)))

    np.testing.assert_allclose(maps[..., ::16, ::16].numpy(), expected["maps"], **_MAPS)


def test_calibration_equals_the_official_script(expected):
    """Means and deviations of blurred maps, averaged over the frames, are the script's twelve numbers."""
    detector = _calibrated(4.0)

    ours = torch.stack((detector.deviations, detector.means), dim=1).flatten(0, 1).T  # (scales, branches x 2)

    np.testing.assert_allclose(ours.numpy(), expected["calibration"], **_EXACT)


@pytest.mark.parametrize("fusion", ["texture", "logical"])
@pytest.mark.parametrize(("judged", "blur_sigma"), [("published", 0.0), ("blurred", 4.0)])
def test_fused_map_and_score_equal_the_official_evaluation(expected, judged, blur_sigma, fusion):
    """Normalised maps, weighed 1 to 3 to 6 and added, and their standard deviation are the official evaluation's."""
    both = _calibrated(blur_sigma)
    detector = _detector(fusion=fusion, blur_sigma=blur_sigma)
    branch = {"texture": slice(0, 1), "logical": slice(1, 2)}[fusion]
    state = both.state_dict()
    detector.load_state_dict({**state, **{name: state[name][branch] for name in ("means", "deviations")}})

    with torch.no_grad():
        output = detector(_images(detector, "input_224", IMAGES))

    name = f"{judged}__{fusion}"
    np.testing.assert_allclose(output.score.numpy(), expected[f"score__{name}"], **_EXACT)
    np.testing.assert_allclose(output.anomaly_map[:, ::16, ::16].numpy(), expected[f"fused__{name}"], **_NORMALISED)


@pytest.fixture(scope="module")
def trained():
    """Run the recorded training steps with our loss and our recipe."""
    detector = _detector(image_size=TRAINING_IMAGES[2:]).train()
    (stage, _) = detector.stages()
    assert isinstance(stage, GradientStage)
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    encoded = stage.encode(_images(detector, "input_64", TRAINING_IMAGES))
    rows, gradients = [], {}
    for step in range(STEPS):
        terms = stage.loss(encoded, step)
        total = sum(terms.values())
        optimiser.zero_grad()
        total.backward()
        if step == 0:
            gradients = {
                _official(name): one.grad.clone() for name, one in detector.named_parameters() if one.requires_grad
            }
        optimiser.step()
        rows.append([total.item(), *(terms[name].item() for name in ("local", "global", "correspondence"))])
    return np.array(rows), gradients, _filled(detector)


def test_losses_equal_the_official_code(expected, trained):
    """The loss and its three terms are the official ones before and after each step."""
    np.testing.assert_allclose(trained[0], expected["trace_total_local_global_correspondence"], **_EXACT)


def test_first_gradients_equal_the_official_code(expected, trained):
    """Every parameter but the backbone's gets the official gradient."""
    _, gradients, _ = trained
    shown = np.concatenate([first_entries(gradients[name]) for name in sorted(filter(is_shown, gradients))])

    norms = np.array([gradients[name].norm() for name in sorted(gradients)])

    np.testing.assert_allclose(norms, expected["gradient_norms"], **_EXACT)
    np.testing.assert_allclose(shown, expected["gradients"], **_EXACT)


def test_state_after_the_last_step_equals_the_official_code(expected, trained):
    """AdamW with its decay moves parameters and batch norms' statistics as the official loop does."""
    _, _, state = trained

    shown = np.concatenate([first_entries(state[name]) for name in sorted(filter(is_shown, state))])

    np.testing.assert_allclose(shown, expected["after_training"], **_EXACT)
