"""The bundle: the one contract between training and service.

`STORE/<name>/<version>/` holds `manifest.json`, `manifest.sha256`, `model.onnx`, `calibration.npz`, `policy.json`,
`golden/`, `report.html` and, where frames were fitted on, `fitted_frames.txt`, by which a later calibration tells them
from new ones. A network that was fitted on several lines keeps a calibration and a policy of each, as
`lines/<line>/calibration.npz` and `lines/<line>/policy.json`. The manifest names the SHA-256 of every other file; the
sidecar names the manifest's own. Whoever signs the bundle adds `model.sig`, a signature of the manifest
(`signature.py`). The service owns this schema, because it is the party that must refuse a wrong bundle; training writes
through the same class and so can't write what the service would refuse.

Order of reading: hash first, then parse the very bytes that were hashed. A file that the manifest does not name, a link
or a path that leaves the directory is refused, except for `engines/`, whose plans are built on the target and checked
against the verified graph. Nothing here is ever unpickled.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from service.contract.calibration import Calibration
from service.contract.geometry import InputSpec
from service.contract.graph import verify_graph
from service.contract.legible import is_legible, legible
from service.contract.policy import Policy, PolicyFile, ScoreRule
from service.contract.signature import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, Trust, refuse_unsigned
from service.errors import BundleNotLoaded, BundleRefused

SCHEMA_VERSION: Literal[2] = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_DIGEST_FILE = "manifest.sha256"
MODEL_FILE = "model.onnx"
CALIBRATION_FILE = "calibration.npz"
POLICY_FILE = "policy.json"
GOLDEN_FILE = "golden/expected.json"
GOLDEN_MAPS_FILE = "golden/maps.npz"
REPORT_FILE = "report.html"
FITTED_FRAMES_FILE = "fitted_frames.txt"
ENGINES_DIRECTORY = "engines"

_Model = TypeVar("_Model", bound=BaseModel)

_EXPORT_AGAIN = "export the bundle again with this release"
_LINES_DIRECTORY = "lines"
_REQUIRED_FILES = (MODEL_FILE, GOLDEN_FILE, GOLDEN_MAPS_FILE, REPORT_FILE)

LINE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
LineName = Annotated[str, Field(pattern=LINE_NAME)]
BundleVersion = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class BackboneRecord(_Record):
    """Which pretrained feature extractor stands under the detector.

    Attributes:
        name: timm's name.
        digest: SHA-256 over the weights.
        source: where the weights came from, in words.
    """

    name: str
    digest: Digest
    source: str


class OutputSpec(_Record):
    """What the graph answers: `score` float32 `[B]` and `anomaly_map` float32 `[B, map_height, map_width]`.

    Of a tiled frame that is the answer to one tile; `Manifest.map_size` is that of the whole frame.
    """

    map_height: int = Field(gt=0)
    map_width: int = Field(gt=0)
    score_rule: ScoreRule


class FramesRecord(_Record):
    """Which frames a later step was given, where they aren't those of the data set that the bundle comes from.

    Attributes:
        name: of their folder.
        digest: SHA-256 over the sorted relative paths and contents.
        copies_left_out: frames that were not used, because others have the same content.
        fitted_left_out: frames that were not used, because fitting saw them or another view of their part.
    """

    name: str
    digest: Digest
    copies_left_out: int = Field(default=0, ge=0)
    fitted_left_out: int = Field(default=0, ge=0)


class DataRecord(_Record):
    """Which frames made the bundle.

    Attributes:
        name: of the data set, which the detector was fitted on.
        digest: SHA-256 over the sorted relative paths and contents.
        fitted_on: good frames that the detector was fitted on.
        calibrated_on: good frames held out for calibration; 0 where the line was not calibrated.
        calibrated_parts: how many parts these frames show, which is what thresholds rest on; None in bundles that are
            older than the count.
        copies_left_out: good frames that neither fitted nor calibrated, because others have the same content.
        tested_on_normal: normal test frames.
        tested_on_anomalous: anomalous test frames.
        shots: names of the good frames that the detector was fitted on, where it was given a few and not all.
        calibration_frames: what `calibrated_on` counts, where the line was calibrated again on other frames than the
            data set's; else None.
        test_frames: what `tested_on_normal` and `tested_on_anomalous` count, where they were measured then; else None.
        frame_sizes: `(height, width)` in pixels that frames of the line have, the most common one first; of the data
            set, or of `calibration_frames` where there are such. Empty in bundles that are older than this.
    """

    name: str
    digest: Digest
    fitted_on: int = Field(ge=0)
    calibrated_on: int = Field(ge=0)
    tested_on_normal: int = Field(ge=0)
    tested_on_anomalous: int = Field(ge=0)
    calibrated_parts: int | None = Field(default=None, ge=0)
    copies_left_out: int = Field(default=0, ge=0)
    shots: tuple[str, ...] = ()
    calibration_frames: FramesRecord | None = None
    test_frames: FramesRecord | None = None
    frame_sizes: tuple[tuple[int, int], ...] = ()


class LabelledDefectsRecord(_Record):
    """Which marked defects the detector learnt from, beside good frames.

    Attributes:
        digest: SHA-256 over the sorted relative paths and contents of frames and masks.
        frames: how many.
    """

    digest: Digest
    frames: int = Field(ge=1)


class MetricRecord(_Record):
    """One figure of the evaluation; undefined ones are null and say why."""

    value: float | None
    reason: str | None = None
    low: float | None = None
    high: float | None = None


class LineRecord(_Record):
    """What a bundle says of one of its lines.

    Attributes:
        data: which frames.
        review_rate: share of good parts that its policy's review threshold was calibrated for; None without a
            calibration.
        fail_rate: share of good parts that its policy's fail threshold was calibrated for; None without a calibration.
        metrics: evaluation on the line's test frames, by name.
    """

    data: DataRecord
    review_rate: float | None = Field(gt=0, lt=1)
    fail_rate: float | None = Field(gt=0, lt=1)
    metrics: dict[str, MetricRecord]

    @property
    def is_calibrated(self) -> bool:
        """Whether good parts stand behind the line's thresholds."""
        return self.data.calibrated_on > 0

    @model_validator(mode="after")
    def _rates_belong_to_a_calibration(self) -> Self:
        if {self.review_rate is not None, self.fail_rate is not None} != {self.is_calibrated}:
            raise ValueError("review_rate and fail_rate belong to a calibration, and only there")
        return self


