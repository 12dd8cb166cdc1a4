"""Score a checkpoint on a split: a table per class on the terminal, metrics_<split>_<restore_file>.json and .png."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from comparing import Counts, check_same_photos, mIoU, read_counts, write_counts
from engine.checkpoints import load_network, predicting_weights, weights_digest
from engine.cli import add_restore_file, experiment_parser, positive, run_main
from engine.devices import bar, is_main, loading_options, processes
from engine.evaluation import Scores, add_up, evaluate, find_data, make_dataset
from engine.run import trained_elsewhere
from model import UserError
from model.data_loader import make_loader
from model.inference import OriginalDataset, Segmenter, class_map, collate_originals
from model.layouts import LAYOUTS, Split
from model.metrics import BETTER, METRICS, Metrics, sparse
from model.voc import colour_mask, is_voc
from params import Params
from predict import add_testing_flags, make_segmenter
from utils import make_folder, read_json, replacing, save_figure, save_picture, table_text, write_json
from visualize import error_picture, spelling


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    add_restore_file(parser)
    parser.add_argument("--split", default="val", help="which list of the data set (default: %(default)s)")
    own_size = "score every photo at its own size, as the VOC challenge does; the flags below do so too"
    parser.add_argument("--original_size", action="store_true", help=own_size)
    add_testing_flags(parser)
    where = "write palette PNGs to DIR/<split>; VOC's classes to where the VOC server looks for them"
    parser.add_argument("--save_predictions", type=Path, metavar="DIR", help=where)
    worst = "draw the N photos with the lowest mIoU, in model_dir"
    parser.add_argument("--save_overlays", type=positive, metavar="N", help=worst)
    other = "of --save_overlays: draw the N photos on which this experiment and the other differ most, and both"
    parser.add_argument("--against", type=Path, metavar="OTHER_MODEL_DIR", help=other)
    args = parser.parse_args()
    if args.against and not args.save_overlays:
        parser.error("--against goes with --save_overlays N")
    args.original_size |= args.flip or bool(args.scales or args.save_predictions or args.save_overlays)
    args.scales = args.scales or [1.0]
    return args


def score_originals(
    segmenter: Segmenter, dataset: OriginalDataset, params: Params, save_to: Path | None = None
) -> Scores:
    """Predict every photo at its own size, and save it in a folder if given; each process does its part."""
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
    return add_up(metrics, own, dataset)


def find_other(
    folder: Path, split: Split, names: Sequence[str], device: torch.device, args: argparse.Namespace
) -> tuple[Counts, Segmenter]:
    """Return the counts of the experiment of --against, and what it segments photos with.

    Raises UserError unless it was scored on the same photos, with the same --scales and --flip and the checkpoint that
    it has now.
    """
    name = name_scores(args.against, folder, args)
    model, params, checkpoint = load_network(args.against, args.restore_file, device)
    counts, file = read_counts(args.against / f"counts_{name}.npz"), args.against / f"metrics_{name}.json"
    check_same_photos(Counts(split.ids, [*names], counts.pixels), counts, (str(args.model_dir), str(args.against)))
    found, needed = read_json(file, if_absent="evaluate.py writes it"), describe(checkpoint, args)
    alike = isinstance(found, dict) and needed.items() <= ({"weights": needed["weights"]} | found).items()
    if not alike or not counts.are_of(found.get("pixel_accuracy")):
        raise UserError(f"{file} is of another checkpoint, other --scales or --flip; score {args.against} again")
    return counts, make_segmenter(model, params, device, scales=args.scales, flip=args.flip)


def draw_overlays(
    segmenter: Segmenter,
    dataset: OriginalDataset,
    counts: Counts,
    other: tuple[Counts, Segmenter] | None,
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Draw the photos with the lowest mIoU, or with --against those whose mIoU differs most, the first by name first.

    They take the place of those of an earlier evaluation.
    """
    ours = theirs = rank = mIoU(counts.pixels)
    if other:
        check_same_photos(counts, other[0], (str(args.model_dir), str(args.against)))
        theirs = mIoU(other[0].pixels)
        rank = -abs(ours - theirs)
    order = [index for index in np.argsort(rank, kind="stable") if np.isfinite(rank[index])][: args.save_overlays]
    earlier = {*folder.glob("*.png")}
    for place, index in enumerate(order, 1):
        _, photo, mask = dataset[index]
        assert mask is not None  # it was scored
        id_, second = dataset.split.ids[index], None
        title = f"{id_}, mIoU {ours[index]:.3f}"
        if other:
            title += f"; the other, {args.against.name}, {theirs[index]:.3f}"
            second = other[1].segment(photo).cpu().numpy()
        prediction = segmenter.segment(photo).cpu().numpy()
        picture = error_picture(photo, mask, prediction, dataset.class_names, title=title, other=second)
        file = folder / f"{place:0{len(str(len(order)))}d}_{id_}.png"
        save_picture(picture, file)
        earlier.discard(file)
    for outdated in earlier:
        outdated.unlink()


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
    """Return where the pixels of each class went, as shares of its pixels, and each class's IoU as a bar.

    counts has the pixels (C, C) by label and prediction, iou a value for each of the C names; None: in no
    label or prediction.
    """
    names = [spelling(name if len(name) <= 18 else f"{name[:17]}…") for name in iou]
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
    drawn = bars.barh(range(len(names)), [value or 0 for value in iou.values()])
    texts = ["-" if value is None else f"{value:.2f}" for value in iou.values()]
    bars.bar_label(drawn, texts, padding=2, fontsize="small")
    bars.set(xlim=(0, 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="IoU")  # the rows of the matrix
    bars.set_yticks(range(len(names)), names)
    if present := [value or 0 for value, total in zip(iou.values(), totals[:, 0], strict=True) if total]:
        bars.axvline(np.mean(present), color="grey", linestyle="--", linewidth=1)
        bars.set_xlabel(f"IoU; the line is the mean, {np.mean(present):.3f}")
    return figure


def write_scores(
    scores: Scores, record: dict[str, Any], name: str, split: Split, names: Sequence[str], model_dir: Path
) -> None:
    """Write the counts of every photo, the confusion and, last, the metrics, and print these."""
    metrics, file = record | scores.metrics, model_dir / f"metrics_{name}.json"
    with replacing(model_dir / f"counts_{name}.npz") as temporary:
        write_counts(temporary, split.ids, names, scores.cells)
    save_figure(confusion_figure(scores.matrix, metrics["IoU"]), file.with_suffix(".png"))
    write_json(file, metrics)
    print(table(metrics))


def describe(checkpoint: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return what is written beside scores: which weights were scored, and how if at the photos' own size."""
    record = {"epoch": checkpoint.get("epoch"), "weights": weights_digest(predicting_weights(checkpoint))}
    return record | ({"scales": args.scales, "flip": args.flip} if args.original_size else {})


def name_scores(model_dir: Path, folder: Path, args: argparse.Namespace) -> str:
    """Return what the files of an experiment's scores are named by, with the data folder if it was trained on another.

    Where the folder of the run is gone, the data have moved.
    """
    kind = "_original_size" if args.scales == [1.0] and not args.flip else "_multi_scale"
    place = f"@{folder.resolve().name}" if trained_elsewhere(model_dir, folder) else ""
    return f"{args.split}{place}_{args.restore_file}{kind * args.original_size}"


def score_checkpoint(device: torch.device, args: argparse.Namespace) -> None:
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    predicted_only = bool(args.save_predictions and not args.save_overlays)
    folder, split, names = find_data(params, checkpoint, args, args.split, masks_required=not predicted_only)
    where, name, saved = f"{args.split} of {folder}", name_scores(args.model_dir, folder, args), None
    record, elsewhere = describe(checkpoint, args), trained_elsewhere(args.model_dir, folder) is not None
    if elsewhere:
        record["data_dir"] = str(folder.resolve())
    if args.original_size:
        size, overlays = "their own size", args.model_dir / f"overlays_{name}"
        other = find_other(folder, split, names, device, args) if args.against else None
        segmenter = make_segmenter(model, params, device, scales=args.scales, flip=args.flip)
        if args.save_overlays:
            make_folder(overlays, "--save_overlays")
        if args.save_predictions:  # for VOC's classes where its server looks (comp5: VOC's data only)
            below = f"results/VOC2012/Segmentation/comp5_{split.name}_cls" if is_voc(names) else split.name
            make_folder(saved := args.save_predictions / below, "--save_predictions")
        photos = OriginalDataset(split, class_names=names)
        scores = score_originals(segmenter, photos, params, saved)
    else:
        record |= {"image_size": params.image_size, "resize": params.resize}
        size = f"{params.image_size}x{params.image_size}"
        squares, batch = make_dataset(split, names, params, model), params.scoring_batch_size
        loader = make_loader(squares, batch_size=batch, device=device, **loading_options(params))
        scores = evaluate(model, loader, params, device, by_photo=True)
    scored = scores.metrics["mIoU"] is not None  # not so without masks, and for Cityscapes' test, all of it void
    if not scored and not predicted_only:
        raise UserError(f"split {where} has masks of nothing but void: it can be predicted, not scored")
    if not is_main():
        return
    if scored:
        write_scores(scores, record, name, split, names, args.model_dir)
        output = args.model_dir / f"metrics_{name}.json"
        found = f"{(scores.matrix.sum(1) > 0).sum()} of {len(names)} classes"
        print(f"\n{len(split.ids)} images of {where} at {size}, {found}, epoch {record['epoch']} -> {output} and .png")
        with suppress(UserError):  # the list that was trained on is not there
            seen = {*split.ids} & {*LAYOUTS[params.dataset](folder, params.train_split).ids}
            if seen and not elsewhere and args.split != params.train_split:
                print(f"{len(seen)} of them are in {params.train_split} too, and were trained on: it says little")
        if args.save_overlays:
            counts = read_counts(args.model_dir / f"counts_{name}.npz")
            draw_overlays(segmenter, photos, counts, other, overlays, args)
            print(f"{'those that differ most' if args.against else 'the worst of them'} -> {overlays}")
    else:
        print(f"{where} has {'masks of nothing but void' if split.masks else 'no masks'} and is not scored")
    if saved:
        print(f"{len(split.ids)} predictions -> {saved}")


def main(args: argparse.Namespace) -> None:
    with processes(args.device) as device:
        score_checkpoint(device, args)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), several_processes=True))
