"""The commands of those who ask a server, run as a user would, against a real server."""

import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.client import commands
from service.contract.legible import legible
from service.settings import Settings
from tests.factories import encode, make_bundle, make_frame
from tests.rights import rights_of_an_ordinary_user
from tests.servers import PATIENCE_S, serve_in_thread, wait_until_ready


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of one line, and two more that share a bundle."""
    place = tmp_path_factory.mktemp("store")
    make_bundle(place)
    make_bundle(place, "pair", lines=("left", "right"))
    return place


@pytest.fixture(scope="module")
def url(store) -> Iterator[str]:
    """Of a ready server."""
    with serve_in_thread(Settings(store_directory=store)) as http:
        wait_until_ready(http)
        yield str(http.base_url)


@pytest.fixture
def frames(tmp_path):
    """A folder with a good part, a defective one, and a file that is no image."""
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "a_good.png").write_bytes(encode(make_frame()))
    (folder / "b_bad.png").write_bytes(encode(make_frame(defect=True)))
    (folder / "notes.txt").write_text("not a frame")
    return folder


def _flawline(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_inspect_when_given_a_folder_then_tells_each_part_and_draws_it(url, frames, tmp_path):
    """One line a part in the order of names, an overlay of each, and an exit code that is not that of all good."""
    result = _flawline("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", tmp_path / "overlays")

    told = result.stdout.splitlines()
    assert result.exit_code == 3
    assert told[0].startswith("PASS")
    assert "a_good.png" in told[0]
    assert told[1].startswith("FAIL")
    assert "1 region" in told[1]
    assert told[2] == "1 PASS, 1 FAIL"
    assert sorted(file.name for file in (tmp_path / "overlays").iterdir()) == [
        "FAIL_b_bad.png.png",
        "PASS_a_good.png.png",
    ]


@pytest.mark.parametrize("odd", ["\x1b[2J", "\udcff"], ids=ascii)
def test_inspect_when_a_file_is_named_as_a_terminal_would_obey_then_its_name_is_shown_legibly(url, tmp_path, odd):
    """A folder of pictures from anywhere writes nothing on the terminal but its names."""
    (tmp_path / f"{odd}.png").write_bytes(encode(make_frame()))

    result = _flawline("inspect", tmp_path, "--line", "demo_line", "--url", url)

    assert legible(odd) in result.stdout
    assert odd not in result.stdout


@pytest.mark.parametrize(
    "sources", [("frames",), ("frames/left", "frames/right/0001.png")], ids=["one folder", "several sources"]
)
def test_inspect_when_files_of_several_folders_have_one_name_then_each_has_its_picture(url, tmp_path, sources):
    """No camera's picture is written over that of another one."""
    for side in ("left", "right"):
        (tmp_path / "frames" / side).mkdir(parents=True)
        (tmp_path / "frames" / side / "0001.png").write_bytes(encode(make_frame()))

    overlays = tmp_path / "overlays"
    result = _flawline(
        *("inspect", *(tmp_path / source for source in sources), "--line", "demo_line"),
        *("--url", url, "--overlays", overlays),
    )

    assert result.exit_code == 0
    drawn = {str(file.relative_to(overlays)) for file in overlays.rglob("*.png")}
    assert drawn == {"left/PASS_0001.png.png", "right/PASS_0001.png.png"}


def test_inspect_when_an_overlay_is_missing_then_every_verdict_is_told_all_the_same(url, frames, tmp_path):
    """A picture that can't be kept is told beside its verdict, and the run goes on."""
    overlays = tmp_path / "overlays"
    (overlays / "PASS_a_good.png.png").mkdir(parents=True)  # where the picture should be
    arguments = ("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", overlays)

    told = _flawline(*arguments)
    documents = [json.loads(line) for line in _flawline(*arguments, "--json").stdout.splitlines()]

    assert told.exit_code == 3
    assert "no overlay" in told.stdout.splitlines()[0]
    assert told.stdout.splitlines()[2] == "1 PASS, 1 FAIL"
    assert [document.get("overlay_problem", {}).get("code") for document in documents] == ["overlay_unwritable", None]


