"""From a verified bundle and options to an engine: which file serves which device.

A runtime is imported only when it is asked for, so that a machine needs no other than its own.
"""

from service.contract.bundle import Bundle
from service.engines.engine import Engine, EngineOptions
from service.errors import EngineFailed

_EXTRAS = {"onnxruntime": "service", "openvino": "openvino", "tensorrt": "gpu", "cuda": "gpu"}


def open_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Bring a verified bundle to its device.

    Raises:
        BundleRefused: if the runtime can't load the graph, or it is not the graph that the manifest describes.
        EngineFailed: if the runtime or the device is not there.
    """
    try:
        if options.device == "tensorrt":
            from service.engines.trt import TrtEngine  # noqa: PLC0415 - only GPU machines have the runtime

            return TrtEngine(bundle, options)
        if options.device == "openvino":
            from service.engines.openvino import OpenVinoEngine  # noqa: PLC0415 - an optional extra

            return OpenVinoEngine(bundle, options)
        from service.engines.ort import OrtEngine, OrtGpuEngine  # noqa: PLC0415 - not needed where another one serves

        return OrtEngine(bundle, options) if options.device == "cpu" else OrtGpuEngine(bundle, options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise EngineFailed(
            f"The device {options.device} needs the package {package!r}: pip install 'flawline[{_EXTRAS[package]}]'."
        ) from error
