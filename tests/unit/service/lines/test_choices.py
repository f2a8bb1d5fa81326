"""Promises of administrators' choices: they count again after a restart, or the service says that they don't."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from service.errors import BundleRefused, LineNotReady
from service.lines.catalogue import Catalogue
from service.lines.choices import CHOICES_FILE, LAST_LIVE_FILE, LOCK_FILE, Choices, LastLive, why_unusable
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.stores.directory import DirectoryStore
from tests.factories import make_bundle, make_policy
from tests.servers import held_engine

DRIVEN = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return bundles to put into stores, `demo_line` 1 to 3 and `other_line` 1; to be read only."""
    made = tmp_path_factory.mktemp("made")
    for version in ("1", "2", "3"):
        make_bundle(made, version=version)
    make_bundle(made, "other_line")
    return made


class Plant:
    """A store, a state directory, and the service that starts on them again and again."""

    def __init__(self, folder, made):
        self.store, self.state = folder / "store", folder / "state"
        self.state.mkdir()
        self._made = made
        self._started = []

    def add(self, version, name="demo_line"):
        """Put a version into the store."""
        shutil.copytree(self._made / name / version, self.store / name / version)

    def start(self, *, activates_newest=True):
        """Return a registry that has loaded, as after a restart."""
        options = RegistryOptions(activates_newest=activates_newest, state_directory=self.state)
        store = DirectoryStore(self.store)
        registry = Registry(store, None, held_engine, DRIVEN, Telemetry(), time.monotonic, options)
        self._started.append(registry)
        registry.load()
        return registry

    def add_policy(self, line, version, **fields):
        """Write a policy file of a line, and return it."""
        file = self.store / line / "policies" / f"{version}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(make_policy(version=version, **fields).model_dump_json())
        return file

    @property
    def file(self):
        """The file of choices."""
        return self.state / CHOICES_FILE

    def close(self):
        """End every runner."""
        for registry in self._started:
            registry.close()


@pytest.fixture
def plant(tmp_path, made):
    """Return a plant with two versions of one line."""
    plant = Plant(tmp_path, made)
    for version in ("1", "2"):
        plant.add(version)
    yield plant
    plant.close()


def live_version(registry):
    """Return which version answers."""
    return registry.find("demo_line", None, None).line.bundle.manifest.version


def test_roll_back_when_the_service_starts_again_then_the_older_version_still_serves(plant):
    """What somebody stepped back from does not come back by a restart, nor by a look at the store."""
    plant.start().roll_back("demo_line")

    again = plant.start()
    again.rescan()

    assert live_version(again) == "1"
    assert again.is_ready
    assert [(one.version, one.is_held_back) for one in again.versions("demo_line")] == [("1", False), ("2", True)]
    assert again.why_forgotten is None


def test_roll_back_when_a_still_newer_version_came_meanwhile_then_that_one_serves(plant):
    """A version that nobody stepped back from becomes live by itself, as it would have without a restart."""
    plant.start().roll_back("demo_line")
    plant.add("3")

    assert live_version(plant.start()) == "3"
    assert live_version(plant.start(activates_newest=False)) == "1"


def test_start_when_versions_wait_for_an_administrator_then_it_takes_the_one_that_served_first(plant):
    """Nobody approved the newer one, so that no restart may bring it; nor another process that shares the directory."""
    first = plant.start(activates_newest=False)
    plant.add("3")
    plant.add("1", "other_line")
    first.rescan()

    again = plant.start(activates_newest=False)
    waiting = live_version(again)
    again.activate("demo_line", "3")

    assert (live_version(first), waiting, live_version(again)) == ("2", "2", "3")
    assert live_version(plant.start(activates_newest=False)) == "3"
    kept = json.loads((plant.state / CHOICES_FILE).read_text())["choices"]["versions"]
    assert {name: version["live"] for name, version in kept.items()} == {"demo_line": "3", "other_line": "1"}


def test_start_when_the_first_version_is_refused_then_it_is_not_kept_and_the_next_one_may_serve_first(plant):
    """What never served was never live, and a line that waits for a version that holds must not wait for ever."""
    model = plant.store / "demo_line" / "2" / "model.onnx"
    model.write_bytes(b"half a model")
    first = plant.start(activates_newest=False)
    plant.add("3")

    first.rescan()

    assert live_version(first) == "3"
    assert live_version(plant.start(activates_newest=False)) == "3"


