"""The training commands of `flawline`: names, options and help; what they do is told in `jobs.py`.

Nothing here needs torch before a command runs, so that `flawline --help` is quick. Exit codes: 0 done, 1 our fault or
the machine's, 2 the caller's, 130 stopped by Ctrl-C or a termination signal.
"""

from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from service.heap import imports_stay
from training.commands.backbones import distill, weights
from training.commands.compare import compare
from training.commands.import_checkpoint import import_checkpoint
from training.commands.reproduce import reproduce

commands = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

_CALLERS_FAULT = 2

Bundle = Annotated[Path, typer.Argument(help="one version: store/<name>/<version>")]
Detector = Annotated[str | None, typer.Option(help="method; default: inp_former, or that of the YAML file")]
Config = Annotated[str, typer.Option(help="small (for a CPU), paper, or a YAML file")]
Weights = Annotated[
    str | None,
    typer.Option(envvar="FLAWLINE_WEIGHTS", help="backbone: a safetensors file, a folder that holds it, or untrained"),
]
Product = Annotated[
    Literal["texture", "object"] | None, typer.Option(help="what frames show: a surface that fills them, or a thing")
]
ReviewRate = Annotated[float | None, typer.Option(help="wanted share of good parts that are REVIEW or FAIL")]
FailRate = Annotated[float | None, typer.Option(help="wanted share of good parts that are FAIL")]
Rois = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]MASK", help="mask image, white where parts are inspected; of several lines: NAME=MASK"
    ),
]
Layout = Annotated[str | None, typer.Option(help="how the folder is read, where it could be read in several ways")]
Precision = Annotated[
    Literal["fp32", "fp16", "int8"] | None,
    typer.Option(
        help="of the graph: fp32 (default), fp16 for GPUs, int8 for CPUs; refused where verdicts would differ"
    ),
]
Line = Annotated[str | None, typer.Option(help="which of the bundle's lines, where it serves several")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of one computation")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one value; may be repeated")
]


