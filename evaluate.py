"""Score a checkpoint on a split: a table a class on the terminal, metrics_<split>_<restore_file>.json in model_dir."""

import argparse
import math

from utils import (
    ARCHITECTURE,
    Params,
    autocast,
    checkpoint_path,
    end_at_once_on_interrupt,
    experiment_parser,
    load_checkpoint,
    load_weights,
    pick_device,
    predicting_weights,
    refuse_changed,
    resolve_precision,
    run_main,
    stop_if_asked,
    to_device,
    write_json,
)


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    parser.add_argument(
        "--restore_file", default="best", help="which checkpoint of model_dir: best, last (default: %(default)s)"
    )
    parser.add_argument("--split", default="val", help="which list of the data set (default: %(default)s)")
    return parser.parse_args()


# Before the seconds that importing torch takes, so that --help and a typing error answer at once.
if __name__ == "__main__":
    ARGS = parse_args()
    end_at_once_on_interrupt()

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from model.data_loader import Loader, SegmentationDataset, Split, class_names, data_root, make_loader
from model.losses import SegmentationLoss
from model.metrics import ConfusionMatrix
from model.net import FCN_GCN
from model.transforms import to_input


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, params: Params, device: torch.device) -> dict:
    """Score a network on every image of a loader, at the loader's image size.

    Returns a dict for JSON: the mean loss over images and ConfusionMatrix.compute()'s metrics over all pixels, those
    that go by class as {name: value}. Leaves the network in evaluation mode.
    """
    model.eval()
    criterion = SegmentationLoss(params.loss_weights)
    matrix = ConfusionMatrix(params.num_classes, device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    with tqdm(total=len(loader.dataset), desc="evaluating", unit="img", leave=False, disable=None) as bar:
        for images, labels in loader:
            stop_if_asked()
            labels = labels.to(device, non_blocking=True)
            with autocast(device, params.precision):
                logits = model(to_input(images, device, **params.input_options()))
            loss_sum += criterion(logits, labels) * len(images)
            matrix.update(logits.argmax(1), labels)
            bar.update(len(images))
    loss = loss_sum.item() / len(loader.dataset)
    metrics = {"loss": loss if math.isfinite(loss) else None, "images": len(loader.dataset), **matrix.compute()}
    return {
        key: dict(zip(loader.dataset.class_names, value, strict=True)) if isinstance(value, list) else value
        for key, value in metrics.items()
    }


def table(metrics: dict) -> str:
    """The result as text: a row a class, then the metrics over all classes."""
    rows = [(name, *(metrics[column][name] for column in ("IoU", "accuracy", "frequency"))) for name in metrics["IoU"]]
    classes = tabulate(
        rows, headers=("class", "IoU", "accuracy", "share of pixels"), tablefmt="pipe", floatfmt=".4f", missingval="-"
    )
    overall = [(key, value) for key, value in metrics.items() if isinstance(value, float)]
    return f"{classes}\n\n{tabulate(overall, headers=('metric', 'value'), tablefmt='pipe', floatfmt='.4f')}"


def main(args: argparse.Namespace) -> None:
    params = Params.load(args.model_dir / "params.json")
    device = pick_device(args.device)
    params = resolve_precision(params, device)
    file = checkpoint_path(args.model_dir, args.restore_file)
    checkpoint = load_checkpoint(file)
    model = FCN_GCN(**params.network_options(), pretrained=False)
    refuse_changed((*ARCHITECTURE, "normalize"), checkpoint, params, file)
    load_weights(model, predicting_weights(checkpoint), file)
    to_device(model, params, device)

    root = data_root(params.dataset, args.data_dir)
    names = class_names(root, params.num_classes)
    split = Split.find(root, args.split, masks_required=True)
    dataset = SegmentationDataset(split, class_names=names, image_size=params.image_size, cache=params.cache)
    loader = make_loader(dataset, batch_size=params.batch_size, num_workers=params.num_workers, device=device)

    metrics = evaluate(model, loader, params, device)
    output = args.model_dir / f"metrics_{args.split}_{args.restore_file}.json"
    write_json(output, {"epoch": checkpoint.get("epoch"), **metrics})
    print(table(metrics))
    print(
        f"\n{len(dataset)} images of {args.split} at {params.image_size}x{params.image_size}, "
        f"epoch {checkpoint.get('epoch')} -> {output}"
    )


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(ARGS)))