def test_start_when_another_process_began_with_another_version_then_that_one_is_kept_and_it_is_said(plant, caplog):
    """Of two processes that begin at once with what each has found, one is kept, and the log names both."""
    two = Choices(plant.state)
    Choices(plant.state).begin_with("demo_line", "1")

    two.begin_with("demo_line", "2")

    again = Choices(plant.state)
    again.recall()
    assert again.chosen.versions["demo_line"].live == "1"
    assert [(record.version, record.other_version) for record in caplog.records] == [("2", "1")]


def test_store_when_the_service_starts_again_then_it_is_told_what_must_not_be_missing(plant, monkeypatch):
    """A store that has no room for all brings first what a restart begins with, or goes back to."""
    told = []
    plant.start()
    monkeypatch.setattr(DirectoryStore, "refresh", lambda _, needed: told.append(needed))

    running = plant.start()
    running.start_shadow("demo_line", "1")
    running.rescan()
    running.roll_back("demo_line")
    (plant.state / LAST_LIVE_FILE).unlink()
    plant.start(activates_newest=False)

    one, two = ("demo_line", "1"), ("demo_line", "2")
    assert [set(needed.serving) for needed in told] == [{two}, {one, two}, {one}]
    assert [set(needed.previous) for needed in told] == [set(), {one}, set()]
    assert [needed.newest_waits for needed in told] == [False, False, True]


def test_version_when_it_was_chosen_and_is_gone_then_the_line_is_refused_until_somebody_chooses_again(plant):
    """An older version than the chosen one is no substitute that anybody asked for."""
    plant.add("3")
    plant.start().activate("demo_line", "2")
    (plant.store / "demo_line" / "2").rename(plant.store / "demo_line" / ".2")

    again = plant.start()
    again.rescan()

    assert again.status("demo_line").state == "refused"
    assert "chose version 2" in again.status("demo_line").reason
    assert not again.is_ready
    again.activate("demo_line", "3")
    assert live_version(again) == "3"


def test_policy_when_the_service_starts_again_then_it_still_judges_and_only_its_own_version(plant):
    """Thresholds belong to the scores of one network, so they come back with it and not with another."""
    plant.add_policy("demo_line", "strict", fail_threshold=0.15)
    first = plant.start()
    first.activate_policy("demo_line", "strict")

    again = plant.start()
    by_strict = again.find("demo_line", None, None).policy.policy.version
    plant.add("3")
    again.rescan()
    by_its_own = again.find("demo_line", None, None).policy.policy.version
    again.roll_back("demo_line")

    assert (by_strict, by_its_own) == ("strict", "1")
    assert again.find("demo_line", None, None).policy.policy.version == "strict"


def test_policy_when_it_was_chosen_and_is_gone_then_its_line_gives_no_verdict_by_another(plant):
    """The bundle's own policy could pass what the chosen one stops; another choice or the file's return ends it."""
    file = plant.add_policy("demo_line", "strict", fail_threshold=0.15)
    plant.start().activate_policy("demo_line", "strict")
    text = file.read_text()
    file.unlink()

    again = plant.start()

    assert again.status("demo_line").state == "refused"
    with pytest.raises(LineNotReady, match="chose its policy strict"):
        again.find("demo_line", None, None)
    file.write_text(text)
    again.load_line("demo_line")
    assert again.find("demo_line", None, None).policy.policy.version == "strict"
    file.unlink()
    last = plant.start()
    last.activate_policy("demo_line", "1")
    assert last.find("demo_line", None, None).policy.policy.version == "1"
    assert last.is_ready


