"""`flawline admin`: what a running server serves, and changes of it, over its administration port.

Exit codes: 0 done, 1 the server can't be reached or can't do it now, 2 the caller's fault, 3 a version is refused and
what was live still is. What was done and would not survive a restart is told on standard error.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.administrator import DEFAULT_TIMEOUT_S, Administrator
from service.client import Client, ClientFault
from service.commands.connection_options import (
    USAGE,
    Authority,
    Certificate,
    KeyFile,
    connect,
    leave,
    read_key,
    tls_context,
)
from service.contract.legible import legible
from service.schemas import BundleAnswer, ChangedBundleAnswer, ChangedLineAnswer, LineSummary, Name, Version

_NOT_NOW, _REFUSED = 1, 3
_STATUS_OF_REFUSAL, _SERVER_FAULTS = 409, 500
_COLOURS = {
    "ready": "green",
    "live": "green",
    "kept": "cyan",
    "shadow": "cyan",
    "loading": "yellow",
    "unloaded": "yellow",
    "refused": "red",
    "unhealthy": "bold red",
}
_HELP = """Tell and change what a running server serves.

Asks the administration port, which is off until FLAWLINE_ADMIN_PORT and FLAWLINE_KEYS_FILE are set; the key needs the
action admin (flawline keys new --actions admin). Keys need no command: the server takes a changed keys file by itself.

Exit codes: 0 done, 1 not reachable or not now, 2 asked in the wrong way, 3 refused and nothing has changed.

[bold]Examples[/bold]

export FLAWLINE_CLIENT_ADMIN_URL=http://127.0.0.1:8001 FLAWLINE_CLIENT_KEY_FILE=admin.key

flawline admin lines

flawline admin versions cap

flawline admin activate cap 4

flawline admin roll-back cap

