import itertools
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import metrics
from model.metrics import (
    ACCUMULATORS,
    AT_ORIGINAL_SIZE,
    METRICS,
    Accumulator,
    BoundaryMetrics,
    ConfusionMatrix,
    Metric,
    Metrics,
)

CLASSES = 5


def batches(seed: int, void: float = 0.2, classes: int = CLASSES, count: int = 3) -> list[tuple]:
    """Predictions and uint8 labels of several batches; predictions are right about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in range(1, count + 1):
        labels = torch.randint(classes, (size, 6, 7), generator=generator)
        predictions = torch.randint(classes, labels.shape, generator=generator)
        predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, labels, predictions)
        labels[torch.rand(labels.shape, generator=generator) < void] = 255
        result.append((predictions, labels.to(torch.uint8)))
    return result


def score(data: list[tuple], classes: int = CLASSES) -> dict:
    counted = ConfusionMatrix(classes)
    for predictions, labels in data:
        counted.update(predictions, labels)
    return counted.compute()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), void=st.sampled_from([0.0, 0.3, 0.95]))
def test_counts_equal_a_loop_over_pixels(seed, void):
    data, matrix = batches(seed, void), ConfusionMatrix(CLASSES)
    expected = [[0] * CLASSES for _ in range(CLASSES)]
    for predictions, labels in data:
        matrix.update(predictions, labels)
        for label, prediction in zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True):
            if label != 255:
                expected[label][prediction] += 1
    assert matrix.matrix.tolist() == expected


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), used=st.integers(2, CLASSES))
def test_metrics_equal_torchmetrics(seed, used):
    """Classes from `used` on occur nowhere, so that the rule for absent classes is judged too."""
    # Here, for it takes a second, which not every process needs.
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

    data = batches(seed, classes=used)
    predictions = torch.cat([p.flatten() for p, _ in data])
    labels = torch.cat([label.flatten().long() for _, label in data])
    ours = score(data)

    def judge(metric, average):
        return metric(num_classes=CLASSES, average=average, ignore_index=255)(predictions, labels)

    torch.testing.assert_close(torch.tensor(ours["mIoU"]), judge(MulticlassJaccardIndex, "none")[:used].mean())
    torch.testing.assert_close(torch.tensor(ours["pixel_accuracy"]), judge(MulticlassAccuracy, "micro"))
    torch.testing.assert_close(torch.tensor(ours["frequency_weighted_IoU"]), judge(MulticlassJaccardIndex, "weighted"))
    torch.testing.assert_close(torch.tensor(ours["IoU"][:used]), judge(MulticlassJaccardIndex, "none")[:used])
    torch.testing.assert_close(torch.tensor(ours["accuracy"][:used]), judge(MulticlassAccuracy, "none")[:used])
    torch.testing.assert_close(torch.tensor(ours["mean_dice"]), judge(MulticlassF1Score, "none")[:used].mean())
    torch.testing.assert_close(torch.tensor(ours["mean_accuracy"]), judge(MulticlassAccuracy, "none")[:used].mean())
    assert ours["IoU"][used:] == [None] * (CLASSES - used)


def test_the_data_set_is_divided_once_not_batch_by_batch():
    data = batches(0)
    whole = score([tuple(torch.cat([pair[i].reshape(1, 1, -1) for pair in data], 2) for i in range(2))])
    assert score(data) == whole
    assert whole["mIoU"] != pytest.approx(sum(score([pair])["mIoU"] for pair in data) / len(data))


def test_means_are_over_the_classes_in_the_labels_and_a_class_nowhere_is_null():
    metrics = score([(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))], classes=3)
    assert metrics["IoU"] == [0.5, 0.0, None]
    assert metrics["mIoU"] == metrics["mean_accuracy"] == 0.5
    assert metrics["mean_dice"] == pytest.approx(2 / 3)
    assert metrics["accuracy"] == [0.5, None, None]
    assert json.loads(json.dumps(metrics, allow_nan=False))["IoU"][2] is None


def test_void_alone_leaves_every_metric_undefined():
    metrics = score([(torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), 255))])
    for name, about in ConfusionMatrix.metrics.items():
        assert metrics[name] == ([None] * CLASSES if about.column else None)


def test_perfect_predictions_score_one():
    labels = torch.arange(CLASSES).view(1, 1, CLASSES)
    metrics = score([(labels, labels)])
    assert all(metrics[key] == 1 for key in ("mIoU", "pixel_accuracy", "mean_accuracy", "mean_dice"))
    assert metrics["frequency_weighted_IoU"] == pytest.approx(1)


# ---------------------------------------------------------------------------------------- boundaries


def naive_boundary_metrics(pairs, num_classes: int) -> dict:
    """By the definitions, pixel by pixel."""
    counts = np.zeros((2, 2))
    rims = np.zeros((2, num_classes))
    for prediction, labels in pairs:
        height, width = labels.shape
        places = list(itertools.product(range(height), range(width)))

        prediction = np.where(labels == 255, 255, prediction)

        def is_boundary(y, x, labels=labels, height=height, width=width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width]
            return any(labels[v, u] != labels[y, x] for v, u in inside)

        boundary = [place for place in places if is_boundary(*place)]
        valid = [(y, x) for y, x in places if labels[y, x] != 255]
        for y, x in valid:
            far = not any(math.hypot(y - v, x - u) <= 7 for v, u in boundary)
            counts[int(far)] += (prediction[y, x] == labels[y, x], 1)
        reach = max(1, round(0.02 * math.hypot(height, width)))

        def in_rim(classes, index, y, x, reach=reach, height=height, width=width):
            steps = itertools.product(range(y - reach, y + reach + 1), range(x - reach, x + reach + 1))
            return classes[y, x] == index and any(
                not (0 <= v < height and 0 <= u < width) or classes[v, u] != index for v, u in steps
            )

        for index, (y, x) in itertools.product(range(num_classes), valid):
            both = in_rim(prediction, index, y, x), in_rim(labels, index, y, x)
            rims[:, index] += (all(both), any(both))
    iou = [a / b if b else None for a, b in rims.T]
    return {
        "boundary_accuracy": counts[0, 0] / counts[0, 1] if counts[0, 1] else None,
        "interior_accuracy": counts[1, 0] / counts[1, 1] if counts[1, 1] else None,
        "boundary_mIoU": np.mean(
            [value for index, value in enumerate(iou) if any((y == index).any() for _, y in pairs)]
        ),
        "boundary_IoU": iou,
    }


def test_boundary_metrics_agree_with_a_loop_over_pixels():
    rng = np.random.default_rng(3)
    pairs = []
    for height, width in ((30, 41), (60, 90), (9, 7)):  # at 60 x 90 the rim is two pixels wide
        labels = np.zeros((height, width), dtype=np.uint8)
        labels[height // 3 :, : width // 3] = 2
        labels[height // 2, width // 2 :] = 255
        prediction = np.roll(labels, 2, axis=1)
        prediction[prediction == 255] = 1
        prediction[rng.random(labels.shape) < 0.05] = 3
        pairs.append((prediction, labels))
    metrics = BoundaryMetrics(5)
    for pair in pairs:
        metrics.update(*(torch.from_numpy(part)[None] for part in pair))
    ours, naive = metrics.compute(), naive_boundary_metrics(pairs, 5)
    for key, value in naive.items():
        assert ours[key] == pytest.approx(value), key


def test_what_is_predicted_for_void_makes_no_difference():
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    labels[20:40, 20:50] = 255
    labels[23:37, 23:47] = 2
    results = []
    for value in (0, 1, 2, 255):
        metrics = BoundaryMetrics(3)
        metrics.update(labels.where(labels != 255, value)[None], labels[None])
        results.append(metrics.compute())
    assert results == [results[0]] * 4
    assert results[0]["boundary_mIoU"] == results[0]["boundary_accuracy"] == 1


def test_boundary_metrics_of_a_perfect_a_void_and_a_plain_photo():
    labels = torch.zeros(40, 50, dtype=torch.uint8)
    labels[10:30, 10:30] = 2
    perfect = BoundaryMetrics(3)
    perfect.update(labels[None], labels[None])
    assert perfect.compute() == {
        "boundary_accuracy": 1,
        "interior_accuracy": 1,
        "boundary_mIoU": 1,
        "boundary_IoU": [1, None, 1],
    }
    void = BoundaryMetrics(3)
    void.update(labels[None], torch.full_like(labels, 255)[None])
    assert void.compute() == dict.fromkeys(("boundary_accuracy", "interior_accuracy", "boundary_mIoU")) | {
        "boundary_IoU": [None] * 3
    }
    plain = BoundaryMetrics(3)
    plain.update(*torch.zeros(2, 1, *labels.shape).long())
    assert plain.compute()["boundary_accuracy"] is None
    assert plain.compute()["interior_accuracy"] == 1


# ---------------------------------------------------------------------------------------- the registry


class Edges(Accumulator):
    """A user's metric that needs the maps: how many pixels of an edge, per class, are edges in the prediction too."""

    original_size = True
    metrics: ClassVar = {
        "edge_recall": Metric(lambda e: e.counts[0].sum() / e.counts[1].sum()),
        "edges_missed": Metric(lambda e: e.counts[1].sum() - e.counts[0].sum(), better=min),
        "edge_recall_by_class": Metric(lambda e: e.counts[0] / e.counts[1], column="edges"),
    }

    def __init__(self, num_classes, device="cpu"):
        super().__init__(num_classes)
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions, labels):
        edge, found = (maps[:, :, 1:] != maps[:, :, :-1] for maps in (labels, predictions))
        for row, where in enumerate((edge & found, edge)):
            self.counts[row] += torch.bincount(labels[:, :, 1:][where].long(), minlength=self.num_classes)


