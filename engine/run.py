"""The folder of an experiment: what lies in it, how a run begins or resumes there, and what an epoch leaves.

A run is its last.pth.tar: everything else of an epoch is written after it and follows from it.
"""

import argparse
import copy
import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from engine import devices
from engine.checkpoints import changed_keys, check_unchanged, load_checkpoint, save_checkpoint, to_predict_with
from engine.devices import autocast, device_name, input_options
from engine.training import Training, scalars, why_finished
from model import UserError
from model.data_loader import SegmentationDataset
from model.layouts import Split
from model.net import FCN_GCN
from model.transforms import photo_edges, to_input
from params import ARCHITECTURE, INPUT, Params
from utils import (
    ROOT,
    read_history,
    read_json,
    save_figure,
    save_picture,
    set_logger,
    write_history,
    write_json,
)
from visualize import comparison, training_curves

BEGINNINGS = ("train.log", "run.json", "trial.json")  # what a run writes before its first epoch ends, or a sweep
RESULTS = (
    *("last.pth.tar", "best.pth.tar", "history.jsonl", "samples.png", "curves.png", "tensorboard/events.*"),
    *("last.onnx", "best.onnx"),  # of these checkpoints; an export under a name of the user's is the user's
    *("metrics_*.json", "metrics_*.png", "counts_*.npz", "overlays_*/*.png"),
)
RUN_LOCK = ".lock"  # held while train.py works in a folder
LOCK_PATIENCE = 8.0  # seconds; loader processes of a killed run, which inherit its lock, end within five
RESUME_NEEDS = (*ARCHITECTURE, *INPUT, "optimizer", "dataset", "best_metric")  # as they were
LINE_INTERVAL = 30.0  # seconds at least between two lines about an epoch, where no progress bar is drawn
DRAWING_INTERVAL = 10.0  # seconds between two drawings of curves.png, or short epochs would wait for it


def existing_results(model_dir: Path) -> list[Path]:
    """Return what finished epochs and later scripts have left in an experiment folder."""
    return sorted({path for pattern in RESULTS for path in model_dir.glob(pattern)})


def remove_outputs(model_dir: Path) -> None:
    """Delete what earlier runs have left in an experiment folder."""
    for path in (*existing_results(model_dir), *(model_dir / name for name in BEGINNINGS)):
        path.unlink(missing_ok=True)
        if path.parent != model_dir:
            with suppress(OSError):  # not empty yet
                path.parent.rmdir()


@contextmanager
def sole_run(folder: Path, script: str = "train.py") -> Iterator[None]:
    """Hold the folder of a run or a sweep. Raises UserError if another run of the script is at work in it."""
    try:
        with FileLock(folder / RUN_LOCK, timeout=LOCK_PATIENCE):
            yield
    except Timeout:
        raise UserError(f"another {script} is at work in {folder}; wait for it, or stop it first") from None


def is_running(folder: Path) -> bool:
    """Return whether a run or a sweep is at work in a folder; writes nothing."""
    if not (folder / RUN_LOCK).exists():
        return False
    try:
        with FileLock(folder / RUN_LOCK, timeout=0):
            return False
    except Timeout:
        return True


def recorded_data_dir(model_dir: Path) -> Path | None:
    """Return the data folder that a run was last trained on; None where run.json does not say."""
    if not (model_dir / "run.json").exists():
        return None
    record = read_json(model_dir / "run.json", if_absent="")
    with suppress(TypeError, KeyError, IndexError):
        return Path([record, *record.get("resumed", [])][-1]["data_dir"])
    return None


def find_data_dir(args: argparse.Namespace, dataset: str) -> Path:
    """Return --data_dir; else the folder that the run was trained on; "data" where run.json does not say which.

    Raises UserError if the run's folder is gone, unless it held the built-in sample, which can be drawn anew.
    """
    recorded = args.data_dir or recorded_data_dir(args.model_dir)
    if recorded is None or (args.data_dir is None and dataset == "sample" and not recorded.is_dir()):
        return Path("data")
    if args.data_dir is None and not recorded.is_dir():
        raise UserError(f"{args.model_dir} was trained on {recorded}, which is not there; give --data_dir")
    return recorded


