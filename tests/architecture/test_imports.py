"""Who may import whom, kept by reading the sources and by asking a fresh interpreter.

Downwards only, one door for each outside thing, and the service never carries training's weight. When a rule is to
change, change the table here in the same commit and say why.
"""

import ast
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT, belongs, doors, module_of, parse, source_files, uses

ROUTES = "service/routes/"

# Each outside library and the only files that may import it; a folder stands for all files in it.
DOORS = {
    "onnxruntime": ("service/engines/ort.py", "training/bundling/export.py", "training/bundling/precision.py"),
    "openvino": ("service/engines/openvino.py",),
    "tensorrt": ("service/engines/trt.py",),
    "cuda": ("service/engines/cuda.py",),
    "onnx": ("service/contract/graph.py", "training/bundling/export.py", "training/bundling/precision.py"),
    "PIL": ("service/contract/frames.py",),
    "simplejpeg": ("service/contract/jpeg.py",),
    "cv2": ("service/contract/pictures.py", "service/contract/regions.py", "service/contract/raw_frames.py"),
    "huggingface_hub": ("training/backbones/download.py",),
    "timm": ("models/backbones.py",),
    "torchvision": ("models/backbones.py",),
    "torch.distributed": ("training/fitting/peers.py",),
    "opentelemetry": ("service/observability/traces.py", "service/observability/collector.py"),
    "prometheus_client": ("service/observability/telemetry.py",),
    "fastapi": ("service/app.py", ROUTES),
    "starlette": ("service/app.py", ROUTES),
    "uvicorn": ("service/__main__.py", "service/protocol.py"),
    "httptools": ("service/protocol.py",),
    "httpcore": ("service/bounded_sockets.py",),
    "httpx": ("service/client.py", "training/camera.py"),
    "tenacity": ("service/client.py",),
    "model_signing": ("service/contract/signature.py",),
    "obstore": ("service/stores/objects.py",),
    "pydantic_settings": ("service/settings.py",),
    "matplotlib": ("training/reporting/drawings.py",),
    "jinja2": ("training/reporting/pages.py",),
}

# Where asyncio may be known; everything else is plain functions, and so testable without a loop.
ASYNC = (
    "service/app.py",
    "service/pipeline.py",
    "service/scheduling/alarm.py",
    "service/scheduling/batcher.py",
    "service/scheduling/decoders.py",
    "service/protocol.py",
    "service/lines/golden_watch.py",
    "service/shadows.py",
    "service/camera.py",
    "service/client.py",  # bounds a whole answer, where httpx bounds each wait for a piece of it
    "service/commands/client.py",
    "service/__main__.py",
    ROUTES,
)

# Where the environment may be read.
ENVIRONMENT = ("service/settings.py", "service/__main__.py", "training/__main__.py")

# Layers of the service, lowest first: a file imports from lower layers, or from what stands there as one.
LAYERS = (
    ("service.errors", "service.commands.frame_files", "service.heap", "service.bounded_sockets", "service.threads"),
    (
        "service.ports.body_budget",
        "service.ports.connections",
        "service.contract",
        "service.scheduling.alarm",
        "service.scheduling.patience",
        "service.scheduling.schedule",
    ),
    (
        "service.observability.drift",
        "service.engines",
        "service.inspection",
        "service.observability.log",
        "service.stores",
        "service.observability.tallies",
        "service.ports.tls",
    ),
    ("service.settings", "service.observability.telemetry", "service.scheduling.places"),
    (
        "service.scheduling.batch_queue",
        "service.scheduling.engine_runs",
        "service.observability.traces",
        "service.lines.warm_up",
    ),
    ("service.scheduling.batcher",),
    ("service.scheduling.decoders", "service.lines.live"),
    ("service.lines.policies",),
    (
        "service.lines.catalogue",
        "service.lines.choices",
        "service.lines.loading",
        "service.lines.memory",
        "service.lines.served",
    ),
    ("service.lines.ledger",),
    ("service.lines.wanted",),
    ("service.lines.residence",),
    ("service.lines.going_live",),
    ("service.lines.versions",),
    ("service.lines.store_looks",),
    ("service.auth", "service.records", "service.lines.registry"),
    ("service.pipeline",),
    ("service.lines.golden_watch", "service.shadows"),
    ("service.schemas",),
    ("service.open_inference", "service.client"),
    ("service.routes", "service.administrator", "service.camera", "service.commands.connection_options"),
    ("service.observability.collector",),
    (
        "service.app",
        "service.commands.admin",
        "service.commands.engine",
        "service.protocol",
        "service.commands.operator",
        "service.commands.settings",
    ),
    ("service.__main__", "service.commands.client"),
)

