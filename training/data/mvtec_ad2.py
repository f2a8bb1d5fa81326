"""The MVTec AD 2 layout: several lights for each object, and test frames whose ground truth its makers keep.

    <root>/train/good/NNN_<light>.png, <root>/validation/good/NNN_<light>.png
    <root>/test_public/{good,bad}/NNN_<light>.png
    <root>/test_public/ground_truth/bad/NNN_<light>_mask.png
    <root>/test_private/NNN_<light>.png, <root>/test_private_mixed/NNN_<light>.png     flat, no label

Heckler-Kram et al., "The MVTec AD 2 Dataset", arXiv:2503.21622. Some archives unpack to `<category>/<category>/`; the
outer folder can be given. Frames of the private splits have an unknown label, so no figure is measured on them. The
makers integrate AUPRO up to 5 % of the good pixels, and measure SegF1, the F1 of all pixels at one threshold an object
that no test label chooses. Their own words for that threshold couldn't be read. Ours is the common rule, mean + 3
standard deviations of the pixels of the validation frames; RoBiS (Li et al., arXiv:2505.21152), which is about this
data set, calls mean + 3 std the traditional one. The makers' headlines are those of the private splits, which their
server measures; ours are those of the public one.
"""

import re
from dataclasses import replace
from pathlib import Path

from training.data.folders import GOOD, anomalous_samples, find_images, good_samples
from training.data.samples import UNKNOWN, Dataset, DatasetFault, Sample, make_dataset

_PUBLIC = "test_public"
_PRIVATE = ("test_private", "test_private_mixed")
_AUPRO_LIMIT = 0.05
_OBJECT = re.compile(r"\d{3,}")


def is_mvtec_ad2(root: Path) -> bool:
    """Tell whether a folder has this layout: it, or the folder of its own name inside, has public test frames."""
    return (_unnested(root) / _PUBLIC).is_dir()


def read_mvtec_ad2(root: Path) -> Dataset:
    """Read one category.

    Raises:
        DatasetFault: if there is no good frame, a public mask does not fit to the images, or a frame of the private
            splits lies in a folder that would give its label away.
    """
    inner = _unnested(root)
    public = inner / _PUBLIC
    samples = [
        *good_samples(inner / "train" / GOOD, "train"),
        *good_samples(inner / "validation" / GOOD, "validation"),
        *good_samples(public / GOOD, "test"),
        *anomalous_samples(public / "bad", public / "ground_truth" / "bad"),
    ]
    for name in _PRIVATE:
        samples += _unlabelled_samples(inner / name)
    return make_dataset(root, "mvtec_ad2", [_grouped(sample) for sample in samples])


def _unlabelled_samples(folder: Path) -> list[Sample]:
    frames = find_images(folder)
    deeper = [path for path in frames if path.parent != folder]
    if deeper:
        raise DatasetFault(f"{deeper[0]} lies in a folder of its own; expected all frames directly in {folder}.")
    return [Sample(path, "test", UNKNOWN, folder.name) for path in frames]


def _grouped(sample: Sample) -> Sample:
    """Give frames of one object under several lights one group; numbers begin anew in each folder."""
    number = _OBJECT.match(sample.path.name)
    group = None if number is None else f"{sample.split}/{sample.kind}/{number.group()}"
    return replace(sample, group=group, aupro_limit=_AUPRO_LIMIT, seg_f1=True)


def _unnested(root: Path) -> Path:
    inner = root / root.resolve().name
    return inner if inner.is_dir() and not (root / _PUBLIC).is_dir() else root
