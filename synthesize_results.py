"""Gather every experiment under a folder into one table: results.md, results.csv and results.png there."""

import argparse
import csv
import io
import json
import math
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from model import UserError
from utils import (
    RUN_LOCK,
    TRIAL_LOCKS,
    Params,
    add_folder,
    best_epoch,
    is_locked,
    is_number,
    outputs,
    read_history,
    read_json,
    replacing,
    run_main,
    score,
    write_text,
)

METRICS = ("mIoU", "pixel_accuracy", "loss")  # of validation
DESCENDING = ("mIoU", "pixel_accuracy")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_folder(parser, "--parent_dir", "experiments", "where to look")
    parser.add_argument("--sort", default="mIoU", metavar="COLUMN", help="any column (default: %(default)s)")
    return parser.parse_args()


@dataclass
class Result:
    """One experiment folder.

    state is "finished", "running", "pruned" (by a sweep), "failed" (neither finished nor running), "not started" or
    "unreadable".
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)  # every key of params.json; {} if unreadable
    history: list[dict] = field(default_factory=list)
    state: str = "unreadable"
    problem: str = ""

    def row(self, varying: list[str]) -> dict[str, Any]:
        """The columns of the table, None where there is nothing; metrics are those of the epoch of best mIoU."""
        best = best_epoch(self.history) if self.history else {"epoch": None, "val": {}}
        return {
            "name": self.name,
            **{key: self.params.get(key) for key in varying},
            **{metric: best["val"].get(metric) for metric in METRICS},
            "best_epoch": best["epoch"],
            "epochs": len(self.history) or None,
            "minutes": sum(epoch["seconds"] for epoch in self.history) / 60 if self.history else None,
            "state": self.state,
        }


def find(parent_dir: Path) -> list[Path]:
    """The experiment folders under parent_dir, or itself; a sweep's own params.json is only the base of its trials."""
    if not parent_dir.is_dir():
        raise UserError(f"no folder {parent_dir}; give the folder of your experiments with --parent_dir")
    found, seen = [], set()
    for folder, subfolders, files in os.walk(parent_dir, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to where we were
            subfolders[:] = []
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if "search_space.json" not in files and ("params.json" in files or outputs(Path(folder))):
            found.append(Path(folder))
    if not found:
        raise UserError(f"{parent_dir} holds no experiments, which are folders with a params.json")
    return found


def read(folder: Path, parent_dir: Path) -> Result:
    """What an experiment folder holds; a damaged file makes it "unreadable", and is named as the problem."""
    name = folder.resolve().name if folder == parent_dir else str(folder.relative_to(parent_dir))
    result = Result(os.fsencode(name).decode(errors="replace"))
    try:
        params = Params.load(folder / "params.json")
        result.params = asdict(params)
        history = read_history(folder)
        check(history, folder)
        result.history = history
        result.state, result.problem = state(folder, params, history)
    except (UserError, OSError) as error:
        result.problem = str(error)
    return result


def check(history: list, folder: Path) -> None:
    """Raise UserError unless every epoch has the numbers that the table needs."""
    for line, epoch in enumerate(history, 1):
        try:
            numbers = [epoch["epoch"], epoch["seconds"], *(epoch["val"][metric] for metric in METRICS)]
            sane = all(is_number(n) or (n is None and index > 1) for index, n in enumerate(numbers))
        except (KeyError, TypeError):
            sane = False
        if not sane:
            raise UserError(f"{folder / 'history.jsonl'} is damaged in line {line}; mend or remove the line")


def state(folder: Path, params: Params, history: list[dict]) -> tuple[str, str]:
    """The state of an experiment, and what is the matter with it, if anything."""
    if is_locked(folder / RUN_LOCK) or is_locked(folder.parent / TRIAL_LOCKS / folder.name):  # train.py's, a sweep's
        return "running", ""
    patience = params.early_stopping_patience or math.inf
    if history and (len(history) >= params.num_epochs or len(history) - best_epoch(history)["epoch"] >= patience):
        return "finished", ""
    if (folder / "trial.json").exists():
        trial = read_json(folder / "trial.json", if_absent="")
        if isinstance(trial, dict) and trial.get("state") in ("pruned", "failed"):
            reason = trial.get("reason")
            return trial["state"], "; ".join(map(str, reason)) if isinstance(reason, list) else ""
    if not outputs(folder):
        return "not started", ""
    return "failed", f"ended after {len(history)} of {params.num_epochs} epochs"


def varying_keys(results: list[Result]) -> list[str]:
    """The hyperparameters in which the readable experiments differ, in the order of Params."""
    readable = [result.params for result in results if result.params]
    return [key for key in (readable or [{}])[0] if any(params[key] != readable[0][key] for params in readable)]


def sort(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Best first by a metric, else in rising order; rows without a value last. Raises UserError for no column."""
    if column not in rows[0]:
        raise UserError(f"--sort {column}: no such column; there are {', '.join(rows[0])}")
    known, unknown = [], []
    for row in rows:
        (unknown if row[column] is None else known).append(row)
    numeric = all(type(row[column]) in (int, float) for row in known)
    known.sort(key=lambda row: row[column] if numeric else spell(row[column]), reverse=column in DESCENDING)
    return known + unknown


def spell(value: Any) -> str:
    """A value as params.json has it, strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as people read it, on a terminal or rendered."""
    digits = dict.fromkeys(METRICS, ".4f") | {"minutes": ".1f"}
    cells = [
        [
            "-" if value is None else format(value, digits[key]) if key in digits else cell(spell(value))
            for key, value in row.items()
        ]
        for row in rows
    ]
    numeric = [any(type(row[key]) in (int, float) for row in rows) for key in rows[0]]
    alignment = ["right" if right else "left" for right in numeric]
    return tabulate(cells, headers=list(rows[0]), tablefmt="pipe", disable_numparse=True, colalign=alignment)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def comma_separated(rows: list[dict[str, Any]]) -> str:
    """The table for programs: all digits, empty cells where there is nothing."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else spell(value) for value in row.values()] for row in rows)
    return stream.getvalue()


def main(args: argparse.Namespace) -> None:
    results = [read(folder, args.parent_dir) for folder in find(args.parent_dir)]
    varying = varying_keys(results)
    rows = sort([result.row(varying) for result in results], args.sort)
    table = markdown(rows)
    print(table)
    for result in results:
        if result.problem:
            print(f"{result.name}: {result.state}, {result.problem}", file=sys.stderr)
    sys.stdout.flush()
    write_text(args.parent_dir / "results.md", table + "\n")
    write_text(args.parent_dir / "results.csv", comma_separated(rows))

    from visualize import learning_curves  # matplotlib, which takes longer to import than all of the above to run

    ranks = {row["name"]: rank for rank, row in enumerate(rows)}
    runs = sorted((result for result in results if result.history), key=lambda result: ranks[result.name])
    if runs:
        figure = learning_curves(
            {run.name: [score(epoch) for epoch in run.history] for run in runs},
            {key: {run.name: run.params[key] for run in runs} for key in varying},
        )
        with replacing(args.parent_dir / "results.png") as temporary, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font lacks
            figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
