"""Score a checkpoint on a split: a table per class on the terminal, metrics_<split>_<restore_file>.json and .png."""

import argparse
import heapq
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

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
from engine.devices import autocast, loading_options
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
from model.inference import Segmenter, class_map
from model.layouts import Split, find_split
from model.losses import SegmentationLoss
from model.metrics import BoundaryMetrics, ConfusionMatrix
from model.parallel import all_reduce_sum, exact_dtype
from model.photos import read_photo
from model.transforms import to_input
from model.voc import colour_mask, is_voc
from params import Params
from utils import make_folder, save_figure, save_picture, table_text, write_json
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
    args = parser.parse_args()
    args.original_size |= args.flip or bool(args.scales or args.save_predictions or args.save_overlays)
    return args


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Loader, params: Params, device: torch.device, *, matrix: ConfusionMatrix | None = None
) -> dict:
    """Score a network on every image of a loader, at the loader's image size; each process on its part of them.

    Returns in all processes a dict for JSON: the mean loss over images and ConfusionMatrix.compute()'s metrics over all
    pixels, those that go by class as {name: value}. The counts are added to matrix if one is given. Leaves the network
    in evaluation mode.
    """
    model.eval()
    criterion = SegmentationLoss(**params.loss_options())
    matrix = matrix or ConfusionMatrix(params.num_classes, device)
    loss_sum = torch.zeros((), dtype=exact_dtype(device), device=device)
    with progress(loader, "evaluating") as bar:
        for images, labels, *_ in loader:
            if stop_if_asked():
                break  # to where all processes stop together
            labels = labels.to(device, non_blocking=True)
            with autocast(device, params.precision):
                logits = model(to_input(images, device, **params.input_options()))
            loss_sum += criterion(logits, labels) * len(images)
            matrix.update(logits.argmax(1), labels)
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


def make_segmenter(model: nn.Module, params: Params, device: torch.device, args: argparse.Namespace) -> Segmenter:
    """Return what segments photos as the flags of add_testing_flags() say. Raises UserError for unusable scales."""
    return Segmenter(
        model,
        device,
        image_size=params.image_size,
        resize=params.resize,
        scales=args.scales or (1.0,),
        flip=args.flip,
        autocast=partial(autocast, device, params.precision),
        **params.input_options(),
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


class WorstPredictions:
    """The predictions with the lowest mIoU of those it was shown, at most count of them."""

    def __init__(self, count: int, num_classes: int):
        self.count, self.num_classes = count, num_classes
        self._kept: list[tuple] = []

    def add(self, index: int, prediction: Tensor, mask: Tensor) -> None:
        matrix = ConfusionMatrix(self.num_classes, prediction.device)
        matrix.update(prediction, mask)
        mIoU = matrix.compute()["mIoU"]
        if mIoU is not None:  # else the photo is all void
            entry = (-mIoU, -index, prediction.cpu().numpy())
            (heapq.heappush if len(self._kept) < self.count else heapq.heappushpop)(self._kept, entry)

    def reduce(self) -> None:
        """Keep the lowest of all processes, in each of them."""
        self._kept = heapq.nlargest(self.count, chain.from_iterable(distributed.gather(self._kept)))

    def draw(self, dataset: OriginalDataset, folder: Path) -> None:
        """Draw a PNG for each, the worst first by name, in place of those of an earlier evaluation."""
        earlier = set(folder.glob("*.png"))
        names = dataset.class_names
        for rank, (mIoU, index, prediction) in enumerate(sorted(self._kept, reverse=True), start=1):
            photo = read_photo(dataset.split.images[-index])
            mask = dataset.mask(-index, photo.size)
            assert mask is not None  # it was scored
            name = dataset.split.ids[-index]
            picture = error_picture(photo, mask, prediction, names, title=f"{name}, mIoU {-mIoU:.3f}")
            number = f"{rank:0{len(str(len(self._kept)))}d}_"
            kept = os.fsdecode(os.fsencode(name)[: 255 - len(f"{number}.png")])  # a file name has 255 bytes at most
            file = folder / f"{number}{kept}.png"
            save_picture(picture, file)
            earlier.discard(file)
        for outdated in earlier:
            outdated.unlink()


def score_originals(
    segmenter: Segmenter, dataset: OriginalDataset, params: Params, args: argparse.Namespace, *, overlays: Path
) -> tuple[dict, ConfusionMatrix | None]:
    """Predict every photo at its own size and write what the flags ask for; each process does its part of the photos.

    overlays is the folder of --save_overlays. Returns the metrics of all; without masks they are {}.
    """
    split, names = dataset.split, dataset.class_names
    loader = make_original_loader(
        dataset,
        segmenter.sizes,
        resize=params.resize,
        batch_size=params.scoring_batch_size,
        **loading_options(params),
    )
    matrix = ConfusionMatrix(params.num_classes, segmenter.device)
    boundary = BoundaryMetrics(params.num_classes, segmenter.device)
    worst = WorstPredictions(args.save_overlays or 0, params.num_classes)
    folder = args.save_predictions and predictions_folder(args.save_predictions, split.name, names)
    with distributed.together():
        if folder:
            make_folder(folder, "--save_predictions")
        if args.save_overlays and ranks.is_main():
            make_folder(overlays, "--save_overlays")
    for index, prediction, mask in predictions(segmenter, loader):
        if folder:
            save_picture(colour_mask(prediction.cpu().numpy(), names), folder / f"{split.ids[index]}.png")
        if mask is not None:
            matrix.update(prediction, mask)
            boundary.update(prediction, mask)
            if args.save_overlays:
                worst.add(index, prediction, mask)
    worst.reduce()  # first, as it has the patience for processes that are far behind
    matrix.reduce()
    boundary.reduce()
    if split.masks is None:
        return {}, None
    if args.save_overlays and ranks.is_main():
        worst.draw(dataset, overlays)
    metrics = {"images": len(dataset), **matrix.compute(), **boundary.compute()}
    return by_name(metrics, names), matrix


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
    """Score a checkpoint, and write and print the metrics."""
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, device)
    folder, split, names = distributed.local_rank0_first(lambda: find_data(params, checkpoint, args))
    where = f"{args.split} of {folder}"
    name = f"{args.split}_{args.restore_file}"
    record: dict[str, Any] = {"epoch": checkpoint.get("epoch")}
    if args.original_size:
        scales = args.scales or [1.0]
        name += "_original_size" if scales == [1.0] and not args.flip else "_multi_scale"
        record |= {"scales": scales, "flip": args.flip}
        with distributed.together():
            segmenter = make_segmenter(model, params, device, args)
        overlays = args.model_dir / f"overlays_{name}"
        originals = OriginalDataset(split, class_names=names)
        metrics, matrix = score_originals(segmenter, originals, params, args, overlays=overlays)
    else:
        make_dataset = partial(SegmentationDataset, split, class_names=names, image_size=params.image_size)
        record |= {"image_size": params.image_size, "resize": params.resize}
        dataset = distributed.local_rank0_first(lambda: make_dataset(resize=params.resize, cache=params.cache))
        loader = make_loader(dataset, batch_size=params.scoring_batch_size, device=device, **loading_options(params))
        matrix = ConfusionMatrix(params.num_classes, device)
        metrics = evaluate(model, loader, params, device, matrix=matrix)
    if matrix and metrics["mIoU"] is None:  # as for Cityscapes' test, whose labels are withheld
        if not only_predicted(args):
            with distributed.together():
                raise UserError(f"split {where} has masks of nothing but void: it can be predicted, not scored")
        matrix = None
    if ranks.is_main():
        write_report(record | metrics, matrix, split, where, name, params, args, names)


