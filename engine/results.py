"""What the folders of experiments say of their runs, read by those who compare them; nothing is written."""

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.checkpoints import differences
from engine.run import existing, is_running, records
from engine.training import best_epoch, score, why_finished
from model import UserError
from params import WITHOUT_EFFECT, Params, comparable_over
from utils import read_history, read_json, walk

BEST = "best_original_size"  # in the names of evaluate.py's files: the best weights at the photos' own size
SIGNS = {"params.json", "history.jsonl", "last.pth.tar", "best.pth.tar"}  # one of them makes a folder an experiment


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

    @property
    def data(self) -> tuple[Any, ...]:
        """The kind of data set, its classes and its folder; None for what is not known."""
        return self.params.get("dataset"), self.params.get("num_classes"), self.data_dir

    def labels(self, split: str | None) -> list[Any]:
        """Return what tells photos and masks of a split at their own size, or of validation, from others."""
        scores = self.own_size.get(split, {}) if split else self.validation
        return [scores.get(key) for key in ("data_dir", "images", "frequency")]

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


def find(parent: Path) -> list[Path]:
    """Return the experiment folders under a folder, or itself; a sweep's own folder is none."""
    if not parent.is_dir():
        raise UserError(f"no folder {parent}; give folders of experiments")
    found = []
    for folder, subfolders, files in walk(parent):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if "search_space.json" not in files and not SIGNS.isdisjoint(files):
            found.append(folder)
    if not found:
        raise UserError(f"{parent} holds no experiments, which are folders with a params.json")
    return found


def read(folder: Path, root: Path) -> Run:
    """Read an experiment folder; a damaged file makes it "unreadable", and is named as the problem.

    Its name is its path from root, or that of root itself.
    """
    name = folder.resolve().name if folder == root else Path(os.path.relpath(folder, root)).as_posix()
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


def name_other_labels(runs: Sequence[Run]) -> None:
    """Note which runs were validated on other photos or masks of a folder than the first one there."""
    first: dict[tuple, Run] = {}
    for run in (run for run in runs if run.validation):
        other = first.setdefault((run.data_dir, *map(run.params.get, comparable_over("mIoU"))), run)
        if other.labels(None) != run.labels(None):
            run.add_problem(f"val had other photos or masks than for {other.name}: not comparable")


def by_data(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs on each data set, the largest group first; one that does not say its data joins the largest."""
    count = Counter(run.data for run in runs)
    known = sorted(count, key=lambda data: (data.count(None), -count[data], str(data)))
    groups: dict[tuple, list[Run]] = {data: [] for data in known}
    for run in runs:
        data = next(d for d in known if all(own in (None, there) for own, there in zip(run.data, d, strict=True)))
        groups[data].append(run)
    return sorted(filter(None, groups.values()), key=len, reverse=True)


def without_seed(name: str, seed: int | None, parent: str) -> str:
    """Return batch_size_8 for batch_size_8__seed_1, mine for mine_s1 or mine-seed1, parent where nothing is left."""
    ending = rf"(?i)(?:^|[_-]+)s(?:eed)?[_=-]?{seed}(?=__|$)"
    parts = [re.sub(ending, "", part).removeprefix("__") for part in name.split("/")]
    return "/".join(filter(None, parts)) or parent


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