def read_last(model_dir: Path, *, resume: bool) -> dict[str, Any] | None:
    """Return last.pth.tar where a run is to be resumed and has one. Raises UserError if it is damaged."""
    file = model_dir / "last.pth.tar"
    return load_checkpoint(file) if resume and file.exists() else None


def check_folder(state: dict[str, Any] | None, params: Params, args: argparse.Namespace) -> None:
    """Raise UserError unless the flags say what is to become of an earlier run in the folder.

    state is the checkpoint that is resumed. A run without a finished epoch is none: it starts anew.
    """
    last = args.model_dir / "last.pth.tar"
    if state is not None:
        check_unchanged(RESUME_NEEDS, state, params, last)
    elif args.overwrite:
        if args.init_from and args.init_from.resolve() in {file.resolve() for file in existing_results(args.model_dir)}:
            raise UserError(f"--overwrite would delete {args.init_from}; move it to another folder first")
    elif earlier := existing_results(args.model_dir):
        way_on = "continue it with --resume" if last.exists() else "without last.pth.tar it cannot be resumed"
        raise UserError(f"{args.model_dir} already holds a run ({earlier[0].name}); {way_on}, or --overwrite it")


def finished_without_last(model_dir: Path, params: Params) -> str | None:
    """Return why a run that has not kept last.pth.tar has nothing left to train, None if it has."""
    return why_finished(read_history(model_dir), params) if (model_dir / "best.pth.tar").exists() else None


def changes_since(state: dict[str, Any], training: Training) -> str:
    """Return what has changed in params.json and in the list of training images since a checkpoint."""
    keys = [*changed_keys(Params.parse(state["params"], "last.pth.tar"), training.params)]
    keys += ["the list of training images"] if state.get("images") != training.list_digest else []
    return ", ".join(keys) or "nothing"


def check_trainable(params: Params, count: int) -> None:
    """Raise UserError unless these processes can train with params on a list of count images."""
    if broken := params.broken_rules(devices.world_size()):
        raise UserError("; ".join(broken))
    if params.batch_size > count:
        raise UserError(f'"batch_size" is {params.batch_size}, but {params.train_split} has {count} images; lower it')


def check_batches(model: FCN_GCN, params: Params, count: int) -> None:
    """Raise UserError where a network cannot train on the last batch, the smallest, or on a process's share of it."""
    last = count % params.batch_size or params.batch_size
    if last == 1 and not _takes(model, 1, params):
        raise UserError(
            f'"batch_size" {params.batch_size} leaves a batch of one among {count} images, and at "image_size" '
            f"{params.image_size} it gives batch norm a single value a channel; change one of the two"
        )
    if last < (processes := devices.world_size()) and not _takes(model, 0, params):
        raise UserError(
            f'"batch_size" {params.batch_size} leaves a batch of {last} among {count} images, in which some of '
            f'{processes} processes have none, as "{params.encoder}" cannot; change "batch_size"'
        )


@torch.no_grad()
def _takes(model: FCN_GCN, count: int, params: Params) -> bool:
    """Return whether a network can be trained on that many photos, 0 or 1."""
    images = torch.zeros(count, 3, params.image_size, params.image_size)
    try:
        with torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train(count > 0)(images)  # its batch norm is another if processes share it
    except (RuntimeError, ValueError):
        return False
    return True


def list_digest(split: Split) -> str:
    """Return a digest of the ids of a list, in their order."""
    return hashlib.sha256("\n".join(split.ids).encode()).hexdigest()


def check_same_list(split: Split) -> None:
    """Raise UserError unless the list of a split is the same for all processes, on whatever machine."""
    if len(set(devices.gather(list_digest(split)))) > 1:
        raise UserError(f"{split.name}.txt is not the same on all machines; copy one data set to all of them")


