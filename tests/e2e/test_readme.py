"""README's commands, run as they stand there: what a newcomer types must work."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.contract.frames import FrameLimits, read_header
from tests.factories import encode, make_frame
from tests.servers import ServerProcess
from tests.tiny_line import BRIEF, write_line

_ROOT = Path(__file__).resolve().parents[2]
# A newcomer's fit takes two minutes; the commands are the same for a smaller network and a fit that takes seconds.
_QUICK = [*(word for setting in BRIEF for word in ("--set", setting)), "--threads", "1"]


def _commands() -> list[list[str]]:
    """Return the words of every command in README's shell blocks, comments left out."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _named(program: str, verb: str) -> list[str]:
    found = [words for words in _commands() if Path(words[0]).name == program and words[1] == verb]
    assert len(found) == 1, f"README must show `{program} {verb}` exactly once"
    return found[0]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_when_it_names_a_make_target_names_one_that_exists(target: str) -> None:
    """The two commands are there, and make knows how to run them."""
    command = _named("make", target)

    done = subprocess.run([*command, "--dry-run"], cwd=_ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_readme_when_followed_goes_from_good_parts_to_an_overlay(tmp_path: Path) -> None:
    """Train, serve, and both curl calls, word for word: a verdict in JSON and a picture on disk."""
    if shutil.which("curl") is None:
        pytest.skip("needs the program curl")
    write_line(tmp_path / "path/to/line", good=80)  # a quarter is held out, and 5 % need 19
    (tmp_path / "frame.jpg").write_bytes(encode(make_frame(72, 80, seed=1, defect=True), "JPEG"))
    train = [sys.executable, "-m", "service", *_named("flawline", "train")[1:], *_QUICK]
    serve = _named("flawline", "serve")
    curls = [words for words in _commands() if words[0] == "curl"]

    trained = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    store = tmp_path / serve[serve.index("--store") + 1]
    with ServerProcess(store) as server:
        server.ready()
        address = server.url.removeprefix("http://")
        answers = [
            subprocess.run(
                [word.replace("localhost:8000", address) for word in words],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for words in curls
        ]

    assert any('"verdict":"' in answer for answer in answers)
    picture = read_header((tmp_path / "overlay.png").read_bytes(), FrameLimits())
    assert (picture.format, picture.height, picture.width) == ("PNG", 72, 80)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_readme_when_it_renders_the_cluster_then_the_command_gives_resources() -> None:
    """The one command of deployment that needs neither Docker nor a cluster, as it stands there."""
    done = subprocess.run(_named("kubectl", "kustomize"), cwd=_ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "kind: Deployment" in done.stdout


def test_readme_when_a_command_needs_more_than_a_clone_then_it_says_so() -> None:
    """Whoever has no Docker learns it before typing; the file that is named exists."""
    [command] = [words for words in _commands() if words[0] == "docker"]
    text = (_ROOT / "README.md").read_text(encoding="utf-8")

    assert (_ROOT / command[command.index("-f") + 1]).is_file()
    assert "needs Docker" in next(line for line in text.splitlines() if line.startswith("docker compose"))
