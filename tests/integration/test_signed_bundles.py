"""A server that asks for signatures serves what is signed, and tells why it serves nothing else."""

import pytest

from service.contract.bundle import MANIFEST_FILE
from service.contract.signature import SIGNATURE_FILE, SigningFailed, sign_manifest
from service.settings import Settings
from tests.factories import make_bundle
from tests.keypairs import make_key_pair
from tests.servers import serve_in_thread, wait_until

pytest.importorskip("model_signing", reason="signatures need the extra `signing`")


def test_server_when_signatures_are_required_then_serves_signed_lines_only(tmp_path):
    """The signed line is ready; the other one is refused with the sentence that says what to do."""
    keys = make_key_pair(tmp_path)
    signed = make_bundle(tmp_path / "store", "signed_line")
    make_bundle(tmp_path / "store", "unsigned_line")
    (signed / SIGNATURE_FILE).write_bytes(sign_manifest((signed / MANIFEST_FILE).read_bytes(), keys.private))
    settings = Settings(
        store_directory=tmp_path / "store", require_signature=True, signature_public_key=keys.public, port=0
    )

    with serve_in_thread(settings) as http:
        wait_until(lambda: http.get("/v1/lines/signed_line").json().get("state") == "ready", "the signed line")
        wait_until(lambda: http.get("/v1/lines/unsigned_line").json().get("state") == "refused", "the refusal")
        reason = http.get("/v1/lines/unsigned_line").json()["reason"]

    assert "not signed" in reason


def test_server_when_its_public_key_is_none_then_does_not_start(tmp_path):
    """A wrong key stops the start rather than refusing every bundle."""
    from service.app import create_app

    (tmp_path / "key.pem").write_text("no key")

    with pytest.raises(SigningFailed):
        create_app(Settings(store_directory=tmp_path, signature_public_key=tmp_path / "key.pem"))
