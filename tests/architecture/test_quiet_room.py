"""Promises of the room in which tests run (`tests/conftest.py`), and of what they share (`tests/one_export.py`)."""

import os
import random
import socket

import numpy as np
import pytest
import torch

from tests import one_export, run_folder
from tests.tiny_detectors import make_detector


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid", "2001:db8::1"])
def test_connecting_when_the_host_is_not_this_machine_is_refused(host):
    """A test that reaches for the network fails at once, by name or by address."""
    with pytest.raises(RuntimeError, match="stay on this machine"):
        socket.create_connection((host, 80), timeout=1)


def test_connecting_when_the_host_is_loopback_is_allowed():
    """Real processes on this machine can still be spoken to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            peer = client.getpeername()

        assert peer == server.getsockname()


def test_environment_when_tests_run_holds_no_settings_of_ours():
    """A developer's own settings change no test."""
    kept = {name for name in os.environ if name.startswith("FLAWLINE_")}

    assert kept <= {
        "FLAWLINE_CHECKOV",
        "FLAWLINE_GPU_WHEELS",
        "FLAWLINE_GRAFANA_TYPES",
        "FLAWLINE_SERVICE_PYTHON",
        "FLAWLINE_SHARED",
    }


@pytest.mark.parametrize("_time", [1, 2])
def test_seeds_when_a_test_starts_are_the_same(_time):
    """Libraries that read global random state give every test the same numbers, in whatever order tests run."""
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002, S311 - the very state

    assert drawn == (0.8444218515250481, 0.5488135039273248, 0.49625658988952637)


def test_export_when_a_network_differs_in_one_number_or_setting_then_is_not_taken_from_an_equal_one(monkeypatch):
    """Runs get the graph of their own network, though one of equal networks is exported for all."""
    exported = []
    monkeypatch.setattr(one_export, "_kept", {})
    monkeypatch.setattr(run_folder, "folder", None)
    monkeypatch.setattr(one_export, "export_graph", lambda detector: exported.append(detector) or b"graph")
    # PNPT has a hook, which torch numbers through the whole process.
    first, equal, fitted, set_otherwise = (make_detector("pnpt") for _ in range(4))
    with torch.no_grad():
        next(parameter for parameter in fitted.parameters() if parameter.requires_grad).flatten()[0] += 1e-6
    set_otherwise.image_size = (64, 32)

    for detector in (first, equal, fitted, set_otherwise):
        one_export.export_once(detector)

    assert exported == [first, fitted, set_otherwise]


def test_export_when_another_process_has_made_it_then_is_taken_from_there_unless_it_is_wanted_anew(
    monkeypatch, tmp_path
):
    """Two processes of one run of the tests export an equal network once, and a test that repeats an export gets it."""
    exported = []
    monkeypatch.setattr(one_export, "export_graph", lambda detector: exported.append(detector) or b"graph")
    monkeypatch.setattr(run_folder, "folder", tmp_path)
    for _process in range(2):
        monkeypatch.setattr(one_export, "_kept", {})
        assert one_export.export_once(make_detector("pnpt")) == b"graph"
    assert len(exported) == 1

    one_export.forget_exports()
    one_export.export_once(make_detector("pnpt"))

    assert len(exported) == 2
