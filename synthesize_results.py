"""Gather every experiment under a folder into one table: results.md, results.csv and results.png there."""

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from engine.cli import add_folder, run_main
from engine.comparisons import Comparison, Run, compare_all, explain
from engine.folders import (
    RUN_LOCK,
    TRIAL_LOCKS,
    best_epoch,
    better_of,
    existing_outputs,
    recorded_data_dir,
    score,
    why_finished,
)
from model import UserError
from params import Params
from utils import is_locked, is_number, read_history, read_json, save_figure, table_text, walk, write_text
from visualize import learning_curves

ORIGINAL_SIZE = "metrics_", "_best_original_size.json"  # evaluate.py's files, the name of a split between the two
BY_REGION = ("boundary_accuracy", "interior_accuracy")  # in that of val
TASK = ("dataset", "num_classes", "image_size", "resize")  # what differs in one is scored on different pixels
KEYS = {key.name for key in fields(Params)}
PUBLISHABLE = ("mIoU", "pixel_accuracy", *BY_REGION)  # all of them from 0 to 1, higher is better


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_folder(parser, "--parent_dir", "experiments", "where to look")
    parser.add_argument("--sort", metavar="COLUMN", help="any column (default: the metric that chose the best epochs)")
    parser.add_argument(
        "--over_seeds", action="store_true", help="one row for runs that differ in their seed only: mean and deviation"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="a row: compare every other one with it in mIoU at the photos' own size, and say how sure that is",
    )
    parser.add_argument("--by_class", action="store_true", help="with --baseline, also in the IoU of each class")
    args = parser.parse_args()
    if args.by_class and not args.baseline:
        parser.error("--by_class goes with --baseline NAME")
    return args


@dataclass(frozen=True)
class Published:
    """The figures of published.json, to be compared with; none where there is no such file."""

    source: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)  # "params", and values of PUBLISHABLE

    @property
    def metrics(self) -> list[str]:
        """The metrics that some figure is of."""
        return [metric for metric in PUBLISHABLE if any(metric in result for result in self.results)]

    def of(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the published result of an experiment, {} if there is none."""
        return next((result for result in self.results if result["params"].items() <= params.items()), {})


@dataclass
class Result:
    """One experiment folder.

    state is "finished", "running", "pruned" (by a sweep), "failed" (neither finished nor running), "not started" or
    "unreadable".
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)  # every key of params.json; {} if unreadable
    history: list[dict] = field(default_factory=list)
    data_dir: str | None = None  # of the last start
    original_size: dict[str, float | None] = field(default_factory=dict)  # metrics at the photos' own size
    pixel_accuracy: dict[str, float] = field(default_factory=dict)  # of the same evaluations, by split
    counts: dict[str, Path] = field(default_factory=dict)
    state: str = "unreadable"
    problem: str = ""

    @property
    def best(self) -> dict[str, Any] | None:
        """The best epoch by this experiment's own metric, None before the first has ended."""
        return best_epoch(self.history, self.params["best_metric"]) if self.history else None

    def task(self, metric: str) -> str:
        """Return what is the same for experiments that a metric can rank among each other."""
        keys = TASK[:2] if metric.endswith(original_size_mIoU("")) else TASK
        return json.dumps([self.data_dir, *(self.params.get(key) for key in keys)])

    def scored(self) -> Run:
        """Return what a comparison needs."""
        task = [self.params.get(key) for key in TASK[:2]]
        return Run(self.name, task, self.pixel_accuracy, self.counts)

    def row(self, varying: list[str], metrics: list[str], published: Published) -> dict[str, Any]:
        """Return the columns of the table, None where there is nothing; metrics are those of the best epoch."""
        best = self.best or {"epoch": None, "val": {}}
        found = best["val"] | self.original_size
        values = {}
        for metric in metrics:
            values[metric] = found.get(metric)
            if metric in published.metrics:
                values[f"published_{metric}"] = published.of(self.params).get(metric)
        return {
            "name": self.name,
            **({"data_dir": self.data_dir} if "data_dir" in varying else {}),
            **{key: self.params.get(key) for key in varying if key != "data_dir"},
            **values,
            "best_epoch": best["epoch"],
            "epochs": len(self.history) or None,
            "minutes": sum(epoch["seconds"] for epoch in self.history) / 60 if self.history else None,
            "state": self.state,
        }


