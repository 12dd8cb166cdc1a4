"""Segmentation metrics from one confusion matrix per data set."""

import torch
import torch.distributed as dist
from torch import Tensor

from model.voc import VOID


class ConfusionMatrix:
    """Counts pixels by label (rows) and prediction (columns), int64 (C, C), on the device of the predictions.

    update() once per batch, reduce() once if several processes share the data set, compute() at the end. Sums are
    divided once per data set, never averaged over batches.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        # One bin more than cells: void pixels go there, which costs no boolean mask and so no wait for the device.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """int64 (C, C): label, prediction."""
        return self._counts[:-1].view(self.num_classes, self.num_classes)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch of class indices, both (B, H, W) and of any integer dtype; labels of 255 are skipped."""
        labels = labels.long()
        cells = (labels * self.num_classes + predictions).where(labels != VOID, self.num_classes**2).flatten()
        self._counts.scatter_add_(0, cells, torch.ones_like(cells))

    def reduce(self) -> None:
        """Sum over all processes of torch.distributed; nothing to do where there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._counts)

    def compute(self) -> dict:
        """The metrics, all in [0, 1].

        mIoU and mean_dice are means over classes with a nonzero union, mean_accuracy over classes that occur in the
        labels; frequency_weighted_IoU weighs each IoU with the class's share of label pixels (definitions of Long et
        al., arXiv 1411.4038, section 5). IoU, accuracy (per-class recall) and frequency (share of the label pixels)
        list one value a class. What is undefined, as the IoU of a class that occurs nowhere, is None.
        """
        matrix = self.matrix.cpu().double()
        hits, labelled, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        union = labelled + predicted - hits
        total = labelled.sum()
        iou, recall = hits / union, hits / labelled
        return {
            "mIoU": _mean(iou),
            "pixel_accuracy": _number(hits.sum() / total),
            "mean_accuracy": _mean(recall),
            "frequency_weighted_IoU": _number((labelled / total * iou.nan_to_num()).sum()),
            "mean_dice": _mean(2 * hits / (labelled + predicted)),
            "IoU": [_number(value) for value in iou],
            "accuracy": [_number(value) for value in recall],
            "frequency": [_number(value) for value in labelled / total],
        }


def _mean(values: Tensor) -> float | None:
    return _number(values.nanmean())


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