@commands.command(
    epilog="""
Examples:

flawline train lines/bottle

flawline train lines/bottle --config paper --device cuda

flawline train lines/bottle --fail-rate 0.02 --set hyperparameters.recipe.iterations=300

flawline train --line bottle=lines/bottle --line cap=lines/cap --name bottling

flawline train lines/leather --detector grnr --product texture

flawline train lines/board --tiles 3x2

flawline train --resume runs/bottle/20261122-101500

torchrun --standalone --nproc-per-node=4 --no-python flawline train lines/bottle
"""
)
def train(  # noqa: PLR0917 - typer reads options from a signature; nobody calls this by position
    context: typer.Context,
    line_folder: Annotated[
        Path | None, typer.Argument(help="train/good and, if there are any, test/good and test/<kind>")
    ] = None,
    lines: Annotated[
        list[str] | None,
        typer.Option("--line", metavar="NAME=FOLDER", help="one of several lines for one network; repeat it"),
    ] = None,
    store: Annotated[Path, typer.Option(help="folder of all bundles")] = Path("store"),
    runs: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs"),
    detector: Detector = None,
    config: Config = "small",
    backbone: Annotated[str | None, typer.Option(help="another pretrained network, by timm's name")] = None,
    weights: Weights = None,
    product: Product = None,
    name: Annotated[str | None, typer.Option(help="of the bundle, and of the line of a folder given by itself")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn")] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="fit on so many good frames of each line")] = None,
    shot_seed: Annotated[int | None, typer.Option(min=0, help="chooses these frames")] = None,
    review_rate: ReviewRate = None,
    fail_rate: FailRate = None,
    precision: Precision = None,
    roi: Rois = None,
    tiles: Annotated[
        str | None,
        typer.Option(metavar="ROWSxCOLUMNS", help="cut each frame into overlapping tiles, for small defects"),
    ] = None,
    tile_overlap: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="share of a tile that the next one covers too (default 0.25)")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]LAYOUT",
            help="how the folder is read, where it could be read in several ways: mvtec, visa …",
        ),
    ] = None,
    labelled_defects: Annotated[
        Path | None,
        typer.Option(help="a few marked defects to learn from: test/<kind> and ground_truth/<kind>, no test frames"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to fit")] = "auto",
    threads: Threads = None,
    settings: Settings = None,
    resume: Annotated[
        Path | None, typer.Option(help="directory of a stopped run, which knows all the rest but --threads")
    ] = None,
) -> None:
    """Fit a detector on the good frames of one line or several; evaluate, calibrate, export, publish it as a bundle."""
    if sum((line_folder is not None, bool(lines), resume is not None)) != 1:
        typer.echo("Name the folder of a line, or several with --line, or a stopped run with --resume.", err=True)
        raise typer.Exit(_CALLERS_FAULT)
    jobs = _jobs()
    named = {"backbone": backbone, "product": product, "seed": seed, "review_rate": review_rate, "fail_rate": fail_rate}
    named |= {"shots": shots, "shot_seed": shot_seed, "precision": precision}
    with jobs.faults_as_sentences(shares_work=True):
        if resume is not None:
            jobs.refuse_beside_resume(_named_options(context) - {"--resume", "--threads"}, resume)
            jobs.resume_run(resume, threads)
            return
        wishes = jobs.Wishes(
            store=store,
            runs=runs,
            detector=detector,
            config=config,
            weights=weights,
            name=name,
            lines=lines or [],
            regions_of_interest=roi or [],
            layouts=layout or [],
            labelled_defects=labelled_defects,
            device=device,
            settings=[
                *(settings or []),
                *(f"{key}={value}" for key, value in named.items() if value is not None),
                *jobs.tile_settings(tiles, tile_overlap),
            ],
            weights_of_environment=_is_of_environment(context, "weights"),
        )
        jobs.train_lines(line_folder, wishes, threads)


@commands.command(
    epilog="""
Examples:

flawline evaluate store/bottle/3 lines/bottle

flawline evaluate store/bottling/1 lines/cap --line cap
"""
)
def evaluate(
    bundle: Bundle,
    line_folder: Annotated[Path, typer.Argument(help="a line with test frames")],
    line: Line = None,
    layout: Layout = None,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON, and of what they are")] = None,
    threads: Threads = None,
) -> None:
    """Measure a bundle on a line's test frames, at the bundle's own thresholds."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.evaluate_bundle(bundle, line, line_folder, layout, output, threads or 1)


@commands.command(epilog="Example:\n\nflawline calibrate store/bottle/3 frames/good_of_last_week --fail-rate 0.02")
def calibrate(
    bundle: Bundle,
    good_folder: Annotated[Path, typer.Argument(help="good frames that fitting never saw")],
    review_rate: ReviewRate = None,
    fail_rate: FailRate = None,
    roi: Rois = None,
    line: Line = None,
    line_folder: Annotated[
        Path | None, typer.Option(help="a line's folder whose test frames measure the new thresholds")
    ] = None,
    layout: Layout = None,
    group_by: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="finds in a file's name which part it shows, where parts have views"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Publish a new version with the same network and one line's thresholds from other good parts."""
    jobs = _jobs()
    rates = {"review_rate": review_rate, "fail_rate": fail_rate}
    with jobs.faults_as_sentences():
        jobs.recalibrate_bundle(
            bundle, line, good_folder, line_folder, layout, rates, roi or (), group_by, threads or 1
        )


@commands.command(
    epilog="""
Examples:

flawline export runs/bottle/20261122-101500 --fail-rate 0.02

flawline export runs/bottle/20261122-101500 --precision int8

flawline export runs/bottle/20261122-101500 --roi runs/bottle/20261122-101500/without_rim.png

flawline export grnr --name leather --product texture

flawline export grnr --name leather --product texture --calibration self

flawline export runs/all_screws/20261122-101500 --zero-shot --name new_screw
"""
)
def export(  # noqa: PLR0917 - typer reads options from a signature; nobody calls this by position
    source: Annotated[str, typer.Argument(help="directory of a fitted run, or a detector that needs no fitting: grnr")],
    store: Annotated[Path | None, typer.Option(help="folder of all bundles; default: the run's, or store")] = None,
    review_rate: ReviewRate = None,
    fail_rate: FailRate = None,
    precision: Precision = None,
    roi: Rois = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="operators that stay in float32; may be repeated")
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="for a line that the run was not fitted on, without any of its frames")
    ] = False,
    name: Annotated[str | None, typer.Option(help="zero-shot: of bundle and line")] = None,
    calibration: Annotated[
        Literal["none", "self"] | None,
        typer.Option(help="zero-shot: no verdicts before flawline calibrate, or each frame measured by itself"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="of a detector's name: small (default), paper, or a YAML file")
    ] = None,
    product: Product = None,
    weights: Weights = None,
    settings: Settings = None,
    threads: Threads = None,
) -> None:
    """Export a fitted run again as a new version; or, zero-shot, make a bundle without any frame of its line.

    What the options say holds for this export alone: the run keeps what it was fitted with, and the next export begins
    from there.
    """
    jobs = _jobs()
    with jobs.faults_as_sentences():
        if not jobs.is_zero_shot(
            source,
            asked=zero_shot,
            rates=(review_rate, fail_rate),
            precision=precision or keep_float,
            regions_of_interest=roi or (),
            others={"--name": name, "--calibration": calibration, "--config": config, "--product": product},
        ):
            changes = {
                "review_rate": review_rate,
                "fail_rate": fail_rate,
                "precision": precision,
                "keep_float": keep_float,
            }
            jobs.export_run(Path(source), store, changes, threads, roi or ())
            return
        chosen = [] if product is None else [f"product={product}"]
        wishes = jobs.ZeroShotWishes(
            name=name,
            store=store,
            config=config,
            weights=weights,
            calibration=calibration or "none",
            settings=[*(settings or []), *chosen],
        )
        jobs.export_zero_shot(source, wishes, threads)