def test_a_metric_that_needs_the_maps_is_one_class(monkeypatch):
    monkeypatch.setattr(metrics, "ACCUMULATORS", (*ACCUMULATORS, Edges))
    labels = torch.tensor([[[0, 1, 2, 2]]])
    for original_size in (True, False):
        counted = Metrics(4, original_size=original_size)
        counted.update(torch.tensor([[[0, 1, 1, 1]]]), labels)
        found = counted.compute()
        assert ("edge_recall" in found) is original_size
    counted = Metrics(4, original_size=True)
    counted.update(torch.tensor([[[0, 1, 1, 1]]]), labels)
    found = counted.compute()
    assert found["edge_recall"] == 0.5 and found["edges_missed"] == 1
    assert found["edge_recall_by_class"] == [None, 1.0, 0.0, None]
    monkeypatch.setattr(BoundaryMetrics, "metrics", {"mIoU": Metric(lambda b: b.iou)})
    with pytest.raises(TypeError, match="the same name"):
        metrics.registered((ConfusionMatrix, BoundaryMetrics))


def test_every_metric_says_its_name_direction_and_whether_it_is_by_class():
    counted = Metrics(3, original_size=True)
    found = counted.compute()
    assert [*found] == [*METRICS]
    assert {name for name, value in found.items() if isinstance(value, list)} == {
        name for name, about in METRICS.items() if about.column
    }
    assert [*Metrics(3).compute()] == [name for name in METRICS if name not in AT_ORIGINAL_SIZE]