def test_unloaded_line_when_the_service_starts_again_then_it_stays_unloaded_until_it_is_loaded(plant):
    """A line that was taken out of service is not served by a restart, nor by a newer version."""
    plant.add("1", "other_line")
    plant.start().unload_line("demo_line")

    again = plant.start()
    plant.add("3")
    again.rescan()

    assert {status.line: status.state for status in again.statuses()} == {
        "demo_line": "unloaded",
        "other_line": "ready",
    }
    assert again.is_ready
    again.load_line("demo_line")
    assert live_version(again) == "3"
    assert live_version(plant.start()) == "3"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda data: data.replace(b'"live": "1"', b'"live": "2"'),
        lambda data: data.replace(b'"held_back"', b'"held_black"'),
        lambda _: b"[" * 100_000,
        lambda _: b'{"sha256": null, "choices": null}',
    ],
    ids=["cut", "empty", "changed", "misspelt", "deep", "null"],
)
def test_file_when_it_does_not_hold_then_nothing_is_served_and_nothing_is_guessed(plant, spoil):
    """The version that somebody stepped back from must not answer because a disk forgot."""
    plant.start().roll_back("demo_line")
    kept = plant.file.read_bytes()
    plant.file.write_bytes(spoil(kept))

    again = plant.start()

    assert not again.is_ready
    assert again.status("demo_line").state == "refused"
    assert "put it back from a copy" in again.status("demo_line").reason
    for change in (again.rescan, lambda: again.activate("demo_line", "2"), lambda: again.load_line("demo_line")):
        with pytest.raises(BundleRefused, match="put it back"):
            change()
    plant.file.write_bytes(kept)
    assert live_version(plant.start()) == "1"


def test_file_when_reading_it_ends_early_then_nothing_is_guessed_either(plant, monkeypatch):
    """The version that somebody stepped back from must not answer because memory was short at the start."""
    plant.start().roll_back("demo_line")

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr("service.lines.choices._read", fail)
        again = plant.start()
    again.try_again()

    assert (again.status("demo_line").state, again.is_ready) == ("refused", False)
    assert "Start the service again" in again.status("demo_line").reason
    with pytest.raises(BundleRefused, match="Start the service again"):
        again.rescan()


@pytest.mark.parametrize("look", ["try_again", "rescan"])
def test_start_when_it_ends_early_behind_the_choices_then_they_count_where_it_is_begun_anew(plant, monkeypatch, look):
    """Neither the version that was stepped back from nor the line that was taken out comes back by an accident."""
    plant.add("1", "other_line")
    before = plant.start()
    before.roll_back("demo_line")
    before.unload_line("other_line")

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr("service.lines.choices.LastLive.recall", fail)
        again = plant.start()
    was_ready = again.is_ready
    getattr(again, look)()

    assert (was_ready, again.is_ready) == (False, True)
    assert live_version(again) == "1"
    assert again.status("other_line").state == "unloaded"


def test_start_when_it_is_late_and_ends_early_then_the_pod_is_not_ready_until_it_is_begun_anew(plant, monkeypatch):
    """The store was away, came back, and then loading ended in a way that nobody foresaw: some lines may be missed."""
    away = plant.store.rename(plant.store.with_name("away"))
    registry = plant.start()
    away.rename(plant.store)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(Registry, "_as_before", fail)
        with pytest.raises(MemoryError):
            registry.try_again()
    was_ready = registry.is_ready
    registry.try_again()

    assert (was_ready, registry.is_ready) == (False, True)


def test_start_when_it_is_begun_anew_and_a_folder_can_not_be_read_then_what_serves_from_it_is_not_called_refused(
    plant, monkeypatch, caplog
):
    """The log says no line is refused that answers every frame."""

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as short:
        short.setattr(Registry, "_as_before", fail)
        registry = plant.start()
    caplog.clear()
    versions = Catalogue.versions

    def hide(catalogue, name):
        if name == "demo_line":
            raise OSError(errno.EIO, "Input/output error")
        return versions(catalogue, name)

    with monkeypatch.context() as broken:
        broken.setattr(Catalogue, "versions", hide)
        registry.try_again()

    assert registry.status("demo_line").state == "ready"
    assert [record.line for record in caplog.records if record.message == "line refused"] == []


def test_file_when_it_does_not_hold_and_the_store_was_away_then_the_lines_say_so_once_it_is_back(plant):
    """What keeps a line down is told as it is now, and not what kept it down before."""
    plant.start().roll_back("demo_line")
    plant.file.write_bytes(b"")
    away = plant.store.rename(plant.store.with_name("away"))
    again = plant.start()
    away.rename(plant.store)

    again.try_again()

    assert again.status("demo_line").state == "refused"
    assert "put it back from a copy" in again.status("demo_line").reason


def test_file_when_it_can_not_be_written_then_the_choice_counts_is_told_and_is_written_with_the_next(plant):
    """A full disk keeps nobody from stepping back; that it would be forgotten is said."""
    registry = plant.start()
    plant.state.rename(plant.state.with_name("away"))

    registry.roll_back("demo_line")

    assert live_version(registry) == "1"
    assert "forgotten" in registry.why_forgotten
    plant.state.with_name("away").rename(plant.state)
    registry.unload_line("demo_line")
    assert registry.why_forgotten is None
    kept = json.loads(plant.file.read_text())["choices"]
    assert kept["versions"] == {"demo_line": {"live": "1", "held_back": ["2"]}}
    assert kept["unloaded"] == ["demo_line"]


