"""How sure a difference of mIoU is: a paired bootstrap over photos and seeds. docs/COMPARING.md says how and why."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import UserError, refuse_irregular

RESAMPLES = 10_000
AT_ONCE = 500  # resamples in memory
LEVEL = 0.95


@dataclass(frozen=True)
class Counts:
    """What a network made of every photo of a split, by class: int64 (N, C) pixels.

    labelled with a class, predicted to be of it, and hits, which are both. Void counts in none.
    """

    ids: list[str]
    class_names: list[str]
    labelled: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray


def write_counts(path: Path, ids: Sequence[str], class_names: Sequence[str], cells: Sequence[np.ndarray]) -> None:
    """Write the confusion counts of every photo: cells has, for each, (K, 2) of label * C + prediction and its pixels.

    The same file, byte for byte, for the same counts.
    """
    numbers = np.repeat(np.arange(len(cells)), [len(part) for part in cells])
    cell, count = np.concatenate([np.empty((0, 2), np.int64), *cells]).T
    with open(path, "wb") as stream:
        np.savez_compressed(
            stream,
            ids=np.array(ids, dtype=np.str_),
            class_names=np.array(class_names, dtype=np.str_),
            photo=numbers.astype(np.int32),
            cell=cell.astype(np.int32),
            count=count.astype(np.int64),
        )


def read_counts(path: Path) -> Counts:
    """Read what write_counts() has written. Raises UserError naming a file that is absent or damaged."""
    refuse_irregular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, names = file["ids"].tolist(), file["class_names"].tolist()
            photo, cell, count = (file[key].astype(np.int64) for key in ("photo", "cell", "count"))
        n, c = len(ids), len(names)
        sound = len(photo) == len(cell) == len(count) and (count > 0).all() and c > 0
        if not (sound and (photo >= 0).all() and (photo < n).all() and (cell >= 0).all() and (cell < c * c).all()):
            raise ValueError("numbers that cannot be")
    except FileNotFoundError:
        raise UserError(f"no {path}; evaluate.py writes it beside the metrics") from None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); write it anew with evaluate.py") from None
    label, prediction = np.divmod(cell, c)

    def by_class(photos: np.ndarray, classes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        return np.bincount(photos * c + classes, pixels, n * c).reshape(n, c).astype(np.int64)

    right = label == prediction
    return Counts(
        ids,
        names,
        by_class(photo, label, count),
        by_class(photo, prediction, count),
        by_class(photo[right], label[right], count[right]),
    )


def class_IoU(counts: Counts, weights: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, float64 (R, C), for weights (R, N) of the photos; NaN where no label is of it.

    A class counts if it occurs in the labels, also of a resample. So a prediction in a single pixel adds no class, and
    two networks on the same photos are always compared over the same classes.
    """
    labelled, predicted, hits = (
        weights @ part.astype(np.float64) for part in (counts.labelled, counts.predicted, counts.hits)
    )
    union = labelled + predicted - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=labelled > 0)


def photo_mIoU(counts: Counts) -> np.ndarray:
    """Return the mean IoU of each photo, float64 (N), over the classes in its labels or predictions; NaN: all void."""
    union = counts.labelled + counts.predicted - counts.hits
    iou = np.divide(counts.hits, union, out=np.full(union.shape, np.nan), where=union > 0)
    known = (union > 0).any(1)
    return np.array([np.nanmean(row) if some else np.nan for row, some in zip(iou, known, strict=True)])


def mIoU(counts: Counts) -> float:
    """Return the mean IoU over the classes that occur in the labels."""
    return float(np.nanmean(class_IoU(counts, np.ones((1, len(counts.ids))))))


@dataclass(frozen=True)
class Difference:
    """Of two experiments in mIoU, or in the IoU of a class: the first less the baseline."""

    value: float
    low: float  # of the interval of LEVEL
    high: float
    p: float  # of a difference at least so far from 0 where there is none, two-sided


def check_same_photos(first: Counts, other: Counts, names: tuple[str, str]) -> None:
    """Raise UserError unless two evaluations are of the same photos, labels and classes."""
    if first.class_names != other.class_names:
        raise UserError(f"{names[0]} and {names[1]} have different classes and cannot be compared")
    if first.ids != other.ids:
        different = sorted({*first.ids} ^ {*other.ids}) or ["their order"]
        raise UserError(
            f"{names[0]} and {names[1]} were scored on different photos ({different[0]}"
            f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}); evaluate both on the same list"
        )
    if (differs := (first.labelled != other.labelled).any(1)).any():
        raise UserError(
            f"{names[0]} and {names[1]} were scored against different masks of {first.ids[int(differs.argmax())]}; "
            "evaluate both with the same data"
        )


