"""Seeded streams of generated frames, as a small camera would take them of generated canvases.

Everything follows from `(seed, shard)`: a shard is the same whether it is drawn first, last, or by another process.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from service.contract.frames import fit_to_input
from service.contract.geometry import plain_input
from training.procedural.scenes import draw_canvas
from training.procedural.textures import draw_texture

Bytes = NDArray[np.uint8]

_TEXTURE, _CANVAS, _CROP = 1, 2, 3  # keeps the three kinds of randomness apart
_CROPS_PER_CANVAS = 16
_CANVASES_PER_NEW_TEXTURE = 8


class FrameStream:
    """An endless, repeatable supply of generated frames.

    Textures are drawn once and used by many canvases; every eighth canvas one is replaced, so long streams never
    settle on a stock of textures.

    Args:
        seed: two streams with different seeds share nothing.
        frame_size: pixels a side of the frames.
        canvas_size: pixels a side of the canvases that frames are cut from.
        texture_count: textures in use at a time.
        shard_size: frames in a shard, a multiple of 16; a shard is shuffled as a whole, because the 16 frames of one
            canvas are alike.
    """

    def __init__(
        self,
        seed: int,
        *,
        frame_size: int = 128,
        canvas_size: int = 512,
        texture_count: int = 120,
        shard_size: int = 512,
    ) -> None:
        if shard_size % _CROPS_PER_CANVAS:
            raise ValueError(f"shard_size must be a multiple of {_CROPS_PER_CANVAS}, not {shard_size}")
        self.seed = seed
        self.frame_size = frame_size
        self.canvas_size = canvas_size
        self.texture_count = texture_count
        self.shard_size = shard_size
        self._textures: OrderedDict[int, Bytes] = OrderedDict()

    def shard(self, index: int) -> Bytes:
        """Draw shard number `index`: `(shard_size, frame_size, frame_size, 3)` uint8 RGB."""
        canvases = self.shard_size // _CROPS_PER_CANVAS
        crops = np.random.default_rng((self.seed, _CROP, index))
        noise = crops.standard_normal(2**20, dtype=np.float32)
        frames = np.empty((self.shard_size, self.frame_size, self.frame_size, 3), np.uint8)
        order = crops.permutation(self.shard_size)
        for number in range(canvases):
            canvas = self.canvas(index * canvases + number)
            for crop in range(_CROPS_PER_CANVAS):
                frames[order[number * _CROPS_PER_CANVAS + crop]] = self._take(crops, canvas, noise)
        return frames

    def shards(self, start: int = 0) -> Iterator[Bytes]:
        """Draw shard after shard without end."""
        while True:
            yield self.shard(start)
            start += 1

    def canvas(self, number: int) -> Bytes:
        """Paint canvas `number`: `(canvas_size, canvas_size, 3)` uint8 RGB."""
        oldest = number // _CANVASES_PER_NEW_TEXTURE
        for stale in [key for key in self._textures if not oldest <= key < oldest + self.texture_count]:
            del self._textures[stale]
        textures = [self._texture(key) for key in range(oldest, oldest + self.texture_count)]
        return draw_canvas(np.random.default_rng((self.seed, _CANVAS, number)), textures, self.canvas_size)

    def _texture(self, number: int) -> Bytes:
        """Draw texture `number`, or find it again; a quarter larger than the canvas, so that patches vary."""
        if number not in self._textures:
            rng = np.random.default_rng((self.seed, _TEXTURE, number))
            self._textures[number] = draw_texture(rng, self.canvas_size * 5 // 4)
        return self._textures[number]

    def _take(self, rng: Generator, canvas: Bytes, noise: NDArray[np.float32]) -> Bytes:
        """Cut one frame at a random scale, place and orientation, and pass it through a modest camera."""
        size = self.frame_size
        longest = min(2.2 * size, canvas.shape[0])
        side = int(np.exp(rng.uniform(np.log(0.5 * size), np.log(longest))))
        top, left = rng.integers(0, canvas.shape[0] - side + 1, 2)
        cut = np.rot90(canvas[top : top + side, left : left + side], int(rng.integers(4)))
        if rng.random() < 0.5:
            cut = cut[:, ::-1]
        cut = _tone_curve(rng)[cut]
        if rng.random() < 0.15:
            cut = np.repeat(cut.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
        frame = fit_to_input(np.ascontiguousarray(cut), plain_input(size, size))
        if rng.random() < 0.3:
            frame = _blur(frame, rng.uniform(0.05, 0.33))
        if rng.random() < 0.5:
            frame = _add_noise(rng, frame, noise)
        return frame


def draw_frame(seed: int, height: int = 256, width: int = 256) -> Bytes:
    """Draw one generated frame, `(height, width, 3)` uint8 RGB; slow (it draws its own textures), made for tests."""
    size = max(height, width)
    stream = FrameStream(seed, canvas_size=size, texture_count=8)
    return stream.canvas(0)[:height, :width].copy()


def _tone_curve(rng: Generator) -> Bytes:
    """Draw a camera's response: exposure, gamma and black level, sometimes a negative."""
    level = np.linspace(0, 1, 256)
    if rng.random() < 0.1:
        level = level[::-1]
    curve = level ** np.exp(rng.uniform(-0.5, 0.5)) * rng.uniform(0.6, 1.3) + rng.uniform(-0.1, 0.15)
    return cast("Bytes", (np.clip(curve, 0, 1) * 255).astype(np.uint8))


def _blur(frame: Bytes, weight: float) -> Bytes:
    """Blur with the kernel `(weight, 1 - 2 weight, weight)` along both axes; the rim keeps its values."""
    out = frame.astype(np.float32)
    out[1:-1] += weight * (out[2:] + out[:-2] - 2 * out[1:-1])
    out[:, 1:-1] += weight * (out[:, 2:] + out[:, :-2] - 2 * out[:, 1:-1])
    return out.astype(np.uint8)


def _add_noise(rng: Generator, frame: Bytes, noise: NDArray[np.float32]) -> Bytes:
    """Add sensor noise, shared by the channels or one for each, taken from a block of normal noise."""
    height, width, _ = frame.shape
    channels = 1 if rng.random() < 0.5 else 3
    start = int(rng.integers(len(noise) - height * width * channels))
    grain = noise[start : start + height * width * channels].reshape(height, width, channels)
    amount = np.float32(rng.uniform(0, 1) ** 2 * 20)
    return np.clip(frame + amount * grain, 0, 255).astype(np.uint8)
