"""Photos and masks as files: decoded and checked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from model import UserError, first_line
from model.voc import VOID, Colour, indices_from_colours, is_voc, voc_colours

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")
UNREADABLE = (".heic", ".heif", ".avif")  # photos too, named as faults rather than passed over
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # whatever the suffix; for EPS Pillow runs a program
LOSSY = {"JPEG", "MPO", "WEBP", "jpeg", "tiff_jpeg", "webp"}  # formats, and compressions of TIFF
STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of fewer than 8 bits by

LabelMap = Mapping[int | Colour, int]  # the class index, or void, of every value or colour that a mask may hold


def read_photo(path: str | Path) -> Image.Image:
    """Return an upright RGB photo. Raises UserError naming the file and what is wrong with it."""
    with _naming(path):
        image, _ = _decode(path)
        size = image.size
        with suppress(Exception):  # a damaged EXIF block; the pixels are whole, and turned before it is written anew
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert() would clip
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError("has 32 bits per pixel, of unknown range; convert it to 8 or 16 bits")
        image = image if image.mode == "RGB" else image.convert("RGB")  # which copies, whatever the mode
        image.info["turned"] = image.size != size
        return image


def read_mask(path: Path, photo: Image.Image, num_classes: int, label_map: LabelMap | None = None) -> Image.Image:
    """Return the mask of a photo, its pixel values class indices.

    label_map turns what the file holds into class indices; None: it holds them already.
    Raises UserError naming the file and what is wrong with it.
    """
    with _naming(path):
        mask, stored_as = _decode(path)
        if {mask.format, mask.info.get("compression")} & LOSSY:
            fault = "lossy: class indices in it are noise, also once it is converted; make it anew as PNG"
            raise UserError(f"the mask is {mask.format}, {fault}")
        if mask.size != photo.size:
            turned = ", turned upright as its EXIF says: turn the mask too" if photo.info.get("turned") else ""
            raise UserError(f"the mask is {mask.width}x{mask.height}, its photo {photo.width}x{photo.height}{turned}")
        mask = _as_indices(mask, stored_as, label_map)
        if bad := [index for index in used(mask) if num_classes <= index != VOID]:
            raise UserError(
                f"class index {bad[0]} is neither below num_classes = {num_classes} nor void ({VOID}); correct it, "
                f'or, if it is void, write "void" as line {bad[0] + 1} of classes.txt, or raise num_classes'
            )
        return mask


def used(mask: Image.Image) -> list[int]:
    """Return the values in a mask of 8 bits."""
    return [value for value, count in enumerate(mask.histogram()) if count]


def _as_indices(mask: Image.Image, stored_as: str, label_map: LabelMap | None) -> Image.Image:
    """Return a mask with the class index of its colours, where label_map has colours, or else of its values."""
    colours = {key: index for key, index in (label_map or {}).items() if isinstance(key, tuple)}
    if colours and mask.mode in ("P", "RGB", "RGBA"):
        return Image.fromarray(indices_from_colours(np.array(mask.convert("RGB")), colours))
    mask = _one_channel(mask, stored_as)
    if label_map is None:
        return mask
    if unknown := [value for value in used(mask) if value not in label_map]:
        raise UserError(f"{unknown[0]} is not in the data set's label_map or classes.txt; correct one of them")
    return mask.point([label_map.get(value, VOID) for value in range(256)])


def _one_channel(mask: Image.Image, stored_as: str) -> Image.Image:
    """Return a mask as palette or grey of 8 bits. Raises UserError where anything would be lost."""
    if mask.mode in ("1", "L") and stored_as in STRETCHED:
        return mask.convert("L").point(lambda value: value // STRETCHED[stored_as])
    if mask.mode in ("P", "L"):
        return mask
    values = np.atleast_3d(np.array(mask))  # (H, W, channels)
    if mask.mode in ("LA", "PA", "RGBA") and (values[..., -1] == 255).all():  # opaque
        values = values[..., :-1]
    halved = mask.mode != "I;16" and stored_as.endswith(";16B")  # by Pillow, to the high byte of each channel
    if not halved and (values == values[..., :1]).all() and ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        return Image.fromarray(values[..., 0].astype(np.uint8))
    hint = "values are whole numbers from 0 to 255, and nothing is transparent"
    if values.shape[-1] > 2:
        hint = "a labelmap.txt can say which class has which colour, see data/README.md"
    raise UserError(f"the mask is {mask.mode}, not a palette or grey PNG of class indices: {hint}")


def check_palette(path: Path, mask: Image.Image, names: Sequence[str], colours: dict[int, tuple[Colour, Path]]) -> None:
    """Raise UserError where a palette mask has other colours than masks before it, or VOC's at other indices than VOC.

    colours has the colour of each index, and the first mask with it; it is filled in. Data sets of other classes, as
    labelme's, may have VOC's colours too: they do if no entry of a class is of another colour.
    """
    palette = [*map(tuple, np.reshape(mask.getpalette() or [], (-1, 3)).tolist())]
    of_voc = voc_colours(len(names))
    if not is_voc(names) and not of_voc.keys() >= {*palette[: len(names)]}:
        of_voc = {}
    advice = "a program numbered colours afresh; take the mask as it was, or save it grey if its indices are right"
    for index in {*used(mask)} & {*range(len(palette))} - {VOID}:
        colour, first = colours.setdefault(index, (palette[index], path))
        if colour != palette[index]:
            raise UserError(f"{path}: index {index} has the colour {palette[index]}, but {colour} in {first}: {advice}")
        if (meant := of_voc.get(colour, index)) not in (0, index):  # black may be what fills a palette
            name = "void" if meant == VOID else names[meant]
            raise UserError(f"{path}: index {index} has the colour {colour}, VOC's for {name}: {advice}")


def _decode(path: str | Path) -> tuple[Image.Image, str]:
    """Return an image, and how its pixels are stored, which shows only before they are decoded."""
    with Image.open(path, formats=FORMATS) as image:
        if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:  # a phone's MPO is one photo
            size = image.size
            image.seek(1)
            if image.size == size:  # not a smaller copy of the first
                raise UserError(f"has {pages} pages, of which only the first would count; save each as a file")
            image.seek(0)
        stored_as = str(image.tile[0].args) if image.tile else ""
        image.load()
        return image, stored_as


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn whatever Pillow makes of other bytes into a UserError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than 179 megapixels cannot be read; cut photo and mask into parts") from None
    except Exception as error:  # by format OSError, SyntaxError, ValueError, RuntimeError, struct.error, KeyError, ...
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None
