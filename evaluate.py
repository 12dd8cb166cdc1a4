"""Score a checkpoint on a split: a table per class on the terminal, metrics_<split>_<restore_file>.json and .png."""

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from comparing import Counts, check_same_photos, mIoU, read_counts, write_counts
from engine import distributed, ranks
from engine.checkpoints import agreed_class_names, checkpoint_path, load_network
from engine.cli import (
    add_restore_file,
    add_testing_flags,
    experiment_parser,
    positive,
    run_main,
    stop_if_asked,
)
from engine.devices import autocast, input_options, loading_options
from engine.folders import data_dir
from engine.training import scalars
from model import UserError
from model.data_loader import (
    Loader,
    OriginalDataset,
    OriginalLoader,
    SegmentationDataset,
    make_loader,
    make_original_loader,
)
from model.encoders import fold_batch_norm
from model.inference import Segmenter, class_map
from model.layouts import Split, find_split
from model.losses import SegmentationLoss
from model.metrics import BoundaryMetrics, ConfusionMatrix, sparse
from model.net import FCN_GCN
from model.parallel import all_reduce_sum, exact_dtype
from model.transforms import to_input
from model.voc import colour_mask, is_voc
from params import Params
from utils import make_folder, read_json, replacing, save_figure, save_picture, table_text, write_json
from visualize import confusion_figure, error_picture


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__, trained=True)
    add_restore_file(parser)
    parser.add_argument("--split", default="val", help="which list of the data set (default: %(default)s)")
    parser.add_argument(
        "--original_size",
        action="store_true",
        help="score every photo at its own size, as the VOC challenge does; the flags below do so too",
    )
    add_testing_flags(parser)
    parser.add_argument(
        "--save_predictions",
        type=Path,
        metavar="DIR",
        help="write palette PNGs to DIR/<split>; VOC's classes to where the VOC server looks for them",
    )
    parser.add_argument(
        "--save_overlays", type=positive, metavar="N", help="draw the N photos with the lowest mIoU, in model_dir"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER_MODEL_DIR",
        help="of --save_overlays: draw the N photos on which this experiment and the other differ most, and both",
    )
    args = parser.parse_args()
    if args.against and not args.save_overlays:
        parser.error("--against goes with --save_overlays N")
    args.original_size |= args.flip or bool(args.scales or args.save_predictions or args.save_overlays)
    return args


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    params: Params,
    device: torch.device,
    *,
    matrix: ConfusionMatrix | None = None,
    counts: dict[int, np.ndarray] | None = None,
) -> dict:
    """Score a network on every image of a loader, at the loader's image size; each process on its part of them.

    Returns in all processes a dict for JSON: the mean loss over images and ConfusionMatrix.compute()'s metrics over all
    pixels, those that go by class as {name: value}. What is counted is added to matrix and, as
    metrics.sparse() has it, by index and in each process for its own photos, to counts, if they are given. Leaves the
    network in evaluation mode.
    """
    model.eval()
    criterion = SegmentationLoss(**params.loss_options())
    matrix = matrix or ConfusionMatrix(params.num_classes, device)
    loss_sum = torch.zeros((), dtype=exact_dtype(device), device=device)
    with progress(loader, "evaluating") as bar:
        for indices, (images, labels, *_) in zip(loader.batch_sampler, loader, strict=True):
            if stop_if_asked():
                break  # to where all processes stop together
            labels = labels.to(device, non_blocking=True)
            with autocast(device, params.precision):
                logits = model(to_input(images, device, **input_options(model, params)))
            loss_sum += criterion(logits, labels) * len(images)
            of_images = matrix.update(logits.argmax(1), labels)
            if counts is not None:
                counts |= zip(indices, map(sparse, of_images.cpu()), strict=True)
            bar.update(len(images))
    all_reduce_sum(loss_sum)
    matrix.reduce()
    loss = loss_sum.item() / len(loader.dataset)
    metrics = {"loss": loss if math.isfinite(loss) else None, "images": len(loader.dataset), **matrix.compute()}
    return by_name(metrics, loader.dataset.class_names)


