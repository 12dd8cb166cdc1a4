"""The folder of an experiment: what lies in it, how a run begins or resumes there, and what an epoch leaves.

A run is its last.pth.tar: everything else of an epoch is written after it and follows from it.
"""

import argparse
import copy
import hashlib
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from PIL import Image

from engine import devices
from engine.checkpoints import (
    agreed_class_names,
    check_unchanged,
    differences,
    load_checkpoint,
    origin,
    predicting_weights,
    save_checkpoint,
    to_predict_with,
    weights_digest,
)
from engine.training import Training, scalars, why_finished
from model import UserError, locked
from model.data_loader import SegmentationDataset
from model.layouts import Split, find_split
from model.net import FCN_GCN
from model.transforms import photo_edges, to_input
from params import NEEDED_BY_WEIGHTS, Params, comparable_over
from utils import (
    ROOT,
    is_out_of_memory,
    read_history,
    read_json,
    save_figure,
    save_picture,
    set_logger,
    write_history,
    write_json,
)
from visualize import comparison, training_curves

WRITTEN = (  # by train.py when an epoch ends, in this order
    *("last.pth.tar", "best.pth.tar", "history.jsonl"),
    *("metrics_val_last_weights.json", "metrics_val_best_weights.json", "samples.png", "curves.png"),
)
RESULTS = (  # that are there once an epoch has ended
    *WRITTEN,
    *("last.onnx", "best.onnx"),  # of these checkpoints; an export under a name of the user's is the user's
    *("metrics_*.json", "metrics_*.png", "counts_*.npz", "overlays_*/*.png"),
)
OUTPUTS = (*RESULTS, "train.log", "run.json", "trial.json", "tensorboard/events.*")
RUN_LOCK = ".lock"  # held while train.py works in a folder
LOCK_PATIENCE = 8.0  # seconds; loader processes of a killed run, which inherit its lock, end within five
RESUME_NEEDS = (*NEEDED_BY_WEIGHTS, "optimizer", "dataset", "best_metric")  # as they were
LINE_INTERVAL = 30.0  # seconds at least between two lines about an epoch, where no progress bar is drawn
ESTIMATE_AFTER = 10.0  # seconds of steps from whose speed follows how long a run takes
DRAWING_INTERVAL = 10.0  # seconds between two drawings of curves.png, or short epochs would wait for it