def read_published(path: Path) -> Published:
    """Read published figures, each with the hyperparameters that say which experiments it belongs to.

    {"source": "where from", "results": [{"params": {"kernel_size": 7}, "mIoU": 0.728}]}. Raises UserError naming every
    fault, also two results that an experiment could both match.
    """
    if not path.exists():
        return Published()
    content = read_json(path, if_absent="")
    if not isinstance(content, dict) or set(content) != {"source", "results"}:
        raise UserError(f'{path} must hold one object with "source" and "results"')
    source, results = content["source"], content["results"]
    if not isinstance(source, str) or not source.isprintable() or not source:
        raise UserError(f'{path}: "source" is {json.dumps(source)}; allowed: a line of text')
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise UserError(f'{path}: "results" must list objects, as {{"params": {{"kernel_size": 7}}, "mIoU": 0.728}}')
    if faults := [f"result {n}: {fault}" for n, result in enumerate(results, 1) for fault in result_faults(result)]:
        raise UserError(f"{path}: {'; '.join(faults)}")
    for (n, one), (m, other) in combinations(enumerate(results, 1), 2):
        shared = one["params"].keys() & other["params"].keys()
        if all(one["params"][key] == other["params"][key] for key in shared):
            raise UserError(f'{path}: results {n} and {m} can match the same trial; give "params" in which they differ')
    return Published(source, results)


def result_faults(result: dict[str, Any]) -> list[str]:
    """Say what is wrong with a published result."""
    params = result.get("params")
    if not isinstance(params, dict):
        return [f'"params" is {json.dumps(params)}; allowed: an object with keys of params.json']
    faults = [fault for key, value in params.items() if (fault := Params.fault(key, value))]
    figures = {key: value for key, value in result.items() if key != "params"}
    for key, value in figures.items():
        if key not in PUBLISHABLE:
            faults.append(f"unknown metric {json.dumps(key)}; known metrics: {', '.join(PUBLISHABLE)}")
        elif not (is_number(value) and 0 <= value <= 1):
            faults.append(f'"{key}" is {json.dumps(value)}; allowed: a number from 0 to 1')
    return faults if figures else [*faults, f"no figure; known metrics: {', '.join(PUBLISHABLE)}"]


def find(parent_dir: Path) -> list[Path]:
    """Return the experiment folders under parent_dir, or itself; a sweep's own folder is none."""
    if not parent_dir.is_dir():
        raise UserError(f"no folder {parent_dir}; give the folder of your experiments with --parent_dir")
    found = []
    for folder, subfolders, files in walk(parent_dir):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "search_space.json" not in files and ("params.json" in files or existing_outputs(folder)):
            found.append(folder)
    if not found:
        raise UserError(f"{parent_dir} holds no experiments, which are folders with a params.json")
    return found


def read(folder: Path, parent_dir: Path) -> Result:
    """Read an experiment folder; a damaged file makes it "unreadable", and is named as the problem."""
    name = folder.resolve().name if folder == parent_dir else str(folder.relative_to(parent_dir))
    result = Result(os.fsencode(name).decode(errors="replace"))
    try:
        params = Params.load(folder / "params.json")
        result.params = asdict(params)
        history = read_history(folder)
        check(history, folder)
        result.history = history
        result.data_dir = str(found) if (found := recorded_data_dir(folder)) else None
        read_original_size(folder, result)
        result.state, result.problem = state(folder, params, history)
    except (UserError, OSError) as error:
        result.problem = str(error)
    return result


def check(history: list[dict[str, Any]], folder: Path) -> None:
    """Raise UserError unless every epoch says how long it took."""
    for line, epoch in enumerate(history, 1):
        if not is_number(epoch.get("seconds")):
            raise UserError(f"{folder / 'history.jsonl'} is damaged in line {line}; mend or remove the line")


