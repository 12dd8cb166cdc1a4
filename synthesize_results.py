"""Gather experiments into tables: results.md, .csv, .tex, .png and .html. How sure differences are: --baseline."""

import argparse
import json
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

import comparing
import results_page as page
from comparing import FEW, Counts, Difference
from engine.cli import run_main
from engine.results import Run, by_data, find, name_other_labels, read, without_seed
from engine.training import better_of
from model import UserError
from model.metrics import AT_ORIGINAL_SIZE, BETTER, METRICS
from params import WITHOUT_EFFECT, Params, comparable_over
from utils import is_number, make_folder, read_json, save_figure, table_text, write_text

OWN_SIZE = "_original_size_mIoU"  # ends the column of a split's mIoU at the photos' own size
BOUNDARY = [name for name in METRICS if name in BETTER and name in AT_ORIGINAL_SIZE]  # at that size, on val
PUBLISHABLE = ("mIoU", "pixel_accuracy", *BOUNDARY)
COUNTED = ("best_epoch", "epochs", "minutes")
KEYS = [key.name for key in fields(Params)]
WIDTH = 120  # characters of a table on the terminal
NOTE = """Metrics are of each run's best epoch, on val at the size that the network reads, or at own size, that of the
photos. mIoU is the mean over the classes in the labels. At the network's size metrics rank only rows of the same
image_size and resize, loss only those of the same loss."""
SEEDS_NOTE = "A row has the means over its finished seeds, with the standard deviation of a run."
DIFFERENCES_NOTE = """Differences are in mIoU where no metric is named, with 95 % intervals (docs/COMPARING.md). Open:
not decided, which is not equal. Optimistic: val chose the epochs, which favours rows with more of them, or with noisier
ones. One seed: another seed may change the word. Few: of fewer than ten photos, or groups, nothing is said. The words
of a split are corrected for their number (Holm), the intervals are not."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of experiments or sweeps")
    default = Path("experiments")
    parser.add_argument("--parent_dir", type=Path, help=f"all below it, in the place of RUN (default: {default})")
    where = "folder of the results (default: --parent_dir, or results where RUN is given)"
    parser.add_argument("--output_dir", type=Path, help=where)
    parser.add_argument("--all", action="store_true", help="also what has not begun")
    parser.add_argument("--sort", metavar="COLUMN", help="any column (default: the metric that chose the best epochs)")
    parser.add_argument(
        "--over_seeds", action="store_true", help="one row for runs that differ in their seed only, also by name"
    )
    parser.add_argument("--baseline", metavar="NAME", help="a row: how the others differ, and how sure that is")
    in_what = "with --baseline, in what (default: mIoU)"
    parser.add_argument("--metric", nargs="+", choices=comparing.METRICS, help=in_what)
    of_groups = (
        "with --baseline, photos whose names this captures alike, frames of a video say, are drawn together (default: "
        "what the data's group.txt said when they were scored; '.*': each photo alone)"
    )
    parser.add_argument("--group", metavar="REGEX", help=of_groups)
    photos = "show photos of a split in results.html: worst, median, best and random"
    parser.add_argument("--gallery", metavar="SPLIT", help=photos)
    parser.add_argument("--by_class", action="store_true", help="with --baseline, also in the IoU of each class")
    args = parser.parse_args()
    if not args.baseline and (args.by_class or args.metric or args.group):
        parser.error("--metric, --group and --by_class go with --baseline NAME")
    if args.runs and args.parent_dir:
        parser.error("give folders of experiments or --parent_dir, not both")
    args.metric = args.metric or ["mIoU"]
    args.output_dir = args.output_dir or (Path("results") if args.runs else args.parent_dir or default)
    args.runs = args.runs or [args.parent_dir or default]
    return args


# ---------------------------------------------------------------------------------------- tables


def row(run: Run) -> dict[str, Any]:
    """Return all columns of a run; metrics are of the best epoch, on val where no split is named."""
    columns = {"name": run.name, "init_from": run.init_from, **run.params, "mIoU": None, **run.best["val"]}
    for split, metrics in run.own_size.items():
        columns[split + OWN_SIZE] = metrics.get("mIoU")
    columns |= {key: value for key, value in run.own_size.get("val", {}).items() if key in BOUNDARY}
    minutes = sum(epoch["seconds"] for epoch in run.history) / 60
    counted = (run.best["epoch"], len(run.history), minutes) if run.history else (None, None, None)
    return columns | dict(zip(COUNTED, counted, strict=True)) | {"state": run.state}


def tabulate_runs(runs: Sequence[Run], published: Mapping[Path, dict[str, Any]]) -> pd.DataFrame:
    """Return a row for every run: name, the hyperparameters that vary, metrics, epochs, minutes and state.

    published has the figures for the runs below each folder.
    """
    rows = [row(run) for run in runs]
    for run, columns in zip(runs, rows, strict=True):
        for folder, figures in published.items():
            columns |= published_columns(figures, run.params) if run.folder.is_relative_to(folder) else {}
    table = pd.DataFrame(rows, dtype=object)
    readable = [run for run in runs if run.params]
    vary = ["init_from"] if len({run.origin for run in readable}) > 1 else []
    vary += [key for key in KEYS if key not in WITHOUT_EFFECT and len({spell(run.params[key]) for run in readable}) > 1]
    return table[["name", *vary, *sorted(filter(is_metric, table), key=metric_order), *COUNTED, "state"]]


def is_metric(column: str) -> bool:
    """Return whether a column of the table has a metric, so that its best value comes first."""
    others = ("name", "init_from", *KEYS, "seeds", *COUNTED, "state")
    return column not in others and not column.endswith("_verdict")


def metric_order(column: str) -> tuple:
    """Return what sorts metrics: mIoU first, those at the photos' own size, loss last; the published one after ours."""
    ours = column.removeprefix("published_")
    return ours == "loss", ours != "mIoU", not ours.endswith(OWN_SIZE), ours, column != ours