def existing(model_dir: Path, patterns: Sequence[str] = RESULTS) -> list[Path]:
    """Return what finished epochs, or whatever patterns name, have left in an experiment folder, last.pth.tar first."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(model_dir.glob(pattern))))


def remove_outputs(model_dir: Path) -> None:
    for path in existing(model_dir, OUTPUTS):
        path.unlink()
        if path.parent != model_dir:
            with suppress(OSError):  # not empty yet
                path.parent.rmdir()


@contextmanager
def sole_run(folder: Path, script: str = "train.py") -> Iterator[None]:
    """Hold the folder of a run or a sweep, in rank 0.

    Raises UserError where there is no params.json, or another run of the script at work.
    """
    if not (folder / "params.json").exists():
        raise UserError(f"no {folder}/params.json; an experiment is a folder with one, {{}} for the defaults")
    try:
        with locked(folder / RUN_LOCK, LOCK_PATIENCE) if devices.is_main() else nullcontext():
            yield
    except Timeout as error:
        held = f" (or delete {error.lock_file} if there is none)" if error.lock_file.endswith(".held") else ""
        if any(os.environ.get(name, "1") != "1" for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
            held += "; processes that train together are started by torchrun, not by srun or mpirun: docs/SCALING.md"
        raise UserError(f"another {script} is at work in {folder}; wait for it, or stop it first{held}") from None


def is_running(folder: Path) -> bool:
    """Return whether a run or a sweep is at work in a folder; writes nothing."""
    if not (folder / RUN_LOCK).exists():
        return False
    try:
        with locked(folder / RUN_LOCK, 0):
            return False
    except Timeout:
        return True
    except OSError:  # a lock of somebody else's
        return False


def records(model_dir: Path) -> list[dict[str, Any]]:
    """Return what run.json says of the start of a run and of every resume; {} alone where there is none."""
    file = model_dir / "run.json"
    first = read_json(file, if_absent="") if file.exists() else {}
    return [first, *first.get("resumed", [])]


def find_data_dir(args: argparse.Namespace, dataset: str) -> Path:
    """Return --data_dir; else the folder that the run was trained on; "data" where run.json does not say which.

    Raises UserError if the run's folder is gone, unless it held the built-in sample, which can be drawn anew.
    """
    if args.data_dir is not None:
        return args.data_dir
    recorded = records(args.model_dir)[-1].get("data_dir")
    if recorded is None or (dataset == "sample" and not os.path.isdir(recorded)):
        return Path("data")
    if not os.path.isdir(recorded):
        raise UserError(f"{args.model_dir} was trained on {recorded}, which is not there; give --data_dir")
    return Path(recorded)


def trained_elsewhere(model_dir: Path, data_dir: Path) -> str | None:
    """Return the data folder of a run if it is another one. Where it is gone, the data have moved."""
    own = records(model_dir)[-1].get("data_dir")
    there = own is not None and os.path.isdir(own) and data_dir.is_dir()
    return own if there and not os.path.samefile(str(own), data_dir) else None


@dataclass(frozen=True)
class Start:
    """How a run begins: its params, the values of --set among them, its data, and what it resumes or starts from."""

    params: Params
    set: dict[str, Any]
    data_dir: Path
    file: Path  # last.pth.tar
    state: dict[str, Any] | None  # of last.pth.tar if the run resumes
    init_from: Path | None  # the file of the weights that another run starts from


def begin(args: argparse.Namespace, device: torch.device) -> Start | None:
    """Return how the run in args.model_dir begins, None if it has nothing left to train.

    Raises UserError unless the flags say what is to become of an earlier run. A run without a finished epoch is none.
    """
    devices.gather(None)  # nobody reads before rank 0 has the folder to itself
    last, best = (args.model_dir / f"{name}.pth.tar" for name in ("last", "best"))
    state = load_checkpoint(last) if args.resume and last.exists() else None
    kept = load_checkpoint(best) if args.resume and state is None and best.exists() else None
    changes = (state or kept or {}).get("set", {}) | args.set
    params = devices.resolve_precision(Params.load(args.model_dir / "params.json", changes), device)
    if kept and (reason := why_finished(read_history(args.model_dir), params)):
        if devices.is_main():
            print(f"nothing to do in {args.model_dir}: {reason}; last.pth.tar was not kept to train on from")
        return None
    if state:
        way_on = f"set it back, or start another run from {last} with --init_from"
        check_unchanged((*RESUME_NEEDS, *comparable_over(params.best_metric)), state, params, last, way_on)
    elif not args.overwrite and (earlier := existing(args.model_dir)):
        way_on = "continue it with --resume" if last.exists() else "without last.pth.tar it cannot be resumed"
        raise UserError(f"{args.model_dir} already holds a run ({earlier[0].name}); {way_on}, or --overwrite it")
    if args.overwrite and args.init_from and args.init_from.resolve() in map(Path.resolve, existing(args.model_dir)):
        raise UserError(f"--overwrite would delete {args.init_from}; move it to another folder first")
    check_alike([asdict(params), state and state.get("epoch")], f"{args.model_dir}, its params.json or last.pth.tar,")
    data_dir = find_data_dir(args, params.dataset) if state else args.data_dir or Path("data")
    return Start(params, changes, data_dir, last, state, None if state else args.init_from)


def check_alike(value: Any, what: str) -> None:
    """Raise UserError unless a value is the same in all processes, on whatever machine."""
    if any(other != value for other in devices.gather(value)):
        raise UserError(f"{what} is not the same for all processes; give all machines the same files")


def find_splits(start: Start) -> tuple[Split, Split, dict[str, Any]]:
    """Find train_split and val. Returns them and what a checkpoint says of them and of --set, see Training.

    Raises UserError for every fault that shows without decoding a photo, as other class names than those of a
    checkpoint that is resumed.
    """
    params, names = start.params, (start.params.train_split, "val")
    train, val = (find_split(params.dataset, start.data_dir, name, masks_required=True) for name in names)
    if broken := params.broken_rules(devices.world_size()):
        raise UserError("; ".join(broken))
    if params.batch_size > (count := len(train.ids)):
        raise UserError(f'"batch_size" is {params.batch_size}, but {params.train_split} has {count} images; lower it')
    about: dict[str, Any] = {"set": start.set}
    for key, split in (("images", train), ("val_images", val)):
        about[key] = hashlib.sha256("\n".join(split.ids).encode()).hexdigest()
        check_alike(about[key], f"{split.name}.txt")
    about["class_names"] = agreed_class_names(start.state or {}, start.file, val, params.num_classes)
    return train, val, about


def changes_since(start: Start, training: Training, args: argparse.Namespace) -> str:
    """Return what has changed since the checkpoint that is resumed: keys of params.json, and the data."""
    assert start.state is not None
    keys = [*differences(Params.parse(start.state["params"], start.file), training.params)]
    rate, before = training.learning_rate, training.history[-1]["learning_rate"]
    jumps = not math.isclose(rate, before) and {"learning_rate", "num_epochs", "schedule", "warmup_epochs"} & {*keys}
    lists = {"images": "the list of training images", "val_images": "the list of validation images"}
    keys += [name for key, name in lists.items() if start.state.get(key) not in (None, training.about[key])]
    if "weights" not in training.metrics["last"]:  # of an older program
        keys.append("the validation loss, a mean over photos now, and perhaps mIoU, over the classes in the labels now")
        keys += ["what a smaller last batch weighs: as its images now"] * (training.params.accumulation_steps > 1)
    folder = records(args.model_dir)[-1].get("data_dir")
    keys += [] if folder in (None, os.path.abspath(start.data_dir)) else [f"the data folder, before {folder}"]
    keys += [f"so the learning rate, {before:.3g} in the last step, {rate:.3g} in the next"] if jumps else []
    return ", ".join(keys) or "nothing"


@contextmanager
def advising_to_resume(args: argparse.Namespace) -> Iterator[None]:
    """Add to what cuts a training short, a signal or a full disk, how to continue it."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        what = str(error).strip() or "interrupted"
        instead = " in the place of --overwrite" if args.overwrite else ""
        kind = OSError if isinstance(error, OSError) else type(error)  # some OSErrors take more than a text
        raise kind(f"{what}; the same command with --resume{instead} continues the run") from None


