"""Promises of the `flawline` command: packages bring their own commands, and a missing one says how to get it."""

import asyncio
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
import typer
import uvloop

from service.__main__ import GROUP, _short_handshakes, commands, run

INSTALL_TRAINING = "pip install 'flawline[training]'"


class _Group:
    """An entry point whose loading is a function of the test."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self.load = load


def _missing() -> Any:
    return importlib.import_module("a_package_that_is_not_installed")


def _greeting() -> typer.Typer:
    application = typer.Typer()

    @application.command()
    def greet(name: str = "camera") -> None:
        """Greet somebody."""
        typer.echo(f"hello {name}")

    @application.command(name="break")
    def needs_more() -> None:
        """Need a package inside the command."""
        _missing()

    return application


def _run(capsys: Any, *arguments: str, training: Callable[[], Any] = _greeting) -> tuple[int, str, str]:
    groups: list[Any] = [_Group("training", training), _Group("service", lambda: commands)]
    with pytest.raises(SystemExit) as ended:
        run(arguments, groups)
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_command_when_its_package_is_there_then_it_runs(capsys):
    """A command of another package is found by its name and gets its options."""
    code, out, _ = _run(capsys, "greet", "--name", "line 4")

    assert (code, out) == (0, "hello line 4\n")


def test_command_when_its_package_is_a_function_then_it_registers_itself(capsys):
    """An entry point may also be a function that is given the application."""

    def register(application: typer.Typer) -> None:
        application.command(name="greet")(lambda: typer.echo("hello"))

    code, out, _ = _run(capsys, "greet", training=lambda: register)

    assert (code, out) == (0, "hello\n")


def test_own_command_when_called_then_other_packages_are_not_even_imported(capsys):
    """Serving never waits for the import of training, nor fails with it."""

    def explode() -> Any:
        pytest.fail("training was imported")

    code, out, _ = _run(capsys, "serve", "--help", training=explode)

    assert code == 0
    assert "--deadline-ms" in out
    assert "flawline serve --store" in out


def test_help_when_asked_for_serve_then_each_option_names_its_setting(capsys):
    """Whoever knows the option can set it in a manifest."""
    code, out, _ = _run(capsys, "serve", "--help")

    assert code == 0
    options = set(re.findall(r"--([a-z][a-z-]+)", out)) - {"help"}
    named = set(re.findall(r"FLAWLINE_[A-Z_]+", "".join(out.split())))
    assert len(options) == 10
    for option in options - {"store", "deadline-ms"}:
        assert any(name.startswith(f"FLAWLINE_{option.upper().replace('-', '_')}") for name in named), option
    assert "flawline settings" in " ".join(out.split())


def test_settings_when_asked_for_then_all_are_printed_with_what_they_are_here_and_no_password(capsys, monkeypatch):
    """An operator sees what counts, and a screenshot gives nothing away."""
    monkeypatch.setenv("FLAWLINE_PORT", "8123")
    monkeypatch.setenv("FLAWLINE_TRACES_ENDPOINT", "http://me:secret@collector:4318/v1/traces")

    code, out, _ = _run(capsys, "settings")

    assert code == 0
    assert "FLAWLINE_PORT=8123  (default: 8000)" in out
    assert "FLAWLINE_KEYS_FILE=  (default: absent)" in out
    assert "FLAWLINE_TRACES_ENDPOINT=http://…@collector:4318/v1/traces" in out
    assert "secret" not in out
    assert "leaves the service open to everybody" in out


def test_settings_when_one_can_not_be_used_then_all_are_printed_and_the_reason(capsys, monkeypatch):
    """Who has misspelt a name finds the right one in the list."""
    monkeypatch.setenv("FLAWLINE_KEYS", "/keys/keys.json")

    code, out, err = _run(capsys, "settings")

    assert code == 2
    assert "FLAWLINE_KEYS_FILE=" in out
    assert "FLAWLINE_KEYS is no setting; did you mean FLAWLINE_KEYS_FILE?" in err


def test_serve_when_an_option_does_not_fit_then_the_sentence_names_it(capsys, monkeypatch):
    """Nobody is told of a name that was never typed alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))

    code, _, err = _run(capsys, "serve", "--deadline-ms", "15000")

    assert code == 2
    assert "--deadline-ms (FLAWLINE_DEFAULT_DEADLINE_S) must not be above FLAWLINE_MAX_DEADLINE_S" in err


def test_command_when_its_package_is_missing_then_one_sentence_says_what_to_install(capsys):
    """Without torch, `flawline train` names the extra; no traceback."""
    code, _, err = _run(capsys, "train", training=_missing)

    assert code == 2
    assert "'train'" in err
    assert INSTALL_TRAINING in err


def test_command_when_it_needs_more_than_its_package_then_the_same_sentence(capsys):
    """A package that is only missed inside of the command is named as well."""
    code, _, err = _run(capsys, "break")

    assert code == 2
    assert INSTALL_TRAINING in err


def test_help_when_a_package_is_missing_then_the_rest_is_listed_and_the_missing_told(capsys):
    """Help lists what there is, and what could be there."""
    code, out, _ = _run(capsys, "--help", training=_missing)

    assert code == 0
    assert "serve" in out
    assert INSTALL_TRAINING in " ".join(out.split())


def test_fault_when_it_is_ours_then_it_is_not_taken_for_a_missing_package():
    """A module of our own that is missing is a bug and stays one."""

    def ours() -> Any:
        raise ModuleNotFoundError(name="service.nowhere")

    with pytest.raises(ModuleNotFoundError):
        run(["train"], [_Group("training", ours)])  # type: ignore[list-item]


def test_installed_command_when_asked_for_help_then_both_packages_are_there():
    """The installed project brings both groups, and the command of the operating system finds them."""
    names = {group.name for group in entry_points(group=GROUP) if isinstance(group, EntryPoint)}

    ended = subprocess.run(
        [sys.executable, "-m", "service", "--help"], capture_output=True, text=True, timeout=120, check=False
    )

    assert names == {"client", "service", "training"}
    assert ended.returncode == 0
    assert "serve" in ended.stdout
    assert "train" in ended.stdout


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_server_when_it_starts_with_tls_then_bounds_the_handshake_and_without_it_does_not(new_loop):
    """A connection on which nobody speaks TLS is ended in seconds, by whichever loop there is."""
    asked = []

    async def create_server(*_, **known):
        asked.append(known)

    async def start():
        loop = asyncio.get_running_loop()
        loop.create_server = create_server
        with _short_handshakes():
            await loop.create_server(None, ssl="a context", port=0)
            await loop.create_server(None, ssl=None, port=0)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(start())

    assert asked == [{"ssl": "a context", "port": 0, "ssl_handshake_timeout": 5.0}, {"ssl": None, "port": 0}]
