"""AMI-Net gives the numbers of its authors' code, in inference and in training.

The expected arrays were made with the official modules (luow23/AMI-Net at 3350be0), every tensor filled by a rule that
starts from its official name. Tolerances: float32 against float32, other orders of summation; the mask is exact
wherever every score lies farther from its threshold than the two differ.

Other recordings of the same form are compared as they are: `FLAWLINE_SHARED=/elsewhere pytest tests/parity` takes
batch, grid and steps from their arrays, the side from their name, depths, patch and the number of centres from their
list of keys, and seed and sigma from their README (`recordings.py`). Of the documented rows of positions, a small grid
records those that it has. `record_ami_net.py` makes such recordings from a checkout of the official code.

The official mask is a decision. Where a recording tells that a score lies nearer to its threshold, or a token between
two centres, than the two codes differ, a token may be masked on one side alone.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.ami_net import AmiNet, AmiNetConfig, _embed, _mean_matrix, find_outliers
from models.blocks.patches import patchify
from models.blocks.smoothing import bilinear_matrix
from models.detector import GradientStage
from tests.parity.recordings import (
    Arrays,
    arrays_of,
    draw,
    draw_images,
    each_array,
    each_inference,
    read_arrays,
    recorded_after,
    recorded_inferences,
    seed_of,
    setting_of,
)
from tests.shared_material import require_shared
from training.fitting.import_checkpoint import _AMI_NET_PREFIXES, _translate, import_ami_net
from training.fitting.optimisers import build_optimiser

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 0.0, "atol": 0.0}
_POSITIONS = "Roncon_model.pos_embed"
_POSITION_ROWS = (0, 1, 2, 15, 16, 17, 128, 255)
_STRIDE = 4
_METHOD = "ami_net"
_TRACE = "trace__total_dis_dir_compact_diversity"


def _fill(key: str, shape: list[int], seed: int) -> Tensor:
    """Give the official tensor of that name its documented value."""
    last = key.rsplit(".", maxsplit=1)[-1]
    if last == "num_batches_tracked":
        return torch.tensor(0)
    x = draw(key, shape, seed)
    match last, len(shape):
        case "running_mean", _:
            value = np.float32(0.1) * x
        case "running_var", _:
            value = np.float32(1) + np.float32(0.1) * np.abs(x)
        case (("cls_token" | "mask_token"), _):
            value = np.float32(0.5) * x
        case "bias", _:
            value = np.float32(0.05) * x
        case "weight", 1:
            value = np.float32(1) + np.float32(0.1) * x
        case _:
            value = x * np.float32(np.sqrt(1 / np.prod(shape[1:])))
    return torch.from_numpy(value)


@cache
def _detector(folder: Path, side: int, grid: int) -> AmiNet:
    """Build the one detector: half a gigabyte, drawn number by number. Only `trace` changes it, after `_answers`.

    The official code brings the layers of images of any side to the same grid, a detector here to that of its first
    layer. So one whose grid is the recorded one is told of other images, for the comparison alone.
    """
    entries, seed = json.loads((folder / "state_dict_keys.json").read_text()), seed_of(folder)
    state = {entry["key"]: _fill(entry["key"], entry["shape"], seed) for entry in entries if entry["key"] != _POSITIONS}
    detector = import_ami_net(state, (grid * _STRIDE, grid * _STRIDE)).eval()
    detector.config = replace(detector.config, mask_deviations=_deviations(folder))
    if side != grid * _STRIDE:
        detector.image_size = (side, side)
        for index, stride in enumerate(detector.backbone.strides):
            matrix = (_mean_matrix(grid) @ bilinear_matrix(side // stride, grid)).float()
            setattr(detector, f"resize_rows_{index}", matrix)
            setattr(detector, f"resize_columns_{index}", matrix)
    return detector


def _deviations(folder: Path) -> float:
    return setting_of(folder, "sigma", AmiNetConfig.mask_deviations)


def _images(detector: AmiNet, folder: Path, expected: Arrays, batch: int | None = None) -> Tensor:
    """Return images whose normalised values are the documented draw; of another batch than was recorded, if wanted."""
    recorded = len(expected["feat_l2"])
    shape = (recorded if batch is None else batch, 3, *detector.image_size)
    normalised = draw_images(shape, seed_of(folder), expected["input_checksum"] if shape[0] == recorded else None)
    return torch.from_numpy(normalised) * detector.backbone.std + detector.backbone.mean


def _sides_of(recording: str, expected: Arrays) -> tuple[int, int]:
    """Return the side of the images that a recorded inference has seen, by its name, and of their map of features."""
    grid = expected["feat_l2"].shape[1]
    return int(recording) if recording.isdecimal() else grid * _STRIDE, grid


@cache
def _answers(recording: str):
    """Run the detector once as a recording did and name everything the official code was asked for."""
    folder = require_shared(f"parity/{_METHOD}")
    expected = read_arrays(folder / f"expected_{recording}.npz")
    detector = _detector(folder, *_sides_of(recording, expected))
    images = _images(detector, folder, expected)
    seen: dict[str, Tensor] = {}
    for name, module in (
        ("aux_block_centres", detector.centre_blocks),
        ("centres", detector.centre_norm),
        ("block0", detector.blocks[0]),
        ("final_norm", detector.norm),
    ):
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
    steps = ("_unpack", "_measure_tokens", "_find_mask", "_rebuild")
    for step in steps:
        setattr(detector, step, _recorded(getattr(detector, step), seen, step))
    find_mask = detector._find_mask

    def find_mask_or_take_recorded(distances: Tensor) -> Tensor:
        ours = find_mask(distances)
        return ours if _is_decided(expected, distances.amin(dim=2)) else 1 - torch.from_numpy(expected["mask"])

    detector._find_mask = find_mask_or_take_recorded
    with torch.no_grad():
        output = detector(images)
        for step in steps:
            delattr(detector, step)
        ours = _arrange(detector, seen["_unpack"], seen["_rebuild"], seen, expected["centres"].shape[1])
    ours |= {
        "token_score": seen["_measure_tokens"].amin(dim=2),
        "cluster_index": seen["_measure_tokens"].argmin(dim=2),
        "mask": 1 - seen["_find_mask"],
        "amap": output.anomaly_map,
        "image_score": output.score,
        "pos_embed_rows": detector.positions[[row for row in _POSITION_ROWS if row < len(detector.positions)]],
    }
    return expected, {name: value.numpy() for name, value in ours.items()}


def _is_decided(expected: Arrays, scores: Tensor | np.ndarray) -> bool:
    """Tell whether our scores are nearer to the recorded ones than any of these is to another mask or centre.

    Where one is not, a token may be masked there and visible here, and what follows is compared under their mask.
    """
    apart = np.abs(np.asarray(scores) / expected["token_score"] - 1).max()
    return bool(2 * apart < min(expected["cluster_margin"], expected["threshold_margin"]))


def _recorded(method: Callable[..., Tensor], into: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    """Return a method that keeps what it answers."""

    def record(*arguments: Tensor) -> Tensor:
        into[name] = method(*arguments)
        return into[name]

    return record


def _arrange(
    detector: AmiNet, features: Tensor, rebuilt: Tensor, seen: dict[str, Tensor], centres: int
) -> dict[str, Tensor]:
    """Bring our tensors to the layouts of the expected arrays."""
    resize = bilinear_matrix(features.shape[2], detector.config.map_size[0]).float()
    patches = patchify(features, detector.config.patch_size)
    ours = {
        "patch_embed_s": _embed(detector.patch_embedding, patches)[..., ::16],
        "auxi_embed_s": _embed(detector.centre_embedding, patches)[..., ::16],
        "aux_block_centres": seen["aux_block_centres"][:, :centres],
        "centres": seen["centres"],
        "block0_s": seen["block0"][..., ::16],
        "final_norm_s": seen["final_norm"][..., ::16],
    }
    for name, value in (("feat", features), ("rec", rebuilt)):
        ours[f"{name}_s"] = value[:, ::32, ::2, ::2]
        ours[f"{name}_l2"] = value.norm(dim=1)
    coarse = {
        "dis": (features - rebuilt).square().mean(dim=1),
        "dir": 1 - functional.cosine_similarity(features, rebuilt, dim=1),
    }
    for name, value in coarse.items():
        ours[f"{name}{value.shape[1]}"] = value
        ours[f"{name}_map_s"] = (resize @ value @ resize.T)[:, ::2, ::2]
        ours[f"{name}_smooth_s"] = detector.upsampling(value)[:, ::2, ::2]
    return ours


_TOLERANCES = {
    **dict.fromkeys(("feat_s", "feat_l2", "patch_embed_s", "auxi_embed_s", "aux_block_centres"), CLOSE),
    **dict.fromkeys(("centres", "token_score", "block0_s", "final_norm_s", "rec_s", "rec_l2"), CLOSE),
    **{f"{kind}{part}": CLOSE for kind in ("dis", "dir") for part in ("", "_map_s", "_smooth_s")},
    **dict.fromkeys(("cluster_index", "mask"), EXACT),
    "amap": CLOSE,
    "image_score": {"rtol": 1e-4, "atol": 0.0},
    "pos_embed_rows": {"rtol": 0.0, "atol": 1e-6},
}
_COMPARED_ELSEWHERE = {
    *("input_checksum", "cluster_margin", "threshold_margin"),
    *("mask_case_score", "mask_case_cluster", "mask_case_mask"),
}


def _kind(name: str) -> str:
    """Return the name of an array without the side of its grid: `dis` for `dis64`."""
    return re.sub(r"^(dis|dir)\d+$", r"\1", name)


@pytest.mark.parametrize("recording", each_inference(_METHOD))
def test_recording_has_the_arrays_that_are_compared(recording):
    """No array goes without a comparison, and none is missing."""
    assert {_kind(name) for name in arrays_of(_METHOD, recording)} - _COMPARED_ELSEWHERE == _TOLERANCES.keys()


@pytest.mark.parametrize(("recording", "name"), each_array(_METHOD, _COMPARED_ELSEWHERE))
def test_inference_equals_the_official_code(recording, name):
    """Every intermediate value, the mask, the map and the score are those of the official modules."""
    expected, ours = _answers(recording)

    if name in {"cluster_index", "mask"} and not _is_decided(expected, ours["token_score"]):
        assert (ours[name] != expected[name]).mean() < 0.01
        return
    np.testing.assert_allclose(ours[name].reshape(expected[name].shape), expected[name], **_TOLERANCES[_kind(name)])


@pytest.mark.parametrize("recording", each_inference(_METHOD))
def test_mask_when_all_clusters_are_in_use_then_equals_the_official_code(recording):
    """With all clusters, one of them of a single token, the same tokens are masked."""
    folder = require_shared(f"parity/{_METHOD}")
    expected = read_arrays(folder / f"expected_{recording}.npz")
    scores, nearest = (torch.from_numpy(expected[f"mask_case_{name}"]) for name in ("score", "cluster"))

    masked = find_outliers(scores, functional.one_hot(nearest).float(), _deviations(folder))

    np.testing.assert_array_equal(1 - masked.numpy(), expected["mask_case_mask"])


def _recording_of(folder: Path, tokens: int) -> str:
    """Return a recorded inference of so many tokens an image: that of the images which the training has seen."""
    for name in recorded_inferences(_METHOD):
        if read_arrays(folder / f"expected_{name}.npz")["token_score"].shape[1] == tokens:
            return name
    raise AssertionError(f"{folder} has no inference of {tokens} tokens, which the recorded training has")


@pytest.fixture(scope="module")
def trace():
    """Run the recorded training steps: no jitter, one given mask."""
    expected = read_arrays(require_shared(f"parity/{_METHOD}/expected_train.npz"))
    folder = require_shared(f"parity/{_METHOD}")
    shape = expected["train_mask"].shape
    recording = _recording_of(folder, tokens=shape[1])
    seen, _ = _answers(recording)  # of the detector before it is trained
    detector = _detector(folder, *_sides_of(recording, seen))
    detector.config = replace(detector.config, jitter=0.0)
    (stage,) = detector.stages()
    assert isinstance(stage, GradientStage)
    features = detector._unpack(stage.encode(_images(detector, folder, seen, batch=shape[0])))
    visible = torch.from_numpy(draw("train_mask", shape, seed_of(folder)) > 0)
    np.testing.assert_array_equal(visible.float().numpy(), expected["train_mask"])
    optimiser = build_optimiser(stage.recipe, stage.parameters)
    rows, first_gradients = [], {}
    for step in range(len(expected[_TRACE])):
        terms = detector._weigh_terms(features, 1 - visible.float(), torch.Generator().manual_seed(step))
        total = sum(terms.values())
        optimiser.zero_grad()
        total.backward()
        if step == 0:
            first_gradients = {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}
        optimiser.step()
        weighted = (terms["distance"], terms["direction"] / 5, terms["compactness"], terms["diversity"] / -0.1)
        rows.append([total.item(), *(term.item() for term in weighted)])
    return expected, np.array(rows), first_gradients, detector


def _name_here(recorded: str) -> str:
    """Translate the name of a recorded array, as `gradnorm__Roncon_model.norm.bias`, into that of our parameter."""
    return _translate(recorded.rpartition("__")[2], _AMI_NET_PREFIXES)


@pytest.mark.parametrize(
    ("column", "name"), list(enumerate(["total", "distance", "direction", "compactness", "diversity"]))
)
def test_training_trace_equals_the_official_code(trace, column, name):
    """The loss and its terms in each AdamW step are the official ones."""
    expected, rows, _, _ = trace

    official = expected[_TRACE]

    np.testing.assert_allclose(rows[:, column], official[:, column], rtol=1e-4, err_msg=name)


def test_first_gradients_equal_the_official_code(trace):
    """Recorded tensors get the official gradient, the mask token among them."""
    expected, _, gradients, _ = trace
    norms = [key for key in expected if key.startswith("gradnorm__")]

    assert norms
    for key in norms:
        ours, start = gradients[_name_here(key)], expected[key.replace("gradnorm__", "grad__")]
        np.testing.assert_allclose(ours.norm(), expected[key], rtol=1e-3, err_msg=key)
        np.testing.assert_allclose(
            ours.flatten()[: len(start)], start, rtol=1e-3, atol=1e-3 * np.abs(start).max(), err_msg=key
        )


def test_parameters_after_the_last_step_equal_the_official_code(trace):
    """AdamW with its decay moves the parameters as the official loop does."""
    expected, rows, _, detector = trace
    parameters = dict(detector.named_parameters())

    steps, recorded = recorded_after(expected)

    assert recorded
    assert steps == len(rows)
    for key, value in recorded.items():
        start = parameters[_name_here(key)].detach().flatten()[: len(value)]
        np.testing.assert_allclose(start, value, rtol=1e-4, atol=1e-5, err_msg=key)
