"""Metrics of segmentation: what is counted, and what follows from the counts of a whole data set.

A new metric that follows from the confusion matrix is a line of ConfusionMatrix.metrics. One that needs the maps is a
class like BoundaryMetrics, in ACCUMULATORS.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.parallel import all_reduce_sum
from model.voc import VOID


@dataclass(frozen=True)
class Metric:
    """A metric and what is to be known of it."""

    value: Callable[[Any], Tensor]  # one or, by class, (C), of Accumulator.on_host(); NaN is undefined
    better: Callable = max  # or min: chooses the better of two values
    column: str = ""  # of values by class in evaluate.py's table


class Accumulator:
    """Counts what some metrics follow from: each of its tensors is a sum over pixels, int64, on the device."""

    metrics: ClassVar[dict[str, Metric]]
    original_size = False  # True: only where photos are scored at their own size

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes

    def update(self, predictions: Tensor, labels: Tensor) -> Any:
        """Add a batch of class indices, both (B, H, W) and of any integer dtype; labels of 255 are void."""
        raise NotImplementedError

    def _sums(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def reduce(self) -> None:
        """Sum over all processes."""
        all_reduce_sum(*self._sums().values())

    def on_host(self) -> Any:
        """Return what the metrics are functions of: this, with its sums as float64 on the CPU."""
        copied = copy.copy(self)
        vars(copied).update({name: value.cpu().double() for name, value in self._sums().items()})
        return copied

    def compute(self) -> dict[str, Any]:
        """Return every metric by name: a number or a list with one value per class, None for what is undefined."""
        sums = self.on_host()
        found = {name: about.value(sums).numpy() for name, about in self.metrics.items()}
        for name, value in found.items():
            if value.ndim != bool(self.metrics[name].column):
                raise TypeError(f"{name} has {value.ndim} axes; a metric by class has one and a column, others neither")
        return {name: np.where(np.isfinite(value), value, np.array(None)).tolist() for name, value in found.items()}


@dataclass
class Counted:
    """Pixels by label and prediction, float64 (…, C, C), and what the metrics are made of: by class, (…, C)."""

    matrix: Tensor

    hits = property(lambda self: self.matrix.diagonal(dim1=-2, dim2=-1))
    labelled = property(lambda self: self.matrix.sum(-1))
    predicted = property(lambda self: self.matrix.sum(-2))
    iou = property(lambda self: self.hits / (self.labelled + self.predicted - self.hits))
    recall = property(lambda self: self.hits / self.labelled)
    frequency = property(lambda self: self.labelled / self.labelled.sum(-1, keepdim=True))

    def mean(self, by_class: Tensor) -> Tensor:
        """Return the mean over the classes that occur in the labels, (…)."""
        return by_class.where(self.labelled > 0, math.nan).nanmean(-1)


class ConfusionMatrix(Accumulator):
    """Counts pixels by label (rows) and prediction (columns), int64 (C, C).

    Definitions of Long et al., arXiv 1411.4038, section 5. Means are over the classes that occur in the labels;
    frequency_weighted_IoU weighs each IoU with the class's share of the label pixels. Each metric is a function of
    Counted, also of those of many resamples at once: comparing.py.
    """

    metrics: ClassVar = {
        "mIoU": Metric(lambda c: c.mean(c.iou)),
        "pixel_accuracy": Metric(lambda c: c.hits.sum(-1) / c.labelled.sum(-1)),
        "mean_accuracy": Metric(lambda c: c.mean(c.recall)),
        "frequency_weighted_IoU": Metric(lambda c: (c.frequency * c.iou.nan_to_num()).sum(-1)),
        "mean_dice": Metric(lambda c: c.mean(2 * c.hits / (c.labelled + c.predicted))),
        "IoU": Metric(lambda c: c.iou, column="IoU"),
        "accuracy": Metric(lambda c: c.recall, column="accuracy"),
        "frequency": Metric(lambda c: c.frequency, column="share of pixels"),
    }

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        super().__init__(num_classes)
        # One bin more than cells: void pixels go there, which costs no boolean mask and so no wait for the device.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Add a batch. Returns the counts of each image, int64 (B, C, C)."""
        void = self.num_classes**2
        cells = (labels.long() * self.num_classes + predictions).where(labels != VOID, void).flatten(1)
        counts = torch.zeros(len(cells), void + 1, dtype=torch.int64, device=cells.device)
        counts.scatter_add_(1, cells, torch.ones_like(cells))
        self._counts += counts.sum(0)
        return counts[:, :-1].unflatten(1, (self.num_classes, self.num_classes))

    @property
    def matrix(self) -> Tensor:
        """(C, C): label, prediction."""
        return self._counts[:-1].view(self.num_classes, self.num_classes)

    def on_host(self) -> Counted:
        return Counted(self.matrix.cpu().double())


