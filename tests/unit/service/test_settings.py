"""Promises of the settings: what is set is taken, and what can't be meant stops the start with a sentence."""

import re
from pathlib import Path

import pytest

from service import settings as settings_module
from service.contract.frames import FRAME_FORMATS
from service.settings import (
    OTHER_VARIABLES,
    Settings,
    SettingsInvalid,
    describe,
    read_settings,
    usable_cpus,
    usable_memory_bytes,
    variable_of,
)


def test_settings_when_nothing_is_set_then_serve_safely():
    """Without any variable, the service listens on this machine only, one frame a run, with bounds."""
    settings = read_settings()

    assert (settings.host, settings.max_batch_size, settings.lines, settings.keys_file) == ("127.0.0.1", 1, None, None)
    assert settings.frame_limits.formats == FRAME_FORMATS - {"WEBP"}
    assert (settings.runners_per_engine, settings.decode_threads) == (usable_cpus(), 0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("STORE_DIRECTORY", "/data/store", Path("/data/store")),
        ("LINES", "screws, bottles", frozenset({"screws", "bottles"})),
        ("FORMATS", "JPEG,PNG", frozenset({"JPEG", "PNG"})),
        ("FORMATS", "BMP,JPEG,PNG,TIFF,WEBP", FRAME_FORMATS),
        ("MAX_PIXELS", "1000", 1000),
        ("DEFAULT_DEADLINE_S", "0.25", 0.25),
        ("LOG_LEVEL", "warning", "WARNING"),
        ("PORT", "", 8000),
        ("RUNNERS", "3", 3),
        ("PINNED_LINES", "screws, bottles", frozenset({"screws", "bottles"})),
    ],
)
def test_settings_when_a_variable_is_set_then_is_taken(monkeypatch, name, text, value):
    """Each variable becomes the setting of its name; an empty one counts as absent."""
    monkeypatch.setenv(f"FLAWLINE_{name}", text)

    settings = read_settings()

    assert getattr(settings, name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("PORT", "70000", r"FLAWLINE_PORT: .*65535.* A right value is 8000\."),
        ("PORT", "tcp://10.0.0.1:8000", "enableServiceLinks"),
        ("MAX_PIXELS", "many", "FLAWLINE_MAX_PIXELS: .*integer"),
        ("MAX_BATCH_SIZE", "0", "FLAWLINE_MAX_BATCH_SIZE"),
        ("FORMATS", "GIF", "choose from BMP,JPEG"),
        ("LINES", ",", "name at least one line"),
        ("LINES", "../etc", "FLAWLINE_LINES"),
        ("DEVICE", "tpu", "FLAWLINE_DEVICE"),
        ("DEFAULT_DEADLINE_S", "11", "FLAWLINE_DEFAULT_DEADLINE_S must not be above FLAWLINE_MAX_"),
        ("DRAIN_TIMEOUT_S", "5", "FLAWLINE_DRAIN_TIMEOUT_S must not be below"),
        ("ADMIN_PORT", "8001", "FLAWLINE_ADMIN_PORT needs FLAWLINE_KEYS_FILE"),
        ("HEALTH_PORT", "8000", "FLAWLINE_HEALTH_PORT must be another one than FLAWLINE_PORT"),
        ("KEY_FILE", "/keys.json", r"did you mean FLAWLINE_KEYS_FILE\?"),
        ("KEYS", "/keys/keys.json", r"did you mean FLAWLINE_KEYS_FILE\?"),
        ("REQUIRE_KEYS", "true", r"did you mean FLAWLINE_KEYS_FILE\?"),
        ("TLS_CERT", "/tls.pem", r"did you mean FLAWLINE_TLS_CERTIFICATE\?"),
        ("GOLDEN", "off", r"did you mean FLAWLINE_GOLDEN_EVERY_S\?"),
        ("DEADLINE_MS", "500", r"did you mean FLAWLINE_DEFAULT_DEADLINE_S\?"),
        ("ZZZ", "1", "FLAWLINE_ZZZ is no setting; `flawline settings` lists them all"),
    ],
)
def test_settings_when_a_value_can_not_be_meant_then_stop_with_one_sentence(monkeypatch, name, text, sentence):
    """The sentence names the variable; a misspelt name is no silent default."""
    monkeypatch.setenv(f"FLAWLINE_{name}", text)

    with pytest.raises(SettingsInvalid, match=sentence):
        read_settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT_HTTP", "80"),
        ("PORT_80_TCP_ADDR", "10.0.0.1"),
        ("PREDICTOR_PORT", "tcp://10.0.0.1:80"),
        ("PREDICTOR_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("PREDICTOR_SERVICE_PORT", "80"),
        ("CLIENT_URL", "http://localhost:8000"),
        ("WEIGHTS", "carry"),
    ],
)
def test_settings_when_a_variable_is_somebody_elses_then_ignore_it(monkeypatch, name, text):
    """What Kubernetes sets for Services called flawline, or another part of the product reads, is no misspelt one."""
    monkeypatch.setenv(f"FLAWLINE_{name}", text)

    assert read_settings() == Settings()


