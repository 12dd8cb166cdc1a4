"""Train one experiment: model_dir/params.json in, checkpoints and metrics out."""

import argparse
import logging
import math
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine import distributed, ranks
from engine.checkpoints import agreed_class_names, save_checkpoint
from engine.cli import experiment_parser, require, run_main, stopping_together
from engine.devices import autocast, loading_options, resolve_precision, seed_everything, to_device
from engine.distributed import stop_together
from engine.experiment import remove_outputs
from engine.run import (
    digest,
    explained_end,
    read_checkpoint,
    refuse_other_lists,
    say_finished,
    take_folder,
    unfinished_files,
    write_provenance,
)
from engine.training import Training, start_from
from evaluate import evaluate
from model import UserError
from model.data_loader import Loader, SegmentationDataset, Split, class_names, data_root, make_loader
from model.losses import SegmentationLoss
from model.metrics import ConfusionMatrix
from model.net import FCN_GCN
from model.transforms import to_input
from params import Params
from utils import RunFailed, save_figure, save_picture, set_logger, write_history, write_json
from visualize import comparison, training_curves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAYING_INTERVAL = 30.0  # seconds at least between two lines about an epoch, where no progress bar is drawn
DRAWING_INTERVAL = 10.0  # seconds between two drawings of curves.png, or short epochs would wait for it
SCALARS = ("loss", "mIoU", "pixel_accuracy", "mean_accuracy", "frequency_weighted_IoU", "mean_dice")


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from last.pth.tar if model_dir has one, else start: for queues"
    )
    start.add_argument("--restore_file", help="continue the run in model_dir from this checkpoint, as last")
    start.add_argument(
        "--init_from", type=Path, metavar="FILE", help="start a new run from the weights of this checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in model_dir")
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard to model_dir too")
    args = parser.parse_args()
    if (args.resume or args.restore_file is not None) and args.overwrite:
        flag = "--resume" if args.resume else "--restore_file"
        parser.error(f"{flag} continues a run, --overwrite deletes it: give one of them")
    return args


def train_epoch(training: Training, loader: Loader) -> dict:
    """One pass over the training data. Returns the mean loss over images, the metrics of what was predicted for each
    batch while it was trained on, and the learning rate of the last step.

    Raises RunFailed at the first loss that is not finite, found within save_summary_steps steps.
    """
    training.model.train()
    params = training.params
    device, criterion = training.device, SegmentationLoss(params.loss_weights, over_processes=True)
    matrix = ConfusionMatrix(params.num_classes, device)
    losses = torch.zeros(len(loader), device=device)  # stays on the device: reading it at every step would wait for it
    sizes, rates = loader.batch_sampler.sizes, []  # of whole batches
    title, said = f"epoch {training.epoch + 1}/{params.num_epochs}", time.monotonic()
    with tqdm(total=sum(sizes), desc=title, unit="img", leave=False, disable=ranks.bar_disabled()) as bar:
        for step, (images, labels) in enumerate(loader):
            stop_together()
            position = step % params.accumulation_steps
            group = min(params.accumulation_steps, len(loader) - step + position)  # the last one may be smaller
            last_of_group = position + 1 == group
            labels = labels.to(device, non_blocking=True)
            with (
                training.share_of(sizes[step], last_of_group=last_of_group),
                autocast(device, params.precision),
            ):
                logits = training.forward(to_input(images, device, **params.input_options()))
            loss = criterion(logits, labels)
            losses[step] = loss.detach()
            rates.append(training.optimizer.param_groups[0]["lr"])
            training.step(loss / group, last_of_group=last_of_group)
            matrix.update(logits.argmax(1), labels)
            if step % params.save_summary_steps == 0:
                stop_if_not_finite(losses[: step + 1], rates, training)
            if bar.update(sizes[step]):
                bar.set_postfix(loss=f"{losses[: step + 1].mean():.4f}", refresh=False)
            elif bar.disable and ends_a_tenth(step, len(loader)) and time.monotonic() - said > SAYING_INTERVAL:
                loss, said = losses[: step + 1].mean(), time.monotonic()
                logging.info(f"{title}: {(step + 1) / len(loader):.0%}, train loss {loss:.4f}")
    stop_if_not_finite(losses, rates, training)
    matrix.reduce()
    mean = (losses.double().cpu() @ torch.tensor(sizes, dtype=torch.float64)).item() / sum(sizes)
    return {"loss": mean, "learning_rate": rates[-1], **matrix.compute()}


