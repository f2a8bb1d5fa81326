"""The demo, on a line that takes seconds: the same run, the same server process, frames posted over real sockets."""

import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from service.contract.bundle import load_bundle
from tests.tiny_line import BRIEF, DEFECTS, TEST_GOOD, write_line
from training.camera import ServerDidNotStart, post_frames, running_server
from training.config import load_config
from training.demo import run_demo
from training.progress import LineReporter


class _Shown(NamedTuple):
    """One demo: where it is, what it printed, and every host that it asked for."""

    folder: Path
    told: str
    asked: set[object]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> _Shown:
    """The demo with the shipped configuration and no weights named, on a line of our own; only its fit is brief."""
    torch.set_num_threads(1)
    place, paper = tmp_path_factory.mktemp("demo"), io.StringIO()
    asked: set[object] = set()
    sys.addaudithook(lambda event, arguments: _note_names(event, arguments, asked))
    line = write_line(place / "square_line", good=80)  # a quarter is held out, and 5 % need 19
    config = load_config("small", overrides=list(BRIEF))

    run_demo(line, place / "demo", config, None, (), LineReporter(Console(file=paper)))

    return _Shown(place / "demo", paper.getvalue(), set(asked))


def test_demo_when_run_on_a_line_judges_every_test_frame_over_http(shown: _Shown) -> None:
    """From a folder of frames to verdicts over HTTP: the table counts every frame, pictures and report are there."""
    counts = {
        row.split(" | ")[0]: [int(n) for n in row.split(" | ")[1:]]
        for row in _rows(shown.told.splitlines(), "good", "square")
    }
    assert sum(counts["good"]) == TEST_GOOD
    assert sum(counts["square"]) == DEFECTS
    assert counts["good"][3] == counts["square"][3] == 0, "a frame without a verdict"
    assert "I-AUROC through HTTP" in shown.told
    assert "frames a second" in shown.told
    assert len(list((shown.folder / "overlays").glob("*.png"))) == TEST_GOOD + DEFECTS
    assert load_bundle(shown.folder / "store/square_line/1").files["report.html"].startswith(b"<!")


def test_demo_when_nothing_is_at_hand_needs_no_network(shown: _Shown) -> None:
    """With the shipped configuration and no weights named, the embedded backbone serves, and no hub is asked."""
    backbone = load_bundle(shown.folder / "store/square_line/1").manifest.backbone

    assert backbone is not None
    assert (backbone.name, backbone.source) == ("embedded", "embedded.safetensors")
    assert shown.asked <= {None, "127.0.0.1", b"127.0.0.1", "localhost"}


def test_running_server_when_the_store_is_empty_says_where_the_log_is(tmp_path: Path) -> None:
    """A server that never becomes ready ends the demo with one sentence that names its log."""
    log = tmp_path / "server.log"

    with (
        pytest.raises(ServerDidNotStart, match=r"server\.log"),
        running_server(tmp_path / "empty", log, ready_within_s=3),
    ):
        pytest.fail("an empty store was called ready")


def test_post_frames_when_nobody_answers_counts_as_no_verdict(tmp_path: Path) -> None:
    """A camera that gets no answer has no verdict, and never a good part."""
    line = write_line(tmp_path / "line")

    shots = post_frames("http://127.0.0.1:9", "line", sorted(line.rglob("*.png"))[:2])

    assert [shot.verdict for shot in shots] == ["NO_VERDICT", "NO_VERDICT"]
    assert all(shot.answer is None for shot in shots)


def _note_names(event: str, arguments: Any, asked: set[object]) -> None:
    if event == "socket.getaddrinfo":
        asked.add(arguments[0])


def _rows(lines: list[str], *kinds: str) -> list[str]:
    return [line for line in lines if line.split(" | ")[0] in kinds and line.count(" | ") == 4]
