"""The `flawline` command: argv and environment in, one call out.

Each package brings its own commands through the entry-point group `flawline.commands`, so that the service never
imports training: a package is imported only when its command is asked for, or when all commands are listed. This file
is the only reader of environment and argv on the service's side.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import uvicorn
from rich.markup import escape

from service.commands.engine import build_engine
from service.commands.operator import bundle_commands, keys
from service.commands.settings import settings as print_settings
from service.heap import imports_stay

GROUP = "flawline.commands"
commands = typer.Typer()
commands.command(
    "build-engine", epilog="Example:\n\nflawline build-engine store/bottle/3 --max-batch-size 16 --opt-batch-size 8"
)(build_engine)
commands.command("settings")(print_settings)
commands.add_typer(bundle_commands)
commands.add_typer(keys, name="keys")

_log = logging.getLogger("flawline")

# Longer than the pause between two parts, so that cameras need no new connection for each.
_KEEP_ALIVE_S = 75
_HANDSHAKE_S = 5.0
# Of administrators, and of probes.
_MOST_CONNECTIONS_BESIDE = 64
# After the time for draining, for threads that should have ended; then the process ends without them.
_LAST_GRACE_S = 2
_SERVE_HELP = """Serve the lines of a store to cameras.

Every option is also a setting of the environment, named beside it; the option
wins. There are many more settings: flawline settings prints and explains all.

[bold]Examples[/bold]

flawline serve --store store

flawline serve --store /var/lib/flawline --host 0.0.0.0 --keys-file keys.json --deadline-ms 500

