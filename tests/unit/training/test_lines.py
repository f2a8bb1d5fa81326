"""Promises of the lines of a run: what would end it later, or have its bundle refused, ends it in its first minute."""

import shutil

import numpy as np
import pytest

from service.errors import BundleRefused, CalibrationRefused, ParameterInvalid
from tests.factories import encode, make_bundle, make_frame
from tests.tiny_line import make_config, make_request, write_line
from training.config import ConfigFault, load_config
from training.data.samples import DatasetFault, parts_of
from training.lines import gather_lines
from training.progress import SilentReporter
from training.run_directory import LineRequest

FEW = 40  # of which half are held out: enough for one part in twenty


@pytest.fixture
def bottle(tmp_path):
    """A line."""
    return write_line(tmp_path / "bottle", good=FEW, tested=False)


@pytest.fixture
def cap(tmp_path):
    """A line of another product."""
    return write_line(tmp_path / "cap", good=FEW + 8, roughness=30)


def _gather(tmp_path, *folders, **overrides):
    return gather_lines(make_request(folders[0], tmp_path / "store", *folders[1:], **overrides), SilentReporter())


def test_gather_when_lines_are_fit_then_each_is_split_on_its_own(tmp_path, bottle, cap):
    """Every line holds out good parts of its own, and every file to fit on knows its line."""
    gathered = _gather(tmp_path, bottle, cap)

    assert [line.name for line in gathered.lines] == ["bottle", "cap"]
    assert [(len(line.fitted_on), len(line.held_out)) for line in gathered.lines] == [(20, 20), (24, 24)]
    assert [len(line.tested) for line in gathered.lines] == [0, 11]
    assert gathered.fitted_on_lines == [0] * 20 + [1] * 24
    assert [path.parts[-4] for path in gathered.fitted_on] == ["bottle"] * 20 + ["cap"] * 24
    assert gathered.warnings == ()


def test_gather_when_numbers_in_names_begin_again_then_says_what_orders_frames(tmp_path, bottle):
    """Whoever records a folder a day can see which frames were taken for neighbours; numbered frames need no word."""
    plain = _gather(tmp_path, bottle).warnings
    for path in sorted((bottle / "train/good").iterdir()):
        day = bottle / f"train/good/day{int(path.stem) // 20 + 9}"
        day.mkdir(exist_ok=True)
        path.rename(day / f"{int(path.stem) % 20:04d}.png")

    (told,) = _gather(tmp_path, bottle).warnings

    assert plain == ()
    assert told.startswith("bottle: The last numbers in the names of good frames don't count them")
    assert "from train/good/day9/0000.png to train/good/day10/0019.png" in told
    assert _gather(tmp_path, bottle, config=make_config(hold_out={"fraction": 0.5, "rule": "random"})).warnings == ()


def test_gather_when_lines_change_places_then_has_another_digest(tmp_path, bottle, cap):
    """A line's place is its index in the network, so another order is another run; a repetition is the same."""
    digests = [_gather(tmp_path, *folders).fitting_digest for folders in ((bottle, cap), (cap, bottle), (bottle, cap))]

    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


def test_gather_when_a_name_comes_twice_then_refuses(tmp_path, bottle, cap):
    """Two lines of one name could not be told apart by any caller."""
    lines = (LineRequest(name="cap", folder=bottle), LineRequest(name="cap", folder=cap))

    with pytest.raises(ParameterInvalid, match="The line cap is named twice"):
        _gather(tmp_path, bottle, lines=lines)


@pytest.mark.parametrize("way", ["the folder itself", "a link", "a copy"])
def test_gather_when_two_lines_have_the_same_frames_then_refuses(tmp_path, bottle, way):
    """One product under two names would be fitted on twice, however the second folder came about."""
    other = tmp_path / "other"
    if way == "a link":
        other.symlink_to(bottle)
    elif way == "a copy":
        shutil.copytree(bottle, other)
    folder = bottle if way == "the folder itself" else other
    lines = (LineRequest(name="bottle", folder=bottle), LineRequest(name="flask", folder=folder))

    with pytest.raises(DatasetFault, match=r"bottle and flask (are the same folder|hold the very same frames)"):
        _gather(tmp_path, bottle, lines=lines)