class ParityRecord(_Record):
    """How far the exported graph is from PyTorch, or from the float32 graph that it was made from, on real frames.

    Attributes:
        frames: how many were compared.
        map_difference: largest difference of a map value, as a fraction of the maps' range.
        score_difference: largest difference of a score.
        verdicts_differ: frames whose verdict differs; always 0 in a bundle that a run wrote, and None in one that has
            its thresholds from `flawline calibrate`, where nobody counted them.
        verdicts_at_threshold: frames so near to a threshold that either verdict is right, and whose verdict differs;
            only graphs of another precision than float32, which were compared with that, have any. None as above.
    """

    frames: int = Field(ge=1)
    map_difference: float = Field(ge=0)
    score_difference: float = Field(ge=0)
    verdicts_differ: Literal[0] | None
    verdicts_at_threshold: int | None = Field(default=0, ge=0)


class ParentRecord(_Record):
    """The bundle of the same name that a bundle was made from, with the same network.

    Attributes:
        version: of it.
        digest: of its manifest, hence of everything.
    """

    version: BundleVersion
    digest: Digest


class GoldenRule(_Record):
    """How closely a device must reproduce the golden set.

    Attributes:
        map_tolerance: largest allowed difference of a map value, as a fraction of the range of the line's expected
            maps.
        score_tolerance: largest allowed difference of a score, as a fraction of the magnitude of the line's fail
            threshold, or of its largest expected score where thresholds are in units of each frame's own spread.
    """

    map_tolerance: float = Field(gt=0, lt=1)
    score_tolerance: float = Field(gt=0, lt=1)


