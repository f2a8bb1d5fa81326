"""Promises of receiving: only what waits for nobody may count on the queue as it was found."""

from types import SimpleNamespace

import pytest
from fastapi import Request

from service.routes.bodies import comes_at_once
from service.routes.context import CONNECTION_EXTENSION


@pytest.mark.parametrize(
    ("media_type", "has_body", "at_once"),
    [
        pytest.param(b"image/png", True, True, id="a frame that is here"),
        pytest.param(b"image/png", False, False, id="a frame that still comes"),
        pytest.param(b"multipart/form-data; boundary=x", True, False, id="a form, whose files may wait for a disk"),
        pytest.param(b"image/png", None, False, id="a server that does not tell"),
    ],
)
def test_frame_when_receiving_it_may_wait_then_it_does_not_come_at_once(media_type, has_body, at_once):
    """Other frames may come first while a body is waited for, or while a large form goes through a file."""
    scope = {"type": "http", "headers": [(b"content-type", media_type)]}
    if has_body is not None:
        scope["extensions"] = {CONNECTION_EXTENSION: SimpleNamespace(has_body=lambda: has_body)}

    assert comes_at_once(Request(scope)) is at_once
