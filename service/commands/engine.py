"""`flawline build-engine`: makes TensorRT's plan of a bundle on the machine that will serve it; needs no torch."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

_CALLERS_FAULT = 2


def build_engine(
    bundle: Annotated[Path, typer.Argument(help="one version: store/<name>/<version>")],
    max_batch_size: Annotated[int, typer.Option(min=1, max=256, help="largest batch that the plan takes")] = 16,
    opt_batch_size: Annotated[
        int | None, typer.Option(min=1, max=256, help="batch that it is fastest at", show_default="the largest")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            envvar="FLAWLINE_ENGINE_CACHE_DIRECTORY", help="folder of plans", show_default="~/.cache/flawline/engines"
        ),
    ] = None,
    workspace_mib: Annotated[int, typer.Option(min=16, help="device memory for trying layers")] = 4096,
) -> None:
    """Build a bundle's TensorRT plan for this machine's GPU, and keep it where FLAWLINE_DEVICE=tensorrt finds it."""
    from service.contract.bundle import load_bundle  # noqa: PLC0415 - `flawline --help` needs no numpy
    from service.engines.engine import EngineOptions  # noqa: PLC0415 - see above
    from service.errors import FlawlineError  # noqa: PLC0415 - see above
    from service.settings import default_engine_cache  # noqa: PLC0415 - see above

    opt = opt_batch_size or max_batch_size
    if opt > max_batch_size:
        _leave("--opt-batch-size must not be above --max-batch-size.")
    options = EngineOptions(
        device="tensorrt", max_batch_size=max_batch_size, cache_directory=cache or default_engine_cache()
    )
    try:
        verified = load_bundle(bundle)
        from service.engines.trt import build_plan  # noqa: PLC0415 - only GPU machines have the runtime

        typer.echo(f"building {verified.manifest.name} {verified.manifest.version}; this takes minutes")
        record = build_plan(verified, options, opt, workspace_mib * 2**20)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("tensorrt", "cuda"):
            raise
        _leave(f"The package {error.name!r} is not installed. A GPU machine needs: pip install 'flawline[gpu]'")
    except FlawlineError as error:
        _leave(error.sentence)
    typer.echo(
        f"plan: {record.architecture}-{record.tensorrt}-{record.precision}, batches of 1 to {record.max_batch}, in "
        f"{options.cache_directory}"
    )


def _leave(sentence: str) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(_CALLERS_FAULT)