flawline admin policy cap strict
"""

AdminUrl = Annotated[str, typer.Option(envvar="FLAWLINE_CLIENT_ADMIN_URL", help="Address of the administration.")]
BundleName = Annotated[str, typer.Argument(help="Name of the bundle, which is the line's where it serves one line.")]
BundleVersion = Annotated[str, typer.Argument(help="Its version, a whole number.")]
LineArgument = Annotated[str, typer.Argument(metavar="LINE", help="Name of the line.")]

admin = typer.Typer(no_args_is_help=True, help=_HELP, rich_markup_mode="rich")


@dataclass(frozen=True)
class _Asking:
    """How the group was called; its commands take it from there."""

    url: str
    key: str | None
    timeout_s: float
    authority: Authority
    certificate: Certificate
    as_json: bool


@admin.callback()
def _about(
    context: typer.Context,
    *,
    url: AdminUrl = "http://127.0.0.1:8001",
    key_file: KeyFile = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds for one change; loading a version takes time.", min=1)
    ] = DEFAULT_TIMEOUT_S,
    authority: Authority = None,
    certificate: Certificate = None,
    as_json: Annotated[bool, typer.Option("--json", help="The server's answer instead of a table.")] = False,
) -> None:
    context.obj = _Asking(url, read_key(key_file), timeout_s, authority, certificate, as_json)


@admin.command(epilog="Example:\n\nflawline admin lines")
def lines(context: typer.Context) -> None:
    """List the lines: how each stands, which version and policy serve it, where and in which precision."""
    with _administrator(context) as administrator:
        answer = administrator.lines()
    rows = [
        (
            one.line,
            one.state,
            one.bundle or "-",
            one.version or "-",
            one.policy or "-",
            ", ".join(policy for policy in one.policies if policy != one.policy) or "-",
            "-" if one.device is None else f"{one.device} {one.precision}",
            one.reason or "",
        )
        for one in answer.lines
    ]
    head = ("line", "state", "bundle", "version", "policy", "others", "device", "reason")
    _tell(context, answer, head, rows)
    _tell_of_forgotten(answer.why_forgotten)


@admin.command(epilog="Examples:\n\nflawline admin versions\n\nflawline admin versions cap")
def versions(
    context: typer.Context,
    bundle: Annotated[str | None, typer.Argument(help="Name of one bundle.", show_default="all")] = None,
) -> None:
    """List the versions of bundles: live, kept for rolling back, shadow, refused and why, or only stored."""
    with _administrator(context) as administrator:
        if bundle is None:
            answer = administrator.bundles()
            _tell(context, answer, _VERSION_HEAD, [row for one in answer.bundles for row in _version_rows(one)])
        else:
            _tell_versions(context, administrator.bundle(_name(bundle)))


@admin.command(epilog="Example:\n\nflawline admin activate cap 4")
def activate(context: typer.Context, bundle: BundleName, version: BundleVersion) -> None:
    """Make a version live, after it was verified and proved beside the one that serves; newer ones are held back."""
    with _administrator(context) as administrator:
        _tell_versions(context, administrator.activate(_name(bundle), _version(version)))


@admin.command("roll-back", epilog="Example:\n\nflawline admin roll-back cap")
def roll_back(context: typer.Context, bundle: BundleName) -> None:
    """Go back to the version that was live before; the one that is left stays out until it is activated by name."""
    with _administrator(context) as administrator:
        _tell_versions(context, administrator.roll_back(_name(bundle)))


@admin.command(epilog="Examples:\n\nflawline admin shadow cap 4\n\nflawline admin shadow cap --off")
def shadow(
    context: typer.Context,
    bundle: BundleName,
    version: Annotated[str | None, typer.Argument(help="Version that looks on.")] = None,
    *,
    off: Annotated[bool, typer.Option("--off", help="Let no version look on any more.")] = False,
) -> None:
    """Let a version look at the frames that the live one answers; it answers nobody, and ends with the process."""
    if (version is None) != off:
        leave("Name the version that shall look on, or say --off.")
    with _administrator(context) as administrator:
        if version is None:
            _tell_versions(context, administrator.stop_shadow(_name(bundle)))
        else:
            _tell_versions(context, administrator.start_shadow(_name(bundle), _version(version)))


@admin.command(epilog="Example:\n\nflawline admin disagreements cap")
def disagreements(context: typer.Context, line: LineArgument) -> None:
    """List the last frames on which the shadow would have said something else, the newest first."""
    with _administrator(context) as administrator:
        answer = administrator.disagreements(_name(line))
    rows = [
        (one.at, one.kind, one.live.verdict.value, one.shadow.verdict.value, one.part_id or "-", one.inspection_id)
        for one in answer.disagreements
    ]
    _tell(context, answer, ("at", "kind", "live", "shadow", "part", "inspection"), rows)


@admin.command(epilog="Example:\n\nflawline admin policy cap strict")
def policy(
    context: typer.Context,
    line: LineArgument,
    version: Annotated[str, typer.Argument(help="Of the policy: the name of its file in <store>/<line>/policies.")],
) -> None:
    """Judge a line by another of its policies while the present version of its bundle is live."""
    with _administrator(context) as administrator:
        _tell_line(context, administrator.activate_policy(_name(line), _name(version)))


@admin.command(epilog="Example:\n\nflawline admin load cap")
def load(context: typer.Context, line: LineArgument) -> None:
    """Serve a line again that was unloaded, or take the newest version of its bundle that is not held back."""
    with _administrator(context) as administrator:
        _tell_line(context, administrator.load(_name(line)))


@admin.command(epilog="Example:\n\nflawline admin unload cap")
def unload(context: typer.Context, line: LineArgument) -> None:
    """Serve a line no longer; its frames get no verdict until it is loaded again."""
    with _administrator(context) as administrator:
        _tell_line(context, administrator.unload(_name(line)))


@admin.command(epilog="Example:\n\nflawline admin rescan")
def rescan(context: typer.Context) -> None:
    """Have the store looked at now: new versions become live, policies are offered; exit code 3 if one is refused."""
    with _administrator(context) as administrator:
        answer = administrator.rescan()
    rows: list[Sequence[str]] = [("live", one.bundle, one.version, "") for one in answer.activated]
    rows += [("refused", one.bundle, one.version, one.reason) for one in answer.refused]
    rows += [("gone", one.bundle, one.version, one.reason) for one in answer.gone]
    rows += [("offered", *one.split("/", 1), "policy") for one in answer.policies]
    rows += [("withdrawn", *one.split("/", 1), "policy") for one in answer.withdrawn]
    rows += [("refused", one.line, one.version, f"policy: {one.reason}") for one in answer.refused_policies]
    _tell(context, answer, ("state", "bundle or line", "version", "reason"), rows)
    if answer.refused or answer.refused_policies:
        raise typer.Exit(_REFUSED)


_VERSION_HEAD = ("bundle", "version", "state", "held back", "lines", "MiB", "reason")


def _version_rows(bundle: BundleAnswer) -> Iterator[tuple[str, ...]]:
    for one in bundle.versions:
        size = "-" if one.size_bytes is None else f"{one.size_bytes / 2**20:.1f}"
        held = "yes" if one.held_back else ""
        yield bundle.bundle, one.version, one.state, held, ", ".join(one.lines), size, one.reason or ""


def _tell_versions(context: typer.Context, answer: BundleAnswer) -> None:
    _tell(context, answer, _VERSION_HEAD, _version_rows(answer))
    if isinstance(answer, ChangedBundleAnswer):
        _tell_of_forgotten(answer.why_forgotten)


def _tell_line(context: typer.Context, answer: ChangedLineAnswer) -> None:
    _tell(context, answer, ("line", "state", "version", "reason"), [_line_row(answer)])
    _tell_of_forgotten(answer.why_forgotten)


def _line_row(line: LineSummary) -> tuple[str, ...]:
    return line.line, line.state, "-" if line.bundle is None else line.bundle.version, line.reason or ""


def _tell(context: typer.Context, answer: BaseModel, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    if _asking(context).as_json:
        typer.echo(answer.model_dump_json())
        return
    table = Table(*head, box=SIMPLE_HEAD)
    for row in rows:
        # Reasons may name files of the store, whose names anybody may have chosen who can write there.
        table.add_row(*(f"[{_COLOURS[cell]}]{cell}[/]" if cell in _COLOURS else escape(legible(cell)) for cell in row))
    Console().print(table)


def _tell_of_forgotten(why: str | None) -> None:
    if why is not None:
        typer.echo(f"Not remembered: {why}", err=True)


@contextlib.contextmanager
def _administrator(context: typer.Context) -> Iterator[Administrator]:
    """Yield who asks, and end with an exit code and a sentence where the server refuses."""
    asking = _asking(context)
    tls = tls_context(asking.authority, asking.certificate)
    with connect(lambda: Client(asking.url, asking.key, tls=tls)) as client:
        try:
            yield Administrator(client, asking.timeout_s)
        except ClientFault as fault:
            problem = fault.problem
            typer.echo(f"{problem.sentence}{_advice(problem.code)}", err=True)
            raise typer.Exit(_exit_code(problem.status)) from fault


def _asking(context: typer.Context) -> _Asking:
    asking: _Asking = context.obj
    return asking


def _advice(code: str) -> str:
    if code == "not_authenticated":
        return " Name the file of an administrator's key: --key-file, or FLAWLINE_CLIENT_KEY_FILE."
    if code == "not_reachable":
        return " Is FLAWLINE_ADMIN_PORT set there, and its port forwarded to --url?"
    return " Look at what serves before you try again: flawline admin lines." if code == "no_answer" else ""


def _exit_code(status: int | None) -> int:
    if status == _STATUS_OF_REFUSAL:
        return _REFUSED
    return _NOT_NOW if status is None or status >= _SERVER_FAULTS else USAGE


def _name(text: str) -> str:
    return _fitting(TypeAdapter(Name), text, "1 to 64 letters, digits, dots, dashes or underscores")


def _version(text: str) -> str:
    return _fitting(TypeAdapter(Version), text, "a whole number such as 4; flawline admin versions lists them")


def _fitting(kind: TypeAdapter[str], text: str, right: str) -> str:
    """Return a name that goes into an address, where it is one."""
    try:
        return kind.validate_python(text)
    except ValidationError:
        leave(f"{text!r} is no such name; it is {right}.")