def ends_a_tenth(step: int, steps: int) -> bool:
    """Whether a step, counted from 0, completes one of the first nine tenths of all steps."""
    return 10 * step // steps < 10 * (step + 1) // steps < 10


def stop_if_not_finite(losses: torch.Tensor, rates: list[float], training: Training) -> None:
    """Raise RunFailed naming the first loss of the epoch that is infinite or not a number."""
    if not (bad := losses.isfinite().logical_not().nonzero()).numel():
        return
    step = bad[0].item()
    raise RunFailed(
        f"the loss became {losses[step].item()} at step {step + 1} of epoch {training.epoch + 1}, "
        f"at learning rate {rates[step]:g}; {way_back(training)}"
    )


def way_back(training: Training) -> str:
    """What is left of a run that has diverged, and what to do about it."""
    kept = f"last.pth.tar holds epoch {training.epoch}" if training.epoch else "no checkpoint was written yet"
    return f'{kept}. Lower "learning_rate", or set "clip_grad_norm"'


def train(
    training: Training, train_loader: Loader, val_loader: Loader, model_dir: Path, *, board: "SummaryWriter | None"
) -> None:
    """Train until num_epochs or the early stop, and write every output of an epoch when it ends."""
    params, drawn = training.params, -math.inf
    while not training.finished:
        start = time.perf_counter()
        train_loader.batch_sampler.set_epoch(training.epoch)
        train_metrics = train_epoch(training, train_loader)
        train_seconds = time.perf_counter() - start
        val_metrics = evaluate(training.predictor, val_loader, params, training.device)
        stop_together()
        if val_metrics["loss"] is None or not training.is_finite():
            raise RunFailed(
                f"epoch {training.epoch + 1} ended with weights, optimizer or validation loss not finite, "
                f"at learning rate {train_metrics['learning_rate']:g}; {way_back(training)}"
            )

        training.epoch += 1
        score = val_metrics["mIoU"] or 0.0
        if is_best := score > training.best_mIoU:
            training.best_epoch, training.best_mIoU = training.epoch, score
        record = {
            "epoch": training.epoch,
            "train": {key: train_metrics[key] for key in SCALARS},
            "val": {key: val_metrics[key] for key in SCALARS},
            "learning_rate": train_metrics["learning_rate"],
            "seconds": round(time.perf_counter() - start, 3),
            "images_per_second": round(len(train_loader.dataset) / train_seconds, 2),
        }
        training.history.append(record)
        training.metrics["last"] = {"epoch": training.epoch, **val_metrics}
        if is_best:
            training.metrics["best"] = training.metrics["last"]
        if ranks.is_main():
            write_metrics(training, model_dir)
            picture = sample_predictions(training, val_loader.dataset)
            save_picture(picture, model_dir / "samples.png")
            if training.finished or time.monotonic() - drawn > DRAWING_INTERVAL:
                draw_curves(training, model_dir)
                drawn = time.monotonic()
            if board:
                log_to_board(board, record, picture)
            # After the other outputs, so that a resume repeats whatever was cut short.
            save_checkpoint(training.state_dict(), model_dir / "last.pth.tar")
            logging.info(describe(record, params, is_best=is_best))
            if is_best:  # after last.pth.tar, from which a resume can make it
                save_checkpoint(training.state_to_predict(), model_dir / "best.pth.tar")
        stop_together()
    logging.info(
        f"{training.finished}; best mIoU {training.best_mIoU:.4f} at epoch {training.best_epoch}, in {model_dir}"
    )
    if ranks.is_main() and not params.keep_last:
        (model_dir / "last.pth.tar").unlink()


def write_metrics(training: Training, model_dir: Path) -> None:
    """Write history.jsonl and the validation metrics of the last and the best epoch."""
    write_history(model_dir, training.history)
    for name, metrics in training.metrics.items():
        write_json(model_dir / f"metrics_val_{name}_weights.json", metrics)


