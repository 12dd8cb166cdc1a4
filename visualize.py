"""Pictures of what a network makes of photos, and of how it got there."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model.metrics import ConfusionMatrix
from model.voc import ERROR_COLOUR, VOID, VOID_COLOUR, colour_mask, is_background, palette

MARGIN, TEXT = 8, 22  # pixels
SHADES = (30, 30, 30), (120, 120, 120)  # what black and white become in the error picture: darker than error and void
LETTERS: dict[str, Any] = {"fill": "black", "font_size": 14, "anchor": "lm"}  # at the middle of their left side
Entry = tuple[tuple[int, int, int] | None, str]  # of a legend: a colour, None for what is not coloured, and its label


def comparison(
    examples: Sequence[Sequence[np.ndarray]], names: Sequence[str], *, title: str, side: int = 160
) -> Image.Image:
    """Return one column per example, its mIoU above photo, truth and prediction, and a legend of what is in them.

    An example is photo (H, W, 3), truth and prediction (H, W), all uint8, of a size of its own. side is the number of
    pixels of the longer side of a tile. The title stands in the corner.
    """
    left, step = 90, side + MARGIN
    maps = [labels for _, *both in examples for labels in both]
    canvas, draw = _page(_legend(_present(maps, names), left + max(3, len(examples)) * step), TEXT + 3 * step)
    draw.text((MARGIN, TEXT // 2), title, **LETTERS)
    for column, (_, truth, prediction) in enumerate(examples):
        draw.text((left + column * step, TEXT // 2), f"mIoU {_mean_iou(truth, prediction, len(names))}", **LETTERS)
    for row, name in enumerate(("photo", "truth", "prediction")):
        top = TEXT + row * step
        draw.text((MARGIN, top + side // 2), name, **LETTERS)
        for column, example in enumerate(examples):
            picture = colour_mask(example[row], names) if row else Image.fromarray(example[0])
            tile = ImageOps.pad(_tile(picture, side), (side, side), color="white")
            canvas.paste(tile, (left + column * step, top))
    return canvas


def error_picture(
    photo: Image.Image,
    truth: Image.Image,
    predictions: Sequence[tuple[str, np.ndarray]],
    names: Sequence[str],
    *,
    title: str,
    side: int = 320,
) -> Image.Image:
    """Return photo, truth and one or two predictions beside one another, under a title, and a legend of what is there.

    Classes are blended on the photo. A single prediction is followed by its errors: a dark grey photo, in which wrong
    pixels are red and void ones have the colour they have in truth. predictions are titles and class indices; these,
    uint8 (H, W), and truth are of the photo's size.
    """
    labels, tile = np.array(truth), _tile(photo, side)
    shown = [("truth", labels), *predictions]
    found = _present([part for _, part in shown], names)
    entries: list[Entry] = [(None if is_background(label) else colour, label) for colour, label in found]
    tiles = [("photo", tile), *((name, blend(tile, part, names)) for name, part in shown)]
    if len(predictions) == 1:
        error = np.array(ImageOps.colorize(photo.convert("L"), *SHADES))
        error[predictions[0][1] != labels] = ERROR_COLOUR
        error[labels == VOID] = VOID_COLOUR
        tiles.append(("error", _tile(Image.fromarray(error), side)))
        entries.append((ERROR_COLOUR, "error"))
    font = ImageFont.load_default(size=LETTERS["font_size"])
    widths = [MARGIN + max(tile.width, math.ceil(font.getlength(name))) for name, _ in tiles]
    canvas, draw = _page(_legend(entries, MARGIN + sum(widths)), 2 * TEXT + tile.height + MARGIN)
    draw.text((MARGIN, TEXT // 2), title, **LETTERS)
    for left, (name, part) in zip(accumulate(widths, initial=MARGIN), tiles, strict=False):
        draw.text((left, TEXT + TEXT // 2), name, **LETTERS)
        canvas.paste(part, (left, 2 * TEXT))
    return canvas


def overlay(
    photo: Image.Image, prediction: np.ndarray, names: Sequence[str], labels: Mapping[int, str], *, side: int = 1600
) -> Image.Image:
    """Return a photo under the colours of its classes, one called background left as it is, and a legend.

    prediction is uint8 (H, W), of the photo's size. labels has what the legend says for each class index, in that
    order. A photo of more than side pixels is shrunk.
    """
    photo, colours = photo.copy(), palette(names).tolist()
    photo.thumbnail((side, side))
    entries = [
        (None if is_background(names[index]) else tuple(colours[index]), label) for index, label in labels.items()
    ]
    canvas, _ = _page(_legend(entries, photo.width), photo.height + MARGIN)
    canvas.paste(blend(photo, prediction, names))
    return canvas


def blend(photo: Image.Image, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Return a photo under the colours of its classes, uint8 (h, w) of any size, but for one called background."""
    classes = colour_mask(labels, names).resize(photo.size, Image.Resampling.NEAREST)
    mixed = Image.blend(photo, classes.convert("RGB"), 0.55)
    bare = [index for index, name in enumerate(names) if is_background(name)]
    return Image.composite(mixed, photo, Image.fromarray(~np.isin(np.array(classes), bare)))


