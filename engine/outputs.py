"""What an epoch shows and leaves behind: progress, metrics, pictures, events, checkpoints."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine import ranks
from engine.checkpoints import save_checkpoint
from engine.devices import autocast, input_options
from engine.training import Training, scalars
from model.data_loader import SegmentationDataset
from model.transforms import photo_edges, to_input
from params import Params
from utils import save_figure, save_picture, write_history, write_json
from visualize import comparison, training_curves

LINE_INTERVAL = 30.0  # seconds at least between two lines about an epoch, where no progress bar is drawn
DRAWING_INTERVAL = 10.0  # seconds between two drawings of curves.png, or short epochs would wait for it


class EpochProgress:
    """A bar over the images of an epoch; without a terminal a line for every tenth of a long one.

    Args:
        training: whose next epoch this is.
        sizes: images per batch.
    """

    def __init__(self, training: Training, sizes: list[int]):
        self.title = f"epoch {training.epoch + 1}/{training.params.num_epochs}"
        self.steps, self.said = len(sizes), time.monotonic()
        self.bar = tqdm(total=sum(sizes), desc=self.title, unit="img", leave=False, disable=ranks.bar_disabled())

    def __enter__(self) -> "EpochProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, images: int, losses: torch.Tensor) -> None:
        """Count a batch; losses has one value per step so far, and is read only where it is shown."""
        if self.bar.update(images):
            self.bar.set_postfix(loss=f"{losses.mean():.4f}", refresh=False)
        elif self.bar.disable and ends_a_tenth(len(losses), self.steps) and self._long_ago():
            self.said = time.monotonic()
            logging.info(f"{self.title}: {len(losses) / self.steps:.0%}, train loss {losses.mean():.4f}")

    def _long_ago(self) -> bool:
        return time.monotonic() - self.said > LINE_INTERVAL


def ends_a_tenth(step: int, steps: int) -> bool:
    """Return whether a step, counted from 1, completes one of the first nine tenths of all steps."""
    return 10 * (step - 1) // steps < 10 * step // steps < 10


class EpochOutputs:
    """Writes what the end of an epoch leaves in an experiment folder.

    Args:
        model_dir: the folder.
    """

    def __init__(self, model_dir: Path):
        self.model_dir = model_dir
        self.trackers: list[TensorBoard] = []
        self.drawn = time.monotonic()  # as if just now: the first epoch of a short run does not wait for a drawing

    def write_epoch(self, training: Training, val_set: SegmentationDataset) -> None:
        """Write metrics, pictures and events of the last epoch, then the checkpoints.

        The checkpoints come last, so that a resume repeats whatever was cut short; best.pth.tar after last.pth.tar,
        from which a resume can make it.
        """
        record = training.history[-1]
        self.write_metrics(training)
        picture = sample_predictions(training, val_set)
        save_picture(picture, self.model_dir / "samples.png")
        if training.finished or time.monotonic() - self.drawn > DRAWING_INTERVAL:
            self.draw_curves(training)
        for tracker in self.trackers:
            tracker.log(record, picture)
        save_checkpoint(training.state_dict(), self.model_dir / "last.pth.tar")
        logging.info(epoch_line(record, training.params, is_best=training.is_best))
        if training.is_best:
            self.save_best(training)

    def write_metrics(self, training: Training) -> None:
        """Write history.jsonl and the validation metrics of the last and the best epoch."""
        write_history(self.model_dir, training.history)
        for name, metrics in training.metrics.items():
            write_json(self.model_dir / f"metrics_val_{name}_weights.json", metrics)

    def draw_curves(self, training: Training) -> None:
        """Draw curves.png."""
        save_figure(training_curves(training.history), self.model_dir / "curves.png")
        self.drawn = time.monotonic()

    def save_best(self, training: Training) -> None:
        """Write best.pth.tar."""
        save_checkpoint(training.eval_state_dict(), self.model_dir / "best.pth.tar")

    def close(self, training: Training) -> None:
        """End the events, and delete last.pth.tar of a finished run where params.json asks for that."""
        for tracker in self.trackers:
            tracker.close(training.params, training.metrics["best"])
        if not training.params.keep_last:
            (self.model_dir / "last.pth.tar").unlink()


class TensorBoard:
    """Writes events for TensorBoard; a resume starts after an epoch."""

    def __init__(self, model_dir: Path, *, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _leave_disk_errors_to_the_main_thread
        self.folder = model_dir / "tensorboard"
        with self._naming_the_folder():
            self.writer = SummaryWriter(self.folder, purge_step=epoch + 1)

    def log(self, record: dict, picture: Image.Image) -> None:
        """Write an epoch of history.jsonl and samples.png."""
        epoch = record["epoch"]
        values = {f"{metric}/{part}": value for part in ("train", "val") for metric, value in record[part].items()}
        values |= {key: record[key] for key in ("learning_rate", "images_per_second")}
        with self._naming_the_folder():
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
        with self._naming_the_folder():
            self.writer.add_hparams(values, found, run_name=".")  # in this folder, not in one below it
            self.writer.close()

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """Let an error of the disk say where it was met."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.folder)
            raise


def _leave_disk_errors_to_the_main_thread(args: threading.ExceptHookArgs) -> None:
    # What the writer's own thread has met, its next flush() raises; a traceback beside that line helps nobody.
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


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
