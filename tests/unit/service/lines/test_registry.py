"""Promises of the registry: only what was proved on this device answers, and nobody steps back silently."""

import json
import os
import time

import numpy as np
import pytest

from service.contract.bundle import load_bundle
from service.contract.policy import policy_digest
from service.engines.ort import OrtEngine
from service.errors import (
    EngineFailed,
    LineNotCalibrated,
    LineNotReady,
    StoreUnreachable,
    UnknownLine,
    UnknownPolicy,
    UnknownVersion,
)
from service.lines.choices import Choices
from service.lines.ledger import RegistryOptions
from service.lines.loading import BatcherOptions
from service.lines.registry import Registry
from service.observability.telemetry import Telemetry
from service.scheduling.schedule import RunTimes
from service.stores.directory import DirectoryStore
from tests.factories import (
    REFERENCE,
    make_bundle,
    make_graph,
    make_policy,
    make_self_policy,
    network_of,
    reseal,
    write_policy,
)
from tests.fakes import FakeEngine, in_loop
from tests.rights import rights_of_an_ordinary_user

OPTIONS = BatcherOptions(runners=1, max_batch_size=3, max_queue_size=4, stuck_after_s=20)


class Shelf:
    """A store and registries on it, whose runners end with the test."""

    def __init__(self, path):
        self.path = path
        self.store = DirectoryStore(path)
        self.telemetry = Telemetry()
        self.registries = []

    def open(self, wanted=None, open_engine=OrtEngine, **options):
        """Return a registry that has not loaded yet."""
        kept = RegistryOptions(**options)
        registry = Registry(self.store, wanted, open_engine, OPTIONS, self.telemetry, time.monotonic, kept)
        self.registries.append(registry)
        return registry

    def load(self, wanted=None, open_engine=OrtEngine, **options):
        """Return a registry that has loaded."""
        registry = self.open(wanted, open_engine, **options)
        registry.load()
        return registry

    def metrics(self):
        """Return the text that a scraper reads."""
        return self.telemetry.exposition()[0].decode()

    def add_policy(self, line, version, network=None, **fields):
        """Write a policy file of a line."""
        policy = make_policy(**{"version": version} | fields)
        write_policy(self.path, policy, network, line)
        return policy


@pytest.fixture
def shelf(tmp_path):
    """Return an empty store."""
    shelf = Shelf(tmp_path / "store")
    yield shelf
    for registry in shelf.registries:
        registry.close()


def states(registry):
    """Return the state of each line."""
    return {status.line: status.state for status in registry.statuses()}


def test_load_when_bundle_holds_then_line_is_ready_on_its_newest_version(shelf):
    """Versions are numbers: ten is newer than nine; the newest one serves."""
    make_bundle(shelf.path, version="9")
    newest = make_bundle(shelf.path, version="10", policy={"fail_threshold": 0.3})

    registry = shelf.load()

    line, policy = registry.find("demo_line", None, None)
    assert registry.is_ready
    assert states(registry) == {"demo_line": "ready"}
    assert line.bundle.manifest.version == "10"
    assert line.bundle.device == "cpu"
    assert policy.policy.fail_threshold == 0.3
    assert [(one.version, one.state) for one in registry.versions("demo_line")] == [("9", "stored"), ("10", "live")]
    assert newest.name == "10"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda _: None, "The store can't be read: No such file or directory."),
        (lambda path: path.write_text("no directory"), "The store can't be read: Not a directory."),
        (lambda path: path.mkdir(), "No line is loaded; the store may be empty."),
    ],
    ids=["missing", "a file", "empty"],
)
def test_load_when_the_store_is_no_store_then_never_ready_and_says_why(shelf, spoil, sentence):
    """A wrong path is told apart from an empty store, without naming the path to callers."""
    spoil(shelf.path)

    registry = shelf.load()

    assert not registry.is_ready
    assert registry.statuses() == []
    assert registry.why_empty == sentence


