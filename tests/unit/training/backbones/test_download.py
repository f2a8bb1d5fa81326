"""Without a connection a download is refused at once; what was cached needs none."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants

from models.backbones import BackboneUnavailable
from tests.factories import write_files
from training.backbones.download import fetch_where_reachable

_NOBODY = "http://127.0.0.1:9"  # where nothing listens
_NAME = "resnet18.a1_in1k"


def _download(name):
    return {name: torch.ones(2)}


def _cache_of(folder, name):
    revision = f"models--timm--{name}/snapshots/{'a' * 40}"
    write_files(folder, {f"{revision}/model.safetensors": b"weights", f"models--timm--{name}/refs/main": b"a" * 40})
    return folder


@pytest.fixture(autouse=True)
def _connections_are_tried(monkeypatch):
    """Tests are offline by a setting of the hub's library; here connections to this machine are tried."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("cached", [None, "resnet34.a1_in1k"], ids=["nothing", "another backbone"])
def test_download_when_the_hub_cannot_be_reached_then_says_so_without_trying_each_file(tmp_path, cached):
    """The person who waits learns it at once, and timm is not asked, which would go on for a minute."""
    cache = tmp_path / "none" if cached is None else _cache_of(tmp_path, cached)

    with pytest.raises(BackboneUnavailable, match=r"http://127\.0\.0\.1:9 can't be reached \(ConnectError\)"):
        fetch_where_reachable(_NAME, host=_NOBODY, cache=cache, fetch=pytest.fail)


@pytest.mark.parametrize("asked", [_NAME, "resnet18"], ids=["tagged", "without a tag"])
def test_download_when_the_hub_cannot_be_reached_but_was_before_then_timm_finds_what_it_kept(tmp_path, asked):
    """Nobody needs a connection for what lies on the machine."""
    found = fetch_where_reachable(asked, host=_NOBODY, cache=_cache_of(tmp_path, _NAME), fetch=_download)

    assert list(found) == [asked]


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        """Answer as a host that has no page there: it is reached all the same."""
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        """Keep the test's output clean."""


def test_download_when_the_hub_answers_then_timm_downloads(tmp_path):
    """Whatever it answers: what there is to download is timm's question."""
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.handle_request).start()
        host = f"http://127.0.0.1:{server.server_port}"

        found = fetch_where_reachable(_NAME, host=host, cache=tmp_path, fetch=_download)

    assert list(found) == [_NAME]
