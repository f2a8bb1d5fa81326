"""What we ask of TensorRT and of CUDA Python is there, in the real bindings of both releases.

`.ci/run` puts the wheels into a folder that `FLAWLINE_GPU_WHEELS` names: `tensorrt-cu13-bindings` of releases 10 and
11, and `cuda-bindings`. They need no GPU to be looked at: TensorRT's load with empty libraries in place of NVIDIA's,
made here by the C compiler, and CUDA's answer every call with "no driver", after they have looked at its arguments.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

WHEELS = Path(os.environ.get("FLAWLINE_GPU_WHEELS", "/nowhere"))
MISSING = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")

# What `trt.py` calls on which of the library's classes, with as many arguments as it gives beside the object itself.
METHODS = {
    "Builder": {
        "create_network": 1,
        "create_builder_config": 0,
        "create_optimization_profile": 0,
        "build_serialized_network": 2,
    },
    "OnnxParser": {"parse": 1, "get_error": 1},
    "ParserError": {"desc": 0},
    "IBuilderConfig": {
        "set_memory_pool_limit": 2,
        "add_optimization_profile": 1,
        "create_timing_cache": 1,
        "set_timing_cache": 2,
        "get_timing_cache": 0,
    },
    "ITimingCache": {"serialize": 0},
    "IOptimizationProfile": {"set_shape": 4},
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "create_execution_context": 0,
        "get_tensor_name": 1,
        "get_tensor_mode": 1,
        "get_tensor_dtype": 1,
        "get_tensor_shape": 1,
    },
    "IExecutionContext": {"set_tensor_address": 2, "set_input_shape": 2, "execute_async_v3": 1},
    "ILogger": {"log": 2},
}
ATTRIBUTES = {"ICudaEngine": ("num_io_tensors", "device_memory_size_v2"), "OnnxParser": ("num_errors",)}

LOOK = """
import json, re, sys
import tensorrt_bindings as trt
methods, attributes, names = json.loads(sys.argv[1])
faults = []
for path in names:
    found = trt
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        faults.append(path)
for owner, wanted in methods.items():
    for name, given in wanted.items():
        method = getattr(getattr(trt, owner), name, None)
        signatures = re.findall(rf"{name}\\(self: (.*?)\\) -> ", (method.__doc__ or "") if method else "")
        counts = []
        for signature in signatures:
            parts = re.split(r", (?=\\w+: )", signature)[1:]
            counts.append((sum("=" not in part for part in parts), len(parts)))
        if method is None or not any(least <= given <= most for least, most in counts):
            faults.append(f"{owner}.{name} with {given} arguments: {counts}")
for owner, wanted in attributes.items():
    faults += [f"{owner}.{name}" for name in wanted if not hasattr(getattr(trt, owner), name)]
network = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
assert 1 << int(network) > 0
assert trt.nptype(trt.DataType.UINT8).__name__ == "uint8" and trt.nptype(trt.DataType.INT64).__name__ == "int64"
class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
    def log(self, severity, msg):
        pass
Log()
print(trt.__version__, faults)
"""

CALL = """
from cuda.bindings import runtime as r
import sys
copy, mode = r.cudaMemcpyKind, r.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
attribute = r.cudaDeviceAttr
calls = [
    ("cudaGetDeviceCount",), ("cudaSetDevice", 0), ("cudaDeviceSynchronize",),
    ("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0),
    ("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0),
    ("cudaStreamCreateWithFlags", r.cudaStreamNonBlocking), ("cudaStreamDestroy", 1), ("cudaStreamSynchronize", 1),
    ("cudaMalloc", 1), ("cudaFree", 0), ("cudaHostAlloc", 1, r.cudaHostAllocDefault), ("cudaFreeHost", 0),
    ("cudaMemcpyAsync", 1, 2, 3, copy.cudaMemcpyHostToDevice, 1),
    ("cudaMemcpyAsync", 1, 2, 3, copy.cudaMemcpyDeviceToHost, 1),
    ("cudaStreamBeginCapture", 1, mode), ("cudaStreamEndCapture", 1), ("cudaGraphInstantiate", 1, 0),
    ("cudaGraphDestroy", 1), ("cudaGraphExecDestroy", 1), ("cudaGraphLaunch", 1, 1),
]
called = {name for name, *_ in calls}
status, *_ = r.cudaGetDeviceCount()
if status == r.cudaError_t.cudaSuccess:
    sys.exit("there is a GPU: these calls must not be made with made-up addresses")
for name, *arguments in calls:
    status, *_ = getattr(r, name)(*arguments)
    assert isinstance(status, r.cudaError_t), name
print(" ".join(sorted(called)))
"""


def wheel(pattern):
    """Return a wheel of the folder, or skip where it is not there."""
    found = sorted(WHEELS.glob(pattern))
    if not found:
        pytest.skip(f"needs {pattern} in the folder FLAWLINE_GPU_WHEELS; .ci/run fetches it")
    return found[-1]


def used_names(file, library):
    """Return the dotted names that a source file takes from a library."""
    text = {
        ast.unparse(node) for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)
    }
    found = {name.removeprefix(f"{library}.") for name in text if name.startswith(f"{library}.")}
    return {name for name in found if re.fullmatch(r"[\w.]+", name)}


@pytest.mark.parametrize("major", [10, 11])
def test_tensorrt_when_the_real_bindings_are_asked_then_have_all_that_we_use(major, tmp_path):
    """Every name, method and number of arguments exists in this release, and our log can stand on its class."""
    import json

    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, cc")
    with zipfile.ZipFile(
        wheel(f"tensorrt_cu13_bindings-{major}.*cp{sys.version_info[0]}{sys.version_info[1]}*.whl")
    ) as w:
        w.extractall(tmp_path)
    source = tmp_path / "empty.c"
    for library in LIBRARIES:
        functions = MISSING if library == "nvinfer" else ()
        source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in functions))
        built = tmp_path / f"lib{library}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source], check=True)

    names = sorted(used_names("service/engines/trt.py", "tensorrt"))
    command = [sys.executable, "-c", LOOK, json.dumps([METHODS, ATTRIBUTES, names])]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    version, _, faults = done.stdout.strip().partition(" ")
    assert version.startswith(f"{major}.")
    assert faults == "[]"
    assert {"Builder", "OnnxParser", "Runtime", "__version__", "nptype"} <= set(names)


def test_tensorrt_when_our_file_calls_it_then_each_call_is_in_the_table():
    """A method that is used and not listed above would not be looked for."""
    tree = ast.parse((ROOT / "service/engines/trt.py").read_text())
    objects = {"builder", "parser", "config", "profile", "runtime", "engine", "self._context"}
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in objects
    }

    assert called - {name for methods in METHODS.values() for name in methods} == set()
    assert len(called) > 12


def test_cuda_when_the_real_bindings_are_called_then_take_our_arguments(tmp_path):
    """Each call that we make exists with these kinds of arguments, and answers with a status and not an exception."""
    with zipfile.ZipFile(wheel(f"cuda_bindings-*cp{sys.version_info[0]}{sys.version_info[1]}*.whl")) as one:
        one.extractall(tmp_path)
    with zipfile.ZipFile(wheel("cuda_pathfinder-*.whl")) as one:
        one.extractall(tmp_path)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    used = {name for name in used_names("service/engines/cuda.py", "runtime") if re.fullmatch(r"cuda[A-Z]\w+", name)}
    constants = {"cudaStreamNonBlocking", "cudaHostAllocDefault", "cudaMemcpyKind", "cudaStreamCaptureMode"}
    assert used - constants - {"cudaDeviceAttr", "cudaError_t"} == set(done.stdout.split())