def test_load_when_the_volume_has_folders_of_its_own_then_they_are_not_looked_into(shelf):
    """`lost+found` and hidden folders are no bundles; whatever lies in them, lines are served."""
    make_bundle(shelf.path)
    for name in ("lost+found", ".trash", "..data"):
        make_bundle(shelf.path, "other_line").parent.rename(shelf.path / name)

    registry = shelf.load()

    assert registry.is_ready
    assert states(registry) == {"demo_line": "ready"}


def test_load_when_one_folder_can_not_be_read_then_only_its_line_is_refused(shelf):
    """A folder without rights takes down its own line, with a reason, and no other."""
    make_bundle(shelf.path)
    locked = make_bundle(shelf.path, "other_line").parent
    locked.chmod(0)

    with rights_of_an_ordinary_user():
        registry = shelf.load()
    locked.chmod(0o700)

    assert states(registry) == {"demo_line": "ready", "other_line": "refused"}
    assert registry.status("other_line").reason == "Its folder can't be read: Permission denied."


def test_load_when_a_manifest_is_a_pipe_then_refused_and_the_others_are_served(shelf):
    """Nothing in the store can make loading wait for ever."""
    make_bundle(shelf.path)
    manifest = make_bundle(shelf.path, "other_line") / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)

    registry = shelf.load()

    assert states(registry) == {"demo_line": "ready", "other_line": "refused"}


def test_load_when_the_store_can_not_be_asked_then_what_it_brought_before_is_served(shelf):
    """A bucket that is away takes no line down; where it never brought anything, that is the reason given."""

    def refresh(_needed):
        raise StoreUnreachable("The bucket does not answer.")

    shelf.store.refresh = refresh
    empty = shelf.load()
    make_bundle(shelf.path)

    registry = shelf.load()

    assert registry.is_ready
    assert (empty.is_ready, empty.why_empty) == (False, "The bucket does not answer.")


@pytest.mark.parametrize(
    ("chosen", "wanted", "reason"),
    [
        (None, None, "No line is loaded; the store may be empty."),
        (None, {"nobody"}, "There is no bundle of this line in the store."),
        (
            "3",
            None,
            "An administrator chose version 3, which is not in the store; put it back, or activate another one.",
        ),
    ],
    ids=["empty store", "unknown line", "chosen version is gone"],
)
def test_load_when_nothing_is_tried_then_the_log_says_why(shelf, tmp_path, caplog, chosen, wanted, reason):
    """Where the health port speaks one word, the log is all that an operator has."""
    shelf.path.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    if chosen is not None:
        make_bundle(shelf.path)
        Choices(state).choose_version("demo_line", chosen, ())

    shelf.load(wanted and frozenset(wanted), state_directory=state)

    told = [getattr(record, "reason", "") for record in caplog.records if record.levelname == "ERROR"]
    assert told == [reason]


def test_load_when_line_is_live_then_metrics_say_what_serves_it(shelf):
    """`model_info` and the load time are there as soon as the line is."""
    make_bundle(shelf.path)

    registry = shelf.load()

    digest = registry.find("demo_line", None, None).line.bundle.digest
    labels = f'device="cpu",digest="{digest}",line="demo_line",policy="1",version="1"'
    assert f"flawline_model_info{{{labels}}} 1.0" in shelf.metrics()
    assert 'flawline_engine_load_seconds{engine="demo_line"}' in shelf.metrics()
    assert "flawline_golden_failures_total 0.0" in shelf.metrics()


def test_load_when_bundle_serves_several_lines_then_they_share_one_engine(shelf):
    """Each line of a class-conditional bundle has its own index, and all have one engine."""
    make_bundle(shelf.path, "pair", lines=("left", "right"), conditional=True)

    registry = shelf.load()

    left, right = (registry.find(line, None, None).line for line in ("left", "right"))
    assert left.bundle is right.bundle
    assert (left.line_index, right.line_index) == (0, 1)
    assert states(registry) == {"left": "ready", "right": "ready"}


