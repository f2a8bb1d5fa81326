"""The `flawline` command: argv and environment in, one call out.

Each package brings its own commands through the entry-point group `flawline.commands`, so that the service never
imports training: a package is imported only when its command is asked for, or when all commands are listed. This file
is the only reader of environment and argv on the service's side.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import typer
from rich.markup import escape

GROUP = "flawline.commands"
commands = typer.Typer()


def main() -> None:
    """Run the `flawline` command."""
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
