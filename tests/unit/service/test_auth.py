"""Promises of keys: who may do what on which line, how often, and that nothing else is told."""

import errno
import hashlib
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.auth import KeyEntry, Keyring, KeysFileInvalid, MountedKeyring
from service.errors import NotAuthenticated, NotAuthorised, QuotaExceeded


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _entry(key: str = "press-key", **fields: Any) -> KeyEntry:
    known: dict[str, Any] = {"name": "press", "sha256": _digest(key), "lines": ("cap",), "actions": {"inspect"}}
    return KeyEntry(**known | fields)


def _keyring(*entries: KeyEntry, clock: _Clock | None = None) -> Keyring:
    return Keyring(entries, clock or _Clock())


def test_open_service_when_no_keys_file_then_anybody_may_do_everything():
    """Without a keyring's entries every action is allowed on every line, without a key and without a quota."""
    keyring = Keyring(None, _Clock())

    caller = keyring.identify(None, None)

    caller.demand("admin", "cap")
    caller.spend_frame()
    assert keyring.is_open


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [("Bearer press-key", None), ("bearer  press-key ", None), (None, "press-key"), ("Basic abc", "press-key")],
    ids=["bearer", "bearer-loosely-written", "api-key", "api-key-beside-another-scheme"],
)
def test_known_key_when_shown_in_either_header_then_its_holder_is_named(authorization, api_key):
    """A key is found in `Authorization: Bearer` and in `X-API-Key`."""
    keyring = _keyring(_entry("other-key", name="other"), _entry())

    caller = keyring.identify(authorization, api_key)

    assert caller.name == "press"


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [(None, None), ("Bearer ", None), ("Bearer wrong", None), ("Bearer wrong", "press-key"), ("press-key", None)],
    ids=["none", "empty", "wrong", "wrong-bearer-is-not-rescued", "no-scheme"],
)
def test_caller_when_its_key_is_missing_or_unknown_then_not_authenticated(authorization, api_key):
    """No key and an unknown key are refused alike."""
    keyring = _keyring(_entry())

    with pytest.raises(NotAuthenticated):
        keyring.identify(authorization, api_key)


def test_empty_keys_file_when_loaded_then_nobody_gets_in(tmp_path: Path):
    """A keys file without entries closes the service rather than opening it."""
    (tmp_path / "keys.json").write_text("[]")

    keyring = Keyring.from_file(tmp_path / "keys.json", _Clock())

    assert not keyring.is_open
    with pytest.raises(NotAuthenticated):
        keyring.identify("Bearer press-key", None)


@pytest.mark.parametrize(
    ("lines", "action", "line", "allowed"),
    [
        (("cap",), "inspect", "cap", True),
        (("cap",), "inspect", None, True),
        (("cap",), "inspect", "hazelnut", False),
        (("cap",), "read", "cap", False),
        (("*",), "inspect", "hazelnut", True),
        (("*",), "admin", "hazelnut", False),
        (("cap",), "choose", "cap", False),
    ],
)
def test_right_when_demanded_then_granted_only_for_line_and_action_of_the_key(lines, action, line, allowed):
    """A right needs both its action and its line; `*` covers every line and no action."""
    caller = _keyring(_entry(lines=lines)).identify("Bearer press-key", None)

    if allowed:
        caller.demand(action, line)
    else:
        with pytest.raises(NotAuthorised):
            caller.demand(action, line)


def test_reach_when_asked_for_then_only_a_star_covers_lines_to_come_and_only_keys_with_the_action_allow_it():
    """What may change any line needs a key for every line, and a port that no key may use is not opened."""
    one, every = _entry(lines=("cap", "bottle")), _entry("other-key", lines=("*",), actions={"read"})
    keyring = _keyring(one, every)

    assert not keyring.identify("Bearer press-key", None).covers_every_line
    assert keyring.identify("Bearer other-key", None).covers_every_line
    assert [keyring.allows(action) for action in ("inspect", "read", "admin")] == [True, True, False]


def test_quota_when_used_up_then_refused_with_the_seconds_until_the_next_frame():
    """The frame after the quota is refused, and knows when one frame will have been refilled."""
    clock = _Clock()
    caller = _keyring(_entry(quota_per_minute=6), clock=clock).identify("Bearer press-key", None)
    for _ in range(6):
        caller.spend_frame()

    with pytest.raises(QuotaExceeded) as refused:
        caller.spend_frame()

    assert refused.value.retry_after_s == pytest.approx(10)


