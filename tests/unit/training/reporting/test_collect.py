"""Promises of what is gathered for a page: what is not inspected shows no heat."""

import numpy as np

from training.reporting.collect import leave_out


def test_leave_out_when_painted_then_what_is_not_inspected_is_the_dimmed_frame_without_heat():
    """Heat outside would look like something that was found; a line shows the edge on black and on white frames."""
    pixels, painted = np.full((40, 60, 3), 100, np.uint8), np.full((40, 60, 3), 200, np.uint8)
    inspected = np.zeros((8, 8), bool)
    inspected[:, :4] = True

    leave_out(painted, pixels, inspected, (0.0, 10.0, 40.0, 40.0))

    assert (painted[2:-2, 12:28] == 200).all()
    assert (painted[:, :8] == 40).all()
    assert (painted[:, 33:] == 40).all()
    assert (painted[20, 29:31] > 200).any()
