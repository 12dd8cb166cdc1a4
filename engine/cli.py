"""The command line of the scripts and how they end: flags, signals, errors in one line, exit status."""

import argparse
import importlib
import io
import logging
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from engine import ranks
from model import UserError, first_line
from utils import RunFailed, discard, is_out_of_memory, say

T = TypeVar("T")

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # before it is imported: it tells of a home without a folder


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it at the end of the time."""


def open_standard_streams() -> None:
    """Let /dev/null stand for stdin, stdout and stderr where they are closed, or the next file would get their number.

    What stdout cannot spell, as a name that is not UTF-8, is escaped, which stderr does anyhow.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # and not what a notebook has instead
        sys.stdout.reconfigure(errors="backslashreplace")


def _nobody_reads_stdout() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))  # an error, or that the other end is closed, is told unasked


def run_main(main: Callable[[], int | None], *, shared: bool = False) -> int:
    """Call main and turn the errors a user can do something about into one line on stderr and an exit status.

    2 for a mistake in the input, 1 for any other failure, 130 for SIGINT, 143 for SIGTERM, and without a word 141 where
    nobody reads stdout any more. shared: main is for several processes too; only rank 0 speaks of what all of them
    meet, a signal, a RunFailed or a lost connection.
    """
    open_standard_streams()
    common = False
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about odd photos, which are read
    try:
        if not shared and ranks.world_size() > 1:
            common = True
            raise UserError("this is work for one process; start it without torchrun")
        try:
            status = main() or 0
            sys.stdout.flush()
            return status
        finally:
            ignore_signals()  # it is ending already
    except UserError as error:
        status, message = 2, _last_line_if_from_a_worker(error)
    except (RunFailed, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():  # as after `| head`
            discard(sys.stdout)
            return 128 + signal.SIGPIPE
        status, message = 1, _last_line_if_from_a_worker(error)
        common = isinstance(error, RunFailed | ranks.LostConnection)
    except KeyboardInterrupt as error:
        common = True
        terminated = isinstance(error, Terminated)
        status, message = 143 if terminated else 130, str(error) or ("terminated" if terminated else "interrupted")
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            status, message = 2, OUT_OF_MEMORY
        elif "DataLoader worker" in str(error):
            status, message = 1, f'a loader process died ({first_line(error)}); lower "num_workers" if memory is short'
        else:
            raise
    if ranks.is_main() or not common:
        who = "" if ranks.is_main() else f" (rank {ranks.rank()} on {socket.gethostname()})"
        say(f"{Path(sys.argv[0]).name}: error{who}: {message}", sys.stderr)
    return status


def ignore_signals() -> None:
    """Let nothing interrupt what a process still does before it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_signals: list[int] = []  # that asked this process to stop
_deferred = False


def _stop(number: int, frame: FrameType | None) -> None:
    _signals.append(number)
    stop_if_asked()


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let none of several processes stop at a signal, while the context lasts, before all call stop_together()."""
    global _deferred
    _deferred = ranks.world_size() > 1
    try:
        yield
    finally:
        _deferred = False


def stop_if_asked() -> bool:
    """Raise KeyboardInterrupt or Terminated if a signal has come; in defer_signals() only say whether one has.

    The handler raises it at once; loops call this too, because Python drops what is raised in a destructor or a fork.
    """
    if _signals and not _deferred:
        _raise()
    return bool(_signals)


def in_a_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread and return what it returns, or raise what it raises; the main thread handles signals.

    Python runs handlers in the main thread only. While that waits for others without a timeout, it does not notice a
    signal that the system gave to one of them. The handlers must not raise: leaving would wait for the function.
    """
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(function, *args)
        while wait([called], timeout=0.2).not_done:
            pass
        return called.result()


def signal_received() -> int:
    """Return the number of a signal that asked this process to stop, 0 if none has."""
    return max(_signals, default=0)


def stop_as_asked(number: int) -> None:
    """Raise what a signal of that number to this process would have raised."""
    _signals.append(number)
    _raise()


def _raise() -> None:
    raise Terminated if signal.SIGTERM in _signals else KeyboardInterrupt


def _last_line_if_from_a_worker(error: Exception) -> str:
    """Return what a loader process said, without the traceback that PyTorch wraps it in."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].removeprefix("model.").removeprefix("UserError: ")


OUT_OF_MEMORY = (
    'out of memory; lower "batch_size" (raising "accumulation_steps" makes up for it) or "image_size", '
    'or set "precision" to "bf16"'
)


class _Parser(argparse.ArgumentParser):
    """Of several processes only one prints usage, help and errors."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if ranks.is_main():
            super()._print_message(message, file)


DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def experiment_parser(
    description: str,
    *,
    trained: bool = False,
    data: str = "folder of the data set (default: the one that the run was trained on)",
) -> argparse.ArgumentParser:
    """Make a parser with the flags that every script on one experiment has.

    trained: --data_dir is None by default, and data says what it is for.
    """
    parser = _Parser(description=description)
    add_folder(parser, "--model_dir", "experiments/base_model", "folder of the experiment: params.json and all output")
    if trained:
        parser.add_argument("--data_dir", type=Path, help=data)
    else:
        add_folder(parser, "--data_dir", "data", "folder of the data set")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: %(default)s)")
    return parser


def add_restore_file(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the checkpoint to predict with."""
    parser.add_argument(
        "--restore_file",
        type=checkpoint_name,
        default="best",
        help="which checkpoint of model_dir: best, last (default: %(default)s)",
    )


def add_testing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say at which sizes a photo is predicted."""
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="S",
        help="average over these multiples of image_size, as 0.75 1 1.25",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")


def checkpoint_name(text: str) -> str:
    """Parse the value of --restore_file, with or without the ending of the file."""
    return text.removesuffix(".pth.tar")


def require(package: str, purpose: str) -> None:
    """Raise UserError unless a package can be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        name = package.rsplit(".", 1)[-1]
        raise UserError(f"{purpose} cannot be made without {name} ({error}): pip install {name}") from None


def positive(text: str) -> int:
    """Parse the value of a flag that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_folder(parser: argparse.ArgumentParser, flag: str, default: str, meaning: str) -> None:
    """Add a flag that names a folder."""
    parser.add_argument(flag, type=Path, default=Path(default), help=f"{meaning} (default: %(default)s)")
