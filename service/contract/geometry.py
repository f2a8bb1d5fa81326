"""Where a network's input and its map lie on the original frame.

Pure arithmetic on sizes: no pixels, no files. Height comes before width; a window is `(top, left, height, width)` in
pixels of the original frame, as real numbers.

A frame becomes what the network takes in three steps: it is resized to `resize_height` x `resize_width`, cropped about
the centre to the canvas, and the canvas is cut into tiles of `height` x `width`. Most bundles have one tile, which is
the canvas. A network that shall see small defects of a large frame looks at several that overlap; their maps are
stitched to one map of the canvas (`tiling.py`), and the frame's score is reduced from that.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST_TILES = 64


class Tiling(BaseModel):
    """How a canvas is cut: `rows` x `columns` tiles of the network's size, each overlapping the next.

    Attributes:
        rows: of tiles.
        columns: of tiles.
        overlap_height: pixels that a tile shares with the one below it.
        overlap_width: pixels that a tile shares with the one to its right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1, le=_MOST_TILES)
    columns: int = Field(ge=1, le=_MOST_TILES)
    overlap_height: int = Field(ge=0)
    overlap_width: int = Field(ge=0)

    @model_validator(mode="after")
    def _tiles_are_few(self) -> Self:
        if self.rows * self.columns > _MOST_TILES:
            raise ValueError(f"at most {_MOST_TILES} tiles are cut from a frame")
        return self

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return self.rows * self.columns


class NetworkInput(BaseModel):
    """What a network takes, as a run's configuration says it: frames resized to `resize_*`, then cropped to its size.

    Methods that were published with a centre crop (448 to 392) keep it; the rim that is cut away is never inspected,
    and `InputSpec.window` says so to whoever asks. Without a crop the two sizes are equal.

    Attributes:
        height: of what the network takes.
        width: of what the network takes.
        resize_height: of the frame before the crop.
        resize_width: of the frame before the crop.
        channel_order: of the pixels.
        dtype: of the pixels.
        resize: the one resize.
        scaled_jpeg_decode: whether a JPEG may be decoded at reduced scale.
        bit_depth: how many bits the values of 16-bit files, and of raw `Mono16`, really have. Cameras write 10 or 12
            bits into the lower end of 16; the upper eight of the bits named here are kept.
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
    bit_depth: int = Field(default=16, ge=8, le=16)

    @model_validator(mode="after")
    def _crop_lies_inside(self) -> Self:
        if self.height > self.resize_height or self.width > self.resize_width:
            raise ValueError("the crop must not be larger than the resized frame")
        return self


class InputSpec(NetworkInput):
    """What becomes of a frame, as a bundle's manifest says it: the network's input, and how the canvas is cut for it.

    Attributes:
        tiles: how the canvas is cut; None where it is the network's input itself.
    """

    tiles: Tiling | None = None

    @model_validator(mode="after")
    def _tiles_fit(self) -> Self:
        if self.tiles is None:
            return self
        # A tile that reaches past its neighbour would be blended with a third one.
        if 2 * self.tiles.overlap_height > self.height or 2 * self.tiles.overlap_width > self.width:
            raise ValueError("tiles must not overlap by more than half of their size")
        if self.canvas_height > self.resize_height or self.canvas_width > self.resize_width:
            raise ValueError("the tiles must not cover more than the resized frame")
        return self

    @property
    def canvas_height(self) -> int:
        """Rows of the canvas: of all tiles together."""
        return self.height if self.tiles is None else _extent(self.height, self.tiles.overlap_height, self.tiles.rows)

    @property
    def canvas_width(self) -> int:
        """Columns of the canvas: of all tiles together."""
        return self.width if self.tiles is None else _extent(self.width, self.tiles.overlap_width, self.tiles.columns)

    @property
    def tile_count(self) -> int:
        """How many network inputs a frame is."""
        return 1 if self.tiles is None else self.tiles.count

    @property
    def tile_corners(self) -> tuple[tuple[int, int], ...]:
        """`(top, left)` of each tile on the canvas, row by row."""
        if self.tiles is None:
            return ((0, 0),)
        step_y, step_x = self.height - self.tiles.overlap_height, self.width - self.tiles.overlap_width
        return tuple(
            (row * step_y, column * step_x) for row in range(self.tiles.rows) for column in range(self.tiles.columns)
        )

    @property
    def resize_target(self) -> tuple[int, int]:
        """`(height, width)` that the decoder may aim at."""
        return self.resize_height, self.resize_width

    def window(self, frame_height: int, frame_width: int) -> tuple[float, float, float, float]:
        """Return the inspected part of a frame as `(top, left, height, width)` in its own pixels."""
        scale_y, scale_x = frame_height / self.resize_height, frame_width / self.resize_width
        top, left = (self.resize_height - self.canvas_height) // 2, (self.resize_width - self.canvas_width) // 2
        return top * scale_y, left * scale_x, self.canvas_height * scale_y, self.canvas_width * scale_x

    def overlap_cells(self, map_height: int, map_width: int) -> tuple[int, int]:
        """Return how many cells the maps of neighbouring tiles share, down and across.

        Args:
            map_height: of one tile's map.
            map_width: of one tile's map.

        Raises:
            ValueError: if tiles overlap by a part of a map's cell.
        """
        if self.tiles is None:
            return 0, 0
        down, rest_down = divmod(self.tiles.overlap_height * map_height, self.height)
        across, rest_across = divmod(self.tiles.overlap_width * map_width, self.width)
        if rest_down or rest_across:
            raise ValueError("tiles must overlap by whole cells of the anomaly map")
        return down, across

    def stitched_size(self, map_height: int, map_width: int) -> tuple[int, int]:
        """Return `(height, width)` of the map of the canvas.

        Args:
            map_height: of one tile's map.
            map_width: of one tile's map.

        Raises:
            ValueError: if tiles overlap by a part of a map's cell.
        """
        if self.tiles is None:
            return map_height, map_width
        down, across = self.overlap_cells(map_height, map_width)
        return _extent(map_height, down, self.tiles.rows), _extent(map_width, across, self.tiles.columns)


def plain_input(height: int, width: int) -> InputSpec:
    """Return the input without a crop."""
    return InputSpec(height=height, width=width, resize_height=height, resize_width=width)


def _extent(side: int, overlap: int, count: int) -> int:
    return side + (count - 1) * (side - overlap)
