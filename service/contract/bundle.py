"""The bundle: the one contract between training and service.

`STORE/<name>/<version>/` holds `manifest.json`, `manifest.sha256`, `model.onnx`, `calibration.npz`, `policy.json`,
`golden/`, `report.html` and what the report shows. The manifest names the SHA-256 of every other file; the sidecar
names the manifest's own. The service owns this schema, because it is the party that must refuse a wrong bundle;
training writes through the same class and so can't write what the service would refuse.

Order of reading: hash first, then parse the very bytes that were hashed. A file that the manifest does not name, a link
or a path that leaves the directory is refused, except for `engines/`, whose plans are built on the target and checked
against the verified graph. Nothing here is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.contract.calibration import Calibration
from service.contract.geometry import InputSpec
from service.contract.graph import verify_graph
from service.contract.policy import Policy, ScoreRule
from service.errors import BundleRefused

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_FILE = "manifest.json"
MANIFEST_DIGEST_FILE = "manifest.sha256"
MODEL_FILE = "model.onnx"
CALIBRATION_FILE = "calibration.npz"
POLICY_FILE = "policy.json"
GOLDEN_FILE = "golden/expected.json"
GOLDEN_MAPS_FILE = "golden/maps.npz"
REPORT_FILE = "report.html"
ENGINES_DIRECTORY = "engines"

_Model = TypeVar("_Model", bound=BaseModel)

_REQUIRED_FILES = (MODEL_FILE, CALIBRATION_FILE, POLICY_FILE, GOLDEN_FILE, GOLDEN_MAPS_FILE, REPORT_FILE)

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
    """What the graph answers: `score` float32 `[B]` and `anomaly_map` float32 `[B, map_height, map_width]`."""

    map_height: int = Field(gt=0)
    map_width: int = Field(gt=0)
    score_rule: ScoreRule


class DataRecord(_Record):
    """Which frames made the bundle.

    Attributes:
        name: of the data set.
        digest: SHA-256 over the sorted relative paths and contents.
        fitted_on: good frames that the detector was fitted on.
        calibrated_on: good frames held out for calibration.
        tested_on_normal: normal test frames.
        tested_on_anomalous: anomalous test frames.
    """

    name: str
    digest: Digest
    fitted_on: int = Field(ge=0)
    calibrated_on: int = Field(ge=1)
    tested_on_normal: int = Field(ge=0)
    tested_on_anomalous: int = Field(ge=0)


class MetricRecord(_Record):
    """One figure of the evaluation; undefined ones are null and say why."""

    value: float | None
    reason: str | None = None
    low: float | None = None
    high: float | None = None


class ParityRecord(_Record):
    """How far the exported graph is from PyTorch, on real frames.

    Attributes:
        frames: how many were compared.
        map_difference: largest difference of a map value, as a fraction of the maps' range.
        score_difference: largest difference of a score.
        verdicts_differ: frames whose verdict differs; always 0 in a bundle that was written.
    """

    frames: int = Field(ge=1)
    map_difference: float = Field(ge=0)
    score_difference: float = Field(ge=0)
    verdicts_differ: Literal[0]


class GoldenRule(_Record):
    """How closely a device must reproduce the golden set.

    Attributes:
        map_tolerance: largest allowed difference of a map value, as a fraction of the expected maps' range.
        score_tolerance: largest allowed difference of a score, as a fraction of the fail threshold's magnitude.
    """

    map_tolerance: float = Field(gt=0, lt=1)
    score_tolerance: float = Field(gt=0, lt=1)


class Manifest(_Record):
    """What a bundle says of itself; written once, by training.

    Attributes:
        lines: the product lines that the network was fitted on.
        version: of the bundle within its name; a positive whole number.
        hyperparameters: the run's configuration, every value.
        metrics: evaluation on the line's test frames, by name; empty where there were none.
        files: SHA-256 of every other file, by path relative to the bundle.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
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
    data: DataRecord
    metrics: dict[str, MetricRecord]
    evaluation_resolution: Literal["original", "model"]
    parity: ParityRecord
    golden: GoldenRule
    seed: int
    libraries: dict[str, str]
    git_revision: str | None
    created_at: str
    files: dict[str, Digest]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle, held as the bytes that were hashed.

    Attributes:
        path: where it was read.
        digest: SHA-256 of the manifest, hence of everything.
        manifest: parsed.
        policy: the default policy.
        calibration: good-part values.
        model: the graph's bytes.
        files: bytes of every small file the service needs, by relative path.
    """

    path: Path
    digest: str
    manifest: Manifest
    policy: Policy
    calibration: Calibration
    model: bytes
    files: Mapping[str, bytes]


def load_bundle(path: Path) -> Bundle:
    """Verify a bundle directory, then parse the bytes that were verified.

    Raises:
        BundleRefused: if a file is missing, unexpected, a link, or not what the manifest promises; the sentence names
            the file.
    """
    manifest_bytes = _read(path, MANIFEST_FILE)
    sidecar = _read(path, MANIFEST_DIGEST_FILE)
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    if sidecar != digest.encode() + b"\n":
        raise BundleRefused(f"{MANIFEST_FILE} does not match {MANIFEST_DIGEST_FILE}; export the bundle again.")
    manifest = _parse(Manifest, manifest_bytes, MANIFEST_FILE)
    for required in _REQUIRED_FILES:
        if required not in manifest.files:
            raise BundleRefused(f"{MANIFEST_FILE} names no {required}; export the bundle again.")
    _refuse_strangers(path, manifest)
    files: dict[str, bytes] = {}
    for relative, expected in manifest.files.items():
        data = _read(path, relative)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleRefused(f"{relative} is not the file that {MANIFEST_FILE} names; export the bundle again.")
        files[relative] = data
    policy = _parse(Policy, files[POLICY_FILE], POLICY_FILE)
    calibration = Calibration.from_bytes(files[CALIBRATION_FILE])
    verify_graph(files[MODEL_FILE])
    if policy.region_of_interest is not None and manifest.output.score_rule.kind == "graph":
        raise BundleRefused(f"{POLICY_FILE} has a region of interest, but this detector's score can't follow it.")
    kept = {name: data for name, data in files.items() if name != MODEL_FILE}
    return Bundle(path, digest, manifest, policy, calibration, files[MODEL_FILE], kept)


def load_policy(path: Path) -> Policy:
    """Read a line's own policy file.

    Raises:
        BundleRefused: if it can't be read or does not fit the schema.
    """
    return _parse(Policy, _read(path.parent, path.name), path.name)


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


def versions_of(directory: Path) -> list[str]:
    """Return the versions of one name in a store, oldest first; half-written ones have other names."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    return sorted((name for name in names if name.isascii() and name.isdigit() and name[0] != "0"), key=int)


