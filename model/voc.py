"""Class names, palette and void index of Pascal VOC2012 segmentation."""

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


def palette() -> np.ndarray:
    """VOC's colours, uint8 (256, 3), as the devkit's VOClabelcolormap makes them.

    Bit i of a class index becomes bit 7 - i // 3 of channel i mod 3.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            if 3 * bit + channel < 8:
                colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def colour_mask(labels: np.ndarray) -> Image.Image:
    """uint8 (H, W) class indices -> a palette image in VOC's colours; its pixels are the indices, 255 is void."""
    mask = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8)).convert("P")
    mask.putpalette(palette().tobytes())
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
