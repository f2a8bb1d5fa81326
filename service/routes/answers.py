"""Turns an inspection into what goes over the wire; built as plain dictionaries, since this is the hot path.

`service/schemas.py` documents the same shapes as models, and tests hold every real answer against them.
"""

from typing import Any
from urllib.parse import quote

from fastapi import Response

from service.contract.regions import Region
from service.inspection import Inspection
from service.records import HeatmapRecord

MEDIA_TYPE_OF_HEATMAP = {"png": "image/png", "overlay": "image/png", "f16": "application/octet-stream"}
_DECIMALS = 2  # of coordinates; hundredths of a pixel say more than any map knows
STAGES = ("receive", "decode", "queue", "infer", "postprocess")


class Written(Response):
    """An inspection's answer; the framework's own writes each header anew.

    Args:
        body: the JSON document.
        timings: its `timings_ms`, as JSON.
    """

    def __init__(self, body: bytes, timings: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [
            (b"server-timing", server_timing(timings)),
            (b"content-length", b"%d" % len(body)),
            (b"content-type", b"application/json"),
        ]


def describe(inspection: Inspection) -> dict[str, Any]:
    """Return an answer's members, all but `timings_ms`."""
    request, judgement = inspection.request, inspection.judgement
    return {
        "verdict": judgement.verdict.value,
        "score": judgement.score,
        "p_value": inspection.p_value,
        "calibration": inspection.policy.calibration,
        "thresholds": {"review": inspection.review_threshold, "fail": inspection.fail_threshold},
        "regions": [_describe_region(region) for region in judgement.regions],
        "regions_total": judgement.regions_total,
        "inspection_id": inspection.inspection_id,
        "request_id": request.request_id,
        "part_id": request.part_id,
        "view": request.view,
        "sequence": request.sequence,
        "line": inspection.line,
        "bundle": {"version": inspection.bundle_version, "digest": inspection.bundle_digest},
        "policy": {"version": inspection.policy_version, "digest": inspection.policy_digest},
        "detector": inspection.detector,
        "device": inspection.device,
        "precision": inspection.precision,
        "frame": {
            "height": inspection.frame.height,
            "width": inspection.frame.width,
            "digest": inspection.frame_digest,
        },
        "heatmap": _link(inspection),
    }


def timings_ms(inspection: Inspection, encode_s: float, total_s: float) -> dict[str, float]:
    """Return milliseconds by stage, with the two stages that only the edge can know."""
    spent = inspection.timings_s
    milliseconds = {stage: round(spent[stage] * 1000, 3) for stage in STAGES}
    milliseconds["encode"] = round(encode_s * 1000, 3)
    milliseconds["total"] = round(total_s * 1000, 3)
    return milliseconds


def with_timings(answer: bytes, timings: bytes) -> bytes:
    """Append `timings_ms` to an encoded object, so that encoding the answer is itself part of the timing."""
    return b'%b,"timings_ms":%b}' % (answer[:-1], timings)


def server_timing(timings: bytes) -> bytes:
    """Return the value of the `Server-Timing` header, of what `timings_ms` is as JSON: its numbers are written once."""
    return timings[2:-1].replace(b',"', b", ").replace(b'":', b";dur=")


def headers_of_origin(judged: Inspection | HeatmapRecord) -> dict[str, str]:
    """Return as headers which bundle and policy judged which frame, for whatever is shown of it."""
    return {
        "Flawline-Bundle-Version": judged.bundle_version,
        "Flawline-Bundle-Digest": judged.bundle_digest,
        "Flawline-Policy-Version": judged.policy_version,
        "Flawline-Policy-Digest": judged.policy_digest,
        "Flawline-Frame-Digest": judged.frame_digest,
    }


def identity_headers(inspection: Inspection) -> dict[str, str]:
    """Return as headers what the JSON says of the verdict and where it comes from, where the body is a picture."""
    judgement = inspection.judgement
    headers = {
        "Flawline-Inspection-Id": inspection.inspection_id,
        "Flawline-Verdict": judgement.verdict.value,
        "Flawline-Score": repr(judgement.score),
        "Flawline-Review-Threshold": repr(inspection.review_threshold),
        "Flawline-Fail-Threshold": repr(inspection.fail_threshold),
        "Flawline-Calibration": inspection.policy.calibration,
        "Flawline-Line": inspection.line,
        "Flawline-Device": inspection.device,
        "Flawline-Precision": inspection.precision,
        **headers_of_origin(inspection),
    }
    if inspection.p_value is not None:
        headers["Flawline-P-Value"] = repr(inspection.p_value)
    if inspection.request.part_id is not None:
        headers["Flawline-Part-Id"] = inspection.request.part_id
    return headers


def _link(inspection: Inspection) -> dict[str, str] | None:
    kind = inspection.request.heatmap
    if kind == "none":
        return None
    url = f"/v1/inspections/{quote(inspection.inspection_id)}/heatmap?kind={kind}"
    return {"kind": kind, "media_type": MEDIA_TYPE_OF_HEATMAP[kind], "url": url}


def _describe_region(region: Region) -> dict[str, Any]:
    box = {"x": region.x, "y": region.y, "width": region.width, "height": region.height}
    return {
        "box": {side: round(value, _DECIMALS) for side, value in box.items()},
        "polygon": [(round(x, _DECIMALS), round(y, _DECIMALS)) for x, y in region.polygon],
        "area_px": round(region.area_px, _DECIMALS),
        "peak": region.peak,
        "mean": region.mean,
    }
