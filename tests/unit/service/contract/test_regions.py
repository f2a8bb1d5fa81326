"""Promises of regions: the components that anybody would count, and outlines that hold their pixels."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from service.contract.regions import (
    draw_outlines,
    find_regions,
    label_components,
    outline_mask,
    outline_mask_with_holes,
    rasterise,
)
from tests.strategies import anomaly_maps

EIGHT = np.ones((3, 3), int)
HALF = 0.5  # of a cell


def whole(anomaly_map, scale_y=1.0, scale_x=1.0):
    """Return the window of a map that covers its whole frame."""
    h, w = anomaly_map.shape
    return 0.0, 0.0, h * scale_y, w * scale_x


def shoelace(polygon):
    """Return a polygon's area."""
    x, y = np.array(polygon).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


@given(anomaly_maps(), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_regions_when_counted_by_scipy_are_the_same(anomaly_map, threshold):
    """Number, areas, peaks, means and boxes are those of 8-connected components."""
    labels, count = ndimage.label(anomaly_map >= np.float32(threshold), EIGHT)
    places = range(1, count + 1)
    expected = sorted(
        (
            float(anomaly_map[labels == place].max()),
            float((labels == place).sum()),
            round(float(anomaly_map[labels == place].mean(dtype=np.float64)), 5),
            (box[1].start, box[0].start, box[1].stop - box[1].start, box[0].stop - box[0].start),
        )
        for place, box in zip(places, ndimage.find_objects(labels), strict=True)
    )

    regions, total = find_regions(anomaly_map, float(np.float32(threshold)), whole(anomaly_map), 0, 1000)

    found = sorted((r.peak, r.area_px, round(r.mean, 5), (r.x, r.y, r.width, r.height)) for r in regions)
    assert total == count
    assert found == expected


@given(anomaly_maps())
def test_polygons_when_tested_enclose_every_pixel_of_their_region(anomaly_map):
    """To within the half cell that outlines are simplified by: centres lie inside, and polygon and box agree."""
    labels, _ = ndimage.label(anomaly_map >= 0.5, EIGHT)

    regions, _ = find_regions(anomaly_map, 0.5, whole(anomaly_map), 0, 1000)

    for region in regions:
        contour = np.array(region.polygon, np.float32).reshape(-1, 1, 2)
        box = np.array(region.polygon)
        assert np.abs(box.min(axis=0) - [region.x, region.y]).max() <= HALF
        assert np.abs(box.max(axis=0) - [region.x + region.width, region.y + region.height]).max() <= HALF
        rows, columns = np.nonzero(labels == label_at(labels, region, anomaly_map))
        for x, y in zip(columns, rows, strict=True):
            assert cv2.pointPolygonTest(contour, (x + 0.5, y + 0.5), measureDist=True) >= -HALF


def label_at(labels, region, anomaly_map):
    """Return the label of the component whose box and area are a region's."""
    for place, box in enumerate(ndimage.find_objects(labels), start=1):
        same_box = (box[1].start, box[0].start, box[1].stop, box[0].stop) == (
            region.x,
            region.y,
            region.x + region.width,
            region.y + region.height,
        )
        inside = labels == place
        if same_box and inside.sum() == region.area_px and anomaly_map[inside].max() == region.peak:
            return place
    raise AssertionError("a region belongs to no component")


@pytest.mark.parametrize(
    ("rows", "area"),
    [(["#"], 1), (["##", "##"], 4), (["####"], 4), (["#.", "#."], 2), (["###", "###", "###"], 9)],
)
def test_polygon_when_the_region_is_a_rectangle_has_exactly_its_area(rows, area):
    """Outlines run along the pixels' outer edges; a single pixel has an area of one."""
    anomaly_map = np.array([[float(c == "#") for c in row] for row in rows], np.float32)

    (region,), _ = find_regions(anomaly_map, 0.5, whole(anomaly_map), 0, 10)

    assert shoelace(region.polygon) == area == region.area_px


def test_polygon_when_its_edge_is_round_has_a_third_of_the_steps_and_the_same_area():
    """A large disc's outline has more than 600 corners; two hundred tell the same area to one percent."""
    y, x = np.mgrid[:200, :200]
    disc = ((x - 100) ** 2 + (y - 100) ** 2 < 90**2).astype(np.float32)

    (region,), _ = find_regions(disc, 0.5, whole(disc), 0, 10)

    assert 8 <= len(region.polygon) <= 200
    assert shoelace(region.polygon) == pytest.approx(region.area_px, rel=0.01)


def test_regions_when_the_map_lies_in_a_window_are_in_pixels_of_the_frame():
    """Boxes, polygons and areas are moved and stretched, each axis by its own factor."""
    anomaly_map = np.zeros((10, 20), np.float32)
    anomaly_map[2:4, 5:9] = 1

    (region,), _ = find_regions(anomaly_map, 0.5, (7.0, 11.0, 30.0, 40.0), 0, 10)

    assert (region.x, region.y, region.width, region.height) == (11 + 10, 7 + 6, 8, 6)
    assert region.area_px == 8 * 3 * 2
    assert set(region.polygon) == {(21, 13), (29, 13), (29, 19), (21, 19)}


def test_regions_when_more_than_wanted_keeps_the_highest_peaks_and_tells_all():
    """The cut falls on the least anomalous, and the number of all is told."""
    anomaly_map = np.zeros((1, 9), np.float32)
    anomaly_map[0, ::2] = [0.5, 0.9, 0.6, 0.8, 0.7]

    regions, total = find_regions(anomaly_map, 0.5, whole(anomaly_map), 0, 2)

    assert ([round(r.peak, 1) for r in regions], total) == ([0.9, 0.8], 5)


def test_regions_when_none_are_to_be_described_are_still_counted():
    """A policy that describes no regions still tells how many there are."""
    assert find_regions(np.ones((2, 2), np.float32), 0.5, (0, 0, 2, 2), 0, 0) == ([], 1)


@pytest.mark.parametrize(("smallest", "kept"), [(8, 2), (8.1, 1), (12.1, 0)])
def test_regions_when_filtered_by_area_measure_it_in_original_pixels(smallest, kept):
    """A region exactly at the smallest area is kept; the measure is the frame's, not the map's."""
    anomaly_map = np.zeros((3, 8), np.float32)
    anomaly_map[0, :2] = anomaly_map[2, :3] = 1

    _, total = find_regions(anomaly_map, 0.5, whole(anomaly_map, 2, 2), smallest, 10)

    assert total == kept


@given(st.floats(-1e3, 1e3), st.integers(-2, 2))
def test_regions_when_the_threshold_lies_between_float32_numbers_are_cut_exactly(threshold, steps):
    """`map >= threshold` means the threshold as written, not as float32 rounds it."""
    value = np.float32(threshold)
    for _ in range(abs(steps)):
        value = np.nextafter(value, np.float32(np.copysign(np.inf, steps)))

    _, total = find_regions(np.full((1, 1), value), threshold, (0, 0, 1, 1), 0, 1)

    assert bool(total) == (float(value) >= threshold)


def test_regions_when_values_are_minus_infinity_lie_outside():
    """What is not inspected belongs to no region, however low the threshold."""
    anomaly_map = np.array([[-np.inf, -5.0, -np.inf]], np.float32)

    (region,), total = find_regions(anomaly_map, -1e30, whole(anomaly_map), 0, 10)

    assert (total, region.x, region.width, region.mean) == (1, 1.0, 1.0, -5.0)


@given(anomaly_maps())
def test_labels_when_compared_with_scipy_part_the_mask_alike(anomaly_map):
    """Components are 8-connected, numbered from one, and zero is outside."""
    mask = anomaly_map >= 0.5

    labels, count = label_components(mask)

    expected, expected_count = ndimage.label(mask, EIGHT)
    pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
    assert count == expected_count == len(pairs)
    assert not labels[~mask].any()


@given(anomaly_maps())
def test_mask_when_outlined_and_filled_again_covers_itself(anomaly_map):
    """A region of interest drawn as a mask loses no pixel by becoming polygons."""
    mask = anomaly_map >= 0.5

    outlines = outline_mask(mask)

    assert (rasterise(outlines, *mask.shape) >= mask).all()
    assert len(outlines) == ndimage.label(mask, EIGHT)[1]
    assert all(0 <= value <= 1 for outline in outlines for point in outline for value in point)


@given(anomaly_maps())
def test_mask_with_holes_when_outlined_and_filled_again_marks_its_own_neighbourhood_alone(anomaly_map):
    """No marked pixel is lost, and no other is marked that does not touch one: holes stay open."""
    mask = anomaly_map >= 0.5

    filled = rasterise(outline_mask_with_holes(mask, least_px=1), *mask.shape)

    assert (filled >= mask).all()
    assert (filled <= ndimage.binary_dilation(mask, EIGHT)).all()


def test_mask_with_holes_leaves_out_what_is_too_small_and_fills_what_is_no_hole_worth_a_cut():
    """Specks of a brush or of a JPEG make no polygons, black ones inside of white as little as white ones."""
    mask = np.zeros((40, 60), np.bool_)
    mask[5:35, 5:55] = True
    mask[10:20, 10:20] = mask[15:25, 40:50] = False  # two holes, one beside the other
    mask[30, 30] = False
    mask[0, 0] = True

    outlines = outline_mask_with_holes(mask, least_px=2)

    filled = rasterise(outlines, 40, 60)
    assert not filled[0, 0]
    assert filled[30, 30]
    assert not filled[11:19, 11:19].any()
    assert not filled[16:24, 41:49].any()


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15), (1, 1)])
def test_rasterising_when_the_polygon_is_the_whole_frame_fills_the_grid(height, width):
    """The whole frame is the whole grid."""
    assert rasterise([((0, 0), (1, 0), (1, 1), (0, 1))], height, width).all()