@commands.command(epilog="Example:\n\nflawline report store/bottle/3 --output bottle.html")
def report(
    source: Annotated[
        Path, typer.Argument(help="a bundle, as store/<name>/<version>, or the directory of a finished run")
    ],
    output: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
) -> None:
    """Write the HTML report of a bundle as it was published, or render that of a run anew."""
    jobs = _jobs()
    with jobs.faults_as_sentences():
        jobs.write_report(source, output)


@commands.command(epilog="Example:\n\nflawline demo --line lines/bottle")
def demo(
    line: Annotated[Path | None, typer.Option(help="your own frames; default: solar cells")] = None,
    folder: Annotated[Path, typer.Option(help="receives frames, store, run and overlays")] = Path("demo"),
    detector: Detector = None,
    config: Config = "small",
    weights: Weights = None,
    review_rate: ReviewRate = None,
    fail_rate: FailRate = None,
    threads: Threads = None,
    settings: Settings = None,
) -> None:
    """Do the main job on real frames: fit, evaluate, calibrate, export, serve, inspect over HTTP."""
    jobs = _jobs()
    named = {"review_rate": review_rate, "fail_rate": fail_rate}
    chosen = [*(settings or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]
    with jobs.faults_as_sentences():
        jobs.demonstrate(line, folder, config, detector, weights, chosen, threads)


commands.add_typer(weights, name="weights")
commands.command(epilog="Example:\n\nflawline distill --teacher mobilenetv1_100=weights/mobilenetv1_100.safetensors")(
    distill
)
commands.command(epilog="Example:\n\nflawline compare --line lines/bottle --detectors inp_former,glcf --control")(
    compare
)
commands.command(epilog="Example:\n\nflawline import-checkpoint inp_former model.pth --line lines/bottle")(
    import_checkpoint
)
commands.command(epilog="Example:\n\nflawline reproduce inp_former data/mvtec_ad --output reproduced")(reproduce)


def _named_options(context: typer.Context) -> set[str]:
    """Return the options that the command line itself names, whatever their values; not those of the environment."""
    sources = {option.opts[0]: context.get_parameter_source(option.name or "") for option in context.command.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _is_of_environment(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "ENVIRONMENT"


def _jobs() -> ModuleType:
    with imports_stay():
        from training import jobs  # noqa: PLC0415 - imports torch, which takes seconds that --help must not

    return jobs
