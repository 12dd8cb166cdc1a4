"""What several processes of one run, as torchrun starts them, agree on; a process that is alone agrees with itself."""

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

import torch
import torch.distributed as dist

from engine import cli, ranks
from engine.ranks import LostConnection
from model import UserError

T = TypeVar("T")
STEP_PATIENCE = timedelta(minutes=10)  # that a process waits for the others in training
SETUP_PATIENCE = timedelta(days=1)  # and while one of them reads a million photos
_setup_group: dist.ProcessGroup | None = None  # for what takes long, and for plain values
_job: str | None = None


def job() -> str | None:
    """Return the name of the job that torchrun runs here, ID/UUID, the same after a restart; None without torchrun."""
    return _job


def is_this_job(name: Any, *, by_id: bool) -> bool:
    """Return whether that is the name of this job; by_id: the same --rdzv_id is enough, for torchrun may be new too."""
    if _job is None or not isinstance(name, str):
        return False
    return name == _job or (by_id and _job.rpartition("/")[0] == name.rpartition("/")[0] != "none")


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Connect the processes while the block runs; gives this one's torch.device.

    device is "auto" or a kind of device; of several GPUs a process takes that of its local rank. Raises UserError if
    the device is absent, if there are too few of them, or if machines differ in kind.
    """
    global _job
    if "TORCHELASTIC_RUN_ID" in os.environ:
        unique = _torchrun_store().compare_set("job", "", str(uuid.uuid4())).decode()
        _job = f"{os.environ['TORCHELASTIC_RUN_ID']}/{unique}"
    if ranks.world_size() == 1:
        yield pick_device(device)
        return

    try:
        _connect(on_gpu=device != "cpu" and torch.cuda.is_available())
        yield _own_device(device)
        dist.barrier(group=_setup_group)  # the first holds the addresses of all
        dist.destroy_process_group()
    except RuntimeError as error:
        raise_if_lost(error)
        raise


@cache
def _torchrun_store() -> dist.Store:
    """Return torchrun's store; without torchrun, one that rank 0 holds while it lives."""
    return next(dist.rendezvous("env://", ranks.rank(), ranks.world_size(), timeout=STEP_PATIENCE))[0]


def _connect(*, on_gpu: bool) -> None:
    global _setup_group

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in handlers:  # no handler would run while a connection is waited for
        signal.signal(number, signal.SIG_DFL)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    own, of = ranks.rank(), ranks.world_size()
    dist.init_process_group(backend, store=_store(), timeout=STEP_PATIENCE, rank=own, world_size=of)
    group = dist.new_group(backend="gloo", timeout=SETUP_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # and no number, which a process outside of the group would get
    _setup_group = group
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _store() -> dist.Store:
    """Return where processes leave their addresses for each other: in rank 0, whose own address torchrun's store has.

    Torchrun's store itself keeps the addresses of an earlier attempt, so after a restart some would be found that
    nobody answers any more (https://github.com/pytorch/pytorch/issues/135712). Of an old address of rank 0 this is seen
    at once, and it is asked for again.
    """
    host, key = os.environ["MASTER_ADDR"], "port of rank 0"
    if ranks.is_main():
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


def _own_device(name: str) -> torch.device:
    with together():
        device = pick_device(name)
        if device.type == "cuda":
            if ranks.local_world_size() > torch.cuda.device_count():
                raise UserError(
                    f"{ranks.local_world_size()} processes on {socket.gethostname()}, which has "
                    f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node, or train on the CPU with --device cpu"
                )
            device = torch.device("cuda", ranks.local_rank())
            torch.cuda.set_device(device)
        elif device.type != "cpu":
            raise UserError(f"several processes run on CUDA devices or CPUs, not on {device.type}; give --device cpu")
    if len(kinds := set(gather(device.type))) > 1:
        with together():
            raise UserError(f"some processes are on {' and others on '.join(sorted(kinds))}; give --device for all")
    return device


def pick_device(name: str) -> torch.device:
    """Return the torch.device of that kind, or for "auto" of the accelerator that PyTorch finds, else the CPU.

    Raises UserError for one that is not here.
    """
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name not in ("auto", "cpu", here.type):
        raise UserError(f"--device {name}: PyTorch sees no {name.upper()} device here; use --device cpu or auto")
    return torch.device(here.type if name == "auto" else name)


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank, in every process."""
    if ranks.world_size() == 1:
        return [value]

    values: list[Any] = [None] * ranks.world_size()
    dist.all_gather_object(values, value, group=_setup_group)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Wait at the end of the block for all processes. An error in one of them ends all.

    The first of those that have one raises its own, with its machine's name if it is not rank 0; the others end without
    a word, as all speak to the same terminal.
    """
    if ranks.world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    statuses = gather(failure and (2 if isinstance(failure, UserError) else 1))
    failed = [number for number, status in enumerate(statuses) if status]
    if failure and failed[0] == ranks.rank():
        raise failure
    if failed:
        raise SystemExit(statuses[failed[0]])


def local_rank0_first(function: Callable[[], T]) -> T:
    """Call function in one process per machine, then in the others, which find what it has made. Returns its result."""
    for turn in (True, False):
        with together():
            if (ranks.local_rank() == 0) is turn:
                result = function()
    return result


def broadcast_from_main(function: Callable[[], T]) -> T:
    """Call function in rank 0 and return its result in all; if it raises an error there, the others end quietly."""
    if ranks.world_size() == 1:
        return function()

    box: list[Any] = [None]
    with together():
        if ranks.is_main():
            box[0] = function()
    dist.broadcast_object_list(box, src=0, group=_setup_group)
    return box[0]


def all_reduce_max(value: int) -> int:
    """Return the largest of the values of all processes."""
    if ranks.world_size() == 1:
        return value

    result = torch.tensor(value)
    dist.all_reduce(result, dist.ReduceOp.MAX, group=_setup_group)
    return int(result.item())


def stop_together() -> None:
    """Stop all processes if a signal has come to any of them; all must call it equally often."""
    if number := all_reduce_max(cli.signal_received()):
        cli.stop_as_asked(number)


def raise_if_lost(error: RuntimeError) -> None:
    """Raise LostConnection if that is what an error of PyTorch means."""
    if ranks.world_size() == 1:
        return

    text = str(error)
    if isinstance(error, dist.DistError) or re.search("gloo/transport|Gloo connectFullMesh|NCCL", text):
        reason = re.sub(r"\[/[^]]*\] ?", "", text).strip().split("\n")[0][:120]
        raise LostConnection(f"another process of this run has ended, or has not answered in time ({reason})") from None
