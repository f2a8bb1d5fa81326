"""Promises of the page: it needs nothing outside of itself, and it says what is not known."""

import base64
import itertools
import re
from functools import cache

import numpy as np
import pytest

from service.contract.bundle import FramesRecord, MetricRecord, ParityRecord
from service.contract.calibration import Calibration
from service.contract.policy import policy_digest
from tests.factories import encode, make_frame, make_line_record, make_policy
from training.reporting.collect import carry_over
from training.reporting.drawings import draw_histogram, draw_loss, draw_roc
from training.reporting.page_data import (
    Fact,
    Inspected,
    LineReport,
    Picture,
    Promise,
    ReportData,
    Rules,
    RunFacts,
    VerdictRow,
)
from training.reporting.report import draw, render

_HOSTILE = "<script>alert(1)</script>"


def _jpeg(seed=0):
    return base64.b64encode(encode(make_frame(seed=seed), "JPEG")).decode()


def _picture(group, name="part.png", **fields):
    values = {"kind": "square", "verdict": "FAIL", "score": 0.5, "is_annotated": True}
    return Picture(group=group, name=name, frame=_jpeg(), overlay=_jpeg(1), **values | fields)


def _line(name="bottle", **fields):
    values = {
        "line": name,
        "facts": (Fact(name="Data digest", value="0" * 64),),
        "warnings": (),
        "review": Promise(value=0.3, rate=0.1, bound=0.17, good_parts=60),
        "fail": Promise(value=0.4, rate=0.05, bound=0.101, good_parts=60),
        "verdicts": (
            VerdictRow(kind="good, held out", is_good=True, passed=55, review=3, failed=2),
            VerdictRow(kind="good, test", is_good=True, passed=9, review=1, failed=0),
            VerdictRow(kind="square", is_good=False, passed=1, review=2, failed=7),
        ),
        "metrics": {
            "i_auroc": MetricRecord(value=0.973, low=0.95, high=0.99),
            "aupro": MetricRecord(value=None, reason="the line has image labels only, no masks"),
        },
        "by_kind": {"square": MetricRecord(value=0.973)},
        "calibration_scores": (0.1, 0.2, 0.3),
        "good_scores": (0.1, 0.15),
        "defect_scores": (0.2, 0.5, 0.9),
        "roc": ((0.0, 0.0), (0.0, 0.66), (1.0, 1.0)),
        "precision_recall": ((0.0, 1.0), (1.0, 0.6)),
        "pictures": (_picture("missed", verdict="PASS"), _picture("caught")),
    }
    return LineReport(**values | fields)


def _report(*lines, warnings=()):
    facts = RunFacts(
        name="bottling",
        detector="inp_former",
        backbone="resnet18",
        created_at="2026-11-22T10:00:00+00:00",
        facts=(Fact(name="Seed", value="1"),),
        configuration="detector: inp_former\n",
        losses=tuple(("reconstruction", step, 1 / (step + 1)) for step in range(50)),
        parity=ParityRecord(frames=9, map_difference=1e-6, score_difference=1e-7, verdicts_differ=0),
        warnings=warnings,
    )
    return ReportData(run=facts, resolution="original", lines=lines or (_line(),))


_SEVERAL = (_line("bottle"), _line("cap", roc=(), precision_recall=()), _line("crate"))


@cache
def _page(several=False):
    """Render once what many tests read: a page of one line, or of three."""
    return render(_report(*(_SEVERAL if several else ())))


def _text(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("</style>")[2])).replace("\xa0", " ")