def progress(loader: Loader | OriginalLoader, title: str) -> tqdm:
    """Return a bar over the images that are this process's part."""
    total = sum(loader.batch_sampler.sizes)
    return tqdm(total=total, desc=title, unit="img", leave=False, disable=ranks.bar_disabled())


def by_name(metrics: dict, names: Sequence[str]) -> dict:
    """Turn lists of one value per class into {name: value}."""
    return {
        key: dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for key, value in metrics.items()
    }


def make_segmenter(
    model: FCN_GCN, params: Params, device: torch.device, *, scales: Sequence[float] | None = None, flip: bool = False
) -> Segmenter:
    """Return what segments photos, at several scales and mirrored if asked. Raises UserError for unusable scales.

    The network gets its batch norm folded and is of no other use then.
    """
    fold_batch_norm(model)
    return Segmenter(
        model,
        device,
        image_size=params.image_size,
        resize=params.resize,
        padding=model.encoder.padding,
        scales=scales or (1.0,),
        flip=flip,
        autocast=partial(autocast, device, params.precision),
        **input_options(model, params),
    )


def predictions(segmenter: Segmenter, loader: OriginalLoader) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield index, class map and mask of every photo at its own size: uint8 (H, W) on the device."""
    with progress(loader, "predicting") as bar:
        for indices, sizes, inputs, masks in loader:
            looks = segmenter.logits(inputs, sizes)
            for index, (width, height), maps, mask in zip(indices, sizes, looks, masks, strict=True):
                stop_if_asked()
                prediction = class_map(maps, width=width, height=height)
                yield index, prediction, mask if mask is None else mask.to(segmenter.device)
                bar.update()


@dataclass(frozen=True)
class Scores:
    """What was counted over a split: its metrics for JSON, the confusion matrix, and the counts of every photo."""

    metrics: dict[str, Any]
    matrix: ConfusionMatrix
    cells: list[np.ndarray]


def all_counts(counts: dict[int, np.ndarray], dataset: SegmentationDataset | OriginalDataset) -> list[np.ndarray]:
    """Return the counts of all processes, photo by photo in the order of the list."""
    cells = {index: part for own in distributed.gather(counts) for index, part in own.items()}
    return [cells[index] for index in range(len(dataset))]


def score_originals(
    segmenter: Segmenter, dataset: OriginalDataset, params: Params, args: argparse.Namespace
) -> Scores | None:
    """Predict every photo at its own size and write what --save_predictions asks for; each process does its part.

    Returns what was counted over all; None without masks.
    """
    split, names = dataset.split, dataset.class_names
    loader = make_original_loader(
        dataset,
        segmenter.sizes,
        resize=params.resize,
        padding=segmenter.padding,
        batch_size=params.scoring_batch_size,
        **loading_options(params),
    )
    matrix, counts = ConfusionMatrix(params.num_classes, segmenter.device), dict[int, np.ndarray]()
    boundary = BoundaryMetrics(params.num_classes, segmenter.device)
    folder = args.save_predictions and predictions_folder(args.save_predictions, split.name, names)
    if folder:
        with distributed.together():
            make_folder(folder, "--save_predictions")
    for index, prediction, mask in predictions(segmenter, loader):
        if folder:
            save_picture(colour_mask(prediction.cpu().numpy(), names), folder / f"{split.ids[index]}.png")
        if mask is not None:
            counts[index] = sparse(matrix.update(prediction[None], mask[None])[0].cpu())
            boundary.update(prediction, mask)
    if split.masks is None:
        distributed.gather(None)  # which has the patience for processes that are far behind
        return None
    cells = all_counts(counts, dataset)  # first, as it has the patience for processes that are far behind
    matrix.reduce()
    boundary.reduce()
    metrics = {"images": len(dataset), **matrix.compute(), **boundary.compute()}
    return Scores(by_name(metrics, names), matrix, cells)


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
    score, names = mIoU(counts.pixels), dataset.class_names
    theirs, rank = None, score
    if other:
        check_same_photos(counts, other[0], (str(args.model_dir), str(args.against)))
        theirs = mIoU(other[0].pixels)
        rank = -abs(score - theirs)
    order = [index for index in np.argsort(rank, kind="stable") if np.isfinite(rank[index])][: args.save_overlays]
    earlier = set(folder.glob("*.png"))
    for place, index in enumerate(order, 1):
        stop_if_asked()
        _, photo, mask = dataset[index]
        assert mask is not None  # it was scored
        prediction = segmenter.segment(photo).cpu().numpy()
        title = f"{dataset.split.ids[index]}, mIoU {score[index]:.3f}"
        second = None
        if other and theirs is not None:
            second = other[1].segment(photo).cpu().numpy()
            title += f"; the other, {args.against.name}, {theirs[index]:.3f}"
        picture = error_picture(photo, mask, prediction, names, title=title, other=second)
        number = f"{place:0{len(str(len(order)))}d}_"
        kept = os.fsdecode(os.fsencode(dataset.split.ids[index])[: 255 - len(f"{number}.png")])  # a file name's limit
        save_picture(picture, folder / f"{number}{kept}.png")
        earlier.discard(folder / f"{number}{kept}.png")
    for outdated in earlier:
        outdated.unlink()


def find_other(
    name: str, record: dict, device: torch.device, args: argparse.Namespace
) -> tuple[Counts, Segmenter] | None:
    """Return the counts of the experiment of --against, and what it segments photos with; in every process.

    Raises UserError unless it was scored in the same way as record says, with the checkpoint that it has now.
    """
    if not args.against:
        return None
    model, params, checkpoint = load_network(args.against, args.restore_file, device)

    def read() -> Counts:
        counts, file = read_counts(args.against / f"counts_{name}.npz"), args.against / f"metrics_{name}.json"
        found = read_json(file, if_absent="evaluate.py writes it")
        needed = record | {"epoch": checkpoint.get("epoch")}
        alike = isinstance(found, dict) and needed.items() <= found.items()
        if not alike or not counts.are_of(found.get("pixel_accuracy")):
            raise UserError(f"{file} is of another checkpoint, other --scales or --flip; score {args.against} again")
        return counts

    return distributed.broadcast_from_main(read), make_segmenter(
        model, params, device, scales=args.scales, flip=args.flip
    )


def predictions_folder(folder: Path, split: str, names: Sequence[str]) -> Path:
    """Return where --save_predictions writes, for VOC's classes where its server looks (comp5: VOC's data only)."""
    return folder / (f"results/VOC2012/Segmentation/comp5_{split}_cls" if is_voc(names) else split)


def table(metrics: dict) -> str:
    """Return the result as text: a row per class, then the metrics over all classes."""
    columns = {
        "IoU": "IoU",
        "accuracy": "accuracy",
        "boundary IoU": "boundary_IoU",
        "share of pixels": "frequency",
    }
    columns = {title: metrics[key] for title, key in columns.items() if key in metrics}
    rows = [(table_text(name), *(column[name] for column in columns.values())) for name in metrics["IoU"]]
    overall = [(key, value) for key, value in scalars(metrics).items() if value is not None]
    options: dict[str, Any] = {"tablefmt": "pipe", "floatfmt": ".4f", "missingval": "-"}
    options["disable_numparse"] = [0]  # names stay, also those that look like numbers
    classes = tabulate(rows, headers=("class", *columns), **options)
    return f"{classes}\n\n{tabulate(overall, headers=('metric', 'value'), **options)}"


def main(args: argparse.Namespace) -> None:
    with distributed.processes(args.device) as device:
        score_checkpoint(device, args)


def score_checkpoint(device: torch.device, args: argparse.Namespace) -> None:
    """Score a checkpoint, and write and print what was found."""
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    folder, split, names = distributed.local_rank0_first(lambda: find_data(params, checkpoint, args))
    where, name = f"{args.split} of {folder}", f"{args.split}_{args.restore_file}"
    record: dict[str, Any] = {"epoch": checkpoint.get("epoch")}
    if args.original_size:
        scales = args.scales or [1.0]
        name += "_original_size" if scales == [1.0] and not args.flip else "_multi_scale"
        record |= {"scales": scales, "flip": args.flip}
        overlays = args.model_dir / f"overlays_{name}"
        with distributed.together():
            segmenter = make_segmenter(model, params, device, scales=args.scales, flip=args.flip)
            if args.save_overlays and ranks.is_main():
                make_folder(overlays, "--save_overlays")
        other = find_other(name, record, device, args)
        originals = OriginalDataset(split, class_names=names)
        scores = score_originals(segmenter, originals, params, args)
    else:
        record |= {"image_size": params.image_size, "resize": params.resize}
        scores = score_squares(model, split, names, params, device)
    scored = scores is not None and scores.metrics["mIoU"] is not None  # not so for Cityscapes' test, all of it void
    if scores and not scored and not only_predicted(args):
        with distributed.together():
            raise UserError(f"split {where} has masks of nothing but void: it can be predicted, not scored")
    if not ranks.is_main():
        return
    if scores and scored:
        write_scores(scores, record, name, split, names, args)
        size = "their own size" if args.original_size else f"{params.image_size}x{params.image_size}"
        output = args.model_dir / f"metrics_{name}.json"
        print(f"\n{len(split.ids)} images of {where} at {size}, epoch {record['epoch']} -> {output} and .png")
        if args.save_overlays:
            counts = read_counts(args.model_dir / f"counts_{name}.npz")
            draw_overlays(segmenter, originals, counts, other, overlays, args)
            print(f"{'those that differ most' if args.against else 'the worst of them'} -> {overlays}")
    else:
        print(f"{where} has {'masks of nothing but void' if scores else 'no masks'} and is not scored")
    if args.save_predictions:
        print(f"{len(split.ids)} predictions -> {predictions_folder(args.save_predictions, args.split, names)}")


def score_squares(model: FCN_GCN, split: Split, names: Sequence[str], params: Params, device: torch.device) -> Scores:
    """Score a network at the size that it reads."""
    make_dataset = partial(
        SegmentationDataset,
        split,
        class_names=names,
        image_size=params.image_size,
        resize=params.resize,
        padding=model.encoder.padding,
    )
    dataset = distributed.local_rank0_first(lambda: make_dataset(cache=params.cache))
    loader = make_loader(dataset, batch_size=params.scoring_batch_size, device=device, **loading_options(params))
    matrix, counts = ConfusionMatrix(params.num_classes, device), dict[int, np.ndarray]()
    metrics = evaluate(model, loader, params, device, matrix=matrix, counts=counts)
    return Scores(metrics, matrix, all_counts(counts, dataset))


def write_scores(
    scores: Scores, record: dict, name: str, split: Split, names: Sequence[str], args: argparse.Namespace
) -> None:
    """Write the counts of every photo, the confusion and, last, the metrics, and print these."""
    metrics, file = record | scores.metrics, args.model_dir / f"metrics_{name}.json"
    with replacing(args.model_dir / f"counts_{name}.npz") as temporary:
        write_counts(temporary, split.ids, names, scores.cells)
    matrix = scores.matrix.matrix.cpu().numpy()
    save_figure(confusion_figure(matrix, metrics["IoU"]), file.with_suffix(".png"))
    write_json(file, metrics)
    print(table(metrics))


def only_predicted(args: argparse.Namespace) -> bool:
    """Return whether the flags ask for nothing that needs masks."""
    return bool(args.save_predictions and not args.save_overlays)


def find_data(params: Params, checkpoint: dict, args: argparse.Namespace) -> tuple[Path, Split, list[str]]:
    """Find the data folder, the split that is to be scored or predicted, and the names of the classes."""
    folder = data_dir(args, params.dataset)
    split = find_split(params.dataset, folder, args.split, masks_required=not only_predicted(args))
    file = checkpoint_path(args.model_dir, args.restore_file)
    return folder, split, agreed_class_names(checkpoint, file, split, params.num_classes)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
