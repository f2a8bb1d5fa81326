"""A real S3 server for tests: moto's, as a process of its own on a free port of this machine."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.servers import PATIENCE_S

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}  # which it takes from anybody
BUCKET = "bundles"
_RUNNING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the server until the end of the block, with one empty bucket; yields its address."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    said = ""
    try:
        while (running := _RUNNING.search(said)) is None:
            line = process.stdout.readline()
            assert line, f"the S3 server ended: {said}"
            said += line
        reader.start()  # its log must not fill the pipe
        httpx.put(f"{running.group(1)}/{BUCKET}", timeout=PATIENCE_S).raise_for_status()
        yield running.group(1)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        if reader.ident is not None:
            reader.join(PATIENCE_S)
        process.stdout.close()
