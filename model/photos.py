"""Photos and masks as files: decoded and checked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from model import UserError, first_line
from model.voc import VOID, Colour, indices_from_colours, is_voc, voc_colours

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # whatever the suffix; for EPS Pillow runs a program
STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of fewer than 8 bits by
LOSSY = {"JPEG", "MPO", "WEBP", "jpeg", "tiff_jpeg", "webp"}  # formats, and compressions of TIFF
REWRITTEN = "a program numbered colours afresh; take the mask as it was, or save it grey if its indices are right"

LabelMap = Mapping[int | Colour, int]  # the class index, or void, of every value or colour that a mask may hold
Palette = dict[int, tuple[Colour, Path]]  # the colour of every index in use, and the first mask that has it


def read_photo(path: Path) -> Image.Image:
    """Return an upright RGB photo. Raises UserError naming the file and what is wrong with it."""
    with _naming(path):
        image, _ = _decode(path)
        size = image.size
        with suppress(Exception):  # a damaged EXIF block; the pixels are whole, and turned before it is written anew
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # convert() would clip
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: has 32 bits per pixel, of unknown range; convert it to 8 or 16 bits")
        image = image if image.mode == "RGB" else image.convert("RGB")  # which copies, whatever the mode
        image.info["turned"] = image.size != size
        return image


def read_mask(
    path: Path, photo: Image.Image, num_classes: int, label_map: LabelMap | None = None, colours: Palette | None = None
) -> Image.Image:
    """Return the mask of a photo, its pixel values class indices.

    label_map turns what the file holds into class indices; None: it holds them already. colours is filled in.
    Raises UserError naming the file and what is wrong with it.
    """
    with _naming(path):
        mask, stored_as = _decode(path)
        if mask.mode in ("1", "L") and stored_as in STRETCHED:
            mask = mask.convert("L").point(lambda value: value // STRETCHED[stored_as])
    if mask.format in LOSSY or mask.info.get("compression") in LOSSY:
        kind = "lossy: class indices in it are noise, also once it is converted; make it anew as PNG"
        raise UserError(f"{path}: the mask is {mask.format}, {kind}")
    if mask.size != photo.size:
        turned = ", turned upright as its EXIF says: turn the mask too" if photo.info.get("turned") else ""
        sizes = f"the mask is {mask.width}x{mask.height}, its photo {photo.width}x{photo.height}"
        raise UserError(f"{path}: {sizes}{turned}")
    mask = _indices(path, mask, stored_as) if label_map is None else _mapped(path, mask, stored_as, label_map)
    if bad := [index for index in _values(mask) if num_classes <= index != VOID]:
        raise UserError(
            f"{path}: class index {bad[0]} is neither below num_classes = {num_classes} nor void ({VOID}); correct the "
            f'mask, or, where it is void, write "void" as line {bad[0] + 1} of classes.txt, or raise num_classes'
        )
    if mask.mode == "P" and label_map is None and colours is not None:
        _note_colours(path, mask, colours)
    return mask


def _values(mask: Image.Image) -> list[int]:
    return [value for value, count in enumerate(mask.histogram()) if count]


def _indices(path: Path, mask: Image.Image, stored_as: str) -> Image.Image:
    """Return a mask as 8 bits a pixel, palette or grey. Raises UserError where anything would be lost."""
    if mask.mode in ("P", "L"):
        return mask
    values, fault = np.array(mask), ""
    if mask.mode in ("LA", "PA", "RGBA"):
        fault = "" if (values[..., -1] == 255).all() else "with transparent pixels, whose class is not known"
        values = values[..., :-1]
    if values.ndim == 3 and (values == values[..., :1]).all() and not stored_as.endswith(";16B"):
        values = values[..., 0]
    if values.ndim == 3:
        fault = "not a palette or grey PNG of class indices; labelmap.txt can name its colours, see data/README.md"
    elif not ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        fault = "with values that are no whole numbers from 0 to 255, as class indices are"
    if fault:
        raise UserError(f"{path}: the mask is {mask.mode}, {fault}")
    return Image.fromarray(values.astype(np.uint8))


def _mapped(path: Path, mask: Image.Image, stored_as: str, label_map: LabelMap) -> Image.Image:
    """Return a mask with the class indices that label_map has for its colours or, where it has none, its values."""
    colours = {key: index for key, index in label_map.items() if isinstance(key, tuple)}
    if colours and mask.mode in ("P", "RGB", "RGBA"):
        try:
            return Image.fromarray(indices_from_colours(np.array(mask.convert("RGB")), colours))
        except UserError as error:
            raise UserError(f"{path}: {error} in labelmap.txt; correct one of them") from None
    mask = _indices(path, mask, stored_as)
    if unknown := [value for value in _values(mask) if value not in label_map]:
        raise UserError(f"{path}: {unknown[0]} is not in the data set's label_map or classes.txt; correct one of them")
    return mask.point([label_map.get(value, VOID) for value in range(256)])


def _note_colours(path: Path, mask: Image.Image, colours: Palette) -> None:
    """Note the colours of a mask's indices. Raises UserError for an index that had another colour before."""
    palette = mask.getpalette() or []
    for index in set(_values(mask)) - {VOID}:
        colour = tuple(palette[3 * index : 3 * index + 3])
        known, first = colours.setdefault(index, (colour, path))
        if colour != known:
            raise UserError(f"{path}: index {index} has the colour {colour}, but {known} in {first}: {REWRITTEN}")


def check_colours(colours: Palette, names: Sequence[str]) -> None:
    """Raise UserError where masks have VOC's colours at other indices than VOC.

    Where the classes are not VOC's, only if all colours are those of VOC's first classes, as labelme has them.
    """
    expected = voc_colours(len(names))
    if not is_voc(names) and not all(colour in expected for colour, _ in colours.values()):
        return
    for index, (colour, path) in sorted(colours.items()):
        if (meant := expected.get(colour, index)) != index:
            what = "void" if meant == VOID else f"class {meant}, {names[meant]}"
            raise UserError(f"{path}: index {index} has the colour {colour} of {what}: {REWRITTEN}")


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
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than 179 megapixels cannot be read; cut photo and mask into parts") from None
    except Exception as error:  # by format OSError, SyntaxError, ValueError, RuntimeError, struct.error, KeyError, ...
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None
