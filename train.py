"""Train one experiment: model_dir/params.json in, checkpoints and metrics out."""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoints import agreed_class_names, init_from
from engine.cli import checkpoint_name, experiment_parser, require, run_main
from engine.devices import (
    autocast,
    device_summary,
    input_options,
    is_main,
    loading_options,
    processes,
    resolve_precision,
    reuse_memory,
    seed_everything,
    to_device,
)
from engine.evaluation import evaluate
from engine.run import (
    EpochOutputs,
    EpochProgress,
    best_line,
    changes_since,
    check_batches,
    check_folder,
    check_same_list,
    check_trainable,
    find_data_dir,
    finished_without_last,
    list_digest,
    open_outputs,
    read_last,
    sole_run,
)
from engine.training import Training
from model import UserError
from model.data_loader import Loader, SegmentationDataset, make_loader
from model.layouts import Split, class_names, find_split
from model.losses import SegmentationLoss
from model.metrics import Metrics
from model.net import FCN_GCN
from model.transforms import augment, cutmix, to_input
from params import Params


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from last.pth.tar if model_dir has one, else start"
    )
    start.add_argument("--restore_file", type=checkpoint_name, help="last: another way to say --resume")
    start.add_argument(
        "--init_from", type=Path, metavar="FILE", help="start a new run from the weights of this checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in model_dir")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="values that take the place of those of params.json"
    )
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard to model_dir too")
    args = parser.parse_args()
    if args.restore_file not in (None, "last"):
        parser.error("a run resumes from last.pth.tar only; --init_from starts a new one from the weights of another")
    args.resume |= args.restore_file == "last"
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite deletes it: give one of them")
    args.set = dict(map(key_and_value, args.set))
    return args


