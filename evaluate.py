"""Score a checkpoint on a split: a table per class on the terminal, metrics_<split>_<restore_file>.json and .png.

Of several experiments, sweeps or splits, score what is not scored yet: a line for each on the terminal.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from comparing import Counts, check_same_photos, mIoU, read_counts, write_counts
from engine.checkpoints import checkpoint_path, load_network, predicting_weights, weights_digest
from engine.cli import add_restore_file, experiment_parser, message, positive, run_main
from engine.devices import agreed, bar, gather, is_main, loading_options, processes
from engine.evaluation import Scores, add_up, evaluate, find_data, make_dataset
from engine.results import find
from engine.run import is_running, trained_elsewhere
from model import UserError
from model.data_loader import make_loader
from model.inference import OriginalDataset, Segmenter, class_map, collate_originals
from model.layouts import GROUP, LAYOUTS, Split
from model.metrics import AT_ORIGINAL_SIZE, BETTER, METRICS, Metrics, sparse
from model.net import FCN_GCN
from model.voc import colour_mask, is_voc
from params import Params
from predict import add_testing_flags, make_segmenter
from utils import grouped, make_folder, read_json, replacing, save_figure, save_picture, table_text, write_json
from visualize import error_picture, spelling, titles

WHICH = ("worst", "median", "best", "random")
NUMBERED = 30  # classes: with more, the cells of the confusion have no room for numbers


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__, several=True)
    add_restore_file(parser)
    parser.add_argument("--split", nargs="+", default=["val"], help="which lists of the data set (default: val)")
    own_size = "score every photo at its own size, as the VOC challenge does; the flags below do so too"
    parser.add_argument("--original_size", action="store_true", help=own_size)
    add_testing_flags(parser)
    where = "write palette PNGs to DIR/<split>; VOC's classes to where the VOC server looks for them"
    parser.add_argument("--save_predictions", type=Path, metavar="DIR", help=where)
    draw = "draw N photos (default: %(const)s) with truth, prediction and errors, in model_dir"
    parser.add_argument("--save_overlays", type=positive, nargs="?", const=10, metavar="N", help=draw)
    which = "of --save_overlays: by mIoU worst (default), best, median or random; or the ids of photos"
    parser.add_argument("--which", nargs="+", metavar="WHICH", help=which)
    other = "of --save_overlays: draw this experiment and the other; by default where they differ most"
    parser.add_argument("--against", type=Path, metavar="OTHER_MODEL_DIR", help=other)
    args = parser.parse_args()
    for flag in ("which", "against"):
        if getattr(args, flag) and not args.save_overlays:
            parser.error(f"--{flag} goes with --save_overlays")
    given = args.which or []
    if len(given) > 1 and {*given} & {*WHICH}:
        parser.error(f"--which takes one of {', '.join(WHICH)}, or ids of photos")
    ranked = len(given) == 1 and given[0] in WHICH
    args.ids = [] if ranked else given
    args.which = given[0] if ranked else "most different" if args.against else "worst"
    default = args.which == ("most different" if args.against else "worst")
    chosen = "_chosen" if args.ids else "" if default else f"_{args.which}"
    args.kind = "_against" * bool(args.against) + chosen  # of the folder of overlays
    args.original_size |= args.flip or bool(args.scales or args.save_predictions or args.save_overlays)
    args.scales = args.scales or [1.0]
    return args


@dataclass(frozen=True)
class Work:
    """A checkpoint, the split that it is scored on, and how."""

    args: argparse.Namespace  # of the command for one model_dir and one split
    model: FCN_GCN
    params: Params
    folder: Path  # of the data set
    split: Split
    names: list[str]  # of the classes
    name: str  # what the files of the scores are named by
    record: dict[str, Any]  # is written beside the scores: which weights were scored, and how

    metrics_file = property(lambda self: self.args.model_dir / f"metrics_{self.name}.json")
    counts_file = property(lambda self: self.args.model_dir / f"counts_{self.name}.npz")


def prepare(args: argparse.Namespace, device: torch.device) -> Work:
    """Open a checkpoint and find its split. Raises UserError if they do not fit, or lack what the flags name.

    Files are named by the data folder too if the run was trained on another. Where that one is gone, the data have
    moved.
    """
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    predicted_only = bool(args.save_predictions and not args.save_overlays)
    folder, split, names = find_data(params, checkpoint, args, args.split, masks_required=not predicted_only)
    if unknown := next((id_ for id_ in args.ids if id_ not in split.ids), None):
        near = ", ".join(difflib.get_close_matches(unknown, split.ids) or split.ids[:3])
        raise UserError(f"--which {unknown}: no photo of {args.split}; give ids, as {near}, or {' or '.join(WHICH)}")
    if split.group:
        grouped(split.ids, split.group, source=f"{GROUP} of {folder}:")  # or comparisons would refuse it
    record = {"epoch": checkpoint.get("epoch"), "weights": weights_digest(predicting_weights(checkpoint))}
    place = kind = ""
    if trained_elsewhere(args.model_dir, folder):
        record["data_dir"], place = str(folder.resolve()), f"@{folder.resolve().name}"
    if args.original_size:
        record |= {"scales": args.scales, "flip": args.flip}
        kind = "_original_size" if args.scales == [1.0] and not args.flip else "_multi_scale"
    else:
        record |= {"image_size": params.image_size, "resize": params.resize}
    return Work(args, model, params, folder, split, names, f"{args.split}{place}_{args.restore_file}{kind}", record)


def changed_since(work: Work) -> bool:
    """Return whether photos or masks have been written after an earlier evaluation, masks that were corrected say."""
    files = [*work.split.images, *(work.split.masks or [])]
    return work.metrics_file.exists() and max(map(os.path.getmtime, files)) > work.metrics_file.stat().st_mtime


def scored_before(work: Work) -> dict[str, Any] | None:
    """Return the metrics of an earlier evaluation of the same weights in the same way, of photos of the same names."""
    with suppress(UserError):  # absent or damaged
        found, counts = read_json(work.metrics_file, if_absent=""), read_counts(work.counts_file)
        wanted = METRICS.keys() - (set() if work.args.original_size else AT_ORIGINAL_SIZE)  # a new one is missing
        same = isinstance(found, dict) and work.record.items() <= found.items() and wanted <= found.keys()
        if same and (counts.ids, counts.class_names) == (work.split.ids, [*work.names]):
            return found if counts.are_of(found.get("pixel_accuracy")) else None
    return None


def score(work: Work, segmenter: Segmenter | None, saved: Path | None, device: torch.device) -> Scores:
    """Score with a segmenter at the photos' own size, saving predictions in a folder if given, else as training does.

    Each process does its part.
    """
    params = work.params
    if segmenter:
        photos = OriginalDataset(work.split, class_names=work.names)
        metrics, own = agreed(count_originals, segmenter, photos, params, saved)
        return add_up(metrics, own, photos)
    squares = agreed(make_dataset, work.split, work.names, params, work.model)
    batch = params.scoring_batch_size
    loader = make_loader(squares, batch_size=batch, device=device, **loading_options(params))
    return evaluate(work.model, loader, params, device, by_photo=True)


def count_originals(
    segmenter: Segmenter, dataset: OriginalDataset, params: Params, save_to: Path | None
) -> tuple[Metrics, dict[int, np.ndarray]]:
    """Predict this process's part of the photos; return its metrics, and the sparse() counts of each by its index."""
    collate = partial(collate_originals, sizes=segmenter.sizes, resize=params.resize, padding=segmenter.padding)
    loader = make_loader(dataset, batch_size=params.scoring_batch_size, collate=collate, **loading_options(params))
    metrics, own = Metrics(params.num_classes, segmenter.device, original_size=True), dict[int, np.ndarray]()
    with bar(sum(loader.batch_sampler.sizes), "predicting") as done:
        for indices, sizes, inputs, masks in loader:
            looks = segmenter.logits(inputs, sizes)
            for index, (width, height), maps, mask in zip(indices, sizes, looks, masks, strict=True):
                prediction = class_map(maps, width=width, height=height)  # uint8 (H, W) on the device
                if save_to:
                    picture = colour_mask(prediction.cpu().numpy(), dataset.class_names)
                    save_picture(picture, save_to / f"{dataset.split.ids[index]}.png")
                if mask is not None:
                    counts = metrics.update(prediction[None], mask.to(segmenter.device)[None])
                    own[index] = sparse(counts[0].cpu())
                done.update()
    return metrics, own


