"""Promises of the operator's commands: keys that are shown once, bundles that are signed, verified and published."""

import json
import time
from datetime import datetime

import pytest
from typer.testing import CliRunner

from service.__main__ import commands
from service.auth import Keyring
from service.contract.bundle import load_bundle
from tests.factories import make_bundle
from tests.keypairs import make_key_pair


def _flawline(*arguments: object):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_keys_new_when_run_then_the_printed_key_opens_its_lines_and_the_file_does_not_hold_it(tmp_path):
    """The key is shown once; the file holds its digest and what it may do."""
    file = tmp_path / "keys.json"

    done = _flawline("keys", "new", "--name", "press", "--lines", "cap", "--actions", "inspect", "--keys-file", file)

    key = done.stdout.strip()
    caller = Keyring.from_file(file, lambda: 0.0).identify(None, key)
    assert (caller.name, caller.may("inspect", "cap"), caller.may("inspect", "nut")) == ("press", True, False)
    assert key not in file.read_text()
    [entry] = json.loads(file.read_text())
    assert abs(datetime.fromisoformat(entry["created_at"]).timestamp() - time.time()) < 60


def test_keys_new_when_the_file_has_keys_then_they_stay(tmp_path):
    """A second key is appended, and the file keeps its permissions."""
    file = tmp_path / "keys.json"
    first = _flawline("keys", "new", "--name", "a", "--keys-file", file).stdout.strip()
    file.chmod(0o600)

    _flawline("keys", "new", "--name", "b", "--quota-per-minute", "60", "--keys-file", file)

    assert [entry["name"] for entry in json.loads(file.read_text())] == ["a", "b"]
    assert Keyring.from_file(file, lambda: 0.0).identify(None, first).name == "a"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(("--actions", "fly"), "actions"), (("--lines", "../etc"), "lines"), (("--quota-per-minute", "0"), "quota")],
    ids=["action", "line", "quota"],
)
def test_keys_new_when_a_right_does_not_fit_then_nothing_is_written(tmp_path, wrong, told):
    """A key that the service would refuse is not made."""
    file = tmp_path / "keys.json"

    done = _flawline("keys", "new", "--name", "press", "--keys-file", file, *wrong)

    assert (done.exit_code, file.exists()) == (2, False)
    assert told in done.output


def test_keys_new_when_the_file_is_broken_then_it_is_left_as_it_is(tmp_path):
    """A file that can't be read is not overwritten."""
    file = tmp_path / "keys.json"
    file.write_text("[{")

    done = _flawline("keys", "new", "--name", "press", "--keys-file", file)

    assert (done.exit_code, file.read_text()) == (2, "[{")


def test_sign_when_run_then_verify_holds_and_another_key_does_not(tmp_path):
    """What one key signed, its other half verifies, and no other."""
    pytest.importorskip("model_signing", reason="signatures need the extra `signing`")
    bundle, keys, other = make_bundle(tmp_path), make_key_pair(tmp_path), make_key_pair(tmp_path, "other")

    signed = _flawline("sign", bundle, "--key", keys.private)

    held, refused = (
        _flawline("verify", bundle, "--key", keys.public),
        _flawline("verify", bundle, "--key", other.public),
    )
    assert (signed.exit_code, held.exit_code, refused.exit_code) == (0, 0, 2)
    assert load_bundle(bundle).digest in held.stdout


def test_publish_when_the_store_is_a_directory_then_the_bundle_lies_there_whole_and_only_once(tmp_path):
    """Another store gets the same version, and never two of it."""
    bundle = make_bundle(tmp_path / "made", version="3")
    store = tmp_path / "served"

    first, second = _flawline("publish", bundle, store), _flawline("publish", bundle, store)

    assert (first.exit_code, second.exit_code) == (0, 2)
    assert load_bundle(store / "demo_line/3").digest == load_bundle(bundle).digest
    assert "already" in second.output
    assert [path.name for path in (store / "demo_line").iterdir()] == ["3"]
