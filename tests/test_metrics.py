import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from model.metrics import ConfusionMatrix

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
    matrix = ConfusionMatrix(classes)
    for predictions, labels in data:
        matrix.update(predictions, labels)
    return matrix.compute()


@settings(max_examples=20, deadline=None)
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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), used=st.integers(2, CLASSES))
def test_metrics_equal_torchmetrics(seed, used):
    """Classes from `used` on occur nowhere, so that the rule for absent classes is judged too."""
    data = batches(seed, classes=used)
    predictions = torch.cat([p.flatten() for p, _ in data])
    labels = torch.cat([label.flatten().long() for _, label in data])
    ours = score(data)

    def judge(metric, average):
        return metric(num_classes=CLASSES, average=average, ignore_index=255)(predictions, labels)

    torch.testing.assert_close(torch.tensor(ours["mIoU"]), judge(MulticlassJaccardIndex, "macro"))
    torch.testing.assert_close(torch.tensor(ours["pixel_accuracy"]), judge(MulticlassAccuracy, "micro"))
    torch.testing.assert_close(torch.tensor(ours["frequency_weighted_IoU"]), judge(MulticlassJaccardIndex, "weighted"))
    torch.testing.assert_close(torch.tensor(ours["IoU"][:used]), judge(MulticlassJaccardIndex, "none")[:used])
    torch.testing.assert_close(torch.tensor(ours["accuracy"][:used]), judge(MulticlassAccuracy, "none")[:used])
    torch.testing.assert_close(torch.tensor(ours["mean_dice"]), judge(MulticlassF1Score, "none")[:used].mean())
    torch.testing.assert_close(torch.tensor(ours["mean_accuracy"]), judge(MulticlassAccuracy, "none")[:used].mean())
    assert ours["IoU"][used:] == [None] * (CLASSES - used)


def test_the_data_set_is_divided_once_not_batch_by_batch():
    data = batches(0)
    whole = score([tuple(torch.cat([pair[i].flatten() for pair in data]) for i in range(2))])
    assert score(data) == whole
    assert whole["mIoU"] != pytest.approx(sum(score([pair])["mIoU"] for pair in data) / len(data))


def test_a_class_only_predicted_counts_as_zero_and_a_class_nowhere_as_null():
    metrics = score([(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))], classes=3)
    assert metrics["IoU"] == [0.5, 0.0, None]
    assert metrics["mIoU"] == 0.25
    assert metrics["accuracy"] == [0.5, None, None]
    assert json.loads(json.dumps(metrics, allow_nan=False))["IoU"][2] is None


def test_void_alone_leaves_every_metric_undefined():
    metrics = score([(torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), 255))])
    assert {key for key, value in metrics.items() if value is not None} == {"IoU", "accuracy", "frequency"}
    assert metrics["IoU"] == [None] * CLASSES


def test_perfect_predictions_score_one():
    labels = torch.arange(CLASSES).view(1, 1, CLASSES)
    metrics = score([(labels, labels)])
    assert all(metrics[key] == 1 for key in ("mIoU", "pixel_accuracy", "mean_accuracy", "mean_dice"))
    assert metrics["frequency_weighted_IoU"] == pytest.approx(1)