def draw_curves(training: Training, model_dir: Path) -> None:
    """Write curves.png."""
    save_figure(training_curves(training.history), model_dir / "curves.png")


def log_to_board(board: "SummaryWriter", record: dict, picture: Image.Image) -> None:
    """Write an epoch of history.jsonl and samples.png as TensorBoard's events."""
    epoch = record["epoch"]
    for part in ("train", "val"):
        for metric, value in record[part].items():
            if value is not None:
                board.add_scalar(f"{metric}/{part}", value, epoch)
    board.add_scalar("learning_rate", record["learning_rate"], epoch)
    board.add_scalar("images_per_second", record["images_per_second"], epoch)
    board.add_image("samples", np.array(picture), epoch, dataformats="HWC")
    board.flush()


def open_board(model_dir: Path, *, epoch: int) -> "SummaryWriter":
    """A writer of events after an epoch, from which a resume starts."""
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _leave_disk_errors_to_the_main_thread
    return SummaryWriter(model_dir / "tensorboard", purge_step=epoch + 1)


def _leave_disk_errors_to_the_main_thread(args: threading.ExceptHookArgs) -> None:
    # What the writer's own thread has met, its next flush() raises; a traceback beside that line helps nobody.
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


@torch.inference_mode()
def sample_predictions(training: Training, dataset: SegmentationDataset, count: int = 6) -> Image.Image:
    """Validation photos spread evenly over the list, the same ones every time, with truth and prediction."""
    params = training.params
    shown = min(count, len(dataset))
    examples = [dataset[place * len(dataset) // shown] for place in range(shown)]  # neighbours may be frames of a video
    images, labels = (torch.stack(part) for part in zip(*examples, strict=True))
    with autocast(training.device, params.precision):
        logits = training.predictor.eval()(to_input(images, training.device, **params.input_options()))
    photos, predictions = images.permute(0, 2, 3, 1).numpy(), logits.argmax(1).cpu().numpy()
    return comparison(photos, labels.numpy(), predictions, dataset.class_names)


def describe(record: dict, params: Params, *, is_best: bool) -> str:
    """An epoch in one line for people."""
    val = record["val"]
    shown = {key: "-" if val[key] is None else f"{val[key]:.4f}" for key in ("mIoU", "pixel_accuracy")}
    return (
        f"epoch {record['epoch']}/{params.num_epochs}: "
        f"train loss {record['train']['loss']:.4f}, val loss {val['loss']:.4f}, "
        f"mIoU {shown['mIoU']}, pixel accuracy {shown['pixel_accuracy']}, lr {record['learning_rate']:.3g}, "
        f"{record['seconds']:.1f} s, {record['images_per_second']:.1f} images/s{' (best)' if is_best else ''}"
    )


def find_data(params: Params, data_dir: Path) -> tuple[Split, Split, list[str]]:
    """train_split, val and the class names. Raises UserError for every fault that shows without decoding a photo."""
    root = data_root(params.dataset, data_dir)
    train_split = Split.find(root, params.train_split, masks_required=True)
    val_split = Split.find(root, "val", masks_required=True)
    count, processes = len(train_split.ids), ranks.world_size()
    if params.batch_size % processes:
        below = params.batch_size // processes * processes
        nearest = f"{below} or {below + processes}" if below else f"{processes}"
        raise UserError(
            f'"batch_size" is {params.batch_size}, the images of a step in all processes together, and cannot be '
            f"divided among {processes}; use {nearest}"
        )
    if params.batch_size > count:
        raise UserError(f'"batch_size" is {params.batch_size}, but {params.train_split} has {count} images; lower it')
    if (count % params.batch_size or params.batch_size) == 1 and params.stem_maxpool and params.image_size <= 32:
        raise UserError(
            f'"batch_size" {params.batch_size} leaves a batch of one among {count} images, and at "image_size" '
            f"{params.image_size} it gives batch norm a single value a channel; change one of the two"
        )
    return train_split, val_split, class_names(root, params.num_classes)


def make_loaders(
    train_split: Split, val_split: Split, names: list[str], params: Params, device: torch.device
) -> tuple[Loader, Loader]:
    """Decode both splits, or find them decoded, and load them in batches. Raises UserError naming every faulty file."""
    options = {"class_names": names, "image_size": params.image_size, "cache": params.cache}
    train_set = SegmentationDataset(train_split, augment=params.augment, **options)
    val_set = SegmentationDataset(val_split, **options)
    loading = {"device": device, **loading_options(params)}
    return (
        make_loader(train_set, batch_size=params.batch_size, seed=params.seed, **loading),
        make_loader(val_set, batch_size=params.scoring_batch_size, **loading),
    )


def main(args: argparse.Namespace) -> None:
    require("matplotlib", "curves.png")
    if args.tensorboard:
        require("torch.utils.tensorboard", "events")
    with distributed.processes(args.device) as device, ExitStack() as held:
        params = distributed.from_main(lambda: resolve_precision(Params.load(args.model_dir / "params.json"), device))
        if finished := distributed.from_main(lambda: take_folder(params, args, held)):
            say_finished(finished, args)
            return
        with explained_end(args):
            run(params, device, args)


def run(params: Params, device: torch.device, args: argparse.Namespace) -> None:
    """Train in a folder that is this run's alone."""
    checkpoint_file, checkpoint = distributed.from_main(lambda: read_checkpoint(params, args))
    data = distributed.first_here(lambda: find_data(params, args.data_dir))
    refuse_other_lists(*data[:2])

    seed_everything(params.seed, deterministic=params.deterministic)
    new_encoder = params.pretrained and not (checkpoint or args.init_from) and ranks.is_main()
    with distributed.together():
        model = FCN_GCN(**params.network_options(), pretrained=new_encoder)
        fresh_layers = start_from(model, args.init_from) if args.init_from and ranks.is_main() else ""
    to_device(model, params, device)
    train_loader, val_loader = distributed.first_here(lambda: make_loaders(*data, params, device))
    training = Training(model, params, steps_per_epoch=-(-len(train_loader) // params.accumulation_steps))
    training.class_names = data[2]
    training.images = digest(data[0])
    if checkpoint:
        with distributed.together():
            root = data_root(params.dataset, args.data_dir)
            agreed_class_names(checkpoint, checkpoint_file, root, params.num_classes)
            training.load_state_dict(checkpoint, checkpoint_file)
        if training.finished:
            say_finished(training.finished, args)
            return

    board = None
    if ranks.is_main():
        if args.overwrite:
            remove_outputs(args.model_dir, keep_log=args.resume)  # which a sweep writes to already
        for path in unfinished_files(args.model_dir):
            path.unlink()
        set_logger(args.model_dir / "train.log")
        write_provenance(args.model_dir, device, params, args.data_dir, resumed=checkpoint is not None)
        sizes = f"{len(train_loader.dataset)} images of {params.train_split}, {len(val_loader.dataset)} of val"
        logging.info(f"{args.model_dir}: {sizes}, on {ranks.describe(device)} in {params.precision}")
        if params.num_channels is not None:
            logging.info('"num_channels" is accepted for old params.json files; this network has no use for it')
        if fresh_layers:
            logging.info(f"{args.init_from} has another number of classes; these layers start afresh: {fresh_layers}")
        if checkpoint:
            take_up(training, checkpoint, checkpoint_file, args.model_dir)
        board = open_board(args.model_dir, epoch=training.epoch) if args.tensorboard else None
    with stopping_together():
        train(training, train_loader, val_loader, args.model_dir, board=board)


def take_up(training: Training, checkpoint: dict, file: Path, model_dir: Path) -> None:
    """Bring the other outputs to where a checkpoint is, from which a kill or a full disk may have parted them."""
    changed = [key for key, value in asdict(training.params).items() if checkpoint["params"].get(key) != value]
    if checkpoint.get("images") != training.images:
        changed.append("the list of training images")
    logging.info(f"continuing after epoch {training.epoch}; changed since: {', '.join(changed) or 'nothing'}")
    write_metrics(training, model_dir)
    draw_curves(training, model_dir)
    if file.name == "last.pth.tar" and training.epoch == training.best_epoch:
        save_checkpoint(training.state_to_predict(), model_dir / "best.pth.tar")


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
