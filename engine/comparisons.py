"""Comparisons of experiments with a baseline, for a table: differences of mIoU, their intervals, and words for them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model import UserError
from model.comparison import Difference, check_same_photos, compare, read_counts, resample, verdicts
from utils import table_text

Runs = list[tuple[str, dict[str, Path]]]  # the runs of a row: a name, and the counts of its photos by split


@dataclass(frozen=True)
class Comparison:
    """How the rows of a table differ from its baseline on a split: by row, in mIoU, and in the IoU of each class."""

    split: str
    baseline: str
    class_names: list[str]
    whole: dict[str, Difference]
    by_class: dict[str, list[Difference | None]]

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
        return {
            f"{self.split}_difference": found and found.value,
            f"{self.split}_low": found and found.low,
            f"{self.split}_high": found and found.high,
            f"{self.split}_verdict": f"{verdict} (optimistic)" if found and self.chosen_here else verdict,
        }

    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Return by row the difference in mIoU and the ends of its interval."""
        return {name: (found.value, found.low, found.high) for name, found in self.whole.items()}

    def table(self) -> str:
        """Return a table with a row per class; the verdicts are for all classes of all rows at once."""
        found = {(name, place): each for name, row in self.by_class.items() for place, each in enumerate(row) if each}
        words = dict(zip(found, verdicts(list(found.values())), strict=True))

        def cell(name: str, place: int) -> str:
            if (each := found.get((name, place))) is None:
                return "-"
            return f"{each.value:+.4f} ({each.low:+.4f} to {each.high:+.4f}) {words[name, place]}"

        rows = [
            [table_text(class_name), *(cell(name, place) for name in self.by_class)]
            for place, class_name in enumerate(self.class_names)
        ]
        headers = [f"IoU on {self.split}", *map(table_text, self.by_class)]
        return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def compare_all(groups: dict[str, Runs], baseline: str) -> list[Comparison]:
    """Compare every row with the baseline, on each split on which that was scored photo by photo.

    Raises UserError if there is no such row or nothing to compare, or if photos differ between two runs.
    """
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: no such row; there are {', '.join(groups)}")
    splits = sorted({split for _, counts in groups[baseline] for split in counts})
    if not splits:
        raise UserError(
            f"--baseline {baseline}: its photos are not counted one by one; finished runs have that after "
            "`python evaluate.py --original_size`"
        )
    return [_compare_on(split, groups, baseline) for split in splits]


def _compare_on(split: str, groups: dict[str, Runs], baseline: str) -> Comparison:
    scored = {name: [(run, counts[split]) for run, counts in runs if split in counts] for name, runs in groups.items()}
    counts = {name: [read_counts(path) for _, path in runs] for name, runs in scored.items() if runs}
    first = counts[baseline][0]
    for name, each in counts.items():
        for (run, _), own in zip(scored[name], each, strict=True):
            check_same_photos(first, own, (scored[baseline][0][0], run))
    drawn = iter(resample([own for each in counts.values() for own in each]))
    resampled = {name: [next(drawn) for _ in each] for name, each in counts.items()}
    found = {name: compare(runs, resampled[baseline]) for name, runs in resampled.items() if name != baseline}
    whole = {name: difference for name, (difference, _) in found.items()}
    by_class = {name: classes for name, (_, classes) in found.items()}
    return Comparison(split, baseline, first.class_names, whole, by_class)


def explain(comparisons: list[Comparison], chosen_by: set[str]) -> str:
    """Say in words what the columns of the comparisons are."""
    number = max(len(comparison.whole) for comparison in comparisons)
    lines = [
        f"Differences are in mIoU from {comparisons[0].baseline}, over the classes in the labels, with 95 % intervals "
        "(docs/COMPARING.md)."
    ]
    if number > 1:
        lines.append(f"{number} comparisons at once: better and worse hold for all of them together (Holm).")
    if any(comparison.chosen_here and comparison.whole for comparison in comparisons):
        metrics = " or ".join(sorted(chosen_by))
        lines.append(f"The epochs were chosen on val, by {metrics}: what it says of differences is optimistic.")
    return "\n".join(lines)
