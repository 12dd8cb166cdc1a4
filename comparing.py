"""How sure a difference is: a paired bootstrap over photos and seeds. docs/COMPARING.md says how and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model import UserError, first_line
from model.metrics import ConfusionMatrix, Counted
from utils import grouped

RESAMPLES = 10_000
AT_ONCE = 500  # resamples in memory
LEVEL = 0.95
METRICS = [name for name, about in ConfusionMatrix.metrics.items() if not about.column]  # that follow from counts
FEW = 10  # photos: nothing is said of fewer, in all or of a class, as intervals err too often (test_calibration.py)


@dataclass(frozen=True)
class Counts:
    """The confusion counts of every photo of a split: pixels, int64 (N, C, C), by label and prediction."""

    ids: list[str]
    class_names: list[str]
    pixels: np.ndarray

    @property
    def labelled(self) -> np.ndarray:
        """Pixels of each photo that are labelled with each class, int64 (N, C)."""
        return self.pixels.sum(2)

    def of_groups(self, pattern: str | None) -> "Counts":
        """Return the counts of groups of photos, as utils.grouped() makes them of the ids, in the place of photos."""
        if pattern is None:
            return self
        place, groups = {id_: index for index, id_ in enumerate(self.ids)}, grouped(self.ids, pattern)
        sums = [self.pixels[[place[id_] for id_ in group]].sum(0) for group in groups]
        return Counts([group[0] for group in groups], self.class_names, np.stack(sums))

    def are_of(self, accuracy: float | None) -> bool:
        """Return whether metrics with this pixel_accuracy come from these counts."""
        total = self.pixels.sum(0)
        return accuracy is not None and bool(abs(accuracy * total.sum() - np.trace(total)) < 1e-9 * total.sum())


def write_counts(path: Path, ids: Sequence[str], class_names: Sequence[str], cells: Sequence[np.ndarray]) -> None:
    """Write the counts of every photo: cells has, for each, int64 (K, 2) of label * C + prediction and its pixels."""
    photo = np.repeat(np.arange(len(cells)), [len(part) for part in cells])
    cell, count = np.concatenate([np.empty((0, 2), np.int64), *cells]).T
    arrays: dict[str, Any] = {"ids": np.array(ids, np.str_), "class_names": np.array(class_names, np.str_)}
    arrays |= {"photo": photo.astype(np.int32), "cell": cell.astype(np.int32), "count": count.astype(np.int64)}
    with open(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def read_counts(path: Path) -> Counts:
    """Read what write_counts() has written. Raises UserError naming a file that is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, names = file["ids"].tolist(), file["class_names"].tolist()
            pixels = np.zeros((len(ids), len(names), len(names)), dtype=np.int64)
            pixels.reshape(len(ids), -1)[file["photo"], file["cell"]] = file["count"]
    except FileNotFoundError:
        raise UserError(f"no {path}; evaluate.py writes it beside the metrics") from None
    except Exception as error:  # zipfile, zlib and NumPy raise of all kinds
        raise UserError(f"{path} is damaged ({first_line(error)}); write it anew with evaluate.py") from None
    return Counts(ids, names, pixels)


def check_same_photos(first: Counts, other: Counts, names: tuple[str, str]) -> None:
    """Raise UserError unless two evaluations are of the same photos, labels and classes."""
    both = " and ".join(names)
    if first.class_names != other.class_names:
        raise UserError(f"{both} have different classes and cannot be compared")
    if first.ids != other.ids:
        raise UserError(f"{both} were scored on different photos, or in another order; evaluate both on the same list")
    if (differs := (first.labelled != other.labelled).any(1)).any():
        photo = first.ids[int(differs.argmax())]
        raise UserError(f"{both} were scored against different masks of {photo}; evaluate both with the same data")


