"""How a run begins in its folder, is resumed, and explains its end."""

import argparse
import copy
import hashlib
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import torchvision

from engine import distributed, ranks
from engine.checkpoints import Restored, check_compatible, checkpoint_path, load_checkpoint
from engine.cli import Terminated, ignore_signals, stop_if_asked
from engine.devices import device_name, device_summary
from engine.folders import (
    FIRST_OUTPUTS,
    WHOLE_FILES,
    Finished,
    best_epoch,
    existing_outputs,
    git_commit,
    recorded_starts,
    remove_outputs,
    sole_run,
    why_finished,
)
from engine.outputs import EpochOutputs, TensorBoard
from engine.training import RESUME_NEEDS, Training
from model import UserError
from model.data_loader import Split
from model.net import FCN_GCN
from params import Params
from utils import RunFailed, is_out_of_memory, log_to_file, read_history, read_json, say, set_logger, write_json


def provenance(device: torch.device, params: Params, data_dir: Path) -> dict[str, Any]:
    """Return what run.json holds: what was run, from which code, with which versions, on what."""
    return {
        "git_commit": git_commit(),
        "argv": sys.argv,
        "data_dir": os.path.abspath(data_dir),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
            **({"timm": version("timm")} if "timm" in sys.modules else {}),
        },
        "device": device_name(device),
        "platform": platform.platform(),
        "processes": ranks.world_size(),
        "job": distributed.job(),
        "seed": params.seed,
        "params": asdict(params),
    }


def write_provenance(model_dir: Path, device: torch.device, params: Params, data_dir: Path, *, resumed: bool) -> None:
    """Write run.json; what a resume was run with is added under "resumed"."""
    path, record = model_dir / "run.json", provenance(device, params, data_dir)
    if resumed and path.exists():
        with suppress(UserError, TypeError, AttributeError):  # damaged, and then written anew
            first = read_json(path, if_absent="")
            record = first | {"resumed": [*first.get("resumed", []), record]}
    write_json(path, record)


@dataclass(frozen=True)
class Start:
    """How a run begins in its folder: what the flags say, or what --resume or a restart by torchrun comes to."""

    restore_file: str | None
    init_from: Path | None
    overwrite: bool


FROM_LAST = Start("last", None, False)


def take_folder(params: Params, args: argparse.Namespace, held: ExitStack) -> tuple[Start, Finished | None]:
    """Hold model_dir for this run. Returns how it begins there, and why all is done already, if it is.

    Raises UserError for a folder that another train.py works in, or with which the flags do not say what to do.
    """
    given, resuming = Start(args.restore_file, args.init_from, args.overwrite), args.resume or is_restart(args)
    if not resuming:
        check_existing_run(given, args.model_dir)
    held.enter_context(sole_run(args.model_dir))
    if (resuming or given == FROM_LAST) and (finished := finished_without_last(params, args.model_dir)):
        return FROM_LAST, finished
    start = resume_or_start(given, args.model_dir) if resuming else given
    check_existing_run(start, args.model_dir)  # again: another run may have ended just before
    return start, None


def check_existing_run(start: Start, model_dir: Path) -> None:
    """Raise UserError unless the flags say what is to become of an earlier run in the folder."""
    earlier = existing_outputs(model_dir)
    traces = [path.name for path in earlier if path.name != "train.log"]  # which a sweep opens before its trial starts
    if traces and start.restore_file is None and not start.overwrite:
        way_on = "continue it with --restore_file last, or " if "last.pth.tar" in traces else ""
        raise UserError(f"{model_dir} already holds a run ({traces[0]}); {way_on}delete it with --overwrite")
    if start.overwrite and start.init_from and os.path.realpath(start.init_from) in map(os.path.realpath, earlier):
        raise UserError(f"--overwrite would delete {start.init_from}; move it to another folder first")


def is_restart(args: argparse.Namespace) -> bool:
    """Return whether torchrun has started this very job before, so that it is to be resumed.

    What the job has done says so itself: its name is in run.json and in its checkpoints. Where no flag says otherwise,
    the same --rdzv_id is the same job.
    """
    by_id = not (args.restore_file or args.init_from or args.overwrite)
    if not any(distributed.is_this_job(start.get("job"), by_id=by_id) for start in recorded_starts(args.model_dir)):
        return False
    last = args.model_dir / "last.pth.tar"
    if last.exists():
        return distributed.is_this_job(load_checkpoint(last).get("job"), by_id=by_id)
    return not args.restore_file


def finished_without_last(params: Params, model_dir: Path) -> Finished | None:
    """Return why a run that has not kept last.pth.tar has nothing left to train, if it has nothing left."""
    best = model_dir / "best.pth.tar"
    if (model_dir / "last.pth.tar").exists() or not best.exists() or not (history := read_history(model_dir)):
        return None
    number = best_epoch(history, params.best_metric)["epoch"]
    return why_finished(history, params) if load_checkpoint(best).get("epoch") == number else None


