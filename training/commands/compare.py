"""The command `flawline compare`: names, options and help; like `__main__.py`, it needs no torch before it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.heap import imports_stay


def compare(  # noqa: PLR0917 - typer reads options from a signature; nobody calls this by position
    lines: Annotated[
        list[str], typer.Option("--line", metavar="[NAME=]FOLDER", help="a line with test frames; may be repeated")
    ],
    detectors: Annotated[str | None, typer.Option(help="names with commas between; default: all")] = None,
    config: Annotated[
        Literal["small", "paper"], typer.Option(help="of every detector: small (for a CPU), or as published")
    ] = "small",
    folder: Annotated[Path, typer.Option(help="receives bundles, figures and the page")] = Path("comparison"),
    weights: Annotated[
        str | None,
        typer.Option(envvar="FLAWLINE_WEIGHTS", help="backbones: a folder of safetensors files, or untrained"),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="also each detector untrained, which is what its training has to beat")
    ] = False,
    product: Annotated[
        Literal["texture", "object"] | None,
        typer.Option(help="what frames show: a surface that fills them, or a thing"),
    ] = None,
    roi: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MASK", help="mask image, white where parts are inspected; of several lines: NAME=MASK"
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]LAYOUT", help="how a folder is read, where that is not clear: mvtec, visa …"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn")] = None,
    review_rate: Annotated[
        float | None, typer.Option(help="wanted share of good parts that are REVIEW or FAIL")
    ] = None,
    fail_rate: Annotated[float | None, typer.Option(help="wanted share of good parts that are FAIL")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to fit")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of one computation")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="change one value of every detector; may be repeated"),
    ] = None,
) -> None:
    """Fit several detectors on one line or more, and show side by side what each finds and what it costs.

    What is measured is kept: the same command goes on where it was stopped, and with one detector more it measures
    only that one.
    """
    with imports_stay():
        from training.commands import compare_jobs  # noqa: PLC0415 - imports torch, which takes seconds that --help must not
        from training.jobs import faults_as_sentences  # noqa: PLC0415 - likewise

    named = {"product": product, "seed": seed, "review_rate": review_rate, "fail_rate": fail_rate}
    with faults_as_sentences():
        compare_jobs.compare_detectors(
            compare_jobs.Wishes(
                lines=lines,
                detectors=detectors,
                config=config,
                folder=folder,
                weights=weights,
                control=control,
                regions_of_interest=roi or [],
                layouts=layout or [],
                device=device,
                settings=[*(settings or []), *(f"{key}={value}" for key, value in named.items() if value is not None)],
            ),
            threads,
        )
