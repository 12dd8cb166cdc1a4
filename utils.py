"""What the scripts share: params.json, the experiment folder, whole files, logging, seeds and checkpoints.

Importing this module does not import torch, so that every --help answers at once.
"""

import argparse
import difflib
import errno
import importlib
import io
import json
import logging
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import distributed
from model import GCN_PADDINGS, HEADS, LOSS_TERMS, UserError, cores, refuse_irregular

ROOT = Path(__file__).resolve().parent


class RunFailed(RuntimeError):
    """A run that cannot go on through no fault of the input. Scripts print it as one line and exit with status 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it at the end of the time."""


def end_at_once_on_interrupt() -> None:
    """Let Ctrl-C end the process without a traceback until run_main(): imports have nothing to clean up."""
    open_standard_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def open_standard_streams() -> None:
    """Let /dev/null stand for stdin, stdout and stderr where they are closed, or the next file would get their number.

    What stdout cannot spell, as a name that is not UTF-8, is escaped, which stderr does anyhow.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # and not what a notebook has instead
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Send to /dev/null what is still to be written to a stdout that takes nothing any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


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
        if not shared and distributed.world_size() > 1:
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
            discard_stdout()
            return 128 + signal.SIGPIPE
        status, message = 1, _last_line_if_from_a_worker(error)
        common = isinstance(error, RunFailed | distributed.LostConnection)
    except KeyboardInterrupt as error:
        common = True
        terminated = isinstance(error, Terminated)
        status, message = 143 if terminated else 130, str(error) or ("terminated" if terminated else "interrupted")
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            status, message = 2, OUT_OF_MEMORY
        elif "DataLoader worker" in str(error):
            status, message = 1, f'a loader process died ({_first_line(error)}); lower "num_workers" if memory is short'
        else:
            raise
    if distributed.is_main() or not common:
        who = "" if distributed.is_main() else f" (rank {distributed.rank()} on {socket.gethostname()})"
        print(f"{Path(sys.argv[0]).name}: error{who}: {message}", file=sys.stderr)
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
def stopping_together() -> Iterator[None]:
    """In it, of several processes none stops at a signal before all call stop_together()."""
    global _deferred
    _deferred = distributed.world_size() > 1
    try:
        yield
    finally:
        _deferred = False


def stop_together() -> None:
    """stop_if_asked() in all processes if a signal has come to any; all must call it equally often."""
    if number := distributed.largest(max(_signals, default=0)):
        _signals.append(number)
        _raise()


def stop_if_asked() -> bool:
    """Raise KeyboardInterrupt or Terminated if a signal has come; in stopping_together() only say whether one has.

    The handler raises it at once; loops call this too, because Python drops what is raised in a destructor or a fork.
    """
    if _signals and not _deferred:
        _raise()
    return bool(_signals)


def _raise() -> None:
    raise Terminated if signal.SIGTERM in _signals else KeyboardInterrupt


def _last_line_if_from_a_worker(error: Exception) -> str:
    """What a loader process said, without the traceback that PyTorch wraps it in."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].removeprefix("model.").removeprefix("UserError: ")


