"""Photos and masks as files: decoded and checked."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from model import UserError, first_line
from model.voc import VOID

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # whatever the suffix; for EPS Pillow runs a program
STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of fewer than 8 bits by


def read_photo(path: Path) -> Image.Image:
    """Return an upright RGB photo. Raises UserError naming the file and what is wrong with it."""
    with _naming(path):
        image, _ = _decode(path)
        with suppress(Exception):  # a damaged EXIF block; the pixels are whole, and turned before it is written anew
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert() would clip
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: has 32 bits per pixel, of unknown range; convert it to 8 or 16 bits")
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies, whatever the mode


def read_mask(
    path: Path, size: tuple[int, int], num_classes: int, label_map: Mapping[int, int] | None = None
) -> Image.Image:
    """Return the mask of a photo of that size (width, height), its pixel values class indices.

    label_map has the class index, or void, of every value that the file may hold; None: they are class indices already.
    Raises UserError naming the file and what is wrong with it.
    """
    with _naming(path):
        mask, stored_as = _decode(path)
        if mask.mode in ("1", "L") and stored_as in STRETCHED:
            mask = mask.convert("L").point(lambda value: value // STRETCHED[stored_as])
    if mask.mode not in ("P", "L"):
        raise UserError(
            f"{path}: the mask is {mask.mode}, not a palette or grey PNG of class indices; "
            "model.voc.indices_from_colours converts masks painted in VOC's colours"
        )
    if mask.size != size:
        raise UserError(f"{path}: the mask is {mask.width}x{mask.height}, its photo {size[0]}x{size[1]}")
    if label_map is not None:
        if unknown := [value for value, count in enumerate(mask.histogram()) if count and value not in label_map]:
            raise UserError(
                f"{path}: {unknown[0]} is not in the data set's label_map (model/layouts.py); correct one of them"
            )
        mask = mask.point([label_map.get(value, VOID) for value in range(256)])
    if bad := [index for index, count in enumerate(mask.histogram()) if count and num_classes <= index != VOID]:
        raise UserError(
            f"{path}: class index {bad[0]} is neither below num_classes = {num_classes} nor void ({VOID}); "
            "raise num_classes in params.json or correct the mask"
        )
    return mask


def _decode(path: Path) -> tuple[Image.Image, str]:
    """Return an image, and how its pixels are stored, which shows only before they are decoded."""
    with Image.open(path, formats=FORMATS) as image:
        stored_as = str(image.tile[0].args) if image.tile else ""
        image.load()
        return image, stored_as


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever Pillow makes of other bytes into a UserError that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # by format OSError, SyntaxError, ValueError, RuntimeError, struct.error, KeyError, ...
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None