# Floors of training, lowest first, by the same rule: a room knows only what stands below it.
TRAINING_LAYERS = (
    (
        "training.backbones",
        "training.camera",
        "training.procedural",
        "training.progress",
        "training.ranges",
        "training.reproducibility",
        "training.stops",
        "training.whole_files",
    ),
    ("training.data",),
    ("training.config", "training.measuring"),
    ("training.fitting", "training.calibrate", "training.golden"),
    ("training.distillation", "training.reporting"),
    ("training.run_directory",),
    ("training.lines",),
    ("training.bundling",),
    ("training.run", "training.zero_shot", "training.recalibrate"),
    ("training.demo", "training.faults"),
    ("training.comparison",),
    ("training.reproduction",),
    ("training.jobs",),
    ("training.commands",),
    ("training.__main__",),
)

# What models may use besides torch and numpy: arithmetic and types. Files, clocks, logs and environment stay outside.
MODELS_STANDARD_LIBRARY = frozenset(
    {"abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "itertools", "math", "operator"}
    | {"types", "typing", "warnings"}
)
BELOW_DETECTORS = ("models.detector", "models.backbones", "models.blocks")
# Their runtimes are not installed everywhere.
OPTIONAL = (
    "service/engines/trt.py",
    "service/engines/cuda.py",
    "service/engines/openvino.py",
    "service/observability/collector.py",
)
HEAVY = ("torch", "torchvision", "timm", "models", "training", "matplotlib", "safetensors")


def allowed(file, places):
    """Tell whether a file is one of the places, or lies in one that is a folder."""
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def layer_of(module):
    """Return the number of the layer of a module of the service or of training."""
    for number, members in enumerate(LAYERS if belongs(module, "service") else TRAINING_LAYERS):
        if any(belongs(module, member) for member in members):
            return number
    pytest.fail(f"{module} has no layer; add it to LAYERS in tests/architecture/test_imports.py")


# Imports modules one after the other and tells the first one that brought in something unwanted.
WATCH = """
import importlib, sys
modules, unwanted = (set(argument.split()) for argument in sys.argv[1:])
for module in sorted(modules):
    importlib.import_module(module)
    found = unwanted & {name.partition(".")[0] for name in sys.modules}
    if found:
        sys.exit(f"{module} brought in {sorted(found)}")
"""


def import_afresh(modules, unwanted):
    """Import modules in a fresh interpreter and return what it complains of; empty where nothing unwanted came in."""
    command = [sys.executable, "-c", WATCH, " ".join(modules), " ".join(unwanted)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("library", DOORS)
def test_library_when_imported_comes_through_its_door(library):
    """Each outside library has its few doors, so that replacing or guarding it touches one place."""
    strangers = {file for file in doors(library) if not allowed(file, DOORS[library])}

    assert strangers == set()


def test_asyncio_when_imported_stays_at_the_edge():
    """Only the narrator, the batcher, the decoders and the HTTP side know of an event loop; training knows none."""
    strangers = {file for file in doors("asyncio") | doors("anyio") if not allowed(file, ASYNC)}

    assert strangers == set()


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm", "models", "training", "sklearn", "scipy"])
def test_service_when_read_imports_nothing_of_training(package):
    """The server is installed without torch and never asks for it."""
    strangers = {file for file in doors(package) if file.startswith("service/")}

    assert strangers == set()


def test_models_when_read_import_torch_numpy_and_themselves():
    """Model code knows tensors and arithmetic: no files, no clock, no environment, no logging."""
    outside = {"torch", "numpy", "models"}

    strangers = {
        use
        for use in uses()
        if use.file.startswith("models/")
        and use.module.partition(".")[0] not in outside | MODELS_STANDARD_LIBRARY
        and not (use.file in DOORS["timm"] and use.module.partition(".")[0] in ("timm", "importlib"))
    }

    assert strangers == set()


def test_detectors_when_read_do_not_know_each_other():
    """A detector imports the shape of detectors, backbones and blocks, and never another detector."""
    detectors = {
        file
        for file in source_files()
        if file.startswith("models/") and file.count("/") == 1 and file != "models/__init__.py"
    }

    strangers = {
        use
        for use in uses()
        if use.file in detectors
        and belongs(use.module, "models")
        and not any(belongs(use.module, place) for place in BELOW_DETECTORS)
    }

    assert strangers == set()


def test_blocks_when_read_know_no_detector():
    """What detectors share knows none of them, only the shape that all have and the backbones below."""
    strangers = {
        use
        for use in uses()
        if use.file.startswith("models/blocks/")
        and belongs(use.module, "models")
        and not any(belongs(use.module, place) for place in BELOW_DETECTORS)
    }

    assert strangers == set()


def test_training_when_it_needs_the_service_takes_the_contract_or_asks_as_a_client():
    """Training shares pixels, calibration, policy and how commands start; the demo asks through the public client."""
    strangers = {
        use
        for use in uses()
        if use.file.startswith("training/")
        and belongs(use.module, "service")
        and not belongs(use.module, "service.contract")
        and use.module not in ("service.errors", "service.client", "service.heap")
    }

    assert strangers == set()


@pytest.mark.parametrize(("package", "layers"), [("service", LAYERS), ("training", TRAINING_LAYERS)])
def test_package_when_it_imports_itself_looks_downwards(package, layers):
    """Each layer knows only lower ones; brothers in one layer do not know each other."""
    upwards = {
        use
        for use in uses()
        if use.file.startswith(f"{package}/")
        and belongs(use.module, package)
        and use.module != package
        and layer_of(use.module) >= layer_of(module_of(use.file))
        and not any(
            belongs(use.module, member) and belongs(module_of(use.file), member)
            for members in layers
            for member in members
        )
    }

    assert upwards == set()


@pytest.mark.parametrize("package", ["service", "training"])
def test_module_when_added_has_a_layer(package):
    """No module stands outside of the order."""
    modules = [module_of(file) for file in source_files() if file.startswith(f"{package}/") and parse(file).body]

    assert all(layer_of(module) >= 0 for module in modules)


@pytest.mark.parametrize("package", ["service", "training", "models.blocks"])
def test_modules_when_followed_import_in_no_circle(package):
    """No two modules need each other, not even through others or inside of a function."""
    modules = {module_of(file) for file in source_files()}
    edges = {
        module: {use.module for use in uses() if module_of(use.file) == module and use.module in modules}
        for module in modules
        if belongs(module, package)
    }

    circles = {module for module in edges if module in _reached_from(edges, module)}

    assert circles == set()


def _reached_from(edges, start):
    reached, waiting = set(), list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(edges.get(module, ()))
    return reached


@pytest.mark.parametrize("module", ["pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"])
def test_pickle_when_looked_for_is_nowhere(module):
    """No file format that runs code when it is read."""
    assert doors(module) == set()


def test_loading_when_torch_or_numpy_could_unpickle_is_told_not_to():
    """Checkpoints of other projects are read as weights only, in one file, and `numpy.load` refuses objects aloud."""
    loads = [
        (file, node)
        for file in source_files()
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"
    ]

    for file, call in loads:
        library = ast.unparse(call.func.value)
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if library == "torch":
            assert file == "training/fitting/import_checkpoint.py", f"{file}: {ast.unparse(call)}"
            assert told.get("weights_only") == "True", f"{file}: {ast.unparse(call)}"
        assert library not in ("np", "numpy") or told.get("allow_pickle") == "False", f"{file}: {ast.unparse(call)}"


def test_environment_when_read_is_read_at_the_edge():
    """Settings are read once, at the start; setting a variable for a library is no reading."""
    strangers = {
        f"{file}:{node.lineno}"
        for file in source_files()
        if not allowed(file, ENVIRONMENT)
        for parent in ast.walk(parse(file))
        for node in ast.iter_child_nodes(parent)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv", "environb")
        and not (isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Store))
    }

    assert strangers == set()


def test_service_when_imported_whole_loads_nothing_of_training():
    """Whatever part of the service is imported, torch and training stay away, also through other libraries."""
    modules = [module_of(file) for file in source_files() if file.startswith("service/") and file not in OPTIONAL]

    assert import_afresh(modules, HEAVY) == ""


def test_contract_when_imported_loads_no_server():
    """Training takes the contract without a web framework, a runtime or a metrics registry."""
    modules = [module_of(file) for file in source_files() if file.startswith("service/contract/")]
    server = ("fastapi", "starlette", "uvicorn", "onnxruntime", "prometheus_client", "asyncio")

    assert import_afresh([*modules, "service.errors"], server) == ""
