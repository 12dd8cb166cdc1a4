"""Segmentation metrics from one confusion matrix per data set."""

import math
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.parallel import all_reduce_sum
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
    def update(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Add a batch of class indices, both (B, H, W) and of any integer dtype; labels of 255 are skipped.

        Returns the counts of each image, int64 (B, C, C).
        """
        void = self.num_classes**2
        cells = (labels.long() * self.num_classes + predictions).where(labels != VOID, void).flatten(1)
        counts = torch.zeros(len(cells), void + 1, dtype=torch.int64, device=cells.device)
        counts.scatter_add_(1, cells, torch.ones_like(cells))
        self._counts += counts.sum(0)
        return counts[:, :-1].unflatten(1, (self.num_classes, self.num_classes))

    def reduce(self) -> None:
        """Sum over all processes of torch.distributed; nothing to do where there is one."""
        all_reduce_sum(self._counts)

    def compute(self) -> dict:
        """Return the metrics, all in [0, 1].

        mIoU and mean_dice are means over classes with a nonzero union, mean_accuracy over classes that occur in the
        labels; frequency_weighted_IoU weighs each IoU with the class's share of label pixels (definitions of Long et
        al., arXiv 1411.4038, section 5). IoU, accuracy (per-class recall) and frequency (share of the label pixels)
        list one value per class. What is undefined, as the IoU of a class that occurs nowhere, is None.
        """
        matrix = self.matrix.cpu().double()
        hits, labelled, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        union = labelled + predicted - hits
        total = labelled.sum()
        iou, recall = hits / union, hits / labelled
        return {
            "mIoU": _mean(iou),
            "pixel_accuracy": _or_none(hits.sum() / total),
            "mean_accuracy": _mean(recall),
            "frequency_weighted_IoU": _or_none((labelled / total * iou.nan_to_num()).sum()),
            "mean_dice": _mean(2 * hits / (labelled + predicted)),
            "IoU": [_or_none(value) for value in iou],
            "accuracy": [_or_none(value) for value in recall],
            "frequency": [_or_none(value) for value in labelled / total],
        }


def sparse(counts: Tensor) -> np.ndarray:
    """Return the cells that are not 0 of an image's counts, (C, C) on the host: int64 (K, 2), label * C + prediction
    and pixels.
    """
    counts = counts.flatten()
    found = counts.nonzero()[:, 0]
    return torch.stack([found, counts[found]], 1).numpy()


BAND = 7  # pixels
RIM = 0.02  # of a photo's diagonal


class BoundaryMetrics:
    """How well boundaries are met, at the photos' own size.

    Accuracy near boundaries and inside (Peng et al., arXiv 1703.02719, table 5): of the pixels whose distance to the
    nearest object boundary is at most 7 pixels, and of the others, the share that is labelled right. A boundary pixel
    is one that has another label than one of its four neighbours, void being a label too, with which VOC draws object
    outlines; the distance is Euclidean, from centre to centre.

    Boundary IoU (Cheng et al., arXiv 2103.16562, equation 1): for each class the intersection over the union of the
    rims of the two masks, summed over all photos; a rim is what lies inside a mask within d pixels of its contour
    (in a square neighbourhood, as in the authors' code), d being 2 % of the photo's diagonal.

    Void pixels count in neither, and what is predicted for them makes no difference.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self._pixels = torch.zeros(2, 2, dtype=torch.int64, device=device)  # boundary, interior: right, all
        self._rims = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # intersection, union

    @torch.no_grad()
    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add one photo's class indices, both (H, W) and of any integer dtype; labels of 255 are void."""
        prediction, labels = prediction.long(), labels.long()
        valid = labels != VOID
        near = _near(_boundary(labels))
        right = prediction == labels
        for row, region in enumerate((near & valid, ~near & valid)):
            self._pixels[row] += torch.stack([(right & region).sum(), region.sum()])

        prediction = prediction.where(valid, VOID)  # or its contour would run on through the void, unlike the label's
        reach = max(1, round(RIM * math.hypot(*labels.shape)))
        rims = [_rim(classes, reach) & valid for classes in (prediction, labels)]
        predicted, true, both = (
            torch.bincount(classes[rim], minlength=self._rims.shape[1])
            for classes, rim in ((prediction, rims[0]), (labels, rims[1]), (labels, rims[0] & rims[1] & right))
        )
        self._rims += torch.stack([both, predicted + true - both])

    def reduce(self) -> None:
        """Sum over all processes of torch.distributed; nothing to do where there is one."""
        all_reduce_sum(self._pixels, self._rims)

    def compute(self) -> dict:
        """Return boundary_accuracy, interior_accuracy, boundary_mIoU and, by class, boundary_IoU, or None."""
        (right, pixels), (intersection, union) = self._pixels.cpu().double().T, self._rims.cpu().double()
        accuracy, iou = right / pixels, intersection / union
        return {
            "boundary_accuracy": _or_none(accuracy[0]),
            "interior_accuracy": _or_none(accuracy[1]),
            "boundary_mIoU": _mean(iou),
            "boundary_IoU": [_or_none(value) for value in iou],
        }


def _boundary(labels: Tensor) -> Tensor:
    """Return bool (H, W): of another label than one of the four neighbours."""
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (0, 1):
        length = labels.shape[dim] - 1
        changes = labels.narrow(dim, 0, length) != labels.narrow(dim, 1, length)
        boundary.narrow(dim, 0, length).logical_or_(changes)
        boundary.narrow(dim, 1, length).logical_or_(changes)
    return boundary


def _near(boundary: Tensor) -> Tensor:
    """Return bool (H, W): at most BAND pixels from a boundary pixel."""
    height, width = boundary.shape
    # Sums along the rows: each row of the disk is a difference of two, far cheaper than a convolution with it.
    sums = F.pad(boundary.int(), (BAND + 1, BAND, BAND, BAND)).cumsum(1, dtype=torch.int32)
    near = torch.zeros_like(boundary)
    for reach, steps in groupby(range(BAND + 1), lambda step: math.isqrt(BAND**2 - step**2)):
        hit = sums.narrow(1, BAND + 1 + reach, width) > sums.narrow(1, BAND - reach, width)
        for step in steps:
            near |= hit.narrow(0, BAND - step, height) | hit.narrow(0, BAND + step, height)
    return near


def _rim(classes: Tensor, reach: int) -> Tensor:
    """Return bool (H, W): the pixels with one of another class, or the edge of the picture, at most reach away."""
    # A square has one class if every 2 x 2 square in it has. A summed-area table counts those that have not, and those
    # that reach beyond the picture: far cheaper than pooling with kernels this large, and once for all classes.
    across, down = classes[:, 1:] != classes[:, :-1], classes[1:] != classes[:-1]
    mixed = across[1:] | across[:-1] | down[:, 1:]
    table = F.pad(F.pad(mixed.int(), [reach] * 4, value=1), (1, 0, 1, 0))
    table = table.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    side = 2 * reach
    return table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side] > 0


def _mean(values: Tensor) -> float | None:
    return _or_none(values.nanmean())


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
