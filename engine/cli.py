"""The command line of the scripts and how they end: flags, errors in one line, exit status."""

import argparse
import importlib
import io
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from engine.devices import is_main, rank, world_size
from model import UserError, first_line
from utils import RunFailed, is_out_of_memory

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # before it is imported: it tells of a home without a folder
MOMENT = 5.0  # seconds; torchrun ends all processes within them once one has failed
OUT_OF_MEMORY = (
    'out of memory; lower "batch_size" (raising "accumulation_steps" makes up for it) or "image_size", '
    'or set "precision" to "bf16"'
)
LOADER_ADVICE = {  # by what is said where loader processes cannot send batches, or one has died
    "AF_UNIX path too long": "set TMPDIR to a folder with a shorter name",
    "Too many open files": "allow more (ulimit -n 65536)",
    "</torch_|Bus error": "/dev/shm is full; make it larger (docker run --shm-size 8g)",
    "DataLoader worker|Pin memory thread": "memory may have been short",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it at the end of the time."""


def run_main(main: Callable[[], int | None], *, several_processes: bool = False) -> int:
    """Call main and turn the errors a user can do something about into one line on stderr and an exit status.

    2 for a mistake in the input, 1 for any other failure, 130 for SIGINT, 143 for SIGTERM. several_processes: torchrun
    may start more than one.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name, and Windows's pipes few letters
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about odd photos, which are read
    try:
        if not several_processes and world_size() > 1:
            raise UserError("this is work for one process; start it without torchrun")
        status = main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, which Windows has not
    except (Exception, KeyboardInterrupt) as error:
        if (found := explained(error)) is None:
            raise
        status, message = found
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if not is_main():
        time.sleep(MOMENT)  # in which torchrun ends this process, if rank 0 has failed too and says why
        message = f"(rank {rank()} on {socket.gethostname()}) {message}"
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated("terminated")


def message(error: BaseException) -> str:
    """Return what an error says, also one of a loader process, where PyTorch puts a traceback before it."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].removeprefix("model.").removeprefix("UserError: ")
    return text


def explained(error: BaseException) -> tuple[int, str] | None:
    """Return the exit status and the line for an error that a user can do something about, None for any other."""
    text = message(error)
    if isinstance(error, UserError):
        return 2, text
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, text or "interrupted"
    for pattern, advice in LOADER_ADVICE.items() if isinstance(error, RuntimeError) or "AF_UNIX" in text else ():
        if re.search(pattern, text):
            return 1, f'loader processes have failed ({text}); {advice}, or set "num_workers" lower, or to 0 for none'
    if isinstance(error, RunFailed | OSError):
        return 1, text
    if is_out_of_memory(error):
        return 2, OUT_OF_MEMORY
    if type(error).__module__.startswith("torch._inductor"):
        return 1, f'"compile" is true, but: {first_line(error)}; install what is missing, or set it to false'
    if world_size() > 1 and (isinstance(error, dist.DistError) or re.search("gloo|Gloo|NCCL", text)):
        return 1, f"another process of this run has ended, or has not answered in time ({first_line(error)})"
    return None


def experiment_parser(
    description: str, *, data: str = "folder of the data set (default: the one of the run, or data)", several=False
) -> argparse.ArgumentParser:
    """Make a parser with the flags that every script on an experiment, or on several, has.

    data says what --data_dir is for.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)  # --over would delete a run
    if not is_main():  # of several processes only one prints usage, help and errors
        parser._print_message = lambda *_: None  # type: ignore[method-assign]
    folders = "folders of experiments or sweeps" if several else "folder of the experiment: params.json and all output"
    add_folder(parser, "--model_dir", "experiments/base_model", folders, several=several)
    parser.add_argument("--data_dir", type=Path, help=data)
    devices = ("auto", "cpu", "cuda", "mps", "xpu")
    parser.add_argument("--device", choices=devices, default="auto", help="(default: %(default)s)")
    return parser


def add_restore_file(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the checkpoint to predict with."""
    which = "which checkpoint of model_dir: best, last (default: %(default)s)"
    parser.add_argument("--restore_file", type=checkpoint_name, default="best", help=which)


def checkpoint_name(text: str) -> str:
    """Parse the value of --restore_file, with or without the ending of the file."""
    return text.removesuffix(".pth.tar")


def key_and_value(given: list[str]) -> dict[str, Any]:
    """Parse the values of --set, KEY=VALUE each: the value is JSON, or else a string."""
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key in values:
            raise UserError(f"--set {text}: give every key once, as learning_rate=0.01")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def require(package: str, purpose: str, install: str = "") -> None:
    """Raise UserError unless a package can be imported; install is what pip is given, where not its name alone."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        name = package.rsplit(".", 1)[-1]
        raise UserError(f"{purpose} cannot be made without {name} ({error}): pip install {install or name}") from None


def positive(text: str) -> int:
    """Parse the value of a flag that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_folder(parser: argparse.ArgumentParser, flag: str, default: str, meaning: str, *, several=False) -> None:
    """Add a flag for a folder, or for several, which are a list then."""
    many: dict[str, Any] = {"nargs": "+", "default": [Path(default)]} if several else {"default": Path(default)}
    parser.add_argument(flag, type=Path, help=f"{meaning} (default: {default})", **many)