def test_quota_when_time_has_passed_then_it_refills_evenly_and_not_beyond_a_minute():
    """After ten seconds one of six frames a minute is back; after an hour there are six, not more."""
    clock = _Clock()
    keyring = _keyring(_entry(quota_per_minute=6), clock=clock)
    caller = keyring.identify("Bearer press-key", None)
    for _ in range(6):
        caller.spend_frame()

    clock.now += 10.001
    keyring.identify("Bearer press-key", None).spend_frame()
    clock.now += 3600
    for _ in range(6):
        caller.spend_frame()

    with pytest.raises(QuotaExceeded):
        caller.spend_frame()


def test_quota_when_one_holder_used_it_up_then_the_neighbour_keeps_its_own():
    """Quotas are counted key by key."""
    keyring = _keyring(_entry(quota_per_minute=1), _entry("other-key", name="other", quota_per_minute=1))
    keyring.identify("Bearer press-key", None).spend_frame()

    neighbour = keyring.identify("Bearer other-key", None)

    neighbour.spend_frame()


def test_keys_file_when_right_then_its_entries_count(tmp_path: Path):
    """A keys file as documented is read."""
    file = tmp_path / "keys.json"
    file.write_text(
        json.dumps([{"name": "press", "sha256": _digest("k"), "lines": ["*"], "actions": ["inspect", "read"]}])
    )

    caller = Keyring.from_file(file, _Clock()).identify(None, "k")

    assert caller.may("read", "cap")
    assert not caller.may("metrics", "cap")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '[{"name": "a"}]',
        '[{"name": "a", "key": "plain", "lines": ["*"], "actions": ["inspect"]}]',
        f'[{{"name": "a", "sha256": "{"A" * 64}", "lines": ["*"], "actions": ["inspect"]}}]',
        f'[{{"name": "a", "sha256": "{"a" * 64}", "lines": ["*"], "actions": ["fly"]}}]',
        f'[{{"name": "a", "sha256": "{"a" * 64}", "lines": [], "actions": ["inspect"]}}]',
        f'[{{"name": "", "sha256": "{"a" * 64}", "lines": ["*"], "actions": ["inspect"]}}]',
        f'[{{"name": "a", "sha256": "{"a" * 64}", "lines": ["*"], "actions": ["inspect"], "quota_per_minute": 0}}]',
    ],
    ids=["no-json", "no-digest", "plain-key", "upper-case-digest", "unknown-action", "no-line", "no-name", "no-quota"],
)
def test_keys_file_when_it_does_not_fit_then_refused_with_a_right_entry_and_without_its_content(tmp_path, text):
    """A wrong keys file stops the start with a sentence that shows a right entry and repeats no secret."""
    (tmp_path / "keys.json").write_text(text)

    with pytest.raises(KeysFileInvalid) as refused:
        Keyring.from_file(tmp_path / "keys.json", _Clock())

    assert "A right entry is" in str(refused.value)
    assert "plain" not in str(refused.value)


def test_keys_file_when_missing_then_refused_by_name(tmp_path: Path):
    """A keys file that was named but is not there stops the start; the service never opens by accident."""
    with pytest.raises(KeysFileInvalid, match=r"absent\.json"):
        Keyring.from_file(tmp_path / "absent.json", _Clock())


def test_keys_when_two_entries_share_one_then_refused():
    """One key has one holder, else quotas and log lines would name the wrong one."""
    with pytest.raises(KeysFileInvalid):
        _keyring(_entry(), _entry(name="other"))


def _write_keys(file: Path, *entries: KeyEntry) -> None:
    """Put a keys file in place as Kubernetes does: another file under the same name."""
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps([entry.model_dump(mode="json") for entry in entries]))
    aside.replace(file)


def test_keys_file_when_changed_then_new_keys_count_and_old_ones_do_not(tmp_path: Path, caplog):
    """A key is given and taken without a restart, a second later at the latest; the file is read once for that."""
    file, clock = tmp_path / "keys.json", _Clock()
    _write_keys(file, _entry("old-key"))
    keyring = MountedKeyring(file, clock)
    _write_keys(file, _entry("new-key", name="press 5"))
    assert keyring.identify("Bearer old-key", None).name == "press"  # nobody looks more often than once a second

    with caplog.at_level("INFO", "flawline"):
        for _ in range(3):
            clock.now += 1
            assert keyring.identify("Bearer new-key", None).name == "press 5"

    with pytest.raises(NotAuthenticated):
        keyring.identify("Bearer old-key", None)
    assert [record.message for record in caplog.records] == ["the changed keys file is in force"]


