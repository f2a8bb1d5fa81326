"""Which reader fits a folder: an explicit table, asked in its order; and which lines a folder of many holds.

A further layout is one file with its two functions and one row here; its test must be told from the others' folders,
because two rows that both claim a folder are an error. A general layout, which many folders happen to have, claims only
what no other does.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from training.data.btad import is_btad, read_btad
from training.data.dagm import is_dagm, read_dagm
from training.data.elpv import is_elpv, read_elpv
from training.data.folders import GOOD, folders_meant_as_good, subfolders
from training.data.kolektor_sdd2 import is_kolektor_sdd2, read_kolektor_sdd2
from training.data.loco import is_loco, read_loco
from training.data.magnetic_tile import is_magnetic_tile, read_magnetic_tile
from training.data.mvtec import is_mvtec, read_mvtec
from training.data.mvtec_ad2 import is_mvtec_ad2, read_mvtec_ad2
from training.data.plain import is_plain, read_plain
from training.data.real_iad import SPLITS, is_real_iad, read_real_iad
from training.data.samples import Dataset, DatasetFault
from training.data.visa import is_visa, read_visa

# How much of a strange folder one message tells.
_TOLD_ENTRIES = 8


class Layout(NamedTuple):
    """How one kind of folder is known and read.

    Attributes:
        matches: whether a folder of one line has this layout.
        read: reads it.
        is_general: whether it claims only what no other layout does.
        parts: names of the layouts that read a part of the same folder each, as lines of their own.
    """

    matches: Callable[[Path], bool]
    read: Callable[[Path], Dataset]
    is_general: bool = False
    parts: tuple[str, ...] = ()


class Category(NamedTuple):
    """One line among those of a data set.

    Attributes:
        name: of the line.
        folder: what `read_dataset` takes.
        layout: how it is read.
    """

    name: str
    folder: Path
    layout: str


def _never(_: Path) -> bool:
    return False


LAYOUTS: dict[str, Layout] = {
    "loco": Layout(is_loco, read_loco),
    "mvtec_ad2": Layout(is_mvtec_ad2, read_mvtec_ad2),
    "visa": Layout(is_visa, read_visa),
    **{
        "real_iad" + splits.removeprefix(SPLITS[0]): Layout(
            partial(is_real_iad, splits=splits), partial(read_real_iad, splits=splits)
        )
        for splits in SPLITS
    },
    "btad": Layout(is_btad, read_btad),
    "magnetic_tile": Layout(is_magnetic_tile, read_magnetic_tile),
    "dagm": Layout(is_dagm, read_dagm),
    "kolektor_sdd2": Layout(is_kolektor_sdd2, read_kolektor_sdd2),
    "elpv": Layout(is_elpv, read_elpv, parts=("elpv_mono", "elpv_poly")),
    "elpv_mono": Layout(_never, partial(read_elpv, cell_type="mono")),
    "elpv_poly": Layout(_never, partial(read_elpv, cell_type="poly")),
    "elpv_doubtful": Layout(
        _never, partial(read_elpv, doubtful=True), parts=("elpv_doubtful_mono", "elpv_doubtful_poly")
    ),
    "elpv_doubtful_mono": Layout(_never, partial(read_elpv, cell_type="mono", doubtful=True)),
    "elpv_doubtful_poly": Layout(_never, partial(read_elpv, cell_type="poly", doubtful=True)),
    "mvtec": Layout(is_mvtec, read_mvtec, is_general=True),
    "plain": Layout(is_plain, read_plain, is_general=True),
}


def read_dataset(root: Path, layout: str | None = None) -> Dataset:
    """Read a data set, by the named layout or by the one that its folders show.

    Args:
        root: folder of one line.
        layout: a key of `LAYOUTS`, or None to find out.

    Raises:
        DatasetFault: if the folder does not exist, no layout or several fit, or the reader refuses the files.
    """
    _refuse_missing(root)
    if layout is not None:
        return _layout(layout).read(root)
    fitting = _fitting(root)
    if not fitting:
        _refuse_other_words_for_good(root)
        expected = "train/good with images, or a layout among " + ", ".join(LAYOUTS)
        raise DatasetFault(f"{root} has no layout that we know: expected {expected}. {_inside(root)}{_hint(root)}")
    return LAYOUTS[_only(root, fitting)].read(root)


def categories(root: Path, layout: str | None = None) -> tuple[Category, ...]:
    """Return the lines that a data set's folder holds, by name: itself, its parts, or the folders in it.

    Args:
        root: folder of a whole data set, or of one line.
        layout: a key of `LAYOUTS`, or None to find out.

    Raises:
        DatasetFault: if the folder does not exist, holds no line, or holds lines of several layouts.
    """
    _refuse_missing(root)
    if layout is not None:
        _layout(layout)
    if fitting := _fitting(root):
        found = layout or _only(root, fitting)
        parts = LAYOUTS[found].parts
        if parts:
            return tuple(Category(part.removeprefix(f"{found}_"), root, part) for part in parts)
        return (Category(root.resolve().name, root, found),)
    root = _folder_of_images(root)
    lines = [
        Category(folder.name, folder, layout or _only(folder, fits))
        for folder in subfolders(root)
        if (fits := _fitting(folder))
    ]
    if not lines:
        raise DatasetFault(f"{root} holds no line of a layout that we know. {_inside(root)}")
    seen = {line.layout: line.name for line in lines}
    if len(seen) > 1:
        told = ", ".join(f"{name} ({layout})" for layout, name in seen.items())
        raise DatasetFault(f"{root} holds lines of several layouts: {told}; give a folder with those of one data set.")
    return tuple(lines)


def _folder_of_images(root: Path) -> Path:
    """Step into the only size of Real-IAD that is here; other data sets have their lines in the root."""
    sizes = [
        path for path in subfolders(root) if path.name.startswith("realiad_") and path.name.split("_")[1] != "jsons"
    ]
    if len(sizes) > 1:
        raise DatasetFault(f"{root} holds several sizes; give one of {', '.join(str(size) for size in sizes)}.")
    return sizes[0] if sizes else root


def _refuse_missing(root: Path) -> None:
    if not root.is_dir():
        raise DatasetFault(f"{root} is no folder; give the folder of one line.")


def _refuse_other_words_for_good(root: Path) -> None:
    """Refuse a folder in which one rename is all that is missing; a list of layouts would hide it."""
    if meant := folders_meant_as_good(root / "train"):
        raise DatasetFault(
            f"{root} has no folder train/good, and {meant[0]} is named as if its frames were good; put them into "
            f"{root / 'train' / GOOD}."
        )


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise DatasetFault(f"There is no layout {name!r}; known are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def _fitting(root: Path) -> list[str]:
    claiming = [name for name, layout in LAYOUTS.items() if not layout.is_general and layout.matches(root)]
    return claiming or [name for name, layout in LAYOUTS.items() if layout.is_general and layout.matches(root)]


def _only(root: Path, fitting: list[str]) -> str:
    if len(fitting) > 1:
        raise DatasetFault(f"{root} could be read as {' or as '.join(fitting)}; say which with --layout.")
    return fitting[0]


def _inside(root: Path) -> str:
    """Tell what a folder holds, as far as one sentence can."""
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    if not entries:
        return "It is empty."
    left = len(entries) - _TOLD_ENTRIES
    return f"It holds {', '.join(entries[:_TOLD_ENTRIES])}{f' and {left} more' if left > 0 else ''}."


def _hint(root: Path) -> str:
    inside = [path.name for path in subfolders(root) if _fitting(path)]
    return f" Its folders look like lines of their own; give one of {', '.join(inside)}." if inside else ""
