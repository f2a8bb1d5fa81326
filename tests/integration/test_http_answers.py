"""What answers hold: the same numbers everywhere, pictures of what was judged, and every frame its own answer."""

import asyncio
import hashlib
import io
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from service.contract.bundle import load_bundle
from service.contract.frames import FrameLimits, decode_image, fit_to_input
from service.contract.raw_frames import PIXEL_FORMATS
from service.observability.telemetry import Snapshot
from service.schemas import BatchAnswer, InspectionAnswer, LineAnswer, LinesAnswer, PoliciesAnswer, VersionsAnswer
from service.settings import Settings
from tests.factories import (
    FRAME_HEIGHT,
    FRAME_WIDTH,
    HEIGHT,
    POOL,
    WIDTH,
    encode,
    make_bundle,
    make_frame,
    make_policy,
    make_runner,
)
from tests.servers import serve_in_thread, wait_until_ready

INSPECT = "/v1/lines/demo_line/inspect"
BATCH = "/v1/lines/demo_line/inspect-batch"
PNG = {"Content-Type": "image/png"}
GOOD = encode(make_frame())
DEFECT = encode(make_frame(defect=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with one line of two policies; the stricter one fails what the default one lets pass."""
    place = tmp_path_factory.mktemp("store")
    make_bundle(place)
    strict = make_policy(version="strict", review_threshold=0.001, fail_threshold=0.002)
    (place / "demo_line/policies").mkdir()
    (place / "demo_line/policies/strict.json").write_text(strict.model_dump_json())
    return place


@pytest.fixture(scope="module")
def http(store) -> Iterator[httpx.Client]:
    """A ready server in a thread."""
    with serve_in_thread(Settings(store_directory=store)) as client:
        wait_until_ready(client)
        yield client


@pytest.mark.parametrize(("frame", "verdict"), [(GOOD, "PASS"), (DEFECT, "FAIL")], ids=["good", "defect"])
def test_answer_when_a_frame_is_inspected_then_it_is_complete_and_fits_its_published_shape(http, store, frame, verdict):
    """A real answer has exactly the documented members, and names the very bundle and policy that judged."""
    answer = http.post(INSPECT, content=frame, headers=PNG)

    inspection = InspectionAnswer.model_validate(answer.json())
    bundle = load_bundle(store / "demo_line/1")
    assert answer.status_code == 200
    assert inspection.verdict.value == verdict
    assert (inspection.line, inspection.bundle.version, inspection.bundle.digest) == ("demo_line", "1", bundle.digest)
    assert (inspection.frame.height, inspection.frame.width) == (FRAME_HEIGHT, FRAME_WIDTH)
    assert inspection.frame.digest == hashlib.sha256(frame).hexdigest()
    assert (inspection.thresholds.review, inspection.thresholds.fail) == (0.1, 0.2)
    assert inspection.heatmap is None


def test_answer_when_there_is_a_defect_then_its_region_lies_on_it_in_pixels_of_the_original_frame(http):
    """Box and polygon surround the planted square, whose place in the original frame is known."""
    [region] = http.post(INSPECT, content=DEFECT, headers=PNG).json()["regions"]

    top, left = 3 * FRAME_HEIGHT // 8, FRAME_WIDTH // 2
    cell = max(FRAME_HEIGHT / (HEIGHT / POOL), FRAME_WIDTH / (WIDTH / POOL))
    assert region["box"]["y"] == pytest.approx(top, abs=cell)
    assert region["box"]["x"] == pytest.approx(left, abs=cell)
    assert region["box"]["height"] == pytest.approx(FRAME_HEIGHT // 4, abs=2 * cell)
    assert region["box"]["width"] == pytest.approx(FRAME_WIDTH // 4, abs=2 * cell)
    assert region["polygon"][0] != region["polygon"][1]
    told = [*region["box"].values(), *(value for point in region["polygon"] for value in point), region["area_px"]]
    assert all(value == round(value, 2) for value in told)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "TIFF"])
def test_score_when_sent_over_http_then_it_equals_the_offline_engine_exactly(http, store, image_format):
    """The service judges the very pixels that training sees: the score is the same float32, not a close one."""
    data = encode(make_frame(480, 640, seed=5, defect=True), image_format)
    bundle = load_bundle(store / "demo_line/1")
    spec = bundle.manifest.input
    pixels = fit_to_input(decode_image(data, FrameLimits(), spec.resize_target).pixels, spec)

    answer = http.post(INSPECT, content=data, headers={"Content-Type": f"image/{image_format.lower()}"}).json()

    offline, _ = make_runner(bundle.model)(pixels[None])
    assert answer["score"] == float(offline[0])


@pytest.mark.parametrize("media_type", ["application/x-raw-frame", "application/octet-stream"])
@pytest.mark.parametrize("is_form", [False, True], ids=["body", "form"])
@pytest.mark.parametrize("padding", [0, 7], ids=["dense", "padded rows"])
def test_score_when_the_frame_is_raw_then_it_equals_that_of_the_lossless_image(http, padding, is_form, media_type):
    """Raw RGB8 bytes and the PNG of the same pixels get the same score, whatever lies between the rows."""
    pixels = make_frame(defect=True)
    rows = pixels.reshape(FRAME_HEIGHT, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    headers = {
        "X-Pixel-Format": "RGB8",
        "X-Width": str(FRAME_WIDTH),
        "X-Height": str(FRAME_HEIGHT),
        "X-Stride": str(padded.shape[1]),
    }

    if is_form:
        answer = http.post(INSPECT, files={"frame": ("a.raw", padded.tobytes(), media_type)}, headers=headers).json()
    else:
        answer = http.post(INSPECT, content=padded.tobytes(), headers={"Content-Type": media_type, **headers}).json()

    assert answer["score"] == http.post(INSPECT, content=DEFECT, headers=PNG).json()["score"]


@pytest.mark.parametrize("media_type", ["image/png", "application/octet-stream"])
def test_multipart_when_it_holds_one_frame_then_it_is_answered_like_the_raw_body(http, media_type):
    """The convenience path gives the same score, also where the client does not know the kind of its file."""
    answer = http.post(INSPECT, files={"frame": ("part.png", DEFECT, media_type)}).json()

    assert answer["score"] == http.post(INSPECT, content=DEFECT, headers=PNG).json()["score"]


def test_parameters_when_given_as_header_and_query_then_the_query_wins(http):
    """Both ways count, ids are echoed, and the query overrules the header."""
    headers = PNG | {"X-Part-Id": "from header", "X-View": "top", "X-Sequence": "7", "X-Request-Id": "press-4/917"}

    answer = http.post(INSPECT, params={"part_id": "from query"}, content=GOOD, headers=headers)

    told = answer.json()
    assert (told["part_id"], told["view"], told["sequence"]) == ("from query", "top", 7)
    assert told["request_id"] == answer.headers["x-request-id"] == "press-4/917"


def test_policy_when_named_then_it_judges_and_is_named_in_the_answer(http):
    """Another policy of the line gives another verdict of the same score."""
    default = http.post(INSPECT, content=GOOD, headers=PNG).json()

    strict = http.post(INSPECT, params={"policy": "strict"}, content=GOOD, headers=PNG).json()

    assert (default["verdict"], strict["verdict"]) == ("PASS", "FAIL")
    assert default["score"] == strict["score"]
    assert strict["policy"]["version"] == "strict"
    assert strict["policy"]["digest"] != default["policy"]["digest"]


def test_timings_when_told_twice_then_header_and_answer_agree_and_the_total_covers_every_stage(http):
    """`Server-Timing` and `timings_ms` are the same numbers, and no stage is outside of the total."""
    answer = http.post(INSPECT, content=GOOD, headers=PNG)

    told = answer.json()["timings_ms"]
    header = dict(entry.split(";dur=") for entry in answer.headers["server-timing"].split(", "))
    assert {stage: float(value) for stage, value in header.items()} == told
    assert list(told) == ["receive", "decode", "queue", "infer", "postprocess", "encode", "total"]
    stages = [value for stage, value in told.items() if stage != "total"]
    assert min(stages) >= 0
    assert sum(stages) <= told["total"] + 0.001 * len(told)  # each is rounded to a microsecond


@pytest.mark.parametrize("kind", ["png", "overlay", "f16"])
def test_heatmap_when_asked_for_then_its_link_works_at_once_and_every_kind_can_be_fetched(http, kind):
    """The link in the answer holds what it promises from the moment the answer is there."""
    link = http.post(INSPECT, params={"heatmap": kind}, content=DEFECT, headers=PNG).json()["heatmap"]

    picture = http.get(link["url"])

    assert picture.status_code == 200
    assert picture.headers["content-type"] == link["media_type"]
    h, w = HEIGHT // POOL, WIDTH // POOL
    if kind == "f16":
        values = np.frombuffer(picture.content, "<f2").reshape(h, w)
        assert picture.headers["flawline-shape"] == f"{h},{w}"
        assert picture.headers["flawline-window"] == f"0.0,0.0,{float(FRAME_HEIGHT)},{float(FRAME_WIDTH)}"
        assert float(values.max()) == pytest.approx(0.549, abs=1e-3)  # float16 holds three digits
    else:
        expected = (w, h) if kind == "png" else (FRAME_WIDTH, FRAME_HEIGHT)
        assert Image.open(io.BytesIO(picture.content)).size == expected


def test_heatmap_when_not_asked_for_then_there_is_none(http):
    """Without a wish nothing is kept, and asking later is an unknown inspection."""
    answer = http.post(INSPECT, content=DEFECT, headers=PNG).json()

    picture = http.get(f"/v1/inspections/{answer['inspection_id']}/heatmap")

    assert (picture.status_code, picture.json()["code"]) == (404, "unknown_inspection")


def test_heatmap_when_its_kind_is_unknown_then_422(http):
    """A kind that does not exist is a parameter that does not fit, in our form of a problem."""
    answer = http.get("/v1/inspections/any/heatmap", params={"kind": "gif"})

    assert (answer.status_code, answer.json()["code"]) == (422, "parameter_invalid")
    assert "kind" in answer.json()["detail"]


def test_picture_when_accepted_then_the_overlay_itself_comes_with_ids_and_verdict_in_headers(http):
    """`Accept: image/png` is answered with the picture, and nothing that decides is lost."""
    headers = PNG | {"Accept": "image/png", "X-Part-Id": "917"}

    answer = http.post(INSPECT, content=DEFECT, headers=headers)

    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (FRAME_WIDTH, FRAME_HEIGHT)
    assert answer.headers["flawline-verdict"] == "FAIL"
    assert answer.headers["flawline-part-id"] == "917"
    assert float(answer.headers["flawline-score"]) == http.post(INSPECT, content=DEFECT, headers=PNG).json()["score"]
    assert "total;dur=" in answer.headers["server-timing"]


def test_picture_when_it_comes_at_once_or_later_then_its_headers_prove_what_it_shows(http):
    """A picture is as good a record as the JSON: the same bundle, policy, frame and thresholds, by their digests."""
    answer = http.post(INSPECT, content=DEFECT, headers=PNG, params={"heatmap": "overlay"}).json()
    origin = {
        "flawline-bundle-version": answer["bundle"]["version"],
        "flawline-bundle-digest": answer["bundle"]["digest"],
        "flawline-policy-version": answer["policy"]["version"],
        "flawline-policy-digest": answer["policy"]["digest"],
        "flawline-frame-digest": hashlib.sha256(DEFECT).hexdigest(),
    }
    judged = {
        "flawline-review-threshold": repr(answer["thresholds"]["review"]),
        "flawline-fail-threshold": repr(answer["thresholds"]["fail"]),
        "flawline-device": answer["device"],
        "flawline-precision": answer["precision"],
    }

    at_once = http.post(INSPECT, content=DEFECT, headers=PNG | {"Accept": "image/png"}).headers
    later = http.get(answer["heatmap"]["url"]).headers

    assert dict(at_once) | origin | judged == dict(at_once)
    assert dict(later) | origin == dict(later)


def test_picture_when_the_frame_is_at_fault_then_the_problem_comes_as_json(http):
    """A client that wants a picture still gets its fault in words."""
    answer = http.post(INSPECT, content=b"no image", headers=PNG | {"Accept": "image/png"})

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["verdict"] == "NO_VERDICT"


def test_batch_when_one_frame_is_bad_then_its_neighbours_have_their_answers_in_order(http):
    """Every frame has an answer or a problem of its own, in the order of the request; nothing spreads."""
    files = [
        ("frames", ("0.png", GOOD, "image/png")),
        ("frames", ("1.png", DEFECT[:-400], "image/png")),
        ("frames", ("2.txt", b"words", "text/plain")),
        ("frames", ("3.png", DEFECT, "image/png")),
    ]

    answer = http.post(BATCH, files=files, params={"sequence": "40"}, headers={"X-Request-Id": "b-1"})

    told = BatchAnswer.model_validate(answer.json())
    verdicts = [item.verdict for item in told.items]
    assert verdicts == ["PASS", "NO_VERDICT", "NO_VERDICT", "FAIL"]
    assert [getattr(item, "code", None) for item in told.items] == [
        None,
        "unreadable_frame",
        "media_type_not_allowed",
        None,
    ]
    assert (answer.json()["items"][0]["sequence"], answer.json()["items"][3]["sequence"]) == (40, 43)
    assert told.request_id == "b-1"


def test_batch_when_heatmaps_are_wanted_then_each_frame_has_its_own(http):
    """Links of one batch lead to different pictures."""
    files = [("frames", ("a.png", GOOD, "image/png")), ("frames", ("b.png", DEFECT, "image/png"))]
    items = http.post(BATCH, files=files, params={"heatmap": "png"}).json()["items"]

    pictures = [http.get(item["heatmap"]["url"]).content for item in items]

    assert pictures[0] != pictures[1]


def test_lines_when_read_then_they_tell_what_serves_and_what_calibration_promises(http, store):
    """The line, its versions and its policies are told completely, in their published shapes."""
    lines = LinesAnswer.model_validate(http.get("/v1/lines").json())
    line = LineAnswer.model_validate(http.get("/v1/lines/demo_line").json())
    versions = VersionsAnswer.model_validate(http.get("/v1/lines/demo_line/versions").json())
    policies = PoliciesAnswer.model_validate(http.get("/v1/lines/demo_line/policies").json())

    digest = load_bundle(store / "demo_line/1").digest
    assert [(entry.line, entry.state) for entry in lines.lines] == [("demo_line", "ready")]
    assert line.live is not None
    assert line.live.bundle.digest == digest
    assert (line.live.input.height, line.live.input.width) == (HEIGHT, WIDTH)
    assert line.live.thresholds.fail.value == 0.2
    assert line.live.thresholds.fail.false_reject_rate == pytest.approx(1 / 61)
    assert line.live.thresholds.fail.false_reject_bound == pytest.approx(1 - 0.05 ** (1 / 60), rel=1e-6)
    assert [(entry.version, entry.live) for entry in versions.versions] == [("1", True)]
    assert [(entry.version, entry.default) for entry in policies.policies] == [("1", True), ("strict", False)]


def test_root_when_opened_then_it_points_to_the_documentation(http):
    """Whoever finds the port finds the documentation, which needs no other host."""
    root = http.get("/").json()

    page = http.get(root["docs"]).text

    assert "/v1/lines/{line}/inspect" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_page_when_read_then_it_shows_types_limits_defaults_and_every_error(http):
    """A caller needs no second source: what the document knows stands on the page, in words."""
    document = http.get("/openapi.json").json()

    page = http.get("/docs").text

    [pixel_format] = re.findall(r"<code>X-Pixel-Format</code></td>(.*?)</tr>", page)[:1]
    assert all(f"<code>{name}</code>" in pixel_format for name in PIXEL_FORMATS)
    [deadline] = re.findall(r"<code>deadline_ms</code></td>(.*?)</tr>", page)[:1]
    for words in ("number", "more than 0", "at most 10000", "default <code>2000</code>", "Milliseconds"):
        assert words in deadline
    for code, answer in document["components"]["responses"].items():
        assert f'id="error-{code}"' in page
        assert escape(answer["description"].partition("`")[0], quote=False) in page
    for header in document["paths"]["/v1/lines/{line}/inspect"]["post"]["responses"]["200"]["headers"]:
        assert f"<code>{header}</code>" in page
    for member in document["components"]["schemas"]["PolicyFile"]["properties"]:
        assert f"<code>{member}</code>" in page


def test_page_when_a_link_is_followed_then_it_leads_to_one_place(http):
    """The index and every name of a schema or an error are links that work without scripts."""
    page = http.get("/docs").text
    places, links = re.findall(r'id="([^"]+)"', page), re.findall(r'href="#([^"]+)"', page)

    assert len(places) == len(set(places))
    assert set(links) <= set(places)
    assert set(links) >= {"post-v1-lines-line-inspect", "get-metrics", "errors", "schema-InspectionAnswer"}


def test_headers_of_pictures_when_sent_then_they_are_those_that_are_documented(http):
    """Every header of ours that comes with a picture is described, and every one that is described comes."""
    paths = http.get("/openapi.json").json()["paths"]

    def documented(path: str, method: str) -> set[str]:
        listed = paths[path][method]["responses"]["200"]["headers"]
        return {name.lower() for name in listed if name.startswith("Flawline-")}

    def sent(answer: httpx.Response) -> set[str]:
        return {name for name in answer.headers if name.startswith("flawline-")}

    at_once = http.post(INSPECT, content=DEFECT, headers=PNG | {"Accept": "image/png", "X-Part-Id": "917"})
    link = http.post(INSPECT, params={"heatmap": "f16"}, content=DEFECT, headers=PNG).json()["heatmap"]["url"]
    later = http.get(link)

    assert sent(at_once) == documented("/v1/lines/{line}/inspect", "post")
    assert sent(later) == documented("/v1/inspections/{inspection_id}/heatmap", "get")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("PUT", INSPECT, 405, "method_not_allowed"), ("GET", "/v1/nothing", 404, "not_found")],
)
def test_errors_of_no_operation_when_answered_then_the_document_knows_them(http, method, path, status, code):
    """What any request may be answered with stands in the table of errors, and in the document's own words."""
    document = http.get("/openapi.json").json()

    answer = http.request(method, path)

    [content] = document["components"]["responses"][code]["content"].values()
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert content["examples"][code]["value"]["title"] == answer.json()["title"]
    assert f"{status} `{code}`" in document["info"]["description"]


def test_metrics_when_frames_were_answered_then_verdicts_and_stages_are_counted(http):
    """What was answered shows under the names that dashboards use."""
    http.post(INSPECT, content=DEFECT, headers=PNG)

    text = http.get("/metrics").text

    assert 'flawline_inspections_total{line="demo_line",verdict="FAIL",version="1"}' in text
    for stage in ("receive", "decode", "queue", "infer", "postprocess", "encode", "total"):
        assert f'flawline_stage_duration_seconds_count{{line="demo_line",stage="{stage}"}}' in text


def test_metrics_when_scraped_then_are_written_down_beside_the_loop(http, monkeypatch):
    """Of many lines that takes tens of milliseconds, in which frames would wait."""
    wrote = []
    write = Snapshot.exposition

    def noted(taken, accepted):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        wrote.append(accepted)
        return write(taken, accepted)

    monkeypatch.setattr(Snapshot, "exposition", noted)

    assert http.get("/metrics").status_code == 200

    assert len(wrote) == 1


def test_image_quality_when_a_heatmap_is_asked_for_then_it_is_measured_on_the_same_picture(store):
    """Lamp and lens are told of by what the network takes, whatever else a caller wants of a frame."""
    frame = encode(make_frame(240, 320, seed=7))

    def measured(heatmap: str) -> set[str]:
        with serve_in_thread(Settings(store_directory=store)) as http:
            wait_until_ready(http)
            answer = http.post(INSPECT, content=frame, headers=PNG, params={"heatmap": heatmap})
            assert answer.json()["verdict"] == "PASS"
            lines = http.get("/metrics").text.splitlines()
        return {line for line in lines if line.startswith("flawline_image_quality{")}

    without, with_one = measured("none"), measured("overlay")

    assert len(without) == 4
    assert with_one == without


def test_batch_when_a_part_names_its_kind_twice_then_it_alone_has_no_verdict(http):
    """Which of two kinds was meant is not guessed, and the neighbour is answered."""
    head = b'--x\r\nContent-Disposition: form-data; name="frames"; filename="a.png"\r\nContent-Type: image/png\r\n'
    body = head + b"Content-Type: image/jpeg\r\n\r\n" + GOOD + b"\r\n" + head + b"\r\n" + GOOD + b"\r\n--x--\r\n"

    answer = http.post(BATCH, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})

    refused, judged = answer.json()["items"]
    assert (refused["verdict"], refused["code"]) == ("NO_VERDICT", "parameter_invalid")
    assert judged["verdict"] == "PASS"
