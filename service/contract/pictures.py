"""Whether a frame shows a picture at all: asked of every frame before the network sees it, whatever the detector is.

A covered lens, a dead lamp and a saturated sensor give a frame without a picture. A detector of good parts may find
nothing odd about that: where nothing is, nothing differs. So such a frame is no frame of the line, and is refused.

Measured is the contrast, the standard deviation of the grey levels that the network takes (of the green channel, which
every sensor samples most). Good parts say how much there must be: a quarter of what the least of the bundle's good
golden frames has. Golden frames are a handful, chosen over the whole range of scores, so that the quarter leaves room
for good parts with less. On magnetic tiles, boards and solar cells no test frame, good or defective, is below it, for
any of 2000 draws of eight good frames (tests/unit/service/contract/test_pictures.py). A black or white frame has none.

What it can't tell: a covered lens behind whose frame something else is drawn, such as a time in large digits, and parts
whose good frames have hardly any contrast themselves.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from service.errors import FrameNotComparable

_LEAST_SHARE = 0.25
_GREEN = 1


def contrast_of(canvas: NDArray[np.uint8]) -> float:
    """Return the standard deviation of a frame's grey levels, from 0 to 127.5.

    Args:
        canvas: `(H, W, 3)` uint8 RGB, what the network takes or is cut from.
    """
    _, deviation = cv2.meanStdDev(cv2.extractChannel(canvas, _GREEN))
    return float(deviation[0, 0])


def least_contrast(good: Iterable[NDArray[np.uint8]]) -> float:
    """Return the contrast below which a frame shows no picture of a line.

    Args:
        good: canvases `(H, W, 3)` uint8 RGB of good parts; at least one.
    """
    return _LEAST_SHARE * min(contrast_of(canvas) for canvas in good)


def refuse_blank(canvas: NDArray[np.uint8], least: float) -> None:
    """Refuse a frame that shows no picture.

    Args:
        canvas: `(H, W, 3)` uint8 RGB.
        least: contrast that it must have; 0 asks for none.

    Raises:
        FrameNotComparable: if it has less.
    """
    if least > 0 and contrast_of(canvas) < least:
        raise FrameNotComparable(
            "The frame is flat, as with a covered lens or without light: it has less than a quarter of the contrast of "
            "this line's good parts; look at camera and lamp."
        )
