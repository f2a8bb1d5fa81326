"""The examples of service/clients.md, as they stand there, against a real server: what is copied must work."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from service.contract.frames import FRAME_FORMATS
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame
from tests.servers import serve_in_thread, wait_until_ready

_ROOT = Path(__file__).resolve().parents[2]
_NOBODY = "http://127.0.0.1:9"
_PROTOCOL = "The Open Inference Protocol"
_PARTS = {"good": ("PASS", False), "bad": ("FAIL", True)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a ready server with the line that the examples ask."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store, "line")
    with serve_in_thread(Settings(store_directory=store, formats=FRAME_FORMATS)) as http:  # WebP is allowed here
        wait_until_ready(http)
        yield str(http.base_url).rstrip("/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good part and a defective one, each as `frame.jpg` in a folder of its own."""
    place = tmp_path_factory.mktemp("parts")
    for name, (_, defect) in _PARTS.items():
        (place / name).mkdir()
        (place / name / "frame.jpg").write_bytes(encode(make_frame(defect=defect), "JPEG"))
    return place


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the C# example."""
    for program in ("mcs", "mono"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    place = tmp_path_factory.mktemp("csharp")
    (place / "Inspector.cs").write_text(_example("csharp", "C#"), encoding="utf-8")
    libraries = ("-r:System.Net.Http", "-r:System.Runtime.Serialization")
    built = subprocess.run(
        ["mcs", "-warnaserror", *libraries, "-out:inspector.exe", "Inspector.cs"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return place / "inspector.exe"


def _section(title: str) -> str:
    text = (_ROOT / "service/clients.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(section)


def _example(language: str, title: str) -> str:
    """Return the only example of a section of the page."""
    [example] = re.findall(rf"^```{language}\n(.*?)^```", _section(title), re.DOTALL | re.MULTILINE)
    return str(example).replace("2000", "8000").replace("--max-time 2", "--max-time 9")  # a test's machine is busy


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=60)
    return done.stdout


@pytest.mark.parametrize("part", _PARTS)
def test_curl_example_when_run_then_answers_with_the_verdict_and_the_part(url: str, folder: Path, part: str) -> None:
    """The deadline and the part's name are understood; a deadline that the server can't read would be refused."""
    if shutil.which("curl") is None:
        pytest.skip("needs the program curl")
    words = shlex.split(_example("sh", "curl").replace("\\\n", " ").replace("http://localhost:8000", url))

    answer = json.loads(_run(words, folder / part))

    assert (answer["verdict"], answer["part_id"]) == (_PARTS[part][0], "0815")


@pytest.mark.parametrize("part", _PARTS)
def test_protocol_example_when_run_then_answers_with_the_verdict_of_this_request(
    url: str, folder: Path, part: str
) -> None:
    """What stands on the page of `/v2` works in a shell as it stands there, with all that it asks for."""
    if shutil.which("curl") is None:
        pytest.skip("needs the program curl")
    command = _example("sh", _PROTOCOL).replace("http://localhost:8000", url)

    answer = json.loads(_run(["sh", "-c", command], folder / part))

    told = {output["name"]: output["data"] for output in answer["outputs"]}
    frame = (folder / part / "frame.jpg").read_bytes()
    assert answer["id"] == "4711"
    assert told["verdict"] == [_PARTS[part][0]]
    assert set(told) == {"verdict", "score", "p_value"}
    assert answer["parameters"]["frame_digests"] == hashlib.sha256(frame).hexdigest()


def test_protocol_table_when_it_names_an_input_or_output_then_the_model_has_it(url: str) -> None:
    """The page names every tensor of a model, with its kind of values, and no other."""
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \|$", _section(_PROTOCOL), re.MULTILINE))
    inputs = dict(re.findall(r"input `(\w+)`, `(\w+)`", "\n".join(rows)))

    model = httpx.get(f"{url}/v2/models/line").json()

    assert inputs == {tensor["name"]: tensor["datatype"] for tensor in model["inputs"]}
    assert set(re.findall(r"`(\w+)`", rows["`outputs`"])) == {tensor["name"] for tensor in model["outputs"]}


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"timeout": 10_000_001}, 400, "FLAWLINE_MAX_DEADLINE_S"),
        ({"timeout": 1}, 503, "deadline"),
        ({"policy": "unheard_of"}, 404, "policy"),
        ({"priority": -1}, 400, "priority"),
        ({"timeout": 0, "priority": 7}, 200, None),
    ],
)
def test_protocol_table_when_it_tells_of_a_parameter_then_the_server_takes_it_so(
    url: str, folder: Path, parameters: dict[str, object], status: int, words: str | None
) -> None:
    """A timeout counts microseconds, a priority means nothing, and every fault is one sentence in the common form."""
    assert set(parameters) <= set(re.findall(r"^\| parameter `(\w+)` \|", _section(_PROTOCOL), re.MULTILINE))
    frame = b64encode((folder / "bad/frame.jpg").read_bytes()).decode()
    encoded = {"name": "encoded_frames", "datatype": "BYTES", "shape": [1], "data": [frame]}
    asked = {"inputs": [encoded | {"parameters": {"content_type": "base64"}}], "parameters": parameters}

    answer = httpx.post(f"{url}/v2/models/line/infer", json=asked)

    assert answer.status_code == status
    if words is not None:
        assert set(answer.json()) == {"error"}
        assert words in answer.json()["error"]


