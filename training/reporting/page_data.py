"""What a page shows: the records that `collect.py` fills from frames and answers, and that a run directory keeps.

Records only, so that a page can be rendered again without the frames (`report.py`).
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from service.contract.bundle import MetricRecord, ParityRecord
from service.contract.policy import Policy, Verdict, policy_digest

HELD_OUT = "good, held out"
Group = Literal["missed", "rejected", "caught", "passed"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Promise(_Record):
    """One threshold and what good parts promise of it; see `service.contract.calibration.Threshold`.

    Attributes:
        value: of the threshold.
        rate: share of good parts that reach it, on average.
        bound: of that share, with 95 % confidence.
        good_parts: behind both, each of one frame or more.
    """

    value: float
    rate: float
    bound: float
    good_parts: int


class Inspected(_Record):
    """What is inspected, where that is not the whole frame.

    Attributes:
        share: of the frame.
        defects_outside: how many defective test frames show their marked defect wholly outside; None where no mask
            tells it.
    """

    share: float
    defects_outside: int | None = None

    def __str__(self) -> str:
        """Say it in words."""
        told = (
            f"Only the region of interest is inspected, {100 * self.share:.3g} % of the frame: defects outside of it "
            "are not looked for, and pixel figures are measured inside."
        )
        if self.defects_outside:
            told += (
                f" Defective test frames whose marked defect lies wholly outside: {self.defects_outside}; image "
                "figures and verdicts count them all the same."
            )
        return told


class Rules(_Record):
    """The policy that verdicts and pictures follow.

    Attributes:
        version: of the policy.
        digest: SHA-256 of its canonical JSON, as answers of the service name it.
        region_threshold: of the anomaly map; from it on, regions are outlined.
        map_floor: where the scale of heatmaps begins.
    """

    version: str
    digest: str
    region_threshold: float
    map_floor: float

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Return what the page says of a policy."""
        return cls(
            version=policy.version,
            digest=policy_digest(policy),
            region_threshold=policy.region_threshold,
            map_floor=policy.map_floor,
        )

    @property
    def map_ceiling(self) -> float:
        """Where the scale of heatmaps ends: its middle is the threshold of regions."""
        return 2 * self.region_threshold - self.map_floor


class VerdictRow(_Record):
    """How many frames of one kind got which verdict."""

    kind: str
    is_good: bool
    passed: int
    review: int
    failed: int

    @property
    def total(self) -> int:
        """All frames of the kind."""
        return self.passed + self.review + self.failed


class Picture(_Record):
    """A frame and its overlay, as base64 JPEGs.

    Attributes:
        group: why it is shown.
        name: of the file.
        kind: good, or the kind of defect.
        verdict: under the bundle's policy.
        score: compared score.
        is_annotated: whether the frame shows the outline of its ground-truth mask.
        frame: base64 JPEG.
        overlay: base64 JPEG.
    """

    group: Group
    name: str
    kind: str
    verdict: Verdict
    score: float
    is_annotated: bool
    frame: str
    overlay: str


class Fact(_Record):
    """One line of the run's facts."""

    name: str
    value: str


class RunFacts(_Record):
    """What the run says of itself.

    Attributes:
        name: of the bundle.
        detector: name of the method.
        backbone: name of the feature extractor, or None.
        created_at: UTC, ISO 8601.
        facts: further facts, in order.
        configuration: the run's YAML.
        losses: `(stage, step, loss)` of every iteration.
        parity: of the exported graph.
        warnings: what is worth knowing of the lines together.
    """

    name: str
    detector: str
    backbone: str | None
    created_at: str
    facts: tuple[Fact, ...]
    configuration: str
    losses: tuple[tuple[str, int, float], ...]
    parity: ParityRecord
    warnings: tuple[str, ...] = ()


class LineReport(_Record):
    """What the page shows of one line.

    Attributes:
        line: its name.
        facts: of its frames, in order.
        warnings: what the data check allowed but wants known.
        carried_from: version of the bundle that the line's thresholds were calibrated with, where that is an older one;
            then there is nothing of its test frames but figures.
        review: the threshold of `REVIEW`.
        fail: the threshold of `FAIL`.
        verdicts: held-out good frames first, then test frames by kind.
        metrics: figures of the test frames.
        by_kind: I-AUROC of each kind of defect.
        calibration_scores: of held-out good frames.
        good_scores: of good test frames.
        defect_scores: of anomalous test frames.
        roc: `(x, y)` points.
        precision_recall: `(x, y)` points.
        pictures: best and worst frames.
        peaks: where good parts look oddest, `(x, y)` in fractions of the frame, a place a held-out frame.
        peaks_at_rim: how many of them lie at the rim, where that sets the thresholds; else None.
        inspected: what is, where that is not the whole frame.
        rules: the line's policy; None in reports that are older than this.
        is_unseen: whether it is known that fitting saw none of the frames that thresholds rest on.
    """

    line: str
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]
    carried_from: str | None = None
    review: Promise
    fail: Promise
    verdicts: tuple[VerdictRow, ...]
    metrics: dict[str, MetricRecord]
    by_kind: dict[str, MetricRecord]
    calibration_scores: tuple[float, ...]
    good_scores: tuple[float, ...]
    defect_scores: tuple[float, ...]
    roc: tuple[tuple[float, float], ...]
    precision_recall: tuple[tuple[float, float], ...]
    pictures: tuple[Picture, ...]
    peaks: tuple[tuple[float, float], ...] = ()
    peaks_at_rim: int | None = None
    inspected: Inspected | None = None
    rules: Rules | None = None
    is_unseen: bool = True

    @property
    def held_out_frames(self) -> int:
        """How many frames stand behind the thresholds; more than parts, where parts have several views."""
        return sum(row.total for row in self.verdicts if row.kind == HELD_OUT)

    @property
    def good_tested(self) -> tuple[VerdictRow, ...]:
        """Verdicts of good test frames."""
        return tuple(row for row in self.verdicts if row.is_good and row.kind != HELD_OUT)

    @property
    def defects_tested(self) -> tuple[VerdictRow, ...]:
        """Verdicts of defective test frames, a row a kind."""
        return tuple(row for row in self.verdicts if not row.is_good)


class ReportData(_Record):
    """Everything the page shows; a run directory keeps it as `report.json`.

    Attributes:
        run: what the run says of itself.
        resolution: at which pixel figures were measured.
        lines: a section each, at least one.
    """

    run: RunFacts
    resolution: Literal["original", "model"]
    lines: tuple[LineReport, ...]
