"""The quiet room in which every test runs: no network, no settings from outside, fixed seeds, one thread of torch.

A test's marker follows from its folder. Order is random (pytest-randomly) and files are spread over processes
(pytest-xdist), so nothing here keeps state from one test to the next. Only folders have an order: see `_LONGEST_FIRST`.
"""

import gc
import ipaddress
import logging
import os
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests import run_folder

_ROOT = Path(__file__).resolve().parent
_KINDS = {
    "architecture": "what may import what, and what must be written down",
    "benchmarks": "measures, never asserts; run on demand",
    "e2e": "a real process with a real bundle",
    "integration": "the application over ASGI with a fake engine",
    "parity": "torch, exported graph and served verdict agree",
    "unit": "one file of the sources",
}
# Files go to whoever is free (`make test`); were a long one among the last, one process would wait for the other's end.
_LONGEST_FIRST = ("parity", "e2e", "unit", "integration", "architecture")
# Where tests look for material, a second interpreter and a program that lives by itself; all other variables of ours
# would change the service.
_KEPT_VARIABLES = frozenset(
    {
        "FLAWLINE_CHECKOV",
        "FLAWLINE_GPU_WHEELS",
        "FLAWLINE_GRAFANA_TYPES",
        "FLAWLINE_PARITY_SEED",
        "FLAWLINE_SHARED",
        "FLAWLINE_SERVICE_PYTHON",
    }
)
_CONNECTING = frozenset({"socket.connect", "socket.sendto"})

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as `flawline` does, before anything imports the runtime
sys.modules.setdefault("openvino_telemetry", None)  # as the engine does; reporting wants the internet

# The same examples on every run and machine: a failing change is the change's fault. Slow machines are no failure.
settings.register_profile(
    "flawline",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flawline")


class NetworkRefused(RuntimeError):
    """A test tried to leave this machine."""


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, close the network and empty the environment of our settings."""
    for kind, meaning in _KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning}; follows from the folder")
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False  # order stays random; seeds are ours, see `_quiet_room`
    for name in [name for name in os.environ if name.startswith("FLAWLINE_") and name not in _KEPT_VARIABLES]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"  # timm then says what is missing, rather than waiting for a network
    sys.addaudithook(_refuse_network)
    gc.disable()  # collecting tests imports everything, and all of that stays
    # A service that has loaded a bundle looks through all objects once; here these are torch's as well, each time.
    gc.unfreeze = _stay_frozen


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of the garbage collector's rounds; exports and fits allocate by the million."""
    _set_aside()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()
    _open_loggers_of_torch()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Likewise what a file of tests leaves behind: each full round of a service under test would look at all of it."""
    if nextitem is None or nextitem.path != item.path:
        _set_aside()


def _set_aside() -> None:
    gc.collect()
    gc.freeze()


def _stay_frozen() -> None:
    """Leave alone what was set aside."""


def _open_loggers_of_torch() -> None:
    """Let torch's loggers hand their records on: pytest visits each of the forty that don't a dozen times a test."""
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.partition(".")[0] == "torch":
            logger.propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the marker of its folder, and put folders of long tests first; within a folder order is random."""
    for item in items:
        kind = _kind_of(item)
        if kind in _KINDS:
            item.add_marker(kind)
    places = {kind: place for place, kind in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(_kind_of(item), len(places)))


def _kind_of(item: pytest.Item) -> str:
    return _folder_of(item.path)


@cache
def _folder_of(file: Path) -> str:
    return file.relative_to(_ROOT).parts[0] if file.is_relative_to(_ROOT) else ""


@pytest.fixture(autouse=True)
def _quiet_room() -> None:
    """Fix the seeds and threads that libraries keep for the whole process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries may still read the old global state
    torch = sys.modules.get("torch")
    if torch is not None:
        # `torch.manual_seed` also keeps the whole stack for each kind of device that is not in use, twice the rest.
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _shared_by_all_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Say where the processes of this run find what another one has made."""
    own = tmp_path_factory.getbasetemp()
    run_folder.folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _refuse_network(event: str, arguments: Sequence[object]) -> None:
    if not event.startswith("socket."):  # as nearly all; also the last ones, when our names are gone already
        return
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in _CONNECTING:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a socket of this machine
    else:
        return
    if not _is_loopback(host):
        raise NetworkRefused(f"Tests stay on this machine, but one asked for {host!r}.")


def _is_loopback(host: object) -> bool:
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False
