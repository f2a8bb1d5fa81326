"""What is kept after the answer: the last heatmaps' sources, so that a picture is made only for those who ask for it.

Bounded by count and by bytes; the oldest leave first and are counted. Safe to use from several threads: making a record
shrinks the frame, which is work for a worker thread.
"""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.frames import encode_png, resize_pixels
from service.contract.heatmaps import grey_heatmap, overlay
from service.contract.policy import Policy
from service.contract.regions import Region, Window
from service.errors import UnknownInspection
from service.inspection import Inspection
from service.observability.telemetry import Telemetry

LARGEST_SIDE = 1024

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class HeatmapRecord:
    """What a heatmap is drawn from.

    Attributes:
        inspection_id: whose heatmap it is.
        line: of the inspection; who may not read the line may not read this.
        bundle_version: of the bundle that judged.
        bundle_digest: of it.
        policy_version: of the policy that judged.
        policy_digest: of it.
        frame_digest: SHA-256 of the frame's bytes as they came.
        anomaly_map: `(h, w)` float16.
        pixels: `(H, W, 3)` uint8 RGB, the frame with sides of at most `LARGEST_SIDE`.
        policy: that judged.
        regions: in pixels of the original frame.
        window: where the map lies on the original frame, in its pixels.
        frame_size: `(height, width)` of the original frame.
    """

    inspection_id: str
    line: str
    bundle_version: str
    bundle_digest: str
    policy_version: str
    policy_digest: str
    frame_digest: str
    anomaly_map: NDArray[np.float16]
    pixels: NDArray[np.uint8]
    policy: Policy
    regions: tuple[Region, ...]
    window: Window
    frame_size: tuple[int, int]

    @property
    def size_bytes(self) -> int:
        """Memory that the arrays take."""
        return self.anomaly_map.nbytes + self.pixels.nbytes

    def render(self, kind: Literal["png", "overlay", "f16"]) -> bytes:
        """Draw the heatmap.

        Args:
            kind: `png` is 8-bit grey on the policy's scale, `overlay` the frame painted over, both as PNG; `f16` the
                map's values, little-endian, row by row.
        """
        if kind == "f16":
            return self.anomaly_map.astype("<f2", copy=False).tobytes()
        anomaly_map = self.anomaly_map.astype(np.float32)
        if kind == "png":
            return encode_png(grey_heatmap(anomaly_map, self.policy))
        picture = overlay(self.pixels, anomaly_map, self.policy, self.regions, self.window, self.frame_size)
        return encode_png(picture)


def heatmap_record(inspection: Inspection) -> HeatmapRecord:
    """Take from an inspection what its heatmap needs, in a copy that holds nothing else of it alive."""
    frame = inspection.frame
    # Raw maps have no bound and float16 has; beyond it a value would become infinite.
    narrowed = np.clip(inspection.anomaly_map, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16)
    return HeatmapRecord(
        inspection_id=inspection.inspection_id,
        line=inspection.line,
        bundle_version=inspection.bundle_version,
        bundle_digest=inspection.bundle_digest,
        policy_version=inspection.policy_version,
        policy_digest=inspection.policy_digest,
        frame_digest=inspection.frame_digest,
        anomaly_map=narrowed,
        pixels=_shrink(frame.pixels),
        policy=inspection.policy,
        regions=tuple(inspection.judgement.regions),
        window=inspection.window,
        frame_size=(frame.height, frame.width),
    )


class Records:
    """The heatmaps that can still be fetched.

    Args:
        max_heatmaps: how many.
        max_bytes: memory that they may take together.
        telemetry: counts those that made room.
    """

    def __init__(self, max_heatmaps: int, max_bytes: int, telemetry: Telemetry) -> None:
        self._max_heatmaps = max_heatmaps
        self._max_bytes = max_bytes
        self._telemetry = telemetry
        self._kept: OrderedDict[str, HeatmapRecord] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def keep(self, inspection: Inspection) -> HeatmapRecord:
        """Keep an inspection's heatmap, and let go of the oldest where there is no room.

        Returns:
            The record, also where it alone is larger than all room.
        """
        record = heatmap_record(inspection)
        with self._lock:
            self._kept[record.inspection_id] = record
            self._bytes += record.size_bytes
            while len(self._kept) > self._max_heatmaps or self._bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.size_bytes
                self._telemetry.record_dropped("heatmaps")
        return record

    def heatmap(self, inspection_id: str) -> HeatmapRecord:
        """Return what the heatmap of an inspection is drawn from; whoever is asked for stays the longest.

        Raises:
            UnknownInspection: if there never was such an inspection, it wanted no heatmap, or it made room.
        """
        with self._lock:
            record = self._kept.get(inspection_id)
            if record is None:
                raise UnknownInspection(
                    "The inspection is unknown here or its heatmap is no longer kept; ask for one with the frame, and "
                    "fetch it soon after the answer, from the process that gave it."
                )
            self._kept.move_to_end(inspection_id)
        return record


def _shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = LARGEST_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    return resize_pixels(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