def _mean_iou(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> str:
    """Return the mIoU of one photo, "-" where all of its truth is void."""
    confusion = ConfusionMatrix(num_classes)
    confusion.update(*(torch.from_numpy(part)[None] for part in (prediction, truth)))
    value = confusion.compute()["mIoU"]
    return "-" if value is None else f"{value:.2f}"


def _tile(picture: Image.Image, side: int) -> Image.Image:
    """Return a photo or a mask as RGB whose longer side has that many pixels."""
    width, height = (max(1, round(side * length / max(picture.size))) for length in picture.size)
    return picture.resize((width, height)).convert("RGB")  # with a palette NEAREST, else bicubic


def _page(legend: Image.Image, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a white page of that height above a legend, and what draws on it."""
    page = Image.new("RGB", (legend.width, height + legend.height), "white")
    page.paste(legend, (0, height))
    return page, ImageDraw.Draw(page)


def _present(maps: Sequence[np.ndarray], names: Sequence[str]) -> list[Entry]:
    """Return entries of a legend for the class indices that occur in some maps, void among them."""
    colours, indices = palette(names).tolist(), np.unique(np.concatenate([part.ravel() for part in maps]))
    return [(tuple(colours[index]), "void" if index == VOID else names[index]) for index in indices.tolist()]


def _legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Draw colour swatches with their labels in columns, wider than asked for where one label is."""
    font = ImageFont.load_default(size=LETTERS["font_size"])
    cell = TEXT + 2 * MARGIN + max(math.ceil(font.getlength(label)) for _, label in entries)
    columns = max(1, (width - MARGIN) // cell)
    rows = -(-len(entries) // columns)
    legend = Image.new("RGB", (max(width, MARGIN + cell), rows * TEXT + MARGIN), "white")
    draw = ImageDraw.Draw(legend)
    for place, (colour, label) in enumerate(entries):
        x, y = MARGIN + place % columns * cell, place // columns * TEXT
        draw.rectangle((x, y + 3, x + 14, y + 17), fill=colour, outline="black")
        draw.text((x + TEXT, y + 10), label, **LETTERS)
    return legend


def training_curves(history: Sequence[Mapping], best: int) -> Figure:
    """Return every metric of a run and its learning rate by epoch, and what they are in the best epoch.

    history is what history.jsonl holds.
    """
    lines: dict[str, dict] = {}  # by metric the values of "train" and "val"
    for metric in dict.fromkeys(key for record in history for key in record["val"]):
        lines[metric] = {part: [record[part].get(metric) for record in history] for part in ("train", "val")}
    lines["learning_rate"] = {"at the end": [record["learning_rate"] for record in history]}
    columns = min(4, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows), layout="constrained")
    for place, (title, parts) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for label, values in parts.items():
            marker = "." if len(values) < 50 else ""
            axes.plot([record["epoch"] for record in history], np.array(values, float), marker=marker, label=label)
        value = values[best - 1]  # of validation, or the learning rate
        label = f"best epoch ({best})" + ("" if value is None else f": {value:.4g}")
        axes.axvline(best, color="grey", linestyle="--", label=label)
        axes.set(title=title.replace("_", " "), xlabel="epoch")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.legend()
    return figure


def titles(folders: Sequence[Path]) -> list[str]:
    """Return what pictures call experiments: the names of their folders, or their paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len({*names}) == len(names) else [*map(str, folders)]


def spelling(name: str) -> str:
    """Return a name as matplotlib draws it: it hides "_x" from a legend, and reads "$x$" as a formula."""
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")
