"""Where TensorRT's plans lie, and which of them may be loaded.

A plan is native code for one GPU architecture and one release of TensorRT; loading a foreign one is running a foreign
program. So plans don't lie in the bundle, which is immutable, verified by digest and often mounted read-only, but in a
cache on the machine that built them:

    <cache>/<SHA-256 of model.onnx>/<architecture>-<TensorRT's version>-<precision>.plan    and beside it .json

Three things must hold before a plan is loaded: folder and files belong to this user or to root and nobody else may
write them; the sidecar names exactly this model, release, architecture and precision; and the plan's own SHA-256 is
the one that was written when it was built. The first keeps others out, the second other models and machines, the third
half-written and damaged files. No secret is kept beside them: whoever could write here could read it, too.
"""

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.contract.bundle import Digest
from service.errors import EngineFailed

_TIMING_CACHE = "timing.cache"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class PlanKey:
    """What a plan was built from and for.

    Attributes:
        model_digest: SHA-256 of `model.onnx`.
        architecture: of the GPU, as `sm_90`.
        tensorrt: version of the library.
        precision: of the bundle.
    """

    model_digest: str
    architecture: str
    tensorrt: str
    precision: str

    @property
    def name(self) -> str:
        """Name of the plan's file without its ending."""
        return f"{self.architecture}-{self.tensorrt}-{self.precision}"


class PlanRecord(BaseModel):
    """What the sidecar says of a plan.

    Attributes:
        model_digest: SHA-256 of the graph.
        architecture: of the GPU that it was built on.
        tensorrt: version of the library that built it.
        precision: of the bundle.
        min_batch: smallest batch that it takes.
        opt_batch: batch that it is fastest at.
        max_batch: largest batch that it takes.
        plan_digest: SHA-256 of the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model_digest: Digest
    architecture: str
    tensorrt: str
    precision: str
    min_batch: int = Field(ge=1)
    opt_batch: int = Field(ge=1)
    max_batch: int = Field(ge=1)
    plan_digest: Digest


@dataclass(frozen=True, eq=False)
class Plan:
    """A plan that may be loaded.

    Attributes:
        record: what it is.
        data: the bytes whose digest was checked.
    """

    record: PlanRecord
    data: bytes


def private_directory(path: Path) -> Path:
    """Return a folder that nobody else may write, made where it is missing.

    Raises:
        EngineFailed: if it can't be made, or others may write it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(path)
    except OSError as error:
        raise EngineFailed(f"The engine cache {path} can't be used; set FLAWLINE_ENGINE_CACHE_DIRECTORY.") from error
    return path


def write_plan(cache: Path, record: PlanRecord, plan: bytes) -> Path:
    """Keep a plan that was just built here; its sidecar comes last, so that half of a plan is none.

    Args:
        cache: of all plans.
        record: what it is; its `plan_digest` is replaced.
        plan: the bytes.

    Returns:
        The plan's path.

    Raises:
        EngineFailed: if the cache can't be written.
    """
    key = PlanKey(record.model_digest, record.architecture, record.tensorrt, record.precision)
    place = _place(private_directory(cache), key)
    sealed = record.model_copy(update={"plan_digest": hashlib.sha256(plan).hexdigest()})
    private_directory(place.parent)
    try:
        place.with_suffix(".json").unlink(missing_ok=True)
        _write(place, plan)
        _write(place.with_suffix(".json"), sealed.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise EngineFailed(f"The plan can't be written to {place}; is the disk full?") from error
    return place


def read_plan(cache: Path, key: PlanKey) -> Plan:
    """Return the plan of a model for this machine.

    Raises:
        EngineFailed: if there is none, or one that may not be loaded.
    """
    place = _place(cache, key)
    build = "build it on this machine: flawline build-engine BUNDLE"
    try:
        for path in (cache, place.parent, place, place.with_suffix(".json")):
            _refuse_foreign(path)
        record = PlanRecord.model_validate_json(place.with_suffix(".json").read_bytes())
        data = place.read_bytes()
    except FileNotFoundError as error:
        raise EngineFailed(f"There is no plan {key.name} of this bundle in {cache}; {build}.") from error
    except (OSError, ValidationError) as error:
        raise EngineFailed(f"The plan {key.name} can't be read in {cache}; {build}.") from error
    found = PlanKey(record.model_digest, record.architecture, record.tensorrt, record.precision)
    if found != key or record.plan_digest != hashlib.sha256(data).hexdigest():
        raise EngineFailed(f"The plan {key.name} in {cache} is not the one that was built; {build}.")
    return Plan(record, data)


def read_timing_cache(cache: Path) -> bytes:
    """Return what earlier builds on this machine measured; empty where there is nothing."""
    path = private_directory(cache) / _TIMING_CACHE
    try:
        _refuse_foreign(path)
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def write_timing_cache(cache: Path, data: bytes) -> None:
    """Keep what a build measured, for the next one."""
    _write(private_directory(cache) / _TIMING_CACHE, data)


def _place(cache: Path, key: PlanKey) -> Path:
    return cache / key.model_digest / f"{key.name}.plan"


def _refuse_foreign(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & _WRITABLE_BY_OTHERS:
        raise EngineFailed(
            f"{path} could have been written by somebody else, and a plan is native code; make it yours alone "
            "(chown, chmod go-w), or set FLAWLINE_ENGINE_CACHE_DIRECTORY."
        )


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)  # readable by its owner only
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