def check_last_batch(model: FCN_GCN, params: Params, count: int) -> None:
    """Raise UserError where a network cannot train on the last batch, the smallest, or on a process's share of it."""
    last = count % params.batch_size or params.batch_size
    left = f'change "batch_size", for {params.batch_size} leaves a batch of {last} among {count} images'
    if last == 1 and not _takes(model, 1, params):
        raise UserError(f'{left}, for batch norm a single value a channel at "image_size" {params.image_size}')
    if last < (processes := devices.world_size()) and not _takes(model, 0, params):
        raise UserError(f'{left}, in which some of {processes} processes have none, as "{params.encoder}" cannot')


@torch.no_grad()
def _takes(model: FCN_GCN, count: int, params: Params) -> bool:
    """Return whether a network can be trained on that many photos, 0 or 1."""
    images = torch.zeros(count, 3, params.image_size, params.image_size)
    try:
        with torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).train(count > 0)(images)  # its batch norm is another if processes share it
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def git_commit() -> str | None:
    """Return the commit this code is at, with "-dirty" when tracked files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_provenance(model_dir: Path, device: torch.device, start: Start) -> None:
    """Write run.json: what was run, from which code, with which versions, on what; a resume adds to "resumed"."""
    packages = ("torchvision", "numpy", "pillow", *(["timm"] if "timm" in sys.modules else []))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record = {
        "git_commit": git_commit(),
        "argv": sys.argv,
        "data_dir": os.path.abspath(start.data_dir),
        "versions": versions | {name: version(name) for name in packages},
        "device": devices.device_name(device),
        "platform": platform.platform(),
        "processes": devices.world_size(),
        "seed": start.params.seed,
        "init_from": start.init_from and origin(load_checkpoint(start.init_from)),
        "set": start.set,
        "params": asdict(start.params),
    }
    path = model_dir / "run.json"
    if start.state and path.exists():
        first = read_json(path, if_absent="")
        record = first | {"resumed": [*first.get("resumed", []), record]}
    write_json(path, record)


class EpochProgress:
    """A bar over the images of an epoch; without a terminal a line for every tenth of a long one."""

    def __init__(self, training: Training, sizes: list[int]):  # the images of each batch
        self.title = f"epoch {training.epoch + 1}/{training.params.num_epochs}"
        self.steps, self.epochs, self.said = len(sizes), training.params.num_epochs, time.monotonic()
        self.bar = devices.bar(sum(sizes), self.title)
        self.estimates = training.epoch == 0
        self.warm = 0.0  # when the first two steps, which are slower, had ended

    def update(self, images: int, losses: torch.Tensor) -> None:
        """Count a batch; losses has one value per step so far, and is read only where it is shown."""
        step = len(losses)
        ends_a_tenth = 10 * (step - 1) // self.steps < 10 * step // self.steps < 10
        if self.bar.update(images):
            self.bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)
        elif self.bar.disable and devices.is_main() and ends_a_tenth and time.monotonic() - self.said > LINE_INTERVAL:
            self.said = time.monotonic()
            logging.info(f"{self.title}: {step / self.steps:.0%}, train loss {losses.mean():.4f}")
        self._estimate(step)

    def _estimate(self, step: int) -> None:
        """Say once in a run how long it takes, unless that is about a minute, from the speed of its first steps."""
        now = time.monotonic()
        if step == 2:
            self.warm = now
        elif self.estimates and step > 2 and now - self.warm >= ESTIMATE_AFTER:
            self.estimates = False
            whole = (now - self.warm) / (step - 2) * self.steps * self.epochs
            if whole > 90:
                self.bar.clear()  # or the line would stand behind it
                logging.info(f"about {duration(whole)} for the whole run, without validation")


class EpochOutputs:
    """Writes what the end of an epoch leaves in an experiment folder; trackers, such as TensorBoard, come on top."""

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.trackers: list[Any] = []
        self.drawn = time.monotonic()  # as if just now: the first epoch of a short run does not wait for a drawing

    def write_epoch(self, training: Training, val_set: SegmentationDataset) -> None:
        """Write last.pth.tar, which decides that the epoch has ended, and then all that follows from it."""
        save_checkpoint(state := training.state_dict(), self.model_dir / "last.pth.tar")
        logging.info(epoch_line(training))
        draws_curves = training.stop_reason is not None or time.monotonic() - self.drawn > DRAWING_INTERVAL
        self.write_rest(state, sample_predictions(training, val_set), curves=draws_curves)

    def write_rest(self, state: dict[str, Any], picture: Image.Image, *, curves: bool = True) -> None:
        """Write what follows from last.pth.tar: the best weights, history, validation metrics, pictures and events."""
        if state["metrics"]["best"]["epoch"] == state["epoch"]:
            save_checkpoint(to_predict_with(state), self.model_dir / "best.pth.tar")
        write_history(self.model_dir, state["history"])
        for name, metrics in state["metrics"].items():
            write_json(self.model_dir / f"metrics_val_{name}_weights.json", metrics)
        save_picture(picture, self.model_dir / "samples.png")
        if curves:
            best = state["metrics"]["best"]["epoch"]
            save_figure(training_curves(state["history"], best), self.model_dir / "curves.png")
            self.drawn = time.monotonic()
        for tracker in self.trackers:
            tracker.log(state["history"][-1], picture)

    def finish(self, training: Training) -> None:
        """Log the best epoch, end the trackers, and delete last.pth.tar where params.json asks for that."""
        metric, best = training.params.best_metric, training.metrics["best"]
        value = f"best {metric} {spelt(best.get(metric))} at epoch {best['epoch']}"
        logging.info(f"{training.stop_reason}; {value}, in {self.model_dir}")
        for tracker in self.trackers:
            tracker.close(training.params, best)
        if not training.params.keep_last:
            (self.model_dir / "last.pth.tar").unlink()


def log_absent_classes(training: Training, train: Iterable[float | None], val: Iterable[float | None]) -> None:
    """Say which classes the masks of the first epoch lack, given each class's share of their pixels."""
    params = training.params
    seen = (params.train_split, "cannot be learned")
    if params.augment or params.cutmix:
        seen = (f"{params.train_split}, as augmented in epoch 1", "another epoch may have them")
    for (name, so), shares in ((seen, train), (("val", "not in mIoU"), val)):
        absent = [class_ for class_, share in zip(training.about["class_names"], shares, strict=True) if not share]
        if absent and params.dataset != "sample":
            logging.info(f"in no mask of {name}, at {params.image_size} pixels a side: {', '.join(absent)}; {so}")


