"""Lets the exporter read its table of operators once in a process; it would do so for every export, half a second each.

The table is the same for every network. Where torch keeps it elsewhere, exports in tests only take longer.
"""

import contextlib
from functools import cache
from typing import Any

with contextlib.suppress(ImportError, AttributeError):
    from torch.onnx._internal.exporter import _registration

    _read = _registration.ONNXRegistry.from_torchlib

    @cache
    def _read_once(**options: Any) -> Any:
        return _read(**options)

    _registration.ONNXRegistry.from_torchlib = staticmethod(_read_once)  # type: ignore[method-assign,assignment]
