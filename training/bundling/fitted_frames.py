"""Which frames a network was fitted on, as its bundle remembers them: by what their files hold.

A false-reject rate may only be promised of good parts that fitting never saw, also months later, when all that is left
of the run is the bundle. Frames that were saved again, as other files, are not recognised.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from service.contract.bundle import FITTED_FRAMES_FILE, Bundle
from service.errors import BundleRefused
from training.data.samples import Sample
from training.lines import GatheredLine

# Of a SHA-256 in hex: a million new frames beside a million fitted ones have one alike by chance in 1 of 10**7 cases.
_KEPT_DIGITS = 16
_KEPT = re.compile(f"[0-9a-f]{{{_KEPT_DIGITS}}}")


def fitted_frames_file(lines: Sequence[GatheredLine]) -> dict[str, bytes]:
    """Return the file of a bundle that remembers the frames of all its lines that fitting saw.

    Empty where nothing was fitted here: what the authors of a released detector fitted it on is not known.
    """
    digests = [line.data.content[sample.path] for line in lines for sample in line.fitted_on]
    return write_fitted_frames(digests) if digests else {}


def write_fitted_frames(digests: Iterable[str]) -> dict[str, bytes]:
    """Return the file of a bundle that remembers frames by the SHA-256 of their files, in hex."""
    kept = sorted({digest[:_KEPT_DIGITS] for digest in digests})
    return {FITTED_FRAMES_FILE: "".join(f"{digest}\n" for digest in kept).encode()}


def carry_fitted_frames_over(bundle: Bundle) -> dict[str, bytes]:
    """Return the file for another bundle with the same network; empty where this one does not remember."""
    return {FITTED_FRAMES_FILE: bundle.files[FITTED_FRAMES_FILE]} if remembers_fitted_frames(bundle) else {}


def remembers_fitted_frames(bundle: Bundle) -> bool:
    """Tell whether a bundle knows which frames it was fitted on; those of older releases don't."""
    return FITTED_FRAMES_FILE in bundle.files


def read_fitted_frames(bundle: Bundle) -> frozenset[str] | None:
    """Return what `those_fitted_on` recognises frames by, or None where the bundle does not know.

    Raises:
        BundleRefused: if the file is no list of digests.
    """
    data = bundle.files.get(FITTED_FRAMES_FILE)
    if data is None:
        return None
    kept = data.decode("ascii", errors="replace").splitlines()
    if not all(_KEPT.fullmatch(digest) for digest in kept):
        raise BundleRefused(f"{FITTED_FRAMES_FILE} is no list of digests; export the bundle again.")
    return frozenset(kept)


def those_fitted_on(samples: Iterable[Sample], content: Mapping[Path, str], fitted: frozenset[str]) -> list[Sample]:
    """Return those frames that fitting saw.

    Args:
        samples: the frames.
        content: SHA-256 in hex of each frame's file, by its path.
        fitted: as `read_fitted_frames` returns it.
    """
    return [sample for sample in samples if content[sample.path][:_KEPT_DIGITS] in fitted]