def open_outputs(
    training: Training, val_set: SegmentationDataset, args: argparse.Namespace, start: Start, notes: list[str]
) -> EpochOutputs:
    """Begin, in rank 0, the log and run.json of a run that is about to train; return what writes its epochs.

    A resume writes anew all that follows from last.pth.tar. notes are lines for the log.
    """
    outputs = EpochOutputs(args.model_dir)
    if not devices.is_main():
        return outputs
    if args.overwrite:
        remove_outputs(args.model_dir)
    for unfinished in existing(args.model_dir, [f".{name}.*.tmp" for name in (*WRITTEN, "run.json")]):
        unfinished.unlink()  # of a run that was killed
    set_logger(args.model_dir / "train.log")
    if training.stop_reason is None:  # else run.json would name params and data that trained nothing
        write_provenance(args.model_dir, training.device, start)
    for line in notes:
        logging.info(line)
    if args.tensorboard:
        outputs.trackers.append(TensorBoard(args.model_dir, first=max(1, training.epoch)))
    if start.state:
        outputs.write_rest(start.state, sample_predictions(training, val_set))
        best = training.metrics["best"]
        if not holds(args.model_dir / "best.pth.tar", best.get("weights")):
            logging.info(f"best.pth.tar, of epoch {best['epoch']}, is gone; a better epoch will write one")
    return outputs