def read_published(path: Path) -> dict[str, Any]:
    """Read published figures, each with the hyperparameters that say which experiments it belongs to.

    {"source": "where from", "results": [{"params": {"kernel_size": 7}, "mIoU": 0.728}]}; no results where there is no
    file. Raises UserError for what is no figure.
    """
    if not path.exists():
        return {"source": "", "results": []}
    content = read_json(path, if_absent="")
    kinds = {key: type(value) for key, value in content.items()} if isinstance(content, dict) else {}
    if kinds != {"source": str, "results": list}:
        raise UserError(f'{path} must hold one object with "source" and "results", a text and a list')
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


def by_seed(runs: Sequence[Run], parent: str) -> dict[str, list[Run]]:
    """Return the runs that differ in nothing but their seed, under the name that they have without it.

    Names with the seed in them must agree without it: gcn_seed_1 and mine_seed_1 may be of different code. parent is
    the name where nothing is left of theirs. Where several groups would have the same name, each has that of its first
    run.
    """
    groups: dict[str, list[Run]] = {}
    short = {run.name: without_seed(run.name, run.params["seed"], parent) if run.params else run.name for run in runs}
    seeded = {name for full, name in short.items() if full != name}
    for run in runs:
        params = run.params | dict.fromkeys(("seed", *WITHOUT_EFFECT))
        named = short[run.name] if short[run.name] in seeded else None
        alike = json.dumps([params, run.data_dir, run.origin, named], sort_keys=True)
        groups.setdefault(alike if run.params else run.name, []).append(run)
    first = [group[0].name for group in groups.values()]
    of_all = [short[name] for name in first]
    names = [short[name] if of_all.count(short[name]) == 1 else name for name in first]
    return dict(zip(names, groups.values(), strict=True))


def one_per_seed(group: list[Run]) -> list[Run]:
    """Return the first run of each seed, a finished one if there is one: a copy is no other seed."""
    unique: dict[Any, Run] = {}
    for run in sorted(group, key=lambda run: run.state != "finished"):
        unique.setdefault(run.params.get("seed"), run)
    return [*unique.values()]


