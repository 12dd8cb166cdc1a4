"""Show how a network arrives at its class map: what each stage adds, and which pixels a prediction depends on."""

import argparse
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from engine.cli import add_folder, add_restore_file, experiment_parser, positive, run_main
from engine.devices import pick_device
from engine.evaluation import find_data
from model import UserError
from model.inference import Segmenter, class_map
from model.layouts import Split
from model.metrics import ConfusionMatrix
from model.photos import read_photo, used
from model.transforms import RESIZES, squares, to_input
from model.voc import ERROR_COLOUR, VOID, palette
from params import Params
from predict import find_photos, open_network
from utils import make_folder, save_figure, write_json
from visualize import spelling, titles

# Each step of the decoder: the layers that the score map by itself and the sum so far come from.
STEPS = {"s4": ("br4", "br4"), "+ s3": ("br3", "br5"), "+ s2": ("br2", "br6"), "+ s1": ("br1", "br7")}
LAST = "the result"  # the sum at the photo's size, after the last refinements
RESULTS = ("_stages.png", "_receptive_field.png")  # of a photo
SHARES = (0.5, 0.95)  # of the energy of a receptive field
TURNED_RIGHT = (70, 150, 255)  # the colour of such pixels: not green, which some cannot tell from red
OUTLINE = [withStroke(linewidth=3, foreground="black")]  # of what lies on photos
BARE: dict[str, Any] = {"xticks": [], "yticks": [], "frame_on": False}  # axes around pictures
Maps = Mapping[str, Mapping[str, np.ndarray]]  # what class_maps() returns


@dataclass(frozen=True)
class Field:
    """The effective receptive field of a logit: how much it depends on each pixel that the network reads of a photo.

    energy, float64 (h, w), sums to 1; at is the logit's row and column in it, and scale the photo's pixels per row and
    per column of energy. in_padding is the share of all energy that lay around the photo, and is not in energy.
    """

    energy: np.ndarray
    at: tuple[int, int]
    scale: tuple[float, float]
    in_padding: float = 0.0

    def radius(self, share: float) -> float:
        """Return the radius of the circle around the logit that holds a share of the energy, in pixels of the photo."""
        (rows, columns), (row, column), (down, across) = np.indices(self.energy.shape), self.at, self.scale
        distance = np.hypot((rows - row) * down, (columns - column) * across)
        return float(np.quantile(distance, share, weights=self.energy, method="inverted_cdf"))

    def smooth(self) -> np.ndarray:
        """Return the energy blurred by a Gaussian of a 50th of the longer side, for the gradient is grainy."""
        sigma = max(self.energy.shape) / 50
        kernel = [2 * min(round(3 * sigma), side - 1) + 1 for side in reversed(self.energy.shape)]  # less in a panorama
        return gaussian_blur(torch.from_numpy(self.energy)[None], kernel, sigma)[0].numpy()

    def numbers(self) -> dict[str, float]:
        """Return the energy in the padding, and for each of SHARES the radius, and the share of the photo in which the
        densest pixels hold it."""
        smooth, numbers = self.smooth(), {"energy_in_padding": self.in_padding}
        numbers |= {f"radius_{share:.0%}": self.radius(share) for share in SHARES}
        return numbers | {f"area_{share:.0%}": float((smooth >= level(smooth, share)).mean()) for share in SHARES}


def level(energy: np.ndarray, share: float) -> float:
    """Return the largest value such that the pixels of at least that value hold a share of the energy."""
    return -float(np.quantile(-energy, share, weights=energy, method="inverted_cdf"))


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    parser.add_argument("photos", nargs="*", metavar="PHOTO", help="files and folders (default: photos of val)")
    add_restore_file(parser)
    add_folder(parser, "--output_dir", "explanations", "folder of the results")
    parser.add_argument("--photos", dest="count", type=positive, metavar="N", help="how many of val (default: 8)")
    where = "the pixel whose receptive field is drawn (default: the photo's middle)"
    parser.add_argument("--at", nargs=2, type=int, metavar=("X", "Y"), help=where)
    parser.add_argument("--against", type=Path, metavar="OTHER_MODEL_DIR", help="draw its receptive field too")
    args = parser.parse_args()
    if (args.photos and args.count) or (args.at and not args.photos):
        parser.error("--at goes with photos of one's own, --photos N without")
    return args


def network_input(segmenter: Segmenter, photo: Image.Image) -> Tensor:
    """Return a photo as the network reads it, (1, 3, S, S) on the device."""
    (square,) = squares([photo], segmenter.sizes, segmenter.resize, segmenter.padding)
    return to_input(square, segmenter.device, **segmenter.input_options)