FLAWLINE_DEVICE=cuda FLAWLINE_MAX_BATCH_SIZE=16 flawline serve --store store --lines cap,hazelnut
"""


def main() -> None:
    """Run the `flawline` command."""
    # ONNX Runtime reports its use to its maker over the internet unless told otherwise before it is imported; a factory
    # did not ask for that.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    run(sys.argv[1:], entry_points(group=GROUP))


def run(arguments: Sequence[str], groups: Iterable[EntryPoint]) -> None:
    """Find the package that has the wanted command, and run it.

    Args:
        arguments: of the command line, without the program's name.
        groups: one a package; each loads to a typer application or to a function that is given one.

    Raises:
        SystemExit: always.
    """
    # Our own first: serving must not wait for the import of training.
    ordered = sorted(groups, key=lambda group: (group.name != "service", group.name))
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    owner = "service"
    missing: list[str] = []
    application = typer.Typer(name="flawline", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
    for group in ordered:
        try:
            _add(application, group)
        except ModuleNotFoundError as error:
            missing.append(f"{_not_installed(error)} The {group.name} commands come with: {_install_line(group.name)}")
            continue
        owner = group.name
        if wanted is not None and wanted in _names_of(application):
            break
    if wanted is not None and wanted not in _names_of(application) and missing:
        _leave(f"There is no command {wanted!r} here. " + " ".join(missing))
    application.callback(epilog=escape("\n\n".join(missing)) or None)(_about)
    try:
        application(list(arguments), prog_name="flawline")
    except ModuleNotFoundError as error:
        _leave(f"{_not_installed(error)} Install what the command needs: {_install_line(owner)}")


@commands.command(help=_SERVE_HELP)
def serve(
    store: Annotated[
        str | None,
        typer.Option(
            help="Directory of bundles (FLAWLINE_STORE_DIRECTORY), or s3://bucket/prefix (FLAWLINE_STORE_URL).",
            show_default="store",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (FLAWLINE_HOST).", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one (FLAWLINE_PORT).", show_default="8000")
    ] = None,
    lines: Annotated[
        str | None, typer.Option(help="Lines to serve, with commas (FLAWLINE_LINES).", show_default="all")
    ] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            help="From request to answer, where the caller names none (FLAWLINE_DEFAULT_DEADLINE_S, in seconds).",
            show_default="2000",
        ),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="Keys of callers; without it the service is open (FLAWLINE_KEYS_FILE).")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, openvino, cuda, ort-tensorrt or tensorrt (FLAWLINE_DEVICE).", show_default="cpu"),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Frames in one run (FLAWLINE_MAX_BATCH_SIZE).", show_default="1")
    ] = None,
    max_queue_size: Annotated[
        int | None, typer.Option(help="Frames accepted at a time (FLAWLINE_MAX_QUEUE_SIZE).", show_default="64")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="Of the JSON log (FLAWLINE_LOG_LEVEL).", show_default="INFO")
    ] = None,
) -> None:
    """Override settings with options, put the service together, and run it until it is told to stop."""
    # Imported here, so that other commands, --help and a wrong setting need not wait for the runtime.
    with imports_stay():
        from service.settings import PREFIX, SettingsInvalid, read_settings  # noqa: PLC0415 - see above

    given = {
        "STORE_URL" if (store or "").startswith("s3://") else "STORE_DIRECTORY": store,
        "HOST": host,
        "PORT": port,
        "LINES": lines,
        "DEFAULT_DEADLINE_S": None if deadline_ms is None else deadline_ms / 1000,
        "KEYS_FILE": keys_file,
        "DEVICE": device,
        "MAX_BATCH_SIZE": max_batch_size,
        "MAX_QUEUE_SIZE": max_queue_size,
        "LOG_LEVEL": log_level,
    }
    # One way in for both, so that a wrong option is refused with the same sentence as a wrong setting.
    os.environ.update({PREFIX + name: str(value) for name, value in given.items() if value is not None})
    try:
        settings = read_settings()
    except SettingsInvalid as error:
        sentence = str(error)
        if deadline_ms is not None:  # the one option that has another name, and another unit
            sentence = sentence.replace("FLAWLINE_DEFAULT_DEADLINE_S", "--deadline-ms (FLAWLINE_DEFAULT_DEADLINE_S)")
        _leave(sentence)
    with imports_stay():
        from service.app import (  # noqa: PLC0415 - see above
            create_admin_app,
            create_app,
            create_health_app,
            open_port,
            start_draining,
        )
        from service.auth import KeysFileInvalid  # noqa: PLC0415 - see above
        from service.contract.signature import SigningFailed  # noqa: PLC0415 - see above
        from service.errors import StoreUnreachable  # noqa: PLC0415 - see above
        from service.observability.log import log_json_lines  # noqa: PLC0415 - see above
        from service.ports.connections import raise_file_limit  # noqa: PLC0415 - see above
        from service.ports.tls import ServerCertificate, TlsInvalid  # noqa: PLC0415 - see above
        from service.protocol import BoundedProtocol  # noqa: PLC0415 - see above

    try:
        most_connections = settings.connections(raise_file_limit())
        log_json_lines(settings.log_level)
        logging.captureWarnings(capture=True)  # a codec's complaints about a frame are lines of JSON like all others
        certificate = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            certificate = ServerCertificate(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        app = create_app(settings, certificate=certificate, when_lost=lambda: server.give_up())  # noqa: PLW0108 - made below
        administration = None if settings.admin_port is None else create_admin_app(app)
    except (SettingsInvalid, KeysFileInvalid, SigningFailed, StoreUnreachable, TlsInvalid) as error:
        _leave(str(error))
    same: dict[str, Any] = {
        "ws": "none",
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "timeout_keep_alive": _KEEP_ALIVE_S,
        "timeout_graceful_shutdown": math.ceil(settings.drain_timeout_s),
    }
    guarded: dict[str, Any] = (
        same if certificate is None else same | {"ssl_context_factory": lambda *_: certificate.context}
    )

    def speak(most: int) -> Any:
        return partial(BoundedProtocol, port=open_port(app, most))

    there: dict[str, Any] = {"host": settings.host, "port": settings.port, "http": speak(most_connections)}
    config = uvicorn.Config(app, **there, **guarded)
    beside = []
    if administration is not None and settings.admin_port is not None:
        there = {"host": settings.admin_host, "port": settings.admin_port, "lifespan": "off"}
        there["http"] = speak(_MOST_CONNECTIONS_BESIDE)
        beside.append(_Beside(uvicorn.Config(administration, **there, **guarded), "administration listening"))
    if settings.health_port is not None:
        there = {"host": settings.host, "port": settings.health_port, "lifespan": "off"}
        there["http"] = speak(_MOST_CONNECTIONS_BESIDE)
        beside.append(_Beside(uvicorn.Config(create_health_app(app), **there, **same), "health listening"))
    server = _Server(config, beside, lambda: start_draining(app), settings.drain_timeout_s + _LAST_GRACE_S)
    server.run()
    _end(server.exit_code)


class _Server(uvicorn.Server):
    """Uvicorn that says where it listens, becomes unready when told to stop, and ends with an exit code of ours.

    Uvicorn itself raises the signal again when it has ended, so that an orderly stop would look like a kill; takes a
    second one as leave to drop what was accepted; and knows no SIGHUP, as which the end of a terminal comes.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        beside: Sequence["_Beside"],
        when_told_to_stop: Callable[[], None],
        end_within_s: float,
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._beside = beside
        self._when_told_to_stop = when_told_to_stop
        self._end_within_s = end_within_s
        self._is_told_to_stop = False

    def give_up(self) -> None:
        """Stop, and end with an exit code that wants a restart."""
        self.exit_code = 1
        self.should_exit = True
        self._bound_the_end()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with _short_handshakes():
            await super().startup(sockets)
        for beside in self._beside:
            try:
                await beside.start()
            except SystemExit as error:  # its port is taken, as it has said; what was begun ends in order
                self.exit_code = error.code if isinstance(error.code, int) else 1
                self.should_exit = True
                return
        _say_where(self, "listening")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for beside in self._beside:
            await beside.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            # Who ignores it, as `nohup` does, wants the service to go on without a terminal.
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as uvicorn calls it
        if self._is_told_to_stop:  # what was accepted is answered, however often somebody asks; the end is bounded
            _log.info("stopping already", extra={"signal": signal.Signals(sig).name})
            return
        self._is_told_to_stop = True
        _log.info("told to stop", extra={"signal": signal.Signals(sig).name})
        self._when_told_to_stop()
        self.should_exit = True
        self._bound_the_end()

    def _bound_the_end(self) -> None:
        """End the process even where some thread never does: a codec, or a file system that does not answer."""
        timer = threading.Timer(self._end_within_s, _end_late)
        timer.daemon = True
        timer.start()