def resume_or_start(given: Start, model_dir: Path) -> Start:
    """Resume from last.pth.tar, or else start over what a run killed in its first epoch has left.

    Raises UserError where a start would delete more than that.
    """
    if (model_dir / "last.pth.tar").exists():
        return FROM_LAST
    left = {path.relative_to(model_dir).parts[0] for path in existing_outputs(model_dir)}
    epochs = len(read_history(model_dir))
    if epochs > 1 or "best.pth.tar" in left:
        raise UserError(
            f"{model_dir} holds {epochs} epochs and no last.pth.tar to continue from; start over with "
            "--overwrite, or from the weights of its best.pth.tar with --init_from, in another --model_dir"
        )
    no_checkpoint_yet = left <= {Path(output).parts[0] for output in FIRST_OUTPUTS}
    if no_checkpoint_yet and (left <= {"train.log", "trial.json"} or "run.json" in left):
        return replace(given, overwrite=bool(left))
    return given


def say_finished(finished: Finished, model_dir: Path) -> None:
    """Print why there is nothing left to train."""
    if ranks.is_main():
        kept = (model_dir / "last.pth.tar").exists()
        advice = f"raise {finished.limit} to train on" if kept else "last.pth.tar was not kept to train on from"
        say(f"nothing to do in {model_dir}: {finished.reason}; {advice}", sys.stdout)


def read_checkpoint(params: Params, start: Start, model_dir: Path) -> Restored | None:
    """Return what to continue from, if anything. Raises UserError if params.json does not allow it."""
    if start.restore_file is None:
        return None
    file = checkpoint_path(model_dir, start.restore_file)
    if start == FROM_LAST and not file.exists() and not params.keep_last:
        raise UserError(
            f'{file} was not kept ("keep_last": false); start from the weights of best.pth.tar with --init_from, '
            "in another --model_dir"
        )
    checkpoint = load_checkpoint(
        file, otherwise="the weights of another can start a new run: --init_from {file}, in another --model_dir"
    )
    check_compatible(RESUME_NEEDS, checkpoint, params, file)
    return Restored(file, checkpoint)


def check_trainable(params: Params, count: int) -> None:
    """Raise UserError unless these processes can train with params on a list of count images."""
    if broken := params.broken_rules(ranks.world_size()):
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
    if last < (processes := ranks.world_size()) and not _takes(model, 0, params):
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


def check_same_lists(train_split: Split, val_split: Split) -> None:
    """Raise UserError unless the lists of all machines are the same."""
    for split in (train_split, val_split):
        if len(set(distributed.gather(list_digest(split)))) > 1:
            with distributed.together():
                raise UserError(f"{split.name}.txt is not the same on all machines; copy one data set to all of them")


def unfinished_files(model_dir: Path) -> list[Path]:
    """Return what a run that was killed had begun to write."""
    names = (*WHOLE_FILES, "last.pth.tar", "best.pth.tar")
    return [path for name in names for path in model_dir.glob(f".{name}.*.tmp")]


@contextmanager
def report_interruption(args: argparse.Namespace, start: Start) -> Iterator[None]:
    """Say how to go on when a signal, a full disk or a lost process cuts a run short; leave nothing of one that never
    fitted memory. Of several processes rank 0 does so.
    """
    last = args.model_dir / "last.pth.tar"

    def version() -> int:
        return last.stat().st_mtime_ns if last.exists() else 0

    before, earlier = version(), existing_outputs(args.model_dir)
    try:
        try:
            yield
        except RuntimeError as error:
            stop_if_asked()  # a loader process, or another of the run, may have felt the signal first
            distributed.raise_if_lost(error)
            never_fitted = is_out_of_memory(error) and start.restore_file is None and version() == before
            if never_fitted and ranks.is_main():
                for path in set(existing_outputs(args.model_dir)) - set(earlier):
                    path.unlink()
            raise
    except RunFailed as error:
        log_to_file(str(error))
        raise
    except (KeyboardInterrupt, OSError) as error:
        ignore_signals()  # torchrun sends some when a process of several has ended
        what = str(error) or ("terminated" if isinstance(error, Terminated) else "interrupted")
        command = continuing_command(args, start, saved=version() not in (0, before))
        again = "resume" if {"--resume", "--restore_file"} & {*command} else "start again"
        log_to_file(message := f"{what}; {again} with: {shlex.join(command)}")
        raise type(error)(message) from None