def receptive_field(segmenter: Segmenter, photo: Image.Image, at: tuple[int, int], index: int) -> Field:
    """Return the effective receptive field of the logit of a class, by its index, at a pixel x, y of a photo.

    Its energy is the squared gradient of the logit with respect to the network's input, summed over the channels (Luo
    et al., arXiv 1701.04128), inside the photo: padding is cut off.
    """
    x = network_input(segmenter, photo).requires_grad_()
    left, top, right, bottom = RESIZES[segmenter.resize](*photo.size, x.shape[-1])
    width, height = right - left, bottom - top
    column, row = int((at[0] + 0.5) * width / photo.width), int((at[1] + 0.5) * height / photo.height)
    (gradient,) = torch.autograd.grad(segmenter.model(x)[0, index, top + row, left + column], x)
    whole = gradient[0].double().square().sum(0).cpu().numpy()
    energy = whole[top:bottom, left:right]
    if not energy.sum() > 0:
        raise UserError("the result does not depend on the photo: was this network ever trained?")
    scale, in_padding = (photo.height / height, photo.width / width), 1 - float(energy.sum() / whole.sum())
    return Field(energy / energy.sum(), (row, column), scale, in_padding)


@torch.inference_mode()
def class_maps(segmenter: Segmenter, photo: Image.Image) -> Maps:
    """Return class maps of a photo by step, uint8 (H, W): "own", of its score map alone, and "sum", of all so far.

    "fused" is the sum before its boundary refinement. LAST has no score map of its own.
    """
    x, found = network_input(segmenter, photo), dict[str, tuple[Tensor, Tensor]]()
    with ExitStack() as hooks:
        for name in (*chain(*STEPS.values()), "br9"):
            keep = partial(lambda name, part, inputs, output: found.update({name: (inputs[0], output)}), name)
            hooks.enter_context(segmenter.model.get_submodule(name).register_forward_hook(keep))
        result = segmenter.model(x)
    left, top, right, bottom = RESIZES[segmenter.resize](*photo.size, x.shape[-1])

    def of_photo(logits: Tensor) -> np.ndarray:
        whole = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=True)[0]  # as the network does
        return class_map([whole[:, top:bottom, left:right]], width=photo.width, height=photo.height).cpu().numpy()

    maps = {
        step: {"own": of_photo(found[own][1]), "fused": of_photo(found[total][0]), "sum": of_photo(found[total][1])}
        for step, (own, total) in STEPS.items()
    }
    return maps | {LAST: {"fused": of_photo(found["br9"][0]), "sum": of_photo(result)}}


