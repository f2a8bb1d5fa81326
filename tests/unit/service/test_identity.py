"""Promises of a request's identity: its time runs from its first byte, wherever somebody knows when that came."""

from types import SimpleNamespace

import pytest
from fastapi import Request

from service.routes.context import CONNECTION_EXTENSION
from service.routes.identity import identify, received_at_of


@pytest.mark.parametrize(
    ("extensions", "received_at"),
    [
        pytest.param({CONNECTION_EXTENSION: SimpleNamespace(age_s=lambda: 2.5)}, 97.5, id="a server that tells"),
        pytest.param({}, 100.0, id="a server that does not tell"),
    ],
)
def test_request_when_its_handler_starts_late_then_it_has_come_with_its_first_byte(extensions, received_at):
    """A head that came slowly, or stood in line, has used up part of the deadline before any handler is called."""
    scope = {"type": "http", "headers": [], "extensions": extensions}

    identify(scope, 100.0)

    assert received_at_of(Request(scope)) == received_at
