"""Train one experiment: model_dir/params.json in, checkpoints and metrics out."""

import argparse
import copy
import hashlib
import logging
import math
import os
import re
import shlex
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import distributed
import utils
from utils import Params, RunFailed


def parse_args() -> argparse.Namespace:
    parser = utils.experiment_parser(__doc__)
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


# Before the seconds that importing torch takes, so that --help and a typing error answer at once.
if __name__ == "__main__":
    ARGS = parse_args()
    utils.end_at_once_on_interrupt()

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

from evaluate import evaluate
from model import UserError
from model.data_loader import Loader, SegmentationDataset, Split, class_names, data_root, make_loader
from model.losses import SegmentationLoss
from model.metrics import ConfusionMatrix
from model.net import FCN_GCN
from model.parallel import copy_to_all, share, synchronize_batch_norm
from model.transforms import to_input
from visualize import comparison, training_curves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SAYING_INTERVAL = 30.0  # seconds at least between two lines about an epoch, where no progress bar is drawn
DRAWING_INTERVAL = 10.0  # seconds between two drawings of curves.png, or short epochs would wait for it
SCORE_LAYERS = ("gcn", "br")  # what the names of their tensors begin with
RESUME_NEEDS = (*utils.ARCHITECTURE, "normalize", "optimizer", "dataset")  # as they were
SCALARS = ("loss", "mIoU", "pixel_accuracy", "mean_accuracy", "frequency_weighted_IoU", "mean_dice")