def test_keys_file_when_its_link_is_swapped_then_read_again(tmp_path: Path):
    """A mounted secret changes by its folder's link, not by its file."""
    clock = _Clock()
    for folder, key in (("one", "old-key"), ("two", "new-key")):
        (tmp_path / folder).mkdir()
        _write_keys(tmp_path / folder / "keys.json", _entry(key))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    keyring = MountedKeyring(tmp_path / "keys.json", clock)
    (tmp_path / "..swap").symlink_to("two")
    (tmp_path / "..swap").replace(tmp_path / "..data")

    clock.now += 1

    assert keyring.identify("Bearer new-key", None).name == "press"


@pytest.mark.parametrize("broken", ["[{", None], ids=["no-json", "removed"])
def test_keys_file_when_changed_into_a_broken_one_then_the_keys_before_stay_and_it_is_told(tmp_path, caplog, broken):
    """A slip of the pen stops nobody, is logged once, and shows in the metric until it is put right."""
    file, clock = tmp_path / "keys.json", _Clock()
    _write_keys(file, _entry())
    keyring = MountedKeyring(file, clock)
    file.unlink()
    if broken is not None:
        file.write_text(broken)

    for _ in range(3):
        clock.now += 1
        assert keyring.identify("Bearer press-key", None).name == "press"

    assert not keyring.is_in_force()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    _write_keys(file, _entry())
    clock.now += 1
    assert keyring.is_in_force()


def test_keys_file_when_it_could_not_be_read_for_a_moment_then_it_counts_as_soon_as_it_can(tmp_path, monkeypatch):
    """A disk or a table of open files that was full keeps no revoked key in force."""
    file, clock = tmp_path / "keys.json", _Clock()
    _write_keys(file, _entry("old-key"))
    keyring = MountedKeyring(file, clock)
    _write_keys(file, _entry("new-key"))

    def fail(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    clock.now += 1
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        assert keyring.identify("Bearer old-key", None).name == "press"
    clock.now += 1

    assert keyring.identify("Bearer new-key", None).name == "press"
    with pytest.raises(NotAuthenticated):
        keyring.identify("Bearer old-key", None)
    assert keyring.is_in_force()


def test_oldest_key_when_one_is_added_then_is_as_old_as_before(tmp_path):
    """A new key makes nobody's old one young; where an entry has no date, its file's counts."""
    file, clock = tmp_path / "keys.json", _Clock()
    dated = _entry(created_at="2026-01-01T00:00:00Z")
    _write_keys(file, dated, _entry("new-key", created_at="2026-06-01T00:00:00Z"))
    keyring = MountedKeyring(file, clock)
    january = datetime(2026, 1, 1, tzinfo=UTC).timestamp()

    assert keyring.oldest_made_at() == january
    os.utime(file, (1_000_000_000, 1_000_000_000))
    clock.now += 1
    assert keyring.oldest_made_at() == january

    _write_keys(file, dated, _entry("undated-key"))
    os.utime(file, (1_000_000_000, 1_000_000_000))
    clock.now += 1
    assert keyring.oldest_made_at() == 1_000_000_000
    file.write_text("[]")
    clock.now += 1
    assert math.isnan(keyring.oldest_made_at())


def test_quota_when_the_keys_file_changes_then_what_was_used_stays_used(tmp_path: Path):
    """Changing the file gives nobody a new minute; a doubled quota doubles what is left."""
    file, clock = tmp_path / "keys.json", _Clock()
    _write_keys(file, _entry(quota_per_minute=4))
    keyring = MountedKeyring(file, clock)
    for _ in range(3):
        keyring.identify("Bearer press-key", None).spend_frame()
    _write_keys(file, _entry(quota_per_minute=8), _entry("other-key", name="other"))
    clock.now += 1

    caller = keyring.identify("Bearer press-key", None)

    for _ in range(2):
        caller.spend_frame()
    with pytest.raises(QuotaExceeded):
        caller.spend_frame()