def test_load_when_bundle_serves_several_lines_then_each_has_its_own_policy_and_calibration(shelf):
    """A shared network shares nothing of what turns its maps into verdicts and p-values."""
    folder = make_bundle(
        shelf.path, "pair", lines=("left", "right"), conditional=True, policies={"right": {"fail_threshold": 0.3}}
    )
    shelf.add_policy("left", "strict", fail_threshold=0.15)

    registry = shelf.load()

    bundle = load_bundle(folder)
    found = {line: registry.find(line, None, None) for line in ("left", "right")}
    assert {line: policy.policy.fail_threshold for line, (_, policy) in found.items()} == {"left": 0.2, "right": 0.3}
    assert {line: sorted(live.policies) for line, (live, _) in found.items()} == {
        "left": ["1", "strict"],
        "right": ["1"],
    }
    for line, (live, _) in found.items():
        np.testing.assert_array_equal(live.calibration.scores, bundle.calibrations[line].scores)
    assert not np.array_equal(found["left"].line.calibration.scores, found["right"].line.calibration.scores)


def test_load_when_bundle_serves_several_lines_then_the_proof_tells_the_network_which_line_it_sees(shelf):
    """Each golden frame runs with the index of its own line, or another line's network would be proved."""
    folder = make_bundle(shelf.path, "pair", lines=("left", "right"), conditional=True)
    network = OrtEngine(load_bundle(folder))
    engine = FakeEngine(device="cpu")
    engine.on_run = lambda frames: network.run(frames, np.array(engine.line_indices[-1], np.int64))

    registry = shelf.load(open_engine=lambda _: engine)

    assert states(registry) == {"left": "ready", "right": "ready"}
    assert engine.line_indices[-6:] == [[0]] * 3 + [[1]] * 3


def test_versions_when_the_bundle_of_several_lines_is_refused_then_are_those_of_the_bundle(shelf):
    """Whoever asks why a line is not served sees what lies in the store for it, whatever the bundle is called."""
    make_bundle(shelf.path, "pair", "3", lines=("left", "right"))
    damage_model(make_bundle(shelf.path, "pair", "4", lines=("left", "right")))

    registry = shelf.load()

    assert states(registry) == {"left": "refused", "right": "refused"}
    assert [(one.version, one.state) for one in registry.versions("right")] == [("3", "stored"), ("4", "refused")]


def damage_model(folder):
    """Change a byte of the graph."""
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))


def swap_network(folder):
    """Put another network in, with all digests right."""
    (folder / "model.onnx").write_bytes(make_graph(reference=REFERENCE + 0.05))
    reseal(folder)


def rename_version(folder):
    """Move the bundle to a version that it is not."""
    folder.rename(folder.parent / "2")


def remove_manifest(folder):
    """Take away what says what it is."""
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage_model, "model.onnx is not the file"),
        (swap_network, "golden frame"),
        (rename_version, "another name or version"),
        (remove_manifest, "manifest.json"),
    ],
)
def test_load_when_bundle_does_not_hold_then_line_is_refused_with_the_reason(shelf, harm, reason):
    """A refused line answers no frame, says why, and keeps the service from being ready."""
    harm(make_bundle(shelf.path))

    registry = shelf.load()

    (status,) = registry.statuses()
    assert (status.line, status.state) == ("demo_line", "refused")
    assert reason in status.reason
    assert not registry.is_ready
    with pytest.raises(LineNotReady, match="refused"):
        registry.find("demo_line", None, None)


def test_load_when_golden_frames_differ_then_counts_it(shelf):
    """A network that is not the validated one is counted, so that somebody is told."""
    swap_network(make_bundle(shelf.path))

    shelf.load()

    assert "flawline_golden_failures_total 1.0" in shelf.metrics()