def mIoU(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the classes that occur in the labels, (…, C, C) -> (…); NaN where all is void."""
    return values(counts, ["mIoU"])[..., 0]


def values(counts: np.ndarray, metrics: Sequence[str] = ("mIoU",)) -> np.ndarray:
    """Return metrics and then the IoU of each class, (…, C, C) -> (…, M + C).

    The IoU of a class in no label is NaN, whatever is predicted: so networks are compared over the same classes.
    """
    counted = Counted(torch.from_numpy(counts.astype(np.float64)))  # exact: they are integers
    found = [ConfusionMatrix.metrics[name].value(counted)[..., None] for name in metrics]
    return torch.cat([*found, counted.iou.where(counted.labelled > 0, np.nan)], -1).numpy()


class Resampled(NamedTuple):
    """What a run reaches, float64: the values() of its counts."""

    observed: np.ndarray  # (M + C), on the photos as they are
    drawn: np.ndarray  # (R, M + C), on resamples of them, the same for all runs


Spread = tuple[np.ndarray, int]  # of runs that differ in their seed only: variance (M + C) and its degrees of freedom


class Difference(NamedTuple):
    """A metric or the IoU of a class: an experiment's less the baseline's."""

    value: float
    low: float  # of the interval of LEVEL
    high: float
    p: float  # of a difference at least so far from 0 where there is none, two-sided


def resample(
    runs: Sequence[Counts], metrics: Sequence[str] = ("mIoU",), *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Resampled]:
    """Draw photos again, with replacement, the same for all runs, which are of the same photos."""
    rng, photos = np.random.default_rng(seed), len(runs[0].ids)
    drawn: list[list[np.ndarray]] = [[] for _ in runs]
    for start in range(0, resamples, AT_ONCE):
        count = min(AT_ONCE, resamples - start)
        weights = rng.multinomial(photos, np.full(photos, 1 / photos), size=count).astype(np.float64)  # (R, N)
        for run, parts in zip(runs, drawn, strict=True):
            sums = weights @ run.pixels.reshape(photos, -1).astype(np.float64)  # exact: they are integers
            parts.append(values(sums.reshape(count, *run.pixels.shape[1:]), metrics))
    observed = [values(run.pixels.sum(0), metrics) for run in runs]
    return [Resampled(each, np.concatenate(parts)) for each, parts in zip(observed, drawn, strict=True)]


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
    return np.maximum(squares / freedom, 0), freedom


def difference(
    ours: Sequence[Resampled], baseline: Sequence[Resampled], *, others: Spread | None = None, seed: int = 1
) -> list[Difference | None]:
    """Return how the means over two experiments' runs differ, for each of their values(); None where one is NaN.

    All runs are from one call of resample(). What another seed would change is taken from the runs of each experiment,
    for one with a single run from others; without those it is left out.
    """
    value = np.mean([run.observed for run in ours], 0) - np.mean([run.observed for run in baseline], 0)
    drawn = np.mean([run.drawn for run in ours], 0) - np.mean([run.drawn for run in baseline], 0)
    drawn = np.clip(drawn + _seed_noise([ours, baseline], others, drawn.shape, seed), -1, 1)
    return [_interval(value[place], drawn[:, place]) for place in range(value.size)]


def intervals(
    runs: Sequence[Resampled], *, others: Spread | None = None, seed: int = 1
) -> list[tuple[float, float, float] | None]:
    """Return the mean over an experiment's runs and the ends of its interval, for each of their values(), or None.

    No end is beyond 0 and 1, which no value is.
    """
    value, drawn = (np.mean(parts, 0) for parts in zip(*runs, strict=True))
    drawn = np.clip(drawn + _seed_noise([runs], others, drawn.shape, seed), 0, 1)
    found = [_interval(value[place], drawn[:, place]) for place in range(value.size)]
    return [each and each[:3] for each in found]


def _seed_noise(
    sides: Sequence[Sequence[Resampled]], others: Spread | None, shape: tuple[int, ...], seed: int
) -> np.ndarray:
    """Return what other seeds would add to the sum or difference of the sides' means, (R, M + C).

    That is the root of the sum of the variances of the means. As variances of few runs are themselves uncertain, it is
    times Student's t (Welch, with Satterthwaite's degrees of freedom). To draw from a few runs with replacement would
    make the interval too narrow, by a fifth for three.
    """
    own = [(*spread, len(runs)) for runs in sides if (spread := between_seeds([runs]))]
    parts = [(variance / count, freedom) for variance, freedom, count in own]
    if others and (alone := len(sides) - len(own)):
        parts.append((alone * others[0], others[1]))
    if not parts:
        return np.zeros(shape)
    total = np.sum([part for part, _ in parts], 0)
    spread = np.sum([part**2 / freedom for part, freedom in parts], 0)
    freedom = np.divide(total**2, spread, out=np.ones_like(total), where=np.nan_to_num(spread) > 0)
    return np.random.default_rng(seed).standard_t(np.maximum(freedom, 1), size=shape) * np.sqrt(total)


def _interval(value: float, drawn: np.ndarray) -> Difference | None:
    drawn = drawn[np.isfinite(drawn)]  # a class may be in no photo of a resample
    if not np.isfinite(value) or not drawn.size:
        return None
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    beyond = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Difference(float(value), float(low), float(high), float(min(1, 2 * beyond / (drawn.size + 1))))


def verdicts(differences: Mapping[Any, Difference]) -> dict[Any, str]:
    """Return "better", "worse" or "open" for each of several differences judged together (Holm's procedure, 1979)."""
    words, sure = dict.fromkeys(differences, "open"), True
    for rank, name in enumerate(sorted(differences, key=lambda name: differences[name].p)):
        sure = sure and differences[name].p <= (1 - LEVEL) / (len(differences) - rank)
        if sure:
            words[name] = "better" if differences[name].low > 0 else "worse"
    return words