@pytest.mark.parametrize("detector", ["rb_ae", "jigsaw_svdd"])
def test_gather_when_the_detector_holds_one_products_picture_then_refuses_several_lines(
    tmp_path, bottle, cap, detector
):
    """Its reference would repaint frames of the other product."""
    with pytest.raises(ConfigFault, match=f"The detector {detector} compares every frame with a picture of one"):
        _gather(tmp_path, bottle, cap, config=load_config("small", detector))


@pytest.mark.parametrize(("detector", "warned"), [("dadf", True), ("inp_former", False)])
def test_gather_when_the_method_is_for_one_line_then_says_so_of_several(tmp_path, bottle, cap, detector, warned):
    """They can be trained together, and nobody promised that it goes well."""
    config = load_config("small", detector, ["hold_out.fraction=0.5"])

    together, alone = (_gather(tmp_path, *folders, config=config) for folders in ((bottle, cap), (bottle,)))

    assert any("dadf is published for one line" in warning for warning in together.warnings) is warned
    assert not any("published for one line" in warning for warning in alone.warnings)


def test_gather_when_one_line_holds_out_too_few_then_names_it(tmp_path, bottle):
    """A rate must hold for every line, and the refusal says for which one it can't."""
    scarce = write_line(tmp_path / "scarce", good=FEW - 4, tested=False, roughness=30)

    with pytest.raises(CalibrationRefused, match=r"^scarce: A false-reject rate of 0.05 needs at least 19 good parts"):
        _gather(tmp_path, bottle, scarce)


@pytest.mark.parametrize(
    ("size", "warned"), [((72, 80), False), ((144, 160), True), ((72, 120), True)], ids=["same", "larger", "wider"]
)
def test_gather_when_frames_differ_in_size_then_tells_the_sizes(tmp_path, bottle, size, warned):
    """All frames are resized to the one input of the network, and whoever fits on other sizes should know."""
    other = write_line(tmp_path / "other", good=FEW, tested=False, size=size, roughness=30)

    warnings = _gather(tmp_path, bottle, other).warnings

    assert bool(warnings) is warned
    if warned:
        assert f"other {size[0]}x{size[1]} (aspect ratio {size[1] / size[0]:.2f})" in warnings[0]
        assert "resized to 64x64" in warnings[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"hold_out": {"fraction": 0.85}}, True), ({"shots": 4}, False), ({}, False)],
    ids=["few are left", "few are asked for", "enough"],
)
def test_gather_when_fewer_frames_than_a_step_takes_are_left_then_says_what_to_do(tmp_path, bottle, change, told):
    """A method that sees less than one batch learns next to nothing; whoever asks for few by name knows."""
    warnings = _gather(tmp_path, bottle, config=make_config(**change)).warnings

    assert bool(warnings) is told
    if told:
        assert "bottle: the number of good frames to fit on is 4, and inp_former takes 8 in a step" in warnings[0]
        assert "--detector inp_former --shots 4" in warnings[0]


@pytest.mark.parametrize(("tested", "masks", "told"), [(True, False, True), (True, True, False), (False, True, False)])
def test_gather_when_defects_have_no_masks_then_says_which_figures_will_be_missing(tmp_path, tested, masks, told):
    """Whoever waits for a pixel figure learns before fitting that none will come, and where masks belong."""
    line = write_line(tmp_path / "marked", good=FEW, tested=tested, masks=masks)

    warnings = _gather(tmp_path, line).warnings

    assert bool(warnings) is told
    if told:
        assert "marked: its defective test frames have no masks" in warnings[0]
        assert "ground_truth/<kind>/<frame>_mask.png" in warnings[0]


def test_gather_when_frames_are_of_quite_another_shape_then_refuses_and_says_what_to_do(tmp_path, bottle):
    """A long web and a square part resized to one input would leave one of them squeezed."""
    web = write_line(tmp_path / "web", good=FEW, tested=False, size=(40, 120), roughness=30)

    with pytest.raises(DatasetFault, match=r"web 40x120 \(aspect ratio 3\.00\)\. Crop them .* runs of their own"):
        _gather(tmp_path, bottle, web)


def test_gather_when_another_bundle_serves_a_line_then_refuses(tmp_path, bottle, cap):
    """What the service would refuse after the run is refused before it, with the name of the other bundle."""
    make_bundle(tmp_path / "store", "pair", lines=("cap", "lid"))

    with pytest.raises(ParameterInvalid, match=r"The bundle pair in .* serves the line cap already"):
        _gather(tmp_path, bottle, cap)


