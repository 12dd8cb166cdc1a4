"""Where a network computes: its device and precision, and the processes that torchrun starts.

Without torchrun a process is alone, with rank 0.
"""

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from model import UserError, attempt, cores
from optimization import PRECISIONS
from params import Params

PATIENCE = timedelta(hours=1)  # that a process waits for the others, one of which may be decoding its photos
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return how many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is the process that writes and speaks: rank 0."""
    return rank() == 0


def bar(total: int, title: str) -> tqdm:
    """Return a progress bar over images: one for all processes is enough, and that only on a terminal."""
    return tqdm(total=total, desc=title, unit="img", leave=False, disable=None if is_main() else True)


def pick_device(name: str) -> torch.device:
    """Return the torch.device of that kind, or for "auto" of the accelerator that PyTorch finds, else the CPU.

    Raises UserError for one that is not here.
    """
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name not in ("auto", "cpu", here.type):
        raise UserError(f"--device {name}: PyTorch sees no {name.upper()} device here; use --device cpu or auto")
    return torch.device(here.type if name == "auto" else name)


@contextmanager
def processes(name: str) -> Iterator[torch.device]:
    """Connect the processes of torchrun while the block runs; gives the device of this one, of a GPU its local rank's.

    Raises UserError if the device is absent or if there are too few of them.
    """
    device = pick_device(name)
    if world_size() == 1:
        yield device
        return
    if device.type == "cuda":
        if local_world_size() > torch.cuda.device_count():
            raise UserError(
                f"{local_world_size()} processes on {socket.gethostname()}, which has {torch.cuda.device_count()} "
                "GPUs; lower --nproc_per_node, or train on the CPU with --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes run on CUDA devices or CPUs, not on {device.type}; give --device cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(), timeout=PATIENCE, rank=rank(), world_size=world_size())
    yield device
    dist.barrier()  # rank 0 holds the addresses of all
    dist.destroy_process_group()


@cache
def _torchrun_store() -> dist.Store:
    return next(dist.rendezvous("env://", rank(), world_size(), timeout=PATIENCE))[0]


def _store() -> dist.Store:
    """Return where processes leave their addresses for each other: in rank 0, whose own address torchrun's store has.

    Torchrun's store itself keeps the addresses of an earlier attempt, so after a restart some would be found that
    nobody answers any more (https://github.com/pytorch/pytorch/issues/135712). Of an old address of rank 0 this is seen
    at once, and it is asked for again.
    """
    host, key = os.environ["MASTER_ADDR"], "port of rank 0"
    if is_main():
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        _torchrun_store().set(key, str(store.port))
        return store
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            port = int(_torchrun_store().get(key))
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
            store.set_timeout(PATIENCE)
            return store
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank, in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(function: Callable, *arguments: Any) -> Any:
    """Call a function in all processes and return what it returns. Raises in all a UserError that one has raised."""
    result = attempt(function, *arguments)
    faults = gather(result if isinstance(result, UserError) else None)
    if fault := next(filter(None, faults), None):
        raise fault
    return result


def to_device(model: nn.Module, params: Params, device: torch.device) -> None:
    """Move a network to its device, in the memory format that params ask for."""
    model.to(device).to(memory_format=torch.channels_last if params.channels_last else torch.contiguous_format)


def reuse_memory(device: torch.device) -> None:
    """Let malloc keep the memory that a step on the CPU frees, for the next step.

    Otherwise it goes back to the kernel, which fills it with zeros before it gives it out again; benchmarks/RESULTS.md
    says what that takes. The options are those of mallopt(3), unless the environment sets one of them.
    """
    if device.type == "cpu" and sys.platform == "linux" and not MALLOC_VARIABLES & os.environ.keys():
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other libraries than glibc may have none
            mallopt(M_TRIM_THRESHOLD, -1)
            mallopt(M_MMAP_MAX, 0)


def rng_states(device: torch.device) -> list[torch.Tensor]:
    """Return the state of an accelerator's random numbers; [] for the CPU, whose own is PyTorch's default one."""
    return [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]


def set_rng_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Set what rng_states() has returned; that of another kind of device, which has another size, is passed over."""
    for state, own in zip(states, rng_states(device), strict=False):
        if state.shape == own.shape:
            torch.get_device_module(device).set_rng_state(state)


def resolve_precision(params: Params, device: torch.device) -> Params:
    """Return params with precision "auto" replaced: bf16 where the device has matrix units for it, otherwise fp32."""
    if params.precision != "auto":
        return params
    fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    fast |= device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return replace(params, precision="bf16" if fast else "fp32")


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which a network computes in one of PRECISIONS."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def input_options(model: nn.Module, params: Params) -> dict[str, Any]:
    """Return the keywords of model.transforms.to_input for a network."""
    return {"mean": model.mean, "std": model.std, "channels_last": params.channels_last}


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed PyTorch, and let it use only algorithms that give the same result every time if deterministic."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def loading_options(params: Params) -> dict[str, Any]:
    """Return the keywords of the loaders of this process."""
    workers = min(params.num_workers, max(1, cores() // local_world_size()))
    return {"num_workers": workers, "rank": rank(), "world_size": world_size()}


def device_name(device: torch.device) -> str:
    """Return the model of a CUDA device, of others what kind of device it is."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_summary(device: torch.device) -> str:
    """Return the device, or how many there are, for people."""
    if world_size() == 1:
        return str(device)
    here = f", {local_world_size()} on each machine" if world_size() > local_world_size() else ""
    return f"{device.type} by {world_size()} processes{here}"