def read_original_size(folder: Path, result: Result) -> None:
    """Read what evaluate.py found for the best epoch at the photos' own size.

    That is mIoU by split, accuracies by region, and where the counts of every photo are.
    """
    for path in sorted(folder.glob("*".join(ORIGINAL_SIZE))):
        metrics = read_json(path, if_absent="")
        split = path.name.removeprefix(ORIGINAL_SIZE[0]).removesuffix(ORIGINAL_SIZE[1])
        names = {"mIoU": original_size_mIoU(split)} | {name: name for name in BY_REGION if split == "val"}
        keys = *names, "pixel_accuracy"
        numbers: list[Any] = [metrics.get(key) for key in keys] if isinstance(metrics, dict) else [""]
        if not all(value is None or is_number(value) for value in numbers):
            raise UserError(f"{path} is damaged; write it anew with evaluate.py, or remove it")
        if result.best and metrics.get("epoch") == result.best["epoch"]:
            *values, accuracy = numbers
            result.original_size |= dict(zip(names.values(), values, strict=True))
            file = path.with_name(path.name.replace("metrics_", "counts_", 1)).with_suffix(".npz")
            if accuracy is not None:
                result.pixel_accuracy[split] = accuracy
                result.counts |= {split: file} if file.exists() else {}


def original_size_mIoU(split: str) -> str:
    """Return the column of a split's mIoU at the photos' own size."""
    return f"{split}_original_size_mIoU"


def state(folder: Path, params: Params, history: list[dict]) -> tuple[str, str]:
    """Return the state of an experiment, and what is the matter with it, if anything."""
    if is_locked(folder / RUN_LOCK) or is_locked(folder.parent / TRIAL_LOCKS / folder.name):  # train.py's, a sweep's
        return "running", ""
    if why_finished(history, params):
        return "finished", ""
    if (folder / "trial.json").exists():
        trial = read_json(folder / "trial.json", if_absent="")
        if isinstance(trial, dict) and trial.get("state") in ("pruned", "failed"):
            reason = trial.get("reason")
            return trial["state"], "; ".join(map(str, reason)) if isinstance(reason, list) else ""
    if not existing_outputs(folder):
        return "not started", ""
    return "failed", f"ended after {len(history)} of {params.num_epochs} epochs"


def varying_keys(results: list[Result]) -> list[str]:
    """Return the hyperparameters in which the experiments differ, and data_dir first if they differ in that."""
    readable = [result.params for result in results if result.params]
    folders = {result.data_dir for result in results} - {None}
    keys = [key for key in (readable or [{}])[0] if any(params[key] != readable[0][key] for params in readable)]
    return ["data_dir"] * (len(folders) > 1) + keys


def metric_columns(results: list[Result], published: Published) -> list[str]:
    """Return the metrics of the table: those of the histories, those at the photos' own size, and those to compare."""
    trained = dict.fromkeys(key for result in results for epoch in result.history for key in epoch["val"])
    found = {key for result in results for key in result.original_size if key not in BY_REGION}
    looked_at = sorted(found, key=lambda column: column.removesuffix(original_size_mIoU("")))
    others = sorted(trained, key=lambda metric: metric == "loss")
    return list(dict.fromkeys(("mIoU", *looked_at, *others, *published.metrics)))


