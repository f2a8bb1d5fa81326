"""Requests made from the OpenAPI document, right and wrong, against a real server: none ends in a fault of ours."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.factories import make_bundle
from tests.servers import PATIENCE_S, ServerProcess

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")

# 503 and 504 are documented answers: a deadline that is asked for may be too short.
SETTINGS = """
[parameters]
line = "demo_line"

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
"""


def test_server_when_asked_by_the_openapi_document_then_answers_with_no_fault_of_its_own(tmp_path):
    """Neither what the document allows nor what it forbids makes the server fail."""
    make_bundle(tmp_path / "store")
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    with ServerProcess(tmp_path / "store") as server:
        server.ready()
        command = [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("--config-file", str(tmp_path / "schemathesis.toml"), "run", f"{server.url}/openapi.json"),
            *("--checks", "not_a_server_error", "--phases", "examples,fuzzing", "--max-examples", "8", "--seed", "1"),
        ]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
        )

        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "No test cases" not in done.stdout
        assert [event for event in server.events() if event["level"] == "ERROR"] == []
