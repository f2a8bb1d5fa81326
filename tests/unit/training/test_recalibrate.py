"""Promises of a bundle that was calibrated again: what it says of itself is true of its own thresholds."""

import hashlib
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from service.contract.bundle import FITTED_FRAMES_FILE, FramesRecord, MetricRecord, ParentRecord, load_bundle
from service.contract.frames import fit_to_input
from service.contract.golden import read_golden
from service.contract.pictures import contrast_of
from service.contract.policy import image_score, inspected_mask, policy_digest
from tests.factories import (
    REFERENCE,
    encode,
    make_bundle,
    make_frame,
    make_graph,
    make_input,
    make_line_record,
    make_runner,
)
from tests.tiny_line import write_mvtec_ad2_line
from training.__main__ import commands
from training.bundling.fitted_frames import write_fitted_frames
from training.data.detect import read_dataset
from training.data.samples import UNKNOWN, Sample
from training.golden import contrast_asked_for
from training.measuring.answers import ask
from training.measuring.evaluate import evaluate, to_records
from training.progress import SilentReporter

GOOD = 24
_MEASURED = MetricRecord(value=0.9, low=0.8, high=0.95)


@pytest.fixture
def first(tmp_path):
    """A bundle as a run wrote it: its configuration has rates, its figures values, and no verdict differed."""
    hyperparameters = {"seed": 0, "review_rate": 0.1, "fail_rate": 0.05}
    record = make_line_record(metrics={"i_auroc": _MEASURED})
    folder = make_bundle(tmp_path / "store", hyperparameters=hyperparameters, by_line={"demo_line": record})
    return load_bundle(folder)


@pytest.fixture
def good(tmp_path):
    """Good frames that fitting never saw, two of which are copies."""
    folder = tmp_path / "good_of_june"
    folder.mkdir()
    for index in range(GOOD + 2):
        (folder / f"{index:03d}.png").write_bytes(encode(make_frame(seed=50 + index % GOOD)))
    return folder


def _calibrate(bundle, good, *options):
    done = CliRunner().invoke(commands, ["calibrate", str(bundle.path), str(good), *map(str, options)])
    assert done.exit_code == 0, done.output
    return load_bundle(bundle.path.parent / str(int(bundle.manifest.version) + 1))


def _digest_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _page(bundle):
    return re.sub(r"\s+", " ", bundle.files["report.html"].decode())