def by_seed(results: list[Result], parent_dir: Path) -> dict[str, list[Result]]:
    """Return experiments that differ in nothing but their seed, under the name that they have without it."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps([result.params | {"seed": None}, result.data_dir], sort_keys=True)
        key = key if result.params else result.name
        alike.setdefault(key, []).append(result)
    groups, short = list(alike.values()), []
    for group in groups:
        names = {without_seed(run.name) or parent_dir.resolve().name for run in group}
        short.append(names.pop() if len(names) == 1 and group[0].params else group[0].name)
    taken = Counter([*short, *(result.name for result in results)])
    for index, group in enumerate(groups):
        if taken[short[index]] > 1 + (short[index] in [run.name for run in group]):
            short[index] = group[0].name
    return dict(zip(short, groups, strict=True))


def without_seed(name: str) -> str:
    """Return batch_size_8 for a trial called batch_size_8__seed_1, "" for one called seed_1."""
    parts = [re.sub(r"(?:^|__)seed_\d+(?=__|$)", "", part).removeprefix("__") for part in name.split("/")]
    return "/".join(filter(None, parts))


def merge(name: str, rows: list[dict[str, Any]], varying: list[str]) -> dict[str, Any]:
    """Merge rows of several seeds: means over those that have finished, and the standard deviation of every mIoU."""
    finished = [row for row in rows if row["state"] == "finished"]
    merged: dict[str, Any] = {}
    for column, value in rows[0].items():
        if column == "name":
            merged[column] = name
        elif column == "seed":
            merged["seeds"] = " ".join(str(row[column]) for row in finished) or None
        elif column == "state":
            counts = Counter(row[column] for row in rows)
            merged[column] = ", ".join(f"{count} {state}" for state, count in counts.items())
        elif column in varying or column.startswith("published"):
            merged[column] = value
        else:
            values = [row[column] for row in finished]
            known = bool(values) and None not in values  # a mean over some of them would pass for one over all
            merged[column] = mean(values) if known else None
            if column.endswith("mIoU"):
                merged[f"{column}_std"] = stdev(values) if known and len(values) > 1 else None
    return merged


def sort(rows: list[dict[str, Any]], column: str, tasks: dict[str, str], metrics: list[str]) -> list[dict[str, Any]]:
    """Return the rows in the order of a column, those without a value last. Raises UserError for no column.

    A metric has its best value first, among rows of one task, as tasks has it by name; any other column rises.
    """
    if column not in rows[0]:
        raise UserError(f"--sort {column}: no such column; there are {', '.join(rows[0])}")
    known: list[dict[str, Any]] = []
    unknown: list[dict[str, Any]] = []
    for row in rows:
        (unknown if row[column] is None else known).append(row)
    numeric = all(type(row[column]) in (int, float) for row in known)
    metric = column.removeprefix("published_")
    descending = metric in metrics and better_of(metric) is max
    known.sort(key=lambda row: row[column] if numeric else spell(row[column]), reverse=descending)
    if metric in metrics:
        known.sort(key=lambda row: tasks[row["name"]])
    return known + unknown


def spell(value: Any) -> str:
    """Return a value as params.json has it, strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table as people read it, on a terminal or rendered."""
    cells = [[cell(column, value) for column, value in row.items()] for row in rows]
    numeric = [any(type(row[key]) in (int, float) for row in rows) for key in rows[0]]
    alignment = ["right" if right else "left" for right in numeric]
    headers = [table_text(column) for column in rows[0]]
    return tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def cell(column: str, value: Any) -> str:
    """Return a value as the table on the terminal has it: metrics to four decimals, others to six digits."""
    if value is None:
        return "-"
    if column in ("best_epoch", "epochs", "minutes") and type(value) is float:
        return f"{value:.1f}"
    if column in KEYS and type(value) is float:
        return f"{value:.6g}"
    if type(value) in (int, float) and column not in (*KEYS, "best_epoch", "epochs"):
        return f"{value:.4f}"
    return table_text(spell(value))


def comma_separated(rows: list[dict[str, Any]]) -> str:
    """Return the table for programs: all digits, empty cells where there is nothing."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else spell(value) for value in row.values()] for row in rows)
    return stream.getvalue()


