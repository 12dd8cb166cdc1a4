"""Gather every experiment under a folder into one table: results.md, results.csv and results.png there."""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import comparing
from comparing import FEW, Counts, Difference
from engine.checkpoints import differences
from engine.cli import add_folder, run_main
from engine.run import existing, is_running, records
from engine.training import best_epoch, better_of, score, why_finished
from model import UserError
from model.metrics import AT_ORIGINAL_SIZE, BETTER, METRICS
from params import WITHOUT_EFFECT, Params, comparable_over
from utils import is_number, read_history, read_json, save_figure, table_text, walk, write_text
from visualize import spelling

BEST = "best_original_size"  # in the names of evaluate.py's files: the best weights at the photos' own size
OWN_SIZE = "_original_size_mIoU"  # ends the column of a split's mIoU at the photos' own size
BOUNDARY = [name for name in METRICS if name in BETTER and name in AT_ORIGINAL_SIZE]  # at that size, on val
PUBLISHABLE = ("mIoU", "pixel_accuracy", *BOUNDARY)
DATA = ("dataset", "num_classes")  # what differs in one has other photos or labels
DIFFERENCE = ("difference", "low", "high", "verdict")  # columns of a comparison, after the name of a split
COUNTED = ("best_epoch", "epochs", "minutes")
KEYS = [key.name for key in fields(Params)]
SIGNS = {"params.json", "history.jsonl", "last.pth.tar", "best.pth.tar"}  # one of them makes a folder an experiment
Tables = tuple[pd.DataFrame, pd.DataFrame]  # a comparison on a split: by row, and by class
NOTE = """Metrics are of each run's best epoch, on val at the size that the network reads where no split is named.
mIoU is the mean over the classes in the labels. Metrics rank only rows of the same data_dir, num_classes, image_size
and resize, loss only those of the same loss.
"""
SEEDS_NOTE = "A row has the means over its finished seeds, and in _std the standard deviation of a run.\n"
DIFFERENCES_NOTE = """
Differences are in mIoU, with 95 % intervals (docs/COMPARING.md). Open: not decided, which is not equal. Optimistic:
val chose the epochs, which favours rows with more of them, or with noisier ones. One seed: another seed may change the
word. The words of a split are corrected for their number (Holm), the intervals are not.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_folder(parser, "--parent_dir", "experiments", "where to look")
    parser.add_argument("--sort", metavar="COLUMN", help="any column (default: the metric that chose the best epochs)")
    parser.add_argument("--over_seeds", action="store_true", help="one row for runs that differ in their seed only")
    parser.add_argument("--baseline", metavar="NAME", help="a row: how the others differ in mIoU, and how sure that is")
    parser.add_argument("--by_class", action="store_true", help="with --baseline, also in the IoU of each class")
    args = parser.parse_args()
    if args.by_class and not args.baseline:
        parser.error("--by_class goes with --baseline NAME")
    return args


@dataclass
class Run:
    """One experiment folder."""

    folder: Path
    name: str
    params: dict[str, Any] = field(default_factory=dict)  # every key of params.json; {} if unreadable
    history: list[dict] = field(default_factory=list)
    data_dir: str | None = None  # of the last start
    init_from: str | None = None  # the file of weights that it began from
    origin: str | None = None  # of these weights
    own_size: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split, the metrics at the photos' own size
    validation: dict[str, Any] = field(default_factory=dict)  # the metrics of the best epoch, as train.py wrote them
    state: str = "unreadable"  # or finished, running, pruned (by a sweep), not started, failed (none of these)
    problem: str = ""

    @property
    def best(self) -> dict[str, Any]:
        """The best epoch by this experiment's own metric; before the first has ended, one without metrics."""
        return best_epoch(self.history, self.params["best_metric"]) if self.history else {"epoch": None, "val": {}}

    def row(self) -> dict[str, Any]:
        """Return all columns of the table; metrics are of the best epoch, on val where no split is named."""
        row = {"name": self.name, "data_dir": self.data_dir, "init_from": self.init_from, **self.params}
        row |= {"mIoU": None, **self.best["val"]}
        for split, metrics in self.own_size.items():
            row[split + OWN_SIZE] = metrics.get("mIoU")
        row |= {key: value for key, value in self.own_size.get("val", {}).items() if key in BOUNDARY}
        minutes = sum(epoch["seconds"] for epoch in self.history) / 60
        counted = (self.best["epoch"], len(self.history), minutes) if self.history else (None, None, None)
        return row | dict(zip(COUNTED, counted, strict=True)) | {"state": self.state}

    def labels(self, metric: str) -> list[Any]:
        """Return what tells the photos and masks that a metric is of from others; the folder if not the run's own."""
        scores = self.own_size.get(metric.removesuffix(OWN_SIZE), self.validation)
        return [scores.get(key) for key in ("data_dir", "images", "frequency")]

    def task(self, metric: str) -> str:
        """Return what is the same for experiments that a metric can rank among each other."""
        keys = DATA if metric.endswith((OWN_SIZE, "_difference")) else comparable_over(metric)
        return json.dumps([self.data_dir, self.labels(metric), *map(self.params.get, keys)], sort_keys=True)

    def curve(self, metric: str) -> list[float]:
        """Return a metric by epoch, [] where it is defined after none."""
        values = [score(epoch, metric) for epoch in self.history]
        return values if any(map(math.isfinite, values)) else []

    def add_problem(self, *problems: str) -> None:
        self.problem = "; ".join(filter(None, (self.problem, *problems)))

    def counts_file(self, split: str) -> Path:
        return self.folder / f"counts_{split}_{BEST}.npz"

    def has_counts(self, split: str) -> bool:
        return split in self.own_size and self.counts_file(split).exists()

    def read_counts(self, split: str) -> Counts:
        """Read the counts of every photo. Raises UserError unless they are of the same evaluation as the metrics."""
        path, metrics = self.counts_file(split), self.own_size.get(split, {})
        if not (counts := comparing.read_counts(path)).are_of(metrics.get("pixel_accuracy")):
            raise UserError(f"{path} is of another evaluation than the metrics; run evaluate.py again")
        return counts


