"""RB-AE, of which no code was published, gives the numbers of a second implementation: NumPy and SciPy in float64.

Written after the tables and formulas of the reconstruction and not after `models/rb_ae.py`: of the detector it takes
numbers by their names, and the planted frames. Everything else is computed again: both passes of the encoder, attention
to the reference, painting, the comparison at three scales, and the objective of the second stage, in which batch norms
use their batch. Tolerances are those of float32 on the detector's side.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from models.blocks.draws import generator_of_step
from models.detector import PassStage
from models.rb_ae import RbAe
from tests.tiny_detectors import TINY

_SIDE = 64
_EXACT = {"rtol": 0.0, "atol": 1e-5}
_WEIGHTS = {
    "structure_weight": 0.7,
    "edge_weight": 1.3,
    "discrimination_weight": 2.0,
    "repair_weight": 0.3,
    "margin": 0.05,
}

_DOWN = np.array([-1.0, 0.0, 1.0])[None, None, :, None] * np.ones(3) / 3  # Prewitt's kernel, by three

Maps = NDArray[np.float64]


class _Written:
    """The network by its numbers; maps are `(B, C, h, w)`.

    Args:
        numbers: of the detector, by their names.
        pool: side of the squares of reference positions that the finest scale averages.
        own_statistics: whether batch norms use those of the batch at hand.
    """

    def __init__(self, numbers: Mapping[str, Maps], *, pool: int = 1, own_statistics: bool = False) -> None:
        self._numbers, self._pool, self._own = numbers, pool, own_statistics

    def encode(self, images: Maps) -> list[Maps]:
        """Return the features of strides 4, 8 and 16."""
        x, features = images, []
        for stage in range(4):
            for place, stride in ((0, 2), (1, 1)):
                x = self._block(x, f"encoder.stages.{stage}.{place}", stride)
            features.append(x)
        return features[1:]

    def repair(self, features: list[Maps], reference: list[Maps]) -> list[Maps]:
        """Return for each scale what its places read of the reference `(1, C, h, w)`."""
        return [
            self._read(one, other, f"attentions.{scale}", self._pool if scale == 0 else 1)
            for scale, (one, other) in enumerate(zip(features, reference, strict=True))
        ]

    def paint(self, repaired: list[Maps]) -> Maps:
        """Return frames in [0, 1]."""
        fine, middle, x = repaired
        for place, skipped in enumerate((middle, fine)):
            x = np.concatenate((self._block(_double(x), f"decoder.narrow.{place}"), skipped), axis=1)
            x = self._block(self._block(x, f"decoder.merge.{place}.0"), f"decoder.merge.{place}.1")
        x = self._block(self._block(_double(x), "decoder.narrow.2"), "decoder.smooth")
        x = self._block(_double(x), "decoder.narrow.3")
        return 1 / (1 + np.exp(-self._convolve(x, "decoder.paint")))

    def tell(self, before: list[Maps], after: list[Maps]) -> Maps:
        """Return the learnt head's map `(B, h, w)` of two encodings."""
        embedded = [
            self._convolve(np.abs(one - other), f"head.embeddings.{scale}")
            for scale, (one, other) in enumerate(zip(before, after, strict=True))
        ]
        grid = embedded[0].shape[2:]
        fused = self._block(np.concatenate([_resize(one, grid) for one in embedded], axis=1), "head.fuse.0")
        logits = _resize(self._convolve(fused, "head.fuse.1"), (_SIDE, _SIDE))[:, 0]
        return 1 / (1 + np.exp(-logits))

    def _read(self, features: Maps, reference: Maps, name: str, pool: int) -> Maps:
        queries, keys, values = (
            self._convolve(maps, f"{name}.{part}")
            for maps, part in ((features, "query"), (reference, "key"), (reference, "value"))
        )
        keys, values = (_pool(maps, pool)[0].reshape(maps.shape[1], -1).T for maps in (keys, values))
        mixed = np.zeros(features.shape)
        for image, row, column in np.ndindex(len(features), *features.shape[2:]):
            query = queries[image, :, row, column]
            cosines = keys @ query / (np.linalg.norm(keys, axis=1) * np.linalg.norm(query))
            shares = np.exp(np.exp(self._numbers[f"{name}.log_sharpness"]) * cosines)
            mixed[image, :, row, column] = shares / shares.sum() @ values
        return self._norm(self._convolve(mixed, f"{name}.out.0"), f"{name}.out.1")

    def _block(self, x: Maps, name: str, stride: int = 1) -> Maps:
        x = self._norm(self._convolve(x, f"{name}.0", stride), f"{name}.1")
        return np.where(x > 0, x, 0.2 * x)

    def _convolve(self, x: Maps, name: str, stride: int = 1) -> Maps:
        kernel = self._numbers[f"{name}.weight"]
        reach = kernel.shape[2] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        result = np.zeros((len(x), len(kernel), x.shape[2] // stride, x.shape[3] // stride))
        for row, column in np.ndindex(*kernel.shape[2:]):
            seen = padded[:, :, row : row + x.shape[2] : stride, column : column + x.shape[3] : stride]
            result += np.einsum("oc,bchw->bohw", kernel[:, :, row, column], seen)
        return result + self._numbers.get(f"{name}.bias", np.zeros(len(kernel)))[:, None, None]

    def _norm(self, x: Maps, name: str) -> Maps:
        own = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
        kept = self._numbers[f"{name}.running_mean"], self._numbers[f"{name}.running_var"]
        mean, variance = (one[:, None, None] for one in (own if self._own else kept))
        weight, bias = (self._numbers[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def _double(x: Maps) -> Maps:
    return _resize(x, (2 * x.shape[2], 2 * x.shape[3]))


def _resize(x: Maps, size: tuple[int, ...]) -> Maps:
    """Resize bilinearly, values in the middle of their cells."""
    for axis, new in zip((2, 3), size, strict=True):
        places = np.clip((np.arange(new) + 0.5) * x.shape[axis] / new - 0.5, 0, x.shape[axis] - 1)
        below = np.floor(places).astype(int)
        share = (places - below).reshape(-1, *(1,) * (3 - axis))
        above = np.minimum(below + 1, x.shape[axis] - 1)
        x = (1 - share) * x.take(below, axis) + share * x.take(above, axis)
    return x


def _pool(x: Maps, side: int) -> Maps:
    return x.reshape(*x.shape[:2], x.shape[2] // side, side, x.shape[3] // side, side).mean(axis=(3, 5))


def _distance(first: Maps, second: Maps) -> Maps:
    """Return one minus the cosine over channels, `(B, h, w)`."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return 1 - (first * second).sum(axis=1) / norms


def _similarity_of_structure(first: Maps, second: Maps) -> float:
    """Return the mean SSIM of each colour of each image, where the window of 11 fits."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))[None, None]
    inner = (slice(None), slice(None), slice(5, -5), slice(5, -5))

    def mean_of(maps: Maps) -> Maps:
        return ndimage.correlate(maps, window / window.sum())[inner]

    mean, other = mean_of(first), mean_of(second)
    variances = mean_of(first**2) - mean**2 + mean_of(second**2) - other**2
    covariance = mean_of(first * second) - mean * other
    luminance = (2 * mean * other + 0.01**2) / (mean**2 + other**2 + 0.01**2)
    return float((luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean())


def _difference_of_edges(first: Maps, second: Maps) -> float:
    """Return one minus MSGMS: grey, median of nine, Prewitt by three, on four scales, where the windows fit."""
    pair, scales = [images.mean(axis=1, keepdims=True) for images in (first, second)], []
    for scale in range(4):
        pair = [_pool(grey, 2) if scale else grey for grey in pair]
        smooth = [ndimage.median_filter(grey, (1, 1, 3, 3)) for grey in pair]
        lengths = [
            np.hypot(*(ndimage.correlate(one, kernel)[:, :, 2:-2, 2:-2] for kernel in (_DOWN, _DOWN.swapaxes(2, 3))))
            for one in smooth
        ]
        product, squares = lengths[0] * lengths[1], lengths[0] ** 2 + lengths[1] ** 2
        scales.append(np.mean(1 - (2 * product + 0.0026) / (squares + 0.0026)))
    return float(np.mean(scales))


def _images(count: int, seed: int) -> torch.Tensor:
    """Draw smooth frames with grain, whose edges differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic").clamp(0, 1)
    return (smooth + 0.1 * torch.rand(count, 3, _SIDE, _SIDE, generator=generator)).clamp(0, 1)


def _detector(**changes: object) -> RbAe:
    """Return a tiny detector with a reference and with numbers that are all away from where they begin."""
    detector = RbAe(replace(TINY["rb_ae"], **changes)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, value in detector.state_dict().items():
        if name.endswith((".1.weight", ".1.bias", "log_sharpness")):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.9  # one loss then moves the kept statistics nearly all the way
    for stage in detector.stages():
        if isinstance(stage, PassStage):
            stage.observe(_images(4, seed=9))
            stage.finish()
        else:
            stage.loss(_images(4, seed=9), 0)
    return detector


def _numbers(detector: RbAe) -> dict[str, Maps]:
    return {name: value.double().numpy() for name, value in detector.state_dict().items()}


def _as_numpy(images: torch.Tensor) -> Maps:
    return images.double().numpy()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"pooled_reference": 2}, {"map_source": "head"}], ids=["as published", "pooled", "head"]
)
def test_painted_frame_map_and_score_equal_those_that_are_written_out(changes):
    """From the frame to the score, at the size of the frame and behind the blur, to 1e-5."""
    detector = _detector(blur_sigma=2.0, **changes)
    images = _images(2, seed=0)

    painted, output = detector.paint(images), detector(images)

    numbers = _numbers(detector)
    network = _Written(numbers, pool=detector.config.pooled_reference)
    before, reference = network.encode(_as_numpy(images)), network.encode(numbers["reference"][None] / 255)
    expected = network.paint(network.repair(before, reference))
    np.testing.assert_allclose(painted.numpy(), expected, **_EXACT)
    after = network.encode(expected)
    if "map_source" in changes:
        maps = network.tell(before, after)
    else:
        scales = [_distance(one, other)[:, None] for one, other in zip(before, after, strict=True)]
        mean = np.mean([_resize(one, (_SIDE, _SIDE)) for one in scales], axis=0)[:, 0]
        maps = ndimage.gaussian_filter(mean, (0, 2, 2), mode="reflect", truncate=4)
    assert np.ptp(maps) > 0.05
    np.testing.assert_allclose(output.anomaly_map.numpy(), maps, **_EXACT)
    np.testing.assert_allclose(output.score.numpy(), maps.max(axis=(1, 2)), **_EXACT)


@torch.no_grad()
def test_objective_with_artificial_defects_equals_the_one_that_is_written_out():
    """L_rec of the frame with and without defects, L_disc and L_rep, over the statistics of the batch, to 1e-5."""
    detector = _detector(**_WEIGHTS)
    images = _images(3, seed=0)
    planted, masks = detector._plant(images, generator_of_step(detector.config.seed, 5))

    terms = detector.defect_loss(images, 5)

    numbers, good = _numbers(_detector(**_WEIGHTS)), _as_numpy(images)
    network = _Written(numbers, own_statistics=True)
    together = np.concatenate((_as_numpy(planted), good, numbers["reference"][None] / 255))
    encoded = network.encode(together)
    repaired = network.repair([one[:-1] for one in encoded], [one[-1:] for one in encoded])
    painted = np.split(network.paint(repaired), 2)
    apart = alike = 0.0
    for seen, read in zip(encoded, repaired, strict=True):
        stride = _SIDE // seen.shape[2]
        cells = masks.numpy().reshape(3, seen.shape[2], stride, seen.shape[3], stride).max(axis=(2, 4)) > 0
        distance = _distance(seen[:3], seen[3:6])
        apart += distance[~cells].mean() + np.maximum(1 - distance - _WEIGHTS["margin"], 0)[cells].mean()
        alike += _distance(read[:3], read[3:]).mean()
    expected = {
        "colour": sum(((one - good) ** 2).mean() for one in painted),
        "structure": 0.7 * sum(1 - _similarity_of_structure(one, good) for one in painted),
        "edges": 1.3 * sum(_difference_of_edges(one, good) for one in painted),
        "discrimination": 2.0 * apart,
        "repair": 0.3 * alike,
    }
    assert min(masks.mean(), (1 - masks).mean()) > 0
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_objective_of_good_frames_equals_the_one_that_is_written_out():
    """L_rec of the frame as it is, over the statistics of the batch and the reference, to 1e-5."""
    detector = _detector(**_WEIGHTS)
    images = _images(3, seed=0)

    terms = detector.reconstruction_loss(images, 0)

    numbers, good = _numbers(_detector(**_WEIGHTS)), _as_numpy(images)
    network = _Written(numbers, own_statistics=True)
    encoded = network.encode(np.concatenate((good, numbers["reference"][None] / 255)))
    painted = network.paint(network.repair([one[:-1] for one in encoded], [one[-1:] for one in encoded]))
    expected = {
        "colour": ((painted - good) ** 2).mean(),
        "structure": 0.7 * (1 - _similarity_of_structure(painted, good)),
        "edges": 1.3 * _difference_of_edges(painted, good),
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)