def test_inspect_when_a_part_is_judged_anew_then_the_picture_of_its_older_verdict_goes(url, frames, tmp_path):
    """A folder of pictures never shows two verdicts of one file, nor one that holds no more; others' files stay."""
    overlays = tmp_path / "overlays"
    arguments = ("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", overlays)
    _flawline(*arguments)
    for name in ("PASS_a_good.png", "PASS_a_good.png.png.bak", "OK_a_good.png.png", "PASS_other.png.png"):
        (overlays / name).write_bytes(b"not ours")
    others = {file.name for file in overlays.iterdir() if file.read_bytes() == b"not ours"}
    (overlays / "REVIEW_a_good.png.png").mkdir()
    (frames / "a_good.png").write_bytes(encode(make_frame(defect=True)))
    (frames / "b_bad.png").write_bytes(b"no image")

    told = _flawline(*arguments)

    assert told.stdout.splitlines()[2] == "1 FAIL, 1 NO_VERDICT"
    assert {file.name for file in overlays.iterdir()} == others | {"FAIL_a_good.png.png", "REVIEW_a_good.png.png"}


def test_inspect_when_pictures_lie_among_the_frames_then_they_are_not_inspected(url, frames):
    """The second run over a folder that holds its own overlays tells what the first did."""
    arguments = ("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", frames / "overlays")

    first, second = (_flawline(*arguments).stdout.splitlines()[-1] for _ in range(2))

    assert first == second == "1 PASS, 1 FAIL"


def test_inspect_when_a_picture_would_be_written_over_a_frame_then_nothing_begins(url, frames):
    """What is to be inspected is neither written over nor taken away."""
    arguments = ("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", frames)
    _flawline(*arguments)
    before = {file.name: file.read_bytes() for file in frames.iterdir()}

    again = _flawline(*arguments)

    assert again.exit_code == 2
    assert "choose another folder" in again.output
    assert {file.name: file.read_bytes() for file in frames.iterdir()} == before


def test_inspect_when_a_folder_has_the_name_of_an_image_then_it_is_no_part(url, frames):
    """Only files are parts."""
    (frames / "c.png").mkdir()

    assert _flawline("inspect", frames, "--line", "demo_line", "--url", url).stdout.splitlines()[2] == "1 PASS, 1 FAIL"


def test_inspect_when_the_server_keeps_no_heatmap_any_more_then_every_verdict_is_told_all_the_same(store, frames):
    """A server that forgets heatmaps sooner than they are fetched costs pictures and no verdicts."""
    with serve_in_thread(Settings(store_directory=store, max_heatmaps_kept=0)) as http:
        wait_until_ready(http)
        result = _flawline(
            *("inspect", frames, "--line", "demo_line", "--url", http.base_url),
            *("--overlays", frames.parent / "overlays"),
        )

    assert result.exit_code == 3
    assert result.stdout.count("no overlay") == 2


def test_inspect_when_asked_for_json_then_every_line_is_a_document(url, frames):
    """Scripts get the server's complete answer, with the file it belongs to."""
    result = _flawline("inspect", frames / "a_good.png", "--line", "demo_line", "--url", url, "--json")

    [document] = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert (document["verdict"], document["answer"]["verdict"]) == ("PASS", "PASS")
    assert document["answer"]["part_id"] == "a_good.png"


@pytest.mark.parametrize(
    ("line", "address", "said"),
    [("demo_line", "http://127.0.0.1:9", "can't be reached"), ("unheard_of", None, "no such line")],
    ids=["nobody listens", "unknown line"],
)
def test_inspect_when_there_is_no_verdict_then_says_why_and_ends_with_one(url, frames, line, address, said):
    """No fault looks like a good part to a script that reads the exit code."""
    arguments = ("--line", line, "--url", address or url, "--deadline-ms", "300")

    result = _flawline("inspect", frames / "a_good.png", *arguments)

    assert result.exit_code == 1
    assert "NO_VERDICT" in result.stdout
    assert said in result.stdout


@pytest.mark.parametrize("frame_format", ["file", "jpeg", "png", "rgb8", "mono8"])
def test_camera_when_it_runs_then_every_frame_gets_a_verdict(url, store, frame_format):
    """Golden frames of the line's bundle travel in every format; the end is told as JSON."""
    result = _flawline(
        *("camera", "--line", "demo_line", "--url", url, "--store", store, "--json"),
        *("--rate", "40", "--duration", "0.2", "--format", frame_format),
    )

    [summary] = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["sent"] == sum(summary["verdicts"].values()) == 8
    assert summary["problems"] == {}
    assert set(summary["verdicts"]) <= {"PASS", "REVIEW", "FAIL"}