def find(parent_dir: Path) -> list[Path]:
    """Return the experiment folders under parent_dir, or itself; a sweep's own folder is none."""
    if not parent_dir.is_dir():
        raise UserError(f"no folder {parent_dir}; give the folder of your experiments with --parent_dir")
    found = []
    for folder, subfolders, files in walk(parent_dir):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "search_space.json" not in files and not SIGNS.isdisjoint(files):
            found.append(folder)
    if not found:
        raise UserError(f"{parent_dir} holds no experiments, which are folders with a params.json")
    return found


def read(folder: Path, parent_dir: Path) -> Run:
    """Read an experiment folder; a damaged file makes it "unreadable", and is named as the problem."""
    name = folder.resolve().name if folder == parent_dir else str(folder.relative_to(parent_dir))
    run = Run(folder, os.fsencode(name).decode(errors="replace"))
    try:
        history, starts = read_history(folder), records(folder)
        params, changes = trained_with(folder, starts[-1] if history else {})
        run.params, run.history = asdict(params), history
        run.data_dir, (run.init_from, run.origin) = starts[-1].get("data_dir"), began_from(starts[0])
        best = folder / "metrics_val_best_weights.json"
        run.validation = read_json(best, if_absent="") if best.exists() else {}
        run.own_size, others = read_own_size(folder, {"epoch": run.best["epoch"]} | run.validation)
        run.state, run.problem = state(folder, params, run.history)
        run.add_problem(changes, others)
    except (UserError, OSError) as error:
        run.problem = str(error)
    except (AttributeError, KeyError, TypeError) as error:  # JSON of another shape
        run.problem = f"a file there is damaged ({error!r})"
    return run


def name_other_labels(runs: list[Run]) -> None:
    """Note which runs were validated on other photos or masks of a folder than the first one there."""
    first: dict[tuple, Run] = {}
    for run in (run for run in runs if run.validation):
        other = first.setdefault((run.data_dir, *map(run.params.get, comparable_over("mIoU"))), run)
        if other.labels("mIoU") != run.labels("mIoU"):
            run.add_problem(f"val had other photos or masks than for {other.name}: not comparable")