def test_gather_when_an_older_version_served_a_line_then_the_newest_one_counts(tmp_path, bottle, cap):
    """The service looks at the newest version of each name, and so does the run."""
    make_bundle(tmp_path / "store", "pair", "1", lines=("cap", "lid"))
    make_bundle(tmp_path / "store", "pair", "2", lines=("lid",))

    assert len(_gather(tmp_path, bottle, cap).lines) == 2


def test_gather_when_a_new_version_leaves_a_line_out_then_says_so(tmp_path, bottle):
    """A line that would no longer be served is named before the run."""
    make_bundle(tmp_path / "store", "bottle", lines=("bottle", "lid"))

    assert _gather(tmp_path, bottle).warnings == (
        "The newest version of bottle serves lid as well, and this one will not.",
    )


def test_gather_when_each_line_has_a_region_of_interest_then_keeps_it_to_itself(tmp_path, bottle, cap):
    """A mask belongs to one line's camera pose."""
    mask = tmp_path / "mask.png"
    mask.write_bytes(encode((make_frame(72, 80, defect=True)[..., 0] == 250).astype("uint8") * 255))
    lines = (
        LineRequest(name="bottle", folder=bottle, region_of_interest=mask),
        LineRequest(name="cap", folder=cap),
    )

    gathered = _gather(tmp_path, bottle, lines=lines)

    assert gathered.lines[0].region_of_interest
    assert gathered.lines[1].region_of_interest is None


def test_gather_when_a_region_is_too_small_for_the_detector_then_refuses_before_fitting(tmp_path, bottle):
    """What calibration could not use is told now, and not after the fit."""
    mask = tmp_path / "mask.png"
    mask.write_bytes(encode(np.pad(np.full((20, 20), 255, np.uint8), ((0, 52), (0, 60)))))
    lines = (LineRequest(name="bottle", folder=bottle, region_of_interest=mask),)
    hyperparameters = {"layers": [2, 3], "patch_size": 2, "token_channels": 16, "heads": 2, "map_size": [32, 32]}
    config = make_config(detector="ami_net", hyperparameters=hyperparameters)

    with pytest.raises(BundleRefused, match="how uneven its map is"):
        _gather(tmp_path, bottle, lines=lines, config=config)


def test_gather_when_a_mask_was_not_drawn_on_the_frames_then_refuses_before_fitting(tmp_path, bottle):
    """Laid over frames of another aspect ratio it would be squeezed, and nobody would notice."""
    mask = tmp_path / "mask.png"
    mask.write_bytes(encode(np.full((50, 200), 255, np.uint8)))
    lines = (LineRequest(name="bottle", folder=bottle, region_of_interest=mask),)

    with pytest.raises(ParameterInvalid, match="200x50 pixels and the frames 80x72"):
        _gather(tmp_path, bottle, lines=lines)


def test_gather_when_a_mask_was_drawn_on_frames_of_one_camera_of_two_then_says_so(tmp_path, bottle):
    """The other camera's frames may be left uninspected where nobody has painted."""
    mask = tmp_path / "mask.png"
    mask.write_bytes(encode(np.full((72, 80), 255, np.uint8)))
    lines = (LineRequest(name="bottle", folder=bottle, region_of_interest=mask),)
    alone = _gather(tmp_path, bottle, lines=lines).warnings
    (bottle / "train/good/100.png").write_bytes(encode(make_frame(80, 80, seed=100)))

    (told,) = _gather(tmp_path, bottle, lines=lines).warnings

    assert alone == ()
    assert told.startswith("bottle: The region-of-interest mask")
    assert "has 80x72 pixels, and some frames another aspect ratio, like 80x80" in told


@pytest.mark.parametrize(
    ("size", "tiles", "told"),
    [
        ((32, 256), None, "--tiles 1x8"),
        ((256, 64), None, "--tiles 4x1"),
        ((64, 160), None, None),
        ((32, 256), {"rows": 1, "columns": 8}, None),
    ],
    ids=["wide", "tall", "less than a factor of three", "cut already"],
)
def test_gather_when_frames_are_oblong_then_says_into_which_tiles_to_cut_them(tmp_path, size, tiles, told):
    """Resized to a square, a web's frame keeps an eighth of its width."""
    line = write_line(tmp_path / "web", good=FEW, tested=False, size=size)

    warnings = _gather(tmp_path, line, config=make_config(tiles=tiles)).warnings

    assert [told is not None and told in warning for warning in warnings] == [True] * (told is not None)