def find_other(work: Work, device: torch.device) -> tuple[Counts, Segmenter]:
    """Return the counts of the experiment of --against, and what it segments photos with.

    Raises UserError unless it was scored on the same list, in the same way and with the checkpoint that it has now.
    """
    args = work.args
    other = prepare(argparse.Namespace(**vars(args) | {"model_dir": args.against, "data_dir": work.folder}), device)
    if scored_before(other) is None:
        said = f"{other.metrics_file} is absent, or of other weights, photos, flags or metrics than now"
        raise UserError(f"{said}; score {args.against} first, with the same --split, --scales and --flip")
    counts = read_counts(other.counts_file)
    return counts, make_segmenter(other.model, other.params, device, scales=args.scales, flip=args.flip)


def choose(which: str, count: int, ours: np.ndarray, theirs: np.ndarray) -> list[int]:
    """Return the indices of at most count photos from their mIoU, NaN where all is void, by two experiments."""
    rank = {  # the lowest first
        "worst": ours,
        "best": -ours,
        "median": abs(ours - np.nanmedian(ours)),
        "random": np.random.default_rng(0).permutation(len(ours)),
        "most different": -abs(ours - theirs),
    }[which]
    return [index for index in np.argsort(rank, kind="stable") if np.isfinite(ours[index])][:count]


