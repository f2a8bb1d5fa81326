"""Where a network's input and its map lie on the original frame.

Pure arithmetic on sizes: no pixels, no files. Height comes before width; a window is `(top, left, height, width)` in
pixels of the original frame, as real numbers.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class InputSpec(BaseModel):
    """What a bundle's graph takes: frames resized to `resize_*`, then cropped about the centre to `height` and `width`.

    Methods that were published with a centre crop (448 to 392) keep it; the rim that is cut away is never inspected,
    and `window` says so to whoever asks. Without a crop the two sizes are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(gt=0, le=8192)
    width: int = Field(gt=0, le=8192)
    resize_height: int = Field(gt=0, le=8192)
    resize_width: int = Field(gt=0, le=8192)
    channel_order: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    resize: Literal["pillow-bilinear-antialias"] = "pillow-bilinear-antialias"
    scaled_jpeg_decode: Literal[True] = True

    @model_validator(mode="after")
    def _crop_lies_inside(self) -> Self:
        if self.height > self.resize_height or self.width > self.resize_width:
            raise ValueError("the crop must not be larger than the resized frame")
        return self

    @property
    def resize_target(self) -> tuple[int, int]:
        """`(height, width)` that the decoder may aim at."""
        return self.resize_height, self.resize_width

    def window(self, frame_height: int, frame_width: int) -> tuple[float, float, float, float]:
        """Return the inspected part of a frame as `(top, left, height, width)` in its own pixels."""
        scale_y, scale_x = frame_height / self.resize_height, frame_width / self.resize_width
        top, left = (self.resize_height - self.height) // 2, (self.resize_width - self.width) // 2
        return top * scale_y, left * scale_x, self.height * scale_y, self.width * scale_x


def plain_input(height: int, width: int) -> InputSpec:
    """Return the input without a crop."""
    return InputSpec(height=height, width=width, resize_height=height, resize_width=width)
