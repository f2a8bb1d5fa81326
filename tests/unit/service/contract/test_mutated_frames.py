"""A share of the mutations that `tests/benchmarks/mutations.py` sends by the ten thousand, straight to the decoder."""

import numpy as np

from service.contract.frames import Frame, FrameLimits, decode_image
from service.errors import CallerError
from tests.mutations import CUT, mutants, originals


def _decoded(data: bytes) -> Frame | None:
    try:
        return decode_image(data, FrameLimits(max_pixels=2**22))
    except CallerError:
        return None


def test_originals_when_decoded_then_are_sound():
    """The files that are damaged here were good before."""
    assert all(_decoded(data) is not None for _, data in originals(defect=True))


def test_decoder_when_files_are_damaged_then_gives_a_frame_or_the_callers_fault_and_nothing_else():
    """No damage raises anything but a fault that is answered with 4xx; a frame has the shape that it says."""
    for mutant in mutants(400, defect=True):
        frame = _decoded(mutant.data)

        assert frame is None or (frame.pixels.shape, frame.pixels.dtype) == ((frame.height, frame.width, 3), np.uint8)


def test_decoder_when_a_file_is_cut_then_gives_no_frame():
    """Pixels that are missing are never made up: what was cut off may have been the defect."""
    cut = [mutant for mutant in mutants(800, defect=True, seed=1) if mutant.kind == CUT]

    assert [mutant.media_type for mutant in cut if _decoded(mutant.data) is not None] == []