@pytest.mark.parametrize("part", _PARTS)
def test_python_example_when_run_then_prints_the_verdict(url: str, folder: Path, part: str) -> None:
    """Nothing but the server's address is changed."""
    program = _example("python", "Python").replace("http://localhost:8000", url)

    assert _run([sys.executable, "-c", program], folder / part).split() == [_PARTS[part][0]]


def test_python_example_when_there_is_no_server_then_prints_no_verdict_and_why(folder: Path) -> None:
    """A pulled cable is no good part."""
    program = _example("python", "Python").replace("http://localhost:8000", _NOBODY).replace("8000", "200")

    told = _run([sys.executable, "-c", program], folder / "good")

    assert told.startswith("NO_VERDICT\n")
    assert "can't be reached" in told


@pytest.mark.parametrize("part", _PARTS)
def test_csharp_example_when_run_then_prints_the_verdict(url: str, folder: Path, inspector: Path, part: str) -> None:
    """It compiles without a warning and gets the server's verdict."""
    command = ["mono", str(inspector), url, "line", "frame.jpg", "0815"]

    assert _run(command, folder / part) == f"{_PARTS[part][0]}\n"


@pytest.mark.parametrize("fault", ["nobody listens", "unknown line", "no image"])
def test_csharp_example_when_anything_is_wrong_then_prints_no_verdict(
    url: str, folder: Path, inspector: Path, fault: str
) -> None:
    """Whatever is no answer of 200 ends as NO_VERDICT, with an exit code that is not that of PASS."""
    server, line, frame = url, "line", "frame.jpg"
    if fault == "nobody listens":
        server = _NOBODY
    elif fault == "unknown line":
        line = "unheard_of"
    else:
        frame = str(inspector)
    done = subprocess.run(
        ["mono", str(inspector), server, line, frame, "0815"],
        cwd=folder / "good",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (1, "NO_VERDICT\n")


@pytest.mark.parametrize("language", ["python", "csharp"])
def test_example_when_a_cache_repeats_the_last_answer_then_prints_no_verdict(
    url: str, folder: Path, request: pytest.FixtureRequest, language: str
) -> None:
    """An answer about this very part, to another request, may be that of the part before its rework."""
    with httpx.Client(base_url=url) as http:
        headers = {"Content-Type": "image/jpeg", "X-Part-Id": "0815"}
        remembered = http.post(
            "/v1/lines/line/inspect", content=(folder / "good/frame.jpg").read_bytes(), headers=headers
        )

    with _cache(remembered.content) as cache:
        if language == "python":
            command = [sys.executable, "-c", _example("python", "Python").replace("http://localhost:8000", cache)]
        else:
            command = ["mono", str(request.getfixturevalue("inspector")), cache, "line", "frame.jpg", "0815"]
        told = _run(command, folder / "bad")

    assert remembered.json()["verdict"] == "PASS"
    assert told.startswith("NO_VERDICT\n")


@contextmanager
def _cache(answer: bytes) -> Iterator[str]:
    """Answer everything with what was answered before."""

    class Cache(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Cache)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_header_table_when_it_names_a_kind_then_a_frame_of_that_kind_is_judged(url: str) -> None:
    """Every media type of the table works as the table says, raw frames with the headers that it names for them."""
    text = (_ROOT / "service/clients.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^\| `Content-Type` \|(.*)\|$", text, re.MULTILINE)
    [raw] = re.findall(r"^\| (`X-Pixel-Format`.*?) \|", text, re.MULTILINE)
    pixels = make_frame(defect=True)
    values = {"X-Pixel-Format": "RGB8", "X-Width": str(pixels.shape[1]), "X-Height": str(pixels.shape[0])}
    size = {name: values[name] for name in re.findall(r"X-[A-Za-z-]+", raw)}

    verdicts = {}
    for kind in re.findall(r"`([a-z]+/[a-z-]+)`", row):
        is_image = kind.startswith("image/")
        body = encode(pixels, kind.removeprefix("image/").upper()) if is_image else pixels.tobytes()
        headers = {"Content-Type": kind, **({} if is_image else size)}
        answer = httpx.post(f"{url}/v1/lines/line/inspect", content=body, headers=headers)
        verdicts[kind] = answer.json()["verdict"]

    assert len(verdicts) == 7
    assert set(verdicts.values()) == {"FAIL"}, verdicts


def test_header_table_when_it_names_an_option_then_the_server_knows_it(url: str) -> None:
    """Every `X-` header of the page is one that the server's own description lists."""
    text = (_ROOT / "service/clients.md").read_text(encoding="utf-8")
    described = httpx.get(f"{url}/openapi.json").text

    named = set(re.findall(r"X-[A-Za-z-]+", text))
    assert named >= {"X-Part-Id", "X-Deadline-Ms"}
    assert {header for header in named if f'"{header}"' not in described} == set()


def test_page_when_it_names_a_setting_with_its_default_then_it_is_the_servers() -> None:
    """Whoever plans a cycle by this page must not learn of another limit at the line."""
    text = (_ROOT / "service/clients.md").read_text(encoding="utf-8")

    told = {name.lower(): int(value) for name, value in re.findall(r"`FLAWLINE_([A-Z_]+)`,? \(?(\d+)", text)}
    assert told == {name: Settings.model_fields[name].default for name in told}
    assert set(told) == {"max_deadline_s", "default_deadline_s", "max_heatmaps_kept", "max_frames_per_request"}