def draw_overlays(
    work: Work, segmenter: Segmenter, counts: Counts, other: tuple[Counts, Segmenter] | None, folder: Path
) -> None:
    """Draw the photos that --which names, numbered in that order, with --against by both experiments.

    They take the place of those of an earlier evaluation.
    """
    args, ids, segmenters, scores = work.args, counts.ids, [segmenter], [mIoU(counts.pixels)]
    runs = titles([args.model_dir, *filter(None, [args.against])])
    if other:
        check_same_photos(counts, other[0], (str(args.model_dir), str(args.against)))
        scores.append(mIoU(other[0].pixels))
        segmenters.append(other[1])
    order = [*map(ids.index, args.ids)] or choose(args.which, args.save_overlays, scores[0], scores[-1])
    photos, earlier = OriginalDataset(work.split, class_names=work.names), {*folder.glob("*.png")}
    for place, index in enumerate(order, 1):
        _, photo, mask = photos[index]
        assert mask is not None  # it was scored
        said = [f"{run}, mIoU {values[index]:.3f}" for run, values in zip(runs, scores, strict=True)]
        found = [segmenter.segment(photo).cpu().numpy() for segmenter in segmenters]
        predictions = list(zip(said, found, strict=True))
        file = folder / f"{place:0{len(str(len(order)))}d}_{ids[index]}.png"
        save_picture(error_picture(photo, mask, predictions, work.names, title=ids[index]), file)
        earlier.discard(file)
    for outdated in earlier:
        outdated.unlink()
    print(f"{len(order)} overlays ({' '.join(args.ids) or args.which}) -> {folder}")


def table(metrics: dict[str, Any]) -> str:
    """Return the result as text: a row per class, then the metrics over all classes."""
    columns = {about.column: metrics[name] for name, about in METRICS.items() if about.column and name in metrics}
    rows = [(table_text(name), *(column[name] for column in columns.values())) for name in metrics["IoU"]]
    overall = [(key, value) for key, value in metrics.items() if key in BETTER and value is not None]
    options: dict[str, Any] = {"tablefmt": "pipe", "floatfmt": ".4f", "missingval": "-"}
    options["disable_numparse"] = [0]  # names stay, also those that look like numbers
    classes = tabulate(rows, headers=("class", *columns), **options)
    return f"{classes}\n\n{tabulate(overall, headers=('metric', 'value'), **options)}"


def confusion_figure(counts: np.ndarray, iou: Mapping[str, float | None]) -> Figure:
    """Return where the pixels of each class went, as shares of its pixels, and beside its name its IoU.

    counts has the pixels (C, C) by label and prediction, iou a value for each of the C names; None: in no label or
    prediction, and not drawn where others are.
    """
    shown = [place for place, value in enumerate(iou.values()) if value is not None] or [*range(len(iou))]
    counts, iou = counts[np.ix_(shown, shown)], dict([*iou.items()][place] for place in shown)
    names = [spelling(name if len(name) <= 18 else f"{name[:17]}…") for name in iou]
    side = max(5.0, 2.5 + 0.32 * len(names))
    figure = Figure(figsize=(1.25 * side, side), layout="constrained")
    axes = figure.subplots()
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, shrink=0.7, label="share of the pixels of the label")
    for row, column in np.argwhere(shares >= 0.005) if len(names) <= NUMBERED else ():
        share = shares[row, column]
        colour, size = "white" if share > 0.6 else "black", max(6.5, 11 - len(names) / 3)
        options: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}  # or the layout would take long
        axes.text(column, row, f"{share:.2f}", color=colour, fontsize=size, **options)
    values = ["-" if value is None else f"{value:.2f}" for value in iou.values()]
    axes.set(xlabel="prediction", ylabel="label, and the IoU of its class")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), [f"{name}  {value:>4}" for name, value in zip(names, values, strict=True)])
    return figure


def write_scores(scores: Scores, work: Work) -> dict[str, Any]:
    """Write the counts of every photo, the confusion and, last, the metrics, and return these."""
    metrics = work.record | scores.metrics | {"group": work.split.group}  # for comparisons
    with replacing(work.counts_file) as temporary:
        write_counts(temporary, work.split.ids, work.names, scores.cells)
    save_figure(confusion_figure(scores.matrix, metrics["IoU"]), work.metrics_file.with_suffix(".png"))
    write_json(work.metrics_file, metrics)
    return metrics