class _Beside(uvicorn.Server):
    """Another port's server, in the loop of the main one, which alone hears signals."""

    def __init__(self, config: uvicorn.Config, told: str) -> None:
        super().__init__(config)
        self._told = told
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        with _short_handshakes():
            await self.startup()
        _say_where(self, self._told)
        self._ticking = asyncio.create_task(self.main_loop())

    async def stop(self) -> None:
        """Listen no longer, and end what was asked; nothing where it never listened."""
        if self._ticking is None:
            return
        self.should_exit = True
        await self._ticking
        await self.shutdown()


@contextmanager
def _short_handshakes() -> Iterator[None]:
    """Bound how long callers of servers that start inside the block may take to speak TLS; uvicorn can't be told to."""
    loop: Any = asyncio.get_running_loop()
    plain = loop.create_server

    def create_server(*arguments: Any, **known: Any) -> Any:
        bounded = {} if known.get("ssl") is None else {"ssl_handshake_timeout": _HANDSHAKE_S}
        return plain(*arguments, **known, **bounded)

    loop.create_server = create_server
    try:
        yield
    finally:
        del loop.create_server


def _say_where(server: uvicorn.Server, message: str) -> None:
    for listener in server.servers:
        for listening in listener.sockets:
            host, port = listening.getsockname()[:2]
            _log.info(message, extra={"host": host, "port": port})


def _end_late() -> None:
    _log.error("the process did not end by itself in time, and is ended")
    _end(1)


def _end(exit_code: int) -> NoReturn:
    """End without taking the interpreter down: a thread that is still inside the runtime would abort the process."""
    logging.shutdown()
    os._exit(exit_code)


def _about() -> None:
    """Find defects nobody has seen before: train on good parts, serve to cameras."""


def _add(application: typer.Typer, group: EntryPoint) -> None:
    loaded = group.load()
    if isinstance(loaded, typer.Typer):
        application.add_typer(loaded)
    else:
        loaded(application)


def _names_of(application: typer.Typer) -> set[str]:
    names = {
        info.name or getattr(info.callback, "__name__", "").replace("_", "-")
        for info in application.registered_commands
    }
    for group in application.registered_groups:
        if group.name:
            names.add(group.name)
        elif group.typer_instance is not None:
            names |= _names_of(group.typer_instance)
    return names


def _not_installed(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("", "service", "models", "training"):
        raise error  # a fault of ours, not something to install
    return f"The package {package!r} is not installed."


def _install_line(extra: str) -> str:
    return f"pip install 'flawline[{extra}]'"


def _leave(sentence: str) -> NoReturn:
    typer.echo(sentence, err=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
