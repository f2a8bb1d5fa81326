"""How commands reach a server: address, key and certificates, the same words in every command."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from service.client import ClientFault

_Connected = TypeVar("_Connected")

USAGE = 2  # the exit code of whoever asks in the wrong way

Url = Annotated[str, typer.Option(envvar="FLAWLINE_CLIENT_URL", help="Address of the server.")]
KeyFile = Annotated[
    Path | None, typer.Option(envvar="FLAWLINE_CLIENT_KEY_FILE", help="File that holds the caller's key.")
]
Authority = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the server's certificate.")]
Certificate = Annotated[Path | None, typer.Option(help="PEM file with our certificate and key, for mutual TLS.")]


def connect(make: Callable[[], _Connected]) -> _Connected:
    """Make a client, or end with a sentence where its address or key is none."""
    try:
        return make()
    except ClientFault as fault:
        leave(fault.problem.sentence)


def read_key(file: Path | None) -> str | None:
    """Return the key that a file holds, or end with a sentence where it can't be read."""
    if file is None:
        return None
    try:
        return file.read_text("utf-8").strip()
    except OSError as error:
        leave(f"The key file {file} can't be read: {error.strerror}.")
    except UnicodeDecodeError:
        leave(f"The key file {file} can't be read: it is no text.")


def tls_context(authority: Path | None, certificate: Path | None) -> ssl.SSLContext | None:
    """Return what connections are made with, or None for the system's authorities and no certificate of ours."""
    if authority is None and certificate is None:
        return None
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate is not None:
            context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        leave(f"A certificate can't be used: {error}.")
    return context


def leave(sentence: str) -> NoReturn:
    """End with a sentence, as the caller's fault."""
    typer.echo(sentence, err=True)
    raise typer.Exit(USAGE)
