"""Promises of signatures: only what the trusted key has signed, and exactly that, is loaded."""

import shutil
from pathlib import Path

import pytest

from service.contract.bundle import MANIFEST_FILE, load_bundle
from service.contract.signature import SIGNATURE_FILE, SigningFailed, Trust, refuse_unusable, sign_manifest
from service.errors import BundleRefused
from tests.factories import make_bundle, reseal
from tests.keypairs import KeyPair, make_key_pair

pytest.importorskip("model_signing", reason="signatures need the extra `signing`")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> KeyPair:
    """The pair whose signature is trusted."""
    return make_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(tmp_path_factory, keys) -> Path:
    """A signed bundle; copy it before changing it."""
    bundle = make_bundle(tmp_path_factory.mktemp("store"))
    (bundle / SIGNATURE_FILE).write_bytes(sign_manifest((bundle / MANIFEST_FILE).read_bytes(), keys.private))
    return bundle


@pytest.fixture
def copy(signed, tmp_path) -> Path:
    """A copy of the signed bundle, to be changed."""
    return Path(shutil.copytree(signed, tmp_path / "demo_line/1"))


@pytest.mark.parametrize("required", [True, False])
def test_bundle_when_signed_by_the_trusted_key_then_loaded(signed, keys, required):
    """A right signature is no hindrance."""
    assert load_bundle(signed, Trust(keys.public, required)).manifest.name == "demo_line"


def test_bundle_when_signed_then_whoever_asks_for_no_signature_loads_it_as_before(signed):
    """The signature is no stranger in the bundle."""
    assert load_bundle(signed).manifest.name == "demo_line"


def test_bundle_when_unsigned_then_refused_only_where_signatures_are_required(copy, keys):
    """Without a signature the setting decides."""
    (copy / SIGNATURE_FILE).unlink()

    assert load_bundle(copy, Trust(keys.public, required=False)).manifest.name == "demo_line"
    with pytest.raises(BundleRefused, match="not signed"):
        load_bundle(copy, Trust(keys.public))


@pytest.mark.parametrize("required", [True, False])
def test_bundle_when_changed_and_sealed_again_then_refused(copy, keys, required):
    """Whoever can write to the store, digests included, still can't make the signature fit."""
    (copy / "report.html").write_bytes(b"another report")
    reseal(copy)

    with pytest.raises(BundleRefused, match=r"model\.sig is no signature of this manifest"):
        load_bundle(copy, Trust(keys.public, required))


def test_bundle_when_a_file_is_changed_but_not_the_manifest_then_its_digest_refuses_it(copy, keys):
    """The signature covers every file through its digest."""
    (copy / "report.html").write_bytes(b"another report")

    with pytest.raises(BundleRefused, match=r"report\.html is not the file"):
        load_bundle(copy, Trust(keys.public))


def test_bundle_when_signed_by_another_key_then_refused(signed, tmp_path):
    """A good signature of a stranger counts for nothing."""
    with pytest.raises(BundleRefused, match="no signature"):
        load_bundle(signed, Trust(make_key_pair(tmp_path, "stranger").public))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"verificationMaterial": {}, "dsseEnvelope": {}}'],
    ids=["empty", "no-members", "list", "no-text", "deep", "hollow"],
)
def test_signature_when_it_is_none_then_refused_with_a_sentence(copy, keys, data):
    """Whatever lies in the signature's place ends as a refusal."""
    (copy / SIGNATURE_FILE).write_bytes(data)

    with pytest.raises(BundleRefused, match="no signature"):
        load_bundle(copy, Trust(keys.public))


def test_signature_when_any_piece_of_it_is_lost_then_refused(copy, keys):
    """A signature is taken whole or not at all."""
    whole = (copy / SIGNATURE_FILE).read_bytes()
    for end in range(0, len(whole) - 1, len(whole) // 12):
        (copy / SIGNATURE_FILE).write_bytes(whole[:end])

        with pytest.raises(BundleRefused):
            load_bundle(copy, Trust(keys.public))


def test_key_when_it_is_none_then_told_at_the_start(tmp_path):
    """A wrong or missing key file is a sentence that says how to make a right one."""
    (tmp_path / "key.pem").write_text("no key")

    with pytest.raises(SigningFailed, match="openssl ecparam"):
        refuse_unusable(Trust(tmp_path / "key.pem"))
    with pytest.raises(SigningFailed, match="can't be read"):
        refuse_unusable(Trust(tmp_path / "absent.pem"))
    with pytest.raises(SigningFailed, match="openssl ecparam"):
        sign_manifest(b"{}", tmp_path / "key.pem")