def test_other_variables_when_the_sources_are_read_then_each_is_there_and_none_is_missing():
    """Who reads a new variable adds it to the one list, or the service would not start where it is set."""
    root = Path(__file__).resolve().parents[3]
    files = [*root.glob("service/**/*.py"), *root.glob("training/**/*.py"), *root.glob("tests/**/*.py")]
    ours = {variable_of(name) for name in Settings.model_fields}
    named = {
        name
        for file in files
        if file != Path(__file__)
        for name in re.findall(
            r"(?:envvar=|environ\W{1,6}(?:get\(|pop\()?|getenv\()\"(FLAWLINE_\w+)", file.read_text("utf-8")
        )
    }

    assert named - ours == OTHER_VARIABLES


def test_meanings_when_read_then_every_setting_has_one():
    """What `flawline settings` prints is what the settings themselves say."""
    assert list(describe()) != []
    assert set(describe()) == set(Settings.model_fields)
    assert describe()["max_queue_size"].startswith("frames that one engine accepts")


def test_settings_when_built_then_can_not_be_changed():
    """A setting holds for the life of the process."""
    settings = Settings()

    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # that is the point


def test_runners_when_device_is_a_gpu_then_one():
    """One runner drives a GPU unless more are asked for."""
    assert Settings(device="cuda").runners_per_engine == 1
    assert Settings(device="cuda", runners=2).runners_per_engine == 2


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param({}, None, id="no control groups"),
        pytest.param({"cpu.max": "max 100000\n"}, None, id="no quota"),
        pytest.param({"cpu.max": "50000 100000\n"}, 1, id="half a CPU"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, id="v1, no quota"),
        pytest.param({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1, id="v1, one CPU"),
    ],
)
def test_usable_cpus_when_container_has_a_quota_then_counts_it(tmp_path, files, limit):
    """A pod with one CPU on a large node gets one runner, not one for each CPU of the node."""
    import os

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert usable_cpus(tmp_path) == (limit or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param({}, None, id="no control groups"),
        pytest.param({"memory.max": "max\n"}, None, id="v2, no limit"),
        pytest.param({"memory.max": "1048576\n"}, 2**20, id="v2, a MiB"),
        pytest.param({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None, id="v1, no limit"),
        pytest.param({"memory/memory.limit_in_bytes": "1048576\n"}, 2**20, id="v1, a MiB"),
    ],
)
def test_usable_memory_when_container_has_a_limit_then_counts_it(tmp_path, files, limit):
    """A pod's bodies take a part of the pod's memory, not of the node's."""
    import os

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert usable_memory_bytes(tmp_path) == (limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@pytest.mark.parametrize(
    ("limit", "given", "budget"),
    [
        # 384 MiB for the process, a quarter for bodies, 256 MiB for heatmaps.
        (2 * 2**30, {}, 896 * 2**20),
        (2**29, {}, 2**27),
        (None, {}, None),
        (2 * 2**30, {"memory_budget_bytes": 0}, None),
        (2 * 2**30, {"memory_budget_bytes": 2**20}, 2**20),
        (2 * 2**30, {"device": "cuda"}, None),
        (2 * 2**30, {"max_heatmap_bytes_kept": 0}, 1152 * 2**20),
    ],
)
def test_engines_when_the_container_has_a_limit_then_take_what_it_leaves(monkeypatch, limit, given, budget):
    """Nobody has to say it for a pod not to be killed for its memory; whoever does is heard."""
    monkeypatch.setattr(settings_module, "memory_limit_bytes", lambda *_: limit)

    assert Settings(**given).engine_budget_bytes == budget


def test_bodies_when_nothing_is_said_of_their_memory_then_two_of_the_largest_fit():
    """However small the machine is, the largest frame is taken, and another one's beside it."""
    settings = Settings(max_body_bytes=2**30)

    assert settings.body_budget_bytes >= 2**31
    assert Settings(max_body_bytes=2**20, max_body_bytes_held=2**20).body_budget_bytes == 2**20
    with pytest.raises(ValueError, match="max_body_bytes_held"):
        Settings(max_body_bytes=2**20, max_body_bytes_held=2**20 - 1)


def test_connections_when_nothing_is_said_then_half_of_the_files_or_a_few_thousand():
    """What else needs files finds some, and more than a process may have are refused at the start."""
    assert Settings().connections(files=1024) == 512
    assert Settings().connections(files=2**20) == 4096
    assert Settings(max_connections=512).connections(files=1024) == 512
    with pytest.raises(SettingsInvalid, match="FLAWLINE_MAX_CONNECTIONS: 513 connections need twice as many"):
        Settings(max_connections=513).connections(files=1024)