def _refuse_strangers(path: Path, manifest: Manifest) -> None:
    known = {*manifest.files, MANIFEST_FILE, MANIFEST_DIGEST_FILE}
    for entry in path.rglob("*"):
        relative = entry.relative_to(path).as_posix()
        if entry.is_symlink():
            raise BundleRefused(f"{relative} is a link; a bundle holds plain files only.")
        if not (entry.is_file() or entry.is_dir()):
            raise BundleRefused(f"{relative} is no plain file; a bundle holds plain files only.")
        if entry.is_file() and relative not in known and not relative.startswith(f"{ENGINES_DIRECTORY}/"):
            raise BundleRefused(f"{relative} is not named by {MANIFEST_FILE}; remove it or export the bundle again.")


def _read(path: Path, relative: str) -> bytes:
    file = path / relative
    try:
        if not file.resolve().is_relative_to(path.resolve()):
            raise BundleRefused(f"{relative} lies outside of the bundle.")
        if not file.is_file():  # a pipe would be read for ever
            raise BundleRefused(f"{relative} is no plain file in the bundle {path.parent.name}/{path.name}.")
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # unreadable, a ring of links, a name that can't be
        raise BundleRefused(f"{relative!r} can't be read in the bundle {path.parent.name}/{path.name}.") from error


def _parse(schema: type[_Model], data: bytes, name: str) -> _Model:
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleRefused(f"{name}: {place}: {first['msg']}.") from error