def continuing_command(args: argparse.Namespace, start: Start, *, saved: bool) -> list[str]:
    """Return the command line that resumes this run; saved says whether it has written a checkpoint."""
    folders = ["--model_dir", str(args.model_dir), "--data_dir", str(args.data_dir)]
    command = [*ranks.launcher(), "train.py", *folders]
    if args.device != "auto":
        command += ["--device", args.device]
    if args.tensorboard:
        command += ["--tensorboard"]
    if args.resume:
        return [*command, "--resume"]
    if restore_file := "last" if saved else start.restore_file:
        return [*command, "--restore_file", restore_file]
    if start.init_from:
        command += ["--init_from", str(start.init_from)]
    return [*command, "--overwrite"] if start.overwrite or existing_outputs(args.model_dir) else command


def open_outputs(
    training: Training,
    args: argparse.Namespace,
    start: Start,
    *,
    sizes: str,
    fresh_layers: str,
    restored: Restored | None,
) -> EpochOutputs:
    """Begin the log and run.json of a run that is about to train, in rank 0, and return what writes its epochs.

    restored is what the run continues from, if anything.
    """
    outputs = EpochOutputs(args.model_dir)
    if not ranks.is_main():
        return outputs
    params, device = training.params, training.device
    if start.overwrite:
        remove_outputs(args.model_dir, keep_log=args.resume)  # which a sweep writes to already
    for path in unfinished_files(args.model_dir):
        path.unlink()
    set_logger(args.model_dir / "train.log")
    write_provenance(args.model_dir, device, params, args.data_dir, resumed=restored is not None)
    count = sum(parameter.numel() for parameter in training.model.parameters()) / 1e6
    where = f"{params.encoder}, {count:.1f} million parameters, on {device_summary(device)} in {params.precision}"
    logging.info(f"{args.model_dir}: {sizes}; {where}")
    if training.model.encoder.weights:
        logging.info(f"the encoder begins with the weights of {training.model.encoder.weights}")
    if params.num_channels is not None:
        logging.info('"num_channels" is accepted for old params.json files; this network has no use for it')
    if params.freeze_encoder_statistics and not params.pretrained and not (start.init_from or restored):
        logging.info('"freeze_encoder_statistics" without weights to start from: the encoder is not normalized at all')
    if fresh_layers:
        logging.info(f"{start.init_from} has another number of classes; these layers start afresh: {fresh_layers}")
    if restored:
        restore_outputs(outputs, training, restored)
    if args.tensorboard:
        outputs.trackers.append(TensorBoard(args.model_dir, epoch=training.epoch))
    return outputs


def mend_finished(training: Training, file: Path, model_dir: Path) -> None:
    """Write, in rank 0, what a finished run lacks that was cut short after its last epoch; a sound one stays as it is.

    file is the checkpoint that was loaded; from another than last.pth.tar nothing is written.
    """
    if not ranks.is_main() or file.name != "last.pth.tar":
        return
    for path in unfinished_files(model_dir):
        path.unlink()
    outputs = EpochOutputs(model_dir)
    if not _holds(lambda: read_history(model_dir) == training.history):
        outputs.write_metrics(training)
    mend_best(outputs, training)
    outputs.close(training)


def mend_best(outputs: EpochOutputs, training: Training) -> None:
    """Write best.pth.tar if the last epoch is the best one and a kill has come between that and the file."""
    best = outputs.model_dir / "best.pth.tar"
    if training.is_best and not _holds(lambda: load_checkpoint(best)["epoch"] == training.epoch):
        outputs.save_best(training)


def _holds(condition: Callable[[], bool]) -> bool:
    """Return whether a condition holds; where its file is absent or damaged it does not."""
    try:
        return condition()
    except (UserError, KeyError):
        return False


def restore_outputs(outputs: EpochOutputs, training: Training, restored: Restored) -> None:
    """Bring the other outputs to where a checkpoint is, from which a kill or a full disk may have parted them.

    After another checkpoint than last.pth.tar, best.pth.tar stays only where it is known to be of the same epochs.
    """
    then = asdict(Params()) | restored.state["params"]  # what an older program did not know was as it is by default
    changed = [key for key, value in asdict(training.params).items() if then[key] != value]
    if restored.state.get("images") != training.list_digest:
        changed.append("the list of training images")
    if training.params.augment and "resize" not in restored.state["params"]:
        changed.append("augmentation, which has another form in this version")
    logging.info(f"continuing after epoch {training.epoch}; changed since: {', '.join(changed) or 'nothing'}")
    number, best = training.best_epoch, outputs.model_dir / "best.pth.tar"
    same = _holds(lambda: read_history(outputs.model_dir)[:number] == training.history[:number])
    outputs.write_metrics(training)
    outputs.draw_curves(training)
    if restored.file.name == "last.pth.tar":
        mend_best(outputs, training)
    elif training.is_best:
        outputs.save_best(training)
    elif best.exists() and not (same and _holds(lambda: load_checkpoint(best)["epoch"] == number)):
        best.unlink()
        logging.info(f"{best} was of epochs that this run does not have, and is deleted")
