"""Promises of frames without a picture: they are told from good parts by their contrast, and refused."""

from dataclasses import replace

import numpy as np
import pytest

from service.contract.bundle import load_bundle
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.golden import least_contrast_of, read_golden
from service.contract.pictures import contrast_of, least_contrast, refuse_blank
from service.errors import FrameNotComparable
from tests.factories import make_bundle, make_frame, make_input
from tests.shared_material import require_shared


@pytest.mark.parametrize(
    ("canvas", "contrast"),
    [
        (np.zeros((8, 8, 3), np.uint8), 0.0),
        (np.full((8, 8, 3), 255, np.uint8), 0.0),
        (np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None, None], (4, 6, 3)), np.sqrt(1.25)),
        (np.tile(np.array([[0, 0, 9], [0, 255, 9]], np.uint8)[:, None], (4, 8, 1)), 127.5),
    ],
    ids=["black", "white", "ramp", "black and green"],
)
def test_contrast_when_grey_levels_differ_then_it_is_their_standard_deviation(canvas, contrast):
    """It is measured of the green channel, of views of pixels too."""
    assert contrast_of(canvas) == pytest.approx(contrast)


def test_least_contrast_when_good_parts_differ_then_it_is_a_quarter_of_the_least():
    """The flattest good part decides, with room below it."""
    frames = [make_frame(seed=seed) for seed in range(3)]
    flat = (frames[0].astype(np.int16) // 4 + 80).astype(np.uint8)

    assert least_contrast([*frames, flat]) == contrast_of(flat) / 4


@pytest.mark.parametrize(("least", "is_refused"), [(0.0, False), (1.0, True)], ids=["nothing asked", "some asked"])
def test_refusing_when_a_frame_is_blank_then_it_is_where_the_line_shows_more(least, is_refused):
    """A line that nobody knows good parts of asks for nothing."""
    blank = np.full((8, 8, 3), 30, np.uint8)

    if is_refused:
        with pytest.raises(FrameNotComparable, match="covered lens"):
            refuse_blank(blank, least)
    else:
        refuse_blank(blank, least)


def test_refusing_when_a_frame_has_just_enough_contrast_then_it_is_judged():
    """The bound itself is enough."""
    frame = make_frame()

    refuse_blank(frame, contrast_of(frame))


def test_bundle_when_its_golden_frames_show_good_parts_then_these_and_no_others_say_how_much_there_must_be(tmp_path):
    """Defects have contrast of their own; of a line without calibration nobody knows what its golden frames show."""
    bundle = load_bundle(make_bundle(tmp_path))
    golden = read_golden(bundle)
    good = [
        fit_to_input(frame.pixels, bundle.manifest.input)
        for answer, frame in zip(golden.answers, golden.frames, strict=True)
        if answer.description == "a good part"
    ]
    uncalibrated = load_bundle(make_bundle(tmp_path, version="2", calibrated=False))

    assert least_contrast_of(bundle, golden) == min(contrast_of(canvas) for canvas in good) / 4
    assert least_contrast_of(uncalibrated, read_golden(uncalibrated)) == 0.0


def test_bundle_when_a_defective_golden_frame_is_flat_then_good_parts_alone_say_how_much_there_must_be(tmp_path):
    """A defect may be that there is no picture; it must not teach that none is needed."""
    bundle = load_bundle(make_bundle(tmp_path))
    golden = read_golden(bundle)
    *good, defective = golden.frames

    flat = replace(golden, frames=(*good, replace(defective, pixels=np.full_like(defective.pixels, 30))))

    assert least_contrast_of(bundle, flat) == least_contrast_of(bundle, golden) > 0.5


def test_bundle_when_no_golden_frame_passes_then_all_of_them_say_how_much_there_must_be(tmp_path):
    """A frame without a picture passes by no bundle, whatever its golden frames happen to be."""
    bundle = load_bundle(make_bundle(tmp_path, policy={"review_threshold": 0.0, "fail_threshold": 0.0}))

    assert least_contrast_of(bundle, read_golden(bundle)) > 0.5


@pytest.mark.parametrize("line", ["magnetic_tile", "pcb", "solar_cell"])
def test_frames_of_a_real_line_show_a_picture_whichever_good_ones_say_how_much_that_is(line):
    """No test frame, good or defective, is refused, for any of 2000 draws of eight good ones; a black one is."""
    folder = require_shared(f"data/{line}")
    spec = make_input(height=256, width=256)

    def contrasts(pattern):
        frames = [decode_image(path.read_bytes(), FrameLimits()).pixels for path in sorted(folder.glob(pattern))]
        return np.array([contrast_of(fit_to_input(frame, spec)) for frame in frames])

    good, tested = contrasts("train/good/*"), contrasts("test/*/*")
    draws = np.random.default_rng(0).choice(good, (2000, 8))

    assert tested.min() >= 0.25 * draws.min(axis=1).max()
    assert 0.25 * draws.min() > 0
