"""Promises of changes that meet: what takes long keeps nobody waiting, and undoes nothing that was wanted meanwhile."""

import threading
import time

import pytest

from service.engines.ort import OrtEngine
from service.errors import LineLoading, UnknownVersion
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.stores.directory import DirectoryStore
from service.threads import Turns, begin
from tests.factories import make_bundle
from tests.servers import wait_until

DRIVEN = BatcherOptions(runners=1, max_batch_size=1, max_queue_size=4, stuck_after_s=20)
AT_ONCE_S = 10.0


class Gate:
    """Something that a thread comes to and may be held at.

    Attributes:
        is_reached: set by whoever comes.
    """

    def __init__(self):
        self.is_reached = threading.Event()
        self._is_open = threading.Event()

    def pass_through(self, *_):
        """Wait until it is open, whatever is asked."""
        self.is_reached.set()
        assert self._is_open.wait(30)

    def open(self):
        """Let everybody through."""
        self._is_open.set()


class Plant:
    """A store that can hang, engines that can take long to open, and the registry on them."""

    def __init__(self, folder, **options):
        self.path = folder / "store"
        self.store = DirectoryStore(self.path)
        self.opened = []
        self.engines = []
        self.gates = {}  # by name and version of what is opened
        self.options = options
        self.registry = None

    def add(self, name, version="1"):
        """Write a bundle."""
        return make_bundle(self.path, name, version)

    def load(self):
        """Load what lies there."""
        options = RegistryOptions(**self.options)
        self.registry = Registry(self.store, None, self._open, DRIVEN, Telemetry(), time.monotonic, options)
        self.registry.load()
        return self.registry

    def serving(self, line):
        """Return the version that serves a line."""
        return self.registry.serving(line, None).bundle.manifest.version

    def hold_store(self):
        """Let the store hang from now on, and return what opens it again."""
        gate = Gate()
        self.store.refresh = gate.pass_through
        return gate

    def hold(self, name, version):
        """Let opening a version take long, and return what ends that."""
        self.gates[name, version] = gate = Gate()
        return gate

    def _open(self, bundle):
        key = bundle.manifest.name, bundle.manifest.version
        self.opened.append(key)
        if key in self.gates:
            self.gates[key].pass_through()
        engine = OrtEngine(bundle)
        self.engines.append((key, engine))
        return engine


@pytest.fixture
def plant(tmp_path):
    """Return a plant with version 2 of a line, and version 1 kept."""
    plant = Plant(tmp_path, state_directory=tmp_path)
    plant.add("cap")
    plant.load()
    plant.add("cap", "2")
    plant.registry.rescan()
    yield plant
    plant.registry.close()


def test_roll_back_when_the_store_hangs_then_it_is_done_at_once(plant):
    """Whoever asks the store holds up nobody who wants a version that is in memory, nor a policy or a line gone."""
    hanging = plant.hold_store()
    looking = begin(plant.registry.rescan, name="rescan")
    assert hanging.is_reached.wait(AT_ONCE_S)

    before = begin(lambda: plant.registry.roll_back("cap"), name="back").result(AT_ONCE_S)
    begin(lambda: plant.registry.activate_policy("cap", "1"), name="policy").result(AT_ONCE_S)
    begin(lambda: plant.registry.activate("cap", "2"), name="activate").result(AT_ONCE_S)
    again = begin(lambda: plant.registry.roll_back("cap"), name="back").result(AT_ONCE_S)
    begin(lambda: plant.registry.unload_line("cap"), name="unload").result(AT_ONCE_S)
    is_hanging = not looking.done()
    hanging.open()

    assert (before, again, is_hanging) == ("1", "1", True)
    assert looking.result(AT_ONCE_S).activated == ()
    assert plant.registry.status("cap").state == "unloaded"


