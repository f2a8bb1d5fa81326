"""What is asked of one frame and what is answered: plain data that the pipeline, the records and the metrics share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import Frame
from service.contract.policy import Judgement, Policy
from service.contract.raw_frames import PixelFormat
from service.contract.regions import Window
from service.errors import UnreadableFrame
from service.scheduling.schedule import Priority

HeatmapKind = Literal["none", "png", "overlay", "f16"]


@dataclass(frozen=True)
class RawLayout:
    """How raw sensor bytes lie.

    Attributes:
        pixel_format: GenICam name.
        width: pixels a row.
        height: rows.
        stride: bytes from one row to the next; None where rows follow each other without padding.
    """

    pixel_format: PixelFormat
    width: int
    height: int
    stride: int | None


@dataclass(frozen=True)
class InspectionRequest:
    """What a caller asks of one frame.

    Attributes:
        line: name of the product line.
        data: the encoded image, or raw sensor bytes where `raw` is given.
        raw: layout of raw sensor bytes; None for an encoded image.
        part_id: the caller's own name of the part.
        view: the caller's own name of the view.
        sequence: the caller's own number of the frame.
        deadline_s: seconds after `received_at`; None takes the service's default.
        policy_version: None takes the line's default policy.
        heatmap: which picture of the map is wanted.
        request_id: under which the request is logged.
        received_at: monotonic seconds, when the first byte of the request was read.
        receive_s: seconds spent receiving the body.
        bundle_version: None takes the live one.
        trace_parent: the caller's `traceparent`, as W3C Trace Context writes it.
        is_network_input: whether `data` is the canvas itself, which the network takes or is cut for it, `(H, W, 3)`
            uint8 RGB row by row. It is neither decoded nor resized; then that is the frame whose pixels regions refer
            to.
        priority: how much the frame matters beside others.
        told_digest: SHA-256 of `data` as its sender tells it, in hexadecimal digits; empty where none is told.
    """

    line: str
    data: bytes
    raw: RawLayout | None
    part_id: str | None
    view: str | None
    sequence: int | None
    deadline_s: float | None
    policy_version: str | None
    heatmap: HeatmapKind
    request_id: str
    received_at: float
    receive_s: float
    bundle_version: str | None = None
    trace_parent: str | None = None
    is_network_input: bool = False
    priority: Priority = Priority.NORMAL
    told_digest: str = ""


@dataclass(frozen=True, eq=False)
class Inspection:
    """One frame's complete answer.

    Attributes:
        inspection_id: 32 hexadecimal digits.
        request: what was asked.
        line: name of the product line.
        bundle_version: of the bundle that judged.
        bundle_digest: SHA-256 of its manifest.
        policy_version: of the policy that judged.
        policy_digest: SHA-256 of its canonical JSON.
        frame_digest: SHA-256 of the frame's bytes as they came: of the file, or of the sensor's bytes.
        detector: method of the bundle.
        device: where the engine ran.
        precision: that it computed in.
        judgement: verdict, score and regions.
        p_value: share of calibration good parts at least this anomalous, in (0, 1]; None where the policy does not
            score as these were scored.
        review_threshold: of the policy.
        fail_threshold: of the policy.
        frame: its size, and pixels that may be smaller; without a heatmap to draw, just what the network took.
        canvas: `(H, W, 3)` uint8 RGB, what the network took, or was cut from; the same whatever is asked for.
        anomaly_map: `(h, w)` float32, in the units of the thresholds.
        window: where the map lies on the original frame, `(top, left, height, width)` in its pixels.
        policy: that judged.
        batch_size: frames in the batch that this one ran in.
        batch_number: of that batch, among those of the bundle's engine.
        timings_s: seconds by stage: receive, decode, queue, infer, postprocess.
        deadline_s: seconds after the arrival by which the answer was due.
    """

    inspection_id: str
    request: InspectionRequest
    line: str
    bundle_version: str
    bundle_digest: str
    policy_version: str
    policy_digest: str
    frame_digest: str
    detector: str
    device: str
    precision: str
    judgement: Judgement
    p_value: float | None
    review_threshold: float
    fail_threshold: float
    frame: Frame
    canvas: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    window: Window
    policy: Policy
    batch_size: int
    batch_number: int
    timings_s: Mapping[str, float]
    deadline_s: float


def digest_differs() -> UnreadableFrame:
    """Return what is said of bytes that are not those whose digest they were sent with."""
    return UnreadableFrame(
        "The bytes are not those that Content-Digest tells of, some were lost or changed on their way; send them as "
        "the camera wrote them."
    )
