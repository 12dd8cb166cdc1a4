"""results.html: the tables of synthesize_results.py with figures and photos, one file that needs no network."""

import re
import warnings
from argparse import Namespace
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader  # which torch needs too
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import comparing
from engine.devices import pick_device
from engine.evaluation import find_data
from evaluate import WHICH, choose
from model import UserError
from model.voc import VOID, is_background, palette
from predict import open_network
from utils import ROOT, write_text
from visualize import blend, spelling

STYLE: Any = ["seaborn-v0_8-whitegrid", {"svg.fonttype": "none", "svg.hashsalt": ""}]
RUNS, PHOTOS, SIDE = 6, 3, 320  # rows in the figure of classes, photos of a kind, pixels of their longer side


@dataclass
class Scored:
    """A run that was scored photo by photo on a split."""

    name: str
    folder: Path
    split: str
    counts: comparing.Counts


@dataclass
class Section:
    """Rows on the same data: the table as the terminal shows it, its first column the name, and what belongs to it."""

    title: str
    table: pd.DataFrame  # of str
    curves: Mapping[str, Sequence[Sequence[float]]]  # by row, the metric of each epoch in each of its runs
    metric: str
    comparisons: Sequence[Any]  # of synthesize_results.py
    runs: list[Scored]


@dataclass
class Gallery:
    """Photos of a split by what they were chosen for, and the colours of the classes; or a note why there are none."""

    title: str
    note: str = ""
    groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)