def sparse(counts: Tensor) -> np.ndarray:
    """Return label * C + prediction and pixels, int64 (K, 2), of all pairs in an image's counts, (C, C) on the host."""
    counts = counts.flatten()
    found = counts.nonzero()[:, 0]
    return torch.stack([found, counts[found]], 1).numpy()


BAND, RIM = 7, 0.02  # pixels; of a photo's diagonal


class BoundaryMetrics(Accumulator):
    """How well boundaries are met, at the photos' own size. Void pixels count nowhere.

    Accuracy near boundaries and inside (Peng et al., arXiv 1703.02719, table 5): of the pixels whose distance to the
    nearest object boundary is at most 7 pixels, and of the others, the share that is labelled right. A boundary pixel
    has another label than one of its four neighbours, void, with which VOC draws outlines, being a label too; the
    distance is Euclidean.

    Boundary IoU (Cheng et al., arXiv 2103.16562, equation 1): for each class the intersection over the union of the
    rims of the two masks, summed over all photos; a rim is what lies inside a mask within d pixels of its contour
    (in a square neighbourhood, as in the authors' code), d being 2 % of the photo's diagonal.
    """

    original_size = True
    metrics: ClassVar = {
        "boundary_accuracy": Metric(lambda b: b.pixels[0, 0] / b.pixels[0, 1]),
        "interior_accuracy": Metric(lambda b: b.pixels[1, 0] / b.pixels[1, 1]),
        "boundary_mIoU": Metric(lambda b: b.iou.where(b.rims[0] > 0, math.nan).nanmean()),
        "boundary_IoU": Metric(lambda b: b.iou, column="boundary IoU"),
    }

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        super().__init__(num_classes)
        self.pixels = torch.zeros(2, 2, dtype=torch.int64, device=device)  # boundary, interior: right, all
        self.rims = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # of the labels, common, all

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        for photo in zip(predictions.long(), labels.long(), strict=True):
            self._add(*photo)

    def _add(self, prediction: Tensor, labels: Tensor) -> None:
        valid, right, near = labels != VOID, prediction == labels, _near(_boundary(labels))
        for row, region in enumerate((near & valid, ~near & valid)):
            self.pixels[row] += torch.stack([(right & region).sum(), region.sum()])

        prediction = prediction.where(valid, VOID)  # or its contour would run on through the void, unlike the label's
        reach = max(1, round(RIM * math.hypot(*labels.shape)))
        rims = [_rim(classes, reach) & valid for classes in (prediction, labels)]
        predicted, true, both = (
            torch.bincount(classes[rim], minlength=self.rims.shape[1])
            for classes, rim in ((prediction, rims[0]), (labels, rims[1]), (labels, rims[0] & rims[1] & right))
        )
        self.rims += torch.stack([true, both, predicted + true - both])

    iou = property(lambda self: self.rims[1] / self.rims[2])


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


ACCUMULATORS: tuple[type[Accumulator], ...] = (ConfusionMatrix, BoundaryMetrics)  # the confusion matrix first


def registered(kinds: Sequence[type[Accumulator]]) -> dict[str, Metric]:
    """Return all metrics by name. Raises TypeError where one would take the place of another, or of the loss."""
    found = {name: about for kind in kinds for name, about in kind.metrics.items()}
    if len(found) < sum(len(kind.metrics) for kind in kinds) or found.keys() & {"loss", "images", "epoch"}:
        raise TypeError(f"two metrics have the same name, among {', '.join(found)}")
    return found


METRICS = registered(ACCUMULATORS)
AT_ORIGINAL_SIZE = {name for kind in ACCUMULATORS if kind.original_size for name in kind.metrics}
BETTER = {name: about.better for name, about in METRICS.items() if not about.column} | {"loss": min}
CHOOSING = [name for name in BETTER if name not in AT_ORIGINAL_SIZE]  # what every validation has, as one number


class Metrics:
    """All metrics of a data set; those for photos at their own size only where original_size says so.

    Sums are divided once per data set, never averaged over batches: update(), reduce() over processes, compute().
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, original_size: bool = False):
        self.confusion = ConfusionMatrix(num_classes, device)
        others = [kind for kind in ACCUMULATORS[1:] if original_size or not kind.original_size]
        self.parts = [self.confusion, *(kind(num_classes, device) for kind in others)]

    def update(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Add a batch as every Accumulator does. Returns the confusion counts of each image, int64 (B, C, C)."""
        counts, *_ = [part.update(predictions, labels) for part in self.parts]
        return counts

    def reduce(self) -> None:
        for part in self.parts:
            part.reduce()

    def compute(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.compute().items()}