def test_camera_when_the_line_shares_a_bundle_then_finds_it_under_another_name(url, store):
    """The bundle of several lines has a name of its own, and its golden frames belong to one line each."""
    result = _flawline(
        *("camera", "--line", "right", "--url", url, "--store", store, "--json", "--rate", "20", "--duration", "0.1")
    )
    nobody = _flawline("camera", "--line", "pair", "--url", url, "--store", store)

    [summary] = json.loads(result.stdout)
    assert result.exit_code == 0
    assert summary["sent"] == sum(summary["verdicts"].values()) > 0
    assert "no bundle of the line pair" in nobody.output


def test_camera_when_it_is_interrupted_then_its_figures_add_up():
    """Ctrl-C ends a run without duration: a frame that nobody has answered yet has no verdict."""
    with socket.create_server(("127.0.0.1", 0)) as nobody_answers, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "part.png").write_bytes(encode(make_frame()))
        command = ["camera", "--line", "cap", "--frames", folder, "--rate", "50", "--deadline-ms", "60000", "--json"]
        url = f"http://127.0.0.1:{nobody_answers.getsockname()[1]}"
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # even where a shell did not
        program = f"{heard}; from service.__main__ import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *command, "--url", url],
            stdout=subprocess.PIPE,
            text=True,
        )
        connection, _ = nobody_answers.accept()
        with connection:
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            told, _ = process.communicate(timeout=PATIENCE_S)

    [summary] = json.loads(told)
    assert process.returncode == 1  # no frame at all had a verdict
    assert summary["sent"] == summary["verdicts"]["NO_VERDICT"] == summary["problems"]["interrupted"] > 0


def test_camera_when_a_frame_has_no_verdict_then_its_exit_code_says_so(url, frames):
    """A script that runs a camera for a minute hears of it, as one that inspects files does."""
    result = _flawline(
        *("camera", "--line", "demo_line", "--url", url, "--frames", frames, "--rate", "20", "--duration", "0.1"),
        *("--line", "unheard_of", "--json"),
    )

    judged, unheard_of = json.loads(result.stdout)
    assert result.exit_code == 1
    assert set(judged["verdicts"]) == {"PASS", "FAIL"}
    assert set(unheard_of["verdicts"]) == {"NO_VERDICT"}


