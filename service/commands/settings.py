"""`flawline settings`: what can be set, what it means, and what is set here."""

import re
import textwrap
from typing import Any

import typer

_CALLERS_FAULT = 2
_WIDTH = 100
# A URL may carry a name and a password, which belong on no screen.
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


def settings() -> None:
    """Print every setting of the service: its variable, the value that it has here, its default, and its meaning.

    Exit code 2 where the environment can't be used as it is, with the reason.
    """
    from service.settings import (  # noqa: PLC0415 - `flawline --help` needs no pydantic
        Settings,
        SettingsInvalid,
        describe,
        read_settings,
        read_texts,
        variable_of,
    )

    fault = None
    try:
        present: dict[str, Any] = read_settings().model_dump()
    except SettingsInvalid as error:
        fault, present = str(error), {}
    given = read_texts()
    for name, meaning in describe().items():
        default = Settings.model_fields[name].default
        value = present.get(name, given.get(name, default))
        typer.echo(f"{variable_of(name)}={_shown(value)}  (default: {_shown(default) or 'absent'})")
        typer.echo(textwrap.fill(meaning, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    if fault is not None:
        typer.echo(fault, err=True)
        raise SystemExit(_CALLERS_FAULT)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    return _CREDENTIALS.sub("//…@", str(value).lower() if isinstance(value, bool) else str(value))
