"""A real server over TLS: who has no certificate of the plant's authority gets no connection, and probes still work."""

import shutil
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trustme

from service.ports.tls import ServerCertificate, TlsInvalid
from tests.factories import encode, make_bundle, make_frame
from tests.rights import rights_of_an_ordinary_user
from tests.servers import PATIENCE_S, ServerProcess, wait_until


class _Plant(NamedTuple):
    """An authority and files of its certificates."""

    authority: trustme.CA
    folder: Path

    def settings(self) -> dict[str, str]:
        return {
            "FLAWLINE_TLS_CERTIFICATE": str(self.folder / "server.pem"),
            "FLAWLINE_TLS_KEY": str(self.folder / "server.key"),
            "FLAWLINE_TLS_CLIENT_CA": str(self.folder / "ca.pem"),
            "FLAWLINE_HEALTH_PORT": "0",
        }

    def context(self, client: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.folder / "ca.pem")
        if client is not None:
            context.load_cert_chain(self.folder / client)
        return context


def make_plant(folder: Path) -> _Plant:
    """Write the files of an authority: its own, a server's, a client's, and a client's of another authority."""
    authority, stranger = trustme.CA(), trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server.private_key_pem.write_to_path(folder / "server.key")
    for index, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(folder / "server.pem", append=index > 0)
    authority.issue_cert("camera").private_key_and_cert_chain_pem.write_to_path(folder / "camera.pem")
    stranger.issue_cert("camera").private_key_and_cert_chain_pem.write_to_path(folder / "stranger.pem")
    return _Plant(authority, folder)


@pytest.fixture(scope="module")
def plant(tmp_path_factory) -> _Plant:
    """An authority; its files are not to be changed."""
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, plant) -> Iterator[ServerProcess]:
    """A server that asks callers for a certificate, ready."""
    store = tmp_path_factory.mktemp("store")
    make_bundle(store)
    with ServerProcess(store, plant.settings()) as process:
        wait_until(lambda: _health(process, "ready").status_code == 200, "readiness")
        yield process


def _health(process: ServerProcess, question: str) -> httpx.Response:
    """Ask the plain health port."""
    wait_until(lambda: any(event["message"] == "health listening" for event in process.events()), "the health port")
    port = next(event["port"] for event in process.events() if event["message"] == "health listening")
    return httpx.get(f"http://127.0.0.1:{port}/healthz/{question}", timeout=PATIENCE_S)


def _ask(process: ServerProcess, context: ssl.SSLContext | bool) -> httpx.Response:
    with httpx.Client(base_url=process.url.replace("http:", "https:"), verify=context, timeout=PATIENCE_S) as client:
        return client.post(
            "/v1/lines/demo_line/inspect", content=encode(make_frame()), headers={"Content-Type": "image/png"}
        )


def test_caller_when_its_certificate_is_of_the_authority_then_its_frame_is_judged(server, plant):
    """Frames travel over TLS as they do without."""
    answer = _ask(server, plant.context("camera.pem"))

    assert answer.json()["verdict"] == "PASS"


@pytest.mark.parametrize("client", [None, "stranger.pem"])
def test_caller_when_it_has_no_certificate_of_the_authority_then_gets_no_answer(server, plant, client):
    """The handshake fails; no request reaches the service."""
    with pytest.raises((httpx.TransportError, ssl.SSLError)):
        _ask(server, plant.context(client))


def test_caller_when_it_speaks_plain_http_then_gets_no_answer(server):
    """The port of the frames speaks TLS only."""
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/healthz/live", timeout=PATIENCE_S)


def test_probe_when_it_asks_the_health_port_then_hears_alive_and_ready_and_nothing_else(server):
    """Kubernetes' own probes have no certificate to show; lines, reasons and metrics are not for them."""
    assert _health(server, "live").json() == {"status": "live"}
    assert _health(server, "ready").json() == {"status": "ready"}
    assert _health(server, "../metrics").status_code == 404
    assert _health(server, "../v1/lines").status_code == 404


def test_scraper_when_it_reads_metrics_then_hears_when_the_certificate_ends(server, plant):
    """An alert can fire weeks before cameras are turned away."""
    with httpx.Client(verify=plant.context("camera.pem"), timeout=PATIENCE_S) as client:
        text = client.get(f"{server.url.replace('http:', 'https:')}/metrics").text

    (line,) = [line for line in text.splitlines() if line.startswith("flawline_certificate_expiry_timestamp_seconds ")]
    assert float(line.split()[1]) > datetime.now(UTC).timestamp()


def test_certificate_when_renewed_then_the_new_one_is_shown_and_a_broken_one_is_not(tmp_path, plant):
    """Renewals are taken without a restart; a wrong one leaves the certificate before it."""
    for name in ("ca.pem", "server.pem", "server.key"):
        shutil.copy(plant.folder / name, tmp_path)
    certificate = ServerCertificate(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    before = certificate.expires_at()
    renewed = plant.authority.issue_cert("127.0.0.1", not_after=datetime(2035, 1, 1, tzinfo=UTC))
    renewed.private_key_pem.write_to_path(tmp_path / "server.key")
    certificate.renew()  # half of the renewal: a key without its certificate
    assert certificate.expires_at() == before

    renewed.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    certificate.renew()

    assert certificate.expires_at() == datetime(2035, 1, 1, tzinfo=UTC).timestamp()


def test_certificate_when_it_could_not_be_read_for_a_moment_then_it_is_shown_as_soon_as_it_can(tmp_path, plant):
    """A disk that failed once must not keep a certificate that ends until somebody writes the new one again."""
    for name in ("server.pem", "server.key"):
        shutil.copy(plant.folder / name, tmp_path)
    certificate = ServerCertificate(tmp_path / "server.pem", tmp_path / "server.key", None)
    renewed = plant.authority.issue_cert("127.0.0.1", not_after=datetime(2035, 1, 1, tzinfo=UTC))
    renewed.private_key_pem.write_to_path(tmp_path / "server.key")
    renewed.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    (tmp_path / "server.key").chmod(0)
    with rights_of_an_ordinary_user():
        certificate.renew()
    (tmp_path / "server.key").chmod(0o600)

    certificate.renew()

    assert certificate.expires_at() == datetime(2035, 1, 1, tzinfo=UTC).timestamp()


def test_certificate_when_its_key_is_anothers_then_the_start_is_refused(tmp_path, plant):
    """A wrong pair of files is told before the first camera calls."""
    plant.authority.issue_cert("another").private_key_pem.write_to_path(tmp_path / "another.key")

    with pytest.raises(TlsInvalid, match=r"another\.key"):
        ServerCertificate(plant.folder / "server.pem", tmp_path / "another.key", None)