def test_choices_when_others_changed_the_file_then_a_change_is_made_to_what_it_holds_by_then(tmp_path):
    """Nobody's choice is written over by what another one knew, and nothing but the lock lies beside the file."""
    one, two = Choices(tmp_path), Choices(tmp_path)

    one.choose_version("cap", "1", {"10", "9"})
    two.unload("bottle")
    two.unload("jar")
    one.unload("bottle")
    two.load("bottle")
    two.choose_policy("cap", "cap", "1", "strict")
    one.choose_policy("cap", "cap", "2", "lax")

    third = Choices(tmp_path)
    third.recall()
    assert third.chosen.versions["cap"].held_back == ("9", "10")
    assert third.chosen.unloaded == ("jar",)
    assert [third.policy_of("cap", "cap", version) for version in ("1", "2")] == ["strict", "lax"]
    assert {file.name for file in tmp_path.iterdir()} == {CHOICES_FILE, LOCK_FILE}


def test_choices_when_the_file_does_not_hold_any_more_then_a_change_counts_is_told_and_writes_nothing_over_it(tmp_path):
    """Whoever mends the file finds what was in it."""
    choices = Choices(tmp_path)
    choices.unload("cap")
    (tmp_path / CHOICES_FILE).write_text("half of it")

    choices.unload("bottle")

    assert choices.chosen.unloaded == ("bottle", "cap")
    assert "forgotten" in choices.why_forgotten
    assert (tmp_path / CHOICES_FILE).read_text() == "half of it"


# What the second process does. Its number is made that of the first, as those of containers are.
ANOTHER_PROCESS = """
import os, sys
from pathlib import Path
os.getpid = lambda: int(sys.argv[2])
from service.lines.choices import Choices
choices = Choices(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    choices.unload(f"theirs_{number}")
    if choices.why_forgotten is not None:
        sys.exit(choices.why_forgotten)
"""


def test_choices_when_two_processes_change_them_at_once_then_every_change_is_kept(tmp_path):
    """What was told as remembered is, however many pods of the same process number share the directory."""
    choices, told = Choices(tmp_path), []
    arguments = [sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path), str(os.getpid())]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        other.stdin.write("go\n")
        other.stdin.flush()
        for number in range(20):
            choices.unload(f"ours_{number}")
            told.append(choices.why_forgotten)
    kept = Choices(tmp_path)
    kept.recall()

    assert other.returncode == 0
    assert told == [None] * 20
    assert set(kept.chosen.unloaded) == {f"{whose}_{number}" for whose in ("ours", "theirs") for number in range(20)}


def test_choices_when_another_process_does_not_let_go_then_that_is_told_and_the_next_change_brings_both(tmp_path):
    """A process that was stopped in a change bars nobody for ever, and nothing is written over its head."""
    choices, kept = Choices(tmp_path, longest_wait_s=0.02), Choices(tmp_path)

    with (tmp_path / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        choices.unload("cap")
        told = choices.why_forgotten
        written = (tmp_path / CHOICES_FILE).exists()
    choices.unload("bottle")
    kept.recall()

    assert LOCK_FILE in told
    assert not written
    assert choices.why_forgotten is None
    assert kept.chosen.unloaded == ("bottle", "cap")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_choices_when_the_volume_has_no_locks_then_they_are_written_and_told_as_at_risk(tmp_path, monkeypatch, number):
    """A service alone on such a volume keeps its choices; nobody is told that they are safe from another one's."""

    def refuse(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", refuse)
    choices, kept = Choices(tmp_path), Choices(tmp_path)

    choices.unload("cap")
    kept.recall()

    assert kept.chosen.unloaded == ("cap",)
    assert "no file locks" in choices.why_forgotten


def test_choices_when_no_directory_is_named_then_they_count_and_are_told_as_forgotten():
    """Without a directory everything works as long as the process lives."""
    choices = Choices(None)

    choices.choose_policy("cap", "cap", "1", "strict")

    assert choices.policy_of("cap", "cap", "1") == "strict"
    assert "FLAWLINE_STATE_DIRECTORY" in choices.why_forgotten


def test_directory_when_it_can_not_be_used_then_the_reason_is_told(tmp_path):
    """A wrong path is found at the start, not with the first roll-back."""
    (tmp_path / "file").touch()

    assert why_unusable(tmp_path / "new" / "state") is None
    assert "can't be made" in why_unusable(tmp_path / "file" / "state")


def _spoil(plant, version, name="demo_line"):
    """Have a version of a bundle not hold."""
    file = plant.store / name / version / "policy.json"
    file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))