def test_camera_when_nobody_watches_then_prints_its_table_once(url, frames):
    """In a log there is one table, with every verdict's column."""
    result = _flawline(
        *("camera", "--line", "demo_line", "--url", url, "--frames", frames, "--rate", "20", "--duration", "0.1")
    )

    assert result.exit_code == 0
    assert result.stdout.count("demo_line") == 1
    assert "NO_VERDICT" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "{frames}/notes.txt", "--line", "demo_line"), "no image file"),
        (("inspect", "{empty}", "--line", "demo_line"), "no image in"),
        (("inspect", "{frames}", "--line", "demo_line", "--overlays", "{frames}/notes.txt"), "can't be the folder"),
        (("camera", "--line", "demo_line"), "Give frames"),
        (("camera", "--line", "demo_line", "--frames", "{empty}"), "no image in"),
        (("camera", "--line", "unheard_of", "--store", "{store}"), "no bundle"),
        (("inspect", "{frames}", "--line", "demo_line", "--key-file", "{empty}/key"), "key file"),
        (("inspect", "{frames}", "--line", "demo_line", "--key-file", "{frames}/a_good.png"), "can't be read"),
        (("inspect", "{frames}", "--line", "demo_line", "--key-file", "{empty}/umlaut"), "ASCII"),
        (("camera", "--frames", "{frames}", "--line", "demo_line", "--key-file", "{empty}/umlaut"), "ASCII"),
        (("inspect", "{frames}", "--line", "demo_line", "--url", "http://127.0.0.1:abc"), "address"),
        (("camera", "--frames", "{frames}", "--line", "demo_line", "--url", "http://127.0.0.1:99999"), "address"),
        (("admin", "--url", "http://127.0.0.1:abc", "lines"), "address"),
        (("camera", "--line", "demo_line", "--frames", "{empty}/absent"), "can't be read"),
        (("camera", "--line", "demo_line", "--frames", "{empty}/absent.png"), "can't be read"),
        (("camera", "--line", "demo_line", "--frames", "{frames}/notes.txt"), "no image file"),
        (("camera", "--line", "demo_line", "--frames", "{gone}"), "can't be read"),
        (("inspect", "{frames}", "--line", "demo_line", "--authority", "{frames}/notes.txt"), "certificate"),
    ],
)
def test_command_when_it_can_not_begin_then_one_sentence_says_why(frames, store, tmp_path, arguments, said):
    """A wrong folder, key, certificate or line is told before anything is sent."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/umlaut").write_text("schlüssel", encoding="utf-8")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/part.png").symlink_to("nowhere")
    places = {"gone": tmp_path / "gone", "frames": frames, "store": store, "empty": tmp_path / "empty"}

    result = _flawline(*(argument.format(**places) for argument in arguments))

    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert said in " ".join(result.output.split())
    assert "demo_line  " not in result.output  # no table
    assert "schlüssel" not in result.output


def _lock(frames: Path) -> str:
    (frames / "left").mkdir()
    (frames / "left/0001.png").write_bytes(encode(make_frame(defect=True)))
    (frames / "left").chmod(0)
    return "left"


def _lose(frames: Path) -> str:
    (frames / "right").symlink_to("unmounted")
    return "right"


def _go_round(frames: Path) -> str:
    (frames / "ring").symlink_to("ring")
    return "ring"


@pytest.mark.parametrize("hide", [_lock, _lose, _go_round], ids=["locked", "leads nowhere", "ring"])
@pytest.mark.parametrize(
    "command", [("inspect", "{frames}"), ("camera", "--duration", "0.1", "--frames", "{frames}")], ids=lambda c: c[0]
)
def test_command_when_a_folder_can_not_be_looked_into_then_nothing_is_said_of_the_others(url, frames, command, hide):
    """Who hears that all of a folder pass must not have been told so of what could be read of it."""
    (frames / "b_bad.png").unlink()
    name = hide(frames)

    with rights_of_an_ordinary_user():
        result = _flawline(*(word.format(frames=frames) for word in command), "--line", "demo_line", "--url", url)

    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"{name} can't be read" in " ".join(result.output.split())
    assert "PASS" not in result.output


def test_inspect_when_folders_are_links_then_each_frame_in_them_is_inspected_once(url, frames, tmp_path):
    """A link may lead to another disk, to a folder that is read anyway, or back to where it stands."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "0001.png").write_bytes(encode(make_frame(defect=True)))
    (disk / "back").symlink_to(frames)
    (frames / "station").symlink_to(disk)
    (frames / "days").mkdir()
    (frames / "days/0001.png").write_bytes(encode(make_frame()))
    (frames / "again").symlink_to("days")

    result = _flawline("inspect", frames, "--line", "demo_line", "--url", url, "--json")

    documents = [json.loads(line) for line in result.stdout.splitlines()]
    told = {str(Path(document["file"]).relative_to(frames)): document["verdict"] for document in documents}
    assert result.exit_code == 3
    assert len(documents) == len(told)
    assert told == {"a_good.png": "PASS", "b_bad.png": "FAIL", "days/0001.png": "PASS", "station/0001.png": "FAIL"}


def test_inspect_when_a_link_leads_to_the_pictures_then_they_are_not_inspected(url, frames, tmp_path):
    """What was drawn is no frame, whichever way leads there."""
    (frames / "drawn").symlink_to(tmp_path / "overlays")
    (tmp_path / "overlays").mkdir()
    arguments = ("inspect", frames, "--line", "demo_line", "--url", url, "--overlays", tmp_path / "overlays")

    first, second = (_flawline(*arguments).stdout.splitlines()[-1] for _ in range(2))

    assert first == second == "1 PASS, 1 FAIL"


def test_inspect_when_files_have_no_suffix_of_an_image_then_they_are_told_of(url, frames):
    """A frame of another kind is not left out without a word; hidden files are no frames."""
    (frames / "0001.pgm").write_bytes(b"P5 1 1 255 x")
    (frames / ".thumbnails").write_bytes(b"")

    result = _flawline("inspect", frames, "--line", "demo_line", "--url", url)

    assert result.stdout.splitlines()[-1] == "1 PASS, 1 FAIL"
    assert "Passed over, as no images by their names: 1 .pgm, 1 .txt." in result.output
