"""Train, validation and test folders with masks beside them: what several layouts share.

    train/good/**                        good frames to fit on
    validation/good/** or val/good/**    good frames kept out of fitting, optional
    test/good/**, test/<kind>/**         optional
    ground_truth/<kind>/**               masks, optional: `<stem>_mask.*` or `<stem>.*`

Images are paired with masks by their name, never by sorted order. `good` may be written in capitals. A test folder with
another common word for good parts is refused, since its frames would count as defects.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from training.data.passed_over import IMAGE_SUFFIXES, tell_passed_over
from training.data.samples import ANOMALOUS, NORMAL, Dataset, DatasetFault, Sample, Split, make_dataset

GOOD = "good"
PLACES = "train/good, validation/good, test/good and test/<kind>, masks from ground_truth/<kind>,"
# What plants call good parts; German ones say "in Ordnung".
_OTHER_WORDS_FOR_GOOD = frozenset({"ok", "pass", "normal", "gut", "io", "i.o."})
_VALIDATION_FOLDERS = ("validation", "val")
_MASK_ENDING = "_mask"


def find_images(folder: Path, *, nested: bool = True) -> list[Path]:
    """Return the image files of a folder by their suffix, sorted; hidden files and folders are passed over.

    Linked files and folders count like others.

    Raises:
        DatasetFault: if a link leads nowhere, or a linked folder is one that is read anyway.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in (_files_below(folder, set()) if nested else _visible(folder))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield files at any depth; `seen` holds the real places of folders, so that no link leads round in a circle."""
    real = folder.resolve()
    if real in seen:
        raise DatasetFault(f"{folder} is the folder {real}, whose frames are read already; take the link away.")
    seen.add(real)
    for path in _visible(folder):
        if path.is_dir():
            yield from _files_below(path, seen)
        else:
            yield path


def _visible(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    lost = sorted(path for path in found if path.is_symlink() and not path.exists())
    if lost:
        raise DatasetFault(*(f"{path} is a link that leads nowhere; mend it or take it away." for path in lost))
    return found


def told_dataset(
    root: Path, layout: str, samples: Sequence[Sample], places: str, good_folder: str = "train/good"
) -> Dataset:
    """Make a data set of a layout that takes every image of a line's folder, with a note on the files that it did not.

    Args:
        root: as of `make_dataset`, like the others.
        layout: name of the reader.
        samples: in any order.
        places: where this layout has its frames, for the note.
        good_folder: where it keeps its good frames for training.

    Raises:
        DatasetFault: as `make_dataset`.
    """
    taken = [path for sample in samples for path in (sample.path, *sample.mask_paths)]
    return make_dataset(root, layout, samples, good_folder, tell_passed_over(root, taken, places))


def good_samples(folder: Path, split: Split) -> list[Sample]:
    """Return every image of a folder as a good frame."""
    return [Sample(path, split, NORMAL, GOOD) for path in find_images(folder)]


def read_split_folders(root: Path) -> list[Sample]:
    """Read the folders named in this file's docstring; missing ones are empty.

    Raises:
        DatasetFault: if a mask belongs to no image or to a good one, an image and its mask can't be paired clearly, or
            a test folder's name is another word for good.
    """
    samples = [one for folder in good_folders(root / "train") for one in good_samples(folder, "train")]
    for name in _VALIDATION_FOLDERS:
        samples += [one for folder in good_folders(root / name) for one in good_samples(folder, "validation")]
    samples += [one for folder in good_folders(root / "test") for one in good_samples(folder, "test")]
    kinds = defect_folders(root / "test")
    for kind in kinds:
        samples += anomalous_samples(kind, root / "ground_truth" / kind.name)
    _refuse_stray_masks(root, {kind.name for kind in kinds})
    return samples


def good_folders(folder: Path) -> list[Path]:
    """Return the folders of good frames in a folder: `good`, however capitalised; mostly one, perhaps none."""
    return [path for path in subfolders(folder) if path.name.casefold() == GOOD]


def defect_folders(folder: Path) -> list[Path]:
    """Return the other folders in a folder of test frames, one for each kind of defect.

    Raises:
        DatasetFault: if one with frames has another word for good as its name.
    """
    kinds = [path for path in subfolders(folder) if path.name.casefold() != GOOD]
    doubtful = folders_meant_as_good(folder)
    if doubtful:
        raise DatasetFault(
            *(
                f"{kind} is named as if its frames were good, and they would count as defects; if they are good, put "
                f"them into {kind.parent / GOOD}, else name the folder after the defect."
                for kind in doubtful
            )
        )
    return kinds


def anomalous_samples(images: Path, masks: Path) -> list[Sample]:
    """Return every image of a folder as an anomalous test frame of the folder's kind, with the mask of its name.

    Args:
        images: folder of one kind of defect.
        masks: folder of its masks, `<stem>_mask.*` or `<stem>.*`; without any mask all frames have none.

    Raises:
        DatasetFault: if a mask has no image, or two files have one name.
    """
    mask_files = find_images(masks)
    if not mask_files:
        return [Sample(path, "test", ANOMALOUS, images.name) for path in find_images(images)]
    mask_of = by_name(masks, mask_files, _MASK_ENDING)
    image_of = by_name(images, find_images(images), "")
    stray = sorted(set(mask_of) - set(image_of))
    if stray:
        first, *others = (
            f"{mask_of[key]} is a mask without an image; add {images / key} or remove the mask." for key in stray
        )
        raise DatasetFault(first, *tell_passed_over(images, image_of.values(), str(images)), *others)
    return [Sample(path, "test", ANOMALOUS, images.name, mask_of.get(key)) for key, path in image_of.items()]


def by_name(folder: Path, files: Iterable[Path], ending: str) -> dict[str, Path]:
    """Key files by their path inside the folder, without suffix and ending.

    Raises:
        DatasetFault: if two files would have one key.
    """
    named: dict[str, Path] = {}
    for path in files:
        key = path.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if key in named:
            raise DatasetFault(f"{named[key]} and {path} have the same name, so masks can't be paired; rename one.")
        named[key] = path
    return named


def _refuse_stray_masks(root: Path, kinds: set[str]) -> None:
    for folder in subfolders(root / "ground_truth"):
        masks = find_images(folder)
        if masks and folder.name.casefold() == GOOD:
            raise DatasetFault(f"{masks[0]} is a mask for a good image; remove it, or move the image to its defect.")
        if masks and folder.name not in kinds:
            frames = root / "test" / folder.name
            alike = like_named(frames)
            raise DatasetFault(
                f"{masks[0]} is a mask without an image; add {frames} or remove the mask."
                if alike is None
                else f"{masks[0]} is a mask without an image, and {alike} differs from {frames} in capitals alone; "
                "give the folders of frames and of their masks the same name."
            )


def like_named(folder: Path) -> Path | None:
    """Return the folder beside a missing one whose name differs from its in nothing but capitals; None without one."""
    beside = (path for path in subfolders(folder.parent) if path.name.casefold() == folder.name.casefold())
    return next((path for path in beside if path.name != folder.name), None)


def folders_meant_as_good(folder: Path) -> list[Path]:
    """Return the folders in a folder that hold frames and whose name is another word for good."""
    return [path for path in subfolders(folder) if path.name.casefold() in _OTHER_WORDS_FOR_GOOD and find_images(path)]


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, hidden ones passed over; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in _visible(folder) if path.is_dir())
