"""Class maps of photos at their own size: several scales, mirror images, overlapping tiles; batch norm folded."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from model import UserError
from model.layouts import Split
from model.parallel import is_plain_batch_norm
from model.transforms import PADDING, RESIZES, Box, Colour, squares, to_input

OVERLAP = 0.25  # of a tile, at least, with its neighbour
PIXELS_AT_ONCE = 8 * 224**2  # that the network reads from tiles
CUT_AT_ONCE = 2**24  # pixels of tiles, before they are resized
BAND_VALUES = 2**20  # classes x rows x columns that are upsampled at a time: more does not fit the processor's cache


class Segmenter:
    """Segments photos of any size with a network.

    Args:
        model: gives logits (B, C, S, S) of normalized images (B, 3, S, S).
        image_size, resize, padding: S, one of transforms.RESIZES, and the colour beside a photo, as in training.
        scales: multiples of S, each leaving 32 to 16384 pixels, at which photos are predicted; probabilities are
            averaged.
        flip: average with the mirror image too.
        autocast: makes the context that the network computes in.
        input_options: the keywords of transforms.to_input.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        image_size: int,
        resize: str = "squash",
        padding: Colour = PADDING,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        **input_options: Any,
    ):
        self.model, self.device = model.eval(), device
        self.resize, self.padding, self.flip = resize, padding, flip
        self.autocast, self.input_options = autocast, input_options
        if not scales or not all(32 <= scale * image_size <= 16384 for scale in scales):
            raise UserError(f"scales {scales} of {image_size} pixels: each must leave from 32 to 16384")
        # The sides of what the network reads: even, so that the maps of its stages are halves of one another.
        self.sizes = [image_size if scale == 1 else 2 * round(scale * image_size / 2) for scale in scales]

    @torch.inference_mode()
    def logits(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
        """Yield the maps of each photo, float32 (C, h, w), without what was padded.

        inputs are those of squares(photos, self.sizes, self.resize, self.padding), sizes the photos' (width, height).
        """
        maps = []
        with self.autocast():
            for images in inputs:
                x = to_input(images, self.device, **self.input_options)
                maps.append(self.model(x).float())
                if self.flip:
                    maps.append(self.model(x.flip(-1)).flip(-1).float())
        for size, photo in zip(sizes, zip(*maps, strict=True), strict=True):
            boxes = (RESIZES[self.resize](*size, logits.shape[-1]) for logits in photo)
            yield [x[:, top:bottom, left:right] for x, (left, top, right, bottom) in zip(photo, boxes, strict=True)]

    @torch.inference_mode()
    def segment(self, photo: Image.Image, *, tile: int | None = None) -> Tensor:
        """Return uint8 (H, W) on the device: the class of every pixel of an RGB photo.

        The photo is resized to the network's input as a whole, or tile by tile of that many pixels a side.
        """
        if getattr(photo, "mode", "") != "RGB":  # indices of a palette, say, would pass for grey
            raise UserError("a photo must be a Pillow image of mode RGB, as read_photo(file) of predict.py returns")
        if tile is None or tile >= max(photo.size):
            (maps,) = self._look([photo])
            return class_map(maps, width=photo.width, height=photo.height)
        boxes = tiles(photo.width, photo.height, tile)
        count = max(1, min(PIXELS_AT_ONCE // max(self.sizes) ** 2, CUT_AT_ONCE // tile**2))
        parts = (boxes[start : start + count] for start in range(0, len(boxes), count))
        looks = (look for part in parts for look in zip(part, self._look([*map(photo.crop, part)]), strict=True))
        return blended(looks, width=photo.width, height=photo.height)

    def _look(self, photos: Sequence[Image.Image]) -> Iterator[list[Tensor]]:
        return self.logits(squares(photos, self.sizes, self.resize, self.padding), [photo.size for photo in photos])


class OriginalDataset(Dataset):
    """A split at its photos' own size: dataset[index] is (index, photo, mask), RGB and class indices or None."""

    def __init__(self, split: Split, *, class_names: Sequence[str]):
        self.split = split
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.split.ids)

    def __getitem__(self, index: int) -> tuple[int, Image.Image, Image.Image | None]:
        return index, *self.split.read(index, len(self.class_names))


def collate_originals(
    examples: list[tuple], *, sizes: Sequence[int], resize: str, padding: Colour
) -> tuple[list, list, list[Tensor], list]:
    """Return indices, (width, height) of the photos, the photos as squares(), and masks, uint8 (H, W) or None."""
    indices, photos, masks = map(list, zip(*examples, strict=True))
    masks = [mask and pil_to_tensor(mask)[0] for mask in masks]
    return indices, [photo.size for photo in photos], squares(photos, sizes, resize, padding), masks


def tiles(width: int, height: int, side: int) -> list[Box]:
    """Return squares that cover a photo, by rows, evenly spread, each overlapping the next by a quarter or more."""

    def starts(length: int) -> list[int]:
        count = 1 + -(-max(0, length - side) // max(1, int(side * (1 - OVERLAP))))
        return [index * (length - side) // (count - 1) if index else 0 for index in range(count)]

    corners = [(left, top) for top in starts(height) for left in starts(width)]
    return [(left, top, min(left + side, width), min(top + side, height)) for left, top in corners]


@torch.inference_mode()
def class_map(maps: Sequence[Tensor], *, width: int, height: int) -> Tensor:
    """Return uint8 (H, W): the class with the highest mean probability at every pixel of a photo.

    maps are logits (C, h, w) of the whole photo, upsampled bilinearly (align_corners=False), a band of rows at a time.
    A single one gives the largest upsampled logit, which is the protocol of the VOC challenge.
    """
    result = torch.empty(height, width, dtype=torch.uint8, device=maps[0].device)
    for rows in _bands(height, len(maps[0]) * width):
        scores = _upsampled(maps[0], rows, width, height) if len(maps) == 1 else _shares(maps, rows, width, height)
        result[rows.start : rows.stop] = scores.max(0).indices  # several times the speed of argmax
    return result


@torch.inference_mode()
def blended(looks: Iterable[tuple[Box, Sequence[Tensor]]], *, width: int, height: int) -> Tensor:
    """Return the class_map() of a photo that was predicted in tiles, each with its box, in the order of tiles().

    Where tiles overlap, each counts the less the nearer its edge. Only one row of tiles is held at a time.
    """
    for (left, top, right, bottom), maps in looks:
        if top == 0 and left == 0:
            scores = maps[0].new_zeros(len(maps[0]), bottom, width)
            result, first = torch.empty(height, width, dtype=torch.uint8, device=scores.device), 0
        if top > first:  # the rows above this tile are finished
            done = top - first
            _put_classes(scores[:, :done], result[first:top])
            for plane in scores:  # moved plane by plane, for a copy of all would double the memory
                plane[:-done] = plane[done:].clone()
                plane[-done:] = 0
            first = top
        for rows in _bands(bottom - top, len(scores) * (right - left)):
            weight = _weight(rows, bottom - top).unsqueeze(1) * _weight(range(right - left), right - left)
            shares = _shares(maps, rows, right - left, bottom - top)
            scores[:, rows.start : rows.stop, left:right] += shares.mul_(weight.to(shares))
    _put_classes(scores, result[first:])
    return result


def _put_classes(scores: Tensor, result: Tensor) -> None:
    """Write the class with the highest score at every pixel, (C, H, W), to result (H, W)."""
    for rows in _bands(len(result), scores[:, 0].numel()):
        result[rows.start : rows.stop] = scores[:, rows.start : rows.stop].max(0).indices


def _bands(height: int, values: int) -> Iterator[range]:
    """Return the rows of a picture in bands, given how many values one row has."""
    rows = max(1, BAND_VALUES // values)
    return (range(top, min(top + rows, height)) for top in range(0, height, rows))


def _shares(maps: Sequence[Tensor], rows: range, width: int, height: int) -> Tensor:
    """Return some rows of the sum of upsampled probabilities: (C, rows, width)."""
    total = _upsampled(maps[0], rows, width, height).softmax(0)
    for logits in maps[1:]:
        total += _upsampled(logits, rows, width, height).softmax(0)
    return total


def _weight(positions: range, length: int) -> Tensor:
    """Return the weight of pixels in a tile: 1, falling linearly over the overlap to its edges."""
    position = torch.arange(positions.start, positions.stop)
    to_edge = torch.minimum(position, length - 1 - position) + 1
    return (to_edge / max(1, OVERLAP * length)).clamp(max=1)


def _upsampled(logits: Tensor, rows: range, width: int, height: int) -> Tensor:
    """Return some rows of F.interpolate(logits, (height, width), mode="bilinear"): (C, h, w) to (C, rows, width)."""
    last = logits.shape[1] - 1
    y = torch.arange(rows.start, rows.stop, dtype=torch.float64)  # on the CPU: not every device has float64
    y = ((y + 0.5) * ((last + 1) / height) - 0.5).clamp(0, last)
    above = y.long()
    share = (y - above).to(logits.dtype).view(1, -1, 1).to(logits.device, non_blocking=True)
    above = above.to(logits.device, non_blocking=True)
    below = (above + 1).clamp(max=last)
    lines = torch.lerp(logits.index_select(1, above), logits.index_select(1, below), share)
    return F.interpolate(lines.flatten(0, 1).unsqueeze(0), size=width, mode="linear").view(-1, len(rows), width)


def fold_batch_norm(model: Any) -> None:
    """Multiply the encoder's batch norm, in evaluation mode, into the convolutions before it, in place.

    The network is then one to predict with, not to train or to save. Batch norm stays where it does not follow a
    convolution of its own, and where torch.fx cannot trace the encoder.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # as for control flow that depends on values; torch.fx and the models raise what they like
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {target for target, count in Counter(node.target for node in calls).items() if count == 1}
    for node in calls:
        before = node.args[0]
        alone = isinstance(before, fx.Node) and len(before.users) == 1 and once >= {node.target, before.target}
        if not alone:
            continue
        convolution, norm = map(model.get_submodule, (before.target, node.target))
        if isinstance(convolution, nn.Conv2d) and is_plain_batch_norm(norm):
            model.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
            model.set_submodule(node.target, getattr(norm, "act", nn.Identity()))


class _Tracer(fx.Tracer):
    traced_func_name = "maps"  # of the network

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | _BatchNorm) or super().is_leaf_module(module, name)