def test_gather_when_there_is_one_line_then_its_refusal_names_no_other(tmp_path, bottle):
    """A run of one line speaks of parts, not of lines."""
    with pytest.raises(CalibrationRefused, match=r"^A false-reject rate of 0.01 needs"):
        _gather(tmp_path, bottle, config=make_config(fail_rate=0.01))


def _copy_all(folder):
    for frame in sorted(folder.iterdir()):
        shutil.copy(frame, folder / f"{frame.stem}_again.png")


def _contents(samples):
    return {sample.path.read_bytes() for sample in samples}


def test_gather_when_frames_are_copies_then_counts_each_picture_once_and_says_so(tmp_path):
    """Of frames that exist twice, each is held out or fitted on once, and no picture is on both sides."""
    line = write_line(tmp_path / "bottle", good=FEW, tested=False)
    _copy_all(line / "train/good")

    gathered = _gather(tmp_path, line)

    (found,) = gathered.lines
    fitted_on, held_out = _contents(found.fitted_on), _contents(found.held_out)
    assert (len(found.fitted_on), len(found.held_out), found.copies) == (20, 20, FEW)
    assert (len(fitted_on), len(held_out)) == (20, 20)
    assert not fitted_on & held_out
    assert f"bottle: the number of good frames that are copies of others is {FEW}" in gathered.warnings[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"config": make_config(shots=2)},
        {"config": make_config(hold_out={"fraction": 0.5, "rule": "random"})},
        {"released": "elsewhere"},
    ],
    ids=["validation", "shots", "random", "released"],
)
def test_gather_when_one_picture_is_held_out_many_times_then_refuses_the_rates(tmp_path, overrides):
    """Nineteen copies of one picture are one good part, however frames come to be held out."""
    line = write_line(tmp_path / "bottle", good=2, tested=False)
    picture = encode(make_frame(72, 80, seed=99))
    folder = line / ("val/good" if not overrides else "train/good")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(FEW):
        (folder / f"9{index:02d}.png").write_bytes(picture)

    with pytest.raises(CalibrationRefused, match=f"copies of others, {FEW - 1}, do not count.*at least 19 good parts"):
        _gather(tmp_path, line, **overrides)


def test_gather_when_a_name_says_which_part_a_frame_shows_then_counts_parts(tmp_path):
    """Twenty-five views of five parts are five good parts, also where the data set brings a validation folder."""
    line = write_line(tmp_path / "bottle", good=10, tested=False)
    (line / "val/good").mkdir(parents=True)
    for index in range(25):
        frame = encode(make_frame(72, 80, seed=300 + index))
        (line / "val/good" / f"{index // 5:03d}_C{index % 5}.png").write_bytes(frame)
    hold_out = {"rule": "groups", "group_by": r"^(\d+)"}

    with pytest.raises(CalibrationRefused, match="and 5 are held out, in 25 frames that show them several times"):
        _gather(tmp_path, line, config=make_config(hold_out=hold_out))

    rates = {"review_rate": 0.2, "fail_rate": 0.17}
    (found,) = _gather(tmp_path, line, config=make_config(hold_out=hold_out, **rates)).lines
    assert len(set(parts_of(found.held_out))) == 5
    assert len(found.held_out) == 25


def test_gather_when_one_line_holds_out_what_another_fits_on_then_refuses(tmp_path, bottle, cap):
    """One network learns all lines, so a frame that it is fitted on says nothing of new parts of any line."""
    fitted = sorted((bottle / "train/good").iterdir())
    held = [sample.path for sample in _gather(tmp_path, cap).lines[0].held_out]
    learnt = next(sample.path for sample in _gather(tmp_path, bottle).lines[0].fitted_on)
    assert learnt in fitted
    shutil.copy(learnt, held[0])

    with pytest.raises(DatasetFault, match="which has the same content, is held out; take one away"):
        _gather(tmp_path, bottle, cap)


def test_gather_when_one_line_is_measured_on_what_another_fits_on_then_refuses(tmp_path, bottle, cap):
    """Figures of a line are none of new parts either, where the network was fitted on its test frames for another."""
    learnt = next(sample.path for sample in _gather(tmp_path, bottle).lines[0].fitted_on)
    shutil.copy(learnt, min((cap / "test/good").iterdir()))

    with pytest.raises(DatasetFault, match="which has the same content, is a test frame; take one away, or the fig"):
        _gather(tmp_path, bottle, cap)
