"""The branch that INP-Former and INP-Former++ share, written out in NumPy and float64 from its paper and code."""

from typing import Any

import numpy as np

from tests.plain_networks import Array, array_of, attend, cosine, linear, normalise, perceptron


def draw_prototypes(detector: Any, fused: Array) -> Array:
    """Return P `(M, C)` of one image's F_Q `(N, C)`: T + attention over its tokens, then the hidden layers."""
    block = detector.extractor
    drawn = array_of(detector.prototype_tokens)
    queries = linear(normalise(drawn, block.norm1), block.attn.q)
    keys, values = np.split(linear(normalise(fused, block.norm1), block.attn.kv), 2, axis=1)
    drawn = drawn + linear(attend(queries, keys, values, block.attn.heads), block.attn.proj)
    return drawn + perceptron(normalise(drawn, block.norm2), block.mlp.fc1, block.mlp.fc2)


def rebuild(detector: Any, fused: Array) -> list[Array]:
    """Return what one image's F_Q `(N, C)` is rebuilt as, an entry for each of two groups of layers.

    A block keeps nothing of what comes in: its tokens are what rectified cosines, scaled head by head, read from the
    prototypes. The decoder's last outputs answer the backbone's first layers.
    """
    prototypes = draw_prototypes(detector, fused)
    x = perceptron(fused, detector.bottleneck.fc1, detector.bottleneck.fc2)
    outputs = []
    for block in detector.decoder:
        heads = block.attn.heads
        queries = np.split(linear(normalise(x, block.norm1), block.attn.q), heads, axis=1)
        pairs = np.split(linear(normalise(prototypes, block.norm1), block.attn.kv), 2 * heads, axis=1)
        read = []
        for head, scale in enumerate(array_of(block.attn.learn_scale).ravel()):
            q, k = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries[head], pairs[head]))
            read.append(np.maximum(scale * (q @ k.T), 0) @ pairs[heads + head])
        x = linear(np.concatenate(read, axis=1), block.attn.proj)
        x = x + perceptron(normalise(x, block.norm2), block.mlp.fc1, block.mlp.fc2)
        outputs.append(x)
    half = len(outputs) // 2
    return [np.mean(outputs[half:], axis=0), np.mean(outputs[:half], axis=0)]


def mine(targets: Array, rebuilt: Array, exponent: float) -> tuple[float, Array]:
    """Return the mined cosine distance of `(B, G, N, C)` and its gradient, image by image and token by token."""
    images, groups, tokens, _ = targets.shape
    value, gradient = 0.0, np.zeros_like(rebuilt)
    for group in range(groups):
        distance = np.array(
            [[1 - cosine(targets[b, group, n], rebuilt[b, group, n]) for n in range(tokens)] for b in range(images)]
        )
        for image in range(images):
            seen, made = targets[image, group].ravel(), rebuilt[image, group].ravel()
            alike = cosine(seen, made)
            value += (1 - alike) / (images * groups)
            slope = alike * made / (made @ made) - seen / np.sqrt((seen @ seen) * (made @ made))
            weight = (distance[image] / distance.mean()) ** exponent
            gradient[image, group] = weight[:, None] * slope.reshape(tokens, -1) / (images * groups)
    return value, gradient
