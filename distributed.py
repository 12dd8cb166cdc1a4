"""One program run by several processes, as torchrun starts them: who is who, and what they agree on.

Run without torchrun, a process is alone and nothing here has an effect. Importing this module does not import torch.
"""

import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from model import UserError

T = TypeVar("T")

STEP_PATIENCE = timedelta(minutes=10)  # that a process waits for the others in training
SETUP_PATIENCE = timedelta(days=1)  # and while one of them reads a million photos


class LostConnection(ConnectionError):
    """Another process of this run has ended, or has not answered in time."""


_setup_group: Any = None  # for what takes long, and for plain values
_job: str | None = None


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes and speaks: rank 0."""
    return rank() == 0


def bar_disabled() -> bool | None:
    """What tqdm calls disable: one progress bar is enough, and that only on a terminal."""
    return None if is_main() else True


def job() -> str | None:
    """The name of what torchrun runs here, ID/UUID, the same through all of its restarts; None without it."""
    return _job


def is_this_job(name: Any, *, by_id: bool) -> bool:
    """Whether that is the name of what runs here; by_id: the same --rdzv_id is enough, as where torchrun is new too."""
    if _job is None or not isinstance(name, str):
        return False
    return name == _job or (by_id and _job.rpartition("/")[0] == name.rpartition("/")[0] != "none")


def launcher() -> list[str]:
    """The words of a command line that start a script as this one was started, but for addresses."""
    if world_size() == 1:
        return ["python"]
    machines = world_size() // local_world_size()
    command = ["torchrun", "--nproc_per_node", str(local_world_size())]
    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
        command += ["--max-restarts", restarts]
    if machines > 1:
        command += ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:PORT"]
        command += ["--rdzv_id", os.environ.get("TORCHELASTIC_RUN_ID", "ID")]
    return command


def describe(device: Any) -> str:
    """The device, or how many there are, for people."""
    if world_size() == 1:
        return str(device)
    here = f", {local_world_size()} on each machine" if world_size() > local_world_size() else ""
    return f"{device.type} by {world_size()} processes{here}"


@contextmanager
def processes(device: str) -> Iterator[Any]:
    """Connect the processes while the block runs; gives this one's torch.device.

    device is "auto", "cpu" or "cuda"; of several GPUs a process takes that of its local rank. Raises UserError if the
    device is absent, if there are too few of them, or if machines differ in kind.
    """
    global _job
    if "TORCHELASTIC_RUN_ID" in os.environ:
        unique = _torchrun_store().compare_set("job", "", str(uuid.uuid4())).decode()
        _job = f"{os.environ['TORCHELASTIC_RUN_ID']}/{unique}"
    if world_size() == 1:
        yield pick_device(device)
        return
    import torch
    import torch.distributed as dist

    try:
        _connect(on_gpu=device != "cpu" and torch.cuda.is_available())
        yield _own_device(device)
        dist.barrier(group=_setup_group)  # the first holds the addresses of all
        dist.destroy_process_group()
    except RuntimeError as error:
        raise_if_lost(error)
        raise


@cache
def _torchrun_store() -> Any:
    """Torchrun's store; without torchrun, one that rank 0 holds while it lives."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", rank(), world_size(), timeout=STEP_PATIENCE))[0]


def _connect(*, on_gpu: bool) -> None:
    global _setup_group
    import torch.distributed as dist

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:  # no handler would run while a connection is waited for
        signal.signal(number, signal.SIG_DFL)
    backend, place = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", {"rank": rank(), "world_size": world_size()}
    dist.init_process_group(backend, store=_store(), timeout=STEP_PATIENCE, **place)
    _setup_group = dist.new_group(backend="gloo", timeout=SETUP_PATIENCE)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _store() -> Any:
    """Where processes leave their addresses for each other: in rank 0, whose own address torchrun's store has.

    Torchrun's store itself keeps the addresses of an earlier attempt, so after a restart some would be found that
    nobody answers any more (https://github.com/pytorch/pytorch/issues/135712). Of an old address of rank 0 this is seen
    at once, and it is asked for again.
    """
    import torch.distributed as dist

    host, key = os.environ["MASTER_ADDR"], "port of rank 0"
    if is_main():
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=STEP_PATIENCE)
        _torchrun_store().set(key, str(store.port))
        return store
    deadline = time.monotonic() + STEP_PATIENCE.total_seconds()
    while True:
        try:
            port = int(_torchrun_store().get(key))
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
            store.set_timeout(STEP_PATIENCE)
            return store
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _own_device(name: str) -> Any:
    import torch

    with together():
        device = pick_device(name)
        if device.type == "cuda":
            if local_world_size() > torch.cuda.device_count():
                raise UserError(
                    f"{local_world_size()} processes on {socket.gethostname()}, which has {torch.cuda.device_count()} "
                    "GPUs; lower --nproc_per_node, or train on the CPU with --device cpu"
                )
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
    if len(kinds := set(gather(device.type))) > 1:
        with together():
            raise UserError(f"some processes are on {' and others on '.join(sorted(kinds))}; give --device for all")
    return device


def pick_device(name: str) -> Any:
    """torch.device of "auto", "cpu" or "cuda". Raises UserError when CUDA is asked for and absent."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    return torch.device(name)


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in every process."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_setup_group)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Wait at the end of the block for all processes. An error in one of them ends all.

    The first of those that have one raises its own, with its machine's name if it is not rank 0; the others end without
    a word, as all speak to the same terminal.
    """
    if world_size() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    statuses = gather(failure and (2 if isinstance(failure, UserError) else 1))
    failed = [number for number, status in enumerate(statuses) if status]
    if failed and failed[0] == rank():
        raise failure
    if failed:
        raise SystemExit(statuses[failed[0]])


def first_here(function: Callable[[], T]) -> T:
    """function() in one process of every machine, and when that is done in the others, to find what it has made."""
    for turn in (True, False):
        with together():
            if (local_rank() == 0) is turn:
                result = function()
    return result


def from_main(function: Callable[[], T]) -> T:
    """function()'s result in rank 0, for all; if it raises an error there, the others end quietly."""
    if world_size() == 1:
        return function()
    import torch.distributed as dist

    box: list[Any] = [None]
    with together():
        if is_main():
            box[0] = function()
    dist.broadcast_object_list(box, src=0, group=_setup_group)
    return box[0]


def largest(value: int) -> int:
    """The largest of the values of all processes."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    result = torch.tensor(value)
    dist.all_reduce(result, dist.ReduceOp.MAX, group=_setup_group)
    return result.item()


def raise_if_lost(error: RuntimeError) -> None:
    """Raise LostConnection if that is what an error of PyTorch means."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    text = str(error)
    if isinstance(error, dist.DistError) or re.search("gloo/transport|Gloo connectFullMesh|NCCL", text):
        reason = re.sub(r"\[/[^]]*\] ?", "", text).strip().split("\n")[0][:120]
        raise LostConnection(f"another process of this run has ended, or has not answered in time ({reason})") from None
