"""Where tests find the real frames, weights and parity numbers that the project may use but not ship."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """Return the folder of shared material, or None: `FLAWLINE_SHARED`, else `../shared` beside the checkout."""
    named = os.environ.get("FLAWLINE_SHARED")
    candidate = Path(named) if named else _ROOT.parent / "shared"
    return candidate if candidate.is_dir() else None


SHARED = find_shared()


def require_shared(relative: str) -> Path:
    """Return a path inside the shared material, or skip the test and say what is missing."""
    if SHARED is None or not (SHARED / relative).exists():
        pytest.skip(f"needs ../shared/{relative}, which is not beside this checkout")
    return SHARED / relative
