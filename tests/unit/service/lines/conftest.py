"""Stores of versions that come and go."""

import pytest

from tests.shelves import Shelf


@pytest.fixture
def shelf(tmp_path):
    """Return a shelf with one line, not loaded."""
    shelf = Shelf(tmp_path / "store")
    shelf.add("1")
    yield shelf
    if shelf.registry is not None:
        shelf.registry.close()


@pytest.fixture
def crowded(tmp_path):
    """Return a loaded shelf with two lines and memory for one: `plate` is served, `cap` made room for it."""
    shelf = Shelf(tmp_path / "store")
    shelf.now = 1000.0
    for name in ("cap", "plate"):
        shelf.sizes[name] = (shelf.add("1", name) / "model.onnx").stat().st_size
    shelf.load(budget_bytes=3 * shelf.sizes["cap"] // 2)
    assert shelf.line_states() == {"cap": "unloaded", "plate": "ready"}
    yield shelf
    shelf.registry.close()
