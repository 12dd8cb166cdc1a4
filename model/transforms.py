"""The way of a photo into the network, where to find it again in what comes out, and the augmentation of a batch."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from model.voc import VOID, Colour

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDING = tuple(round(255 * value) for value in IMAGENET_MEAN)  # the colour beside a photo; of its mask: void

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has it


def squash(width: int, height: int, side: int) -> Box:
    """Fill the square; the aspect ratio is given up."""
    return 0, 0, side, side


def letterbox(width: int, height: int, side: int) -> Box:
    """Keep the aspect ratio: the longer side fills the square, the photo lies in its middle."""
    across, down = (max(1, round(side * length / max(width, height))) for length in (width, height))
    left, top = round((side - across) / 2), round((side - down) / 2)
    return left, top, left + across, top + down


# Where a photo of a width and height goes in a square of a side; what it leaves of the square is padded.
RESIZES: dict[str, Callable[[int, int, int], Box]] = {"squash": squash, "letterbox": letterbox}


def to_square(
    photo: Image.Image, mask: Image.Image | None, side: int, resize: str, padding: Colour = PADDING
) -> tuple[Image.Image, Image.Image | None]:
    """Resize to a square: the photo bilinear (area-averaged when shrunk), the mask NEAREST; pad with a colour and void.

    resize is one of RESIZES. What the network makes of the square is cut to the same box on the way back.
    """
    left, top, right, bottom = RESIZES[resize](*photo.size, side)
    photo = photo.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    mask = None if mask is None else mask.resize(photo.size, Image.Resampling.NEAREST)
    if photo.size != (side, side):
        square = Image.new("RGB", (side, side), padding)
        square.paste(photo, (left, top))
        photo = square
        if mask is not None:
            square = Image.new("L", (side, side), VOID)
            square.paste(Image.fromarray(np.array(mask)), (left, top))  # the indices of a palette, not its colours
            mask = square
    return photo, mask


@cache
def resize_tag(side: int, resize: str, padding: Colour = PADDING) -> str:
    """Return a digest of what to_square() makes of noise, so that photos resized in another way get another cache."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    length = min(side, 512)
    for width, height in ((53, 37), (2, 3), (4 * length, 2 * length), (length, 3 * length)):  # of all shapes
        shapes = (height, width, 3), (height, width)
        photo, mask = (Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes)
        for part in to_square(photo, mask, side, resize, padding):
            digest.update(np.array(part).tobytes())
    return digest.hexdigest()


def squares(
    photos: Sequence[Image.Image], sides: Sequence[int], resize: str, padding: Colour = PADDING
) -> list[Tensor]:
    """For every side S the photos as one uint8 (B, 3, S, S)."""
    of_sides = ([to_square(photo, None, side, resize, padding)[0] for photo in photos] for side in sides)
    return [torch.stack([*map(pil_to_tensor, of_side)]) for of_side in of_sides]


