"""Promises of the room in which tests run (`tests/conftest.py`)."""

import os
import random
import socket

import numpy as np
import pytest


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
    drawn = random.random(), float(np.random.rand())  # noqa: NPY002, S311 - the very state that is promised

    assert drawn == (0.8444218515250481, 0.5488135039273248)
