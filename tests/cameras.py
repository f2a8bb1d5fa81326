"""Cameras that never rest: load on a real server, for tests of what becomes of frames while something else goes wrong.

Good and defective frames go out in turn, each camera on a connection of its own that it keeps. What came back is held
against what should have: `assert_safe` is the promise that no fault may break.
"""

import http.client
import json
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from tests.factories import encode, make_frame
from tests.servers import PATIENCE_S, wait_until

# Bounds of a test that went wrong; one that goes right needs a few hundred frames.
_MOST_FRAMES = 20_000

FRAMES = {"PASS": encode(make_frame()), "FAIL": encode(make_frame(defect=True))}


class Told(NamedTuple):
    """What a camera was told of one frame.

    Attributes:
        expected: the verdict that the frame deserves.
        status: of HTTP.
        verdict: that the answer or problem gives.
        code: of the problem; empty in an answer.
        version: of the bundle that judged; empty in a problem.
        took_s: from sending to the end of the answer.
    """

    expected: str
    status: int
    verdict: str
    code: str
    version: str
    took_s: float


class Cameras:
    """Several cameras in front of one line, from the beginning of a block to its end.

    Args:
        url: of the server.
        count: of cameras.
        headers: more of them, such as a key.

    Attributes:
        told: every answer, in order.
        cut_off: what the connections of frames without any answer ended with.
    """

    def __init__(self, url: str, count: int = 4, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self._address = str(parts.hostname), parts.port
        self._headers = {"Content-Type": "image/png", **(headers or {})}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._post) for _ in range(count)]
        self.told: list[Told] = []
        self.cut_off: list[Exception] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more, and return when all that was sent is answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def after(self, frames: int = 12) -> None:
        """Return when so many more frames are answered."""
        wanted = len(self.told) + frames
        wait_until(lambda: len(self.told) >= wanted, "answers to the cameras")

    def codes(self) -> set[str]:
        """Return the codes of all problems so far."""
        return {told.code for told in list(self.told) if told.code}

    def assert_safe(self) -> None:
        """Hold every answer against its frame: the right verdict or none at all, and no frame without an answer."""
        assert self.told
        assert not self.cut_off
        for told in self.told:
            right = told.expected if told.status == 200 else "NO_VERDICT"
            assert told.verdict == right, told

    def _post(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE_S)
        while not self._stop.is_set() and len(self.told) < _MOST_FRAMES:
            for expected, frame in FRAMES.items():
                began_at = time.monotonic()
                try:
                    connection.request("POST", "/v1/lines/demo_line/inspect", frame, self._headers)
                    answer = connection.getresponse()
                    said = json.loads(answer.read())
                except (OSError, http.client.HTTPException) as error:
                    self.cut_off.append(error)
                    return
                self.told.append(
                    Told(
                        expected=expected,
                        status=answer.status,
                        verdict=said["verdict"],
                        code=said.get("code", ""),
                        version=said.get("bundle", {}).get("version", ""),
                        took_s=time.monotonic() - began_at,
                    )
                )
        connection.close()
