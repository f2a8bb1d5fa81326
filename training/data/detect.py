"""Which reader fits a folder: an explicit table, asked in its order.

A further layout is one file with its two functions and one row here; its test must be told from the others' folders,
because two rows that both claim a folder are an error.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from training.data.mvtec import is_mvtec, read_mvtec
from training.data.plain import is_plain, read_plain
from training.data.samples import Dataset, DatasetFault


class Layout(NamedTuple):
    """How one kind of folder is known and read."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], Dataset]


LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(is_mvtec, read_mvtec),
    "plain": Layout(is_plain, read_plain),
}


def read_dataset(root: Path, layout: str | None = None) -> Dataset:
    """Read a data set, by the named layout or by the one that its folders show.

    Args:
        root: folder of one line.
        layout: a key of `LAYOUTS`, or None to find out.

    Raises:
        DatasetFault: if the folder does not exist, no layout or several fit, or the reader refuses the files.
    """
    if not root.is_dir():
        raise DatasetFault(f"{root} is no folder; give the folder of one line.")
    if layout is not None:
        if layout not in LAYOUTS:
            raise DatasetFault(f"There is no layout {layout!r}; known are {', '.join(LAYOUTS)}.")
        return LAYOUTS[layout].read(root)
    fitting = _fitting(root)
    if len(fitting) > 1:
        raise DatasetFault(f"{root} could be read as {' or as '.join(fitting)}; name the layout.")
    if not fitting:
        raise DatasetFault(f"{root} has no layout that we know: expected train/good with images.{_hint(root)}")
    return LAYOUTS[fitting[0]].read(root)


def _fitting(root: Path) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout.matches(root)]


def _hint(root: Path) -> str:
    inside = [path.name for path in sorted(root.iterdir()) if path.is_dir() and _fitting(path)]
    return f" Its folders look like lines of their own; give one of {', '.join(inside)}." if inside else ""
