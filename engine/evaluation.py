"""Scoring: a network at the size that it reads, and at the photos' own size."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.checkpoints import agreed_class_names, checkpoint_path
from engine.devices import autocast, bar, gather, input_options
from engine.run import find_data_dir
from model.data_loader import Loader, SegmentationDataset
from model.layouts import Split, find_split
from model.losses import SegmentationLoss
from model.metrics import Metrics, sparse
from model.net import FCN_GCN
from model.parallel import all_reduce_sum, exact_dtype
from model.transforms import to_input
from params import Params


@dataclass(frozen=True)
class Scores:
    """What was counted over a split, in every process.

    metrics for JSON, those by class as {name: value}; matrix, the confusion counts, (C, C); cells, metrics.sparse() of
    every photo in the order of the list, [] where that was not asked for.
    """

    metrics: dict[str, Any]
    matrix: np.ndarray
    cells: list[np.ndarray]


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Loader, params: Params, device: torch.device, *, by_photo: bool = False
) -> Scores:
    """Score a network on every image of a loader, at the loader's image size; each process on its part of them.

    "loss" is the mean over images of the loss of each alone. by_photo: keep the counts of each, for which a GPU has to
    be waited for. Leaves the network in evaluation mode.
    """
    model.eval()
    criterion, metrics = SegmentationLoss(**params.loss_options()), Metrics(params.num_classes, device)
    loss_sum = torch.zeros((), dtype=exact_dtype(device), device=device)
    own: dict[int, np.ndarray] = {}
    with bar(sum(loader.batch_sampler.sizes), "evaluating") as done:
        for indices, (images, labels, *_) in zip(loader.batch_sampler, loader, strict=True):
            labels = labels.to(device, non_blocking=True)
            with autocast(device, params.precision):
                logits = model(to_input(images, device, **input_options(model, params)))
            for image in zip(logits.split(1), labels.split(1), strict=True):
                loss_sum += criterion(*image)
            of_images = metrics.update(logits.argmax(1), labels)
            if by_photo:
                own |= zip(indices, map(sparse, of_images.cpu()), strict=True)
            done.update(len(images))
    all_reduce_sum(loss_sum)
    loss = loss_sum.item() / len(loader.dataset)
    return add_up(metrics, own, loader.dataset, loss=loss if math.isfinite(loss) else None)


def add_up(metrics: Metrics, own: dict[int, np.ndarray], dataset: Any, **others: float | None) -> Scores:
    """Add up what all processes have counted; own has the cells of a process's own photos by index."""
    found = {index: cells for part in gather(own) for index, cells in part.items()}
    metrics.reduce()
    values = {
        name: dict(zip(dataset.class_names, value, strict=True)) if isinstance(value, list) else value
        for name, value in metrics.compute().items()
    }
    cells = [found[index] for index in sorted(found)]
    return Scores({**others, "images": len(dataset), **values}, metrics.confusion.matrix.cpu().numpy(), cells)


def make_dataset(split: Split, names: Sequence[str], params: Params, model: FCN_GCN) -> SegmentationDataset:
    """Decode a split into squares as a network reads them, or find it decoded. Raises UserError naming faulty files."""
    size, padding = params.image_size, model.encoder.padding
    options: dict[str, Any] = {"resize": params.resize, "padding": padding, "cache": params.cache}
    return SegmentationDataset(split, class_names=names, image_size=size, **options)


def find_data(
    params: Params, checkpoint: dict, args: argparse.Namespace, split: str = "val", *, masks_required: bool = False
) -> tuple[Path, Split, list[str]]:
    """Return the data folder, a split of it, and the names of the classes, which must be those of a checkpoint."""
    folder = find_data_dir(args, params.dataset)
    found = find_split(params.dataset, folder, split, masks_required=masks_required)
    file = checkpoint_path(args.model_dir, args.restore_file)
    return folder, found, agreed_class_names(checkpoint, file, found, params.num_classes)
