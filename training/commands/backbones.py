"""The commands of `flawline` around backbones: `weights list|fetch|pack|verify` and `distill`.

Like `__main__.py`, nothing here needs torch before a command runs.
"""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from service.heap import imports_stay

weights = typer.Typer(no_args_is_help=True, help="Pretrained backbones: what exists, bring it, carry it, check it.")

Names = Annotated[list[str], typer.Argument(help="names or aliases of `flawline weights list`")]
Search = Annotated[list[Path] | None, typer.Option("--from", help="folder that may hold the files; may be repeated")]


@weights.command("list", epilog="Example:\n\nflawline weights list --folder weights")
def list_weights(
    folder: Annotated[Path, typer.Option(help="folder of weights to look into")] = Path("weights"),
) -> None:
    """Show every known backbone, where its weights come from, and whether they are here."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.list_weights(folder)


@weights.command(epilog="Example:\n\nflawline weights fetch dinov2_vits14_reg --folder weights")
def fetch(
    names: Names,
    folder: Annotated[Path, typer.Option(help="where the files go")] = Path("weights"),
) -> None:
    """Download weights on a connected machine and record their SHA-256."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.bring_weights(names, folder, [])


@weights.command(
    epilog="Example:\n\nflawline weights pack carry dinov2_vits14_reg wide_resnet50_2\n\n"
    "and behind the air gap\n\nflawline weights verify carry"
)
def pack(
    folder: Annotated[Path, typer.Argument(help="directory to carry across the air gap")],
    names: Names,
    search: Search = None,
) -> None:
    """Put weights and their lock into one directory that can be carried to a machine without internet."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.bring_weights(names, folder, [*(search or []), Path("weights")])


@weights.command(epilog="Example:\n\nflawline weights verify carry")
def verify(folder: Annotated[Path, typer.Argument(help="directory made by fetch or pack")]) -> None:
    """Check every file of a directory against its lock; exit code 2 if one differs or is missing."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.verify_weights(folder)


def distill(
    teacher: Annotated[
        list[str], typer.Option(help="NAME=FILE or NAME=FILE:SHARE, timm's name and safetensors; may be repeated")
    ],
    output: Annotated[Path, typer.Option(help="receives checkpoints, weights and figures")] = Path("runs/distill"),
    images: Annotated[int, typer.Option(min=1, help="generated frames to show, rounded to whole shards")] = 400_000,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="processes that draw frames and ask the teachers")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="threads of one process")] = 1,
    bfloat16: Annotated[bool, typer.Option(help="faster where the CPU has it")] = False,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in the output folder")] = False,
) -> None:
    """Distil a compact backbone from larger ones, on generated frames only."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.distil_backbone(
            teacher, output, images, seed=seed, workers=workers, threads=threads, bfloat16=bfloat16, resume=resume
        )


def _jobs() -> ModuleType:
    with imports_stay():
        from training.commands import backbone_jobs  # noqa: PLC0415 - imports torch, which takes seconds that --help must not

    return backbone_jobs