def test_load_when_newest_version_is_refused_then_older_one_does_not_serve(shelf):
    """There is no silent step back to a version that nobody expects."""
    make_bundle(shelf.path, version="1")
    damage_model(make_bundle(shelf.path, version="2"))

    registry = shelf.load()

    assert states(registry) == {"demo_line": "refused"}


def test_load_when_one_bundle_is_refused_then_others_serve_but_nothing_is_ready(shelf):
    """One line's fault neither takes the others with it nor goes unnoticed."""
    make_bundle(shelf.path, "good")
    damage_model(make_bundle(shelf.path, "harmed"))

    registry = shelf.load()

    assert states(registry) == {"good": "ready", "harmed": "refused"}
    assert registry.find("good", None, None)
    assert not registry.is_ready


@pytest.mark.parametrize("error", [EngineFailed("The device is not there."), ValueError("unforeseen")])
def test_load_when_engine_can_not_be_opened_then_line_is_refused(shelf, error):
    """Whatever goes wrong while loading ends in a state, never in a thread that dies silently."""
    make_bundle(shelf.path)

    def open_engine(_):
        raise error

    registry = shelf.load(open_engine=open_engine)

    assert states(registry) == {"demo_line": "refused"}


def test_load_when_it_ends_early_then_the_service_is_not_ready_until_it_was_finished(shelf):
    """Lines that nobody has tried to load are missed, and come by themselves: nobody sends frames to such a pod."""
    for name in ("cap", "plate"):
        make_bundle(shelf.path, name)
    registry = shelf.open()
    looks = registry._catalogue.looks

    def fail(name, version):
        if name == "plate":
            raise ArithmeticError
        return looks(name, version)

    registry._catalogue.looks = fail

    registry.load()
    at_first = (registry.find("cap", None, None).line.name, registry.is_ready)
    with pytest.raises(ArithmeticError):
        registry.try_again()
    still = registry.is_ready
    registry._catalogue.looks = looks
    registry.try_again()

    assert (at_first, still) == (("cap", False), False)
    assert (registry.find("plate", None, None).line.name, registry.is_ready) == ("plate", True)


def test_load_when_two_bundles_claim_a_line_then_the_second_is_refused(shelf):
    """A line is served by one bundle, and nobody guesses which."""
    make_bundle(shelf.path, "first", lines=("shared",))
    make_bundle(shelf.path, "second", lines=("shared", "own"))

    registry = shelf.load()

    assert states(registry) == {"shared": "ready", "own": "refused"}


def test_load_when_lines_are_chosen_then_serves_only_those(shelf):
    """Lines that are not wanted are not loaded, and one that is missing keeps the service from being ready."""
    make_bundle(shelf.path, "wanted")
    make_bundle(shelf.path, "other")

    registry = shelf.load(wanted=frozenset({"wanted", "missing"}))

    assert states(registry) == {"wanted": "ready", "missing": "refused"}
    assert not registry.is_ready
    with pytest.raises(UnknownLine):
        registry.find("other", None, None)


@pytest.mark.parametrize("exists", [True, False])
def test_load_when_store_is_empty_then_never_ready(shelf, exists):
    """An empty registry answers nothing and is not ready."""
    if exists:
        shelf.path.mkdir()

    registry = shelf.load()

    assert not registry.is_ready
    assert registry.statuses() == []


def test_find_when_nothing_is_loaded_yet_then_says_loading(shelf):
    """Before loading ends, no line is unknown: it may still come."""
    make_bundle(shelf.path)

    registry = shelf.open()

    assert not registry.is_ready
    with pytest.raises(LineNotReady) as refusal:
        registry.find("demo_line", None, None)
    assert refusal.value.retry_after_s is not None


