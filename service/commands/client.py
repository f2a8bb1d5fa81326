"""The commands of those who ask a server: `flawline inspect` for files, `flawline camera` for load.

Both speak through `service.client`, so their rule is its rule: whatever goes wrong is `NO_VERDICT`.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from service.camera import Arrivals, CameraPlan, Tally, run_camera
from service.client import (
    DEFAULT_DEADLINE_MS,
    MEDIA_TYPES,
    AsyncClient,
    Client,
    ClientFault,
    EncodedFrame,
    Outcome,
    Problem,
    RawFrame,
)
from service.client import Frame as ClientFrame
from service.commands.admin import admin
from service.commands.connection_options import (
    Authority,
    Certificate,
    KeyFile,
    Url,
    connect,
    leave,
    read_key,
    tls_context,
)
from service.commands.frame_files import find_files
from service.contract.bundle import load_bundle, newest_bundles, promised_lines
from service.contract.frames import FrameLimits, decode_image, encode_jpeg, encode_png
from service.contract.golden import read_golden
from service.contract.legible import legible
from service.contract.policy import Verdict
from service.errors import FlawlineError

commands = typer.Typer()
commands.add_typer(admin, name="admin")

FrameFormat = Literal["file", "jpeg", "png", "rgb8", "mono8"]
_COLOURS = {"PASS": "green", "REVIEW": "yellow", "FAIL": "red", "NO_VERDICT": "bold magenta"}
_ALL_PASS, _NO_VERDICT, _NOT_ALL_PASS = 0, 1, 3  # 2 is the caller's fault
_ALL_JUDGED = 0  # of a camera, which is there to ask: to stop a part is as good an answer as to let it pass
_REFRESH_HZ = 2.0

Deadline = Annotated[float, typer.Option(help="Milliseconds from sending a frame to its answer.", min=1)]
_INSPECT_HELP = """Inspect image files, or every image in a folder, and tell the verdicts.

The exit code is 0 if every part is PASS, 3 if one is REVIEW or FAIL, 1 if one has no verdict, or if a folder holds what
can't be read. Links are followed.

--overlays draws incoming/left/0001.jpg to overlays/left/FAIL_0001.jpg.png, in the place of an older picture of that
file, whatever its verdict was. A picture that is missing changes no verdict, and its line says why.

[bold]Examples[/bold]

flawline inspect frame.jpg --line cap

flawline inspect incoming/ --line cap --overlays overlays --connections 8

flawline inspect incoming/ --line cap --json > verdicts.jsonl
"""
_CAMERA_HELP = """Simulate cameras that trigger at a rate, and show a live table of what came back.

The exit code is 0 if every frame was judged, whatever its verdict, and 1 if one had no verdict or was dropped, or none
was judged. Frames whose answer Ctrl-C did not wait for don't count.

[bold]Examples[/bold]

flawline camera --line cap --frames incoming --rate 10

flawline camera --line cap --line hazelnut --store store --rate 4 --burst 3 --duration 60