@pytest.mark.parametrize("several", [False, True], ids=["one line", "several"])
def test_render_when_opened_offline_then_needs_nothing_else(several):
    """Every picture is embedded; no link, script, style sheet or font lies outside of the file."""
    page = _page(several)

    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<script|<link|@import|@font-face|url\((?!#)", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("several", [False, True], ids=["one line", "several"])
def test_render_when_read_aloud_then_every_picture_and_curve_has_words(several):
    """Images have alternative texts, drawings have labels, tables have captions and headed columns."""
    page = _page(several)

    assert all(re.search(r'alt="[^"]{10,}"', tag) for tag in re.findall(r"<img [^>]*>", page))
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg [^>]*>", page))
    assert page.count("<table") == page.count("<caption>")
    assert '<html lang="en">' in page


@pytest.mark.parametrize("several", [False, True], ids=["one line", "several"])
def test_render_when_many_drawings_share_a_page_then_no_name_is_used_twice(several):
    """Identifiers are unique and every reference finds its own."""
    page = _page(several)

    names = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:href="|url\(|labelledby=")#?([^")]+)', page))
    assert len(names) == len(set(names))
    assert used <= set(names)


def test_render_tells_the_promise_and_the_verdicts_in_plain_words():
    """Rates, bounds and counts stand in sentences, not only in tables."""
    text = _text(_page())

    assert "Of 10 defective test frames the detector stops 9: 7 as FAIL and 2 for REVIEW; 1 would pass." in text
    assert "at most 5.0 % of good parts will be rejected" in text
    assert "no more than 10.1 %" in text
    assert "not defined: the line has image labels only, no masks" in text
    assert "95.0 % to 99.0 %" in text


def test_render_when_parts_have_several_views_then_the_promise_counts_parts():
    """Sixty frames of twelve parts are twelve good parts, and the page says what a part's score is."""
    few = {name: Promise(value=0.4, rate=0.1, bound=0.221, good_parts=12) for name in ("review", "fail")}

    text = _text(render(_report(_line(**few))))

    assert "The promise rests on 12 good parts that fitting never saw, in 60 frames" in text
    assert "The promise rests on 60 good frames that fitting never saw" in _text(_page())


def test_render_when_there_are_several_lines_then_begins_with_what_each_of_them_stops():
    """The contents list tells the few figures that one compares lines by, and leads to the section of each."""
    page = _page(several=True)

    contents = page[page.index("<nav") : page.index("</nav>")]
    assert [re.sub("<[^>]+>", "", row) for row in re.findall(r'<th scope="row">(.*?)</th>', contents)] == [
        "bottle",
        "cap",
        "crate",
    ]
    assert _text("</style>" + contents).count("9 of 10") == 3
    assert (
        page.index("</nav>") < page.index('id="line-1"') < page.index('id="line-3"') < page.index("How this was made")
    )


def test_render_when_there_is_one_line_then_has_no_contents_list():
    """A page of one line begins with its verdicts."""
    page = _page()

    assert "<nav" not in page
    assert "Data digest" in _text(page)


def test_render_when_lines_have_something_in_common_to_know_then_says_it_before_them():
    """What the check of all lines found stands above their sections."""
    page = render(_report(*_SEVERAL, warnings=("The lines' frames differ in size.",)))

    assert page.index("frames differ in size") < page.index('id="line-1"')


def test_carry_over_when_another_line_was_calibrated_then_tells_thresholds_and_no_pictures():
    """A section whose frames are not at hand claims nothing about test frames, and repeats its figures and promise."""
    scores = np.linspace(0, 1, 60, dtype=np.float32)
    calibration = Calibration.from_good_parts(scores, scores, 0.0)
    fail, review = (calibration.threshold(rate).value for rate in (0.05, 0.1))
    policy = make_policy(review_threshold=review, fail_threshold=fail)

    section = carry_over("cap", "3", policy, calibration, make_line_record(), None)

    text = _text(render(_report(_line(), section)))
    assert "Digest of what" not in text
    assert (section.review.value, section.fail.value) == (review, fail)
    assert [(row.passed, row.review, row.failed) for row in section.verdicts] == [(55, 3, 2)]
    assert "carried over from version 3" in text
    assert "This line is judged as in version 3" in text

    data = make_line_record().data.model_copy(update={"calibration_frames": FramesRecord(name="june", digest="f" * 64)})
    again = carry_over("cap", "3", policy, calibration, make_line_record(data=data), None)
    assert f"Digest of what calibrated it {'f' * 64}" in _text(render(_report(_line(), again)))


def test_render_when_there_are_no_test_frames_then_says_that_nothing_was_measured():
    """A line with good frames only gets a page without figures, curves or claims."""
    held_out = VerdictRow(kind="good, held out", is_good=True, passed=55, review=3, failed=2)

    nothing = {"by_kind": {}, "good_scores": (), "defect_scores": (), "roc": (), "precision_recall": ()}
    page = render(_report(_line(verdicts=(held_out,), pictures=(), **nothing)))

    assert "how many defects the detector catches was not measured here" in _text(page)
    assert "ROC curve" not in page


def test_render_when_good_test_frames_break_the_promise_then_warns():
    """More false rejects than the bound allows are called what they are: other frames than those of training."""
    bad = VerdictRow(kind="good, test", is_good=True, passed=5, review=0, failed=5)

    assert "don't look like the good training frames" in _text(render(_report(_line(verdicts=(bad,))))).replace(
        "&#39;", "'"
    )
    assert "don't look like" not in _text(_page()).replace("&#39;", "'")


def test_render_when_the_policy_is_known_then_heatmaps_have_a_scale_in_numbers():
    """Floor, threshold of regions and ceiling stand at the ramp, and the policy is named with its digest."""
    rules = Rules.of(make_policy(version="7", map_floor=0.5, region_threshold=1.25))

    text = _text(page := render(_report(_line(rules=rules)), version="3"))

    assert "0.5 or less" in text
    assert "1.25: regions" in text
    assert "2 or more" in text
    assert "linear-gradient(to right, rgb(20, 10, 60) 0%" in page
    assert f"version 7, {policy_digest(make_policy(version='7', map_floor=0.5, region_threshold=1.25))}" in text
    assert "Region threshold 1.25" in text
    assert "version 3 of bottling" in text
    assert "manifest.sha256" not in _text(_page())  # a page outside of a bundle names no version


def test_render_when_names_hold_markup_then_it_is_only_text():
    """File names and kinds come from folders and are never markup."""
    page = render(_report(_line(pictures=(_picture("caught", name=_HOSTILE, kind=_HOSTILE),))))

    assert _HOSTILE not in page
    assert "&lt;script&gt;" in page


def test_report_data_when_kept_and_read_again_then_renders_the_same_page():
    """A run directory can show its report without the frames."""
    report = _report()

    again = ReportData.model_validate_json(report.model_dump_json())

    assert render(again) == _page()


def test_render_when_the_drawings_are_there_already_then_the_page_is_the_same():
    """A run draws once for its own page and for that of its bundle."""
    data = _report(*_SEVERAL)

    assert render(data, "3", draw(data)) == render(data, "3")


@pytest.mark.parametrize(
    "drawing",
    [
        draw_histogram([0.1] * 5, [], [], (0.1, 0.1)),
        draw_roc([(0, 0), (1, 1)], [0.1], [0.2], (0.1, 0.2)),
        draw_loss([("a", 0, 1.0)]),
        draw_loss([("a", 0, 2.0), ("b", 0, 1.0), ("b", 1, 0.5)]),
    ],
    ids=["equal scores", "roc", "one step", "two stages"],
)
def test_drawings_when_there_is_little_to_draw_then_still_take_the_pages_colours(drawing):
    """Degenerate data draws without fault, and no colour is fixed, so that it reads in light and dark."""
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", drawing))

    assert drawing.startswith("<svg ")
    assert "var(--ink)" in drawing
    assert fixed <= {"#ffffff"}


def test_loss_when_there_are_several_stages_then_each_has_a_panel_of_its_own():
    """One stage's loss of hundreds must not flatten the next one's of tenths."""
    first, second = [("flows", step, 900.0 - step) for step in range(50)], [("map", s, 0.5) for s in range(30)]

    together, alone = draw_loss(first + second), draw_loss(second)

    assert [drawing.count(">running mean<") for drawing in (together, alone)] == [2, 1]
    assert all(f">{stage}<" in together for stage in ("flows", "map"))
    assert ">map<" not in alone
    assert "flows: 50 iterations, from 900 to 851; map: 30 iterations, from 0.5 to 0.5" in together


def test_legends_when_the_machine_is_busy_then_whoever_trains_reads_no_warning(monkeypatch):
    """The search for the emptiest place may take seconds; it says nothing among the run's own sentences."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    drawn = draw_histogram([0.1] * 5, [0.2], [0.9], (0.1, 0.1)), draw_loss([("a", 0, 2.0), ("a", 1, 1.0)])

    assert all("legend" in drawing for drawing in drawn)


def test_render_when_good_parts_have_peaks_then_each_is_a_circle_on_an_ordinary_frame():
    """People see where thresholds come from without reading a map."""
    line = _line(peaks=((0.25, 0.5), (1.0, 0.031)), pictures=(_picture("passed", verdict="PASS"), _picture("caught")))

    page = render(_report(line))

    assert re.findall(r'<i style="left:([\d.]+)%;top:([\d.]+)%">', page) == [("25.0", "50.0"), ("100.0", "3.1")]
    assert "A good frame with 2 circles" in page
    assert "The rim sets the thresholds" not in page


def test_render_when_a_region_is_inspected_then_says_so_with_its_share_and_the_defects_outside():
    """Whoever reads the figures knows which part of the frame they are of."""
    inspected = Inspected(share=0.5625, defects_outside=3)

    text = _text(render(_report(_line(inspected=inspected))))

    assert "Only the region of interest is inspected, 56.2 % of the frame" in text
    assert "marked defect lies wholly outside: 3;" in text
    assert "What is dimmed, outside of the white line, is not inspected." in text
    assert "inside the region of interest. Intervals" in text
    assert "region of interest is inspected" not in _text(_page())
    assert "wholly outside" not in str(Inspected(share=0.5, defects_outside=0))


def test_render_when_the_rim_sets_the_thresholds_then_says_so_and_what_to_do():
    """A rim that need not be inspected costs defects elsewhere, and one option leaves it out."""
    line = _line(peaks=((0.0, 0.5),) * 3, peaks_at_rim=3, pictures=(_picture("passed", verdict="PASS"),))

    text = _text(render(_report(line)))

    assert "The rim sets the thresholds. 3 of 3 held-out good frames look oddest in the outer eighth" in text
    assert "(--roi)" in text