def test_start_when_a_newer_version_does_not_hold_then_the_one_that_was_live_before_serves(plant):
    """A pod that runs goes on with what it has, and one that starts again is not stopped by what that one refused."""
    running = plant.start()
    plant.add("3")
    _spoil(plant, "3")
    running.rescan()

    again = plant.start()

    assert (live_version(running), live_version(again)) == ("2", "2")
    assert again.is_ready
    told = {one.version: (one.state, one.reason) for one in again.versions("demo_line")}
    assert told["3"] == ("refused", {one.version: one.reason for one in running.versions("demo_line")}["3"])
    assert told["2"] == ("live", None)


def test_start_when_a_version_was_stepped_back_from_and_is_wanted_again_then_it_is_held_back_no_more(plant):
    """The last word counts: what somebody activated by name serves again after a restart, whatever came since."""
    running = plant.start()
    running.roll_back("demo_line")
    running.activate("demo_line", "2")
    told = [one.version for one in running.versions("demo_line") if one.is_held_back]
    plant.add("3")
    _spoil(plant, "3")
    running.rescan()

    again = plant.start()

    assert told == []
    assert live_version(again) == "2"


def test_start_when_nobody_knows_what_was_live_then_a_version_that_does_not_hold_is_not_replaced(plant):
    """An older version that perhaps nobody ever wanted must not judge; nor one that somebody stepped back from."""
    _spoil(plant, "2")

    first = plant.start()

    assert first.status("demo_line").state == "refused"
    assert not (plant.state / LAST_LIVE_FILE).exists()


def test_start_when_the_chosen_version_does_not_hold_any_more_then_the_line_is_refused(plant):
    """Who asked for a version by name gets it or none."""
    running = plant.start()
    running.activate("demo_line", "1")
    _spoil(plant, "1")

    again = plant.start()

    assert again.status("demo_line").state == "refused"


def test_start_when_what_was_live_was_stepped_back_from_then_it_is_no_substitute(plant):
    """Versions that are held back serve by name alone, whatever another process noted of them."""
    running = plant.start()
    running.roll_back("demo_line")
    LastLive(plant.state).note("demo_line", "2")
    _spoil(plant, "1")

    again = plant.start()

    assert again.status("demo_line").state == "refused"


def test_start_when_the_refused_version_is_replaced_then_that_one_serves_at_the_next_look(plant):
    """What serves instead is no choice: a newer version that holds becomes live as ever."""
    plant.start()
    plant.add("3")
    whole = (plant.store / "demo_line" / "3" / "policy.json").read_bytes()
    _spoil(plant, "3")
    again = plant.start()
    before = live_version(again)

    (plant.store / "demo_line" / "3" / "policy.json").write_bytes(whole)
    again.rescan()

    assert (before, live_version(again)) == ("2", "3")


def test_last_live_when_its_file_does_not_hold_then_nothing_is_known_and_it_is_written_anew(plant, caplog):
    """Nobody chose it, so that it refuses no line; it only helps no more."""
    file = plant.state / LAST_LIVE_FILE
    file.write_text("half of it")

    registry = plant.start()

    assert registry.is_ready
    assert "which versions were live last is not known" in caplog.text
    LastLive(plant.state).note("other_line", "1")
    again = LastLive(plant.state)
    again.recall()
    assert again.versions == {"demo_line": "2", "other_line": "1"}


def test_last_live_when_it_can_not_be_written_then_lines_serve_all_the_same(plant, caplog):
    """A disk that is full takes no line down; the log says what a restart will not know."""
    (plant.state / LAST_LIVE_FILE).mkdir()

    registry = plant.start()

    assert registry.is_ready
    assert "which version is live can't be kept" in caplog.text
    assert {file.name for file in plant.state.iterdir()} == {LAST_LIVE_FILE, LOCK_FILE}