def began_from(record: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the file of --init_from and the origin() of its weights, for which older programs kept the file alone."""
    words = [part for word in record.get("argv", []) for part in word.split("=", 1)]
    file = next((after for flag, after in pairwise(words) if flag == "--init_from"), None)
    return file, record.get("init_from", file)


def trained_with(folder: Path, record: dict[str, Any]) -> tuple[Params, str]:
    """Return the params that a start of a run was given, and which keys of params.json have been changed since."""
    now = Params.load(folder / "params.json", record.get("set"))
    if "params" not in record:
        return now, ""
    trained = Params.parse(record["params"] | {"precision": now.precision}, folder / "run.json")
    keys = ", ".join(key for key in differences(trained, now) if key not in WITHOUT_EFFECT)
    return trained, keys and f"params.json has been changed since, and the table does not show it: {keys}"


def read_own_size(folder: Path, best: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
    """Return by split the metrics at the photos' own size, and which are left out, as of other weights than the best.

    A digest tells weights apart; of a run of an older program, which kept none, the epoch.
    """
    mark, found, others = "weights" if "weights" in best else "epoch", {}, []
    for path in sorted(folder.glob(f"metrics_*_{BEST}.json")):
        metrics = read_json(path, if_absent="")
        if metrics.get(mark) == best[mark]:
            found[path.name.removeprefix("metrics_").removesuffix(f"_{BEST}.json")] = metrics
        elif best["epoch"] is not None:
            others.append(path.name)
    names = ", ".join(others)
    return found, names and f"{names}: not of the weights of the best epoch; score again with evaluate.py"


def state(folder: Path, params: Params, history: list[dict]) -> tuple[str, str]:
    """Return the state of an experiment, and what is the matter with it, if anything."""
    if is_running(folder):
        return "running", ""
    if why_finished(history, params):
        return "finished", ""
    if (folder / "trial.json").exists():
        trial = read_json(folder / "trial.json", if_absent="")
        if trial["state"] in ("pruned", "failed"):
            return trial["state"], "; ".join(trial.get("reason", []))
    if not existing(folder):
        return "not started", ""
    return "failed", f"ended after {len(history)} of {params.num_epochs} epochs"


def read_published(path: Path) -> dict[str, Any]:
    """Read published figures, each with the hyperparameters that say which experiments it belongs to.

    {"source": "where from", "results": [{"params": {"kernel_size": 7}, "mIoU": 0.728}]}; no results where there is no
    file. Raises UserError for what is no figure.
    """
    if not path.exists():
        return {"source": "", "results": []}
    content = read_json(path, if_absent="")
    if not isinstance(content, dict) or content.keys() != {"source", "results"}:
        raise UserError(f'{path} must hold one object with "source" and "results"')
    for result in content["results"]:
        if not isinstance(result, dict) or not isinstance(result.get("params"), dict):
            raise UserError(f'{path}: {json.dumps(result)}; allowed: an object with "params" and figures')
        Params.parse(result["params"], path)
        for key, value in result.items():
            if key != "params" and not (key in PUBLISHABLE and is_number(value) and 0 <= value <= 1):
                raise UserError(f'{path}: "{key}": {value}; allowed: from 0 to 1 {", ".join(PUBLISHABLE)}')
    return content


def published_columns(published: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Return the published figures of an experiment as columns of the table."""
    found = [result for result in published["results"] if result["params"].items() <= params.items()]
    return {f"published_{key}": value for result in found for key, value in result.items() if key != "params"}


def tabulate_runs(runs: list[Run], published: dict[str, Any]) -> pd.DataFrame:
    """Return a row for every run: name, the hyperparameters that vary, metrics, epochs, minutes and state."""
    table = pd.DataFrame([run.row() | published_columns(published, run.params) for run in runs], dtype=object)
    readable = [run for run in runs if run.params]
    vary = ["data_dir"] if len({run.data_dir for run in readable} - {None}) > 1 else []
    vary += ["init_from"] if len({run.origin for run in readable}) > 1 else []
    vary += [key for key in KEYS if key not in WITHOUT_EFFECT and len({spell(run.params[key]) for run in readable}) > 1]
    return table[["name", *vary, *sorted(filter(is_metric, table), key=metric_order), *COUNTED, "state"]]


def is_metric(column: str) -> bool:
    """Return whether a column of the table has a metric, so that its best value comes first."""
    others = ("name", "data_dir", "init_from", *KEYS, "seeds", *COUNTED, "state")
    return column not in others and "_verdict" not in column


def metric_order(column: str) -> tuple:
    """Return what sorts metrics: mIoU first, those at the photos' own size, loss last; the published one after ours."""
    ours = column.removeprefix("published_")
    return ours == "loss", ours != "mIoU", not ours.endswith(OWN_SIZE), ours, column != ours


def by_seed(runs: list[Run], parent_dir: Path) -> dict[str, list[Run]]:
    """Return the runs that differ in nothing but their seed, under the name that they have without it.

    Where several groups would have the same name, each has that of its first run.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        params = run.params | dict.fromkeys(("seed", *WITHOUT_EFFECT))
        alike = json.dumps([params, run.data_dir, run.origin], sort_keys=True)
        groups.setdefault(alike if run.params else run.name, []).append(run)
    first = [group[0] for group in groups.values()]
    short = [(run.params and without_seed(run.name, parent_dir.resolve().name)) or run.name for run in first]
    names = [name if short.count(name) == 1 else run.name for name, run in zip(short, first, strict=True)]
    return dict(zip(names, groups.values(), strict=True))


def one_per_seed(group: list[Run]) -> list[Run]:
    """Return the first run of each seed, a finished one if there is one: a copy is no other seed."""
    by_rank = sorted(group, key=lambda run: run.state != "finished")
    return [*{run.params.get("seed"): run for run in reversed(by_rank)}.values()]


def without_seed(name: str, parent: str) -> str:
    """Return batch_size_8 for a trial called batch_size_8__seed_1, and the folder's name for one called seed_1."""
    parts = [re.sub(r"(?:^|__)seed_\d+(?=__|$)", "", part).removeprefix("__") for part in name.split("/")]
    return "/".join(filter(None, parts)) or parent


def over_seeds(table: pd.DataFrame, groups: dict[str, list[Run]]) -> pd.DataFrame:
    """Return a row for every group of runs: means over those that have finished, and the deviation of every mIoU.

    A mean is empty where a run has no value: it would pass for one over all.
    """
    names = table["name"].map({run.name: name for name, runs in groups.items() for run in runs})
    done = table["state"] == "finished"
    seeds = table["name"].map({run.name: str(run.params.get("seed")) for runs in groups.values() for run in runs})
    merged = table.drop(columns=["name", "seed"], errors="ignore").groupby(names, sort=False).first()
    measured = [key for key in merged if key in COUNTED or (is_metric(key) and not key.startswith("published_"))]
    values = table.loc[done, measured].apply(pd.to_numeric).groupby(names[done])
    merged[measured] = values.mean(skipna=False)
    for column in [column for column in measured if column.endswith("mIoU")]:
        merged.insert(merged.columns.get_loc(column) + 1, f"{column}_std", values[column].std(skipna=False))
    counts = table["state"].groupby(names).agg(Counter)
    merged["state"] = counts.map(lambda count: ", ".join(f"{number} {state}" for state, number in count.items()))
    merged.insert(0, "seeds", seeds[done].groupby(names[done]).agg(" ".join))
    return merged.reset_index()


def sort(table: pd.DataFrame, column: str, tasks: list[str]) -> pd.DataFrame:
    """Return the rows in the order of a column, those without a value last. Raises UserError for no column.

    A metric has its best value first, among rows of one task; any other column rises.
    """
    if column not in table:
        raise UserError(f"--sort {column}: no such column; there are {', '.join(table.columns)}")
    values, metric = table[column], is_metric(column)
    keys = pd.DataFrame({"missing": values.isna(), "task": tasks if metric else ""})
    keys["value"] = pd.to_numeric(values) if all(map(is_number, values.dropna())) else values.map(spell)
    rises = not metric or better_of(column.removeprefix("published_")) is min
    return table.loc[keys.sort_values([*keys], ascending=[True, True, rises]).index]


def spell(value: Any) -> str:
    """Return a value as params.json has it, strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def cell(column: str, value: Any) -> str:
    """Return a value as the table on the terminal has it: metrics to four decimals, others to six digits."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return format(value, ".6g" if column in KEYS else ".1f" if column in COUNTED else ".4f")
    return table_text(spell(value))


def markdown(table: pd.DataFrame) -> str:
    """Return a table as people read it, on a terminal or rendered."""
    sides = ["right" if any(map(is_number, table[column])) else "left" for column in table]
    text = pd.DataFrame({table_text(column): [cell(column, value) for value in table[column]] for column in table})
    return text.to_markdown(index=False, disable_numparse=True, colalign=sides)


def compare(rows: dict[str, list[Run]], baseline: str, families: list[list[Run]]) -> list[Tables]:
    """Compare the rows with the baseline, on each split on which all its finished runs were scored photo by photo.

    families has the runs that differ in their seed only. Raises UserError if there is no such row or nothing to
    compare, or if photos differ between two runs.
    """
    if baseline not in rows:
        raise UserError(f"--baseline {baseline}: the table has no row of that name")
    finished = {name: [run for run in runs if run.state == "finished"] for name, runs in rows.items()}
    data = {name: [runs[0].params[key] for key in DATA] for name, runs in finished.items() if runs}
    found = []
    for split in sorted({split for run in finished[baseline] for split in run.own_size}):
        scored = [name for name in data if all(run.has_counts(split) for run in finished[name])]
        if baseline in scored:
            alike = {name: finished[name] for name in scored if data[name] == data[baseline]}
            found.append(compare_on(split, alike, baseline, families))
    if not found:
        remedy = "score each of them with evaluate.py --original_size"
        raise UserError(f"--baseline {baseline}: it needs finished runs with counts of their photos; {remedy}")
    return found


def compare_on(split: str, rows: dict[str, list[Run]], baseline: str, families: list[list[Run]]) -> Tables:
    """Return how the rows differ from the baseline on a split: a line for each in mIoU, one for each class in IoU."""
    counts = {run.name: run.read_counts(split) for runs in rows.values() for run in runs}
    first = rows[baseline][0].name
    for name in counts:
        comparing.check_same_photos(counts[first], counts[name], (first, name))
    drawn = dict(zip(counts, comparing.resample([*counts.values()]), strict=True))
    spread = comparing.between_seeds([[drawn[run.name] for run in runs if run.name in drawn] for runs in families])
    sides = {name: [drawn[run.name] for run in runs] for name, runs in rows.items()}
    ours, photos = sides.pop(baseline), (counts[first].labelled > 0).sum(0)
    found = {name: comparing.difference(side, ours, others=spread) for name, side in sides.items()}
    few = len(counts[first].ids) < FEW
    words = comparing.verdicts({name: whole for name, (whole, _) in found.items() if not few})
    lines: dict[str, list] = {baseline: [None, None, None, "baseline"]}
    for name, (whole, _) in found.items():
        one_seed = spread is None and 1 in (len(sides[name]), len(ours))
        doubts = ", ".join(["optimistic"] * (split == "val") + ["one seed"] * one_seed)
        word = words.get(name, "few photos")
        marked = f"{word} ({doubts})" if doubts and word in ("better", "worse") else word
        lines[name] = [whole.value, None, None, word] if few else [*whole[:3], marked]
    columns = [f"{split}_{column}" for column in DIFFERENCE]
    by_class = {f"IoU on {split}": counts[first].class_names, "photos": photos.tolist()}
    by_class |= {name: class_words(classes, photos) for name, (_, classes) in found.items()}
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns), pd.DataFrame(by_class)


