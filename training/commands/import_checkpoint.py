"""The command `flawline import-checkpoint`: names, options and help; like `__main__.py`, it needs no torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.heap import imports_stay


def import_checkpoint(  # noqa: PLR0917 - typer reads options from a signature; nobody calls this by position
    detector: Annotated[str, typer.Argument(help="inp_former or ami_net")],
    checkpoint: Annotated[Path, typer.Argument(help="as the authors released it: model.pth, AMAE.pth")],
    lines: Annotated[
        list[str],
        typer.Option("--line", metavar="[NAME=]FOLDER", help="a line; repeat it for one bundle of several lines"),
    ],
    side: Annotated[
        int | None, typer.Option("--size", min=14, help="side of the image to run at; default: the authors'")
    ] = None,
    store: Annotated[Path, typer.Option(help="folder of all bundles")] = Path("store"),
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="of the bundle; default: the only line's")] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]LAYOUT", help="how a folder is read, where that is not clear: mvtec, visa …"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(envvar="FLAWLINE_WEIGHTS", help="backbone, where the checkpoint has none: a file or its folder"),
    ] = None,
    review_rate: Annotated[
        float | None, typer.Option(help="wanted share of good parts that are REVIEW or FAIL")
    ] = None,
    fail_rate: Annotated[float | None, typer.Option(help="wanted share of good parts that are FAIL")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to evaluate")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of one computation")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one value; may be repeated")
    ] = None,
) -> None:
    """Turn a checkpoint that a method's authors released into a bundle for a line: calibrate, evaluate, export.

    Zero-shot, for a line without frames: import INP-Former's for any line that has some, then flawline export RUN
    --zero-shot --name NAME, where RUN is the run that the import names.
    """
    with imports_stay():
        from training import jobs  # noqa: PLC0415 - imports torch, which takes seconds that --help must not

    rates = {"review_rate": review_rate, "fail_rate": fail_rate}
    with jobs.faults_as_sentences():
        wishes = jobs.Wishes(
            store=store,
            runs=runs,
            detector=detector,
            config="paper",
            weights=weights,
            name=name,
            lines=(),
            regions_of_interest=(),
            layouts=layout or [],
            labelled_defects=None,
            device=device,
            settings=[*(settings or []), *(f"{key}={value}" for key, value in rates.items() if value is not None)],
        )
        jobs.import_released(detector, checkpoint, lines, side, wishes, threads)
