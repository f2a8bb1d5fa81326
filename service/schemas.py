"""Wire types: what the parameters of a request may be, and what answers look like. No behaviour, no HTTP.

Answers are built as plain dictionaries on the hot path; the models here document them, and a test holds every real
answer against its model. What a docstring says under `Attributes:` is what OpenAPI and `/docs` say of the members.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

from service.contract.policy import CalibrationKind, Policy, Verdict
from service.contract.raw_frames import PixelFormat
from service.inspection import HeatmapKind
from service.lines.live import LineState, VersionState

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_VERSION = r"^[1-9][0-9]{0,8}$"
# Printable ASCII without the quote and the backslash, so that ids pass headers, logs and shells unharmed.
_IDENTIFIER = r"^[ !#-\[\]-~]{1,128}$"
Name = Annotated[str, Field(pattern=_NAME)]
Version = Annotated[str, Field(pattern=_VERSION)]
# Blanks before and after it do not count: HTTP takes them from a header, and a PLC fills its strings with them.
Identifier = Annotated[str, StringConstraints(strip_whitespace=True, pattern=_IDENTIFIER)]

# What each pattern means, for callers who should not have to read one.
WORDS_OF_PATTERN = {
    _NAME: "1 to 64 letters, digits, dots, dashes or underscores, and not one of the last three first",
    _VERSION: "a positive whole number of at most 9 digits",
    _IDENTIFIER: "1 to 128 printable ASCII characters without quotes and backslashes",
}


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InspectionOptions(_Wire):
    """What a request may say beside the frame; each as a query parameter or as a header, and the query wins.

    Attributes:
        part_id: the part in front of the camera; echoed and recorded, without blanks before and after it.
        view: which view of the part the frame shows; echoed and recorded, without blanks before and after it.
        sequence: running number of the camera; echoed and recorded.
        deadline_ms: milliseconds from the first byte that the server reads to its answer. A longer time than the
            operator allows (`FLAWLINE_MAX_DEADLINE_S`) is refused; where absent, `FLAWLINE_DEFAULT_DEADLINE_S` counts.
        priority: `low` lets every frame of normal priority go first, and is refused sooner where the queue fills.
        heatmap: which picture of the anomalies is kept for a while, where the answer's `heatmap.url` says: `overlay` is
            the frame painted over, `png` the map in grey, `f16` its values; `none` keeps nothing.
        policy: version of the line's policy to judge by. The live one where absent; a key needs the action `choose` to
            name another.
        bundle_version: version of the line's bundle to judge with. The live one where absent; a key needs the action
            `choose` to name another.
    """

    part_id: Identifier | None = Field(default=None, examples=["0815"])
    view: Identifier | None = Field(default=None, examples=["top"])
    sequence: int | None = Field(default=None, ge=0, le=2**63 - 1, examples=[917])
    deadline_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[200])
    priority: Literal["normal", "low"] = "normal"
    heatmap: HeatmapKind = "none"
    policy: Name | None = Field(default=None, examples=["strict"])
    bundle_version: Version | None = Field(default=None, examples=["3"])


class RawFrameOptions(_Wire):
    """Layout of an `application/x-raw-frame` body, from the headers `X-Pixel-Format`, `X-Width`, `X-Height`, ...

    Attributes:
        pixel_format: GenICam name of the pixels' layout. How many bits the values of deep formats may have is said by
            the line's `input.bit_depth`.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; rows follow each other without padding where absent.
    """

    pixel_format: PixelFormat = Field(examples=["Mono8"])
    width: int = Field(gt=0, le=2**31 - 1, examples=[2448])
    height: int = Field(gt=0, le=2**31 - 1, examples=[2048])
    stride: int | None = Field(default=None, gt=0, le=2**31 - 1, examples=[2560])


class Versioned(_Wire):
    """A version and the SHA-256 that pins it.

    Attributes:
        version: its name.
        digest: SHA-256, 64 hexadecimal digits.
    """

    version: str
    digest: str


class Thresholds(_Wire):
    """What the score is compared with.

    Attributes:
        review: from this score on the verdict is at least `REVIEW`.
        fail: from this score on the verdict is `FAIL`.
    """

    review: FiniteFloat
    fail: FiniteFloat


class FrameSize(_Wire):
    """A size in pixels; of a frame, that of the original.

    Attributes:
        height: pixels.
        width: pixels.
    """

    height: int
    width: int


class InspectedFrame(FrameSize):
    """Size of the original frame, and what was judged.

    Attributes:
        digest: SHA-256 of its bytes as they were sent; older servers do not tell it.
    """

    digest: str | None = None


class Box(_Wire):
    """Bounding box in pixels of the original frame.

    Attributes:
        x: of its left edge.
        y: of its upper edge.
        width: pixels.
        height: pixels.
    """

    x: float
    y: float
    width: float
    height: float


class RegionAnswer(_Wire):
    """A connected component of the thresholded map.

    Attributes:
        box: that surrounds it.
        polygon: its outline, `[x, y]` points in pixels of the original frame.
        area_px: its area, in pixels of the original frame.
        peak: largest value of the map in it, in the units of the thresholds.
        mean: mean value of the map in it, in the units of the thresholds.
    """

    box: Box
    polygon: list[tuple[float, float]]
    area_px: float
    peak: float
    mean: float


class HeatmapLink(_Wire):
    """Where the heatmap lies while it is kept.

    Attributes:
        kind: that was asked for.
        media_type: of what lies there.
        url: below the address of the server.
    """

    kind: HeatmapKind
    media_type: str
    url: str


class Timings(_Wire):
    """Milliseconds by stage; the same stand in the `Server-Timing` header.

    Attributes:
        receive: until all of the frame was there.
        decode: decoding and resizing.
        queue: waiting for the engine.
        infer: the engine's run.
        postprocess: from the run to the verdict and its regions.
        encode: writing the answer.
        total: from the first byte of the request to the answer.
    """

    receive: float
    decode: float
    queue: float
    infer: float
    postprocess: float
    encode: float
    total: float


class InspectionAnswer(_Wire):
    """One frame's complete answer.

    With `calibration` `good_parts` the thresholds rest on good parts, and `p_value` is the share of these that are at
    least this anomalous; it is null where the policy inspects another region of interest than the bundle's own, because
    these were not scored so. With `self` the frame was measured by itself, because its line's policy says so: score and
    thresholds are in units of the spread of the frame's own map, nothing is promised, and `p_value` is null.

    The verdict rests on the score, and a region on single map values that lie above the peaks of good parts. So a frame
    may fail without a region, where a faint change covers much of it; the heatmap then shows where.

    Attributes:
        verdict: `PASS`, `REVIEW` or `FAIL`. Whatever else stands here is to be treated as `FAIL` is.
        score: how anomalous the frame is, in the units of the thresholds.
        p_value: share of good parts that are at least this anomalous, above 0 and at most 1; null where that is not
            known.
        calibration: where the thresholds come from.
        thresholds: of the policy that judged.
        regions: where the anomalies are, the highest peak first; at most `max_regions` of the policy.
        regions_total: how many there are, those that are not described among them.
        inspection_id: of this inspection; its heatmap and its record have it too.
        request_id: that the caller sent, or was given.
        part_id: that the caller sent.
        view: that the caller sent.
        sequence: that the caller sent; of a batch, counted on.
        line: that was asked.
        bundle: that judged.
        policy: that judged.
        detector: method of the bundle.
        device: that the engine ran on.
        precision: that the engine computed in: fp32, fp16, int8 or bf16.
        frame: that was judged.
        heatmap: null where none was asked for.
        timings_ms: where the time went, in milliseconds.
    """

    verdict: Verdict
    score: FiniteFloat
    p_value: FiniteFloat | None
    calibration: CalibrationKind
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
    precision: str
    frame: InspectedFrame
    heatmap: HeatmapLink | None
    timings_ms: Timings


class ProblemDocument(BaseModel):
    """RFC 9457; `code` is stable, `detail` says what to do, and the verdict is always `NO_VERDICT`.

    What the caller named the part stands there where it fits, each by itself.

    Attributes:
        type: the code as a URN.
        title: the kind of problem in a few words.
        status: of HTTP, once more.
        code: which of the errors it is; names stay, and new ones may come.
        detail: what happened and what to do, for people.
        verdict: the part has none.
        request_id: that the caller sent, or was given; the log has it too.
        line: that was asked, where one was.
        part_id: that the caller sent.
        view: that the caller sent.
        sequence: that the caller sent; of a batch, counted on.
    """

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    code: str
    detail: str
    verdict: Literal["NO_VERDICT"]
    request_id: str
    line: str | None = None
    part_id: str | None = None
    view: str | None = None
    sequence: int | None = None


class BatchAnswer(_Wire):
    """One entry a frame, in the order of the request.

    Attributes:
        request_id: that the caller sent, or was given.
        items: for each frame its answer, or the problem of that frame alone.
    """

    request_id: str
    items: list[InspectionAnswer | ProblemDocument]


class LineSummary(_Wire):
    """How a line stands; what serves it is null until it was loaded.

    Attributes:
        line: its name.
        state: `ready` answers; `loading` and `unloaded` are not in memory now; `refused` and `unhealthy` have no
            verdicts until somebody acts.
        reason: why it is not ready, or has no verdicts by its default policy.
        bundle: that serves it.
        detector: method of the bundle.
        device: that the engine runs on.
        precision: that the engine computes in: fp32, fp16, int8 or bf16.
    """

    line: str
    state: LineState
    reason: str | None
    bundle: Versioned | None
    detector: str | None
    device: str | None
    precision: str | None


class LinesAnswer(_Wire):
    """Every line that the caller may know of.

    Attributes:
        lines: one entry each.
    """

    lines: list[LineSummary]


class ThresholdAnswer(_Wire):
    """A threshold of the default policy and what calibration promises of it.

    Attributes:
        value: from this score on, a frame is anomalous.
        false_reject_rate: of good parts, on average over calibration sets; null where calibration can't tell.
        false_reject_bound: with 95 % confidence the rate is at most this; null where calibration can't tell.
        good_parts: calibration parts behind both, each of one frame or more; 0 where the line is not calibrated, and
            where the default policy does not score as they were scored: it measures frames by themselves, or inspects
            another region of interest than the bundle's own.
    """

    value: float
    false_reject_rate: float | None
    false_reject_bound: float | None
    good_parts: int


class LineThresholds(_Wire):
    """Of the default policy.

    Attributes:
        review: of `REVIEW`.
        fail: of `FAIL`.
    """

    review: ThresholdAnswer
    fail: ThresholdAnswer


class InspectedWindow(_Wire):
    """Which part of a frame the network sees, in fractions of the frame.

    Attributes:
        top: of its upper edge.
        left: of its left edge.
        height: fraction of the frame's height.
        width: fraction of the frame's width.
    """

    top: float
    left: float
    height: float
    width: float


class MetricAnswer(_Wire):
    """One figure of the evaluation; an undefined one is null and says why.

    Attributes:
        value: on the frames that it was tested on.
        reason: why there is no value.
        low: lower end of its confidence interval.
        high: upper end of its confidence interval.
    """

    value: float | None
    reason: str | None
    low: float | None
    high: float | None


class LiveAnswer(_Wire):
    """What serves a line.

    Attributes:
        bundle: version that is live.
        detector: its method.
        backbone: network whose features it uses; null where it has none.
        device: that the engine runs on.
        provider: what runs the engine there, in the runtime's own word.
        precision: that the engine computes in: fp32, fp16, int8 or bf16.
        input: what frames are resized and cropped to.
        tiles: network inputs that this is cut into; 1 where frames are looked at whole.
        anomaly_map: size of the map.
        inspected: which part of a frame the network sees.
        default_policy: version of the policy that judges where the caller names none.
        calibration: of the default policy; with `none` it gives no verdict.
        policies: versions that may be asked for.
        thresholds: of the default policy, and what calibration promises of them.
        metrics: figures of the evaluation, by name.
        created_at: when the bundle was made, ISO 8601.
    """

    bundle: Versioned
    detector: str
    backbone: str | None
    device: str
    provider: str
    precision: str
    input: FrameSize
    tiles: int
    anomaly_map: FrameSize
    inspected: InspectedWindow
    default_policy: str
    calibration: CalibrationKind | Literal["none"]
    policies: list[str]
    thresholds: LineThresholds
    metrics: dict[str, MetricAnswer]
    created_at: str


class LineAnswer(_Wire):
    """How one line stands, why it is not ready, and what serves it.

    Attributes:
        line: its name.
        state: `ready` answers; `loading` and `unloaded` are not in memory now; `refused` and `unhealthy` have no
            verdicts until somebody acts.
        reason: why it is not ready, or has no verdicts by its default policy.
        live: what serves it; null where nothing does.
    """

    line: str
    state: LineState
    reason: str | None
    live: LiveAnswer | None


class VersionAnswer(_Wire):
    """One version that is loaded or lies in the store.

    Attributes:
        version: its number.
        live: whether it answers who names no version.
        state: `live`; `kept` is loaded for rolling back and answers who names it; `shadow` looks on and answers nobody;
            `loading`, `refused` and `stored` are not loaded.
        reason: why it was refused, or that the live one is gone from the store.
    """

    version: str
    live: bool
    state: VersionState
    reason: str | None


class VersionsAnswer(_Wire):
    """Every version of a line's bundle.

    Attributes:
        line: its name.
        versions: the oldest first.
    """

    line: str
    versions: list[VersionAnswer]


class AdminVersionAnswer(_Wire):
    """One version of a bundle, as administrators see it.

    Attributes:
        version: its number.
        state: `live`; `kept` is loaded for rolling back and answers who names it; `shadow` looks on and answers nobody;
            `loading`, `refused` and `stored` are not loaded.
        reason: why it was refused, or that the live one is gone from the store.
        held_back: whether it becomes live only when it is activated by name.
        lines: that it serves, or would.
        size_bytes: memory that its engine takes; null where it is not loaded.
    """

    version: str
    state: VersionState
    reason: str | None
    held_back: bool
    lines: list[str]
    size_bytes: int | None


class BundleAnswer(_Wire):
    """A bundle and its versions.

    Attributes:
        bundle: its name.
        lines: that it serves, or would.
        versions: the oldest first.
    """

    bundle: str
    lines: list[str]
    versions: list[AdminVersionAnswer]


class _Remembered(_Wire):
    """Whether what administrators chose so far counts again after a restart, and why not.

    Attributes:
        remembered: whether all of it does.
        why_forgotten: null where it does.
    """

    remembered: bool
    why_forgotten: str | None


class ChangedBundleAnswer(BundleAnswer, _Remembered):
    """A bundle after a change, and whether the change outlives the process (`why_forgotten` says why not)."""


class ChangedLineAnswer(LineSummary, _Remembered):
    """A line after a change, and whether the change outlives the process (`why_forgotten` says why not)."""


class AdminLineAnswer(_Wire):
    """One line, as administrators see it; what serves it is null where nothing does.

    Attributes:
        line: its name.
        state: `ready` answers; `loading` and `unloaded` are not in memory now; `refused` and `unhealthy` have no
            verdicts until somebody acts.
        reason: why it is not ready, or has no verdicts by its default policy.
        bundle: name of the bundle that serves it, or means to.
        version: of that bundle.
        policy: that judges where the caller names none.
        policies: that may be asked for or activated.
        device: that the engine runs on.
        precision: that the engine computes in: fp32, fp16, int8 or bf16.
    """

    line: str
    state: LineState
    reason: str | None
    bundle: str | None
    version: str | None
    policy: str | None
    policies: list[str]
    device: str | None
    precision: str | None


class AdminLinesAnswer(_Remembered):
    """Every line that the key covers.

    Attributes:
        lines: one entry each.
    """

    lines: list[AdminLineAnswer]


class BundlesAnswer(_Wire):
    """Every bundle that the key covers.

    Attributes:
        bundles: one entry each.
    """

    bundles: list[BundleAnswer]


class VersionOf(_Wire):
    """A version of a bundle.

    Attributes:
        bundle: its name.
        version: its number.
    """

    bundle: str
    version: str


class RefusedAnswer(VersionOf):
    """A version that was not taken into use.

    Attributes:
        reason: why.
    """

    reason: str


class PolicyRefusedAnswer(_Wire):
    """A policy file that is not offered as it lies in the store.

    Attributes:
        line: whose it is.
        version: that it would have.
        reason: why, and what to do.
    """

    line: str
    version: str
    reason: str


class JudgedAnswer(_Wire):
    """What the live version or its shadow said of a frame.

    Attributes:
        bundle_version: that judged.
        bundle_digest: SHA-256 of that bundle's manifest; older servers do not tell it.
        policy_version: that judged.
        policy_digest: SHA-256 of that policy; older servers do not tell it.
        verdict: `NO_VERDICT` where it failed.
        score: null where it failed.
        review_threshold: of the policy.
        fail_threshold: of the policy.
    """

    bundle_version: str
    bundle_digest: str | None = None
    policy_version: str
    policy_digest: str | None = None
    verdict: Verdict
    score: float | None
    review_threshold: float
    fail_threshold: float


class DisagreementAnswer(_Wire):
    """A frame on which the shadow would have said something else.

    Attributes:
        inspection_id: of the answer that was given.
        part_id: that the caller sent.
        frame_digest: SHA-256 of the frame's bytes as they came; older servers do not tell it.
        at: when, ISO 8601.
        kind: `stricter` and `laxer` compare the verdicts, `no_verdict` says that the shadow failed.
        live: what was answered.
        shadow: what the shadow would have answered.
    """

    inspection_id: str
    part_id: str | None
    frame_digest: str | None = None
    at: str
    kind: Literal["stricter", "laxer", "no_verdict"]
    live: JudgedAnswer
    shadow: JudgedAnswer


class DisagreementsAnswer(_Wire):
    """What is kept of a line.

    Attributes:
        line: its name.
        disagreements: the newest first.
    """

    line: str
    disagreements: list[DisagreementAnswer]


class RescanAnswer(_Wire):
    """What a look at the store has changed; policies are named as `<line>/<version>`.

    Attributes:
        activated: versions that became live.
        refused: versions that did not hold.
        policies: that are offered now, and were not before.
        withdrawn: policies whose file is gone, or no longer for the network that serves.
        refused_policies: policy files that do not hold, at every look until they do.
        gone: live versions that were removed from the store and serve on, at every look until another one is live.
    """

    activated: list[VersionOf]
    refused: list[RefusedAnswer]
    policies: list[str]
    withdrawn: list[str] = []
    refused_policies: list[PolicyRefusedAnswer] = []
    gone: list[RefusedAnswer] = []


class PolicyAnswer(_Wire):
    """One policy of a line.

    Attributes:
        version: its name.
        digest: SHA-256 of its rules.
        default: whether it judges where the caller names none.
        policy: its rules. The file of a policy in the store holds these and `network`, see `PolicyFile`.
    """

    version: str
    digest: str
    default: bool
    policy: Policy


class PoliciesAnswer(_Wire):
    """Every policy of a line, and its policy files that are not offered as they lie in the store.

    Attributes:
        line: its name.
        network: what a policy file must name as its own to judge by the scores of the version that serves; null where
            none does.
        policies: by version.
        refused: files that are not offered.
    """

    line: str
    network: str | None
    policies: list[PolicyAnswer]
    refused: list[PolicyRefusedAnswer]