@dataclass(frozen=True)
class Resampled:
    """What a run reaches: float64, mIoU first and then the IoU of each class.

    observed (1 + C) on the photos as they are, drawn (R, 1 + C) on resamples of them, the same for all runs.
    """

    observed: np.ndarray
    drawn: np.ndarray


def resample(runs: Sequence[Counts], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Resampled]:
    """Draw photos again, with replacement, the same for all runs, which are of the same photos."""
    rng, photos = np.random.default_rng(seed), len(runs[0].ids)
    observed = [_with_mean(class_IoU(run, np.ones((1, photos))))[0] for run in runs]
    drawn = [np.empty((resamples, 1 + len(run.class_names))) for run in runs]
    for start in range(0, resamples, AT_ONCE):
        count = min(AT_ONCE, resamples - start)
        weights = rng.multinomial(photos, np.full(photos, 1 / photos), size=count).astype(np.float64)
        for run, of_run in zip(runs, drawn, strict=True):
            of_run[start : start + count] = _with_mean(class_IoU(run, weights))
    return [Resampled(*parts) for parts in zip(observed, drawn, strict=True)]


def compare(
    ours: Sequence[Resampled], baseline: Sequence[Resampled], *, seed: int = 0
) -> tuple[Difference, list[Difference | None]]:
    """Return the difference in mIoU of the means over the runs of two experiments, and that in the IoU of each class.

    None stands for a class that is in no label. All runs are from one call of resample().
    """
    observed = [np.stack([run.observed for run in runs]) for runs in (ours, baseline)]  # (runs, 1 + C)
    drawn = np.mean([run.drawn for run in ours], 0) - np.mean([run.drawn for run in baseline], 0)
    drawn += _between_seeds(observed, len(drawn), np.random.default_rng(seed))
    value = observed[0].mean(0) - observed[1].mean(0)
    differences = [_difference(value[place], drawn[:, place]) for place in range(value.size)]
    assert differences[0] is not None
    return differences[0], differences[1:]


def _with_mean(iou: np.ndarray) -> np.ndarray:
    """Put the mean over the classes that occur before the classes: (…, C) -> (…, 1 + C)."""
    return np.concatenate([np.nanmean(iou, -1, keepdims=True), iou], -1)


def _between_seeds(observed: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return what other seeds would add to a difference: (resamples, 1 + C), 0 where no side has several runs.

    The mean of n runs is off by their deviation / sqrt(n), and as the deviation of few runs is itself uncertain, by
    that times Student's t (Welch, with Satterthwaite's degrees of freedom). To draw from a few runs with replacement
    would make the interval too narrow, by a fifth for three.
    """
    several = [runs for runs in observed if len(runs) > 1]
    if not several:
        return np.zeros((resamples, observed[0].shape[1]))
    parts = np.stack([runs.var(0, ddof=1) / len(runs) for runs in several])
    total = parts.sum(0)
    spread = sum(part**2 / (len(runs) - 1) for part, runs in zip(parts, several, strict=True))
    freedom = np.divide(total**2, spread, out=np.ones_like(total), where=np.nan_to_num(spread) > 0)
    return rng.standard_t(np.maximum(freedom, 1), size=(resamples, total.size)) * np.sqrt(total)


def _difference(value: float, drawn: np.ndarray) -> Difference | None:
    drawn = drawn[np.isfinite(drawn)]  # a class may be in no photo of a resample
    if not np.isfinite(value) or not drawn.size:
        return None
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    beyond = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(float(value), float(low), float(high), float(min(1, 2 * beyond / (drawn.size + 1))))


def verdicts(differences: Sequence[Difference]) -> list[str]:
    """Return "better", "worse" or "open" for each of several comparisons made at once (Holm's procedure, 1979)."""
    order = sorted(range(len(differences)), key=lambda place: differences[place].p)
    result, sure = ["open"] * len(differences), True
    for rank, place in enumerate(order):
        sure = sure and differences[place].p <= (1 - LEVEL) / (len(differences) - rank)
        if sure:
            result[place] = "better" if differences[place].value > 0 else "worse"
    return result