def test_rasterising_when_a_polygon_is_thinner_than_a_cell_still_marks_its_cells():
    """What somebody wanted inspected never falls between the cells."""
    mask = rasterise([((0.52, 0.0), (0.53, 0.0), (0.53, 1.0), (0.52, 1.0))], 4, 4)

    assert np.flatnonzero(mask.any(axis=0)).tolist() == [2]


def test_rasterising_when_a_polygon_reaches_beyond_the_grid_is_cut():
    """Corners outside of a crop are no reason to mark its rim."""
    mask = rasterise([((-3.0, -3.0), (0.4, -3.0), (0.4, 0.4), (-3.0, 0.4))], 10, 10)

    assert np.array_equal(mask, np.outer(np.arange(10) <= 4, np.arange(10) <= 4))


def test_rasterising_when_there_are_several_polygons_marks_each():
    """Polygons add up; where they overlap they do not cancel."""
    left, both = ((0, 0), (0.4, 0), (0.4, 1), (0, 1)), ((0, 0), (1, 0), (1, 1), (0, 1))

    assert rasterise([left, both], 6, 6).all()


def test_outlines_when_drawn_touch_only_their_neighbourhood():
    """Drawing changes the outline's pixels and leaves the inside as it is."""
    pixels = np.zeros((40, 40, 3), np.uint8)

    draw_outlines(pixels, [((10, 10), (30, 10), (30, 30), (10, 30))], (0, 255, 255))

    assert pixels[10, 20].min() == 0
    assert pixels[10, 20, 1:].min() > 200  # smoothed edges are a little darker
    assert not pixels[20, 20].any()
    assert not pixels[:8].any()
