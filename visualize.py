"""Pictures of what a network makes of photos, and of how it got there."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model.voc import ERROR_COLOUR, VOID, VOID_COLOUR, colour_mask, is_background, palette

MARGIN, TEXT = 8, 22  # pixels
COLOURS = [f"C{number}" for number in range(10) if number != 7]  # of the best runs in a plot; C7 is grey, as the others
PANELS = 6  # of results.png at most
SHADES = (30, 30, 30), (120, 120, 120)  # what black and white become in the error picture: darker than error and void
LETTERS: dict[str, Any] = {"fill": "black", "font_size": 14, "anchor": "lm"}  # at the middle of their left side
Entry = tuple[tuple[int, int, int] | None, str]  # of a legend: a colour, None for what is not coloured, and its label


def comparison(examples: Sequence[Sequence[np.ndarray]], names: Sequence[str], *, side: int = 160) -> Image.Image:
    """Return one column per example, with photo, truth and prediction, and a legend of what is in them.

    Args:
        examples: photo (H, W, 3), truth and prediction (H, W), all uint8; each example has a size of its own.
        names: a name for every class index.
        side: pixels of the longer side of a tile.
    """
    images, labels, predictions = zip(*examples, strict=True)
    rows = {
        "photo": [_tile(image, side) for image in images],
        "truth": [_tile(colour_mask(label, names), side) for label in labels],
        "prediction": [_tile(colour_mask(label, names), side) for label in predictions],
    }
    left, step = 90, side + MARGIN
    legend = _legend(_present([*labels, *predictions], names), left + max(3, len(images)) * step)
    canvas, draw = _page(legend, MARGIN + 3 * step)
    for row, (name, tiles) in enumerate(rows.items()):
        top = MARGIN + row * step
        draw.text((MARGIN, top + side // 2), name, **LETTERS)
        for column, tile in enumerate(tiles):
            canvas.paste(ImageOps.pad(tile, (side, side), color="white"), (left + column * step, top))
    return canvas


def error_picture(
    photo: Image.Image,
    truth: Image.Image,
    prediction: np.ndarray,
    names: Sequence[str],
    *,
    title: str,
    other: np.ndarray | None = None,
    side: int = 320,
) -> Image.Image:
    """Return photo, truth, prediction and error beside one another, and a legend of what is in them.

    The last one is a dark grey photo, in which wrong pixels are red and void ones have the colour they have in truth.

    Args:
        photo: RGB.
        truth: class indices, of the photo's size.
        prediction: uint8 (H, W), of the photo's size.
        names: a name for every class index.
        title: written above.
        other: another prediction, uint8 (H, W), to show in place of the error.
        side: pixels of the longer side of a tile.
    """
    labels = np.array(truth)
    tiles: dict[str, Any] = {
        "photo": photo,
        "truth": colour_mask(labels, names),
        "prediction": colour_mask(prediction, names),
    }
    if other is None:
        tiles["error"] = _errors(photo, labels, prediction)
        entries = [*_present([labels, prediction], names), (ERROR_COLOUR, "error")]
    else:
        tiles["the other"] = colour_mask(other, names)
        entries = _present([labels, prediction, other], names)
    shown = [_tile(tile, side) for tile in tiles.values()]
    step = shown[0].width + MARGIN
    canvas, draw = _page(_legend(entries, MARGIN + 4 * step), 2 * TEXT + shown[0].height + MARGIN)
    draw.text((MARGIN, TEXT // 2), title, **LETTERS)
    for column, (name, tile) in enumerate(zip(tiles, shown, strict=True)):
        draw.text((MARGIN + column * step, TEXT + TEXT // 2), name, **LETTERS)
        canvas.paste(tile, (MARGIN + column * step, 2 * TEXT))
    return canvas


def _errors(photo: Image.Image, labels: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """Return a dark grey photo with its wrong and void pixels in colour."""
    grey = ImageOps.colorize(photo.convert("L"), *SHADES)
    error = np.array(grey)
    error[(prediction != labels) & (labels != VOID)] = ERROR_COLOUR
    error[labels == VOID] = VOID_COLOUR
    return Image.fromarray(error)


def overlay(
    photo: Image.Image, prediction: np.ndarray, names: Sequence[str], labels: Mapping[int, str], *, side: int = 1600
) -> Image.Image:
    """Return a photo under the colours of its classes, one called background left as it is, and a legend.

    Args:
        photo: RGB.
        prediction: uint8 (H, W), of the photo's size.
        names: a name for every class index.
        labels: what the legend says for each class index, in that order.
        side: the longer side of the result at most, in pixels, for photos larger than that are shrunk.
    """
    photo = photo.copy()
    photo.thumbnail((side, side))
    classes = colour_mask(prediction, names).resize(photo.size, Image.Resampling.NEAREST)
    mixed = Image.blend(photo, classes.convert("RGB"), 0.55)
    bare = [index for index, name in enumerate(names) if is_background(name)]
    objects = Image.fromarray(~np.isin(np.array(classes), bare))
    colours = palette(names).tolist()
    entries = [(None if index in bare else tuple(colours[index]), label) for index, label in labels.items()]
    canvas, _ = _page(_legend(entries, photo.width), photo.height + MARGIN)
    canvas.paste(Image.composite(mixed, photo, objects))
    return canvas


def _tile(picture: Image.Image | np.ndarray, side: int) -> Image.Image:
    """Return a photo or a mask as RGB whose longer side has that many pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    width, height = (max(1, round(side * length / max(image.size))) for length in image.size)
    return image.resize((width, height)).convert("RGB")  # with a palette NEAREST, else bicubic


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