def only_predicted(args: argparse.Namespace) -> bool:
    """Return whether the flags ask for nothing that needs masks."""
    return bool(args.save_predictions and not args.save_overlays)


def find_data(params: Params, checkpoint: dict, args: argparse.Namespace) -> tuple[Path, Split, list[str]]:
    """Find the data folder, the split that is to be scored or predicted, and the names of the classes."""
    folder = data_dir(args, params.dataset)
    split = find_split(params.dataset, folder, args.split, masks_required=not only_predicted(args))
    file = checkpoint_path(args.model_dir, args.restore_file)
    return folder, split, agreed_class_names(checkpoint, file, split, params.num_classes)


def write_report(
    metrics: dict,
    matrix: ConfusionMatrix | None,
    split: Split,
    where: str,
    name: str,
    params: Params,
    args: argparse.Namespace,
    class_names: Sequence[str],
) -> None:
    """Write the metrics as JSON and PNG, if there are any, and say what has been written where.

    where names the split for people; name is that of the files, without the word for what they hold.
    """
    count = len(split.ids)
    if matrix:
        output = args.model_dir / f"metrics_{name}.json"
        write_json(output, metrics)
        save_figure(confusion_figure(matrix.matrix.cpu().numpy(), metrics["IoU"]), output.with_suffix(".png"))
        print(table(metrics))
        size = "their own size" if args.original_size else f"{params.image_size}x{params.image_size}"
        print(f"\n{count} images of {where} at {size}, epoch {metrics['epoch']} -> {output} and .png")
    else:
        reason = "no masks" if split.masks is None else "masks of nothing but void"
        print(f"{where} has {reason} and is not scored")
    if args.save_overlays:
        print(f"the worst of them -> {args.model_dir / f'overlays_{name}'}")
    if args.save_predictions:
        folder = predictions_folder(args.save_predictions, args.split, class_names)
        print(f"{count} predictions -> {folder}")


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