def class_words(classes: Sequence[Difference | None], photos: Sequence[int]) -> list[str]:
    """Say how a row differs in the IoU of each class, and how sure that is, of all classes together."""
    known = {place: found for place, found in enumerate(classes) if found}
    words = comparing.verdicts({place: found for place, found in known.items() if photos[place] >= FEW})
    return [
        f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) {words.get(place, 'few photos')}" if found else "-"
        for place, found in enumerate(classes)
    ]


def results_figure(curves: Mapping[str, Sequence[Sequence[float]]], *, metric: str, better: Callable) -> Figure:
    """Return a validation metric by epoch, and beside it the best value of every run.

    Args:
        curves: by name, the first on top, the metric of each epoch in each of the runs that differ in their seed only.
            The line is their mean.
        metric: what it is called.
        better: max or min, which chooses the better of two values.
    """
    figure = Figure(figsize=(11, 4 + 0.15 * len(curves)), layout="constrained")
    by_epoch, by_name = figure.subplots(1, 2)
    for row, (name, runs) in enumerate(curves.items()):
        colour = f"C{row % 10}"
        mean = [np.mean([value for value in epoch if value is not None]) for epoch in zip_longest(*runs)]
        options: dict[str, Any] = {"label": spelling(name), "zorder": 3 - row / len(curves)}  # the first on top
        by_epoch.plot(range(1, len(mean) + 1), mean, ".-", color=colour, **options)
        by_name.plot([better(run) for run in runs], [row] * len(runs), "o", color=colour)
    by_epoch.set(xlabel="epoch", ylabel=f"validation {metric}")
    by_epoch.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    by_name.set_yticks(range(len(curves)), [spelling(name) for name in curves], fontsize="small")
    by_name.set(xlabel=f"best validation {metric}", ylim=(len(curves) - 0.5, -0.5))
    handles, names = by_epoch.get_legend_handles_labels()
    figure.legend(handles[:10], names[:10], loc="outside lower center", ncols=3, fontsize="small")
    return figure


