"""Cutting feature maps into patches and putting them back."""

import torch

from models.blocks.patches import patchify, unpatchify


def test_patchify_when_a_map_is_cut_then_each_patch_is_a_block_of_it():
    """Patches come row by row; inside one, rows, then columns, then channels."""
    features = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)

    patches = patchify(features, 2)

    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], features[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_unpatchify_when_patches_are_put_together_then_the_map_is_back():
    """Cutting loses nothing, also where the map is not square."""
    features = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))

    assert torch.equal(unpatchify(patchify(features, 2), (2, 3), 2), features)
