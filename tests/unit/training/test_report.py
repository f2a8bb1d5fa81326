"""Promises of the page: it needs nothing outside of itself, and it says what is not known."""

import base64
import re

import pytest

from service.contract.bundle import MetricRecord, ParityRecord
from tests.factories import encode, make_frame
from training.drawings import draw_histogram, draw_loss, draw_roc
from training.report import Fact, Picture, Promise, ReportData, RunFacts, VerdictRow, render

_HOSTILE = "<script>alert(1)</script>"


def _jpeg(seed=0):
    return base64.b64encode(encode(make_frame(seed=seed), "JPEG")).decode()


def _picture(group, name="part.png", **fields):
    values = {"kind": "square", "verdict": "FAIL", "score": 0.5, "is_annotated": True}
    return Picture(group=group, name=name, frame=_jpeg(), overlay=_jpeg(1), **values | fields)


def _report(**fields):
    values = {
        "run": RunFacts(
            line="bottle",
            detector="inp_former",
            backbone="resnet18",
            created_at="2026-11-22T10:00:00+00:00",
            facts=(Fact(name="Seed", value="1"),),
            configuration="detector: inp_former\n",
            losses=tuple(("reconstruction", step, 1 / (step + 1)) for step in range(50)),
            parity=ParityRecord(frames=9, map_difference=1e-6, score_difference=1e-7, verdicts_differ=0),
        ),
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
        "resolution": "original",
        "calibration_scores": (0.1, 0.2, 0.3),
        "good_scores": (0.1, 0.15),
        "defect_scores": (0.2, 0.5, 0.9),
        "roc": ((0.0, 0.0), (0.0, 0.66), (1.0, 1.0)),
        "precision_recall": ((0.0, 1.0), (1.0, 0.6)),
        "pictures": (_picture("missed", verdict="PASS"), _picture("caught")),
    }
    return ReportData(**values | fields)


def _text(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("</style>")[2])).replace("\xa0", " ")


def test_render_when_opened_offline_then_needs_nothing_else():
    """Every picture is embedded; no link, script, style sheet or font lies outside of the file."""
    page = render(_report())

    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<script|<link|@import|@font-face|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_render_when_read_aloud_then_every_picture_and_curve_has_words():
    """Images have alternative texts, drawings have labels, tables have captions and headed columns."""
    page = render(_report())

    assert all(re.search(r'alt="[^"]{10,}"', tag) for tag in re.findall(r"<img [^>]*>", page))
    assert all('role="img" aria-label="' in tag for tag in re.findall(r"<svg [^>]*>", page))
    assert page.count("<table>") == page.count("<caption>")
    assert '<html lang="en">' in page


def test_render_when_many_drawings_share_a_page_then_no_name_is_used_twice():
    """Identifiers are unique and every reference finds its own."""
    page = render(_report())

    names = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert len(names) == len(set(names))
    assert used <= set(names)


def test_render_tells_the_promise_and_the_verdicts_in_plain_words():
    """Rates, bounds and counts stand in sentences, not only in tables."""
    text = _text(render(_report()))

    assert "Of 10 defective test frames the detector stops 9: 7 as FAIL and 2 for REVIEW; 1 would pass." in text
    assert "at most 5.0 % of good parts will be rejected" in text
    assert "no more than 10.1 %" in text
    assert "not defined: the line has image labels only, no masks" in text
    assert "95.0 % to 99.0 %" in text


def test_render_when_there_are_no_test_frames_then_says_that_nothing_was_measured():
    """A line with good frames only gets a page without figures, curves or claims."""
    held_out = VerdictRow(kind="good, held out", is_good=True, passed=55, review=3, failed=2)

    page = render(
        _report(
            verdicts=(held_out,), by_kind={}, good_scores=(), defect_scores=(), roc=(), precision_recall=(), pictures=()
        )
    )

    assert "how many defects the detector catches was not measured here" in _text(page)
    assert "ROC curve" not in page


def test_render_when_good_test_frames_break_the_promise_then_warns():
    """More false rejects than the bound allows are called what they are: other frames than those of training."""
    bad = VerdictRow(kind="good, test", is_good=True, passed=5, review=0, failed=5)

    assert "don't look like the good training frames" in _text(render(_report(verdicts=(bad,)))).replace("&#39;", "'")
    assert "don't look like" not in _text(render(_report())).replace("&#39;", "'")


def test_render_when_names_hold_markup_then_it_is_only_text():
    """File names and kinds come from folders and are never markup."""
    page = render(_report(pictures=(_picture("caught", name=_HOSTILE, kind=_HOSTILE),)))

    assert _HOSTILE not in page
    assert "&lt;script&gt;" in page


def test_report_data_when_kept_and_read_again_then_renders_the_same_page():
    """A run directory can show its report without the frames."""
    report = _report()

    again = ReportData.model_validate_json(report.model_dump_json())

    assert render(again) == render(report)


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