def over_seeds(table: pd.DataFrame, groups: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
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


def task(run: Run, metric: str) -> str:
    """Return what is the same for runs on one data set that a metric can rank among each other."""
    if metric.endswith(("_difference", "_low", "_high")):
        return ""
    split = metric.removesuffix(OWN_SIZE) if metric.endswith(OWN_SIZE) else None
    split = "val" if metric.removeprefix("published_") in BOUNDARY else split
    keys = comparable_over(metric) if split is None else ()
    return json.dumps([run.labels(split), *map(run.params.get, keys)], sort_keys=True)


def sort(table: pd.DataFrame, column: str, tasks: Sequence[str]) -> pd.DataFrame:
    """Return the rows in the order of a column, those without a value last.

    A metric has its best value first, among rows of one task; any other column rises.
    """
    values, metric = table[column], is_metric(column)
    keys = pd.DataFrame({"missing": values.isna(), "task": tasks if metric else ""})
    keys["value"] = pd.to_numeric(values) if all(map(is_number, values.dropna())) else values.map(spell)
    rises = not metric or better_of(column.removeprefix("published_")) is min
    return table.loc[keys.sort_values([*keys], ascending=[True, True, rises]).index]


def spell(value: Any) -> str:
    """Return a value as params.json has it, strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---------------------------------------------------------------------------------------- differences


@dataclass
class Comparison:
    """How the rows of a table differ from one of them on a split: by row, by metric or class."""

    split: str
    baseline: str
    class_names: list[str]
    metrics: list[str]
    unit: str  # "photos", or "groups" of them
    photos: list[int]  # in which each class occurs
    differences: dict[str, dict[str, Difference]]
    doubts: dict[str, str]  # by row
    words: dict[str, dict[str, str]]
    by_class: dict[str, list[Difference | None]]
    class_IoU: dict[str, list[tuple[float, float, float] | None]]  # the baseline's too, each with its interval
    note: str = ""  # how many groups there are, and of what

    @property
    def few(self) -> bool:
        """Whether there are too few photos, or groups, to say more than that: of all rows, or of none."""
        return any(word.startswith("few ") for said in self.words.values() for word in said.values())

    def columns(self) -> pd.DataFrame:
        """Return the columns that results.csv has of it, with a line for each row."""
        lines: dict[str, dict[str, Any]] = {self.baseline: {}}
        for name, found in self.differences.items():
            lines[name] = {}
            for metric, (value, low, high, _) in found.items():
                word = self.words[name][metric]
                ends = {} if self.few else {"low": low, "high": high}
                columns = {"difference": value, **ends, "verdict": word}
                lines[name] |= {f"{self.split}_{metric}_{key}": each for key, each in columns.items()}
        return pd.DataFrame.from_dict(lines, orient="index")

    def cells(self) -> pd.DataFrame:
        """Return what people read of it, with a line for each row."""
        why = doubt(self.split)  # is said once, above the column
        columns = {
            metric: f"{self.split}: {metric} difference".replace(" mIoU", "") + (f" ({why})" if why else "")
            for metric in self.metrics
        }
        lines = {self.baseline: dict.fromkeys(columns.values(), "baseline")}
        for name, found in self.differences.items():
            short = {m: word.replace(f" ({why})", "").replace(f"{why}, ", "") for m, word in self.words[name].items()}
            lines[name] = {columns[metric]: said(value, short[metric]) for metric, value in found.items()}
        return pd.DataFrame.from_dict(lines, orient="index")

    def class_table(self) -> pd.DataFrame:
        """Return how each class differs, and how sure that is, all classes of a row together."""
        table = {f"IoU on {self.split}": self.class_names, self.unit: map(str, self.photos)}
        for name, classes in self.by_class.items():
            known = {place: found for place, found in enumerate(classes) if found}
            words = comparing.verdicts({place: each for place, each in known.items() if self.photos[place] >= FEW})
            few = f"few {self.unit}"
            head = f"{name} ({self.doubts[name]})" if self.doubts[name] else name
            table[head] = [said(each, words.get(place, few)) if each else "-" for place, each in enumerate(classes)]
        return pd.DataFrame(table)


def said(found: Difference, word: str) -> str:
    """Spell a difference, its interval and its word; of few photos no interval is said."""
    ends = "" if word.startswith("few ") else f" ({found.low:+.3f} to {found.high:+.3f})"
    return f"{found.value:+.3f}{ends} {word}"


def read_counts(run: Run, split: str) -> Counts:
    """Read the counts of every photo. Raises UserError unless they are of the same evaluation as the metrics."""
    path = run.counts_file(split)
    if not (counts := comparing.read_counts(path)).are_of(run.own_size[split].get("pixel_accuracy")):
        raise UserError(f"{path} is of another evaluation than the metrics; run evaluate.py again")
    return counts


def compare(
    rows: Mapping[str, Sequence[Run]], baseline: str, families: Sequence[Sequence[Run]], args: argparse.Namespace
) -> list[Comparison]:
    """Compare the rows with the baseline, on each split on which all its finished runs were scored photo by photo.

    families has the runs that differ in their seed only. Raises UserError if there is nothing to compare, or if photos
    differ between two runs.
    """
    finished = {name: [run for run in runs if run.state == "finished"] for name, runs in rows.items()}
    found = []
    splits = {split for run in finished[baseline] for split in run.own_size}
    for split in sorted(sorted(splits), key=doubt):
        scored = {n: runs for n, runs in finished.items() if runs and all(run.has_counts(split) for run in runs)}
        if baseline in scored:
            found.append(compare_on(split, scored, baseline, families, args))
        if missing := [run.name for runs in finished.values() for run in runs if not run.has_counts(split)]:
            print(f"not scored on {split} by evaluate.py --original_size: {', '.join(missing)}", file=sys.stderr)
    if not found:
        remedy = "score each of them with evaluate.py --original_size"
        states = ", ".join(sorted({run.state for run in rows[baseline]}))
        raise UserError(f"--baseline {baseline} ({states}): it needs finished runs with counts of photos; {remedy}")
    return found


def doubt(split: str) -> str:
    """Return what makes a comparison on a split doubtful, "" if nothing does; it sorts them, those that decide first.

    val chose the epochs; train, trainaug and their like were trained on. val@voc is that of another folder, voc.
    """
    return "optimistic" if split.partition("@")[0] == "val" else "trained on" if split.startswith("train") else ""


def compare_on(
    split: str,
    rows: Mapping[str, Sequence[Run]],
    baseline: str,
    families: Sequence[Sequence[Run]],
    args: argparse.Namespace,
) -> Comparison:
    """Return how the rows differ from the baseline on a split, in metrics and in the IoU of each class."""
    counts = {run.name: read_counts(run, split) for runs in rows.values() for run in runs}
    first = rows[baseline][0].name
    for name in counts:
        comparing.check_same_photos(counts[first], counts[name], (first, name))
    noted = sorted({group for runs in rows.values() for run in runs if (group := run.own_size[split].get("group"))})
    if args.group is None and len(noted) > 1:
        raise UserError(f"runs were scored on {split} in several groups ({', '.join(noted)}); give --group one of them")
    group = next(iter(noted), None) if args.group is None else args.group
    drawn_from = [each.of_groups(group) for each in counts.values()]
    drawn = dict(zip(counts, comparing.resample(drawn_from, args.metric), strict=True))
    spread = comparing.between_seeds([[drawn[run.name] for run in runs if run.name in drawn] for runs in families])
    sides = {name: [drawn[run.name] for run in runs] for name, runs in rows.items()}
    class_IoU = {name: comparing.intervals(side, others=spread)[len(args.metric) :] for name, side in sides.items()}
    ours = sides.pop(baseline)
    found = {name: comparing.difference(side, ours, others=spread) for name, side in sides.items()}
    of_metrics = {name: dict(zip(args.metric, each, strict=False)) for name, each in found.items()}
    alone = {name: spread is None and 1 in (len(side), len(ours)) for name, side in sides.items()}
    doubts = {name: ", ".join(filter(None, [doubt(split), "one seed" * each])) for name, each in alone.items()}
    count = len(drawn_from[0].ids)
    unit = "groups" if count < len(counts[first].ids) else "photos"
    few = f"few {unit}" if count < FEW else ""
    return Comparison(
        split,
        baseline,
        counts[first].class_names,
        args.metric,
        unit,
        (drawn_from[0].labelled > 0).sum(0).tolist(),
        of_metrics,
        doubts,
        words(of_metrics, doubts, few=few),
        {name: each[len(args.metric) :] for name, each in found.items()},
        class_IoU,
        f"{split} has {count} group{'s' * (count > 1)}, photos for whose names `{group}` captures the same text."
        * (unit == "groups"),
    )


def words(
    differences: Mapping[str, Mapping[str, Difference]], doubts: Mapping[str, str], *, few: str
) -> dict[str, dict[str, str]]:
    """Return "better", "worse" or "open" by row and metric, all judged together, with what makes it doubtful.

    few is the word where there are too few photos to say.
    """
    flat = {(name, metric): each for name, found in differences.items() for metric, each in found.items()}
    judged = {} if few else comparing.verdicts(flat)
    said: dict[str, dict[str, str]] = {name: {} for name in differences}
    for name, metric in flat:
        word = judged.get((name, metric), few)
        said[name][metric] = f"{word} ({doubts[name]})" if doubts[name] and word in ("better", "worse") else word
    return said


# ---------------------------------------------------------------------------------------- what people read


def cell(column: str, value: Any) -> str:
    """Return a value as people read it: metrics to three decimals, others to six digits."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return format(value, ".6g" if column in KEYS else ".1f" if column in COUNTED else ".3f")
    return spell(value)


def shown(table: pd.DataFrame, comparisons: Sequence[Comparison], first: str) -> pd.DataFrame:
    """Return the cells that people read, columns by rank: name, seeds, differences, mIoU, what varies, all else.

    first is the metric that comes before the others.
    """
    text = pd.DataFrame({column: [cell(column, value) for value in table[column]] for column in table})
    own_size = [column for column in table if column.endswith(OWN_SIZE)]
    for column in [column for column in table if f"{column}_std" in table]:
        spread = text.pop(f"{column}_std")
        text[column] = [
            f"{value} ± {std}" if std != "-" else value for value, std in zip(text[column], spread, strict=True)
        ]
    said = {name: column for each in comparisons for name, column in each.cells().items()}
    text = text.drop(columns=[column for each in comparisons for column in each.columns()])
    for place, (name, column) in enumerate(said.items(), 1):
        text.insert(place, name, [column.get(row, "-") for row in table["name"]])
    finished = all(re.fullmatch(r"(\d+ )?finished", state) for state in table["state"])
    rank = ["name", *["state"] * (not finished), *said, first, *own_size, "seeds"]
    rank += [column for column in table if column in ("init_from", *KEYS) or column.startswith("published_")]
    text = text[[*dict.fromkeys(column for column in [*rank, *COUNTED, *text] if column in text)]]
    return text.rename(columns={column: f"{column.removesuffix(OWN_SIZE)} at own size" for column in own_size})


def markdown(text: pd.DataFrame) -> str:
    """Return a table of cells as people read it, on a terminal or rendered."""
    sides = ["right" if all(map(is_numeral, text[column])) else "left" for column in text]
    safe = text.rename(columns=table_text).map(table_text)
    return safe.to_markdown(index=False, disable_numparse=True, colalign=sides)


def is_numeral(text: str) -> bool:
    return re.fullmatch(r"-|\d[\d.e+-]*( ± .*)?", text) is not None


def fitting(text: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return as many columns, of the first ones, as a line has room for, but two at least; and the others' names."""
    count = len(text.columns)
    while count > 2 and len(markdown(text.iloc[:, :count]).partition("\n")[0]) > WIDTH:
        count -= 1
    return text.iloc[:, :count], [*text.columns[count:]]


@dataclass
class Section:
    """The runs on one data set: rows by name, each with its runs, and tables of them, for programs and for people."""

    title: str
    rows: dict[str, list[Run]]
    table: pd.DataFrame
    column: str  # that sorts it
    comparisons: list[Comparison]
    text: pd.DataFrame

    def scored_splits(self) -> list[str]:
        """Return the splits on which a run was scored photo by photo, the least doubtful first."""
        runs = [run for group in self.rows.values() for run in group]
        splits = {split for run in runs for split in run.own_size if run.has_counts(split)}
        return sorted(sorted(splits), key=doubt)

    def curves(self) -> tuple[str, dict[str, list[list[float]]]]:
        """Return a metric, and by row its values by epoch in each finished run, or in all where none has finished."""
        runs = [run for group in self.rows.values() for run in group]
        losses = {spell([*map(run.params.get, comparable_over("loss"))]) for run in runs if run.history}
        drawn = any(run.curve(self.column) for run in runs) and (self.column != "loss" or len(losses) == 1)
        metric = self.column if drawn else "mIoU"
        found = {}
        for name in self.table["name"]:
            counted = [run for run in self.rows[name] if run.state == "finished"] or self.rows[name]
            found[name] = [curve for run in counted if (curve := run.curve(metric))]
        return metric, {name: curves for name, curves in found.items() if curves}


def make_section(
    runs: Sequence[Run], published: Mapping[Path, dict[str, Any]], root: Path, args: argparse.Namespace
) -> Section:
    """Tabulate the runs on one data set, and compare them with the baseline if it is one of them."""
    groups = by_seed(runs, root.resolve().name)
    families = {name: one_per_seed(group) for name, group in groups.items()}
    rows, table = {run.name: [run] for run in runs}, tabulate_runs(runs, published)
    if args.over_seeds:
        rows, table = families, over_seeds(table, families)
        for name, run in ((name, run) for name, group in groups.items() for run in group if run not in families[name]):
            run.add_problem(f"not counted, for {name} has another run of its seed")
        for name, group in families.items():
            if len({without_seed(run.name, run.params.get("seed"), "") for run in group}) > 1:
                runs_of = ", ".join(run.name for run in group)
                print(f"{name} is one row of {runs_of}, which differ in their seed only", file=sys.stderr)
    baseline = find_row(rows, args.baseline) if args.baseline else None
    comparisons = compare(rows, baseline, [*families.values()], args) if baseline else []
    for each in comparisons:
        table = table.join(each.columns(), on="name")
    chosen_by = {run.params["best_metric"] for run in runs if run.history}
    column = chosen_by.pop() if len(chosen_by) == 1 else "mIoU"
    column = comparisons[0].split + OWN_SIZE if comparisons else column
    column = args.sort if args.sort in table else column
    table = sort(table, column, [task(rows[name][0], column) for name in table["name"]])
    dataset, classes, folder = min((run.data for run in runs), key=lambda data: data.count(None))
    title = f"{(folder or dataset or '?').removeprefix(os.getcwd() + os.sep)}, {classes} classes"
    return Section(title, rows, table, column, comparisons, shown(table, comparisons, column))


def find_row(rows: Mapping[str, Sequence[Run]], name: str) -> str | None:
    """Return the row of a name, or of the run whose folder it is."""
    real = os.path.realpath(name)
    of_folder = (row for row, runs in rows.items() if any(os.path.realpath(run.folder) == real for run in runs))
    return name if name in rows else next(of_folder, None)


def read_runs(args: argparse.Namespace) -> tuple[list[Run], Path]:
    """Read all runs that the arguments name, and return the folder that their names begin at."""
    folders = [folder for given in args.runs for folder in find(given)]
    above = [Path(os.path.abspath(folder)).parent for folder in args.runs]  # links stay, as in the names
    root = args.runs[0] if len(above) == 1 else Path(os.path.commonpath(above))
    unique = {os.path.realpath(folder): folder for folder in reversed(folders)}
    runs = [read(folder, root) for folder in folders if unique[os.path.realpath(folder)] is folder]
    waiting = [] if args.all else [run for run in runs if run.state == "not started"]
    if waiting:
        names = ", ".join(run.name for run in waiting[:5]) + ", …" * (len(waiting) > 5)
        print(f"{len(waiting)} of {len(runs)} have not begun ({names}); --all shows them", file=sys.stderr)
    return [run for run in runs if run not in waiting], root


def notes(sections: Sequence[Section], args: argparse.Namespace) -> list[str]:
    """Return what a reader of the tables has to know."""
    of_all = [NOTE, *[SEEDS_NOTE] * args.over_seeds, *[DIFFERENCES_NOTE] * bool(args.baseline)]
    return of_all + [comparison.note for each in sections for comparison in each.comparisons if comparison.note]


def summary(sections: Sequence[Section], source: str, args: argparse.Namespace) -> str:
    """Return what the terminal and results.md say."""
    paragraphs = []
    for each in sections:
        text, left_out = fitting(each.text)
        paragraphs += [f"## {each.title}"] * (len(sections) > 1) + [markdown(text)]
        if left_out:
            paragraphs.append(textwrap.fill(f"results.html and .csv also have {', '.join(left_out)}.", WIDTH))
    paragraphs += notes(sections, args)
    if args.by_class:
        paragraphs += [markdown(comparison.class_table()) for each in sections for comparison in each.comparisons]
    return "\n\n".join([*paragraphs, *([f"Published: {source}"] if source else [])])


def write_tables(sections: Sequence[Section], text: str, folder: Path) -> None:
    """Write results.md, .csv and .tex."""
    write_text(folder / "results.md", text + "\n")
    several = len(sections) > 1
    tables = [each.table.assign(data=each.title) if several else each.table for each in sections]
    csv = pd.concat(tables).map(lambda value: spell(value) if isinstance(value, dict | bool) else value)
    write_text(folder / "results.csv", csv.to_csv(index=False))
    options: dict[str, Any] = {"headers": "keys", "showindex": False, "disable_numparse": True}
    counted = [each.text.columns.isin({*COUNTED} - {each.column}).argmax() for each in sections]  # the first of them
    few = [each.text.iloc[:, :place] for each, place in zip(sections, counted, strict=True)]  # in any width
    texts = [tabulate(text, tablefmt="latex_booktabs", **options) for text in few]
    latex = [f"% {each.title}\n{text}\n" for each, text in zip(sections, texts, strict=True)]
    write_text(folder / "results.tex", "\n".join(latex))


def scored(section: Section, split: str, count: int) -> list[page.Scored]:
    """Return, of at most count rows, the baseline first, the first run that was scored photo by photo on a split."""
    baseline, found = {each.baseline for each in section.comparisons}, list[page.Scored]()
    for name in sorted(section.table["name"], key=lambda name: name not in baseline):
        run = next((run for run in section.rows[name] if run.has_counts(split)), None)
        if run and len(found) < count:
            try:
                title = name if len(section.rows[name]) == 1 else f"{name}, seed {run.params['seed']}"
                found.append(page.Scored(title, run.folder, split, read_counts(run, split)))
            except UserError as error:
                run.add_problem(str(error))
    return found


def write_page(sections: Sequence[Section], args: argparse.Namespace) -> None:
    """Write results.html and results.png, the curves of the first section.

    With --gallery the page shows photos, of the baseline and the best other row, or the best two.
    """
    parts = []
    for each in sections:
        splits = each.scored_splits()
        metric, curves = each.curves()
        runs = scored(each, splits[0], page.RUNS) if splits else []
        parts.append(page.Section(each.title, each.text, curves, metric, each.comparisons, runs))
    gallery = None
    if args.gallery:
        if not (runs := scored(sections[0], args.gallery, 2)):
            there = f", only on {', '.join(splits)}" if (splits := sections[0].scored_splits()) else ""
            raise UserError(f"--gallery {args.gallery}: no run was scored on it by evaluate.py --original_size{there}")
        gallery = page.draw_gallery(runs)
        print(gallery.note or f"photos of {args.gallery} -> results.html", file=sys.stderr)
    make_folder(args.output_dir, "--output_dir")
    page.write_page(args.output_dir / "results.html", parts, notes(sections, args), gallery)
    if parts[0].curves:
        save_figure(page.curves_figure(parts[0], page.styles(parts[0])), args.output_dir / "results.png", dpi=120)


def main(args: argparse.Namespace) -> None:
    published = {folder: read_published(folder / "published.json") for folder in args.runs}
    runs, root = read_runs(args)
    if not runs:
        raise UserError("none of the experiments has begun; --all shows them")
    name_other_labels(runs)
    sections = [make_section(group, published, root, args) for group in by_data(runs)]
    if args.sort and not any(args.sort in each.table for each in sections):
        columns = dict.fromkeys(column for each in sections for column in each.table)
        raise UserError(f"--sort {args.sort}: no such column; there are {', '.join(columns)}")
    if args.baseline and not any(each.comparisons for each in sections):
        there = ", ".join(name for each in sections for name in each.rows)
        raise UserError(f"--baseline {args.baseline}: the table has no row of that name; there are {there}")
    sections.sort(key=lambda each: not each.comparisons)  # the baseline's first
    text = summary(sections, "; ".join(each["source"] for each in published.values() if each["results"]), args)
    write_page(sections, args)  # first, as --gallery may be a mistake
    write_tables(sections, text, args.output_dir)
    print(f"{text}\n\n-> {args.output_dir / 'results.html'}, .md, .csv, .tex and .png")
    for run in runs:
        if run.problem:
            print(f"{run.name}: {run.state}, {run.problem}", file=sys.stderr)
    if len(sections) > 1:
        print(f"results.png is of {sections[0].title} alone; name runs to draw others", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
