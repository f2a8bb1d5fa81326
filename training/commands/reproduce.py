"""The command `flawline reproduce`: names, options and help; like `__main__.py`, it needs no torch before it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from service.heap import imports_stay


def reproduce(  # noqa: PLR0917 - typer reads options from a signature; nobody calls this by position
    detector: Annotated[str, typer.Argument(help="method")],
    dataset: Annotated[Path, typer.Argument(help="folder of the data set, as its publisher packs it")],
    categories: Annotated[str | None, typer.Option(help="names with commas between; default: all")] = None,
    config: Annotated[str, typer.Option(help="paper, small (for a CPU), or a YAML file")] = "paper",
    setting: Annotated[
        Literal["paper", "single-class", "multi-class", "1-shot", "2-shot", "4-shot", "zero-shot"],
        typer.Option(
            help="the paper's own, a model for each category, one model for all, or few good frames; zero-shot only "
            "tells what was published and how to come by it"
        ),
    ] = "paper",
    seeds: Annotated[str, typer.Option(help="whole numbers with commas between")] = "1",
    output: Annotated[Path, typer.Option(help="receives results, tables and checkpoints")] = Path("reproduction"),
    layout: Annotated[
        str | None,
        typer.Option(help="of the data set, where its folders don't show it, as real_iad_sv or elpv_doubtful"),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="another pretrained network, by timm's name")] = None,
    weights: Annotated[
        str | None,
        typer.Option(envvar="FLAWLINE_WEIGHTS", help="backbone: a safetensors file, its folder, or untrained"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to fit")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="threads of one computation")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one value; may be repeated")
    ] = None,
) -> None:
    """Run a paper's setting on a data set that you have, and show our figures beside the published ones.

    Every finished model is kept as JSON in the output folder; the same command goes on where it was stopped.
    """
    with imports_stay():
        from training.commands import reproduce_jobs  # noqa: PLC0415 - imports torch, which takes seconds that --help must not
        from training.jobs import faults_as_sentences  # noqa: PLC0415 - likewise

    changed = [*(settings or []), *([] if backbone is None else [f"backbone={backbone}"])]
    with faults_as_sentences():
        reproduce_jobs.reproduce_paper(
            detector,
            dataset,
            reproduce_jobs.ReproductionWishes(
                categories=[] if categories is None else reproduce_jobs.split_names(categories),
                config=config,
                setting=setting,
                seeds=reproduce_jobs.split_seeds(seeds),
                output=output,
                layout=layout,
                weights=weights,
                device=device,
                settings=changed,
            ),
            threads,
        )
