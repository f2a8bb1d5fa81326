"""A store and the registry on it, for tests of what serves which line while versions come and go."""

import time

import pytest

from service.engines.ort import OrtEngine
from service.errors import (
    LineNotReady,
)
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.stores.directory import DirectoryStore
from tests.factories import make_bundle, make_graph, make_policy, network_of, reseal, write_policy
from tests.servers import wait_until

OPTIONS = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20)


class Shelf:
    """A store, the registry on it, and the engines that it opened."""

    def __init__(self, path):
        self.path = path
        self.telemetry = Telemetry()
        self.engines = []
        self.sizes = {}
        self.registry = None
        self.now = None  # the real time
        self.before_open = lambda _bundle: None
        self.on_run = lambda: None

    def load(self, wanted=None, **options):
        """Load what lies there."""
        store = DirectoryStore(self.path)
        kept = RegistryOptions(**options)
        self.registry = Registry(store, wanted, self._open, OPTIONS, self.telemetry, self._clock, kept)
        self.registry.load()
        return self.registry

    def add(self, version="1", name="demo_line", **options):
        """Write a bundle."""
        return make_bundle(self.path, name, version, **options)

    def add_broken(self, version, name="demo_line"):
        """Write a bundle whose network is another one than the validated one."""
        folder = self.add(version, name)
        (folder / "model.onnx").write_bytes(make_graph(reference=0.5))
        return reseal(folder)

    def add_policy(self, version, network=None, **fields):
        """Write a policy file, and return it."""
        return write_policy(self.path, make_policy(version=version, **fields), network)

    def network(self, version="1"):
        """Return what a policy file names that is written for a version's scores."""
        return network_of(self.path / "demo_line" / version)

    def serving(self, line="demo_line", version=None):
        """Return the version that serves a line."""
        return self.registry.serving(line, version).bundle.manifest.version

    def states(self, line="demo_line"):
        """Return how the versions stand."""
        return {one.version: one.state for one in self.registry.versions(line)}

    def metrics(self):
        """Return the text that a scraper reads."""
        return self.telemetry.exposition()[0].decode()

    def line_states(self):
        """Return how the lines stand."""
        return {status.line: status.state for status in self.registry.statuses()}

    def want(self, line):
        """Bring a frame for a line that is not in memory, and wait until it was tried to load it."""
        with pytest.raises(LineNotReady) as refused:
            self.registry.serving(line, None)
        wait_until(lambda: line not in self.registry._asked_again, "the load")  # of a bundle of this name
        return refused.value

    def _clock(self):
        if self.now is None:
            return time.monotonic()
        self.now += 1e-6  # so that of two the later one can be told
        return self.now

    def _open(self, bundle):
        self.before_open(bundle)
        engine = Watched(bundle, self.sizes.get(bundle.manifest.name, 0), self)
        self.engines.append(engine)
        return engine


class Watched(OrtEngine):
    """A real engine that tells of its runs, notes its end, and says what size it is told to."""

    def __init__(self, bundle, size_bytes, shelf):
        super().__init__(bundle)
        self.shelf = shelf
        self.size_bytes = size_bytes
        self.version = bundle.manifest.version
        self.is_closed = False

    def run(self, frames, line_index):
        """Tell of it, and run."""
        self.shelf.on_run()
        return super().run(frames, line_index)

    def close(self):
        """Note it."""
        self.is_closed = True
        super().close()


def never_a_gap(shelf):
    """Have other lines leave no gap, and return the list of what was waited for one, in seconds."""
    waited = []

    def wait_for_gap(longest_s):
        shelf.now += longest_s
        waited.append(longest_s)
        return False

    shelf.registry._loader._running.wait_for_gap = wait_for_gap
    return waited
