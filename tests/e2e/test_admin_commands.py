"""The commands of administrators, run as one would, against the administration port of a real server."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.commands.client import commands
from tests.callers import ADMIN, write_keys
from tests.factories import make_bundle, make_graph, make_policy, reseal
from tests.servers import ServerProcess


class Administered(NamedTuple):
    """A server and where it is administered.

    Attributes:
        store: of its bundles; every test has a line of its own in it.
        url: of the administration.
        key: file of the administrator's key.
        state: directory of what is remembered.
        folder: where other files may lie.
    """

    store: Path
    url: str
    key: Path
    state: Path
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve a line for each test that changes one."""
    folder = tmp_path_factory.mktemp("administered")
    store, state, key = folder / "store", folder / "state", folder / "admin.key"
    for line in ("listed", "rolled", "judged", "paused", "broken", "looked_at"):
        make_bundle(store, line)
    key.write_text(ADMIN["X-API-Key"] + "\n")
    environment = {
        "FLAWLINE_ADMIN_PORT": "0",
        "FLAWLINE_KEYS_FILE": str(write_keys(folder)),
        "FLAWLINE_STATE_DIRECTORY": str(state),
    }
    with ServerProcess(store, environment) as server:
        server.ready()
        yield Administered(store, f"http://127.0.0.1:{server.admin_port}", key, state, folder)


def _flawline(served: Administered, *arguments: str, before: tuple[str, ...] = ()) -> Result:
    shown = ["admin", "--url", served.url, "--key-file", str(served.key), *before, *arguments]
    return CliRunner().invoke(commands, shown, env={"COLUMNS": "200"})


def test_lines_when_listed_then_a_table_tells_what_serves_them(served):
    """State, version, policy, device and precision of every line, in a row each."""
    done = _flawline(served, "lines")

    (row,) = [line for line in done.stdout.splitlines() if "listed" in line]
    assert done.exit_code == 0
    assert row.split() == ["listed", "ready", "listed", "1", "1", "-", "cpu", "fp32"]


def test_version_when_activated_and_rolled_back_then_told_and_remembered(served):
    """Each change answers with how every version stands, and lies in the state directory by then."""
    make_bundle(served.store, "rolled", "2")

    activated = _flawline(served, "activate", "rolled", "2")
    back = _flawline(served, "roll-back", "rolled", before=("--json",))

    states = {one["version"]: (one["state"], one["held_back"]) for one in json.loads(back.stdout)["versions"]}
    assert [row.split()[1:3] for row in activated.stdout.splitlines() if "rolled" in row] == [
        ["1", "kept"],
        ["2", "live"],
    ]
    assert states == {"1": ("live", False), "2": ("stored", True)}
    assert json.loads(back.stdout)["remembered"] is True
    kept = json.loads((served.state / "choices.json").read_text())["choices"]
    assert kept["versions"]["rolled"] == {"live": "1", "held_back": ["2"]}


def test_policy_when_set_then_the_line_is_listed_with_it(served):
    """A policy file of the store judges from now on."""
    folder = served.store / "judged" / "policies"
    folder.mkdir()
    (folder / "strict.json").write_text(make_policy(version="strict", fail_threshold=0.15).model_dump_json())

    done = _flawline(served, "policy", "judged", "strict")

    listed = json.loads(_flawline(served, "lines", before=("--json",)).stdout)["lines"]
    (line,) = [one for one in listed if one["line"] == "judged"]
    assert done.exit_code == 0
    assert (line["policy"], line["policies"]) == ("strict", ["1", "strict"])


def test_rescan_when_a_live_version_was_removed_then_it_is_told_and_serves_on(served):
    """Whoever removed it hears what is left to do, whether that was meant or not."""
    away = (served.store / "listed" / "1").rename(served.store / "listed" / ".1")
    rescanned = _flawline(served, "rescan")
    listed = json.loads(_flawline(served, "lines", before=("--json",)).stdout)["lines"]
    away.rename(served.store / "listed" / "1")

    (row,) = [line.split() for line in rescanned.stdout.splitlines() if "listed" in line]
    assert row[:3] == ["gone", "listed", "1"]
    assert [line["state"] for line in listed if line["line"] == "listed"] == ["ready"]


def test_line_when_unloaded_and_loaded_then_told(served):
    """A line can be taken out of service and put back."""
    states = [_flawline(served, verb, "paused").stdout for verb in ("unload", "load")]

    assert ["unloaded" in states[0], "ready" in states[1]] == [True, True]
    assert "load it again" in " ".join(states[0].split())