def test_load_when_it_goes_on_then_lines_are_loading_until_proven(shelf):
    """A line is listed as loading while its engine is opened, and answers nothing."""
    make_bundle(shelf.path, "pair", lines=("left", "right"))
    seen = []

    def open_engine(bundle):
        seen.append(states(registry))
        return OrtEngine(bundle)

    registry = shelf.open(open_engine=open_engine)
    registry.load()

    assert seen == [{"left": "loading", "right": "loading"}]


def test_load_when_engine_is_opened_then_every_batch_size_is_warmed(shelf):
    """No frame is the first to pay for a batch size."""
    make_bundle(shelf.path)
    engines = []

    def open_engine(bundle):
        engine = OrtEngine(bundle)
        engines.append(Counting(engine))
        return engines[0]

    registry = shelf.load(open_engine=open_engine)

    assert engines[0].sizes[:9] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    run_times: RunTimes = registry.find("demo_line", None, None).line.bundle.batcher._queue.run_times
    assert all(seconds is not None for seconds in run_times.seconds)


class Counting:
    """An engine that notes the size of each batch."""

    def __init__(self, engine):
        self.device, self.provider, self.precision = engine.device, engine.provider, engine.precision
        self.size_bytes = engine.size_bytes
        self.alone = None
        self.sizes = []
        self._engine = engine

    def run(self, frames, line_index):
        """Run and note."""
        self.sizes.append(len(frames))
        return self._engine.run(frames, line_index)


@pytest.mark.parametrize(
    ("line", "bundle_version", "policy_version", "error"),
    [
        ("nobody", None, None, UnknownLine),
        ("demo_line", "7", None, UnknownVersion),
        ("demo_line", None, "7", UnknownPolicy),
    ],
)
def test_find_when_name_is_unknown_then_says_which(shelf, line, bundle_version, policy_version, error):
    """Unknown lines, versions and policies are told apart."""
    make_bundle(shelf.path)
    registry = shelf.load()

    with pytest.raises(error):
        registry.find(line, bundle_version, policy_version)


def test_find_when_a_version_is_stored_and_not_loaded_then_says_how_it_can_be_asked(shelf):
    """Who wants yesterday's model again, as after a restart, reads which one serves and what brings the other back."""
    make_bundle(shelf.path, version="1")
    make_bundle(shelf.path, version="2")
    registry = shelf.load()

    with pytest.raises(UnknownVersion, match=r"served by version 2.*`flawline admin activate`.*server of its own"):
        registry.find("demo_line", "1", None)


def test_find_when_line_has_own_policies_then_offers_them_beside_the_default(shelf):
    """A line's policy is taken by its version; the bundle's own stays the default one."""
    make_bundle(shelf.path)
    strict = shelf.add_policy("demo_line", "strict", review_threshold=0.01, fail_threshold=0.05)

    registry = shelf.load()

    found = registry.find("demo_line", "1", "strict")
    assert found.policy.policy == strict
    assert found.policy.digest == policy_digest(strict)
    assert registry.find("demo_line", None, None).policy.policy.version == "1"
    assert sorted(found.line.policies) == ["1", "strict"]


def test_find_when_policy_has_a_region_of_interest_then_mask_is_ready(shelf):
    """The region of interest is laid on the map's grid once, not for every frame."""
    network = network_of(make_bundle(shelf.path))
    left_half = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
    shelf.add_policy("demo_line", "left", network, region_of_interest=(left_half,))

    inspected = shelf.load().find("demo_line", None, "left").policy.inspected

    assert inspected is not None
    assert inspected.shape == (16, 24)
    assert inspected[:, :12].all()
    assert not inspected[:, 14:].any()


