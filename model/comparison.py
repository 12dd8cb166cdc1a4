"""How sure a difference of mIoU is: a paired bootstrap over photos and seeds. docs/COMPARING.md says how and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import UserError, refuse_irregular

RESAMPLES = 10_000
AT_ONCE = 500  # resamples in memory
LEVEL = 0.95
KEYS = ("photo", "cell", "count")


@dataclass(frozen=True)
class Counts:
    """Pixels of every photo of a split by class, int64 (N, C).

    labelled with a class, predicted to be of it, and hits, which are both. Void counts in none.
    """

    ids: list[str]
    class_names: list[str]
    labelled: np.ndarray
    predicted: np.ndarray
    hits: np.ndarray

    def are_of(self, pixel_accuracy: float | None) -> bool:
        """Return whether metrics with this pixel_accuracy come from these counts."""
        return pixel_accuracy is not None and abs(pixel_accuracy - self.hits.sum() / self.labelled.sum()) < 1e-9


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
            texts, numbers = [file[key] for key in ("ids", "class_names")], [file[key] for key in KEYS]
        if any(part.ndim != 1 for part in (*texts, *numbers)) or len({len(part) for part in numbers}) > 1:
            raise ValueError("wrong shapes")
        if any(part.dtype.kind != "U" or len(set(part)) < len(part) for part in texts):
            raise ValueError("names that are not text, or not unique")
        if any(part.dtype.kind != "i" for part in numbers):
            raise ValueError("counts that are no integers")
        ids, names = (part.tolist() for part in texts)
        photo, cell, count = (part.astype(np.int64) for part in numbers)
        n, c = len(ids), len(names)
        if ((photo < 0) | (photo >= n) | (cell < 0) | (cell >= c * c) | (count < 1)).any():
            raise ValueError("values out of range")
    except FileNotFoundError:
        raise UserError(f"no {path}; evaluate.py writes it beside the metrics") from None
    except Exception as error:  # zipfile, zlib and NumPy raise of all kinds
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({why}); write it anew with evaluate.py") from None
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
    return _iou(*(weights @ part.astype(np.float64) for part in (counts.labelled, counts.predicted, counts.hits)))


def photo_mIoU(counts: Counts) -> np.ndarray:
    """Return the mean IoU of each photo, float64 (N), over the classes in its labels; NaN where all is void."""
    iou = _iou(counts.labelled, counts.predicted, counts.hits)
    known = np.isfinite(iou).any(1)
    return np.divide(np.nansum(iou, 1), np.isfinite(iou).sum(1), out=np.full(len(iou), np.nan), where=known)


def _iou(labelled: np.ndarray, predicted: np.ndarray, hits: np.ndarray) -> np.ndarray:
    return np.divide(hits, labelled + predicted - hits, out=np.full(hits.shape, np.nan), where=labelled > 0)


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
    if different := sorted({*first.ids} ^ {*other.ids}):
        owner, more = names[different[0] not in first.ids], len(different) - 1
        raise UserError(
            f"{names[0]} and {names[1]} were scored on different photos ({different[0]} of {owner} alone"
            f"{f', and {more} more' if more else ''}); evaluate both on the same list"
        )
    if first.ids != other.ids:
        raise UserError(
            f"{names[0]} and {names[1]} were scored on the same photos in another order; evaluate both on the same list"
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


@dataclass(frozen=True)
class Spread:
    """How runs vary that differ in their seed only: the variance, float64 (1 + C), and its degrees of freedom."""

    variance: np.ndarray
    freedom: int


def between_seeds(families: Sequence[Sequence[Resampled]]) -> Spread | None:
    """Return the variance within families of runs that differ in their seed only, pooled; None: no family has several.

    Runs also differ by what each makes of a photo by chance. That is in the resamples of the photos already, and is
    taken off here (the component of variance between runs, of a table of runs by photos; at least 0).
    """
    several = [runs for runs in families if len(runs) > 1]
    if not several:
        return None
    squares, freedom = np.zeros_like(several[0][0].observed), 0
    for runs in several:
        observed, drawn = np.stack([run.observed for run in runs]), np.stack([run.drawn for run in runs])
        by_photos = (drawn - drawn.mean(0) - observed[:, None] + observed.mean(0)) ** 2
        known = np.isfinite(by_photos)
        by_photos = np.where(known, by_photos, 0).sum((0, 1)) / np.maximum(known.any(0).sum(0), 1)
        squares += ((observed - observed.mean(0)) ** 2).sum(0) - by_photos
        freedom += len(runs) - 1
    return Spread(np.maximum(squares / freedom, 0), freedom)


def compare(
    ours: Sequence[Resampled], baseline: Sequence[Resampled], *, others: Spread | None = None, seed: int = 1
) -> tuple[Difference, list[Difference | None]]:
    """Return the difference in mIoU of the means over the runs of two experiments, and that in the IoU of each class.

    None stands for a class that is in no label. All runs are from one call of resample(). What another seed would
    change is taken from the runs of each experiment, for one with a single run from others; without those it is left
    out.
    """
    value = np.mean([run.observed for run in ours], 0) - np.mean([run.observed for run in baseline], 0)
    drawn = np.mean([run.drawn for run in ours], 0) - np.mean([run.drawn for run in baseline], 0)
    own = [(between_seeds([runs]), len(runs)) for runs in (ours, baseline)]
    variances = [(spread.variance / count, spread.freedom) for spread, count in own if spread]
    if others and (alone := 2 - len(variances)):
        variances.append((alone * others.variance, others.freedom))
    drawn += _seed_noise(variances, drawn.shape, np.random.default_rng(seed))
    differences = [_difference(value[place], drawn[:, place]) for place in range(value.size)]
    assert differences[0] is not None
    return differences[0], differences[1:]


def _with_mean(iou: np.ndarray) -> np.ndarray:
    """Put the mean over the classes that occur before the classes: (…, C) -> (…, 1 + C)."""
    return np.concatenate([np.nanmean(iou, -1, keepdims=True), iou], -1)


def _seed_noise(parts: Sequence[tuple[np.ndarray, int]], shape: tuple, rng: np.random.Generator) -> np.ndarray:
    """Return what other seeds would add to a difference: (R, 1 + C), given each side's variance of its mean.

    That is the root of their sum, and as variances of few runs are themselves uncertain, times Student's t (Welch, with
    Satterthwaite's degrees of freedom). To draw from a few runs with replacement would make the interval too narrow,
    by a fifth for three.
    """
    if not parts:
        return np.zeros(shape)
    total = np.sum([part for part, _ in parts], 0)
    spread = np.sum([part**2 / freedom for part, freedom in parts], 0)
    freedom = np.divide(total**2, spread, out=np.ones_like(total), where=np.nan_to_num(spread) > 0)
    return rng.standard_t(np.maximum(freedom, 1), size=shape) * np.sqrt(total)


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
            result[place] = "better" if differences[place].low > 0 else "worse"
    return result
