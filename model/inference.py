"""Class maps of photos at their own size: several scales, mirror images, overlapping tiles."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model import UserError
from model.transforms import squashed, to_input

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has it

OVERLAP = 0.25  # of a tile, at least, with its neighbour
TILES_AT_ONCE = 8
BAND_VALUES = 2**22  # classes x rows x columns that are upsampled at a time


@dataclass(frozen=True)
class Window:
    """A part of a photo and what a network makes of it: maps of logits (C, h, w), one a scale and mirroring."""

    box: Box
    maps: Sequence[Tensor]


class Segmenter:
    """A network and how it is asked.

    Args:
        model: gives logits (B, C, S, S) of normalized images (B, 3, S, S).
        device: where the model is.
        image_size: S that it was trained at.
        scales: multiples of S at which each photo is looked at; their probabilities are averaged.
        flip: look at the mirror image too.
        autocast: makes the context that the network computes in.
        input_options: the keywords of transforms.to_input.

    Raises:
        UserError: a scale leaves fewer than 32 pixels, or is none.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        image_size: int,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        **input_options: bool,
    ):
        self.model, self.device = model.eval(), device
        self.flip = flip
        self.autocast = autocast
        self.input_options = input_options
        if not scales or not all(32 <= scale * image_size <= 16384 for scale in scales):
            raise UserError(
                f"scales {' '.join(f'{scale:g}' for scale in scales)} of {image_size} pixels: "
                "each must leave from 32 to 16384"
            )
        self.sizes = [round(scale * image_size) for scale in scales]  # of the squares that the network reads

    @torch.inference_mode()
    def logits(self, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """For each photo its maps, float32 (C, S, S); inputs are those of squashed(photos, sizes)."""
        maps = []
        with self.autocast():
            for images in inputs:
                x = to_input(images, self.device, **self.input_options)
                maps.append(self.model(x).float())
                if self.flip:
                    maps.append(self.model(x.flip(-1)).flip(-1).float())
        return map(list, zip(*maps, strict=True))

    @torch.inference_mode()
    def segment(self, photo: Image.Image, *, tile: int | None = None) -> Tensor:
        """uint8 (H, W) on the device: the class of every pixel of an RGB photo.

        The photo is squashed to the network's input as a whole, or tile by tile of that many pixels a side.
        """
        boxes = tiles(photo.width, photo.height, tile or max(photo.size))

        def windows() -> Iterator[Window]:
            for start in range(0, len(boxes), TILES_AT_ONCE):
                part = boxes[start : start + TILES_AT_ONCE]
                maps = self.logits(squashed([photo.crop(box) for box in part], self.sizes))
                yield from map(Window, part, maps)

        return class_map(windows(), width=photo.width, height=photo.height)


def tiles(width: int, height: int, side: int) -> list[Box]:
    """Squares that cover a photo, by rows, evenly spread, each overlapping the next by a quarter of its side or more.

    Where the photo is narrower or lower than a square, so are they.
    """

    def starts(length: int) -> list[int]:
        count = 1 + -(-max(0, length - side) // max(1, int(side * (1 - OVERLAP))))
        return [index * (length - side) // (count - 1) if index else 0 for index in range(count)]

    return [
        (left, top, min(left + side, width), min(top + side, height))
        for top in starts(height)
        for left in starts(width)
    ]


@torch.inference_mode()
def class_map(windows: Iterable[Window], *, width: int, height: int) -> Tensor:
    """uint8 (H, W): the class with the highest mean probability at every pixel.

    Logits are upsampled bilinearly to the size of their box (align_corners=False: the photo was shrunk with pixels
    taken as areas). Where boxes overlap, each counts the less the nearer its edge. A single map of the whole photo
    gives the largest upsampled logit, which is the protocol of the VOC challenge.

    Bands of rows are finished one after another, so memory does not grow with the photo.

    Args:
        windows: in the order of their upper edges; together they cover the photo.
    """
    windows = iter(windows)
    coming = next(windows)
    device, classes = coming.maps[0].device, len(coming.maps[0])
    result = torch.empty(height, width, dtype=torch.uint8, device=device)
    band = max(1, BAND_VALUES // (classes * width))
    present: list[Window] = []
    for top in range(0, height, band):
        bottom = min(top + band, height)
        while coming is not None and coming.box[1] < bottom:
            present.append(coming)
            coming = next(windows, None)
        present = [window for window in present if window.box[3] > top]
        result[top:bottom] = _scores(present, range(top, bottom), width).max(0).indices  # several times argmax's speed
    return result


def _scores(windows: Sequence[Window], rows: range, width: int) -> Tensor:
    """(C, rows, width): sums of weighted probabilities, or the logits where there is only one map of them."""
    first = windows[0].maps[0]
    total = first.new_zeros(len(first), len(rows), width)
    for window in windows:
        left, top, right, bottom = window.box
        part = range(max(rows.start, top), min(rows.stop, bottom))
        within = range(part.start - top, part.stop - top)
        for logits in window.maps:
            values = _upsampled(logits, within, right - left, bottom - top)
            if len(windows) > 1 or len(window.maps) > 1:
                values = values.softmax(0)
            if len(windows) > 1:
                weight = _weight(within, bottom - top).unsqueeze(1) * _weight(range(right - left), right - left)
                values = values.mul_(weight.to(values))
            total[:, part.start - rows.start : part.stop - rows.start, left:right] += values
    return total


def _weight(positions: range, length: int) -> Tensor:
    """Of pixels in a tile: 1, and falling linearly over the overlap to its edges."""
    position = torch.arange(positions.start, positions.stop)
    to_edge = torch.minimum(position, length - 1 - position) + 1
    return (to_edge / max(1, OVERLAP * length)).clamp(max=1)


def _upsampled(logits: Tensor, rows: range, width: int, height: int) -> Tensor:
    """Some rows of F.interpolate(logits, (height, width), mode="bilinear"): (C, h, w) -> (C, rows, width)."""
    last = logits.shape[1] - 1
    y = torch.arange(rows.start, rows.stop, device=logits.device, dtype=torch.float64)
    y = ((y + 0.5) * ((last + 1) / height) - 0.5).clamp(0, last)
    above = y.long()
    share = (y - above).to(logits.dtype).view(1, -1, 1)
    below = (above + 1).clamp(max=last)
    lines = torch.lerp(logits.index_select(1, above), logits.index_select(1, below), share)
    return F.interpolate(lines.flatten(0, 1).unsqueeze(0), size=width, mode="linear").view(-1, len(rows), width)