flawline camera --line cap --store store --rate 30 --arrivals poisson --format mono8 --deadline-ms 200 --json
"""


@commands.command(help=_INSPECT_HELP)
def inspect(
    sources: Annotated[list[Path], typer.Argument(help="Image files or folders of them.", metavar="FILE|FOLDER...")],
    *,
    line: Annotated[str, typer.Option(help="Line that the parts belong to.")],
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    connections: Annotated[int, typer.Option(help="Frames under way at a time.", min=1, max=256)] = 4,
    overlays: Annotated[Path | None, typer.Option(help="Folder that receives a picture of each frame.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Version of the line's policy; others than the live one want a key that may choose.",
            show_default="live",
        ),
    ] = None,
    authority: Authority = None,
    certificate: Certificate = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a frame instead of a table.")] = False,
) -> None:
    """Inspect files and end with an exit code that a script can use."""
    files = _images(sources, overlays)
    if not files:
        leave(f"There is no image in {', '.join(map(str, sources))}; known are files with {', '.join(MEDIA_TYPES)}.")
    if overlays is not None:
        try:
            overlays.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            leave(f"{overlays} can't be the folder of overlays: {error.strerror}.")
    pictures = None if overlays is None else _Pictures(overlays, _root_of(sources), files)
    console = Console()
    verdicts: Counter[Verdict] = Counter()
    key, tls = read_key(key_file), tls_context(authority, certificate)
    with (
        connect(lambda: Client(url, key, deadline_ms=deadline_ms, connections=connections, tls=tls)) as client,
        ThreadPoolExecutor(connections) as cameras,
    ):

        def judge(file: Path) -> _Seen:
            outcome = client.inspect(
                line, file, part_id=_part_id(file), heatmap="none" if pictures is None else "overlay", policy=policy
            )
            return _Seen(outcome, None if pictures is None else pictures.draw(client, file, outcome))

        for file, seen in zip(files, cameras.map(judge, files), strict=True):
            verdicts[seen.outcome.verdict] += 1
            _tell(file, seen, console, as_json=as_json)
    if not as_json:
        console.print(", ".join(f"{count} {verdict.value}" for verdict, count in verdicts.items()), highlight=False)
    raise typer.Exit(_exit_code(verdicts))


@commands.command(help=_CAMERA_HELP)
def camera(
    *,
    line: Annotated[list[str], typer.Option(help="Line to look at; once for each camera.")],
    url: Url = "http://127.0.0.1:8000",
    frames: Annotated[Path | None, typer.Option(help="Folder of images, sent in turn.")] = None,
    store: Annotated[Path | None, typer.Option(help="Instead: take the golden frames of each line's bundle.")] = None,
    rate: Annotated[float, typer.Option(help="Parts a second of each camera.", min=0.001, max=10_000)] = 5,
    arrivals: Annotated[Arrivals, typer.Option(help="How parts arrive.")] = "regular",
    jitter: Annotated[float, typer.Option(help="Of regular parts, in times between two.", min=0, max=1)] = 0.1,
    burst: Annotated[int, typer.Option(help="Frames of each part.", min=1, max=100)] = 1,
    buffer: Annotated[int, typer.Option(help="Frames under way before a camera drops one.", min=1)] = 64,
    duration: Annotated[float | None, typer.Option(help="Seconds.", min=0.1, show_default="until Ctrl-C")] = None,
    frame_format: Annotated[FrameFormat, typer.Option("--format", help="How frames travel.")] = "file",
    key_file: KeyFile = None,
    deadline_ms: Deadline = DEFAULT_DEADLINE_MS,
    authority: Authority = None,
    certificate: Certificate = None,
    seed: Annotated[int, typer.Option(help="Of arrivals.")] = 1,
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Have the server keep a heatmap of each frame.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Tell the end as JSON, and nothing before.")] = False,
) -> None:
    """Trigger cameras and tell what they saw."""
    try:
        supplies = [_supply(name, frames, store, frame_format) for name in line]
    except FlawlineError as error:
        leave(error.sentence)
    plans = [CameraPlan(name, rate, arrivals, jitter, burst, buffer, seed + number) for number, name in enumerate(line)]
    tallies = [Tally() for _ in plans]
    key, tls = read_key(key_file), tls_context(authority, certificate)
    made = connect(lambda: AsyncClient(url, key, deadline_ms=deadline_ms, connections=buffer * len(plans), tls=tls))
    show = _Display(plans, tallies, quiet=as_json)

    async def shoot_all() -> None:
        async with made as client:

            async def send(name: str, frame: ClientFrame, number: int) -> Outcome:
                return await client.inspect(name, frame, sequence=number, heatmap="overlay" if heatmaps else "none")

            watching = asyncio.create_task(show.refresh())
            try:
                async with asyncio.TaskGroup() as group:
                    for plan, tally, supply in zip(plans, tallies, supplies, strict=True):
                        group.create_task(
                            run_camera(
                                plan,
                                supply,
                                tally,
                                send,
                                duration_s=duration or float("inf"),
                                clock=time.monotonic,
                            )
                        )
            finally:
                watching.cancel()

    try:
        with show:
            asyncio.run(shoot_all())
    except KeyboardInterrupt:
        pass  # how a run without duration ends
    if as_json:
        typer.echo(json.dumps([_summary(plan, tally) for plan, tally in zip(plans, tallies, strict=True)]))
    raise typer.Exit(_ALL_JUDGED if all(tally.saw_all for tally in tallies) else _NO_VERDICT)


class _Display:
    """The live table at a terminal; once, at the end, where nobody watches."""

    def __init__(self, plans: Sequence[CameraPlan], tallies: Sequence[Tally], *, quiet: bool) -> None:
        self._plans = plans
        self._tallies = tallies
        self._begun_at = time.monotonic()
        console = Console(quiet=quiet)
        self._live = Live(self._table(), console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.update(self._table(), refresh=True)
        self._live.stop()

    async def refresh(self) -> None:
        """Draw the table anew, again and again."""
        while True:
            await asyncio.sleep(1 / _REFRESH_HZ)
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        elapsed_s = max(time.monotonic() - self._begun_at, 1e-9)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("line", no_wrap=True, max_width=16)
        for name in ("sent", "/s", *_COLOURS, "dropped", "p50 ms", "p99 ms"):
            table.add_column(name, justify="right", no_wrap=True)
        problems: Counter[str] = Counter()
        for plan, tally in zip(self._plans, self._tallies, strict=True):
            middle, late = tally.percentile_ms(0.5), tally.percentile_ms(0.99)
            table.add_row(
                plan.line,
                str(tally.sent),
                f"{tally.sent / elapsed_s:.1f}",
                *(f"[{colour}]{tally.verdicts[name]}[/]" for name, colour in _COLOURS.items()),
                str(tally.dropped),
                "-" if middle is None else f"{middle:.1f}",
                "-" if late is None else f"{late:.1f}",
            )
            problems.update(tally.problems)
        if problems:
            table.caption = ", ".join(f"{count} {code}" for code, count in problems.most_common())
        return table


def _summary(plan: CameraPlan, tally: Tally) -> dict[str, object]:
    return {
        "line": plan.line,
        "sent": tally.sent,
        "dropped": tally.dropped,
        "verdicts": dict(tally.verdicts),
        "problems": dict(tally.problems),
        "p50_ms": tally.percentile_ms(0.5),
        "p99_ms": tally.percentile_ms(0.99),
    }


def _supply(line: str, folder: Path | None, store: Path | None, frame_format: FrameFormat) -> list[ClientFrame]:
    """Return the frames that a camera sends, in a mixed order that is always the same.

    Raises:
        FlawlineError: if a frame or bundle can't be read.
    """
    if (folder is None) == (store is None):
        leave("Give frames: --frames FOLDER, or --store STORE for the golden frames of the lines' bundles.")
    if store is not None:
        serving = [path for name, path in newest_bundles(store).items() if line in promised_lines(path, name)]
        if not serving:
            leave(f"{store} has no bundle of the line {line}; give --frames FOLDER instead.")
        bundle = load_bundle(serving[0])
        answers = [answer for answer in read_golden(bundle).answers if answer.line == line]
        encoded = [EncodedFrame(bundle.files[answer.file], "image/png") for answer in answers]
    else:
        encoded = [_read(file) for file in _images([folder or Path()])]
    if not encoded:
        leave(f"There is no image in {folder}; known are files with {', '.join(MEDIA_TYPES)}.")
    random.Random(line).shuffle(encoded)  # noqa: S311 - an order, not a secret
    return [_convert(frame, frame_format) for frame in encoded]


def _read(file: Path) -> EncodedFrame:
    """Read an image file, or end with a sentence: a camera without some of its frames is not the one that was meant."""
    try:
        data = file.read_bytes()
    except OSError as error:
        leave(f"{file} can't be read: {error.strerror}.")
    media_type = MEDIA_TYPES.get(file.suffix.lower())
    if media_type is None:
        leave(f"{file} is no image file that the service takes: {', '.join(MEDIA_TYPES)}.")
    return EncodedFrame(data, media_type)


def _convert(frame: EncodedFrame, frame_format: FrameFormat) -> ClientFrame:
    if frame_format == "file":
        return frame
    pixels = decode_image(frame.data, FrameLimits()).pixels
    if frame_format == "jpeg":
        return EncodedFrame(encode_jpeg(pixels), "image/jpeg")
    if frame_format == "png":
        return EncodedFrame(encode_png(pixels), "image/png")
    return RawFrame(
        pixels if frame_format == "rgb8" else pixels[:, :, 1], "RGB8" if frame_format == "rgb8" else "Mono8"
    )


def _images(sources: Sequence[Path], overlays: Path | None = None) -> list[Path]:
    """Return the files of sources; of a folder its images, without the pictures that were drawn into a folder in it.

    Files that are left out are told of, and the command ends where some might be that nobody can tell of.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    try:
        for source in sources:
            if not source.is_dir():
                images.append(source)
                continue
            drawn = None if overlays is None or _lies_in(source, overlays) else overlays
            for file in find_files(source, drawn):
                suffix = file.suffix.lower()
                if suffix in MEDIA_TYPES:
                    images.append(file)
                elif not file.name.startswith("."):
                    others[suffix or "without suffix"] += 1
    except OSError as error:
        typer.echo(legible(f"{error.filename} can't be read: {error.strerror}; so no frame was sent."), err=True)
        raise typer.Exit(_NO_VERDICT) from error
    if others:
        told = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        typer.echo(legible(f"Passed over, as no images by their names: {told}."), err=True)
    return images


