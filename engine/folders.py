"""The experiment folder: what lies in it, who works in it, and where its results come from."""

import argparse
import math
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from model import UserError
from model.metrics import BETTER
from params import Params
from utils import ROOT, lock, read_json

WHOLE_FILES = (  # what train.py writes whole or not at all, beside the checkpoints
    *("run.json", "history.jsonl", "samples.png", "curves.png"),
    *("metrics_val_last_weights.json", "metrics_val_best_weights.json"),
)
FIRST_OUTPUTS = (*WHOLE_FILES, "train.log", "trial.json", "tensorboard/events.*")  # before there is a checkpoint
OUTPUTS = (
    *FIRST_OUTPUTS,
    *("last.pth.tar", "best.pth.tar"),
    *("last.onnx", "best.onnx"),  # of these checkpoints; an export under a name of the user's is the user's
    *("metrics_*.json", "metrics_*.png", "counts_*.npz", "overlays_*/*.png"),
)
RUN_LOCK = ".lock"  # held while train.py works in a folder
TRIAL_LOCKS = ".locks"  # in the folder of a sweep; one for every trial that is started or at work
LOCK_PATIENCE = 8.0  # seconds; loader processes of a killed run, which inherit its lock, end within five


def remove_outputs(model_dir: Path, *, keep_log: bool = False) -> None:
    """Delete what earlier runs have left in an experiment folder; keep_log: all but train.log."""
    for path in existing_outputs(model_dir):
        if keep_log and path.name == "train.log":
            continue
        path.unlink()
        if path.parent != model_dir:
            with suppress(OSError):  # not empty yet
                path.parent.rmdir()


def existing_outputs(model_dir: Path) -> list[Path]:
    """Return what earlier runs have left in an experiment folder."""
    return sorted({path for pattern in OUTPUTS for path in model_dir.glob(pattern)})


@contextmanager
def sole_run(folder: Path, script: str = "train.py") -> Iterator[None]:
    """Hold the folder of a run or a sweep. Raises UserError if another run of the script is at work in it."""
    if (held := lock(folder / RUN_LOCK, patience=LOCK_PATIENCE)) is None:
        raise UserError(f"another {script} is at work in {folder}; wait for it, or stop it first")
    try:
        yield
    finally:
        held.release()


def recorded_starts(model_dir: Path) -> list[dict[str, Any]]:
    """Return what run.json says of the start of a run and of every resume; [] where there is none that can be read."""
    with suppress(ValueError, AttributeError, TypeError):
        first = read_json(model_dir / "run.json", if_absent="")
        return [first, *(dict(record) for record in first.get("resumed", []))]
    return []


def recorded_data_dir(model_dir: Path) -> Path | None:
    """Return the data folder that a run was last trained on; None where run.json does not say."""
    recorded = [record["data_dir"] for record in recorded_starts(model_dir) if isinstance(record.get("data_dir"), str)]
    return Path(recorded[-1]) if recorded else None


def data_dir(args: argparse.Namespace, dataset: str) -> Path:
    """Return --data_dir; else the folder that the run was trained on; "data" where run.json does not say which.

    Raises UserError if the run's folder is gone, unless it held the built-in sample, which can be drawn anew.
    """
    if args.data_dir is not None:
        return args.data_dir
    recorded, file = recorded_data_dir(args.model_dir), args.model_dir / "run.json"
    if file.exists() and not recorded_starts(args.model_dir):
        raise UserError(f"{file} is damaged and does not say what the run was trained on; give --data_dir")
    if recorded is None or (dataset == "sample" and not recorded.is_dir()):
        return Path("data")
    if not recorded.is_dir():
        raise UserError(f"{args.model_dir} was trained on {recorded}, which is not there; give --data_dir")
    return recorded


def git_commit() -> str | None:
    """Return the commit this code is at, with "-dirty" when tracked files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Finished(NamedTuple):
    """Why a run has nothing left to train, and the key of params.json that limits it."""

    reason: str
    limit: str


def why_finished(history: list[dict], params: Params) -> Finished | None:
    """Return why a run with the epochs of history.jsonl has nothing left to train, None if it has."""
    epoch, patience = len(history), params.early_stopping_patience
    if epoch > params.num_epochs:
        return Finished(f"trained {epoch} epochs, more than the {params.num_epochs} of num_epochs", "num_epochs")
    if epoch == params.num_epochs:
        return Finished(f"trained {epoch} of {params.num_epochs} epochs", "num_epochs")
    if patience is not None and history and epoch - best_epoch(history, params.best_metric)["epoch"] >= patience:
        reason = f"stopped early after epoch {epoch}: no better {params.best_metric} in {patience} epochs"
        return Finished(reason, "early_stopping_patience")
    return None


def best_epoch(history: list[dict], metric: str) -> dict:
    """Return the first of the epochs with the best value of a validation metric."""
    return better_of(metric)(history, key=lambda epoch: score(epoch, metric))


def score(epoch: dict, metric: str) -> float:
    """Return a validation metric of an epoch of history.jsonl; where it is undefined, what is worse than any value."""
    value = epoch["val"].get(metric)
    worst = -math.inf if better_of(metric) is max else math.inf
    return worst if value is None else value


def better_of(metric: str) -> Callable:
    """Return max or min, which chooses the better of two values; max for one that is unknown, of an older run say."""
    return BETTER.get(metric, max)
