"""Train one experiment: model_dir/params.json in, checkpoints and metrics out."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import devices
from engine.checkpoints import init_from
from engine.cli import checkpoint_name, experiment_parser, key_and_value, require, run_main
from engine.evaluation import evaluate, make_dataset
from engine.run import (
    EpochOutputs,
    EpochProgress,
    Start,
    advising_to_resume,
    begin,
    changes_since,
    check_last_batch,
    find_splits,
    log_absent_classes,
    open_outputs,
    sole_run,
)
from engine.training import Training
from model.data_loader import Loader, check_classes, make_loader, seen_in_training, too_dark
from model.losses import SegmentationLoss
from model.metrics import Metrics
from model.net import FCN_GCN
from model.transforms import augment, cutmix, to_input
from params import Params


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)  # has --model_dir, --data_dir, --device
    resume = "continue from last.pth.tar if model_dir has one, else start"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--restore_file", type=checkpoint_name, help="last: another way to say --resume")
    weights = "a checkpoint whose weights a run starts from, unless it resumes"
    parser.add_argument("--init_from", type=Path, metavar="FILE", help=weights)
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in model_dir")
    changes = "values that take the place of those of params.json"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=changes)
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard to model_dir too")
    args, others = parser.parse_known_args()
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}; a key of params.json is set by --set KEY=VALUE")
    if args.restore_file not in (None, "last"):
        parser.error("a run resumes from last.pth.tar only; --init_from starts a new one from the weights of another")
    args.resume |= args.restore_file == "last"
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite deletes it: give one of them")
    args.set = key_and_value(args.set)
    return args


def train(training: Training, train_loader: Loader, val_loader: Loader, outputs: EpochOutputs) -> None:
    """Train until num_epochs or the early stop, and write what each epoch leaves."""
    while training.stop_reason is None:
        start = time.perf_counter()
        train_loader.batch_sampler.set_epoch(training.epoch)
        train_metrics = train_epoch(training, train_loader)
        speed = len(train_loader.dataset) / (time.perf_counter() - start)
        # Of the averaged weights, if any; the loss is that of each photo alone.
        scores = evaluate(training.eval_model, val_loader, training.params, training.device)
        training.check_epoch(train_metrics, scores.metrics)  # raises unless what is about to be saved is finite
        if training.epoch == 0 and devices.is_main():
            log_absent_classes(training, train_metrics["frequency"], [*scores.metrics["frequency"].values()])
        training.end_epoch(train_metrics, scores.metrics, seconds=time.perf_counter() - start, images_per_second=speed)
        if devices.is_main():
            outputs.write_epoch(training, val_loader.dataset)  # checkpoints, metrics, curves, a few photos
    if devices.is_main():
        outputs.finish(training)  # the last line of the log; with "keep_last" false no last.pth.tar stays


def train_epoch(training: Training, loader: Loader) -> dict:
    """Train on every image once.

    Returns the mean loss over images, the metrics of what was predicted for each batch while it was trained on, and
    the learning rate of the last step. Raises RunFailed at the first loss that is not finite, found within
    save_summary_steps steps.
    """
    training.model.train()  # but for batch norm that is frozen
    params, device = training.params, training.device
    # Every process computes the loss of the whole batch, from sums over all of them. See differentiable_sum().
    criterion = SegmentationLoss(**params.loss_options(), over_processes=True)
    metrics = Metrics(params.num_classes, device)
    batch_sizes = loader.batch_sampler.sizes  # over all processes
    losses = torch.zeros(len(loader), device=device)  # stays on the device: reading it at every step would wait for it
    learning_rates = []
    progress = EpochProgress(training, batch_sizes)
    for step, (images, labels, seeds) in enumerate(loader):  # a seed for each image, of run and epoch alone
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        if params.augment:
            images, labels = augment(images, labels, seeds, padding=training.model.encoder.padding)
        if params.cutmix:
            images, labels = cutmix(images, labels, seeds, probability=params.cutmix)
        accumulated, updates = training.accumulation(step, batch_sizes)
        learning_rates.append(training.learning_rate)
        losses[step], logits = train_step(
            training, criterion, images, labels, batch_size=batch_sizes[step], accumulated=accumulated, updates=updates
        )
        metrics.update(logits.argmax(1), labels)
        if step % params.save_summary_steps == 0:  # a name of old params.json files: no summary is saved
            training.check_losses(losses[: step + 1], learning_rates)
        progress.update(batch_sizes[step], losses[: step + 1])
    progress.bar.close()
    training.check_losses(losses, learning_rates)
    metrics.reduce()  # over the processes, each of which must come here
    mean = (losses.cpu().double() @ torch.tensor(batch_sizes, dtype=torch.float64)).item() / sum(batch_sizes)
    return {"loss": mean, "learning_rate": learning_rates[-1], **metrics.compute()}


def train_step(
    training: Training,
    criterion: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    accumulated: float = 1,
    updates: bool = True,
) -> tuple[Tensor, Tensor]:
    """Train on images (B, 3, S, S) of 0-255 and uint8 labels (B, S, S), 255 is void. Return loss, logits (B, C, S, S).

    B is this process's part of a batch, perhaps 0; batch_size and the loss are those of the whole. accumulated are the
    images that share a step of the optimizer, over those of this batch; updates says whether it is the last of them.
    """
    params, device = training.params, training.device
    training.share_dropout(batch_size)  # every process draws for the whole batch, and takes its rows
    with training.no_sync(unless=updates), devices.autocast(device, params.precision):  # decides for backward() too
        x = to_input(images, device, **devices.input_options(training.model, params))  # mean, std, layout
        logits = training.wrapped_model(x)  # compiled, or in DDP, or both, or neither
    loss = criterion(logits, labels)
    backward(training, loss / accumulated, updates=updates)
    return loss.detach(), logits.detach()


def backward(training: Training, loss: Tensor, *, updates: bool = True) -> None:
    """Add the gradient of loss to those of earlier batches, and then, if asked, update the weights."""
    training.scaler.scale(loss).backward()
    if not updates:
        return
    if training.params.clip_grad_norm is not None:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.params.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()
    training.end_step()  # sets the next learning rate, averages the weights


def build_model(params: Params, weights: Path | None, *, resumed: bool) -> tuple[FCN_GCN, list[str]]:
    """Build the network, on the CPU, in rank 0 with the weights that it starts from. Returns it and lines for the log.

    They name layers that start afresh, and options that are not those that a file of weights was trained with.
    """
    # Training() sends what rank 0 has to the other processes.
    pretrained = params.pretrained if devices.is_main() and not resumed and weights is None else False
    model = FCN_GCN(**params.network_options(), pretrained=pretrained)
    notes = []
    if params.num_channels is not None:
        notes.append('"num_channels" is accepted for old params.json files; this network has no use for it')
    if model.encoder.weights:
        notes.append(f"the encoder begins with the weights of {model.encoder.weights}")
    if weights and devices.is_main():
        notes += init_from(model, weights, params)
    if params.freeze_encoder_statistics and not (params.pretrained or weights or resumed):
        notes.append('"freeze_encoder_statistics" without weights to start from: its batch norm does not normalize')
    return model, notes


def build_and_train(start: Start, device: torch.device, args: argparse.Namespace) -> None:
    """Build data, network and training state, as last.pth.tar has it if the run resumes, and train.

    What --overwrite deletes goes last, when nothing can be wrong with the new run any more.
    """
    params, state = start.params, start.state
    train_split, val_split, about = find_splits(start)  # about: what checkpoints say of data and --set
    devices.seed_everything(params.seed, deterministic=params.deterministic)  # from here on all processes draw alike
    model, notes = build_model(params, start.init_from, resumed=state is not None)  # init_from: None if it resumes
    check_last_batch(model, params, len(train_split.ids))  # raises if it cannot train on the smallest
    devices.to_device(model, params, device)  # and to the memory format; DDP and compiling are Training's
    train_set = make_dataset(train_split, about["class_names"], params, model)
    val_set = make_dataset(val_split, about["class_names"], params, model)
    check_classes(train_set)
    notes += [*seen_in_training(train_set, val_set), *too_dark(train_set)] if devices.is_main() and not state else []
    own: dict[str, Any] = {"device": device, **devices.loading_options(params)}  # workers, rank, number of processes
    train_loader = make_loader(train_set, batch_size=params.batch_size, seed=params.seed, **own)  # shuffled
    val_loader = make_loader(val_set, batch_size=params.scoring_batch_size, **own)  # in the order of the list
    iter(val_loader)  # starts its processes: those that start later keep a copy of a training step's memory
    devices.reuse_memory(device)  # on the CPU malloc keeps what a step frees
    training = Training(model, params, len(train_loader), about)
    if start.set:
        notes.append(f"--set, in the place of values in params.json: {json.dumps(start.set)}")
    if state is not None:
        training.load_state_dict(state, args.model_dir / "last.pth.tar")
        notes.append(f"continuing after epoch {training.epoch}; changed since: {changes_since(start, training, args)}")
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    summary = (
        f"{args.model_dir}: {len(train_split.ids)} images of {params.train_split}, {len(val_split.ids)} of val; "
        f"{params.encoder}, {count:.1f} million parameters, on {devices.device_summary(device)} in {params.precision}"
    )
    outputs = open_outputs(training, val_set, args, start, [summary, *notes])  # a resume writes its last epoch anew
    with advising_to_resume(args):
        train(training, train_loader, val_loader, outputs)


def main(args: argparse.Namespace) -> None:
    if args.tensorboard:
        require("torch.utils.tensorboard", purpose="events")
    with devices.processes(args.device) as device, sole_run(args.model_dir):
        # The params and last.pth.tar if --resume finds one; an earlier run is refused without --resume or --overwrite.
        if start := begin(args, device):  # None: has finished, and last.pth.tar was not kept
            build_and_train(start, device, args)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), several_processes=True))