def training_curves(history: Sequence[Mapping]) -> Figure:
    """Return every metric of a run and its learning rate by epoch; history is what history.jsonl holds."""
    metrics = [*dict.fromkeys(key for record in history for key in record["val"])]
    columns = min(4, 1 + len(metrics))
    rows = -(-(1 + len(metrics)) // columns)
    width, height = 3.6 * columns, 3 * rows
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    # The margins are inches: to let matplotlib find them would take more than half of the time.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.25 / width, bottom=0.5 / height, top=1 - 0.5 / height, wspace=0.3, hspace=0.4
    )
    for axes, metric in zip(panels, metrics, strict=False):
        for part in ("train", "val"):
            values = [record[part].get(metric) for record in history]
            _by_epoch(axes, history, [np.nan if value is None else value for value in values], label=part)
        axes.set(title=metric.replace("_", " "))
        axes.legend()
    _by_epoch(panels[len(metrics)], history, [record["learning_rate"] for record in history])
    panels[len(metrics)].set(title="learning rate", xlabel="end of epoch", ylim=(0, None))
    for axes in panels[1 + len(metrics) :]:
        axes.remove()
    return figure


def _by_epoch(axes: Axes, history: Sequence[Mapping], values: Sequence[float], **options: Any) -> None:
    """Plot a value for each epoch."""
    axes.plot([record["epoch"] for record in history], values, marker="." if len(history) < 50 else "", **options)
    axes.set(xlabel="epoch")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def confusion_figure(counts: np.ndarray, iou: Mapping[str, float | None]) -> Figure:
    """Return where the pixels of each class went, as shares of its pixels, and each class's IoU as a bar.

    Args:
        counts: pixels (C, C) by label and prediction.
        iou: a value for each of the C names; None where the class occurs nowhere.
    """
    names = [_spelling(name if len(name) <= 18 else f"{name[:17]}…") for name in iou]
    side = max(5.0, 2.5 + 0.32 * len(names))
    figure = Figure(figsize=(1.7 * side, side), layout="constrained")
    matrix, bars = figure.subplots(1, 2, width_ratios=(1.5, 1))
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    image = matrix.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=matrix, shrink=0.7, label="share of the pixels of the label")
    matrix.set(xlabel="prediction", ylabel="label")
    matrix.set_xticks(range(len(names)), names, rotation=90)
    matrix.set_yticks(range(len(names)), names)
    values = list(iou.values())
    drawn = bars.barh(range(len(names)), [value or 0 for value in values])
    bars.bar_label(drawn, ["-" if value is None else f"{value:.2f}" for value in values], padding=2, fontsize="small")
    present = [value for value in values if value is not None]
    bars.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="IoU")  # the rows of the matrix
    if present:
        bars.axvline(np.mean(present), color="grey", linestyle="--", linewidth=1)
        bars.set_xlabel(f"IoU; the line is the mean, {np.mean(present):.3f}")
    bars.set_yticks(range(len(names)), names)
    return figure