OUT_OF_MEMORY = (
    'out of memory; lower "batch_size" (raising "accumulation_steps" makes up for it) or "image_size", '
    'or set "precision" to "bf16"'
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, or NumPy has found no memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


class _Parser(argparse.ArgumentParser):
    """Of several processes only one prints usage, help and errors."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if distributed.is_main():
            super()._print_message(message, file)


def experiment_parser(description: str, *, trained: bool = False) -> argparse.ArgumentParser:
    """A parser with the flags that every script on one experiment has; trained: see data_dir()."""
    parser = _Parser(description=description)
    add_folder(parser, "--model_dir", "experiments/base_model", "folder of the experiment: params.json and all output")
    if trained:
        parser.add_argument(
            "--data_dir", type=Path, help="folder of the data set (default: the one that the run was trained on)"
        )
    else:
        add_folder(parser, "--data_dir", "data", "folder of the data set")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser


def add_restore_file(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the checkpoint to predict with."""
    parser.add_argument(
        "--restore_file", default="best", help="which checkpoint of model_dir: best, last (default: %(default)s)"
    )


def add_testing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a photo is looked at."""
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="S",
        help="average over these multiples of image_size, as 0.75 1 1.25",
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")


def require(package: str, purpose: str) -> None:
    """Raise UserError unless a package can be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        name = package.rsplit(".", 1)[-1]
        raise UserError(f"{purpose} cannot be made without {name} ({error}): pip install {name}") from None


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that a flag names. Raises UserError where something else stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{flag}: {folder} cannot be a folder, for links on the way lead in a circle") from None
        if not isinstance(error, FileExistsError | NotADirectoryError):
            raise
        raise UserError(f"{flag}: {folder} cannot be a folder, for a file is in the way") from None


def positive(text: str) -> int:
    """The type of a flag whose value is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def add_folder(parser: argparse.ArgumentParser, flag: str, default: str, meaning: str) -> None:
    """Add a flag that names a folder."""
    parser.add_argument(flag, type=Path, default=Path(default), help=f"{meaning} (default: %(default)s)")


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk() in alphabetical order, and after that through the links to folders; each real folder once."""
    seen, waiting = set(), [folder]
    while waiting:
        for here, folders, files in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            yield Path(here), folders, sorted(files)
            waiting += [path for name in folders if (path := Path(here, name)).is_symlink()]


def table_text(text: str) -> str:
    """A text as a cell of a Markdown table can hold it."""
    return " ".join(text.split()).replace("|", r"\|")


# ---------------------------------------------------------------------------------------------------- params.json


def _key(default: Any, allowed: str, check: Callable[[Any], bool]) -> Any:
    metadata = {"allowed": allowed, "check": check}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _number(default: float | None, allowed: str, check: Callable[[float], bool]) -> Any:
    nullable = default is None
    allowed = f"a number {allowed}" + (" or null" if nullable else "")
    return _key(default, allowed, lambda v: (nullable and v is None) or (is_number(v) and check(v)))


def _integer(
    default: int | None, minimum: int, maximum: int = 2**31 - 1, *, also: str = "", check: Callable = lambda v: True
) -> Any:
    nullable = default is None
    most = f" and at most {maximum}" if maximum < 2**31 - 1 else ""
    allowed = f"an integer of at least {minimum}{most}{also}" + (" or null" if nullable else "")
    return _key(
        default,
        allowed,
        lambda v: (nullable and v is None) or (type(v) is int and minimum <= v <= maximum and check(v)),
    )


def _choice(default: str, *others: str) -> Any:
    options = (default, *others)
    return _key(
        default, " or ".join(json.dumps(option) for option in options), lambda v: isinstance(v, str) and v in options
    )


def _flag(default: bool) -> Any:
    return _key(default, "true or false", lambda v: isinstance(v, bool))


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number, and no truth value."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN too


def _are_loss_weights(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= set(LOSS_TERMS):
        return False
    return all(is_number(w) and w >= 0 for w in value.values()) and any(value.values())


@dataclass(frozen=True)
class Params:
    """The hyperparameters of one experiment: every key that params.json may hold, its default and what is allowed."""

    learning_rate: float = _number(0.001, "above 0", lambda v: v > 0)
    batch_size: int = _integer(5, 1)
    num_epochs: int = _integer(35, 1)
    dropout_rate: float = _number(0.0, "from 0 to below 1", lambda v: 0 <= v < 1)
    save_summary_steps: int = _integer(100, 1)
    num_workers: int = _integer(4, 0)
    num_channels: int | None = _integer(None, 1)

    dataset: str = _choice("voc", "sample")
    image_size: int = _integer(224, 32, 16384)
    num_classes: int = _integer(21, 2, 255)
    augment: bool = _flag(False)
    normalize: bool = _flag(True)
    cache: bool = _flag(True)
    train_split: str = _key(
        "train", "the name of a list", lambda v: isinstance(v, str) and v.isprintable() and v == Path(v).name != ""
    )

    loss_weights: dict[str, float] = _key(
        {"bce": 0.4, "dice": 0.4, "inverse_dice": 0.2},
        f"an object of weights of at least 0, not all of them 0, for {', '.join(LOSS_TERMS)}",
        _are_loss_weights,
    )
    optimizer: str = _choice("sgd", "adamw")
    momentum: float = _number(0.99, "from 0 to below 1", lambda v: 0 <= v < 1)
    weight_decay: float = _number(0.0005, "of at least 0", lambda v: v >= 0)
    schedule: str = _choice("constant", "poly", "cosine")
    warmup_epochs: int = _integer(0, 0)
    clip_grad_norm: float | None = _number(None, "above 0", lambda v: v > 0)
    ema_decay: float | None = _number(None, "from 0 to below 1", lambda v: 0 <= v < 1)
    accumulation_steps: int = _integer(1, 1)
    early_stopping_patience: int | None = _integer(None, 1)
    keep_last: bool = _flag(True)

    precision: str = _choice("auto", "fp32", "bf16", "fp16")
    channels_last: bool = _flag(True)
    compile: bool = _flag(False)
    seed: int = _integer(230, 0, 2**63 - 1, also=" and below 2^63")
    deterministic: bool = _flag(False)

    kernel_size: int = _integer(7, 3, 255, also=" that is odd", check=lambda v: v % 2 == 1)
    head: str = _choice(*HEADS)
    boundary_refinement: bool = _flag(True)
    stem_maxpool: bool = _flag(False)
    gcn_padding: str = _choice(*GCN_PADDINGS)
    zero_init_residual: bool = _flag(False)
    pretrained: bool = _flag(True)

    @classmethod
    def load(cls, path: str | Path) -> "Params":
        """Read params.json. Raises UserError naming the file and, for each fault, key, value and what is allowed."""
        values = read_json(path, if_absent="an experiment is a folder with a params.json, {} for the defaults")
        if not isinstance(values, dict):
            raise UserError(f'{path} must hold one JSON object, as {{"learning_rate": 0.01}}')
        return cls.parse(values, path)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str | Path) -> "Params":
        """Params of the given keys and values. Raises UserError that begins with source and names every fault."""
        if faults := [fault for key, value in values.items() if (fault := cls.fault(key, value))]:
            raise UserError(f"{source}: {'; '.join(faults)}")
        params = cls(**values)
        if params.warmup_epochs >= params.num_epochs:
            raise UserError(
                f'{source}: "warmup_epochs" is {params.warmup_epochs}; '
                f'allowed: fewer than "num_epochs", {params.num_epochs}'
            )
        return params

    @classmethod
    def fault(cls, key: str, value: Any) -> str | None:
        """What is wrong with a key and its value, in words; None if nothing is."""
        known: dict[str, Field] = {f.name: f for f in fields(cls)}
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {json.dumps(nearest[0])}?" if nearest else f"known keys: {', '.join(known)}"
            return f"unknown key {json.dumps(key)}; {hint}"
        rule = known[key].metadata
        return None if rule["check"](value) else f'"{key}" is {json.dumps(value)}; allowed: {rule["allowed"]}'

    def network_options(self) -> dict[str, Any]:
        """The keywords of model.net.FCN_GCN but for pretrained."""
        return {key: getattr(self, key) for key in (*ARCHITECTURE, "dropout_rate", "zero_init_residual")}

    def input_options(self) -> dict[str, Any]:
        """The keywords of model.transforms.to_input."""
        return {"normalize": self.normalize, "channels_last": self.channels_last}

    def loading_options(self) -> dict[str, Any]:
        """The keywords of the loaders of model.data_loader that this process, of several perhaps, gives them."""
        workers = min(self.num_workers, max(1, cores() // distributed.local_world_size()))
        return {"num_workers": workers, "rank": distributed.rank(), "world_size": distributed.world_size()}

    @property
    def scoring_batch_size(self) -> int:
        """Of loaders that score: batch_size, but no more than one process can hold of what many may have trained on."""
        return max(1, min(self.batch_size, SCORED_AT_ONCE // self.image_size**2))


SCORED_AT_ONCE = 32 * 224**2  # pixels
ARCHITECTURE = ("num_classes", "kernel_size", "head", "boundary_refinement", "stem_maxpool", "gcn_padding")


def read_json(path: str | Path, *, if_absent: str) -> Any:
    """The value in a JSON file. Raises UserError naming the file; if_absent says what to do where there is none."""
    path = Path(path)
    refuse_irregular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except FileNotFoundError:
        raise UserError(f"no {path}; {if_absent}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, a repeated key, NaN
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}:
        raise ValueError(f"{', '.join(sorted(repeated))} given twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


# ---------------------------------------------------------------------------------------------------- whole files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to that takes path's place, synced to disk, when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # not every file system can
            os.fsync(folder)  # or a power cut could undo the renaming
        os.close(folder)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(picture: Any, path: Path) -> None:
    """Write a Pillow image as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_figure(figure: Any, path: Path, *, dpi: int = 100) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # that the font has not
        figure.savefig(temporary, format="png", dpi=dpi)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write value as indented JSON, whole or not at all; NaN and infinities are an error, None is null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


# ---------------------------------------------------------------------------------------------------- locks


@dataclass(frozen=True)
class Lock:
    """A locked file. The lock lasts until release(), or until every process that has inherited the descriptor has
    ended, however it ended: there are no stale locks.
    """

    path: Path
    descriptor: int

    def release(self) -> None:
        """Give the lock back and remove its file."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def lock(path: Path, *, patience: float = 0.0) -> Lock | None:
    """Lock a file, made if need be; None if another process holds it for patience seconds."""
    import fcntl

    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return Lock(path, descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(0.05)
        except FileNotFoundError:  # the last owner has removed it in the meantime, or, above, replaced it
            pass
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock; writes nothing."""
    import fcntl

    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# ---------------------------------------------------------------------------------------------------- experiment folder

OUTPUTS = (
    "train.log",
    "history.jsonl",
    "last.pth.tar",
    "best.pth.tar",
    "last.onnx",  # of the checkpoints of these names; an export under a name of the user's is the user's
    "best.onnx",
    "run.json",
    "samples.png",
    "curves.png",
    "metrics_*.json",
    "metrics_*.png",
    "overlays_*/*.png",
    "tensorboard/events.*",
    "trial.json",
)
RUN_LOCK = ".lock"  # held while train.py works in a folder
TRIAL_LOCKS = ".locks"  # in the folder of a sweep; one for every trial that is started or at work
LOCK_PATIENCE = 8.0  # seconds; loader processes of a killed run, which inherit its lock, end within five


def remove_outputs(model_dir: Path, *, keep_log: bool = False) -> None:
    """Delete what earlier runs have left in an experiment folder; keep_log: all but train.log."""
    for path in outputs(model_dir):
        if keep_log and path.name == "train.log":
            continue
        path.unlink()
        if path.parent != model_dir:
            with suppress(OSError):  # not empty yet
                path.parent.rmdir()


def outputs(model_dir: Path) -> list[Path]:
    """What earlier runs have left in an experiment folder."""
    return sorted(path for pattern in OUTPUTS for path in model_dir.glob(pattern))


@contextmanager
def sole_run(model_dir: Path) -> Iterator[None]:
    """Hold the folder for one run. Raises UserError if another train.py is at work in it."""
    if (held := lock(model_dir / RUN_LOCK, patience=LOCK_PATIENCE)) is None:
        raise UserError(f"another train.py is at work in {model_dir}; wait for it, or stop it first")
    try:
        yield
    finally:
        held.release()


def read_history(model_dir: Path) -> list[dict]:
    """The epochs of history.jsonl, oldest first; [] where there is none."""
    path = model_dir / "history.jsonl"
    refuse_irregular(path)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); mend or remove the line") from None


def score(epoch: dict) -> float:
    """What makes an epoch of history.jsonl better than another: its validation mIoU, 0 where it is not defined."""
    return epoch["val"]["mIoU"] or 0.0


def best_epoch(history: list[dict]) -> dict:
    """The first of the epochs with the highest score."""
    return max(history, key=score)


def write_history(model_dir: Path, history: list[dict]) -> None:
    """Write history.jsonl: one epoch a line."""
    write_text(model_dir / "history.jsonl", "".join(json.dumps(epoch, allow_nan=False) + "\n" for epoch in history))


class _LogFile(logging.FileHandler):
    """A log on a full disk ends the run like any other file, instead of a traceback for every line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:
            error.filename = self.baseFilename
            raise

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what emit() has caught


class _Terminal(logging.StreamHandler):
    """Stdout. The run goes on where that is gone, as after `| head`: train.log has every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            raise  # what emit() has caught
        discard_stdout()


def set_logger(log_file: Path) -> None:
    """Log to the terminal, and with times to log_file."""
    logger = logging.getLogger()
    logger.setLevel(logging.INFO)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    to_file = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")  # folders may have any name
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(to_file)
    logger.addHandler(_Terminal(sys.stdout))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # which tells of its fonts


def provenance(device: Any, params: Params, data_dir: Path) -> dict[str, Any]:
    """What run.json holds: what was run, from which code, with which versions, on what."""
    import numpy
    import PIL
    import torch
    import torchvision

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
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "processes": distributed.world_size(),
        "job": distributed.job(),
        "seed": params.seed,
        "params": asdict(params),
    }


def starts(model_dir: Path) -> list[dict[str, Any]]:
    """What run.json says of the start of a run and of every resume; [] where there is none that can be read."""
    with suppress(ValueError, AttributeError, TypeError):
        first = read_json(model_dir / "run.json", if_absent="")
        return [first, *(dict(record) for record in first.get("resumed", []))]
    return []


def recorded_data_dir(model_dir: Path) -> Path | None:
    """The data folder that a run was last trained on; None where run.json does not say."""
    recorded = [record["data_dir"] for record in starts(model_dir) if isinstance(record.get("data_dir"), str)]
    return Path(recorded[-1]) if recorded else None


def data_dir(args: argparse.Namespace) -> Path:
    """--data_dir; else the folder that the run was trained on; "data" where run.json does not say which it was.

    Raises UserError if the run's folder is gone.
    """
    if args.data_dir is not None:
        return args.data_dir
    recorded = recorded_data_dir(args.model_dir)
    if recorded is None:
        return Path("data")
    if not recorded.is_dir():
        raise UserError(f"{args.model_dir} was trained on {recorded}, which is not there; give --data_dir")
    return recorded


def write_provenance(model_dir: Path, device: Any, params: Params, data_dir: Path, *, resumed: bool) -> None:
    """Write run.json; what a resume was run with is added under "resumed"."""
    path, record = model_dir / "run.json", provenance(device, params, data_dir)
    if resumed and path.exists():
        with suppress(UserError, TypeError, AttributeError):  # damaged, and then written anew
            first = read_json(path, if_absent="")
            record = first | {"resumed": [*first.get("resumed", []), record]}
    write_json(path, record)


def git_commit() -> str | None:
    """The commit this code is at, with "-dirty" when tracked files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------------------------------------------- torch


def to_device(model: Any, params: Params, device: Any) -> None:
    """Move a network to its device, in the memory format that params ask for."""
    import torch

    model.to(device, memory_format=torch.channels_last if params.channels_last else torch.contiguous_format)


def resolve_precision(params: Params, device: Any) -> Params:
    """params with precision "auto" replaced: bf16 where the device has matrix units for it, otherwise fp32."""
    import torch

    if params.precision != "auto":
        return params
    on_cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if on_cuda else torch.cpu._is_amx_tile_supported()
    return replace(params, precision="bf16" if fast else "fp32")


def autocast(device: Any, precision: str) -> Any:
    """The context in which a network computes in "fp32", "bf16" or "fp16"."""
    import torch

    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed PyTorch, and let it use only algorithms that give the same result every time if deterministic."""
    import torch

    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    import torch

    with replacing(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(f"cannot write {path} ({_first_line(error)}); is the disk full?") from None


def checkpoint_path(model_dir: Path, restore_file: str) -> Path:
    """<model_dir>/<restore_file>.pth.tar. Raises UserError for anything but a plain name."""
    if not restore_file or Path(restore_file).name != restore_file:
        raise UserError(
            f"--restore_file {restore_file!r}: give the name of a checkpoint in {model_dir}, as best or last"
        )
    return model_dir / f"{restore_file}.pth.tar"


def load_checkpoint(
    path: str | Path, *, otherwise: str = "use {file}, as with --restore_file {name}"
) -> dict[str, Any]:
    """A checkpoint with its tensors on the CPU. Raises UserError if it is absent, damaged or more than plain data.

    otherwise is what to do with another checkpoint of the folder, should this one be damaged.
    """
    import pickle

    import torch

    path = Path(path)
    refuse_irregular(path)
    existing = sorted(file for file in path.parent.glob("*.pth.tar") if file.exists())  # not links to nowhere
    found = [file.name for file in existing if not (path.exists() and file.samefile(path))]
    others = ""
    if found:
        others = f"; {otherwise.format(file=path.parent / found[0], name=found[0].removesuffix('.pth.tar'))}"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; in this folder: {', '.join(found) or 'none'}") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: damaged, or holds more than tensors and plain values ({_first_line(error)}){others}"
        ) from None
    except Exception as error:  # whatever torch.load makes of other bytes: RuntimeError, EOFError, KeyError, ...
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged or unreadable ({_first_line(error)}){others}") from None
    return checked(checkpoint, path, others)


def checked(checkpoint: Any, path: Path, others: str = "") -> dict[str, Any]:
    """A loaded checkpoint whose values can be what they say. Raises UserError, which others ends."""
    if not isinstance(checkpoint, dict) or not _are_tensors(checkpoint.get("state_dict")):
        raise UserError(f'{path} is not a checkpoint of this network: it has no "state_dict" of tensors')
    averaged, epoch, names = (checkpoint.get(key) for key in ("ema_state_dict", "epoch", "class_names"))
    sound = {
        "params": _is_plain(checkpoint.setdefault("params", {})),
        "ema_state_dict": averaged is None or _are_tensors(averaged),
        "class_names": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "epoch": epoch is None or (type(epoch) is int and 0 <= epoch < 10**6),
    }
    if faults := [key for key, is_sound in sound.items() if not is_sound]:
        raise UserError(
            f"{path} is not a checkpoint of this network, or damaged: {', '.join(faults)} cannot be as it is{others}"
        )
    return checkpoint


def _are_tensors(value: Any) -> bool:
    import torch

    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        # stored in full, and real numbers
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_complex()
        for name, tensor in value.items()
    )


def _is_plain(params: Any) -> bool:
    try:
        json.dumps(params)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(params, dict)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def load_weights(model: Any, state_dict: dict[str, Any], source: str | Path) -> None:
    """Load network weights, all of them and no others.

    Checkpoints of the original implementation hold unused brN.bn.* tensors, which are ignored. Raises UserError naming
    every other tensor that is surplus, missing or of another shape.
    """
    import re

    given = {name: tensor for name, tensor in state_dict.items() if not re.match(r"br[1-9]\.bn\.", name)}
    wanted = model.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"surplus {name}" for name in given if name not in wanted]
    faults += [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{source} does not fit the network that params.json describes: {', '.join(faults[:8])}{more}")
    model.load_state_dict(given)


def why_finished(epoch: int, best_epoch: int, params: Params) -> str:
    """Why a run that has trained so many epochs has nothing left to train; "" if it has."""
    patience = params.early_stopping_patience
    if epoch >= params.num_epochs:
        return f"trained {epoch} of {params.num_epochs} epochs"
    if patience is not None and epoch - best_epoch >= patience:
        return f"stopped early after epoch {epoch}: no better mIoU in {patience} epochs"
    return ""


def predicting_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The weights to evaluate and predict with: the averaged ones if the run kept any."""
    return checkpoint.get("ema_state_dict") or checkpoint["state_dict"]


def load_network(model_dir: Path, restore_file: str, device: Any) -> tuple[Any, Params, dict[str, Any]]:
    """The network of an experiment with the weights of a checkpoint, to predict on device; its params; the checkpoint.

    Raises UserError for a faulty params.json, a faulty checkpoint, or two that do not belong together.
    """
    from model.net import FCN_GCN

    def read() -> tuple[Params, Path, dict[str, Any]]:
        params = resolve_precision(Params.load(model_dir / "params.json"), device)
        file = checkpoint_path(model_dir, restore_file)
        checkpoint = load_checkpoint(file)
        refuse_changed((*ARCHITECTURE, "normalize"), checkpoint, params, file)
        return params, file, checkpoint

    params, file, checkpoint = distributed.from_main(read)
    model = FCN_GCN(**params.network_options(), pretrained=False)
    with distributed.together():
        load_weights(model, predicting_weights(checkpoint), file)
    to_device(model, params, device)
    return model.eval(), params, checkpoint


def agreed_class_names(checkpoint: dict[str, Any], file: Path, root: Path | None, num_classes: int) -> list[str]:
    """The names of the classes in a checkpoint, read from file, and in the data set at root, which must agree.

    Where only one of them has names, those; None is a data set that is not there. Raises UserError naming the first
    class that they call differently.
    """
    from model.data_loader import Layout, class_names, default_class_names

    numbers = [str(index) for index in range(num_classes)]  # which stand for names that are not known
    trained = checkpoint.get("class_names") or []
    trained = trained if len(trained) == num_classes else numbers
    named = default_class_names(num_classes) if root is None else class_names(root, num_classes)
    if root is None or numbers in (trained, named):
        return named if trained == numbers else trained
    for index, (then, now) in enumerate(zip(trained, named, strict=True)):
        if then != now:
            source = Layout.find(root).lists / "classes.txt"
            source = source if source.exists() else f"{root}, which has no classes.txt"
            raise UserError(
                f'class {index} is "{then}" in {file}, "{now}" in {source}; '
                "give the data that the run was trained on with --data_dir, or correct the names there"
            )
    return trained


def refuse_changed(keys: Iterable[str], checkpoint: dict[str, Any], params: Params, source: str | Path) -> None:
    """Raise UserError if params.json has since changed a key without which the checkpoint means something else."""
    trained_with = checkpoint["params"]
    for key in keys:
        now = getattr(params, key)
        if trained_with.get(key, now) != now:
            then, now = json.dumps(trained_with[key]), json.dumps(now)
            raise UserError(f'{source} was trained with "{key}": {then}, params.json says {now}; set it back')