def git_commit() -> str | None:
    """Return the commit this code is at, with "-dirty" when tracked files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_provenance(model_dir: Path, device: torch.device, params: Params, data_dir: Path, *, resumed: bool) -> None:
    """Write run.json: what was run, from which code, with which versions, on what; a resume adds to "resumed"."""
    packages = ("torchvision", "numpy", "pillow", *(["timm"] if "timm" in sys.modules else []))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record = {
        "git_commit": git_commit(),
        "argv": sys.argv,
        "data_dir": os.path.abspath(data_dir),
        "versions": versions | {name: version(name) for name in packages},
        "device": device_name(device),
        "platform": platform.platform(),
        "processes": devices.world_size(),
        "seed": params.seed,
        "params": asdict(params),
    }
    path = model_dir / "run.json"
    if resumed and path.exists():
        first = read_json(path, if_absent="")
        record = first | {"resumed": [*first.get("resumed", []), record]}
    write_json(path, record)


class EpochProgress:
    """A bar over the images of an epoch; without a terminal a line for every tenth of a long one.

    Args:
        training: whose next epoch this is.
        sizes: images per batch.
    """

    def __init__(self, training: Training, sizes: list[int]):
        self.title = f"epoch {training.epoch + 1}/{training.params.num_epochs}"
        self.steps, self.said = len(sizes), time.monotonic()
        self.bar = tqdm(total=sum(sizes), desc=self.title, unit="img", leave=False, disable=devices.bar_disabled())

    def update(self, images: int, losses: torch.Tensor) -> None:
        """Count a batch; losses has one value per step so far, and is read only where it is shown."""
        if self.bar.update(images):
            self.bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)
        elif self.bar.disable and devices.is_main() and self._is_due(len(losses)):
            self.said = time.monotonic()
            logging.info(f"{self.title}: {len(losses) / self.steps:.0%}, train loss {losses.mean():.4f}")

    def _is_due(self, step: int) -> bool:
        ends_a_tenth = 10 * (step - 1) // self.steps < 10 * step // self.steps < 10
        return ends_a_tenth and time.monotonic() - self.said > LINE_INTERVAL


class EpochOutputs:
    """Writes what the end of an epoch leaves in an experiment folder; trackers, such as TensorBoard, come on top."""

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.trackers: list[TensorBoard] = []
        self.drawn = time.monotonic()  # as if just now: the first epoch of a short run does not wait for a drawing

    def write_epoch(self, training: Training, val_set: SegmentationDataset) -> None:
        """Write last.pth.tar, which decides that the epoch has ended, and then all that follows from it."""
        record, picture = training.history[-1], sample_predictions(training, val_set)
        for tracker in self.trackers:  # first: a resume drops what they know of epochs that it repeats
            tracker.log(record, picture)
        save_checkpoint(state := training.state_dict(), self.model_dir / "last.pth.tar")
        logging.info(epoch_line(record, training.params, is_best=training.is_best))
        draws_curves = training.finished is not None or time.monotonic() - self.drawn > DRAWING_INTERVAL
        self.write_rest(state, picture, curves=draws_curves)

    def write_rest(self, state: dict[str, Any], picture: Image.Image, *, curves: bool = True) -> None:
        """Write what follows from last.pth.tar: the best weights, history, validation metrics and pictures."""
        if state["metrics"]["best"]["epoch"] == state["epoch"]:
            save_checkpoint(to_predict_with(state), self.model_dir / "best.pth.tar")
        write_history(self.model_dir, state["history"])
        for name, metrics in state["metrics"].items():
            write_json(self.model_dir / f"metrics_val_{name}_weights.json", metrics)
        save_picture(picture, self.model_dir / "samples.png")
        if curves:
            save_figure(training_curves(state["history"]), self.model_dir / "curves.png")
            self.drawn = time.monotonic()

    def close(self, training: Training) -> None:
        """End the trackers, and delete last.pth.tar of a finished run where params.json asks for that."""
        for tracker in self.trackers:
            tracker.close(training.params, training.metrics["best"])
        if not training.params.keep_last:
            (self.model_dir / "last.pth.tar").unlink()


def open_outputs(
    training: Training,
    val_set: SegmentationDataset,
    args: argparse.Namespace,
    data_dir: Path,
    *,
    state: dict[str, Any] | None,
    notes: list[str],
) -> EpochOutputs:
    """Begin, in rank 0, the log and run.json of a run that is about to train; return what writes its epochs.

    A resume from state writes anew all that follows from it. notes are lines for the log.
    """
    outputs = EpochOutputs(args.model_dir)
    if not devices.is_main():
        return outputs
    if args.overwrite:
        remove_outputs(args.model_dir)
    for unfinished in args.model_dir.glob(".*.tmp"):  # of a run that was killed
        unfinished.unlink()
    set_logger(args.model_dir / "train.log")
    write_provenance(args.model_dir, training.device, training.params, data_dir, resumed=state is not None)
    for line in notes:
        logging.info(line)
    if args.tensorboard:
        outputs.trackers.append(TensorBoard(args.model_dir, epoch=training.epoch))
    if state is not None:
        outputs.write_rest(state, sample_predictions(training, val_set))
    return outputs


class TensorBoard:
    """Writes events for TensorBoard; a resume starts after an epoch."""

    def __init__(self, model_dir: Path, *, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(model_dir / "tensorboard", purge_step=epoch + 1)

    def log(self, record: dict, picture: Image.Image) -> None:
        """Write an epoch of history.jsonl and samples.png."""
        epoch = record["epoch"]
        values = {f"{metric}/{part}": value for part in ("train", "val") for metric, value in record[part].items()}
        values |= {key: record[key] for key in ("learning_rate", "images_per_second")}
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, epoch)
        self.writer.add_image("samples", np.array(picture), epoch, dataformats="HWC")
        self.writer.flush()

    def close(self, params: Params, best: dict) -> None:
        """Write the hyperparameters beside the metrics of the best epoch, for TensorBoard's HPARAMS page."""
        values = {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in asdict(params).items()
        }
        found = {f"best/{key}": value for key, value in scalars(best).items() if value is not None}
        self.writer.add_hparams(values, found, run_name=".")  # in this folder, not in one below it
        self.writer.close()