def to_input(
    images: Tensor,
    device: torch.device | str,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    channels_last: bool = True,
) -> Tensor:
    """Turn (B, 3, H, W) of 0-255 into float32 on device, normalized as values in [0, 1], by channel."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
    return x.sub(_times_255(mean, x.device)).div_(_times_255(std, x.device))


@cache  # on a GPU: to send them anew would make the host wait at every step
def _times_255(values: tuple[float, ...], device: torch.device) -> Tensor:
    return (255 * torch.tensor(values).view(3, 1, 1)).to(device)


@cache
def _colour(values: Colour, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(3, 1, 1).to(device)


def photo_edges(images: Tensor, labels: Tensor, padding: Colour = PADDING) -> Tensor:
    """Return int64 (B, 4), left, top, right and bottom of the photo in each square: what is no padding.

    Padding are rows and columns at an edge that are void and of the padding's colour as a whole.
    """
    inside = (labels != VOID) | (images != _colour(padding, images.device)).any(1)
    lines = [inside.any(1).int(), inside.any(2).int()]  # columns, rows
    first = [line.argmax(1) for line in lines]
    last = [line.shape[1] - line.flip(1).argmax(1) for line in lines]
    return torch.stack([*first, *last], 1)


SCALES = 0.5, 2.0
BRIGHTNESS = CONTRAST = SATURATION = 0.3  # at most that much more or less
HUE = 0.05  # of a turn at most
LUMA = (0.299, 0.587, 0.114)
BOX_AREAS = 0.3, 0.7  # of CutMix, as shares of the square's
FOR_AUGMENT = 8  # of an example's random numbers


@torch.no_grad()
def augment(images: Tensor, labels: Tensor, seeds: Tensor, padding: Colour = PADDING) -> tuple[Tensor, Tensor]:
    """Scale each photo by 0.5-2, cut a window of the square's size out of it, flip it, and change its colours.

    The window lies at random in a photo that has become larger, and a smaller photo lies at random in the window,
    beside it padding and void. Photos are sampled bilinearly, without averaging where they shrink, masks NEAREST. What
    becomes of an example depends on its seed alone: equal seeds give equal results in any batch.

    images uint8 (B, 3, S, S), padded with that colour or not, and labels uint8 (B, S, S) are on one device, seeds int64
    (B) on the CPU. Returns float32 (B, 3, S, S) from 0 to 255, and uint8 (B, S, S).
    """
    if not len(images):
        return images.float(), labels
    side, device = images.shape[-1], images.device
    drawn = _drawn(seeds)[:, :FOR_AUGMENT]
    numbers = torch.cat([drawn[:, :4], _colour_change(drawn[:, 4:].double())], 1).float().to(device, non_blocking=True)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * numbers[:, 0]
    edges = photo_edges(images, labels, padding).float()
    centres = torch.arange(side, device=device) + 0.5
    x = _positions(centres, scale, numbers[:, 1], edges[:, 0], edges[:, 2])
    y = _positions(centres, scale, numbers[:, 2], edges[:, 1], edges[:, 3])
    x = torch.where(numbers[:, 3:4] < 0.5, x, x.flip(1))
    inside = _between(x, edges[:, 0], edges[:, 2])[:, None, :] & _between(y, edges[:, 1], edges[:, 3])[:, :, None]

    columns, rows = (positions.long().clamp(0, side - 1) for positions in (x, y))
    labels = labels.gather(1, rows[:, :, None].expand_as(labels)).gather(2, columns[:, None, :].expand_as(labels))

    # No sample reaches beyond the photo's outermost pixels.
    x = x.clamp(edges[:, 0, None] + 0.5, edges[:, 2, None] - 0.5) * (2 / side) - 1
    y = y.clamp(edges[:, 1, None] + 0.5, edges[:, 3, None] - 0.5) * (2 / side) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    sampled = F.grid_sample(images.float(), grid, align_corners=False)
    matrix, shift = numbers[:, 4:13].view(-1, 3, 3, 1, 1), numbers[:, 13:].view(-1, 3, 1, 1)
    result = matrix[:, :, 0] * sampled[:, :1]  # not a matrix product, whose last bits may depend on the batch
    result.addcmul_(matrix[:, :, 1], sampled[:, 1:2]).addcmul_(matrix[:, :, 2], sampled[:, 2:]).add_(shift)
    return result.clamp_(0, 255).where(inside[:, None], _colour(padding, device).float()), labels.where(inside, VOID)


@torch.no_grad()
def cutmix(images: Tensor, labels: Tensor, seeds: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Replace a box of photos, each with that probability, by that of the photo before in the batch, masks alike.

    CutMix (Yun et al., 2019, arXiv:1905.04899) with masks. The box is a square, at random in the larger square, padding
    or not, and at the same place in both. Unlike the paper's it has 0.3 to 0.7 of the area and is never cut off at an
    edge, so that it always covers the middle. The first photo gets the last one's; a photo alone stays as it is.
    Whether a photo gets a box, and which, depends on its seed alone; shapes as in augment().
    """
    mixed, area, left, top = _drawn(seeds)[:, FOR_AUGMENT:].to(images.device, non_blocking=True).T
    side = images.shape[-1]
    width = (BOX_AREAS[0] + (BOX_AREAS[1] - BOX_AREAS[0]) * area).sqrt() * side
    centres = torch.arange(side, device=images.device) + 0.5
    columns, rows = (_between(centres, start := place * (side - width), start + width) for place in (left, top))
    box = columns[:, None, :] & rows[:, :, None] & (mixed < probability)[:, None, None]
    return images.roll(1, 0).where(box[:, None], images), labels.roll(1, 0).where(box, labels)


def _drawn(seeds: Tensor) -> Tensor:
    """Return float32 from 0 to 1: for each example (a row) the numbers of augment(), then those of cutmix()."""
    drawn = torch.empty(len(seeds), FOR_AUGMENT + 4)
    for row, seed in zip(drawn, seeds.tolist(), strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return drawn


def _positions(centres: Tensor, scale: Tensor, place: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return (B, S): where in the square the pixels of a window are taken from, along one axis.

    The photo lies between first and last, and place, from 0 to 1, says where the window lies in the scaled photo.
    """
    start = place * ((last - first) * scale - len(centres))
    return first[:, None] + (centres + start[:, None]) / scale[:, None]


def _between(positions: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return (positions > first[:, None]) & (positions < last[:, None])


def _colour_change(drawn: Tensor) -> Tensor:
    """Return (B, 12): the matrix by which colours are multiplied, row by row, and what is then added to each channel.

    drawn has four numbers from 0 to 1 for each example. The hue turns about the axis of greys, the saturation moves
    colours from or to their grey, the contrast from or to the mean colour, and the brightness multiplies them.
    """
    strengths = torch.tensor((BRIGHTNESS, CONTRAST, SATURATION))
    brightness, contrast, saturation = (1 + (2 * drawn[:, :3] - 1) * strengths).T.unsqueeze(-1)
    angle = (2 * math.pi * HUE * (2 * drawn[:, 3] - 1)).view(-1, 1, 1)
    grey = torch.ones(3, 3) / 3
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    hue = angle.cos() * (torch.eye(3) - grey) + grey + angle.sin() * across  # Rodrigues' formula
    to_grey = torch.tensor(LUMA).expand(3, 3)
    saturated = saturation.unsqueeze(-1) * (torch.eye(3) - to_grey) + to_grey
    matrix = (brightness * contrast).unsqueeze(-1) * (saturated @ hue)
    return torch.cat([matrix.flatten(1), brightness * (1 - contrast) * torch.tensor(PADDING)], 1)
