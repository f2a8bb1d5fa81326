"""What the backbone commands do; see `backbones.py`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console

from training.backbones.weight_lock import (
    LOCK_FILE,
    SHIPPED_FOLDER,
    WeightsRefused,
    digest_of,
    fetch_weights,
    read_lock,
    verify_folder,
)
from training.bundling.store import is_machines_fault
from training.config import ConfigFault
from training.distillation.distill import distil, write_student
from training.distillation.lessons import DistillConfig, Teacher
from training.fitting.checkpoint import CheckpointRefused
from training.fitting.peers import refuse_company
from training.progress import Reporter, choose_reporter
from training.stops import termination_interrupts

_MACHINES, _CALLERS = 1, 2


@contextlib.contextmanager
def faults_as_sentences() -> Iterator[None]:
    """Turn every expected fault into one sentence on stderr and an exit code: 1 the machine's, 2 the caller's.

    A termination signal ends the command as Ctrl-C does.

    Raises:
        typer.Exit: with that code.
    """
    try:
        with termination_interrupts():
            refuse_company()
            yield
    except (CheckpointRefused, ConfigFault, ValueError, WeightsRefused) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(_CALLERS) from error
    except OSError as error:
        typer.echo(f"{error.filename or 'A file'}: {error.strerror or error}.", err=True)
        raise typer.Exit(_MACHINES if is_machines_fault(error) else _CALLERS) from error


def list_weights(folder: Path) -> None:
    """Tell every locked backbone, and which files lie in the package or the folder."""
    rows = []
    for entry in read_lock().values():
        places = {"in the package": SHIPPED_FOLDER, f"in {folder}": folder}
        found = next((text for text, place in places.items() if (place / entry.file).is_file()), "not here")
        names = ", ".join((entry.name, *entry.aliases))
        digest = "recorded at the first fetch" if entry.sha256 is None else entry.sha256[:16]
        rows.append((names, entry.licence, entry.source, digest, found))
    _reporter().table("Backbones", ("name", "licence", "source", "SHA-256", "where"), rows)


def bring_weights(names: Sequence[str], folder: Path, search: Sequence[Path]) -> None:
    """Fetch or copy weights into a folder and tell what it holds."""
    brought = fetch_weights(names, folder, search=search)
    rows = [(entry.name, entry.file, entry.sha256 or "") for entry in brought]
    reporter = _reporter()
    reporter.table(f"In {folder}", ("name", "file", "SHA-256"), rows)
    reporter.note(
        f"{LOCK_FILE} has SHA-256 {digest_of(folder / LOCK_FILE)}; compare it after `flawline weights verify`."
    )


def verify_weights(folder: Path) -> None:
    """Check a folder against its lock and tell the outcome.

    Raises:
        WeightsRefused: if a file is missing or differs.
    """
    checked = verify_folder(folder)
    reporter = _reporter()
    reporter.table(
        f"In {folder}",
        ("name", "file", "state"),
        [(c.entry.name, c.entry.file, c.fault or "as locked") for c in checked],
    )
    faulty = [c.entry.name for c in checked if c.fault]
    if faulty:
        raise WeightsRefused(
            f"{folder} is not what was packed; on a connected machine run "
            f"`flawline weights pack {folder.name} {' '.join(faulty)}` and carry it again."
        )
    reporter.note(f"All is as packed. {LOCK_FILE} has SHA-256 {digest_of(folder / LOCK_FILE)}.")


def distil_backbone(
    teachers: Sequence[str],
    output: Path,
    images: int,
    *,
    seed: int,
    workers: int,
    threads: int,
    bfloat16: bool,
    resume: bool,
) -> None:
    """Distil a student and write it with its figures."""
    torch.set_num_threads(threads)
    plain = DistillConfig(tuple(read_teacher(text) for text in teachers), seed=seed, images=0, bfloat16=bfloat16)
    config = plain.with_images(images)
    reporter = _reporter()
    distilled = distil(config, output, reporter, workers=workers, resume=resume)
    path = write_student(distilled, config, output)
    reporter.note(f"Written: {path}, {path.stat().st_size / 1e6:.2f} MB, SHA-256 {digest_of(path)}.")


def read_teacher(text: str) -> Teacher:
    """Read NAME=FILE or NAME=FILE:SHARE.

    Raises:
        ValueError: if it has another form, or the file is not there.
    """
    name, _, rest = text.partition("=")
    file, _, share = rest.partition(":")
    if not name or not Path(file).is_file():
        raise ValueError(f"{text!r} names no teacher; write NAME=FILE or NAME=FILE:SHARE with an existing file.")
    return Teacher(name, Path(file), float(share or 1))


def _reporter() -> Reporter:
    return choose_reporter(Console())