def write_page(path: Path, sections: Sequence[Section], notes: Sequence[str], gallery: Gallery | None = None) -> None:
    """Write a page, of the same bytes whenever all that it shows is the same. notes explain the tables."""
    environment = Environment(loader=FileSystemLoader(ROOT), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with style.context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # that matplotlib's font has not; the browser's may
        parts = [(section, draw_figures(section, f"section{place}")) for place, section in enumerate(sections)]
    environment.globals |= {"title": path.resolve().parent.name, "values": comparing.values, "zip": zip, "notes": notes}
    write_text(path, environment.get_template("results_page.html.jinja").render(parts=parts, gallery=gallery))


# ---------------------------------------------------------------------------------------- figures


def styles(section: Section) -> dict[str, str]:
    """Return the colour and the kind of line of each row."""
    rows = enumerate(section.table.iloc[:, 0])
    return {row: f"C{place % 10}{('-', '--', ':', '-.')[place // 10 % 4]}" for place, row in rows}


def draw_figures(section: Section, key: str) -> dict[str, str]:
    """Return the figures of a section by their captions; key is one of its own."""
    of_rows, drawn = styles(section), dict[str, Figure]()
    if section.curves:
        seeds = ", in bold the mean of the seeds" * any(len(runs) > 1 for runs in section.curves.values())
        drawn[f"Validation {section.metric} by epoch{seeds}"] = curves_figure(section, of_rows)
    for found in section.comparisons:
        for metric in found.metrics if found.differences and not found.few else ():
            drawn[f"Difference in {metric} on {found.split}"] = differences_figure(found, metric, of_rows)
        about = ", with 95 % intervals" * (max(found.photos) >= comparing.FEW)
        about += f", of {RUNS} of the {len(found.class_IoU)} rows" * (len(found.class_IoU) > RUNS)
        drawn[f"IoU of each class on {found.split}{about}"] = classes_figure(found, of_rows)
    return {caption: svg(figure, f"{key}-{place}") for place, (caption, figure) in enumerate(drawn.items())}


def svg(figure: Figure, key: str) -> str:
    """Return a figure as an element of a page, with ids that begin with a key: other figures have the same ones."""
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    _, start, text = stream.getvalue().partition("<svg")
    return start + re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{key}-", text)


def add_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    columns = max(1, min(4, 110 // (8 + max(map(len, handles)))))
    figure.legend(handles.values(), [*map(spelling, handles)], loc="outside lower center", ncols=columns)


def curves_figure(section: Section, styles: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(8, 4.5 + 0.1 * len(section.curves)), layout="constrained")
    axes, handles = figure.subplots(), {}
    for row, runs in section.curves.items():
        values = pd.DataFrame(zip_longest(*runs), dtype=float)  # (epochs, runs)
        epochs, marker = values.index + 1, "." if len(values) < 50 else ""
        axes.plot(epochs, values, styles[row], linewidth=0.8, alpha=0.4)
        (handles[row],) = axes.plot(epochs, values.mean(axis=1), styles[row], marker=marker, linewidth=1.8)
    axes.set(xlabel="epoch", ylabel=f"validation {section.metric}")
    axes.locator_params(axis="x", integer=True)
    add_legend(figure, handles)
    return figure


def differences_figure(found: Any, metric: str, styles: Mapping[str, str]) -> Figure:
    words = {row: found.words[row][metric] for row in styles if row in found.words}
    name = f"difference from {found.baseline}, with its 95 % interval"
    ends, colours = [found.differences[row][metric][:3] for row in words], [styles[row][:2] for row in words]
    return intervals_figure([f"{row}: {word}" for row, word in words.items()], {name: (ends, colours)})


def classes_figure(found: Any, styles: Mapping[str, str]) -> Figure:
    series = {}
    for row in [row for row in {found.baseline: "", **styles} if row in found.class_IoU][:RUNS]:
        known = zip(found.class_IoU[row], found.photos, strict=True)
        series[row] = [told(each, photos >= comparing.FEW) for each, photos in known], styles[row][:2]
    return intervals_figure(found.class_names, series)


def told(found: Sequence[float] | None, sure: bool) -> Sequence[float | None]:
    """Return a number and, if they are sure enough to be told, the ends of its interval."""
    return [*found[:3]] if found and sure else [found[0] if found else None, None, None]


def intervals_figure(lines: Sequence[str], series: Mapping[str, tuple]) -> Figure:
    """Draw on every line, the first on top, what told() returns of each series, in its colour or in several."""
    figure = Figure(figsize=(8, 1.2 + len(lines) * (0.18 + 0.09 * len(series))), layout="constrained")
    axes, places, handles = figure.subplots(), np.arange(len(lines)), {}
    for number, (name, (values, colours)) in enumerate(series.items()):
        value, low, high = np.array(values, float).T
        here = places + 0.8 * ((number + 0.5) / len(series) - 0.5)
        handles[name] = axes.hlines(here, low, high, colours, linewidth=2), axes.scatter(value, here, 18, colours)
    for odd in places[1::2]:  # so that the eye keeps the line
        axes.axhspan(odd - 0.5, odd + 0.5, color="grey", alpha=0.1, linewidth=0)
    axes.axvline(0, color="grey", linestyle="dashed")
    axes.set(yticks=places, yticklabels=[*map(spelling, lines)], ylim=(len(lines) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=7)
    add_legend(figure, handles)
    return figure


# ---------------------------------------------------------------------------------------- photos


def draw_gallery(runs: Sequence[Scored]) -> Gallery:
    """Return a few photos as the first one or two runs predict them; a note of why not where the data are gone, say."""
    try:
        return draw_photos(runs[:2])
    except UserError as error:
        why = str(error).removesuffix("; give --data_dir")
        return Gallery(f"Photos of {runs[0].split}", note=f"There are none here: {why}")


def choose_each_once(scores: np.ndarray) -> dict[str, list[int]]:
    """Return the places of the worst, median, best and some random photos, each once; NaN is no score."""
    chosen, taken = dict[str, list[int]](), set[int]()
    for kind in WHICH:
        places = choose(kind, len(scores), scores, scores)
        chosen[kind] = [place for place in places if place not in taken][:PHOTOS]
        taken |= {*chosen[kind]}
    return chosen


def draw_photos(runs: Sequence[Scored]) -> Gallery:
    first, last = runs[0], runs[-1]
    comparing.check_same_photos(first.counts, last.counts, (first.name, last.name))
    networks = {run.name: open_network(run.folder, "best", pick_device("auto")) for run in runs}
    _, names, params, checkpoint = networks[first.name]
    here = Namespace(model_dir=first.folder, restore_file="best", data_dir=None)
    _, split, _ = find_data(params, checkpoint, here, first.split, masks_required=True)
    if split.ids != first.counts.ids:
        raise UserError(f"the list {split.name} is not the one that {first.name} was scored on; run evaluate.py again")
    scores = {run.name: comparing.mIoU(run.counts.pixels) for run in runs}
    gallery, present = Gallery(f"Photos of {first.split}, chosen by the mIoU of {first.name}"), set[int]()
    for kind, places in choose_each_once(scores[first.name]).items():
        for place in places:
            photo, mask = split.read(place, len(names))
            maps = {"truth": np.array(mask)}
            maps |= {name: network.segment(photo).cpu().numpy() for name, (network, *_) in networks.items()}
            present |= {*np.unique([*maps.values()]).tolist()}
            photo = ImageOps.contain(photo, (SIDE, SIDE))
            pictures = [embed(photo), *(embed(blend(photo, labels, names)) for labels in maps.values())]
            entry = {"id": split.ids[place], "scores": {name: each[place] for name, each in scores.items()}}
            gallery.groups.setdefault(kind, []).append(entry | {"pictures": pictures})
    for index in sorted(present):
        name = "void" if index == VOID else names[index]
        gallery.legend[name] = "none" if is_background(name) else f"rgb{(*palette(names)[index].tolist(),)}"
    return gallery


def embed(picture: Image.Image) -> str:
    """Return a picture as the address of an <img>: a JPEG."""
    picture.save(stream := BytesIO(), "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"