def _lies_in(place: Path, folder: Path) -> bool:
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))


def _root_of(sources: Sequence[Path]) -> str:
    """Return the folder under which every file has a path of its own: that of the one folder, or of all sources."""
    return os.path.commonpath([_place_of(source if source.is_dir() else source.parent) for source in sources])


def _place_of(folder: Path) -> str:
    """Return a folder's absolute path without `..`, by its names alone: a link leads out of the root."""
    return os.path.normpath(folder.absolute())


class _Seen(NamedTuple):
    """What became of a frame, and why its picture is missing where it is."""

    outcome: Outcome
    unpainted: Problem | None


class _Pictures:
    """The overlay of each file, named by its last verdict, in a folder that is laid out as the sources are.

    Args:
        folder: of the pictures.
        root: under which every file has a path of its own.
        files: that will be inspected; the command ends where one of them would be written over or taken away.
    """

    def __init__(self, folder: Path, root: str, files: Sequence[Path]) -> None:
        self._folder = folder
        self._root = root
        inspected = {_place_of(file) for file in files}
        for file in files:
            for picture in self._places(file).values():
                if _place_of(picture) in inspected:
                    leave(f"{picture} is to be inspected, and would be taken for a picture; choose another folder.")

    def draw(self, client: Client, file: Path, outcome: Outcome) -> Problem | None:
        """Put the overlay of an inspection, if there was one, in the place of an older one; return why not."""
        places = self._places(file)
        picture = places[outcome.verdict]
        try:
            for older in places.values():
                if older.is_file():
                    older.unlink(missing_ok=True)  # a file that is named twice is drawn by two threads
            if outcome.answer is None:
                return None
            data = client.heatmap(outcome.answer.inspection_id, "overlay")
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(data)
        except ClientFault as fault:
            return fault.problem
        except OSError as error:
            return Problem("overlay_unwritable", f"{error.filename or picture} can't be written: {error.strerror}.")
        return None

    def _places(self, file: Path) -> dict[Verdict, Path]:
        """Return where the picture of a file may be; it keeps the file's suffix, since a.jpg and a.png are two."""
        beside = self._folder / os.path.relpath(_place_of(file.parent), self._root)
        return {verdict: beside / f"{verdict.value}_{file.name}.png" for verdict in Verdict}