def holds(file: Path, digest: str | None) -> bool:
    """Return whether a checkpoint is there and has the weights of a digest, where that is known."""
    with suppress(UserError):  # absent or damaged
        return digest in (None, weights_digest(predicting_weights(load_checkpoint(file))))
    return False


class TensorBoard:
    """Writes events for TensorBoard, from the first epoch on that a run, or a resume, writes."""

    def __init__(self, model_dir: Path, *, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(model_dir / "tensorboard", purge_step=first)

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
        values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(params).items()}
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
    model = training.eval_model.eval()
    inputs = to_input(images, training.device, **devices.input_options(training.model, params))
    with devices.autocast(training.device, params.precision):
        logits = torch.cat([model(part) for part in inputs.split(params.scoring_batch_size)])
    parts = zip(images.permute(0, 2, 3, 1), labels, logits.argmax(1).cpu(), strict=True)
    photos = zip(parts, photo_edges(images, labels, dataset.padding).tolist(), strict=True)
    shown = [
        [part[top:bottom, left:right].numpy() for part in example] for example, (left, top, right, bottom) in photos
    ]
    return comparison(shown, dataset.class_names, title=f"epoch {training.epoch}")


def epoch_line(training: Training) -> str:
    record, params = training.history[-1], training.params
    shown = dict.fromkeys(("mIoU", "pixel_accuracy", params.best_metric))
    values = [f"{key.replace('_', ' ')} {spelt(record['val'].get(key))}" for key in shown if key != "loss"]
    left = record["seconds"] * (params.num_epochs - record["epoch"])
    return (
        f"epoch {record['epoch']}/{params.num_epochs}: "
        f"train loss {record['train']['loss']:.4f}, val loss {record['val']['loss']:.4f}, "
        f"{', '.join(values)}, lr {record['learning_rate']:.3g}, "
        f"{record['seconds']:.1f} s, {record['images_per_second']:.1f} images/s"
        f"{'' if training.stop_reason else f', {duration(left)} left'}"
        f"{' (best)' if training.metrics['best']['epoch'] == training.epoch else ''}"
    )


def spelt(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 40 s, 23 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