def key_and_value(text: str) -> tuple[str, Any]:
    """Parse an argument of --set: the value is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text}: give key=value, as learning_rate=0.01")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def train(training: Training, train_loader: Loader, val_loader: Loader, outputs: EpochOutputs) -> None:
    """Train until num_epochs or the early stop, and write every output of an epoch when it ends."""
    while not training.finished:
        start = time.perf_counter()
        train_loader.batch_sampler.set_epoch(training.epoch)
        train_metrics = train_epoch(training, train_loader)
        speed = len(train_loader.dataset) / (time.perf_counter() - start)
        val_metrics = evaluate(training.eval_model, val_loader, training.params, training.device)
        training.check_epoch(train_metrics, val_metrics)
        training.end_epoch(train_metrics, val_metrics, seconds=time.perf_counter() - start, images_per_second=speed)
        if is_main():
            outputs.write_epoch(training, val_loader.dataset)
    logging.info(f"{training.finished}; {best_line(training)}, in {outputs.model_dir}")
    if is_main():
        outputs.close(training)


def train_epoch(training: Training, loader: Loader) -> dict:
    """Train on every image once.

    Returns the mean loss over images, the metrics of what was predicted for each batch while it was trained on, and
    the learning rate of the last step. Raises RunFailed at the first loss that is not finite, found within
    save_summary_steps steps.
    """
    training.model.train()
    params, device = training.params, training.device
    criterion = SegmentationLoss(**params.loss_options(), over_processes=True)
    metrics = Metrics(params.num_classes, device)
    sizes = loader.batch_sampler.sizes  # images per batch, over all processes
    losses = torch.zeros(len(loader), device=device)  # stays on the device: reading it at every step would wait for it
    rates = []
    progress = EpochProgress(training, sizes)
    for step, (images, labels, seeds) in enumerate(loader):
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        if params.augment:
            images, labels = augment(images, labels, seeds, training.model.encoder.padding)
        if params.cutmix:
            images, labels = cutmix(images, labels, seeds, params.cutmix)
        group, ends_group = training.accumulation(step, len(loader))
        rates.append(training.learning_rate)
        losses[step], logits = train_step(
            training, criterion, images, labels, batch_size=sizes[step], group=group, ends_group=ends_group
        )
        metrics.update(logits.argmax(1), labels)
        if step % params.save_summary_steps == 0:
            training.check_losses(losses[: step + 1], rates)
        progress.update(sizes[step], losses[: step + 1])
    progress.bar.close()
    training.check_losses(losses, rates)
    metrics.reduce()
    mean = (losses.cpu().double() @ torch.tensor(sizes, dtype=torch.float64)).item() / sum(sizes)
    return {"loss": mean, "learning_rate": rates[-1], **metrics.compute()}


def train_step(
    training: Training,
    criterion: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    group: int = 1,
    ends_group: bool = True,
) -> tuple[Tensor, Tensor]:
    """Train on a batch, uint8 (B, 3, S, S) and (B, S, S) on the device; return its loss and logits (B, C, S, S).

    batch_size counts the images of all processes. The optimizer takes a step after the last batch of a group.
    """
    params, device = training.params, training.device
    with training.synchronized(batch_size, ends_group=ends_group), autocast(device, params.precision):
        logits = training.forward(to_input(images, device, **input_options(training.model, params)))
    loss = criterion(logits, labels)
    training.step(loss / group, ends_group=ends_group)
    return loss.detach(), logits.detach()


def find_data(params: Params, data_dir: Path, state: dict | None, model_dir: Path) -> tuple[Split, Split, list[str]]:
    """Find train_split, val and the class names, which must be those of a checkpoint that is resumed.

    Raises UserError for every fault that shows without decoding a photo.
    """
    train_split, val_split = (
        find_split(params.dataset, data_dir, name, masks_required=True) for name in (params.train_split, "val")
    )
    check_trainable(params, len(train_split.ids))
    for split in (train_split, val_split):
        check_same_list(split)
    if state is None:
        return train_split, val_split, class_names(val_split, params.num_classes)
    last = model_dir / "last.pth.tar"
    return train_split, val_split, agreed_class_names(state, last, val_split, params.num_classes)


def build_model(params: Params, weights: Path | None, *, resumed: bool) -> tuple[FCN_GCN, list[str]]:
    """Build the network, on the CPU, in rank 0 with the weights that it starts from. Returns it and lines for the log.

    The layers that start afresh, though there is a file of weights, are named there.
    """
    pretrained = params.pretrained if is_main() and not resumed and weights is None else False
    model = FCN_GCN(**params.network_options(), pretrained=pretrained)
    notes = []
    if params.num_channels is not None:
        notes.append('"num_channels" is accepted for old params.json files; this network has no use for it')
    if model.encoder.weights:
        notes.append(f"the encoder begins with the weights of {model.encoder.weights}")
    if weights and is_main() and (fresh := init_from(model, weights, params)):
        notes.append(f"{weights} has another number of classes; these layers start afresh: {fresh}")
    if params.freeze_encoder_statistics and not (params.pretrained or weights or resumed):
        notes.append('"freeze_encoder_statistics" without weights to start from: the encoder is not normalized at all')
    return model, notes


def make_loaders(
    train_split: Split, val_split: Split, names: list[str], params: Params, model: FCN_GCN, device: torch.device
) -> tuple[Loader, Loader]:
    """Decode both splits, or find them decoded, and load them in batches. Raises UserError naming every faulty file."""
    make_dataset = partial(
        SegmentationDataset,
        class_names=names,
        image_size=params.image_size,
        resize=params.resize,
        padding=model.encoder.padding,
        cache=params.cache,
    )
    own = loading_options(params)
    return (
        make_loader(make_dataset(train_split), batch_size=params.batch_size, seed=params.seed, device=device, **own),
        make_loader(make_dataset(val_split), batch_size=params.scoring_batch_size, device=device, **own),
    )


def build_and_train(params: Params, device: torch.device, args: argparse.Namespace, state: dict | None) -> None:
    """Build data, network and training state, as the checkpoint left them if the run resumes, and train."""
    data_dir = find_data_dir(args, params.dataset) if state else args.data_dir or Path("data")
    train_split, val_split, names = find_data(params, data_dir, state, args.model_dir)

    seed_everything(params.seed, deterministic=params.deterministic)
    model, notes = build_model(params, args.init_from, resumed=state is not None)
    check_batches(model, params, len(train_split.ids))
    to_device(model, params, device)
    train_loader, val_loader = make_loaders(train_split, val_split, names, params, model, device)
    reuse_memory(device)
    training = Training(
        model,
        params,
        steps_per_epoch=-(-len(train_loader) // params.accumulation_steps),
        list_digest=list_digest(train_split),
        class_names=names,
        changes=args.set,
    )
    if state is not None:
        training.load_state_dict(state, args.model_dir / "last.pth.tar")
        notes.append(f"continuing after epoch {training.epoch}; changed since: {changes_since(state, training)}")
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    notes.insert(
        0,
        f"{args.model_dir}: {len(train_split.ids)} images of {params.train_split}, {len(val_split.ids)} of val; "
        f"{params.encoder}, {count:.1f} million parameters, on {device_summary(device)} in {params.precision}",
    )
    outputs = open_outputs(training, val_loader.dataset, args, data_dir, state=state, notes=notes)
    train(training, train_loader, val_loader, outputs)


@contextmanager
def saying_how_to_resume() -> Iterator[None]:
    """Add to what cuts a run short, a signal or a full disk, how to continue it."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        what = str(error) or ("interrupted" if type(error) is KeyboardInterrupt else "terminated")
        raise type(error)(f"{what}; the same command with --resume continues the run") from None


def main(args: argparse.Namespace) -> None:
    if args.tensorboard:
        require("torch.utils.tensorboard", "events")
    path = args.model_dir / "params.json"
    Params.load(path, args.set)  # before a lock is put into a folder that holds no experiment
    with processes(args.device) as device, sole_run(args.model_dir) if is_main() else nullcontext():
        state = read_last(args.model_dir, resume=args.resume)
        args.set = (state or {}).get("set", {}) | args.set
        params = resolve_precision(Params.load(path, args.set), device)
        if state is None and args.resume and (reason := finished_without_last(args.model_dir, params)):
            print(f"nothing to do in {args.model_dir}: {reason}; last.pth.tar was not kept to train on from")
            return
        check_folder(state, params, args)
        with saying_how_to_resume():
            build_and_train(params, device, args, state)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