def agreement(labels: np.ndarray, prediction: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Return mIoU and pixel accuracy of a class map."""
    counted = ConfusionMatrix(num_classes)
    counted.update(torch.from_numpy(prediction)[None], torch.from_numpy(labels)[None])
    return {key: value for key, value in counted.compute().items() if key in ("mIoU", "pixel_accuracy")}


def turned(maps: Maps, labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by step which pixels it has turned right, and which wrong; none are void, which no map predicts."""
    right = [of_step["sum"] == labels for of_step in maps.values()]
    steps = zip(maps, right[:1] + right, right, strict=False)
    return {step: (after & ~before, before & ~after) for step, before, after in steps}


def stage_numbers(maps: Maps, labels: np.ndarray, num_classes: int) -> dict[str, dict[str, Any]]:
    """Return by step how well its maps agree with the labels, and the shares of pixels that it turned."""
    numbers = {}
    for step, (right, wrong) in turned(maps, labels).items():
        numbers[step] = agreement(labels, maps[step]["sum"], num_classes)
        numbers[step] |= {"turned_right": right.mean(), "turned_wrong": wrong.mean()}
        numbers[step]["changed_by_refinement"] = (maps[step]["fused"] != maps[step]["sum"]).mean()
        if "own" in maps[step]:
            numbers[step]["by_itself"] = agreement(labels, maps[step]["own"], num_classes)
    return numbers


def mean_field(fields: Sequence[Field], side: int) -> Field:
    """Return the mean of receptive fields, each moved so that its logit is in the middle, in the network's pixels."""
    total, edge = np.zeros((2 * side + 1, 2 * side + 1)), side - side // 2
    for field in fields:
        (height, width), (row, column) = field.energy.shape, field.at
        total[side - row : side - row + height, side - column : side - column + width] += field.energy
    in_padding = float(np.mean([field.in_padding for field in fields]))
    return Field(total[edge:-edge, edge:-edge] / len(fields), (side // 2, side // 2), (1.0, 1.0), in_padding)


# ---------------------------------------------------------------------------------------- pictures


def stages_figure(
    photo: Image.Image, truth: np.ndarray | None, maps: Maps, numbers: dict, names: Sequence[str], *, title: str
) -> Figure:
    """Draw photo and truth, and for each step its map by itself, the sum so far, and the pixels that it turned."""
    figure = Figure(figsize=(2.2 * (len(maps) + 1), 6.6 * photo.height / photo.width + 2.3), layout="constrained")
    axes, colours = figure.subplots(3, len(maps) + 1, subplot_kw=BARE), palette(names)
    figure.suptitle(spelling(title), fontsize="large")

    def show(row: int, column: int, title: str, picture: Any) -> None:
        axes[row, column].imshow(picture)
        axes[row, column].set_title(title, fontsize="small")

    show(0, 0, "photo", photo)
    labels, right_wrong = maps[LAST]["sum"], ("to the result", "away")
    said = {step: f"{step}: {found['pixel_accuracy']:.0%} as the result" for step, found in numbers.items()}
    said[LAST] = LAST
    if truth is not None:
        labels, right_wrong = truth, ("turned right", "wrong")
        said = {step: f"{step}: mIoU {found['mIoU']:.2f}" for step, found in numbers.items()}
        show(1, 0, "truth", colours[truth])
    dark = np.array(photo.convert("L").convert("RGB")) // 3
    for column, (step, (right, wrong)) in enumerate(turned(maps, labels).items(), 1):
        if "own" in maps[step]:
            show(0, column, f"{step.removeprefix('+ ')} by itself", colours[maps[step]["own"]])
        show(1, column, said[step], colours[maps[step]["sum"]])
        if column > 1:
            picture = np.where(right[..., None], TURNED_RIGHT, np.where(wrong[..., None], ERROR_COLOUR, dark))
            shares = zip((right, wrong), right_wrong, strict=True)
            show(2, column, ", ".join(f"{part.mean():.1%} {how}" for part, how in shares), picture)
    drawn = [of_step[key] for of_step in maps.values() for key in ("own", "sum") if key in of_step]
    present = np.unique([labels, *drawn]).tolist()
    entries = [("void (not counted)" if index == VOID else names[index], colours[index]) for index in present]
    entries += zip(right_wrong, map(np.array, (TURNED_RIGHT, ERROR_COLOUR)), strict=True)
    handles = [Patch(facecolor=colour / 255, edgecolor="black", label=spelling(label)) for label, colour in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize="small")
    return figure


def field_figure(fields: Mapping[str, tuple[Field, np.ndarray | None]], photo: Image.Image | None = None) -> Figure:
    """Draw receptive fields by their titles, over a photo if given, and beside each the coloured map of its network.

    Contours hold SHARES of the energy, in the densest area that does.
    """
    columns, shape = (2, photo.height / photo.width) if photo else (1, 1)
    figure = Figure(figsize=(4.8 * columns, len(fields) * (4.8 * shape + 1.4)), layout="constrained")
    axes = figure.subplots(len(fields), columns, squeeze=False, subplot_kw=BARE)
    for row, (title, (field, coloured)) in enumerate(fields.items()):
        smooth, (down, across), (height, width) = field.smooth(), field.scale, field.energy.shape
        extent, here = (0, width * across, height * down, 0), axes[row, 0]
        if photo:
            here.imshow(photo.convert("L"), cmap="gray", extent=extent)
        heat = np.sqrt(smooth / smooth.max())
        here.imshow(heat, cmap="inferno", extent=extent, alpha=0.7 * heat if photo else None)
        x, y = (np.arange(width) + 0.5) * across, (np.arange(height) + 0.5) * down
        for share, style, colour in zip(SHARES, ("solid", "dashed"), ("white", "cyan"), strict=True):
            lines = here.contour(x, y, smooth, levels=[level(smooth, share)], linestyles=style, colors=colour)
            lines.set_path_effects(OUTLINE)
        half, most = (field.radius(share) for share in SHARES)
        said = [*spelling(title).splitlines(), "lines: densest areas with 50 % (solid), 95 % (dashed)"]
        said += [f"radius around + with 50 %: {half:.0f} pixels, with 95 %: {most:.0f}"]
        said += [f"{field.in_padding:.0%} of the energy is in the padding, not shown"] * (field.in_padding > 0.005)
        here.set_title("\n".join(fill(line, 64) for line in said), fontsize="small")
        if coloured is not None:
            axes[row, 1].set_title("what it predicts", fontsize="medium")
            axes[row, 1].imshow(coloured)
        for each in axes[row]:
            each.plot(x[field.at[1]], y[field.at[0]], "+", color="lime", markersize=12, path_effects=OUTLINE)
    return figure


# ---------------------------------------------------------------------------------------- photos


def find_examples(
    params: Params, checkpoint: dict[str, Any], args: argparse.Namespace
) -> dict[Path, tuple[Path, Split | None, int]]:
    """Return the photos by the name of their results: file, and list and place where the run's data have it.

    Photos of val are drawn at random, always the same ones; those of one's own need no data set.
    """
    if not args.photos:
        _, val, _ = find_data(params, checkpoint, args)
        drawn = random.Random(0).sample(range(len(val.ids)), min(args.count or 8, len(val.ids)))
        return {Path(val.ids[place]): (val.images[place], val, place) for place in sorted(drawn)}
    places = dict[str, tuple[Split | None, int]]()
    for name in dict.fromkeys((params.train_split, "val")):
        with suppress(UserError):
            _, split, _ = find_data(params, checkpoint, args, name)
            places |= {os.path.realpath(file): (split, place) for place, file in enumerate(split.images)}
    photos = find_photos(args.photos, args.output_dir, RESULTS)
    return {name: (file, *places.get(os.path.realpath(file), (None, 0))) for name, file in photos.items()}


def main(args: argparse.Namespace) -> None:
    folders = [args.model_dir, *filter(None, [args.against])]
    opened = [open_network(folder, args.restore_file, pick_device(args.device)) for folder in folders]
    networks = dict(zip(titles(folders), opened, strict=True))
    segmenter, names, params, checkpoint = opened[0]
    examples = find_examples(params, checkpoint, args)
    for file, *_ in examples.values():  # before anything is written
        width, height = read_photo(file).size
        if args.at and not (0 <= args.at[0] < width and 0 <= args.at[1] < height):
            raise UserError(f"--at {args.at[0]} {args.at[1]} is not in {file}, which is {width}x{height}")
    make_folder(args.output_dir, "--output_dir")
    report, fields = {"photos": dict[str, Any]()}, {name: list[Field]() for name in networks}
    for name, (file, split, place) in examples.items():
        photo, mask = split.read(place, len(names)) if split else (read_photo(file), None)
        truth = None if mask is None or used(mask) == [VOID] else np.array(mask)
        at = args.at or (photo.width // 2, photo.height // 2)
        maps = class_maps(segmenter, photo)
        stages = stage_numbers(maps, maps[LAST]["sum"] if truth is None else truth, len(names))
        drawn, found, first = {}, {}, ""  # all networks are asked for the class that the first one predicts
        for network, (other, classes, _, _) in networks.items():
            labels = other.segment(photo).cpu().numpy()
            predicted = classes[labels[at[1], at[0]]]
            first = first or predicted
            asked = first if first in classes else predicted
            field = receptive_field(other, photo, at, classes.index(asked))
            fields[network].append(field)
            found[network] = {"class": asked, "predicted": predicted, **field.numbers()}
            but = f", where it predicts {predicted!r}," * (predicted != asked)
            title = f"{network}\nwhat its score of {asked!r} at +{but} is sensitive to"
            drawn[title] = field, palette(classes)[labels]
        output = args.output_dir / name
        output.parent.mkdir(parents=True, exist_ok=True)
        figure = stages_figure(photo, truth, maps, stages, names, title=f"{next(iter(networks))}: {name}")
        for part, ending in zip((figure, field_figure(drawn, photo)), RESULTS, strict=True):
            save_figure(part, output.with_name(output.name + ending))
        numbers = {"photo": str(file), "held_against": "the result" if truth is None else "the truth", "stages": stages}
        report["photos"][str(name)] = numbers | {"at": at, "receptive_field": found}
    if not args.photos:
        sides = {network: other.sizes[0] for network, (other, *_) in networks.items()}
        means = {network: mean_field(found, sides[network]) for network, found in fields.items()}
        of_all = f"mean over the middles of {len(examples)} photos, in pixels of its input of"
        drawn = {f"{name}\n{of_all} {sides[name]}x{sides[name]}": (field, None) for name, field in means.items()}
        save_figure(field_figure(drawn), args.output_dir / "mean_receptive_field.png")
        report["mean_receptive_field"] = {name: field.numbers() for name, field in means.items()}
    write_json(args.output_dir / "explain.json", report)
    print(f"{len(examples)} photos -> {args.output_dir}")


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