def _tell(file: Path, seen: _Seen, console: Console, *, as_json: bool) -> None:
    outcome, unpainted = seen
    if as_json:
        document: dict[str, object] = {
            "file": str(file),
            "verdict": outcome.verdict.value,
            "elapsed_ms": round(outcome.elapsed_ms, 3),
        }
        if outcome.answer is not None:
            document["answer"] = outcome.answer.model_dump(mode="json")
        if outcome.problem is not None:
            document["problem"] = {"code": outcome.problem.code, "sentence": outcome.problem.sentence}
        if unpainted is not None:
            document["overlay_problem"] = {"code": unpainted.code, "sentence": unpainted.sentence}
        typer.echo(json.dumps(document))
        return
    verdict = f"[{_COLOURS[outcome.verdict.value]}]{outcome.verdict.value:<10}[/]"
    if outcome.answer is None:
        said = "" if outcome.problem is None else outcome.problem.sentence
    else:
        found = outcome.answer.regions_total
        said = f"score {outcome.answer.score:.4g}, {found} region{'' if found == 1 else 's'}"
    if unpainted is not None:
        said += f"; no overlay: {unpainted.sentence}"
    console.print(f"{verdict} {outcome.elapsed_ms:7.1f} ms  ", end="", highlight=False)
    console.print(legible(f"{file}  {said}"), markup=False, highlight=False, soft_wrap=True)


def _exit_code(verdicts: Counter[Verdict]) -> int:
    if verdicts[Verdict.NO_VERDICT]:
        return _NO_VERDICT
    return _ALL_PASS if set(verdicts) == {Verdict.PASS} else _NOT_ALL_PASS


def _part_id(file: Path) -> str | None:
    """Name the part by its file, where that can travel as an id."""
    return file.name if file.name.isascii() and file.name.isprintable() and '"' not in file.name else None