@torch.inference_mode()
def sample_predictions(training: Training, dataset: SegmentationDataset, count: int = 6) -> Image.Image:
    """Draw validation photos spread evenly over the list, always the same ones, with truth and prediction."""
    params = training.params
    number = min(count, len(dataset))
    # Not neighbours, which may be frames of a video.
    examples = [dataset[place * len(dataset) // number] for place in range(number)]
    images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
    with autocast(training.device, params.precision):
        logits = training.eval_model.eval()(to_input(images, training.device, **input_options(training.model, params)))
    parts = zip(images.permute(0, 2, 3, 1), labels, logits.argmax(1).cpu(), strict=True)
    photos = zip(parts, photo_edges(images, labels, dataset.padding).tolist(), strict=True)
    shown = [
        [part[top:bottom, left:right].numpy() for part in example] for example, (left, top, right, bottom) in photos
    ]
    return comparison(shown, dataset.class_names)


def epoch_line(record: dict, params: Params, *, is_best: bool) -> str:
    """Return an epoch in one line for people."""
    shown = dict.fromkeys(("mIoU", "pixel_accuracy", params.best_metric))
    values = [f"{key} {decimal(record['val'][key])}".replace("_", " ") for key in shown if key != "loss"]
    return (
        f"epoch {record['epoch']}/{params.num_epochs}: "
        f"train loss {record['train']['loss']:.4f}, val loss {record['val']['loss']:.4f}, "
        f"{', '.join(values)}, lr {record['learning_rate']:.3g}, "
        f"{record['seconds']:.1f} s, {record['images_per_second']:.1f} images/s{' (best)' if is_best else ''}"
    )


def best_line(training: Training) -> str:
    """Return the best epoch in a few words for people."""
    metric = training.params.best_metric
    return f"best {metric} {decimal(training.metrics['best'][metric])} at epoch {training.best_epoch}"


def decimal(value: float | None) -> str:
    """Return a metric for people; "-" where it is undefined."""
    return "-" if value is None else f"{value:.4f}"
