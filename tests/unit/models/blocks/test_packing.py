"""Maps of several sizes in one row, and back."""

import torch

from models.blocks.packing import pack, unpack


def test_unpacked_maps_are_those_that_were_packed():
    """Nothing is lost or moved, for any number of frames, and each frame keeps its own row."""
    shapes = [(2, 4, 6), (3, 2, 3)]
    maps = [torch.rand(5, *shape) for shape in shapes]

    packed = pack(maps)
    unpacked = unpack(packed[3:4], shapes)

    assert packed.shape == (5, 48 + 18)
    assert all(torch.equal(one[3:4], other) for one, other in zip(maps, unpacked, strict=True))