def _mask(path):
    mask = np.zeros(make_frame().shape[:2], np.uint8)
    mask[:, : mask.shape[1] // 2] = 255
    path.write_bytes(encode(mask))
    return path


def test_calibrate_when_another_region_is_not_measured_then_has_no_figures(first, good, tmp_path):
    """Figures of the whole frame are none of what a region of interest leaves; they are undefined, and say why."""
    again = _calibrate(first, good, "--roi", _mask(tmp_path / "roi.png"))

    record = again.manifest.by_line["demo_line"]
    assert record.metrics["i_auroc"].value is None
    assert "the region of interest is another one" in record.metrics["i_auroc"].reason
    assert (record.data.tested_on_normal, record.data.tested_on_anomalous) == (0, 0)
    assert "not defined: the region of interest is another one" in _page(again)

    third = _calibrate(again, good, "--roi", tmp_path / "roi.png", "--fail-rate", "0.06")
    assert third.manifest.by_line["demo_line"].metrics == record.metrics


def test_calibrate_when_only_thresholds_change_then_figures_stay_and_the_page_tells_the_same(first, good):
    """How well frames are ranked depends on no threshold, so manifest and page keep it, and say whose it is."""
    again = _calibrate(first, good)

    record = again.manifest.by_line["demo_line"]
    assert record.metrics == {"i_auroc": _MEASURED}
    assert (record.data.tested_on_normal, record.data.tested_on_anomalous) == (10, 10)
    assert "90.0 %" in _page(again)  # white space is one blank there
    assert "as in version 1; how well frames are ranked depends on no threshold" in _page(again)


def test_calibrate_when_it_ends_then_the_manifest_says_what_set_the_thresholds(first, good):
    """Frames, parent and rates are on record, each in one place, and what was not counted is not claimed."""
    again = _calibrate(first, good, "--fail-rate", "0.08")

    manifest, data = again.manifest, again.manifest.by_line["demo_line"].data
    assert data.calibration_frames == FramesRecord(name="good_of_june", digest=_digest_of(good), copies_left_out=2)
    assert (data.calibrated_on, data.calibrated_parts) == (GOOD, GOOD)
    assert (data.name, data.digest) == ("seeded noise", "0" * 64)
    assert manifest.parent == ParentRecord(version="1", digest=first.digest)
    assert manifest.by_line["demo_line"].fail_rate == 0.08
    assert manifest.hyperparameters == {"seed": 0}
    assert (manifest.parity.verdicts_differ, manifest.parity.verdicts_at_threshold) == (None, None)
    assert manifest.parity.map_difference == first.manifest.parity.map_difference

    page = _page(again)
    assert "version 2 of demo_line" in page
    assert f"version 2, {policy_digest(again.policies['demo_line'])}" in page
    assert "no verdict differs" not in page
    assert "verdicts were compared at its thresholds, not at these" in page
    assert "fail_rate" not in page
    assert f"{GOOD} good frames of good_of_june, 2 left out as copies" in page
    assert {data.calibration_frames.digest, first.digest} <= set(re.findall("[0-9a-f]{64}", page))


def _july(folder):
    line = folder / "july"
    for kind, count in (("good", 3), ("square", 2)):
        (line / "test" / kind).mkdir(parents=True)
        for index in range(count):
            frame = make_frame(seed=200 + index, defect=kind == "square")
            (line / "test" / kind / f"{index}.png").write_bytes(encode(frame))
    (line / "train/good").mkdir(parents=True)
    (line / "train/good/0.png").write_bytes(encode(make_frame(seed=300)))
    return line


def test_calibrate_when_it_ends_then_the_tables_tell_the_verdicts_and_promises_of_the_new_bundle(first, good, tmp_path):
    """Whoever reads the terminal takes no average for a bound, and no part to be looked at for one that failed."""
    rates = {"review": 0.4, "fail": 0.1}
    options = [f"--{name}-rate={rate}" for name, rate in rates.items()]
    arguments = ["calibrate", str(first.path), str(good), "--line-folder", str(_july(tmp_path)), *options]

    done = CliRunner().invoke(commands, arguments)

    rows = [line.split(" | ") for line in done.output.splitlines()]
    again = load_bundle(first.path.parent / "2")
    policy, calibration = again.policies["demo_line"], again.calibrations["demo_line"]
    reviewed = sum(policy.review_threshold <= score < policy.fail_threshold for score in calibration.scores)
    failed = sum(score >= policy.fail_threshold for score in calibration.scores)
    assert 0 < failed < reviewed
    assert ["frames", "PASS", "REVIEW", "FAIL"] in rows
    assert ["good, held out", *map(str, (GOOD - reviewed - failed, reviewed, failed))] in rows
    assert ["square", "0", "0", "2"] in rows
    assert ["from", "score", "good parts stopped, on average", "with 95 % confidence"] in rows
    for name, rate in rates.items():
        promise = calibration.threshold(rate)
        assert promise.false_reject_rate < promise.bound
        told = f"{promise.value:.4g}", f"{100 * promise.false_reject_rate:.3g} %", f"{100 * promise.bound:.3g} %"
        assert [name, *told] in rows
    assert ["i_auroc", "100.0 %"] in [row[:2] for row in rows]


def test_calibrate_when_test_frames_are_given_then_the_manifest_names_them(first, good, tmp_path):
    """New figures are of the frames that were given, which need not be those of the run."""
    line = _july(tmp_path)

    measured = _calibrate(first, good, "--line-folder", line)
    carried = _calibrate(measured, good)

    data = measured.manifest.by_line["demo_line"].data
    assert data.test_frames == FramesRecord(name="july", digest=_digest_of(line))
    assert (data.tested_on_normal, data.tested_on_anomalous) == (3, 2)
    assert measured.manifest.by_line["demo_line"].metrics["i_auroc"].value == 1
    assert carried.manifest.by_line["demo_line"].data.test_frames == data.test_frames


_LEFT = (((0.0, 0.0), (0.35, 0.0), (0.35, 1.0), (0.0, 1.0)),)


def test_calibrate_when_one_line_is_named_then_it_is_scored_as_it_will_be_judged_and_others_stay(tmp_path, good):
    """Thresholds rest on what the network says of this very line, in the places of a crop that verdicts look at."""
    own = {"version": "7", "region_of_interest": _LEFT, "min_region_area_px": 3.0, "max_regions": 7}
    options = {"lines": ("first", "second"), "conditional": True, "margin": 8, "policies": {"second": own}}
    bundle = load_bundle(make_bundle(tmp_path / "store", "pair", **options))

    again = _calibrate(bundle, good, "--line", "second")
    third = _calibrate(again, good, "--line", "first")

    spec, rule, policy = bundle.manifest.input, bundle.manifest.output.score_rule, again.policies["second"]
    frames = np.stack([fit_to_input(make_frame(seed=50 + index), spec) for index in range(GOOD)])
    scores, maps = make_runner(bundle.model)(frames, np.ones(GOOD, np.int64))
    inspected = inspected_mask(policy, *maps.shape[1:], window=spec.window(1, 1))
    judged = [image_score(float(score), one, inspected, rule) for score, one in zip(scores, maps, strict=True)]
    assert again.calibrations["second"].scores.tolist() == sorted(np.float32(judged).tolist())
    assert policy == policy.model_copy(update=own | {"version": "8"})
    assert [[answer.line for answer in read_golden(one).answers].count("second") for one in (again, third)] == [3, 3]
    assert contrast_asked_for(bundle, "first") != contrast_asked_for(bundle, "second")  # of frames of its own
    for before, after, other in ((bundle, again, "first"), (again, third, "second")):
        for name in (f"lines/{other}/policy.json", f"lines/{other}/calibration.npz"):
            assert after.files[name] == before.files[name]
        assert after.manifest.by_line[other] == before.manifest.by_line[other]
        kept, known = ([a for a in read_golden(one).answers if a.line == other] for one in (after, before))
        assert [(a.score, a.verdict) for a in kept] == [(a.score, a.verdict) for a in known]
    # Whoever wrote a bundle calibrated it on what fitting never saw; of frames that came later nobody knows.
    assert _page(again).count("Which frames the detector was fitted on is not known here") == 1
    assert _page(third).count("Which frames the detector was fitted on is not known here") == 2


def test_calibrate_when_test_frames_are_given_then_figures_are_those_that_evaluation_finds(tmp_path, good):
    """They are measured as the run's were: at its resolution, with its seed, and SegF1 by the new good frames."""
    bundle = load_bundle(make_bundle(tmp_path / "store", evaluation_resolution="original", seed=5))
    line = write_mvtec_ad2_line(tmp_path / "line")

    again = _calibrate(bundle, good, "--line-folder", line)

    asked = [sample for sample in read_dataset(line).test if sample.label != UNKNOWN]
    unseen = [Sample(path, "validation", 0, "good") for path in sorted(good.iterdir())[:GOOD]]
    spec, run = bundle.manifest.input, make_runner(bundle.model)
    tested, held_out = (ask(run, samples, spec, SilentReporter(), title="frames") for samples in (asked, unseen))
    rules = (again.policies["demo_line"], bundle.manifest.output.score_rule, spec)
    found = evaluate(tested, *rules, "original", held_out=held_out, seed=5)
    assert again.manifest.by_line["demo_line"].metrics == to_records(found.metrics)
    assert found.metrics["seg_f1"].value is not None


def test_calibrate_when_a_mask_or_a_name_is_unfit_then_it_refuses(first, good, tmp_path):
    """A mask that would be squeezed covers other places than were painted, and some names must not be shown."""
    (tmp_path / "roi.png").write_bytes(encode(np.full((40, 40), 255, np.uint8)))

    assert "40x40 pixels and the frames 80x64, which is another aspect" in _refused(
        first, good, "--roi", tmp_path / "roi.png"
    )

    (good / "000.png").rename(good / "0\u202e0.png")
    assert "holds characters that a terminal would obey" in _refused(first, good)


@pytest.mark.parametrize("every", [1, 2], ids=["all", "some"])
def test_calibrate_when_good_parts_have_far_less_contrast_then_the_new_bundle_does_not_refuse_them(first, good, every):
    """Golden frames of another light would make every frame of the present one a frame without a picture."""
    dull = [np.rint(255 * REFERENCE + (make_frame(seed=50 + index) - 255 * REFERENCE) / 8) for index in range(GOOD)]
    dull = dull[::every]
    for index, pixels in enumerate(dull):
        (good / f"{index:03d}.png").write_bytes(encode(pixels.astype(np.uint8)))
    for index in (GOOD, GOOD + 1):
        (good / f"{index:03d}.png").unlink()
    contrasts = [contrast_of(fit_to_input(pixels.astype(np.uint8), first.manifest.input)) for pixels in dull]

    again = _calibrate(first, good)

    assert max(contrasts) < contrast_asked_for(first, "demo_line")
    assert min(contrasts) > contrast_asked_for(again, "demo_line") > 0


def _remembering(store, digests, **options):
    """Return a bundle that was fitted on files of these digests."""
    files = write_fitted_frames(digests)
    return load_bundle(make_bundle(store, extra_files=files, **options))


def _digests(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _refused(bundle, good, *options):
    done = CliRunner().invoke(commands, ["calibrate", str(bundle.path), str(good), *map(str, options)])
    assert done.exit_code != 0
    assert not (bundle.path.parent / "2").exists()
    return re.sub(r"\s+", " ", done.output)


def test_calibrate_when_frames_were_fitted_on_then_they_are_left_out_and_counted(tmp_path, good):
    """Thresholds rest on what fitting never saw, also where somebody gives the folder of the run."""
    fitted = _digests(sorted(good.iterdir())[:4])
    bundle = _remembering(tmp_path / "store", fitted)

    again = _calibrate(bundle, good)

    data = again.manifest.by_line["demo_line"].data
    assert (data.calibrated_on, data.calibration_frames.fitted_left_out) == (GOOD - 4, 4)
    assert again.files[FITTED_FRAMES_FILE] == bundle.files[FITTED_FRAMES_FILE]
    assert "4 left out because fitting saw them" in _page(again)
    assert f"rests on {GOOD - 4} good frames that fitting never saw" in _page(again)


def test_calibrate_when_a_view_of_a_part_was_fitted_on_then_its_other_views_are_left_out(tmp_path, good):
    """Another view of what was learnt is none of an unseen part."""
    for path in sorted(good.iterdir())[GOOD:]:
        path.unlink()
    for index, path in enumerate(sorted(good.iterdir())):
        path.rename(good / f"{index // 2:02d}_C{index % 2}.png")
    bundle = _remembering(tmp_path / "store", _digests([good / "00_C0.png"]))

    again = _calibrate(bundle, good, "--group-by", "^(.*)_C[0-9]", "--fail-rate", "0.1", "--review-rate", "0.2")

    data = again.manifest.by_line["demo_line"].data
    assert (data.calibrated_on, data.calibrated_parts) == (GOOD - 2, GOOD // 2 - 1)
    assert data.calibration_frames.fitted_left_out == 2


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (GOOD, "fitted on all good frames of good_of_june"),
        (GOOD - 5, f"Good frames that fitting saw, {GOOD - 5}, do not count. A false-reject rate of 0.05 needs"),
    ],
)
def test_calibrate_when_too_few_unseen_frames_are_left_then_it_refuses(tmp_path, good, count, sentence):
    """What is left can't support the rate, so nothing is published."""
    bundle = _remembering(tmp_path / "store", _digests(sorted(good.iterdir())[:count]))

    assert sentence in _refused(bundle, good)


def test_calibrate_when_test_frames_calibrate_or_were_fitted_on_then_it_refuses(tmp_path, good):
    """Figures are measured neither on what set the thresholds nor on what was learnt, as in a run."""
    line = tmp_path / "line"
    for folder in ("train/good", "test/good"):
        (line / folder).mkdir(parents=True)
    (line / "train/good/0.png").write_bytes(encode(make_frame(seed=300)))
    tested = line / "test/good/0.png"
    tested.write_bytes((good / "003.png").read_bytes())
    bundle = _remembering(tmp_path / "store", _digests([good / "005.png"]))

    assert "003.png of the same content calibrates" in _refused(bundle, good, "--line-folder", line)

    tested.write_bytes((good / "005.png").read_bytes())
    assert "the detector was fitted on it" in _refused(bundle, good, "--line-folder", line)


def test_calibrate_when_the_bundle_forgot_its_frames_then_the_page_does_not_call_others_unseen(first, good):
    """Of a bundle that is older than the list nobody can tell, and the page says so; the next version neither."""
    again = _calibrate(first, good)
    third = _calibrate(again, good)

    for bundle in (again, third):
        assert FITTED_FRAMES_FILE not in bundle.files
        assert "fitting never saw." not in _page(bundle).replace("then calibrate on frames that fitting never saw.", "")
        assert "Which frames the detector was fitted on is not known here" in _page(bundle)


def test_calibrate_when_the_list_of_fitted_frames_is_none_then_it_refuses(tmp_path, good):
    """A list that can't be read recognises nothing, which must not pass for a list without these frames."""
    bundle = load_bundle(
        make_bundle(tmp_path / "store", extra_files={FITTED_FRAMES_FILE: b"0123456789abcdef\n000.png\n"})
    )

    assert "fitted_frames.txt is no list of digests" in _refused(bundle, good)


_REGION = {"region_of_interest": (((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)),)}


def _frames_of(folder, height, width):
    folder.mkdir()
    for index in range(GOOD):
        (folder / f"{index:03d}.png").write_bytes(encode(make_frame(height, width, seed=400 + index)))
    return folder


def test_calibrate_when_frames_of_another_shape_meet_the_old_region_then_it_refuses(tmp_path, good):
    """The region was drawn on other frames and would leave out other places of the part, which nobody asked for."""
    height, width = make_frame().shape[:2]
    bundle = load_bundle(make_bundle(tmp_path / "store", policy=_REGION))
    wide = _frames_of(tmp_path / "wide", height, 2 * width)

    said = _refused(bundle, wide)

    assert f"The new frames have {2 * width}x{height} pixels and those of the line demo_line before" in said
    assert "with --roi a mask that is drawn on the new ones" in said
    mask = np.full((height, 2 * width), 255, np.uint8)
    mask[:, : width // 2] = 0
    (tmp_path / "roi.png").write_bytes(encode(mask))
    again = _calibrate(bundle, wide, "--roi", tmp_path / "roi.png")
    assert again.manifest.by_line["demo_line"].data.frame_sizes == ((height, 2 * width),)
    third = _calibrate(again, wide)  # whose region was drawn on these
    assert third.policies["demo_line"].region_of_interest == again.policies["demo_line"].region_of_interest
    done = CliRunner().invoke(commands, ["calibrate", str(third.path), str(good)])
    assert "which is another aspect ratio" in re.sub(r"\s+", " ", done.output)


def test_calibrate_when_frames_have_another_size_then_it_says_so(tmp_path, good):
    """A larger sensor is allowed, and without a region so is another shape, but nobody overlooks it."""
    height, width = make_frame().shape[:2]
    data = make_line_record().data.model_copy(update={"frame_sizes": ((height, width),)})
    bundle = load_bundle(make_bundle(tmp_path / "store", by_line={"demo_line": make_line_record(data=data)}))
    for place, size in (("large", (2 * height, 2 * width)), ("wide", (height, 2 * width))):
        folder = _frames_of(tmp_path / place, *size)
        done = CliRunner().invoke(commands, ["calibrate", str(bundle.path), str(folder)])

        assert done.exit_code == 0, done.output
        said = re.sub(r"\s+", " ", done.output)
        assert (
            f"New frames have {size[1]}x{size[0]} pixels and those of the line demo_line before {width}x{height}"
            in said
        )
    done = CliRunner().invoke(commands, ["calibrate", str(bundle.path), str(good)])
    assert "New frames have" not in done.output


def test_evaluate_when_test_frames_were_fitted_on_then_it_says_how_many(tmp_path, good):
    """Other people's data sets may have a frame in both places, so this is told and not refused."""
    line = tmp_path / "line"
    for folder, seeds in (("train/good", [300]), ("test/good", [50, 51, 301])):
        (line / folder).mkdir(parents=True)
        for seed in seeds:
            (line / folder / f"{seed}.png").write_bytes(encode(make_frame(seed=seed)))
    bundle = _remembering(tmp_path / "store", _digests(sorted(good.iterdir())[:2]))

    done = CliRunner().invoke(commands, ["evaluate", str(bundle.path), str(line)])

    assert done.exit_code == 0, done.output
    assert "The detector was fitted on 2 of the 3 test frames" in re.sub(r"\s+", " ", done.output)


def test_evaluate_when_a_frame_shows_no_picture_then_it_is_counted_as_the_service_would(tmp_path):
    """A black frame gets no verdict from a camera, so evaluation, whose policy would pass it, gives it none either."""
    bundle = make_bundle(tmp_path / "store", policy={"review_threshold": 90.0, "fail_threshold": 90.0})
    black = np.zeros_like(make_frame())
    for name, pixels in (("train/good/0", make_frame()), ("test/good/0", make_frame(seed=9)), ("test/good/1", black)):
        (tmp_path / "line" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "line" / f"{name}.png").write_bytes(encode(pixels))
    figures = tmp_path / "figures.json"

    done = CliRunner().invoke(commands, ["evaluate", str(bundle), str(tmp_path / "line"), "--output", str(figures)])

    assert done.exit_code == 0, done.output
    told = json.loads(figures.read_text())
    assert told["verdicts"]["good"] == {"PASS": 1, "REVIEW": 0, "FAIL": 0, "NO_VERDICT": 1}


def test_evaluate_when_nobody_calibrated_the_line_then_ranks_its_frames_and_tells_no_verdict(tmp_path):
    """The thresholds of its policy only stand where some must stand, and nothing is judged by them."""
    bundle, figures = make_bundle(tmp_path / "store", calibrated=False), tmp_path / "figures.json"

    done = CliRunner().invoke(commands, ["evaluate", str(bundle), str(_july(tmp_path)), "--output", str(figures)])

    assert done.exit_code == 0, done.output
    assert "The line is not calibrated, so there are no verdicts" in done.output
    assert "PASS" not in done.output
    told = json.loads(figures.read_text())
    assert told["verdicts"] is None
    assert (told["policy"]["review_threshold"], told["policy"]["fail_threshold"]) == (None, None)
    assert (told["data"]["normal"], told["data"]["anomalous"], told["figures"]["i_auroc"]["value"]) == (3, 2, 1.0)


def test_evaluate_when_one_line_of_several_is_named_then_its_frames_are_judged_as_that_line(tmp_path):
    """The network is told which line it sees, and the verdicts are those of this line's thresholds."""
    frames = [make_frame(seed=700 + index) for index in range(12)]
    spec = make_input()
    run = make_runner(make_graph(conditional_lines=2))
    canvases = np.stack([fit_to_input(frame, spec) for frame in frames])
    as_first, as_second = (run(canvases, np.full(12, index, np.int64))[0] for index in (0, 1))
    threshold = float(np.median(as_second))
    policies = {"second": {"review_threshold": threshold}}
    store = tmp_path / "store"
    bundle = make_bundle(store, "pair", lines=("first", "second"), conditional=True, policies=policies)
    for folder, shown in (("train/good", [make_frame(seed=800)]), ("test/good", frames)):
        (tmp_path / "line" / folder).mkdir(parents=True)
        for index, frame in enumerate(shown):
            (tmp_path / "line" / folder / f"{index:02d}.png").write_bytes(encode(frame))
    arguments = ["evaluate", bundle, tmp_path / "line", "--line", "second", "--output", tmp_path / "figures.json"]

    done = CliRunner().invoke(commands, list(map(str, arguments)))

    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told["policy"]["review_threshold"] == threshold
    assert told["verdicts"]["good"] == {"PASS": 6, "REVIEW": 6, "FAIL": 0}
    assert (as_first < threshold).sum() != 6


def test_evaluate_when_test_frames_have_another_aspect_ratio_then_it_says_so(tmp_path):
    """Figures of another camera's frames are none of the line, and its region lies elsewhere on them."""
    height, width = make_frame().shape[:2]
    data = make_line_record().data.model_copy(update={"frame_sizes": ((height, width),)})
    by_line = {"demo_line": make_line_record(data=data)}
    bundle = load_bundle(make_bundle(tmp_path / "store", policy=_REGION, by_line=by_line))
    for size in ((height, width), (height, 2 * width)):
        for folder, seed in (("train/good", 500), ("test/good", 501)):
            path = tmp_path / str(size[1]) / folder / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode(make_frame(*size, seed=seed)))

    plain, wide = (
        re.sub(r"\s+", " ", CliRunner().invoke(commands, ["evaluate", str(bundle.path), str(tmp_path / str(w))]).output)
        for w in (width, 2 * width)
    )

    assert "Test frames have" not in plain
    assert (
        f"Test frames have {2 * width}x{height} pixels and those of the line demo_line before {width}x{height}" in wide
    )
    assert "region of interest lies on other places" in wide