def test_memory_when_the_store_hangs_then_a_line_comes_back_all_the_same(tmp_path):
    """A line that made room for others lies on this machine, and needs no store that is elsewhere."""
    plant = Plant(tmp_path)
    size = max((plant.add(name) / "model.onnx").stat().st_size for name in ("cap", "lid"))
    plant.options = {"budget_bytes": 3 * size // 2}
    registry = plant.load()
    hanging = plant.hold_store()
    looking = begin(registry.rescan, name="rescan")
    assert hanging.is_reached.wait(AT_ONCE_S)

    with pytest.raises(LineLoading):
        registry.serving("cap", None)
    wait_until(lambda: registry.status("cap").state == "ready", "the line")
    is_hanging = not looking.done()
    hanging.open()
    looking.result(AT_ONCE_S)
    registry.close()

    assert is_hanging


def test_roll_back_when_a_newer_version_is_being_loaded_then_that_one_does_not_become_live(plant):
    """A look at the store decided on the newer one before; who steps back meanwhile must not be undone by that."""
    plant.add("cap", "3")
    slow = plant.hold("cap", "3")
    looking = begin(plant.registry.rescan, name="rescan")
    assert slow.is_reached.wait(AT_ONCE_S)

    begin(lambda: plant.registry.roll_back("cap"), name="back").result(AT_ONCE_S)
    slow.open()
    found = looking.result(AT_ONCE_S)

    assert (found.activated, dict(found.refused)) == ((), {})
    assert plant.serving("cap") == "1"
    assert {one.version: one.state for one in plant.registry.versions("cap")}["3"] == "stored"
    assert [engine._session for key, engine in plant.engines if key == ("cap", "3")] == [None]  # closed
    assert plant.registry.rescan().activated == ()
    plant.registry.close()
    assert plant.load().serving("cap", None).bundle.manifest.version == "1"


def test_activate_when_another_version_is_activated_while_it_loads_then_the_last_word_counts(plant):
    """Of two administrators the one whose version is there last has the last word, and both are told the truth."""
    plant.add("cap", "3")
    slow = plant.hold("cap", "3")
    first = begin(lambda: plant.registry.activate("cap", "3"), name="activate")
    assert slow.is_reached.wait(AT_ONCE_S)

    begin(lambda: plant.registry.activate("cap", "1"), name="activate").result(AT_ONCE_S)
    meanwhile = plant.serving("cap")
    slow.open()
    first.result(AT_ONCE_S)

    assert (meanwhile, plant.serving("cap")) == ("1", "3")


def test_activate_when_the_version_goes_while_it_loads_then_it_does_not_become_live(plant):
    """What is chosen is chosen again once it is loaded; where that fails, nothing has changed and nothing is left."""
    folder = plant.add("cap", "3")
    slow = plant.hold("cap", "3")
    activating = begin(lambda: plant.registry.activate("cap", "3"), name="activate")
    assert slow.is_reached.wait(AT_ONCE_S)

    folder.rename(folder.with_name(".3"))
    slow.open()

    with pytest.raises(UnknownVersion):
        activating.result(AT_ONCE_S)
    assert plant.serving("cap") == "2"
    assert [engine._session for key, engine in plant.engines if key == ("cap", "3")] == [None]  # closed


def test_unload_when_a_newer_version_is_being_loaded_then_the_line_stays_out(plant):
    """Nobody is served by what came to an end after the line was taken out."""
    plant.add("cap", "3")
    slow = plant.hold("cap", "3")
    looking = begin(plant.registry.rescan, name="rescan")
    assert slow.is_reached.wait(AT_ONCE_S)

    begin(lambda: plant.registry.unload_line("cap"), name="unload").result(AT_ONCE_S)
    slow.open()

    assert looking.result(AT_ONCE_S).activated == ()
    assert plant.registry.status("cap").state == "unloaded"


def test_roll_back_when_a_look_loads_many_versions_then_it_comes_next(tmp_path):
    """A version that has to be loaded again waits for the one that is being loaded, and for no other."""
    plant = Plant(tmp_path, keeps_previous=False)
    for name in ("cap", "lid", "rim"):
        plant.add(name)
    plant.add("rim", "2")
    registry = plant.load()
    plant.add("cap", "2")
    plant.add("lid", "2")
    slow = plant.hold("cap", "2")
    plant.opened.clear()
    looking = begin(registry.rescan, name="rescan")
    assert slow.is_reached.wait(AT_ONCE_S)
    stepping_back = begin(lambda: registry.roll_back("rim"), name="back")
    wait_until(lambda: registry._loading._urgent == 1, "the roll-back")

    slow.open()

    assert stepping_back.result(AT_ONCE_S) == "1"
    assert len(looking.result(AT_ONCE_S).activated) == 2
    assert plant.opened == [("cap", "2"), ("rim", "1"), ("lid", "2")]
    registry.close()


def test_load_when_a_line_is_taken_out_at_the_start_then_the_others_go_on(tmp_path):
    """Changes come between two versions from the start, and a version that was chosen by then is not loaded over."""
    plant = Plant(tmp_path)
    for name in ("cap", "lid"):
        plant.add(name)
    plant.add("lid", "2")
    slow = plant.hold("cap", "1")
    loading = begin(plant.load, name="load")
    assert slow.is_reached.wait(AT_ONCE_S)

    stepping_back = begin(lambda: plant.registry.activate("lid", "1"), name="activate")
    wait_until(lambda: plant.registry._loading._urgent == 1, "the activation")
    slow.open()
    stepping_back.result(AT_ONCE_S)
    registry = loading.result(AT_ONCE_S)

    assert plant.opened == [("cap", "1"), ("lid", "1")]
    assert (plant.serving("lid"), registry.is_ready) == ("1", True)
    registry.close()


def test_turns_when_an_urgent_one_waits_then_it_comes_before_those_that_waited_longer():
    """What is waited for comes next, and one at a time."""
    turns, order = Turns(), []

    def take(name, *, is_urgent):
        with turns.take(is_urgent=is_urgent):
            order.append(name)

    with turns.take(is_urgent=False):
        later = begin(lambda: take("later", is_urgent=False), name="later")
        wait_until(lambda: len(turns._free._waiters) == 1, "the first one")
        urgent = begin(lambda: take("urgent", is_urgent=True), name="urgent")
        wait_until(lambda: turns._urgent == 1, "the urgent one")
        waited = list(order)
    later.result(AT_ONCE_S)
    urgent.result(AT_ONCE_S)

    assert (waited, order) == ([], ["urgent", "later"])