def draw(
    names: list[str],
    groups: dict[str, list[Result]],
    varying: list[str],
    metric: str,
    published: Published,
    *,
    by_name: bool,
    comparisons: Sequence[Comparison] = (),
) -> Figure | None:
    """Return the curves of a metric and its best values, names in their order; None where no run has any."""
    begun = {name: [run for run in groups[name] if any(has(epoch, metric) for epoch in run.history)] for name in names}
    counted = {name: [run for run in runs if run.state == "finished"] for name, runs in begun.items()}
    drawn = {name: counted[name] or runs for name, runs in begun.items() if runs}
    if not drawn:
        return None
    compared = {name: published.of(runs[0].params).get("mIoU") for name, runs in drawn.items() if metric == "mIoU"}
    keys = [key for key in varying if key != "data_dir"]
    return learning_curves(
        {name: [[score(epoch, metric) for epoch in run.history] for run in runs] for name, runs in drawn.items()},
        None if by_name else {key: {name: runs[0].params[key] for name, runs in drawn.items()} for key in keys},
        {name: mIoU for name, mIoU in compared.items() if mIoU is not None},
        metric=metric,
        better=better_of(metric),
        differences={
            f"mIoU on {each.split} minus {table_text(each.baseline)}'s{' (optimistic)' * each.chosen_here}": {
                name: (found.value, found.low, found.high, each.verdicts[name] != "open")
                for name, found in each.whole.items()
            }
            for each in comparisons
        },
    )


def has(epoch: dict[str, Any], metric: str) -> bool:
    """Return whether a metric is defined after an epoch."""
    return epoch["val"].get(metric) is not None


def main(args: argparse.Namespace) -> None:
    folders, published = find(args.parent_dir), read_published(args.parent_dir / "published.json")
    results = [read(folder, args.parent_dir) for folder in folders]
    varying, metrics = varying_keys(results), metric_columns(results, published)
    chosen_by = {result.params["best_metric"] for result in results if result.history}
    column = args.sort or (min(chosen_by) if len(chosen_by) == 1 else "mIoU")
    alike = by_seed(results, args.parent_dir)
    if args.over_seeds:
        varying = [key for key in varying if key != "seed"]
        groups = alike
        rows = [
            merge(name, [result.row(["seed", *varying], metrics, published) for result in group], varying)
            for name, group in groups.items()
        ]
    else:
        groups = {result.name: [result] for result in results}
        rows = [result.row(varying, metrics, published) for result in results]
    comparisons: list[Comparison] = []
    if args.baseline:
        finished = {name: [run.scored() for run in group if run.state == "finished"] for name, group in groups.items()}
        families = [
            [run.name for run in group]
            for group in alike.values()
            if len({run.params.get("seed") for run in group}) == len(group)  # or they differ in more than the seed
        ]
        comparisons = compare_all(finished, args.baseline, families)
    for row in rows:
        for comparison in comparisons:
            row |= comparison.columns(row["name"])
    tasks = {name: group[0].task(column) for name, group in groups.items()}
    rows = sort(rows, column, tasks, metrics)
    table = markdown(rows)
    scored = {tasks[row["name"]] for row in rows if row[column] is not None}
    if column in metrics and len(scored) > 1:
        table += "\n\nRows of another data_dir, num_classes, image_size or resize are not ranked among each other."
    if chosen_by:
        table += (
            f"\n\nEach run's best epoch was chosen on val, by {' or '.join(sorted(chosen_by))}. Columns that name no "
            "split are of val, at the size that the network reads."
        )
        if args.over_seeds:
            table += " A row has the means over its seeds, and in _std the standard deviation of a run."
    if comparisons:
        table += f"\n\n{explain(comparisons)}"
    if args.by_class:
        names = [row["name"] for row in rows]
        table += "".join(f"\n\n{comparison.table(names)}" for comparison in comparisons)
    if published.results:
        table += f"\n\nPublished: {published.source}"
    write_text(args.parent_dir / "results.md", table + "\n")
    write_text(args.parent_dir / "results.csv", comma_separated(rows))
    by_epoch = column if any(has(epoch, column) for result in results for epoch in result.history) else "mIoU"
    names = [row["name"] for row in rows]
    if figure := draw(names, groups, varying, by_epoch, published, by_name=args.over_seeds, comparisons=comparisons):
        save_figure(figure, args.parent_dir / "results.png", dpi=120)
    print(table)
    for result in results:
        if result.problem:
            print(f"{result.name}: {result.state}, {result.problem}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
