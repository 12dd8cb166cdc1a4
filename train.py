"""Train one experiment: model_dir/params.json in, checkpoints and metrics out."""

import argparse
import logging
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from engine import distributed, ranks
from engine.checkpoints import Restored, agreed_class_names, init_from
from engine.cli import checkpoint_name, defer_signals, experiment_parser, require, run_main
from engine.devices import (
    autocast,
    input_options,
    loading_options,
    resolve_precision,
    reuse_memory,
    seed_everything,
    to_device,
)
from engine.evaluation import evaluate
from engine.outputs import EpochOutputs, EpochProgress, best_line
from engine.run import (
    Start,
    check_batches,
    check_same_lists,
    check_trainable,
    list_digest,
    mend_finished,
    open_outputs,
    read_checkpoint,
    report_interruption,
    say_finished,
    take_folder,
)
from engine.training import Training
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
        "--resume", action="store_true", help="continue from last.pth.tar if model_dir has one, else start: for queues"
    )
    start.add_argument(
        "--restore_file", type=checkpoint_name, help="continue the run in model_dir from this checkpoint, as last"
    )
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


def train(training: Training, train_loader: Loader, val_loader: Loader, outputs: EpochOutputs) -> None:
    """Train until num_epochs or the early stop, and write every output of an epoch when it ends."""
    while not training.finished:
        start = time.perf_counter()
        train_loader.batch_sampler.set_epoch(training.epoch)
        train_metrics = train_epoch(training, train_loader)
        speed = len(train_loader.dataset) / (time.perf_counter() - start)
        val_metrics = evaluate(training.eval_model, val_loader, training.params, training.device)
        distributed.stop_together()
        training.check_epoch(train_metrics, val_metrics)
        training.end_epoch(train_metrics, val_metrics, seconds=time.perf_counter() - start, images_per_second=speed)
        if ranks.is_main():
            outputs.write_epoch(training, val_loader.dataset)  # checkpoints last
        distributed.stop_together()
    logging.info(f"{training.finished.reason}; {best_line(training)}, in {outputs.model_dir}")
    if ranks.is_main():
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
    with EpochProgress(training, sizes) as progress:
        for step, (images, labels, seeds) in enumerate(loader):
            distributed.stop_together()
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            if params.augment:
                images, labels = augment(images, labels, seeds, training.model.encoder.padding)
            if params.cutmix:
                images, labels = cutmix(images, labels, seeds, params.cutmix)
            group, ends_group = training.accumulation(step, len(loader))
            with training.synchronized(sizes[step], ends_group=ends_group), autocast(device, params.precision):
                logits = training.forward(to_input(images, device, **input_options(training.model, params)))
            loss = criterion(logits, labels)
            losses[step] = loss.detach()
            rates.append(training.learning_rate)
            training.step(loss / group, ends_group=ends_group)
            metrics.update(logits.argmax(1), labels)
            if step % params.save_summary_steps == 0:
                training.check_losses(losses[: step + 1], rates)
            progress.update(sizes[step], losses[: step + 1])
    training.check_losses(losses, rates)
    metrics.reduce()
    mean = (losses.cpu().double() @ torch.tensor(sizes, dtype=torch.float64)).item() / sum(sizes)
    return {"loss": mean, "learning_rate": rates[-1], **metrics.compute()}


def find_data(params: Params, data_dir: Path, restored: Restored | None) -> tuple[Split, Split, list[str]]:
    """Find train_split, val and the class names, which must be those of a checkpoint that is resumed.

    Raises UserError for every fault that shows without decoding a photo.
    """
    train_split, val_split = (
        find_split(params.dataset, data_dir, name, masks_required=True) for name in (params.train_split, "val")
    )
    check_trainable(params, len(train_split.ids))
    if restored is None:
        return train_split, val_split, class_names(val_split, params.num_classes)
    return train_split, val_split, agreed_class_names(restored.state, restored.file, val_split, params.num_classes)


def build_model(params: Params, weights: Path | None, *, resumed: bool) -> tuple[FCN_GCN, str]:
    """Build the network, on the CPU, in rank 0 with the weights that it starts from.

    Returns it, and the layers that start afresh though there is a file of weights.
    """
    pretrained = params.pretrained if not resumed and weights is None and ranks.is_main() else False
    model = FCN_GCN(**params.network_options(), pretrained=pretrained)
    return model, init_from(model, weights, params) if weights and ranks.is_main() else ""


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


def build_and_train(params: Params, device: torch.device, args: argparse.Namespace, start: Start) -> None:
    """Build data, network and training state, as a checkpoint left them if the run resumes, and train."""
    restored = distributed.broadcast_from_main(lambda: read_checkpoint(params, start, args.model_dir))
    train_split, val_split, names = distributed.local_rank0_first(lambda: find_data(params, args.data_dir, restored))
    check_same_lists(train_split, val_split)

    seed_everything(params.seed, deterministic=params.deterministic)
    with distributed.together():
        model, fresh_layers = build_model(params, start.init_from, resumed=restored is not None)
        check_batches(model, params, len(train_split.ids))
    to_device(model, params, device)
    train_loader, val_loader = distributed.local_rank0_first(
        lambda: make_loaders(train_split, val_split, names, params, model, device)
    )
    reuse_memory(device)
    training = Training(
        model,
        params,
        steps_per_epoch=-(-len(train_loader) // params.accumulation_steps),
        list_digest=list_digest(train_split),
        class_names=names,
    )
    if restored:
        with distributed.together():
            training.load_state_dict(restored.state, restored.file)
    if restored and training.finished:
        with distributed.together():
            mend_finished(training, restored.file, args.model_dir)
        say_finished(training.finished, args.model_dir)
        return
    sizes = f"{len(train_split.ids)} images of {params.train_split}, {len(val_split.ids)} of val"
    outputs = open_outputs(training, args, start, sizes=sizes, fresh_layers=fresh_layers, restored=restored)
    with defer_signals():
        train(training, train_loader, val_loader, outputs)


def main(args: argparse.Namespace) -> None:
    if args.tensorboard:
        require("torch.utils.tensorboard", "events")
    with distributed.processes(args.device) as device, ExitStack() as held:
        params = distributed.broadcast_from_main(
            lambda: resolve_precision(Params.load(args.model_dir / "params.json"), device)
        )
        start, finished = distributed.broadcast_from_main(lambda: take_folder(params, args, held))
        if finished:  # and known to be without a checkpoint to load
            say_finished(finished, args.model_dir)
            return
        with report_interruption(args, start):
            build_and_train(params, device, args, start)


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args()), shared=True))