def main(args: argparse.Namespace) -> None:
    folders, published = find(args.parent_dir), read_published(args.parent_dir / "published.json")
    runs = [read(folder, args.parent_dir) for folder in folders]
    name_other_labels(runs)
    rows, table = {run.name: [run] for run in runs}, tabulate_runs(runs, published)
    groups = by_seed(runs, args.parent_dir)
    families = {name: one_per_seed(group) for name, group in groups.items()}
    if args.over_seeds:
        rows, table = families, over_seeds(table, families)
        for name, run in ((name, run) for name, group in groups.items() for run in group if run not in families[name]):
            run.add_problem(f"not counted, for {name} has another run of its seed")
    comparisons = []
    if args.baseline:
        comparisons = compare(rows, args.baseline, [*families.values()])
    for columns, _ in comparisons:
        table = table.join(columns, on="name")
    chosen_by = {run.params["best_metric"] for run in runs if run.history}
    column = args.sort or (chosen_by.pop() if len(chosen_by) == 1 else "mIoU")
    table = sort(table, column, [rows[name][0].task(column) for name in table["name"]])
    note = NOTE + SEEDS_NOTE * args.over_seeds + DIFFERENCES_NOTE * bool(args.baseline)
    paragraphs = [markdown(table), note.strip()]
    if args.by_class:
        paragraphs += [markdown(by_class) for _, by_class in comparisons]
    if published["results"]:
        paragraphs.append(f"Published: {published['source']}")
    text = "\n\n".join(paragraphs)
    write_text(args.parent_dir / "results.md", text + "\n")
    csv = table.map(lambda value: spell(value) if isinstance(value, dict | bool) else value)
    write_text(args.parent_dir / "results.csv", csv.to_csv(index=False))
    metric = column if any(run.curve(column) for run in runs) else "mIoU"
    counted = {name: [run for run in rows[name] if run.state == "finished"] or rows[name] for name in table["name"]}
    curves = {name: [curve for run in runs if (curve := run.curve(metric))] for name, runs in counted.items()}
    if curves := {name: found for name, found in curves.items() if found}:
        figure = results_figure(curves, metric=metric, better=better_of(metric))
        save_figure(figure, args.parent_dir / "results.png", dpi=120)
    print(text)
    for run in runs:
        if run.problem:
            print(f"{run.name}: {run.state}, {run.problem}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