class Manifest(_Record):
    """What a bundle says of itself; written once, by training.

    Attributes:
        lines: the product lines that the network was fitted on; a line's place here is its index in the graph.
        version: of the bundle within its name; a positive whole number.
        hyperparameters: the run's configuration, every value; without its rates where a line was calibrated again,
            since `by_line` has those that hold.
        by_line: what differs from line to line.
        labelled_defects: what a semi-supervised run learnt from beside good frames, or None.
        files: SHA-256 of every other file, by path relative to the bundle.
        parent: what this is with other thresholds, or None where a run made it.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    name: LineName
    lines: tuple[LineName, ...] = Field(min_length=1)
    version: BundleVersion
    detector: str
    backbone: BackboneRecord | None
    hyperparameters: dict[str, JsonValue]
    input: InputSpec
    output: OutputSpec
    opset: int = Field(ge=18)
    precision: Literal["fp32", "fp16", "int8"]
    by_line: dict[LineName, LineRecord]
    labelled_defects: LabelledDefectsRecord | None = None
    evaluation_resolution: Literal["original", "model"]
    parity: ParityRecord
    golden: GoldenRule
    seed: int
    libraries: dict[str, str]
    git_revision: str | None
    created_at: str
    files: dict[str, Digest]
    parent: ParentRecord | None = None

    @property
    def map_size(self) -> tuple[int, int]:
        """`(height, width)` of a frame's map, which of a tiled frame is stitched from those of its tiles."""
        return self.input.stitched_size(self.output.map_height, self.output.map_width)

    @property
    def network(self) -> str:
        """SHA-256 over the graph, its input and its outputs: versions that share it give a frame the same score.

        Thresholds are chosen by scores, so that policy files name it.
        """
        # Without defaults, so that a field that a later release adds changes no digest of what is there.
        parts = {
            "model": self.files[MODEL_FILE],
            "input": self.input.model_dump(mode="json", exclude_defaults=True),
            "output": self.output.model_dump(mode="json", exclude_defaults=True),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @model_validator(mode="after")
    def _tiles_can_be_stitched(self) -> Self:
        self.input.stitched_size(self.output.map_height, self.output.map_width)
        return self

    @model_validator(mode="after")
    def _each_line_is_described_once(self) -> Self:
        if len(set(self.lines)) != len(self.lines):
            raise ValueError("a line is named twice")
        if set(self.lines) != set(self.by_line):
            raise ValueError("by_line must describe every line of the bundle, and no other")
        return self


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle, held as the bytes that were hashed.

    Attributes:
        path: where it was read.
        digest: SHA-256 of the manifest, hence of everything.
        manifest: parsed.
        policies: the default policy of each line.
        calibrations: good-part values of each line that was calibrated.
        model: the graph's bytes.
        files: bytes of every small file the service needs, by relative path.
    """

    path: Path
    digest: str
    manifest: Manifest
    policies: Mapping[str, Policy]
    calibrations: Mapping[str, Calibration]
    model: bytes
    files: Mapping[str, bytes]


def line_file(line: str, lines: Sequence[str], name: str) -> str:
    """Return where a line's own file lies: at the root where there is one line, else in a folder of the line's name.

    Args:
        line: one of `lines`.
        lines: all lines of the bundle, or of the run that makes it.
        name: of the file.
    """
    return name if len(lines) == 1 else f"{_LINES_DIRECTORY}/{line}/{name}"


def load_bundle(path: Path, trust: Trust | None = None) -> Bundle:
    """Verify a bundle directory, then parse the bytes that were verified.

    Args:
        path: of the bundle.
        trust: whose signature it must have; None does not ask for one.

    Raises:
        BundleRefused: if a file is missing, unexpected, a link, or not what the manifest promises, or the signature
            does not hold; the sentence names the file.
    """
    manifest_bytes = _read(path, MANIFEST_FILE)
    sidecar = _read(path, MANIFEST_DIGEST_FILE)
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    if sidecar != digest.encode() + b"\n":
        raise BundleRefused(f"{MANIFEST_FILE} does not match {MANIFEST_DIGEST_FILE}; export the bundle again.")
    if trust is not None:
        refuse_unsigned(manifest_bytes, _read_signature(path), trust)
    _refuse_other_schema(manifest_bytes)
    manifest = _parse(Manifest, manifest_bytes, MANIFEST_FILE, _EXPORT_AGAIN)
    for required in _required_files(manifest):
        if required not in manifest.files:
            raise BundleRefused(f"{MANIFEST_FILE} names no {required}; export the bundle again.")
    _refuse_strangers(path, manifest)
    files: dict[str, bytes] = {}
    for relative, expected in manifest.files.items():
        data = _read(path, relative)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleRefused(f"{relative} is not the file that {MANIFEST_FILE} names; export the bundle again.")
        files[relative] = data
    policies = {}
    for line in manifest.lines:
        name = line_file(line, manifest.lines, POLICY_FILE)
        policies[line] = _parse(Policy, files[name], name, _EXPORT_AGAIN)
    calibrations = {
        line: Calibration.from_bytes(files[line_file(line, manifest.lines, CALIBRATION_FILE)])
        for line in manifest.lines
        if manifest.by_line[line].is_calibrated
    }
    verify_graph(files[MODEL_FILE])
    kept = {name: data for name, data in files.items() if name != MODEL_FILE}
    return Bundle(path, digest, manifest, policies, calibrations, files[MODEL_FILE], kept)


def load_policy(path: Path) -> PolicyFile:
    """Read a line's own policy file.

    Raises:
        BundleRefused: if it can't be read or does not fit the schema.
    """
    return _parse(PolicyFile, _read(path.parent, path.name), path.name, "mend the policy")


def seal(manifest: Manifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return every file of a bundle, manifest and digests included, ready to be written.

    Args:
        manifest: its `files` are replaced by the digests of `files`.
        files: contents by relative path, all but the manifest and its sidecar.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    sealed = manifest.model_copy(update={"files": digests})
    plain = json.loads(sealed.model_dump_json())  # where NaN has become null; NaN is no JSON
    text = json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"
    sidecar = hashlib.sha256(text).hexdigest().encode() + b"\n"
    return {**files, MANIFEST_FILE: text, MANIFEST_DIGEST_FILE: sidecar}


def promised_lines(path: Path, name: str) -> tuple[str, ...]:
    """Read which lines a bundle means to serve, without verifying it; good for saying what is taken or not ready.

    Args:
        path: of the bundle.
        name: under which it lies in the store, which is also the line of a bundle that can't be read.
    """
    manifest = path / MANIFEST_FILE
    try:
        # A pipe would be read for ever.
        return Manifest.model_validate_json(manifest.read_bytes()).lines if manifest.is_file() else (name,)
    except (OSError, ValidationError):
        return (name,)


def versions_of(directory: Path) -> list[str]:
    """Return the versions of one name in a store, oldest first; half-written ones have other names.

    Raises:
        OSError: if it can't be told, so that nobody takes for removed what a volume does not show for a while.
    """
    try:
        entries = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbered = [entry for entry in entries if entry.name.isascii() and entry.name.isdigit() and entry.name[0] != "0"]
    return sorted((entry.name for entry in numbered if _is_folder(entry)), key=int)


def _is_folder(path: Path) -> bool:
    """Tell whether a path is a folder; `Path.is_dir` of Python 3.13 and later denies it where nobody may look."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return False


def newest_bundles(store: Path) -> dict[str, Path]:
    """Return the newest version of each name in a store; empty where there is no store yet."""
    if not store.is_dir():
        return {}
    versions = {entry: versions_of(entry) for entry in sorted(store.iterdir())}
    return {entry.name: entry / found[-1] for entry, found in versions.items() if found}


def _refuse_other_schema(manifest: bytes) -> None:
    """Say of a bundle from another time what it is, where its unknown fields would say nothing."""
    try:
        found = json.loads(manifest).get("schema_version", SCHEMA_VERSION)
    except (ValueError, AttributeError, RecursionError):
        return  # whoever parses it next says what is wrong
    if found != SCHEMA_VERSION:
        raise BundleRefused(
            f"{MANIFEST_FILE} has another schema version than {SCHEMA_VERSION}, the one that this release reads; "
            "train and export again with this release."
        )


def _required_files(manifest: Manifest) -> Iterator[str]:
    yield from _REQUIRED_FILES
    for line in manifest.lines:
        if manifest.by_line[line].is_calibrated:
            yield line_file(line, manifest.lines, CALIBRATION_FILE)
        yield line_file(line, manifest.lines, POLICY_FILE)


def _refuse_strangers(path: Path, manifest: Manifest) -> None:
    odd = sorted(name for name in manifest.files if not is_legible(name))
    if odd:
        raise BundleRefused(f"{MANIFEST_FILE} names {legible(odd[0])}, which can't be shown; export the bundle again.")
    known = {*manifest.files, MANIFEST_FILE, MANIFEST_DIGEST_FILE, SIGNATURE_FILE}
    for entry in _entries_below(path):
        relative = entry.relative_to(path).as_posix()
        shown = legible(relative)
        if entry.is_symlink():
            raise BundleRefused(f"{shown} is a link; a bundle holds plain files only.")
        if not (entry.is_file() or entry.is_dir()):
            raise BundleRefused(f"{shown} is no plain file; a bundle holds plain files only.")
        if entry.is_file() and relative not in known and not relative.startswith(f"{ENGINES_DIRECTORY}/"):
            raise BundleRefused(f"{shown} is not named by {MANIFEST_FILE}; remove it or export the bundle again.")


def _entries_below(path: Path) -> Iterator[Path]:
    """Yield whatever lies in a bundle, at any depth.

    Raises:
        BundleNotLoaded: if a folder can't be looked into, so that nobody can tell what else is in it.
    """

    def fail(error: OSError) -> None:
        folder = Path(error.filename).relative_to(path)
        if folder.parts[:1] != (ENGINES_DIRECTORY,):  # where anything may lie
            place = f"{folder.as_posix()!r} can't be read in the bundle {path.parent.name}/{path.name}"
            raise BundleNotLoaded(f"{place}: {error.strerror}.") from error

    for folder, folders, files in os.walk(path, onerror=fail):
        yield from (Path(folder, name) for name in (*folders, *files))


def why_no_bundle(path: Path) -> str:
    """Return why a folder is no bundle, to end a sentence about it; empty where nobody mistook it for one."""
    if not path.is_dir():  # of a store that is away everything is missing
        return ", because there is no such folder; give one version's, as in store/line/1"
    if versions := versions_of(path):
        return f", because it holds the versions of a bundle; give one of them, as in {path / versions[-1]}"
    return ""


def _read_signature(path: Path) -> bytes | None:
    if not (path / SIGNATURE_FILE).exists():
        return None
    signature = _read(path, SIGNATURE_FILE)
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise BundleRefused(f"{SIGNATURE_FILE} is too large for a signature; sign the bundle again.")
    return signature


def _read(path: Path, relative: str) -> bytes:
    file = path / relative
    try:
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleRefused(f"{relative} lies outside of the bundle.")
        if not file.is_file():  # a pipe would be read for ever
            bundle = f"the bundle {path.parent.name}/{path.name}"
            if file.exists():
                raise BundleRefused(f"{relative} is no plain file in {bundle}.")
            raise BundleNotLoaded(f"{relative} is missing from {bundle}{why_no_bundle(path)}.")
        return file.read_bytes()
    except OSError as error:
        raise BundleNotLoaded(
            f"{relative!r} can't be read in the bundle {path.parent.name}/{path.name}: {error.strerror}."
        ) from error
    except (RuntimeError, ValueError) as error:  # a ring of links, a name that can't be
        raise BundleRefused(f"{relative!r} can't be read in the bundle {path.parent.name}/{path.name}.") from error


def _parse(schema: type[_Model], data: bytes, name: str, remedy: str) -> _Model:
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleRefused(f"{name}: {place}: {first['msg']}; {remedy}.") from error