def report(work: Work, metrics: dict[str, Any], line: str) -> None:
    """Print a line, or the metrics as a table where there is none, and whether they are of photos trained on."""
    args, size = work.args, work.params.image_size
    if line:
        print(f"{line}{', but still training' * is_running(args.model_dir)}", flush=True)
    else:
        where = f"{args.split} of {work.folder} at {'their own size' if args.original_size else f'{size}x{size}'}"
        found = f"{sum(map(bool, metrics['frequency'].values()))} of {len(work.names)} classes"
        said = f"{len(work.split.ids)} images of {where}, {found}, epoch {metrics['epoch']}"
        print(f"{table(metrics)}\n\n{said} -> {work.metrics_file} and .png")
    with suppress(UserError):  # the list that was trained on is not there
        seen = {*work.split.ids} & {*LAYOUTS[work.params.dataset](work.folder, work.params.train_split).ids}
        if seen and "data_dir" not in work.record and args.split != work.params.train_split:
            print(f"{len(seen)} of them are in {work.params.train_split} too, and were trained on: it says little")


def score_checkpoint(args: argparse.Namespace, device: torch.device, title: str = "") -> None:
    """Score a checkpoint on a split; write and print what the flags name.

    With a title, that of the line for one of several scores, it is not scored again if it was scored before.
    """
    work = agreed(prepare, args, device)
    other = agreed(find_other, work, device) if args.against else None
    metrics = before = gather(scored_before(work) if title and not changed_since(work) else None)[0]
    where, predicted_only = f"{args.split} of {work.folder}", bool(args.save_predictions and not args.save_overlays)
    segmenter, saved, overlays = None, None, args.model_dir / f"overlays_{work.name}{args.kind}"
    if args.original_size and (args.save_overlays or not before):
        segmenter = make_segmenter(work.model, work.params, device, scales=args.scales, flip=args.flip)
    if args.save_overlays:
        make_folder(overlays, "--save_overlays")
    if args.save_predictions:  # for VOC's classes where its server looks (comp5: VOC's data only)
        below = f"results/VOC2012/Segmentation/comp5_{args.split}_cls" if is_voc(work.names) else args.split
        make_folder(saved := args.save_predictions / below, "--save_predictions")
    if not before:
        scores = score(work, segmenter, saved, device)
        scored = scores.metrics["mIoU"] is not None  # not so without masks, and for Cityscapes' test, all of it void
        if not scored and not predicted_only:
            raise UserError(f"split {where} has masks of nothing but void: it can be predicted, not scored")
        metrics = write_scores(scores, work) if scored and is_main() else None
    if not is_main():
        return
    if before and before.get("group") != work.split.group:
        write_json(work.metrics_file, before | {"group": work.split.group})
    if metrics:
        report(work, metrics, title and f"{title}  mIoU {metrics['mIoU']:.4f}  {'was scored' if before else 'scored'}")
    else:
        print(f"{where} has {'masks of nothing but void' if work.split.masks else 'no masks'} and is not scored")
    if segmenter and args.save_overlays:
        draw_overlays(work, segmenter, read_counts(work.counts_file), other, overlays)
    if saved:
        print(f"{len(work.split.ids)} predictions -> {saved}")


def one_by_one(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments for each split of each experiment, in other folders of all below that have a checkpoint."""
    found = []
    for folder in args.model_dir:
        trials = [folder]
        if (folder / "search_space.json").exists() or not (folder / "params.json").exists():
            with suppress(UserError):  # there are none: then it is the folder that has no checkpoint
                below = [trial for trial in find(folder) if checkpoint_path(trial, args.restore_file).exists()]
                trials = below or trials
        found += [(trial, split) for trial in trials for split in args.split]
    return [argparse.Namespace(**vars(args) | {"model_dir": f, "split": s}) for f, s in dict.fromkeys(found)]


def main(args: argparse.Namespace) -> int:
    """Score all that the flags name. Returns the exit status: 1 if one of several cannot be scored."""
    works, faults = one_by_one(args), set[str]()
    with processes(args.device) as device:
        if len(works) == 1 and [works[0].model_dir] == args.model_dir:
            score_checkpoint(works[0], device)
            return 0
        if args.save_predictions:
            raise UserError("--save_predictions takes one experiment and one --split, for all would lie in one folder")
        folders, splits = (max(len(str(getattr(one, key))) for one in works) for key in ("model_dir", "split"))
        for one in works:
            try:
                score_checkpoint(one, device, f"{one.model_dir!s:{folders}}  {one.split:{splits}}")
            except UserError as error:
                fault = f"evaluate.py: {one.model_dir}: {message(error)}"
                if is_main() and fault not in faults:
                    print(fault, file=sys.stderr)
                faults.add(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), several_processes=True))
