"""Wire types: what the parameters of a request may be, and what answers look like. No behaviour, no HTTP.

Answers are built as plain dictionaries on the hot path; the models here document them, and a test holds every real
answer against its model.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.contract.policy import Verdict

HeatmapKind = Literal["none", "png", "overlay", "f16"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
# Printable ASCII without the quote and the backslash, so that ids pass headers, logs and shells unharmed.
Identifier = Annotated[str, Field(pattern=r"^[ !#-\[\]-~]{1,128}$")]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InspectionOptions(_Wire):
    """What a request may say beside the frame; each as a query parameter or as a header, and the query wins.

    Attributes:
        part_id: of the part in front of the camera; echoed and recorded.
        view: which view of the part the frame shows; echoed and recorded.
        sequence: running number of the camera; echoed and recorded.
        deadline_ms: time from the arrival of the request to its answer; the server's own limit where absent.
        heatmap: which heatmap the answer links to; `none` keeps nothing for it.
        policy: version of the line's policy to judge by; the live one where absent.
        bundle_version: version to judge with; the live one where absent.
    """

    part_id: Identifier | None = None
    view: Identifier | None = None
    sequence: int | None = Field(default=None, ge=0, le=2**63 - 1)
    deadline_ms: float | None = Field(default=None, gt=0, le=600_000, allow_inf_nan=False)
    heatmap: HeatmapKind = "none"
    policy: Name | None = None
    bundle_version: Version | None = None


class RawFrameOptions(_Wire):
    """Layout of an `application/x-raw-frame` body, from the headers `X-Pixel-Format`, `X-Width`, `X-Height`, ...

    Attributes:
        pixel_format: GenICam name.
        width: pixels a row.
        height: rows.
        stride: bytes from row to row; without padding where absent.
    """

    pixel_format: Literal["Mono8", "Mono10", "Mono12", "Mono16", "BayerRG8", "RGB8", "BGR8"]
    width: int = Field(gt=0, le=2**31 - 1)
    height: int = Field(gt=0, le=2**31 - 1)
    stride: int | None = Field(default=None, gt=0, le=2**31 - 1)


class Versioned(_Wire):
    """A version and the SHA-256 that pins it."""

    version: str
    digest: str


class Thresholds(_Wire):
    """`score >= review` is at least REVIEW, `score >= fail` is FAIL."""

    review: float
    fail: float


class FrameSize(_Wire):
    """Of the original frame, in pixels."""

    height: int
    width: int


class Box(_Wire):
    """Bounding box in pixels of the original frame."""

    x: float
    y: float
    width: float
    height: float


class RegionAnswer(_Wire):
    """A connected component of the thresholded map; `polygon` holds `[x, y]` points in pixels of the original frame."""

    box: Box
    polygon: list[tuple[float, float]]
    area_px: float
    peak: float
    mean: float


class HeatmapLink(_Wire):
    """Where the heatmap lies while it is kept."""

    kind: HeatmapKind
    media_type: str
    url: str


class Timings(_Wire):
    """Milliseconds by stage; the same stand in the `Server-Timing` header."""

    receive: float
    decode: float
    queue: float
    infer: float
    postprocess: float
    encode: float
    total: float


class InspectionAnswer(_Wire):
    """One frame's complete answer."""

    verdict: Verdict
    score: float
    p_value: float
    thresholds: Thresholds
    regions: list[RegionAnswer]
    regions_total: int
    inspection_id: str
    request_id: str
    part_id: str | None
    view: str | None
    sequence: int | None
    line: str
    bundle: Versioned
    policy: Versioned
    detector: str
    device: str
    frame: FrameSize
    heatmap: HeatmapLink | None
    timings_ms: Timings


class ProblemDocument(BaseModel):
    """RFC 9457; `code` is stable, `detail` says what to do, and the verdict is always `NO_VERDICT`."""

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    code: str
    detail: str
    verdict: Literal["NO_VERDICT"]
    request_id: str
    line: str | None = None


class BatchAnswer(_Wire):
    """One entry a frame, in the order of the request: an answer, or the problem of that frame alone."""

    request_id: str
    items: list[InspectionAnswer | ProblemDocument]
