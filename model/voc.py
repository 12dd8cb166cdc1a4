"""Class names, palette and void index of Pascal VOC2012 segmentation, and a palette for other classes."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image

from model import UserError

VOID = 255  # outlines and unlabelled pixels: they count in no loss and no metric

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


VOID_COLOUR = (224, 224, 192)  # VOC's
DARKEST = 0.35  # lightness in OKLab, from 0 to 1
ERROR_COLOUR = (255, 40, 40)  # of wrong pixels in pictures; no class looks like it


def is_voc(names: Sequence[str]) -> bool:
    """Return whether class names are VOC's."""
    return tuple(names) == CLASS_NAMES


def is_background(name: str) -> bool:
    """Return whether a class is the one that pictures leave uncoloured."""
    return name.casefold() == "background"


def palette(names: Sequence[str] = CLASS_NAMES) -> np.ndarray:
    """Return the colours of class indices, uint8 (256, 3), the last one void's.

    VOC's for VOC's names, as its server and other programs know them. For others colours that are told apart more
    easily, black for a class called background.
    """
    if is_voc(names):
        return voc_palette()
    objects = [index for index in range(VOID) if index >= len(names) or not is_background(names[index])]
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[objects] = distinct_colours()[: len(objects)]
    colours[VOID] = VOID_COLOUR
    return colours


def voc_palette() -> np.ndarray:
    """Return VOC's colours, uint8 (256, 3), as the devkit's VOClabelcolormap makes them.

    Bit i of a class index becomes bit 7 - i // 3 of channel i mod 3.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            if 3 * bit + channel < 8:
                colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


@cache
def distinct_colours() -> np.ndarray:
    """Return 255 colours, uint8 (255, 3), each the farthest in OKLab from those before it and from what else is drawn.

    That is black (background), white (the page), void and error. The first ones differ most. None is so dark that over
    a dark photo it would look like no colour.
    """
    levels = np.arange(0, 256, 17)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    places = oklab(candidates)
    candidates, places = (values[places[:, 0] > DARKEST] for values in (candidates, places))
    taken = oklab(np.array([(0, 0, 0), (255, 255, 255), VOID_COLOUR, ERROR_COLOUR]))
    distances = np.linalg.norm(places[:, None] - taken, axis=-1).min(1)  # to the nearest that is taken
    chosen = []
    for _ in range(VOID):
        chosen.append(distances.argmax())
        distances = np.minimum(distances, np.linalg.norm(places - places[chosen[-1]], axis=-1))
    return candidates[chosen].astype(np.uint8)


def oklab(colours: np.ndarray) -> np.ndarray:
    """Turn sRGB colours (..., 3) from 0 to 255 into OKLab, where distance is how different colours look.

    Björn Ottosson, https://bottosson.github.io/posts/oklab, 2020.
    """
    shares = colours / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    cones = linear @ [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
    return np.cbrt(cones) @ [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]


def colour_mask(labels: np.ndarray, names: Sequence[str] = CLASS_NAMES) -> Image.Image:
    """Turn uint8 (H, W) class indices into a palette image in the colours of these classes.

    Its pixels are the indices, 255 is void.
    """
    mask = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8)).convert("P")
    mask.putpalette(palette(names).tobytes())
    return mask


def indices_from_colours(mask: np.ndarray) -> np.ndarray:
    """Turn a mask painted in VOC's colours, uint8 (H, W, 3), into class indices, uint8 (H, W).

    Raises UserError naming the first colour that is not one of the 21 classes' or void's.
    """
    known = [*range(len(CLASS_NAMES)), VOID]
    weights = np.array([1 << 16, 1 << 8, 1])
    codes = palette()[known] @ weights
    order = np.argsort(codes)
    pixels = mask @ weights
    position = np.searchsorted(codes[order], pixels).clip(max=len(known) - 1)
    if (unknown := codes[order][position] != pixels).any():
        raise UserError(f"colour {tuple(mask[unknown][0].tolist())} is not in the VOC palette")
    return np.array(known, dtype=np.uint8)[order][position]
