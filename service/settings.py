"""The service's settings: environment variables with the prefix `FLAWLINE_`, read once in `__main__`.

Every module gets plain values from here; none reads the environment itself. A wrong value, or a name that nobody reads,
stops the start with one sentence. The golden set is always replayed; there is no setting to skip it.
"""

import difflib
import inspect
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.contract.bundle import LineName
from service.contract.frames import DEFAULT_FORMATS, FRAME_FORMATS, FrameLimits
from service.contract.signature import Trust
from service.engines.engine import GPU_DEVICES, Device, EngineOptions, InferencePrecision, MemoryArena
from service.ports.connections import MOST_CONNECTIONS

PREFIX = "FLAWLINE_"
# What other parts read: clients, training, and the tests. Whatever else begins with the prefix is a mistake.
OTHER_VARIABLES = frozenset(
    PREFIX + name
    for name in (
        "CLIENT_ADMIN_URL",
        "CLIENT_KEY_FILE",
        "CLIENT_URL",
        "WEIGHTS",
        "CHECKOV",
        "GPU_WHEELS",
        "GRAFANA_TYPES",
        "PARITY_SEED",
        "SERVICE_PYTHON",
        "SHARED",
    )
)

# What people write who have read of an option, or know another product; closeness of letters would say something else.
_OFTEN_MEANT = {
    "DEADLINE_MS": "default_deadline_s",
    "GOLDEN": "golden_every_s",
    "KEYS": "keys_file",
    "REQUIRE_KEYS": "keys_file",
    "STORE": "store_directory",
    "TLS_CERT": "tls_certificate",
}
# Of a Service whose name begins with ours; that of one called `flawline` for `port` is told by its value.
_SERVICE_LINK = re.compile(r"FLAWLINE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_LINK_VALUES = ("tcp://", "udp://", "sctp://")

_CGROUP = Path("/sys/fs/cgroup")
# Threads of one run wait for each other after every operator, so that more bring less and less.
_MOST_THREADS_ALONE = 4
# The rest is for engines, and for what frames become once they are decoded.
_BODIES_SHARE = 4
_MOST_BODY_BYTES = 2**30
# The interpreter, libraries, frames being decoded, what one engine more takes while it comes, and holes in the heap.
_PROCESS_BYTES = 384 * 2**20
_LEAST_ENGINES_SHARE = 4


class SettingsInvalid(ValueError):
    """A setting can't be used; the sentence names the variable and shows a right value."""


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Return how many CPUs this process may keep busy: its affinity, or its container's quota where that is less.

    Args:
        cgroup: root of the control groups as this process sees them.
    """
    affinity = len(os.sched_getaffinity(0))
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        allowed = int(quota) / int(period)
    except (OSError, ValueError):  # no control groups, or the quota is `max`
        return affinity
    return affinity if allowed <= 0 else max(1, min(affinity, math.ceil(allowed)))


def usable_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return how much memory this process may take: the machine's, or its container's limit where that is less.

    Args:
        cgroup: root of the control groups as this process sees them.
    """
    return memory_limit_bytes(cgroup) or _machine_memory_bytes()


def memory_limit_bytes(cgroup: Path = _CGROUP) -> int | None:
    """Return the container's limit of memory; None where there is none below the machine's.

    Args:
        cgroup: root of the control groups as this process sees them.
    """
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int((cgroup / name).read_text())
        except (OSError, ValueError):  # no such group, or the limit is `max`
            continue
        return limit if limit < _machine_memory_bytes() else None
    return None


def _machine_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_engine_cache() -> Path:
    """Return where TensorRT's plans lie unless told otherwise."""
    return Path("~/.cache/flawline/engines").expanduser()


class Settings(BaseSettings):
    """Every knob of the server; the unit is in the name.

    Attributes:
        store_directory: where bundles lie, as `<name>/<version>/`; with a `store_url`, where they are mirrored to.
        store_url: of an S3-compatible store, s3://bucket/prefix; absent means that the directory is the store.
        store_endpoint: of another service than Amazon's, for example https://minio.plant:9000.
        store_region: of the store.
        max_store_bytes: disk that mirrored bundles may take; what serves or was chosen to is kept, then newer versions
            come before older ones, and what is left out is fetched when an administrator asks for it.
        store_poll_s: seconds between two looks for new versions and policies; 0 looks only when told to.
        activate_newest: whether a new version in the store becomes live by itself once it is proved, or waits for an
            administrator. The first start takes the newest one; later ones do so again where no state directory keeps
            which one that was.
        keep_previous: whether the version before the live one stays loaded, so that rolling back takes no time.
        state_directory: where administrators' choices (versions, policies, unloaded lines) are kept through restarts;
            made where it is missing, absent means that they end with the process.
        memory_budget_bytes: of all engines together; beyond it, lines that were not asked for lately are unloaded, and
            loaded again when a frame comes. 0 is no limit; absent means, on a CPU, what the container's limit leaves
            beside the process itself, bodies and heatmaps, and no limit where there is none or engines are on a GPU.
        pinned_lines: never unloaded, separated by commas.
        require_signature: refuse bundles that are not signed.
        signature_public_key: PEM file of the key whose signatures count; a wrong signature is refused in any case.
        lines: to serve, separated by commas; absent means every line of the store.
        host: address to listen on.
        port: to listen on.
        admin_port: where administrators listen; absent is off. Never the port of the frames; 0 takes a free one.
        admin_host: address that goes with it.
        keys_file: of callers' keys, read again when it changes; absent leaves the service open to everybody.
        tls_certificate: PEM file of the server's certificate and chain; absent means plain HTTP.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authorities whose certificates callers must show; absent asks for none.
        health_port: where probes ask over plain HTTP whether the service is alive and ready, and can ask nothing else;
            needed where callers must show a certificate, absent is off.
        device: runtime and device of the engines (service/engines/README.md): `cpu`, `openvino`, `cuda`,
            `ort-tensorrt` or `tensorrt`; another than the wanted one is never taken silently.
        runners: batches that run side by side, for each engine; absent means one a CPU, or one on a GPU, where each
            has a session or context and buffers of its own.
        threads_per_run: CPU threads inside one run.
        threads_alone: threads inside a run beside which nothing runs, on a CPU; absent means those of all runners, at
            most four. As many as `threads_per_run` save the memory of a second session an engine.
        memory_arena: of ONNX Runtime on the CPU: `keep` what runs have used, `shrink` after each run, or `off`.
        inference_precision: that OpenVINO may compute in, `f32` or `bf16`; the golden set decides whether it may.
        cuda_graphs: record each batch size once and replay it; refused where a graph can't be recorded.
        engine_cache_directory: of TensorRT's plans, this user's alone; absent means `~/.cache/flawline/engines`.
        warm_up_limit_s: of running, for all batch sizes of an engine; what is not warm by then is never chosen.
        max_batch_size: frames in one run; the schedule takes fewer where larger batches do not pay.
        max_queue_size: frames that one engine accepts and has not answered yet; one more is refused.
        stuck_after_s: a run that takes longer makes its line unhealthy; a frame that is decoded for longer is refused,
            and the thread that it keeps is replaced.
        golden_every_s: seconds between two replays of golden frames on each live engine, at low priority; 0 is off. One
            that finds no room beside frames within the engine's share of this time is skipped, and counted as that; an
            engine that answers no frame meanwhile is replayed all the same after three in a row.
        decode_workers: threads that decode and resize apart from the runners; absent means one a CPU beside a GPU, and
            none on a CPU, where the runner of a frame decodes and judges it as well.
        default_deadline_s: from the arrival of a request to its answer, where the caller names none.
        max_deadline_s: the longest that a caller may name.
        max_body_bytes: the largest body.
        max_connections: open at a time on the port of the frames; beyond it, idle ones are closed. Absent means 4096,
            or as many as half of the file descriptors that the process may have.
        max_body_bytes_held: memory of all bodies, from their first bytes until they are answered, of which one key (one
            line, where there are no keys) gets half at most; and as much again of answers that are being sent. Absent
            means a quarter of the machine's or container's memory, or 1 GiB where that is less.
        max_pixels: the largest image, width times height.
        formats: accepted codecs, separated by commas; absent means all but WebP, of which lost data can't be noticed.
        max_frames_per_request: in one call of `inspect-batch`.
        max_heatmaps_kept: answers whose heatmap can still be fetched.
        max_heatmap_bytes_kept: memory that they may take.
        max_disagreements_kept: frames on which a shadow disagreed, to be read by administrators.
        drain_timeout_s: after SIGTERM, to answer what was accepted; not below `max_deadline_s`.
        traces_endpoint: of an OpenTelemetry collector that takes OTLP over HTTP; absent means no traces.
        traces_share: of inspections that are traced, where the caller's `traceparent` has not decided.
        log_level: of the JSON log.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    store_directory: Path = Path("store")
    store_poll_s: float = Field(default=0, ge=0, le=86_400)
    activate_newest: bool = True
    keep_previous: bool = True
    state_directory: Path | None = None
    memory_budget_bytes: int | None = Field(default=None, ge=0)
    pinned_lines: Annotated[frozenset[LineName], NoDecode] = frozenset()
    store_url: str | None = Field(default=None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w!.*'()/-]*)?$")
    store_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/\s]+/?$")
    store_region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]{1,64}$")
    max_store_bytes: int = Field(default=20 * 2**30, ge=2**20)
    require_signature: bool = False
    signature_public_key: Path | None = None
    lines: Annotated[frozenset[LineName] | None, NoDecode] = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    keys_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    health_port: int | None = Field(default=None, ge=0, le=65535)
    device: Device = "cpu"
    runners: int = Field(default=0, ge=0, le=256)
    threads_per_run: int = Field(default=1, ge=1, le=256)
    threads_alone: int = Field(default=0, ge=0, le=256)
    memory_arena: MemoryArena = "keep"
    inference_precision: InferencePrecision = "f32"
    cuda_graphs: bool = False
    engine_cache_directory: Path | None = None
    warm_up_limit_s: float = Field(default=120, gt=0, le=3600)
    max_batch_size: int = Field(default=1, ge=1, le=256)
    max_queue_size: int = Field(default=64, ge=1, le=100_000)
    stuck_after_s: float = Field(default=30, gt=0, le=3600)
    golden_every_s: float = Field(default=60, ge=0, le=86_400)
    decode_workers: int = Field(default=0, ge=0, le=256)
    default_deadline_s: float = Field(default=2, gt=0, le=600)
    max_deadline_s: float = Field(default=10, gt=0, le=600)
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024, le=2**30)
    max_connections: int = Field(default=0, ge=0, le=1_000_000)
    max_body_bytes_held: int = Field(default=0, ge=0)
    max_pixels: int = Field(default=50_000_000, ge=1, le=2**30)
    formats: Annotated[frozenset[str], NoDecode] = DEFAULT_FORMATS
    max_frames_per_request: int = Field(default=16, ge=1, le=1024)
    max_heatmaps_kept: int = Field(default=1000, ge=0, le=1_000_000)
    max_heatmap_bytes_kept: int = Field(default=256 * 2**20, ge=0)
    max_disagreements_kept: int = Field(default=1000, ge=1, le=1_000_000)
    drain_timeout_s: float = Field(default=15, gt=0, le=3600)
    traces_endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")] | None = None
    traces_share: float = Field(default=1, ge=0, le=1)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("lines", "pinned_lines", "formats", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return {part.strip() for part in value.split(",") if part.strip()} if isinstance(value, str) else value

    @field_validator("lines")
    @classmethod
    def _names_a_line(cls, value: frozenset[str] | None) -> frozenset[str] | None:
        if value is not None and not value:
            raise ValueError("name at least one line, or leave it out to serve every line")
        return value

    @field_validator("formats")
    @classmethod
    def _is_known(cls, value: frozenset[str]) -> frozenset[str]:
        if not value or not value <= FRAME_FORMATS:
            raise ValueError(f"choose from {','.join(sorted(FRAME_FORMATS))}")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _is_no_service_link(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError("this is Kubernetes' own variable; set enableServiceLinks: false in the pod")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _times_fit_together(self) -> Self:
        if self.default_deadline_s > self.max_deadline_s:
            raise ValueError("default_deadline_s must not be above max_deadline_s")
        if self.drain_timeout_s < self.max_deadline_s:
            raise ValueError("drain_timeout_s must not be below max_deadline_s, or accepted frames are lost")
        return self

    @model_validator(mode="after")
    def _largest_body_fits(self) -> Self:
        if 0 < self.max_body_bytes_held < self.max_body_bytes:
            raise ValueError("max_body_bytes_held must not be below max_body_bytes, or such bodies are never taken")
        return self

    @model_validator(mode="after")
    def _administration_is_guarded(self) -> Self:
        if self.admin_port is not None and self.keys_file is None:
            raise ValueError("admin_port needs keys_file, with a key that allows the action admin")
        if self.admin_port is not None and self.admin_port == self.port != 0:
            raise ValueError("admin_port must be another one than port")
        return self

    @model_validator(mode="after")
    def _health_has_its_own_port(self) -> Self:
        if self.health_port and self.health_port in (self.port, self.admin_port):
            raise ValueError("health_port must be another one than port and admin_port")
        return self

    @model_validator(mode="after")
    def _files_come_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca asks callers for a certificate, for which tls_certificate is needed")
        if self.require_signature and self.signature_public_key is None:
            raise ValueError("require_signature needs a signature_public_key")
        if self.store_endpoint is not None and self.store_url is None:
            raise ValueError("store_endpoint needs a store_url, for example s3://bundles")
        return self

    @property
    def trust(self) -> Trust | None:
        """Whose bundles are taken; None takes everybody's."""
        return None if self.signature_public_key is None else Trust(self.signature_public_key, self.require_signature)

    @cached_property
    def frame_limits(self) -> FrameLimits:
        """What a caller may send."""
        return FrameLimits(self.max_body_bytes, self.max_pixels, self.formats)

    def connections(self, files: int) -> int:
        """Return how many connections the port of the frames may have.

        Args:
            files: that the process may open; half of them are for other ports and everything else.

        Raises:
            SettingsInvalid: if more are wanted than that allows.
        """
        if self.max_connections > files // 2:
            raise SettingsInvalid(
                f"{PREFIX}MAX_CONNECTIONS: {self.max_connections} connections need twice as many file descriptors, and "
                f"this process may have {files}; raise its limit (ulimit -n)."
            )
        return self.max_connections or min(MOST_CONNECTIONS, files // 2)

    @property
    def body_budget_bytes(self) -> int:
        """Memory that bodies may take together; two of the largest at least."""
        share = min(usable_memory_bytes() // _BODIES_SHARE, _MOST_BODY_BYTES)
        return self.max_body_bytes_held or max(share, 2 * self.max_body_bytes)

    @property
    def engine_budget_bytes(self) -> int | None:
        """Memory that all engines may take together; None is no limit."""
        if self.memory_budget_bytes is not None:
            return self.memory_budget_bytes or None
        limit = memory_limit_bytes()
        if limit is None or self.device in GPU_DEVICES:
            return None
        others = _PROCESS_BYTES + self.body_budget_bytes + self.max_heatmap_bytes_kept
        return max(limit - others, limit // _LEAST_ENGINES_SHARE)

    @property
    def runners_per_engine(self) -> int:
        """Batches that run side by side on one engine."""
        return self.runners or (1 if self.device in GPU_DEVICES else usable_cpus())

    @property
    def engine_options(self) -> EngineOptions:
        """How engines are opened."""
        return EngineOptions(
            device=self.device,
            instances=self.runners_per_engine,
            threads_per_run=self.threads_per_run,
            threads_alone=self.threads_alone
            or min(self.runners_per_engine * self.threads_per_run, _MOST_THREADS_ALONE),
            max_batch_size=self.max_batch_size,
            memory_arena=self.memory_arena,
            cuda_graphs=self.cuda_graphs,
            inference_precision=self.inference_precision,
            cache_directory=self.engine_cache_directory or default_engine_cache(),
        )

    @property
    def decode_threads(self) -> int:
        """Threads that decode and resize apart from the runners."""
        return self.decode_workers or (usable_cpus() if self.device in GPU_DEVICES else 0)


def read_settings() -> Settings:
    """Read the settings from the environment of the process.

    Raises:
        SettingsInvalid: if a value does not fit, or nothing of ours reads a variable with our prefix; overlooking
            `FLAWLINE_KEYS` would leave the service open.
    """
    for name, text in os.environ.items():
        wanted = name.upper()
        is_ours = wanted.startswith(PREFIX) and not _is_somebody_elses(wanted, text)
        if is_ours and wanted.removeprefix(PREFIX).lower() not in Settings.model_fields:
            raise SettingsInvalid(f"{name} is no setting; {_hint(wanted)}`flawline settings` lists them all.")
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsInvalid(_sentence(error)) from error


def read_texts() -> dict[str, str]:
    """Return what the environment says of settings, as it stands there, whether it can be meant or not."""
    ours = ((name.upper(), text) for name, text in os.environ.items() if text)
    said = {name.removeprefix(PREFIX).lower(): text for name, text in ours if name.startswith(PREFIX)}
    return {name: text for name, text in said.items() if name in Settings.model_fields}


def variable_of(setting: str) -> str:
    """Return the name that a setting has in the environment."""
    return PREFIX + setting.upper()


def describe() -> dict[str, str]:
    """Return what each setting means, in its words above, in their order."""
    meanings = inspect.cleandoc(Settings.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", meanings, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _is_somebody_elses(name: str, text: str) -> bool:
    """Tell whether a variable is read by another part of the product, or set by Kubernetes for a Service."""
    return name in OTHER_VARIABLES or _SERVICE_LINK.fullmatch(name) is not None or text.startswith(_LINK_VALUES)


def _hint(name: str) -> str:
    bare = name.removeprefix(PREFIX)
    meant = _OFTEN_MEANT.get(bare)
    similar = [meant] if meant else difflib.get_close_matches(bare.lower(), Settings.model_fields, n=1)
    return f"did you mean {variable_of(similar[0])}? " if similar else ""


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    said = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"The settings do not fit together: {_with_variables(said)}."
    name = str(first["loc"][0])
    default = Settings.model_fields[name].default
    example = ",".join(sorted(default)) if isinstance(default, frozenset) else default
    right = "" if default is None else f" A right value is {example}."
    return f"{variable_of(name)}: {said}.{right}"


def _with_variables(sentence: str) -> str:
    """Call settings by the names that whoever sets them knows."""
    names = {name for name in Settings.model_fields if "_" in name} | {"port"}
    return re.sub(r"\w+", lambda word: variable_of(word[0]) if word[0] in names else word[0], sentence)