def test_find_when_policy_file_does_not_hold_then_it_is_not_offered(shelf):
    """A policy that is damaged, misnamed or in the default's place is left out; the line goes on."""
    make_bundle(shelf.path)
    shelf.add_policy("demo_line", "1", fail_threshold=9.0)
    folder = shelf.path / "demo_line" / "policies"
    (folder / "broken.json").write_text("{")
    (folder / "misnamed.json").write_text(make_policy(version="other").model_dump_json())
    reversed_thresholds = json.loads(make_policy(version="reversed").model_dump_json()) | {"fail_threshold": 0.0}
    (folder / "reversed.json").write_text(json.dumps(reversed_thresholds))

    registry = shelf.load()

    assert registry.is_ready
    assert list(registry.find("demo_line", None, None).line.policies) == ["1"]
    assert registry.find("demo_line", None, None).policy.policy.fail_threshold == 0.2


@in_loop
async def test_find_when_engine_is_lost_then_line_is_unhealthy_and_service_not_ready(tmp_path):
    """A lost engine turns readiness false at once."""
    shelf = Shelf(tmp_path)
    make_bundle(shelf.path)
    switch = Switched()
    registry = shelf.load(open_engine=switch.open)
    batcher = registry.find("demo_line", None, None).line.bundle.batcher
    switch.is_lost = True

    with pytest.raises(EngineFailed), batcher.place(time.monotonic() + 20, line="demo_line") as place:
        await batcher.submit(place, np.zeros((1, 32, 48, 3), np.uint8), 0)

    assert states(registry) == {"demo_line": "unhealthy"}
    assert not registry.is_ready
    with pytest.raises(LineNotReady, match="unhealthy"):
        registry.find("demo_line", None, None)


class Switched:
    """An engine that can be lost, as a GPU can."""

    device = provider = "fake"
    precision = "fp32"
    size_bytes = 0
    alone = None

    def __init__(self):
        self.is_lost = False

    def open(self, bundle):
        """Open the real one behind."""
        self._engine = OrtEngine(bundle)
        return self

    def run(self, frames, line_index):
        """Run, unless lost."""
        if self.is_lost:
            raise OSError
        return self._engine.run(frames, line_index)


def test_load_when_engine_answers_nonsense_then_golden_frames_refuse_it(shelf):
    """An engine that runs but computes something else never gets live."""
    make_bundle(shelf.path)

    registry = shelf.load(open_engine=lambda _: FakeEngine(map_size=(16, 24)))

    assert states(registry) == {"demo_line": "refused"}


@in_loop
async def test_drain_when_lines_share_an_engine_then_all_stop_admitting(tmp_path):
    """After the drain no line admits a frame."""
    shelf = Shelf(tmp_path)
    make_bundle(shelf.path, "one")
    make_bundle(shelf.path, "two")
    registry = shelf.load()

    await registry.drain()

    for name in ("one", "two"):
        batcher = registry.find(name, None, None).line.bundle.batcher
        with pytest.raises(LineNotReady), batcher.place(time.monotonic() + 20, line="demo_line"):
            pass
    registry.close()


def test_find_when_the_line_is_not_calibrated_then_says_how_to_calibrate_it_and_that_it_stands_there(shelf):
    """A line without good parts is proved and ready, gives no verdict, and both places say why."""
    make_bundle(shelf.path, calibrated=False)

    registry = shelf.load()

    with pytest.raises(LineNotCalibrated, match="flawline calibrate") as refused:
        registry.find("demo_line", None, None)
    assert refused.value.code == "line_not_calibrated"
    assert states(registry) == {"demo_line": "ready"}
    assert registry.status("demo_line").reason == refused.value.sentence


def test_find_when_a_policy_file_says_self_then_the_uncalibrated_line_answers_by_it_alone(shelf):
    """Where the policy file says it, a verdict without good parts is allowed; the default policy still gives none."""
    make_bundle(shelf.path, calibrated=False)
    own = make_self_policy(version="by_itself")
    shelf.add_policy(
        "demo_line", "by_itself", network_of(shelf.path / "demo_line" / "1"), **own.model_dump(exclude={"version"})
    )

    registry = shelf.load()

    assert registry.find("demo_line", None, "by_itself").policy.policy == own
    with pytest.raises(LineNotCalibrated):
        registry.find("demo_line", None, None)
