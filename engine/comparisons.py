"""Comparisons of experiments with a baseline, for a table: differences of mIoU, their intervals, and words for them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model import UserError
from model.comparison import (
    Counts,
    Difference,
    between_seeds,
    check_same_photos,
    compare,
    read_counts,
    resample,
    verdicts,
)
from utils import table_text

FEW = 10  # photos: of a class that is in fewer nothing is said
REMEDY = "score it with `python evaluate.py --model_dir … --original_size`"


@dataclass(frozen=True)
class Run:
    """A finished run, and what evaluate.py has found at the photos' own size, by split."""

    name: str
    task: Any  # the same for runs on the same data
    pixel_accuracy: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Path] = field(default_factory=dict)  # of every photo

    def read(self, split: str) -> Counts:
        """Read the counts of a split. Raises UserError unless they are of the evaluation that the metrics are of."""
        counts = read_counts(self.counts[split])
        if not counts.are_of(self.pixel_accuracy[split]):
            raise UserError(f"{self.counts[split]} is of another evaluation than the metrics; run evaluate.py again")
        return counts


@dataclass(frozen=True)
class Comparison:
    """How the rows of a table differ from its baseline on a split: by row, in mIoU, and in the IoU of each class."""

    split: str
    baseline: str
    class_names: list[str]
    class_photos: list[int]  # in which each class occurs
    whole: dict[str, Difference]
    by_class: dict[str, list[Difference | None]]
    one_seed: set[str]  # rows of which it is not known what another seed would change
    uncounted: list[str]  # runs that were scored without counts of their photos, which leaves out their rows

    @property
    def chosen_here(self) -> bool:
        """Whether the epochs were chosen on this split."""
        return self.split == "val"

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """What is to be said of each row but the baseline, for all of them at once."""
        return dict(zip(self.whole, verdicts(list(self.whole.values())), strict=True))

    def columns(self, name: str) -> dict[str, Any]:
        """Return the columns of a row of the table."""
        found = self.whole.get(name)
        verdict = "baseline" if name == self.baseline else self.verdicts.get(name)
        if verdict in ("better", "worse"):
            doubts = ["optimistic"] * self.chosen_here + ["one seed"] * (name in self.one_seed)
            verdict += f" ({', '.join(doubts)})" if doubts else ""
        return {
            f"{self.split}_difference": found and found.value,
            f"{self.split}_low": found and found.low,
            f"{self.split}_high": found and found.high,
            f"{self.split}_verdict": verdict,
        }

    def table(self, names: list[str]) -> str:
        """Return a table with a row per class, names in their order; verdicts are for all classes of a row at once."""
        enough = [place for place, photos in enumerate(self.class_photos) if photos >= FEW]
        columns = [[table_text(name) for name in self.class_names], list(map(str, self.class_photos))]
        names = [name for name in names if name in self.by_class]
        for name in names:
            sure = {place: found for place in enough if (found := self.by_class[name][place])}
            words = dict(zip(sure, verdicts(list(sure.values())), strict=True))
            columns.append(
                [
                    f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) {words.get(place, 'few photos')}"
                    if found
                    else "-"
                    for place, found in enumerate(self.by_class[name])
                ]
            )
        title = f"IoU on {self.split}{' (optimistic)' * self.chosen_here}"
        rows = list(zip(*columns, strict=True))
        return tabulate(rows, [title, "photos", *map(table_text, names)], tablefmt="pipe", disable_numparse=True)


def compare_all(groups: dict[str, list[Run]], baseline: str, families: list[list[str]]) -> list[Comparison]:
    """Compare every row of a table with the baseline, on each split on which that was scored photo by photo.

    groups has the finished runs of each row, families the names of runs that differ in their seed only.

    Raises UserError if there is no such row or nothing to compare, or if photos differ between two runs.
    """
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: the table has no row of that name")
    splits = sorted({split for run in groups[baseline] for split in run.counts})
    for split in splits:
        if without := [run.name for run in groups[baseline] if split not in run.counts]:
            raise UserError(f"--baseline {baseline}: {without[0]} has no counts of its photos on {split}; {REMEDY}")
    if not splits:
        raise UserError(f"--baseline {baseline}: it has no finished run with counts of its photos; {REMEDY}")
    task = groups[baseline][0].task
    alike = {name: runs for name, runs in groups.items() if runs and runs[0].task == task}
    return [_compare_on(split, alike, baseline, families) for split in splits]


def _compare_on(split: str, groups: dict[str, list[Run]], baseline: str, families: list[list[str]]) -> Comparison:
    uncounted = [
        run.name
        for runs in groups.values()
        for run in runs
        if split not in run.counts and (split in run.pixel_accuracy or any(split in other.counts for other in runs))
    ]
    rows = {name: runs for name, runs in groups.items() if all(split in run.counts for run in runs)}
    runs = {run.name: run.read(split) for row in rows.values() for run in row}
    first = rows[baseline][0].name
    for name, counts in runs.items():
        check_same_photos(runs[first], counts, (first, name))
    drawn = dict(zip(runs, resample(list(runs.values())), strict=True))
    spread = between_seeds([[drawn[name] for name in family if name in drawn] for family in families])
    resampled = {name: [drawn[run.name] for run in row] for name, row in rows.items()}
    found = {
        name: compare(row, resampled[baseline], others=spread) for name, row in resampled.items() if name != baseline
    }
    alone = [name for name, row in rows.items() if len(row) == 1 and spread is None]
    return Comparison(
        split=split,
        baseline=baseline,
        class_names=runs[first].class_names,
        class_photos=(runs[first].labelled > 0).sum(0).tolist(),
        whole={name: difference for name, (difference, _) in found.items()},
        by_class={name: classes for name, (_, classes) in found.items()},
        one_seed=set(found) if baseline in alone else set(alone),
        uncounted=uncounted,
    )


def explain(comparisons: list[Comparison]) -> str:
    """Say in words what the columns of the comparisons are."""
    baseline = table_text(comparisons[0].baseline)
    lines = [
        f"Differences are in mIoU from {baseline}, with 95 % intervals (docs/COMPARING.md); open: not decided, which "
        "is not equal. They are over the classes in the labels, the columns of mIoU also over classes that are only "
        "predicted, so that subtracting columns may not give them."
    ]
    for each in comparisons:
        if len(each.whole) > 1:
            count = f"{len(each.whole)} comparisons on {each.split}"
            lines.append(f"Better and worse are corrected for {count} (Holm); the intervals are not.")
        if each.uncounted:
            runs = ", ".join(map(table_text, each.uncounted))
            lines.append(f"On {each.split} rows are left out whose photos were not counted: {runs}; score them again.")
    if any(each.chosen_here and each.whole for each in comparisons):
        lines.append(
            "Optimistic: the epochs were chosen on val, which favours rows with more of them, or with noisier ones."
        )
    if any(each.one_seed for each in comparisons):
        lines.append(
            "(one seed): the word is about these very runs; another seed may change it. With several seeds of an "
            "experiment in the table it covers what a seed changes."
        )
    return "\n".join(lines)