class Training:
    """All that changes while a network is trained, and nothing else: state_dict() is what a resume needs.

    Several processes each have one, and all are alike: the network begins as that of rank 0, and batch norm, dropout
    and the loss are those of the whole batch, of which each process has its share.

    Args:
        model: the network, on its device.
        params: the experiment.
        steps_per_epoch: optimizer steps, that is batches divided by accumulation_steps, rounded up.
    """

    def __init__(self, model: nn.Module, params: Params, steps_per_epoch: int):
        self.params = params
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        self.model = self.forward = model
        self.distributed = None
        if distributed.world_size() > 1:
            self.model = synchronize_batch_norm(model, self.device)
            copy_to_all(self.model)
            self.distributed = self.forward = distribute(self.model, self.device)
        if params.compile:
            self.forward = torch.compile(self.forward, mode=compile_mode(self.device, params), dynamic=False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if params.ema_decay is not None else None
        self.ema_updates = 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=params.precision == "fp16")
        self.optimizer = build_optimizer(self.model, params)
        self.schedule = build_schedule(self.optimizer, params, steps_per_epoch)
        self.epoch = 0  # finished ones
        self.best_epoch = 0
        self.best_mIoU = -1.0
        self.history: list[dict] = []  # what history.jsonl holds
        self.metrics: dict[str, dict] = {}  # of validation, at the "last" and at the "best" epoch
        self.images = ""  # a digest of the list that is trained on
        self.class_names: list[str] = []

    @property
    def finished(self) -> str:
        """Why there is nothing left to train; "" if there is."""
        return utils.why_finished(self.epoch, self.best_epoch, self.params)

    @property
    def predictor(self) -> nn.Module:
        """The network to evaluate: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema

    def share_of(self, batch_size: int, *, last_of_group: bool) -> AbstractContextManager:
        """In it, forward() is given this process's share of a batch.

        Gradients are added up over the processes after the last batch of a group only.
        """
        if self.distributed is None:
            return nullcontext()
        first = share(batch_size, distributed.rank(), distributed.world_size()).start
        self.model.dropout.whole = first, batch_size  # of no effect where there is none
        return nullcontext() if last_of_group else self.distributed.no_sync()

    def step(self, loss: torch.Tensor, *, last_of_group: bool) -> None:
        """Accumulate the gradient of loss; with the last loss of a group, update the weights."""
        self.scaler.scale(loss).backward()
        if not last_of_group:
            return
        if self.params.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.params.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():  # fp16 skips the optimizer step, rightly, when the scale was too high
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.schedule.step()
        if self.ema is not None:
            self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Of the weights and of batch norm's statistics; its counters are copied, and so is everything at first.

        Not torch's AveragedModel, whose own counter makes the host wait for the GPU at every update.
        """
        if self.ema_updates == 0:
            self.ema.load_state_dict(self.model.state_dict())
        else:
            averaged, current = list(self.ema.parameters()), list(self.model.parameters())
            for average, now in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                if average.is_floating_point():
                    averaged.append(average)
                    current.append(now)
                else:
                    average.copy_(now)
            torch._foreach_lerp_(averaged, current, 1 - self.params.ema_decay)
        self.ema_updates += 1

    def is_finite(self) -> bool:
        """Whether every weight, running statistic and number of the optimizer is finite."""
        states = self.optimizer.state.values()
        tensors = [*self.model.state_dict().values(), *(value for state in states for value in state.values())]
        return all(torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).tolist())

    def state_to_predict(self) -> dict:
        """What evaluation, prediction and export need of a checkpoint: the weights, averaged where there is an average,
        and what they stand for.
        """
        return {
            "epoch": self.epoch,
            "state_dict": self.predictor.state_dict(),
            "class_names": self.class_names,
            "params": asdict(self.params),
        }

    def state_dict(self) -> dict:
        """All that a resume needs, as tensors and plain values; epoch, state_dict and optim_dict are the names that the
        original implementation has.
        """
        return {
            "epoch": self.epoch,
            "state_dict": self.model.state_dict(),
            "optim_dict": self.optimizer.state_dict(),
            "ema_state_dict": None if self.ema is None else self.ema.state_dict(),
            "ema_updates": self.ema_updates,
            "scaler": self.scaler.state_dict(),
            "best_epoch": self.best_epoch,
            "best_mIoU": self.best_mIoU,
            "history": self.history,
            "metrics": self.metrics,
            "images": self.images,
            "class_names": self.class_names,
            "job": distributed.job(),
            "rng": torch.get_rng_state(),  # the same in every process
            "rng_cuda": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
            "params": asdict(self.params),
        }

    def load_state_dict(self, state: dict, source: Path) -> None:
        """Continue from a checkpoint. Options of the optimizer and the schedule are those of params.json as it is now.

        Raises UserError when the checkpoint is damaged, or holds weights only, or those of another network.
        """
        if "rng" not in state:
            raise UserError(
                f"{source} holds weights to predict with and no training state; continue from last.pth.tar, or start "
                "from these weights with --init_from, in another --model_dir"
            )
        utils.load_weights(self.model, state["state_dict"], source)
        if self.ema is not None and state.get("ema_state_dict") is not None:
            utils.load_weights(self.ema, state["ema_state_dict"], source)
        try:
            self._load_rest(state)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if utils.is_out_of_memory(error):
                raise
            raise UserError(f"{source} is damaged: its training state cannot be what it says ({error!r})") from None

    def _load_rest(self, state: dict) -> None:
        """Whatever of the state is not weights; any error means that it is not sound."""
        epoch, best_epoch, best_mIoU = state["epoch"], state["best_epoch"], state["best_mIoU"]
        if type(best_epoch) is not int or not 0 <= best_epoch <= epoch or not utils.is_number(best_mIoU):
            raise ValueError(f"epoch {epoch}, best_epoch {best_epoch}, best_mIoU {best_mIoU}")
        self.epoch, self.best_epoch, self.best_mIoU = epoch, best_epoch, best_mIoU
        self.history, self.metrics = [dict(record) for record in state["history"]], dict(state["metrics"])
        if [record["epoch"] for record in self.history] != list(range(1, epoch + 1)):
            raise ValueError("history")
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optim_dict"]["state"]})
        for weight, buffers in self.optimizer.state.items():
            for name, buffer in buffers.items():
                if buffer is not None and buffer.shape not in (weight.shape, ()):
                    raise ValueError(f"optimizer {name}")
        if not self.is_finite():
            raise UserError(
                "weights, or what the optimizer knows of them, are not finite: the run has diverged; start anew with a "
                'lower "learning_rate" or with "clip_grad_norm"'
            )
        if self.ema is not None and state["ema_state_dict"] is not None:
            self.ema_updates = int(state["ema_updates"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # steps of the schedule without steps of the optimizer
            for _ in range(self.epoch * self.steps_per_epoch):
                self.schedule.step()
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["rng_cuda"]:
            torch.cuda.set_rng_state(state["rng_cuda"][0], self.device)


def distribute(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network in a form that adds up the gradients of all processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers`")  # has another name from PyTorch 2.15 on
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,
            broadcast_buffers=False,  # batch norm's are alike already
            gradient_as_bucket_view=True,
        )


def compile_mode(device: torch.device, params: Params) -> str:
    """On a GPU with CUDA graphs, for launching hundreds of kernels takes its time.

    Not where gradients are accumulated: they would lie in memory that the next batch's graph writes to. Nor where
    processes exchange them, which would have to be in the graph.
    """
    alone = params.accumulation_steps == 1 and distributed.world_size() == 1
    return "reduce-overhead" if device.type == "cuda" and alone else "default"


def build_optimizer(model: nn.Module, params: Params) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, over all parameters, in PyTorch's fused form."""
    options = {"lr": params.learning_rate, "weight_decay": params.weight_decay, "fused": True}
    if params.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), momentum=params.momentum, **options)


def build_schedule(optimizer: torch.optim.Optimizer, params: Params, steps_per_epoch: int) -> lr_scheduler.LRScheduler:
    """The rate of every optimizer step: linear warm-up, then constant, or down to 0 as (1 - t)^0.9 or half a cosine."""
    warmup = params.warmup_epochs * steps_per_epoch
    rest = params.num_epochs * steps_per_epoch - warmup
    main = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "poly": lambda: lr_scheduler.PolynomialLR(optimizer, total_iters=rest, power=0.9),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest),
    }[params.schedule]
    if warmup == 0:
        return main()
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main()], milestones=[warmup])


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
    with tqdm(total=sum(sizes), desc=title, unit="img", leave=False, disable=distributed.bar_disabled()) as bar:
        for step, (images, labels) in enumerate(loader):
            utils.stop_together()
            position = step % params.accumulation_steps
            group = min(params.accumulation_steps, len(loader) - step + position)  # the last one may be smaller
            last_of_group = position + 1 == group
            labels = labels.to(device, non_blocking=True)
            with (
                training.share_of(sizes[step], last_of_group=last_of_group),
                utils.autocast(device, params.precision),
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
        utils.stop_together()
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
        if distributed.is_main():
            write_metrics(training, model_dir)
            picture = sample_predictions(training, val_loader.dataset)
            utils.save_picture(picture, model_dir / "samples.png")
            if training.finished or time.monotonic() - drawn > DRAWING_INTERVAL:
                draw_curves(training, model_dir)
                drawn = time.monotonic()
            if board:
                log_to_board(board, record, picture)
            # After the other outputs, so that a resume repeats whatever was cut short.
            utils.save_checkpoint(training.state_dict(), model_dir / "last.pth.tar")
            logging.info(describe(record, params, is_best=is_best))
            if is_best:  # after last.pth.tar, from which a resume can make it
                utils.save_checkpoint(training.state_to_predict(), model_dir / "best.pth.tar")
        utils.stop_together()
    logging.info(
        f"{training.finished}; best mIoU {training.best_mIoU:.4f} at epoch {training.best_epoch}, in {model_dir}"
    )
    if distributed.is_main() and not params.keep_last:
        (model_dir / "last.pth.tar").unlink()


def write_metrics(training: Training, model_dir: Path) -> None:
    """Write history.jsonl and the validation metrics of the last and the best epoch."""
    utils.write_history(model_dir, training.history)
    for name, metrics in training.metrics.items():
        utils.write_json(model_dir / f"metrics_val_{name}_weights.json", metrics)


def draw_curves(training: Training, model_dir: Path) -> None:
    """Write curves.png."""
    utils.save_figure(training_curves(training.history), model_dir / "curves.png")


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
    with utils.autocast(training.device, params.precision):
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


def start_from(model: nn.Module, file: Path) -> str:
    """Load weights only. Score layers stay as initialised if their class count differs; returns which those are."""
    checkpoint = utils.load_checkpoint(file, otherwise="use --init_from {file}")
    given, fresh = utils.predicting_weights(checkpoint), model.state_dict()

    def classes(state_dict: dict) -> list[tuple]:  # the last bias of a head has one value a class
        return [tensor.shape for name, tensor in state_dict.items() if re.fullmatch(r"gcn1\.(.+\.)?bias", name)][-1:]

    layers = ""
    if classes(given) != classes(fresh):
        given = {name: tensor for name, tensor in given.items() if not name.startswith(SCORE_LAYERS)}
        given |= {name: tensor for name, tensor in fresh.items() if name.startswith(SCORE_LAYERS)}
        layers = ", ".join(name for name, _ in model.named_children() if name.startswith(SCORE_LAYERS))
    utils.load_weights(model, given, file)
    return layers


def refuse_unclear(args: argparse.Namespace, earlier: list[Path]) -> None:
    """Raise UserError unless the flags say what is to become of an earlier run in the folder."""
    traces = [path.name for path in earlier if path.name != "train.log"]  # which a sweep opens before its trial starts
    if traces and args.restore_file is None and not args.overwrite:
        way_on = "continue it with --restore_file last, or " if "last.pth.tar" in traces else ""
        raise UserError(f"{args.model_dir} already holds a run ({traces[0]}); {way_on}delete it with --overwrite")
    if args.overwrite and args.init_from and os.path.realpath(args.init_from) in map(os.path.realpath, earlier):
        raise UserError(f"--overwrite would delete {args.init_from}; move it to another folder first")


def find_data(params: Params, data_dir: Path) -> tuple[Split, Split, list[str]]:
    """train_split, val and the class names. Raises UserError for every fault that shows without decoding a photo."""
    root = data_root(params.dataset, data_dir)
    train_split = Split.find(root, params.train_split, masks_required=True)
    val_split = Split.find(root, "val", masks_required=True)
    count, processes = len(train_split.ids), distributed.world_size()
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
    loading = {"device": device, **params.loading_options()}
    return (
        make_loader(train_set, batch_size=params.batch_size, seed=params.seed, **loading),
        make_loader(val_set, batch_size=params.scoring_batch_size, **loading),
    )


def main(args: argparse.Namespace) -> None:
    utils.require("matplotlib", "curves.png")
    if args.tensorboard:
        utils.require("torch.utils.tensorboard", "events")
    with distributed.processes(args.device) as device, ExitStack() as held:
        params = distributed.from_main(
            lambda: utils.resolve_precision(Params.load(args.model_dir / "params.json"), device)
        )
        if finished := distributed.from_main(lambda: take_folder(params, args, held)):
            say_finished(finished, args)
            return
        with explained_end(args):
            run(params, device, args)


def take_folder(params: Params, args: argparse.Namespace, held: ExitStack) -> str:
    """Hold model_dir for this run, and let the flags say how to begin there. Returns why all is done already, or "".

    Raises UserError for a folder that another train.py works in, or with which the flags do not say what to do.
    """
    if distributed.job() and not args.resume:
        take_up_own_run(args)
    if not args.resume:
        refuse_unclear(args, utils.outputs(args.model_dir))
    held.enter_context(utils.sole_run(args.model_dir))
    if (args.resume or args.restore_file == "last") and not (args.model_dir / "last.pth.tar").exists():
        history = utils.read_history(args.model_dir)
        if history and (finished := utils.why_finished(len(history), utils.best_epoch(history)["epoch"], params)):
            return finished
    if args.resume:
        resume_or_start(args)
    refuse_unclear(args, utils.outputs(args.model_dir))  # again: another run may have ended just before
    return ""


def resume_or_start(args: argparse.Namespace) -> None:
    """Let the flags go on from last.pth.tar if it is there, else start over what a run killed in its first epoch left.

    Raises UserError where a start would delete more than that.
    """
    if (args.model_dir / "last.pth.tar").exists():
        args.restore_file = "last"
    elif len(epochs := utils.read_history(args.model_dir)) > 1 or (args.model_dir / "best.pth.tar").exists():
        raise UserError(
            f"{args.model_dir} holds {len(epochs)} epochs and no last.pth.tar to continue from; start over with "
            "--overwrite, or from the weights of its best.pth.tar with --init_from, in another --model_dir"
        )
    else:
        args.overwrite = bool(utils.outputs(args.model_dir))


def say_finished(reason: str, args: argparse.Namespace) -> None:
    """Print why there is nothing left to train."""
    if distributed.is_main():
        print(f"nothing to do in {args.model_dir}: {reason}; raise num_epochs to train on")


def run(params: Params, device: torch.device, args: argparse.Namespace) -> None:
    """Train in a folder that is this run's alone."""
    checkpoint_file, checkpoint = distributed.from_main(lambda: read_checkpoint(params, args))
    data = distributed.first_here(lambda: find_data(params, args.data_dir))
    refuse_other_lists(*data[:2])

    utils.seed_everything(params.seed, deterministic=params.deterministic)
    new_encoder = params.pretrained and not (checkpoint or args.init_from) and distributed.is_main()
    with distributed.together():
        model = FCN_GCN(**params.network_options(), pretrained=new_encoder)
        fresh_layers = start_from(model, args.init_from) if args.init_from and distributed.is_main() else ""
    utils.to_device(model, params, device)
    train_loader, val_loader = distributed.first_here(lambda: make_loaders(*data, params, device))
    training = Training(model, params, steps_per_epoch=-(-len(train_loader) // params.accumulation_steps))
    training.class_names = data[2]
    training.images = digest(data[0])
    if checkpoint:
        with distributed.together():
            root = data_root(params.dataset, args.data_dir)
            utils.agreed_class_names(checkpoint, checkpoint_file, root, params.num_classes)
            training.load_state_dict(checkpoint, checkpoint_file)
        if training.finished:
            say_finished(training.finished, args)
            return

    board = None
    if distributed.is_main():
        if args.overwrite:
            utils.remove_outputs(args.model_dir, keep_log=args.resume)  # which a sweep writes to already
        for path in unfinished_files(args.model_dir):
            path.unlink()
        utils.set_logger(args.model_dir / "train.log")
        utils.write_provenance(args.model_dir, device, params, args.data_dir, resumed=checkpoint is not None)
        sizes = f"{len(train_loader.dataset)} images of {params.train_split}, {len(val_loader.dataset)} of val"
        logging.info(f"{args.model_dir}: {sizes}, on {distributed.describe(device)} in {params.precision}")
        if params.num_channels is not None:
            logging.info('"num_channels" is accepted for old params.json files; this network has no use for it')
        if fresh_layers:
            logging.info(f"{args.init_from} has another number of classes; these layers start afresh: {fresh_layers}")
        if checkpoint:
            take_up(training, checkpoint, checkpoint_file, args.model_dir)
        board = open_board(args.model_dir, epoch=training.epoch) if args.tensorboard else None
    with utils.stopping_together():
        train(training, train_loader, val_loader, args.model_dir, board=board)


def take_up_own_run(args: argparse.Namespace) -> None:
    """If torchrun has started this very job before, let the flags say how to go on with what that has done.

    What it has done says so itself: the name of the job is in run.json and in its checkpoints. Where no flag says
    otherwise, the same --rdzv_id is the same job.
    """
    by_id = not (args.restore_file or args.init_from or args.overwrite)
    if not any(distributed.is_this_job(start.get("job"), by_id=by_id) for start in utils.starts(args.model_dir)):
        return
    last = args.model_dir / "last.pth.tar"
    if not last.exists():
        args.overwrite |= not args.restore_file  # what this job has left before its first checkpoint
    elif distributed.is_this_job(utils.load_checkpoint(last).get("job"), by_id=by_id):
        args.restore_file, args.init_from, args.overwrite = "last", None, False


def read_checkpoint(params: Params, args: argparse.Namespace) -> tuple[Path | None, dict | None]:
    """What to continue from, if anything. Raises UserError if params.json does not allow it."""
    if args.restore_file is None:
        return None, None
    file = utils.checkpoint_path(args.model_dir, args.restore_file)
    if args.restore_file == "last" and not file.exists() and not params.keep_last:
        raise UserError(
            f'{file} was not kept ("keep_last": false); start from the weights of best.pth.tar with --init_from, '
            "in another --model_dir"
        )
    checkpoint = utils.load_checkpoint(
        file, otherwise="the weights of another can start a new run: --init_from {file}, in another --model_dir"
    )
    utils.refuse_changed(RESUME_NEEDS, checkpoint, params, file)
    return file, checkpoint


def digest(split: Split) -> str:
    """Of the ids of a list, in their order."""
    return hashlib.sha256("\n".join(split.ids).encode()).hexdigest()


def refuse_other_lists(train_split: Split, val_split: Split) -> None:
    """Raise UserError unless the lists of all machines are the same."""
    for split in (train_split, val_split):
        if len(set(distributed.gather(digest(split)))) > 1:
            with distributed.together():
                raise UserError(f"{split.name}.txt is not the same on all machines; copy one data set to all of them")


def take_up(training: Training, checkpoint: dict, file: Path, model_dir: Path) -> None:
    """Bring the other outputs to where a checkpoint is, from which a kill or a full disk may have parted them."""
    changed = [key for key, value in asdict(training.params).items() if checkpoint["params"].get(key) != value]
    if checkpoint.get("images") != training.images:
        changed.append("the list of training images")
    logging.info(f"continuing after epoch {training.epoch}; changed since: {', '.join(changed) or 'nothing'}")
    write_metrics(training, model_dir)
    draw_curves(training, model_dir)
    if file.name == "last.pth.tar" and training.epoch == training.best_epoch:
        utils.save_checkpoint(training.state_to_predict(), model_dir / "best.pth.tar")


def unfinished_files(model_dir: Path) -> list[Path]:
    """What a run that was killed had begun to write."""
    names = (
        *("last.pth.tar", "best.pth.tar", "history.jsonl", "run.json", "samples.png", "curves.png"),
        "metrics_val_*_weights.json",
    )
    return [path for name in names for path in model_dir.glob(f".{name}.*.tmp")]


@contextmanager
def explained_end(args: argparse.Namespace) -> Iterator[None]:
    """Say how to go on when a signal, a full disk or a lost process cuts a run short; leave nothing of one that never
    fitted memory. Of several processes rank 0 does so.
    """
    last = args.model_dir / "last.pth.tar"

    def version() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    before, earlier = version(), utils.outputs(args.model_dir)
    try:
        try:
            yield
        except RuntimeError as error:
            utils.stop_if_asked()  # a loader process, or another of the run, may have felt the signal first
            distributed.raise_if_lost(error)
            never_fitted = utils.is_out_of_memory(error) and args.restore_file is None and version() == before
            if never_fitted and distributed.is_main():
                for path in set(utils.outputs(args.model_dir)) - set(earlier):
                    path.unlink()
            raise
    except (KeyboardInterrupt, OSError) as error:
        utils.ignore_signals()  # torchrun sends some when a process of several has ended
        what = str(error) or ("terminated" if isinstance(error, utils.Terminated) else "interrupted")
        command = shlex.join(continuing_command(args, saved=version() not in (0, before)))
        raise type(error)(f"{what}; go on with: {command}") from None


def continuing_command(args: argparse.Namespace, *, saved: bool) -> list[str]:
    """The command line that goes on where this run has stopped; saved says whether it has written a checkpoint."""
    folders = ["--model_dir", str(args.model_dir), "--data_dir", str(args.data_dir)]
    command = [*distributed.launcher(), "train.py", *folders]
    if args.device != "auto":
        command += ["--device", args.device]
    if args.resume:
        return [*command, "--resume"]
    if saved or args.restore_file:
        return [*command, "--restore_file", "last" if saved else args.restore_file]
    if args.init_from:
        command += ["--init_from", str(args.init_from)]
    return [*command, "--overwrite"] if args.overwrite or utils.outputs(args.model_dir) else command


if __name__ == "__main__":
    raise SystemExit(utils.run_main(lambda: main(ARGS), shared=True))
