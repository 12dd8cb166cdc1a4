"""Pictures of what a network makes of photos, and of how it got there."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.voc import VOID, colour_mask, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN, TEXT = 8, 22  # pixels
COLOURS = 10  # runs that are told apart in a plot; the others are grey


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


def learning_curves(
    curves: Mapping[str, Sequence[float]], hyperparameters: Mapping[str, Mapping[str, Any]]
) -> "Figure":
    """Validation mIoU by epoch, and a plot of the best one against every hyperparameter.

    Args:
        curves: for every run the mIoU of its epochs, the most important run first.
        hyperparameters: for every key that varies its value in every run.
    """
    from matplotlib.figure import Figure

    colours = {name: f"C{rank}" if rank < COLOURS else "lightgrey" for rank, name in enumerate(curves)}
    columns = min(3, 1 + len(hyperparameters))
    rows = -(-(1 + len(hyperparameters)) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.25 * min(len(curves), COLOURS)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for name in reversed(curves):  # the best on top
        axes[0].plot(
            range(1, len(curves[name]) + 1), curves[name], color=colours[name], marker=".", label=_spelling(name)
        )
    axes[0].set(xlabel="epoch", ylabel="validation mIoU")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1][:COLOURS], names[::-1][:COLOURS], loc="outside lower left", fontsize="small")
    for axis, (key, values) in zip(axes[1:], hyperparameters.items(), strict=False):
        positions = _positions(axis, list(values.values()))
        best = [max(curves[name]) for name in values]
        if len(hyperparameters) == 1:
            axis.plot(*zip(*sorted(zip(positions, best, strict=True)), strict=True), color="lightgrey", zorder=0)
        axis.scatter(positions, best, c=[colours[name] for name in values])
        axis.set(xlabel=key, ylabel="best validation mIoU")
    for axis in axes[1 + len(hyperparameters) :]:
        axis.remove()
    return figure


def _positions(axis: "Axes", values: list) -> list[float]:
    """Where values lie on the horizontal axis: by size, on a logarithmic scale if they span decades, else in a row."""
    numeric = all(type(value) in (int, float) for value in values)
    different = sorted(set(values)) if numeric else list(dict.fromkeys(sorted(map(_spelling, values))))
    if numeric and different[0] > 0 and different[-1] / different[0] >= 10:
        axis.set_xscale("log")
        axis.minorticks_off()
    positions = values if numeric else [different.index(_spelling(value)) for value in values]
    if not numeric or len(different) <= 8:
        axis.set_xticks(sorted(set(positions)), [_spelling(value) for value in different])
    return positions


def _spelling(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    shown = f" {text}" if text.startswith("_") else text  # matplotlib hides "_x" from a legend
    return shown.replace("$", r"\$")  # and reads "$x$" as a formula