def test_policy_when_refused_then_the_name_of_its_file_is_shown_legibly(served):
    """Who may write into the store writes nothing on the administrator's terminal."""
    odd = served.store / "paused" / "policies" / "\x1b[2J[bold].json"
    odd.parent.mkdir(exist_ok=True)
    odd.write_text("{}")

    rescanned = _flawline(served, "rescan")
    odd.unlink()

    assert rescanned.exit_code == 3
    assert r"\x1b[2J[bold]" in "".join(rescanned.stdout.split())
    assert "\x1b[2J" not in rescanned.stdout


def test_version_when_refused_then_exit_code_three_and_what_was_live_still_is(served):
    """A script can tell a version that does not hold from a wrong command."""

    def add_broken(version: str) -> None:
        broken = make_bundle(served.store, "broken", version)
        (broken / "model.onnx").write_bytes(make_graph(reference=0.5))
        reseal(broken)

    add_broken("2")
    done = _flawline(served, "activate", "broken", "2")
    shadow = _flawline(served, "shadow", "broken", "2")
    add_broken("3")  # one that was refused is not tried again as long as nobody touches it
    rescanned = _flawline(served, "rescan")
    listed = _flawline(served, "versions", "broken")

    assert (done.exit_code, shadow.exit_code, rescanned.exit_code) == (3, 3, 3)
    assert "What was live still is." in done.stderr
    assert [row.split()[1:3] for row in listed.stdout.splitlines() if row.split()[:1] == ["broken"]] == [
        ["1", "live"],
        ["2", "refused"],
        ["3", "refused"],
    ]


def test_shadow_when_started_and_ended_then_told(served):
    """A version can look on, and what it would have said otherwise can be read."""
    make_bundle(served.store, "looked_at", "2")

    on = _flawline(served, "shadow", "looked_at", "2")
    read = _flawline(served, "disagreements", "looked_at", before=("--json",))
    off = _flawline(served, "shadow", "looked_at", "--off")

    assert ("shadow" in on.stdout, "shadow" in off.stdout) == (True, False)
    assert json.loads(read.stdout) == {"line": "looked_at", "disagreements": []}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (("roll-back", "nowhere"), 2, "There is no such bundle"),
        (("activate", "looked_at", "99"), 2, "no such version"),
        (("activate", "looked_at", "../1"), 2, "flawline admin versions lists them"),
        (("unload", "a/b"), 2, "letters, digits"),
        (("policy", "looked_at", "absent"), 2, "no policy of this version"),
        (("shadow", "looked_at"), 2, "say --off"),
    ],
    ids=["bundle", "version", "no version", "no line", "policy", "shadow"],
)
def test_command_when_asked_in_the_wrong_way_then_exit_code_two_and_what_to_do(served, arguments, exit_code, sentence):
    """What is not there, or is no name at all, is the caller's to put right."""
    done = _flawline(served, *arguments)

    assert done.exit_code == exit_code
    assert sentence in done.stderr


def test_command_when_the_key_or_the_server_is_missing_then_told_what_to_set(served):
    """Whoever forgot the key or the port reads its name."""
    runner = CliRunner()

    keyless = runner.invoke(commands, ["admin", "--url", served.url, "lines"])
    nowhere = runner.invoke(commands, ["admin", "--url", "http://127.0.0.1:9", "--key-file", str(served.key), "lines"])
    unreadable = runner.invoke(commands, ["admin", "--key-file", str(served.folder / "absent"), "lines"])

    assert (keyless.exit_code, nowhere.exit_code, unreadable.exit_code) == (2, 1, 2)
    assert "FLAWLINE_CLIENT_KEY_FILE" in keyless.stderr
    assert "FLAWLINE_ADMIN_PORT" in nowhere.stderr
    assert "can't be read" in unreadable.stderr


def test_help_when_asked_for_then_every_command_shows_an_example():
    """Nobody has to guess how a command is written."""
    runner = CliRunner()
    names = (
        "activate",
        "disagreements",
        "lines",
        "load",
        "policy",
        "rescan",
        "roll-back",
        "shadow",
        "unload",
        "versions",
    )

    told = {name: runner.invoke(commands, ["admin", name, "--help"]).stdout for name in names}

    assert all(f"flawline admin {name}" in text for name, text in told.items())