def results_figure(
    curves: Mapping[str, Sequence[Sequence[float]]],
    hyperparameters: Mapping[str, Mapping[str, Any]] | None,
    published: Mapping[str, float],
    *,
    metric: str,
    better: Callable,
    differences: Mapping[str, Mapping[str, Sequence]],
) -> Figure:
    """Return a validation metric by epoch, and its best value against every hyperparameter, or by name.

    Args:
        curves: by name, the most important first, the metric of each epoch in each of the runs that differ in their
            seed only. The line is their mean, in a band from the lowest to the highest.
        hyperparameters: for every key that varies its value by name, of which the first PANELS - 1 are shown. None: one
            plot by name instead, of every run and their mean.
        published: by name, values to compare the best ones with, drawn as rings.
        metric: what it is called.
        better: max or min, which chooses the better of two values.
        differences: by title, for each name a difference, the ends of its interval, and a verdict; where that is "open"
            the mark is hollow.
    """
    colours = {name: COLOURS[rank] if rank < len(COLOURS) else "lightgrey" for rank, name in enumerate(curves)}
    best = {name: [better(run) for run in runs] for name, runs in curves.items()}
    of_best = f"best validation {metric}{'; rings: published' * bool(published)}"
    of_all: dict[str, Any] = {"best": best, "colours": colours, "published": published}
    panels: list[tuple[Callable, str, str]] = [
        (partial(_curves, curves=curves, colours=colours), "epoch", f"validation {metric}")
    ]
    if hyperparameters is None:
        panels.append((partial(_best_by_name, **of_all), of_best, ""))
    for key, values in list((hyperparameters or {}).items())[: PANELS - 1]:
        panels.append((partial(_best_by_value, values=values, **of_all), key, of_best))
    for title, found in differences.items():
        label = f"{title}\nwith its 95 % interval; hollow: open"
        panels.append((partial(_intervals, differences=found, colours=colours), label, ""))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.2 * len(curves)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (draw, x, y) in zip(axes, panels, strict=False):
        draw(axis)
        axis.set(xlabel=x, ylabel=y)
    for axis in axes[len(panels) :]:
        axis.remove()
    if hyperparameters is not None:
        lines, names = (part[: -len(COLOURS) - 1 : -1] for part in axes[0].get_legend_handles_labels())
        figure.legend(lines, names, loc="outside lower left", fontsize="small", ncols=columns)
    return figure


def _curves(axis: Axes, *, curves: Mapping[str, Sequence[Sequence[float]]], colours: Mapping[str, str]) -> None:
    """Plot the mean of each name's runs by epoch, in a band from the lowest to the highest."""
    for name in reversed(list(curves)):  # the best on top
        epochs = max(map(len, curves[name]))
        runs = np.array([[*run, *[np.nan] * (epochs - len(run))] for run in curves[name]])
        numbers = range(1, epochs + 1)
        axis.plot(numbers, np.nanmean(runs, 0), color=colours[name], marker=".", label=_spelling(name))
        if len(runs) > 1:
            lowest, highest = np.nanmin(runs, 0), np.nanmax(runs, 0)
            axis.fill_between(numbers, lowest, highest, color=colours[name], alpha=0.2, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _best_by_value(
    axis: Axes,
    *,
    values: Mapping[str, Any],
    best: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    published: Mapping[str, float],
) -> None:
    """Plot the mean of every name's best values against its value of a hyperparameter, with rings at published ones."""
    positions = dict(zip(best, _positions(axis, [values[name] for name in best]), strict=True))
    for name, position in positions.items():
        axis.plot(position, np.mean(best[name]), "o", color=colours[name])
        if name in published:
            axis.plot(position, published[name], "o", color=colours[name], markerfacecolor="none")


def _best_by_name(
    axis: Axes, *, best: Mapping[str, Sequence[float]], colours: Mapping[str, str], published: Mapping[str, float]
) -> None:
    """Plot a line of points for every name, the first on top."""
    for position, (name, values) in enumerate(best.items()):
        axis.scatter(values, [position] * len(values), color=colours[name])
        axis.plot(np.mean(values), position, marker="|", markersize=12, color=colours[name])
        if name in published:
            axis.plot(published[name], position, "o", color=colours[name], markerfacecolor="none")
    _name_rows(axis, best)


def _intervals(axis: Axes, *, differences: Mapping[str, Sequence], colours: Mapping[str, str]) -> None:
    """Plot a difference and its interval for every name, the first on top, beside a line at 0; hollow: it is open."""
    axis.axvline(0, color="grey", linewidth=0.8)
    for position, (name, (value, low, high, verdict)) in enumerate(differences.items()):
        colour = colours[name]
        axis.plot([low, high], [position] * 2, color=colour)
        axis.plot(value, position, "o", color=colour, markerfacecolor="white" if verdict == "open" else colour)
    _name_rows(axis, differences)


def _name_rows(axis: Axes, names: Iterable[str]) -> None:
    """Write names beside the rows of a plot, the first on top."""
    texts = [_spelling(name) for name in names]
    axis.set_yticks(range(len(texts)), texts, fontsize="small")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.invert_yaxis()


def _positions(axis: Axes, values: list) -> list[float]:
    """Return where values lie on the horizontal axis: by size, on a logarithmic scale over decades, else in a row."""
    numeric = all(type(value) in (int, float) for value in values)
    different: list[Any] = sorted(set(values)) if numeric else sorted(set(map(_spelling, values)))
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
