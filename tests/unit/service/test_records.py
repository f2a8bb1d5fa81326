"""Promises of the records: the last heatmaps can be drawn, within a bound, and nothing else is kept alive."""

import io

import numpy as np
import pytest
from PIL import Image

from service.contract.frames import Frame
from service.contract.heatmaps import grey_heatmap, overlay
from service.contract.policy import Judgement, Verdict
from service.contract.regions import Region
from service.errors import UnknownInspection
from service.observability.telemetry import Telemetry
from service.records import Records
from tests.factories import make_frame
from tests.inspections import make_inspection

MAP_BYTES = 6 * 8 * 2
FRAME_BYTES = 24 * 32 * 3
RECORD_BYTES = MAP_BYTES + FRAME_BYTES


def inspection_of(number, height=24, width=32, **changes):
    """Return an inspection with a map and a frame."""
    anomaly_map = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    frame = Frame(make_frame(height, width), height, width)
    window = (0.0, 0.0, float(height), float(width))
    changes = {"anomaly_map": anomaly_map, "frame": frame, "window": window} | changes
    return make_inspection(inspection_id=str(number), **changes)


def dropped(telemetry):
    """Return how many heatmaps made room."""
    text = telemetry.exposition()[0].decode()
    (line,) = [line for line in text.splitlines() if line.startswith('flawline_records_dropped_total{sink="heatmaps"}')]
    return float(line.split()[-1])


@pytest.mark.parametrize(
    ("max_heatmaps", "max_bytes"),
    [pytest.param(2, 10 * RECORD_BYTES, id="count"), pytest.param(10, 2 * RECORD_BYTES + 1, id="bytes")],
)
def test_keep_when_there_is_no_room_then_oldest_leaves_and_is_counted(max_heatmaps, max_bytes):
    """Both bounds hold, and what makes room is counted."""
    telemetry = Telemetry()
    records = Records(max_heatmaps, max_bytes, telemetry)

    for number in range(3):
        records.keep(inspection_of(number))

    with pytest.raises(UnknownInspection):
        records.heatmap("0")
    assert [records.heatmap(name).inspection_id for name in ("1", "2")] == ["1", "2"]
    assert dropped(telemetry) == 1


def test_keep_when_a_record_was_asked_for_then_others_leave_first():
    """What is looked at stays longest."""
    records = Records(2, 10 * RECORD_BYTES, Telemetry())
    records.keep(inspection_of(0))
    records.keep(inspection_of(1))

    records.heatmap("0")
    records.keep(inspection_of(2))

    assert records.heatmap("0").inspection_id == "0"
    with pytest.raises(UnknownInspection):
        records.heatmap("1")


@pytest.mark.parametrize(("max_heatmaps", "max_bytes"), [(0, 10**9), (10, RECORD_BYTES - 1)])
def test_keep_when_nothing_fits_then_record_is_still_returned(max_heatmaps, max_bytes):
    """A picture that is answered at once needs no room; it is only not kept."""
    records = Records(max_heatmaps, max_bytes, Telemetry())

    record = records.keep(inspection_of(0))

    assert record.render("png")
    with pytest.raises(UnknownInspection):
        records.heatmap("0")


def test_keep_when_a_frame_was_decoded_at_reduced_scale_then_still_knows_its_own_size():
    """Regions are in pixels of the camera's frame, however few of them were decoded."""
    frame = Frame(make_frame(24, 32), 96, 128)

    record = Records(1, 10**9, Telemetry()).keep(inspection_of(0, frame=frame))

    assert record.pixels.shape == (24, 32, 3)
    assert record.frame_size == (96, 128)


@pytest.mark.parametrize(("height", "width", "kept"), [(2048, 1536, (1024, 768)), (100, 3000, (34, 1024))])
def test_keep_when_frame_is_large_then_shrinks_it(height, width, kept):
    """The longest side of what is kept is bounded, and the aspect stays."""
    record = Records(1, 10**9, Telemetry()).keep(inspection_of(0, height, width))

    assert record.pixels.shape == (*kept, 3)
    assert record.frame_size == (height, width)


def test_render_when_grey_is_asked_for_then_matches_the_heatmap_of_the_map():
    """The lazily drawn picture is the one that would have been drawn at once, up to float16."""
    inspection = inspection_of(0)

    png = Records(1, 10**9, Telemetry()).keep(inspection).render("png")

    drawn = np.asarray(Image.open(io.BytesIO(png)))
    expected = grey_heatmap(inspection.anomaly_map, inspection.policy)
    np.testing.assert_allclose(drawn, expected, atol=1)  # half precision keeps 11 bits


def test_render_when_overlay_is_asked_for_then_shows_map_and_regions_where_they_lie_on_the_kept_frame():
    """The lazily drawn picture is the one that would have been drawn at once, in the frame's own coordinates."""
    outline = ((10.0, 10.0), (50.0, 10.0), (50.0, 60.0), (10.0, 60.0))
    region = Region(10, 10, 40, 50, outline, 2000, 1, 0.5)
    judgement = Judgement(Verdict.FAIL, 0.9, [region], 0, np.zeros((2, 2), np.float32))
    inspection = inspection_of(0, judgement=judgement, frame=Frame(make_frame(24, 32), 96, 128), window=(8, 8, 80, 112))

    png = Records(1, 10**9, Telemetry()).keep(inspection).render("overlay")

    anomaly_map = inspection.anomaly_map.astype(np.float16).astype(np.float32)
    expected = overlay(inspection.frame.pixels, anomaly_map, inspection.policy, [region], (8, 8, 80, 112), (96, 128))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)


def test_render_when_values_are_asked_for_then_gives_little_endian_float16():
    """Raw values come row by row; those beyond float16 are cut at its largest, not made infinite."""
    anomaly_map = np.array([[0.5, 1e6], [-1e6, 2.0]], np.float32)

    data = Records(1, 10**9, Telemetry()).keep(inspection_of(0, anomaly_map=anomaly_map)).render("f16")

    values = np.frombuffer(data, "<f2").reshape(2, 2)
    np.testing.assert_array_equal(values, np.array([[0.5, 65504], [-65504, 2]], np.float16))
