"""What a run keeps beside its checkpoint, so that it can be resumed, exported again and shown again.

runs/<name>/<time>/run.json       the request of the fit, word for word; what an export asks for holds for itself alone
                   config.yaml    its configuration, for people: edits are refused, not followed
                   checkpoint…    `training.fitting.checkpoint`
                   scores.npz     scores and labels of held-out and test frames; of several lines in lines/<line>/
                   metrics.json   figures, likewise; of the newest export, as are the report and its page
                   report.json    what the page shows, pictures included
                   report.html    the page
                   without_rim.png  a region of interest, where the rim sets the thresholds; likewise
"""

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.contract.bundle import LineName, Manifest, line_file, why_no_bundle
from training.config import ConfigFault, RunConfig, parse_config
from training.measuring.answers import Answers
from training.reporting.page_data import ReportData
from training.whole_files import write_whole

REPORT_FILE = "report.html"
_REQUEST_FILE = "run.json"
_CONFIG_FILE = "config.yaml"
_REPORT_DATA_FILE = "report.json"


class RunDirectoryFault(Exception):
    """The directory does not hold what is asked of it; the sentence says what to do."""


class LineRequest(BaseModel):
    """One line of a run.

    Attributes:
        name: under which it is served.
        folder: the data set.
        region_of_interest: a mask image, white where parts are inspected, or None.
        layout: how the folder is read, or None to find out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: LineName
    folder: Path
    region_of_interest: Path | None = None
    layout: str | None = None


class RunRequest(BaseModel):
    """What somebody asked for.

    Attributes:
        name: of the bundle.
        lines: that one detector is fitted on; a line's place is its index in the network.
        store: where the bundle goes.
        config: of the run.
        weights: a safetensors file, "untrained", or None to search by the backbone's name.
        labelled_defects: folder of marked defects that the detector learns from beside good frames, or None.
        released: name and SHA-256 of the authors' checkpoint that takes the place of fitting, or None. Good frames are
            then all held out.
        weight_folders: folders that may hold the file.
        device: where to fit.
        processes: how many fitted together when the run began; each batch is split into as many shares.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: LineName
    lines: tuple[LineRequest, ...] = Field(min_length=1)
    store: Path
    config: RunConfig
    weights: Literal["untrained"] | Path | None = None
    weight_folders: tuple[Path, ...] = ()
    labelled_defects: Path | None = None
    released: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = Field(default=1, ge=1, le=256)


def new_directory(runs: Path, name: str, now: datetime) -> Path:
    """Make and return the directory of a new run; runs of the same second get different ones."""
    stamp = now.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        directory = runs / name / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return directory


def keep_request(directory: Path, request: RunRequest) -> None:
    """Write what was asked for."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / _REQUEST_FILE, request.model_dump_json(indent=2))
    _write(directory / _CONFIG_FILE, request.config.to_yaml())


def read_request(directory: Path) -> RunRequest:
    """Read what was asked for.

    Raises:
        RunDirectoryFault: if the directory is no run's, or its configuration for people was edited since.
    """
    try:
        request = RunRequest.model_validate_json((directory / _REQUEST_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise RunDirectoryFault(
            f"{directory} is not the directory of a run; give runs/<name>/<time> as `flawline train` printed it."
        ) from error
    _refuse_edited(directory / _CONFIG_FILE, request.config)
    return request


def _refuse_edited(path: Path, config: RunConfig) -> None:
    """Refuse a configuration for people that says something else than the run's own, which alone would be followed."""
    try:
        edited = parse_config(path.read_text("utf-8")) != config
    except FileNotFoundError:
        return
    except (ConfigFault, UnicodeDecodeError):
        edited = True
    if edited:
        raise RunDirectoryFault(
            f"{path} was edited, and a run keeps the configuration that it began with, so the edit would be without "
            f"effect. To follow it, begin another run: flawline train … --config {shlex.quote(str(path))}; else take "
            "the edit back, or delete the file."
        )


def keep_results(
    directory: Path,
    manifest: Manifest,
    report: ReportData,
    page: str,
    answers: Mapping[str, Mapping[str, Answers]],
    masks: Mapping[str, bytes],
) -> None:
    """Write figures, scores and the report.

    Args:
        directory: of the run.
        manifest: of the bundle, with the figures of each line.
        report: what the page shows.
        page: the page.
        answers: raw answers, by line and by the name of their set.
        masks: PNGs that leave the rim out, of the lines whose thresholds are set there.
    """
    for line, by_set in answers.items():
        figures = {name: metric.model_dump() for name, metric in manifest.by_line[line].metrics.items()}
        place = (directory / line_file(line, manifest.lines, "metrics.json")).parent
        place.mkdir(parents=True, exist_ok=True)
        _write(place / "metrics.json", json.dumps(figures, indent=2))
        write_whole(place / "scores.npz", _scores(by_set))
    for line, mask in masks.items():
        write_whole(mask_path(directory, line, manifest.lines), mask)
    _write(directory / _REPORT_DATA_FILE, report.model_dump_json())
    _write(directory / REPORT_FILE, page)


def mask_path(directory: Path, line: str, lines: Sequence[str]) -> Path:
    """Return where a run keeps the mask that leaves a line's rim out."""
    return directory / line_file(line, lines, "without_rim.png")


def has_report(directory: Path) -> bool:
    """Tell whether a run came to its report's page, which is written last, when all but publishing is done."""
    return (directory / REPORT_FILE).is_file()


def read_report(directory: Path) -> ReportData:
    """Read what the page shows.

    Raises:
        RunDirectoryFault: if the run has no report yet.
    """
    try:
        return ReportData.model_validate_json((directory / _REPORT_DATA_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        why = why_no_bundle(directory) or "; give a bundle, or the directory of a run that ended"
        raise RunDirectoryFault(f"{directory} holds no report of a finished run{why}.") from error


def _scores(answers: Mapping[str, Answers]) -> bytes:
    arrays: dict[str, Any] = {}
    for name, said in answers.items():
        arrays[f"{name}_files"] = np.array([sample.path.as_posix() for sample in said.samples])
        arrays[f"{name}_scores"] = said.scores
        arrays[f"{name}_labels"] = said.labels
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())
