"""Pictures of what a network makes of photos."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.voc import VOID, colour_mask, palette

MARGIN, TEXT = 8, 22  # pixels


def comparison(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], *, side: int = 160
) -> Image.Image:
    """One column an example with photo, truth and prediction below one another, and a legend of the classes in it.

    Args:
        images: uint8 (N, H, W, 3).
        labels, predictions: uint8 (N, H, W).
        names: a name for every class index.
        side: pixels of a tile.
    """
    font = ImageFont.load_default(size=14)
    rows = (
        ("photo", [Image.fromarray(image) for image in images], Image.Resampling.BICUBIC),
        ("truth", [colour_mask(label).convert("RGB") for label in labels], Image.Resampling.NEAREST),
        ("prediction", [colour_mask(label).convert("RGB") for label in predictions], Image.Resampling.NEAREST),
    )
    left = 90
    present = [index for index in np.unique([labels, predictions]).tolist() if index != VOID]
    width = max(left + len(images) * (side + MARGIN), left + side * 3)
    legend = _legend(present, names, width, font)
    canvas = Image.new("RGB", (width, 3 * (side + MARGIN) + MARGIN + legend.height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (title, tiles, resampling) in enumerate(rows):
        top = MARGIN + row * (side + MARGIN)
        draw.text((MARGIN, top + side // 2), title, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(tiles):
            canvas.paste(tile.resize((side, side), resampling), (left + column * (side + MARGIN), top))
    canvas.paste(legend, (0, canvas.height - legend.height))
    return canvas


def _legend(present: Sequence[int], names: Sequence[str], width: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Colour swatches with names, in as many lines as they need."""
    colours = palette()
    places, x, y = [], MARGIN, 0
    for index in present:
        advance = TEXT + int(font.getlength(names[index])) + 2 * MARGIN
        if x + advance > width and x > MARGIN:
            x, y = MARGIN, y + TEXT
        places.append((index, x, y))
        x += advance
    legend = Image.new("RGB", (width, y + TEXT + MARGIN), "white")
    draw = ImageDraw.Draw(legend)
    for index, x, y in places:
        draw.rectangle((x, y + 3, x + 14, y + 17), fill=tuple(colours[index].tolist()), outline="black")
        draw.text((x + TEXT, y + 10), names[index], fill="black", font=font, anchor="lm")
    return legend
