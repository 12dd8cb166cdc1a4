"""Class names, palette and void index of Pascal VOC2012 segmentation, and colours for other classes."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from model import UserError

Colour = tuple[int, ...]  # red, green, blue, from 0 to 255

VOID = 255  # outlines and unlabelled pixels: they count in no loss and no metric
VOID_COLOUR = (224, 224, 192)  # VOC's
ERROR_COLOUR = (255, 40, 40)  # of wrong pixels in pictures
CLASS_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def is_voc(names: Sequence[str]) -> bool:
    return tuple(names) == CLASS_NAMES


def is_background(name: str) -> bool:
    """Return whether a class is the one that pictures leave uncoloured."""
    return name.strip("_").casefold() == "background"  # labelme writes _background_


def palette(names: Sequence[str] = CLASS_NAMES) -> np.ndarray:
    """Return the colours of class indices, uint8 (256, 3), the last one void's.

    For VOC's names they are VOC's, as its server and other programs know them. For others they are of Glasbey's kind,
    each as far from those before it as can be, also when they are blended with a photo; black for background.
    """
    if is_voc(names):
        return voc_palette()
    from colorcet import glasbey_bw_minc_20  # not at the top: few need it, and it takes half a second

    objects = [index for index, name in enumerate(names) if not is_background(name)]
    colours = np.zeros((256, 3), dtype=np.uint8)
    # Without the first, a red like that of errors. None is grey, which on a photo would look like no class.
    colours[objects] = np.rint(255 * np.array(glasbey_bw_minc_20[1 : len(objects) + 1]))
    colours[VOID] = VOID_COLOUR
    return colours


def voc_palette() -> np.ndarray:
    """Return VOC's colours, uint8 (256, 3), as the devkit's VOClabelcolormap makes them.

    Bit i of a class index becomes bit 7 - i // 3 of channel i mod 3.
    """
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def colour_mask(labels: np.ndarray, names: Sequence[str] = CLASS_NAMES) -> Image.Image:
    """Turn uint8 (H, W) class indices into a palette image in the colours of these classes.

    Its pixels are the indices, 255 is void.
    """
    mask = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8)).convert("P")
    mask.putpalette(palette(names).tobytes())
    return mask


def voc_colours(count: int = len(CLASS_NAMES)) -> dict[Colour, int]:
    """Return the index of each colour of VOC's first classes, and of void's."""
    return {tuple(colour): index for index, colour in enumerate(voc_palette()[:count].tolist())} | {VOID_COLOUR: VOID}


def indices_from_colours(mask: np.ndarray, colours: Mapping[Colour, int]) -> np.ndarray:
    """Turn a mask painted in colours, uint8 (H, W, 3), into their class indices, uint8 (H, W).

    Raises UserError naming the first colour that is none of them.
    """
    weights = np.array([1 << 16, 1 << 8, 1])
    equal = (mask @ weights)[..., None] == np.array([*colours]) @ weights  # (H, W, colours)
    if not (found := equal.any(-1)).all():
        raise UserError(f"colour {tuple(mask[~found][0].tolist())} is that of no class; correct it, or labelmap.txt")
    return np.array([*colours.values()], dtype=np.uint8)[equal.argmax(-1)]
