"""Which files of a line's folder no reader took, told in one sentence, so that no frame is lost in silence.

Hidden files, what a file browser leaves behind, and texts and tables beside the frames are not minded.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from service.contract.legible import legible

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp"})
_SIDE_SUFFIXES = frozenset(
    {".txt", ".md", ".pdf", ".html", ".csv", ".tsv", ".xlsx", ".json", ".yaml", ".yml", ".xml", ".log", ".db", ".ini"}
)
_SIDE_NAMES = frozenset({"license", "licence", "readme", "copying", "notice"})
# How many folders one message names; the rest is counted.
_NAMED_FOLDERS = 5


def tell_passed_over(root: Path, taken: Iterable[Path], places: str) -> tuple[str, ...]:
    """Say how many files of each kind nobody took, folder by folder, and where frames are looked for.

    Args:
        root: a line's folder, or one of its folders.
        taken: frames and masks that were read.
        places: where this layout has its frames, for the sentence.

    Returns:
        One sentence of the files and one of folders that can't be looked into; none where everything was taken.
    """
    real_of = {path.resolve() for path in taken}
    left: dict[Path, Counter[str]] = {}
    unread: list[OSError] = []
    for path in _files_below(root, unread):
        if not _is_side_file(path) and path.resolve() not in real_of:
            left.setdefault(path.parent, Counter())[path.suffix.lower() or "without suffix"] += 1
    sentences = [*([_tell_left(left, places)] if left else []), *([_tell_unread(unread)] if unread else [])]
    return tuple(legible(sentence) for sentence in sentences)


def _tell_left(left: Mapping[Path, Counter[str]], places: str) -> str:
    told = [
        f"{', '.join(f'{count} {suffix}' for suffix, count in sorted(suffixes.items()))} in {folder}"
        for folder, suffixes in list(left.items())[:_NAMED_FOLDERS]
    ]
    if (more := len(left) - _NAMED_FOLDERS) > 0:
        told.append(f"and those of {more} more folders")
    count = sum(suffixes.total() for suffixes in left.values())
    return (
        f"{count} {'file is' if count == 1 else 'files are'} passed over: {'; '.join(told)}. Frames are read from "
        f"{places} where their names end in {', '.join(sorted(IMAGE_SUFFIXES))}; move or convert what belongs there."
    )


def _tell_unread(unread: Sequence[OSError]) -> str:
    told = [f"{error.filename} ({error.strerror})" for error in unread[:_NAMED_FOLDERS]]
    if (more := len(unread) - _NAMED_FOLDERS) > 0:
        told.append(f"and {more} more")
    folders = "1 folder" if len(unread) == 1 else f"{len(unread)} folders"
    return (
        f"{folders} can't be looked into: {', '.join(told)}. Nobody can tell whether frames are passed over in there."
    )


def _files_below(root: Path, unread: list[OSError]) -> Iterator[Path]:
    """Yield visible files at any depth, those of a folder that several links lead to once; note what can't be read."""
    seen: set[str] = set()
    for folder, names, files in os.walk(root, onerror=unread.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _is_side_file(path: Path) -> bool:
    return path.suffix.lower() in _SIDE_SUFFIXES or path.stem.lower() in _SIDE_NAMES
